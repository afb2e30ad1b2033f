"""`flextok personalize`, and `--adapter` of the other commands."""

import shlex

import pytest
from PIL import Image
from tiny_models import make_text_pipeline

from flextok_hf import cli


pytest.importorskip("peft")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The working directory, with a model and a folder of images."""
    monkeypatch.chdir(tmp_path)
    make_text_pipeline().save_pretrained("model")
    (tmp_path / "photos").mkdir()
    for number, color in enumerate(["red", "blue", "green"]):
        Image.new("RGB", (20, 16), color).save(f"photos/{number}.png")
    return tmp_path


def test_the_printed_commands_draw_with_what_was_learned(place, capsys):
    (place / "photos" / "bad.png").write_bytes(b"")
    words = ["personalize", "photos", "--name", "my  dog", "--output", "my dog", "--model", "model", "--steps", "2"]
    assert cli.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "note: 1 image unreadable and skipped: bad.png."
    assert lines[1] == "note: 3 of at least 5 images: the adapter will draw little else than these."
    assert lines[2] == "3 images, learned as 'my dog'"
    for line in lines[-2:]:
        program, *words = shlex.split(line)
        assert program == "flextok" and cli.main([*words, "--num-inference-steps", "1", "--quiet"]) == 0
    assert Image.open("image.png").size == (16, 16)
    assert (place / "my dog" / "preview.png").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere", "--name", "x", "--output", "out"], "`folder` 'nowhere' is no folder"),
        (["photos", "--name", " ", "--output", "out"], "`--name` is empty"),
        (["photos", "--name", "x", "--output", "out", "--dtype", "bfloat16"], "`--dtype` bfloat16 is too coarse"),
        (["photos", "--name", "x", "--output", "photos"], "`output` 'photos' exists and is not empty"),
        (["photos", "--name", "x", "--output", "out", "--captions", "metadata"], "as `captions` asks"),
    ],
)
def test_mistakes_are_reported_in_one_line_before_anything_is_written(place, capsys, words, message):
    before = sorted(place.rglob("*"))
    assert cli.main(["personalize", *words, "--model", "model"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert sorted(place.rglob("*")) == before


def test_an_adapter_that_does_not_exist_is_an_error_of_one_line(place, capsys):
    words = ["generate", "a red circle", "--model", "model", "--adapter", "photos", "--output", "image.png"]
    assert cli.main(words) == 2
    assert (
        "`pretrained_model_name_or_path` 'photos' has no 'pytorch_lora_weights.safetensors'" in capsys.readouterr().err
    )
