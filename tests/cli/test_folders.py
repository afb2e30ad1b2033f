"""Folders of photos on the command line, and animations as GIF."""

import json
import shutil

import pytest
from paths import ROOT
from PIL import Image
from tiny_models import make_text_pipeline

from flextok_hf import FlexTokPipeline, cli


PHOTO = ROOT / "docs" / "assets" / "parrots.jpg"
FAST = ["--num-inference-steps", 1]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_text_pipeline().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def photos(tmp_path):
    """A folder with three photos at two depths, a damaged one, a text and a hidden image."""
    folder = tmp_path / "photos"
    (folder / "birds" / "old").mkdir(parents=True)
    for number, path in enumerate(["b.png", "birds/a.png", "birds/old/c.JPG"]):
        Image.new("RGB", (20 + number, 20), (80 * number, 0, 0)).save(folder / path)
    (folder / "birds" / "damaged.jpg").write_bytes(PHOTO.read_bytes()[:2000])
    (folder / "notes.txt").write_text("not a photo")
    shutil.copy(folder / "b.png", folder / ".hidden.png")
    return folder


def run(*words) -> int:
    return cli.main([str(word) for word in (*words, "--device", "cpu")])


def test_a_folder_becomes_ids_of_all_photos_below_it(model, photos, tmp_path, capsys):
    assert run("tokenize", photos, "--output", tmp_path / "ids.json", "--model", model) == 0
    entries = json.loads((tmp_path / "ids.json").read_text())["images"]
    paths = [str(photos / name) for name in ("b.png", "birds/a.png", "birds/old/c.JPG")]
    assert [entry["file"] for entry in entries] == paths
    assert [entry["token_ids"] for entry in entries] == FlexTokPipeline.from_pretrained(model).tokenize(paths).tolist()
    assert "skipped 1 unreadable" in (printed := capsys.readouterr().out) and "damaged.jpg" in printed


def test_a_damaged_photo_that_was_named_is_an_error(model, photos, tmp_path, capsys):
    damaged = photos / "birds" / "damaged.jpg"
    assert run("tokenize", photos / "b.png", damaged, "--output", tmp_path / "ids.json", "--model", model) == 2
    assert "damaged.jpg" in capsys.readouterr().err and not (tmp_path / "ids.json").exists()


@pytest.mark.parametrize("command", ["tokenize", "reconstruct"])
def test_a_folder_without_a_photo_that_can_be_read_is_an_error(command, model, photos, tmp_path, capsys):
    for path in photos.rglob("*.png"):
        path.unlink()
    (photos / "birds" / "old" / "c.JPG").write_bytes(b"")
    output = tmp_path / {"tokenize": "ids.json", "reconstruct": "sheet.png"}[command]
    assert run(command, photos, "--output", output, "--model", model) == 2
    assert "none of 2 files can be read" in capsys.readouterr().err and not output.exists()


def test_a_folder_without_images_is_an_error(tmp_path, capsys):
    assert run("tokenize", tmp_path, "--output", tmp_path / "ids.json") == 2
    assert "holds no images" in capsys.readouterr().err


def test_a_folder_becomes_one_sheet_with_a_row_per_photo(model, photos, tmp_path, capsys):
    output = tmp_path / "sheet.png"
    assert run("reconstruct", photos, "--max-tokens", 1, 6, "--output", output, "--model", model, *FAST) == 0
    assert "3 rows, original, 1 token, 6 tokens" in capsys.readouterr().out
    width, height = Image.open(output).size
    assert 0.9 < width / height < 1.1  # three columns, three rows


def test_a_folder_becomes_a_folder_of_sheets_like_it(model, photos, tmp_path, capsys):
    shared = ["--max-tokens", 1, 6, "--model", model, *FAST]
    assert run("reconstruct", photos, "--output", tmp_path / "sheets", *shared) == 0
    sheets = sorted(str(path.relative_to(tmp_path / "sheets")) for path in (tmp_path / "sheets").rglob("*.*"))
    assert sheets == ["b.png.png", "birds/a.png.png", "birds/old/c.JPG.png"]
    assert run("reconstruct", photos / "b.png", "--output", tmp_path / "one.png", *shared) == 0
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "sheets" / "b.png.png").read_bytes()


def test_photos_with_one_sheet_between_them_are_refused(model, photos, tmp_path, capsys):
    shutil.copytree(photos, tmp_path / "copy")
    assert run("reconstruct", photos, tmp_path / "copy", "--output", tmp_path / "sheets", "--model", model) == 2
    assert "same name" in capsys.readouterr().err


def test_too_many_photos_for_one_sheet_are_refused_before_any_work(photos, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("flextok_hf.cli.checks.MAX_SHEET_ROWS", 3)
    assert run("reconstruct", photos, "--output", tmp_path / "sheet.png") == 2
    assert "4 photos are too many for one sheet" in capsys.readouterr().err


def test_a_streamed_prompt_becomes_a_gif_that_loops(model, tmp_path):
    path = tmp_path / "cat.gif"
    words = ["--token-counts", 1, 2, 6, "--frame-ms", 300, "--output", path, "--model", model, *FAST]
    assert run("stream", "a cat", *words) == 0
    with Image.open(path) as animation:
        assert (animation.format, animation.n_frames, animation.info["loop"]) == ("GIF", 3, 0)
        durations = []
        for number in range(3):
            animation.seek(number)
            durations.append(animation.info["duration"])
    assert durations == [300, 300, 900]


def test_ids_of_different_lengths_become_images(model, tmp_path):
    (tmp_path / "ids.json").write_text("[[1], [2, 3], [4, 5, 6, 7, 8, 9]]")
    assert run("detokenize", tmp_path / "ids.json", "--output", tmp_path / "out.png", "--model", model, *FAST) == 0
    pipe = FlexTokPipeline.from_pretrained(model)
    assert [Image.open(tmp_path / f"out-{number}.png").size for number in (1, 2, 3)] == [(pipe.resolution,) * 2] * 3
