"""The command line: help, wrong input, and end-to-end runs with tiny models and the embedded one."""

import json
import os
import re
import runpy
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from official_checkpoints import write_prior, write_tokenizer
from paths import PHOTO, SCRIPTS
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from flextok_hf import (
    FlexTokEncoder,
    FlexTokEncoderConfig,
    FlexTokFlowDecoder,
    FlexTokPipeline,
    FlexTokPriorConfig,
    FlexTokPriorForCausalLM,
    cli,
    embedded,
)
from flextok_hf.cli.token_files import parse_token_file, write_token_file
from flextok_hf.utils.files import check_output_path, numbered_paths, read_json, write_atomically
from flextok_hf.utils.sheets import contact_sheet


COMMANDS = ("generate", "stream", "tokenize", "detokenize", "reconstruct", "personalize", "convert", "demo", "info")

needs_embedded_model = pytest.mark.skipif(
    not (embedded.EMBEDDED_MODEL_FOLDER / "model_index.json").is_file(), reason="the embedded model is missing"
)


def run(capsys, *arguments) -> tuple[int, str, str]:
    """Run `flextok` in this process and return its exit code, stdout and stderr."""
    try:
        code = cli.main([str(argument) for argument in arguments])
    except SystemExit as leaving:
        code = leaving.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """Save a tiny untrained pipeline with every component, and return its folder."""
    folder = str(tmp_path_factory.mktemp("model"))
    torch.manual_seed(0)
    width, registers = 16, 8
    words = Tokenizer(WordLevel({"<pad>": 0, "</s>": 1, "a": 2, "cat": 3}, unk_token="<pad>"))
    words.pre_tokenizer = Whitespace()
    words.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    decoder = FlexTokFlowDecoder(
        in_channels=3,
        patch_size=4,
        grid_size=4,
        hidden_size=width,
        num_layers=1,
        head_dim=8,
        num_registers=registers,
        code_dim=2,
    )
    with torch.no_grad():
        for parameter in decoder.parameters():
            if not parameter.any():  # a new decoder predicts zero for any input
                parameter.normal_(std=0.2)
            elif parameter.std() < 0.03:
                parameter.mul_(20)
    FlexTokPipeline(
        FlexTokEncoder(
            FlexTokEncoderConfig(
                in_channels=3,
                patch_size=4,
                grid_size=4,
                hidden_size=width,
                num_hidden_layers=1,
                head_dim=8,
                num_registers=registers,
                fsq_levels=[5, 5],
            )
        ),
        decoder,
        FlowMatchEulerDiscreteScheduler(),
        prior=FlexTokPriorForCausalLM(
            FlexTokPriorConfig(
                codebook_size=25,
                hidden_size=width,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=32,
                max_position_embeddings=registers,
                text_hidden_size=width,
            )
        ),
        text_encoder=T5EncoderModel(
            T5Config(vocab_size=4, d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2, pad_token_id=0)
        ),
        tokenizer=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>"),
    ).save_pretrained(folder)
    return folder


def assert_one_line_error(result: tuple[int, str, str], *words: str) -> None:
    code, out, err = result
    assert code == 2
    assert out == ""
    assert err.startswith("flextok: error: ") and err.count("\n") == 1 and err.endswith("\n")
    for word in words:
        assert word in err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_on_a_screen_and_its_example_parses(capsys, command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = run(capsys, command, "--help")
    assert code == 0
    assert len(out.splitlines()) <= 40
    assert max(map(len, out.splitlines())) <= 80
    example = out.split("example:\n")[1].strip()
    assert example.startswith(f"flextok {command}")
    cli.build_parser().parse_args(shlex.split(example)[1:])


def test_the_main_help_lists_every_command_and_its_example_parses(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = run(capsys, "--help")
    assert code == 0 and len(out.splitlines()) <= 40
    assert set(COMMANDS) <= set(re.findall(r"^    (\w+)\b", out, re.MULTILINE))
    cli.build_parser().parse_args(shlex.split(out.split("example:\n")[1])[1:])


@pytest.mark.parametrize(
    "arguments, word",
    [
        ((), "COMMAND"),
        (("draw",), "draw"),
        (("generate", "a cat"), "--output"),
        (("generate", "a cat", "--output", "cat.png", "--max-tokens", "0"), "--max-tokens"),
        (("generate", "a cat", "--output", "cat.png", "--num-images", "-1"), "--num-images"),
        (("generate", "a cat", "--output", "cat.png", "--top-p", "0"), "--top-p"),
        (("generate", "a cat", "--output", "cat.png", "--seed", str(2**63)), "--seed"),
        (("generate", "a cat", "--output", "cat.png", "--temperature", "nan"), "--temperature"),
        (("generate", "a cat", "--output", "cat.png", "--temperature", "0"), "--temperature"),
        (("generate", "a cat", "--output", "cat.png", "--dtype", "int4"), "--dtype"),
        (("reconstruct", "--output", "sheet.png"), "PHOTO"),
        (("generate", "a cat", "--outpt", "cat.png"), "--outpt, did you mean --output?"),
        (("generate", "a cat", "--output", "cat.png", "--max-tokns=5"), "--max-tokns, did you mean --max-tokens?"),
        (("info", "--json", "now"), "unrecognized arguments: now (see `flextok info --help`)"),
    ],
)
def test_wrong_arguments_get_one_line_that_names_the_argument(capsys, arguments, word):
    assert_one_line_error(run(capsys, *arguments), word)


@pytest.mark.parametrize("name", ["cat.xyz", "cat", "missing/cat.png", "."])
def test_an_unwritable_output_is_refused_before_the_model_is_loaded(capsys, tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_one_line_error(run(capsys, "generate", "a cat", "--output", name, "--model", "not/there"), "`output`")


def test_a_decoder_that_the_model_does_not_have_is_named(capsys, model, tmp_path):
    words = ("--model", model, "--decoder", "flow_decoder", "--output", tmp_path / "cat.png")
    assert_one_line_error(run(capsys, "generate", "a cat", *words), "`decoder` 'flow_decoder'")


@needs_embedded_model
def test_the_flow_decoder_of_the_embedded_model_takes_any_guidance_scale(capsys, tmp_path):
    words = ("generate", "a cat", "--max-tokens", 1, "--num-inference-steps", 1, "--guidance-scale", 2, "--output")
    assert_one_line_error(run(capsys, *words, tmp_path / "cat.png"), "`guidance_scale` must be 4", "flow_decoder")
    assert run(capsys, *words, tmp_path / "cat.png", "--decoder", "flow_decoder")[0] == 0


def test_a_missing_photo_is_named(capsys, tmp_path):
    result = run(capsys, "tokenize", "gone.jpg", "--output", tmp_path / "ids.json")
    assert_one_line_error(result, "gone.jpg")


def test_a_missing_token_file_is_named(capsys, tmp_path):
    result = run(capsys, "detokenize", "gone.json", "--output", tmp_path / "out.png")
    assert_one_line_error(result, "gone.json", "flextok tokenize")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("stream", "a cat", "--token-counts", "4", "1", "--output", "cat.webp"), ("--token-counts", "growing")),
        (("stream", "a cat", "--token-counts", "4", "4", "--output", "cat.webp"), ("--token-counts", "growing")),
        (("reconstruct", PHOTO, "--max-tokens", "16", "4", "--output", "sheet.png"), ("--max-tokens", "growing")),
        (("stream", "a cat", "--frame-ms", "5", "--output", "cat.png"), ("--frame-ms", ".webp")),
        (
            ("generate", "", "--image", PHOTO, "--keep-tokens", "9", "--max-tokens", "8", "--output", "cat.png"),
            ("--keep-tokens", "9", "--max-tokens", "8"),
        ),
        (("reconstruct", "photo.png", "--output", "photo.png"), ("`output`", "the photo itself")),
        (("generate", "", "--image", "photo.png", "--keep-tokens", "9", "--output", "./photo.png"), ("photo itself",)),
        (("convert", "a/b", "--text-encoder", "c/d", "--output", "new"), ("--text-encoder", "prior")),
        (("convert", "a/b", "--prior-revision", "v1", "--output", "new"), ("--prior-revision", "prior")),
        (("convert", "--prior", "a/b", "--revision", "v1", "--output", "new"), ("--revision", "tokenizer")),
        (("demo", "--host", "256.1.1.1"), ("--host", "256.1.1.1")),
    ],
)
def test_options_that_do_not_fit_together_are_refused_before_the_model_is_loaded(
    capsys, tmp_path, monkeypatch, arguments, words
):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (4, 4)).save("photo.png")
    monkeypatch.setitem(sys.modules, "flextok_hf.cli.commands", None)  # importing it would fail
    assert_one_line_error(run(capsys, *arguments), *words)
    assert Image.open("photo.png").size == (4, 4)


def test_a_port_in_use_is_refused_before_the_model_is_loaded(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "flextok_hf.cli.commands", None)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert_one_line_error(run(capsys, "demo", "--port", port), "--port", str(port), "in use")


@pytest.mark.parametrize("model", ["./nowhere", "a/b/c", "word"])
def test_a_model_that_is_neither_folder_nor_hub_id_is_refused(capsys, model):
    assert_one_line_error(run(capsys, "info", "--model", model), "`model`", model)


def test_a_folder_without_a_pipeline_is_refused(capsys, tmp_path):
    assert_one_line_error(run(capsys, "info", "--model", tmp_path), "model_index.json")


def test_an_unknown_device_is_refused_before_the_model_is_loaded(capsys, tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    assert_one_line_error(run(capsys, "info", "--model", tmp_path, "--device", "abacus"), "`device`", "abacus")


def test_a_damaged_model_index_is_refused(capsys, tmp_path):
    (tmp_path / "model_index.json").write_text("{")
    assert_one_line_error(run(capsys, "info", "--model", tmp_path, "--device", "cpu"), "`model`", str(tmp_path))


def test_traceback_flag_shows_where_an_error_comes_from(tmp_path):
    with pytest.raises(ValueError, match="model_index"):
        cli.main(["info", "--model", str(tmp_path), "--traceback"])


@pytest.mark.parametrize(
    "content, word",
    [
        ([], "no token ids"),
        ({"format": "other"}, "format"),
        ([1, True], "integers"),
        ([[1, 2.0]], "integers"),
        ([[]], "0 ids"),
        ([[1] * 17], "17 ids"),
        ([[-1]], "-1"),
        ([[1000]], "0 to 999"),
        ([[10**30]], "0 to 999"),
        ("12", "no token ids"),
        ({"format": "flextok-token-ids", "codebook_size": 64000, "images": [{"token_ids": [1]}]}, "64000"),
        ({"format": "flextok-token-ids", "codebook_size": 1000, "images": [{"file": "a.png"}]}, "integers"),
        *(
            (
                {
                    "format": "flextok-token-ids",
                    "codebook_size": 1000,
                    "images": [{"token_ids": [1], "height": height, "width": width}],
                },
                "'ids.json' has an image of .*expected whole numbers",
            )
            for height, width in ((8, None), (0, 8), (8.0, 8), (True, 8), ("8", 8), (10**20, 8))
        ),
    ],
)
def test_token_files_with_wrong_content_are_refused(content, word):
    with pytest.raises(ValueError, match=word):
        parse_token_file(content, "ids.json", codebook_size=1000, num_registers=16)


OLD_FILE = {"format": "flextok-token-ids", "version": 1, "codebook_size": 1000, "pictures": [{"token_ids": [4]}]}


@pytest.mark.parametrize("content, expected", [([1, 2], [[1, 2]]), ([[1, 2], [3]], [[1, 2], [3]]), (OLD_FILE, [[4]])])
def test_plain_lists_and_files_of_version_1_are_accepted_as_token_files(content, expected):
    sequences, sizes = parse_token_file(content, "ids.json", codebook_size=1000, num_registers=16)
    assert sequences == expected and sizes == [None] * len(expected)


def test_token_files_survive_a_round_trip(tmp_path):
    images = [{"file": "a.png", "token_ids": [1, 2]}, {"file": "b.png", "height": 8, "width": 32, "token_ids": [999]}]
    write_token_file(tmp_path / "ids.json", images, codebook_size=1000, num_registers=16)
    content = read_json(str(tmp_path / "ids.json"))
    expected = [[1, 2], [999]], [None, (8, 32)]
    assert parse_token_file(content, "ids.json", codebook_size=1000, num_registers=16) == expected


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "out.txt"
    path.write_text("old")

    def write_half(temporary):
        Path(temporary).write_text("ne")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, write_half)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.txt"]
    assert path.read_text() == "old"


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX permissions")
def test_written_files_have_the_permissions_of_ordinary_files(tmp_path):
    write_atomically(tmp_path / "a.txt", lambda temporary: Path(temporary).write_text("a"))
    (tmp_path / "b.txt").write_text("b")
    assert (tmp_path / "a.txt").stat().st_mode == (tmp_path / "b.txt").stat().st_mode


def test_several_outputs_get_numbers_that_sort():
    assert numbered_paths("cat.png", 1) == [Path("cat.png")]
    names = [path.name for path in numbered_paths("folder/cat.png", 10)]
    assert names[0] == "cat-01.png" and names == sorted(names)


def test_output_extensions_can_be_upper_case(tmp_path):
    assert check_output_path(tmp_path / "CAT.PNG", (".png",)) == tmp_path / "CAT.PNG"


def test_a_contact_sheet_keeps_images_in_their_rows_and_columns():
    colors = [["red", "lime"], ["blue", "yellow"]]
    rows = [[Image.new("RGB", (2, 2), color) for color in row] for row in colors]
    sheet = contact_sheet(rows, ["one", "two"], cell_size=64, gap=8)
    top = sheet.height - 2 * (64 + 8)
    for row in range(2):
        for column in range(2):
            pixel = sheet.getpixel((8 + column * 72 + 32, top + row * 72 + 32))
            assert pixel == Image.new("RGB", (1, 1), colors[row][column]).getpixel((0, 0))


def test_a_contact_sheet_with_rows_of_different_lengths_is_refused():
    with pytest.raises(ValueError, match="titles"):
        contact_sheet([[Image.new("RGB", (2, 2))]], ["one", "two"])


def fast(model: str) -> list[str]:
    """Return options for a fast run with a tiny model."""
    return ["--model", model, "--device", "cpu", "--num-inference-steps", "2"]


def test_a_prompt_becomes_an_image_file(capsys, tmp_path, model):
    path = tmp_path / "cat.png"
    code, out, err = run(capsys, "generate", "a cat", "--max-tokens", 64, "--output", path, *fast(model))
    assert code == 0, err
    assert out == f"{path}: 16 x 16, 8 tokens, seed 0\n"
    assert Image.open(path).size == (16, 16)


def test_the_second_image_of_a_seed_is_the_first_of_the_next_seed(capsys, tmp_path, model):
    pair, single = tmp_path / "pair.png", tmp_path / "single.png"
    common = ["generate", "a cat", "--quiet", *fast(model)]
    assert run(capsys, *common, "--seed", 3, "--num-images", 2, "--output", pair) == (0, "", "")
    assert run(capsys, *common, "--seed", 4, "--output", single) == (0, "", "")
    second, single = Image.open(tmp_path / "pair-2.png"), Image.open(single)
    difference = max(abs(a - b) for a, b in zip(second.tobytes(), single.tobytes(), strict=True))
    assert difference <= 1  # another batch size may round differently


def test_images_of_several_batches_are_all_written(capsys, tmp_path, model, monkeypatch):
    from flextok_hf.cli import commands

    monkeypatch.setattr(commands, "BATCH_SIZE", 2)
    path = tmp_path / "cat.png"
    assert run(capsys, "generate", "a cat", "--num-images", 3, "--output", path, *fast(model))[0] == 0
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["cat-1.png", "cat-2.png", "cat-3.png"]


def test_a_streamed_prompt_becomes_numbered_frames_ending_with_the_final_image(capsys, tmp_path, model):
    frames = ["stream", "a cat", "--token-counts", 1, 4, 64, "--output", tmp_path / "cat.png", *fast(model)]
    code, out, err = run(capsys, *frames)
    assert code == 0, err
    paths = [tmp_path / f"cat-{count}.png" for count in (1, 4, 8)]
    assert out == "".join(f"{path}: {count}\n" for path, count in zip(paths, ("1 token", "4 tokens", "8 tokens")))
    assert run(capsys, "generate", "a cat", "--output", tmp_path / "whole.png", *fast(model))[0] == 0
    assert paths[-1].read_bytes() == (tmp_path / "whole.png").read_bytes()


def test_a_streamed_prompt_becomes_an_animation(capsys, tmp_path, model):
    path = tmp_path / "cat.webp"
    code, out, err = run(capsys, "stream", "a cat", "--output", path, "--frame-ms", 100, *fast(model))
    assert (code, out) == (0, f"{path}: 4 frames, up to 8 tokens\n"), err
    with Image.open(path) as animation:
        assert (animation.n_frames, animation.size) == (4, (16, 16))
        animation.seek(3)
        animation.load()
        assert animation.info["duration"] == 300


def test_a_photo_is_varied_and_keeps_its_first_tokens(capsys, tmp_path, model):
    varied = ["--image", PHOTO, "--keep-tokens", 8]  # all of them: only the noise is random
    common = ["--num-images", 2, "--output", tmp_path / "cat.png", *fast(model)]
    assert run(capsys, "generate", "", *varied, *common)[0] == 0
    sheet = ["reconstruct", PHOTO, "--max-tokens", 8, "--output", tmp_path / "sheet.png", *fast(model)]
    assert run(capsys, *sheet)[0] == 0
    with Image.open(tmp_path / "sheet.png") as image:
        column = image.crop((8 + 136, image.height - 136, 8 + 136 + 128, image.height - 8))
    with Image.open(tmp_path / "cat-1.png") as image:
        assert column.tobytes() == image.resize((128, 128), Image.Resampling.NEAREST).tobytes()


@pytest.mark.parametrize("alone", [("--image", PHOTO), ("--keep-tokens", 3)])
def test_a_photo_without_a_token_count_to_keep_is_refused_and_vice_versa(capsys, tmp_path, alone):
    result = run(capsys, "generate", "a cat", *alone, "--output", tmp_path / "cat.png")
    assert_one_line_error(result, "--image", "--keep-tokens")


def test_photos_become_ids_and_ids_become_images(capsys, tmp_path, model):
    ids, out = tmp_path / "ids.json", tmp_path / "out.png"
    shared = ["--model", model, "--device", "cpu"]
    assert run(capsys, "tokenize", PHOTO, PHOTO, "--max-tokens", 3, "--output", ids, *shared)[0] == 0
    first, second = (image["token_ids"] for image in json.loads(ids.read_text())["images"])
    assert first == second and len(first) == 3
    assert run(capsys, "detokenize", ids, "--output", out, *fast(model))[0] == 0
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["out-1.png", "out-2.png"]


def test_a_photo_becomes_a_contact_sheet_with_a_column_per_count(capsys, tmp_path, model):
    path = tmp_path / "sheet.png"
    code, out, err = run(capsys, "reconstruct", PHOTO, "--max-tokens", 1, 4, 64, "--output", path, *fast(model))
    assert code == 0, err
    assert "1 row, original, 1 token, 4 tokens, 8 tokens" in out
    width, height = Image.open(path).size
    assert width > 3 * height


def test_a_file_that_is_not_an_image_is_named(capsys, tmp_path, model):
    fake = tmp_path / "fake.png"
    fake.write_text("not an image")
    result = run(capsys, "tokenize", fake, "--output", tmp_path / "ids.json", "--model", model, "--device", "cpu")
    assert_one_line_error(result, "fake.png")


@pytest.mark.parametrize(
    "damage", [lambda file: file.unlink(), lambda file: file.write_bytes(file.read_bytes()[:999])]
)
def test_a_model_with_a_missing_or_truncated_weight_file_is_refused(capsys, tmp_path, model, damage):
    copy = tmp_path / "copy"
    shutil.copytree(model, copy)
    damage(next((copy / "decoder").glob("*.safetensors")))
    assert_one_line_error(run(capsys, "info", "--model", copy, "--device", "cpu"), "`model`", str(copy))


def test_a_run_prints_nothing_but_its_report(tmp_path, model):
    # In its own process: warnings are shown once per process, and progress bars must not appear in a log.
    arguments = ["generate", "a cat", "--dtype", "bfloat16", "--output", str(tmp_path / "cat.png"), *fast(model)]
    done = subprocess.run([sys.executable, "-m", "flextok_hf.cli", *arguments], capture_output=True, text=True)
    assert done.stderr == ""
    assert done.stdout == f"{tmp_path / 'cat.png'}: 16 x 16, 8 tokens, seed 0\n"


def test_an_official_checkpoint_becomes_a_model(capsys, tmp_path):
    tokenizer, _, _ = write_tokenizer(tmp_path / "official")
    prior, _, _ = write_prior(tmp_path / "prior", classes=3)
    code, out, _ = run(capsys, "convert", tokenizer, "--prior", prior, "--output", tmp_path / "ours")
    assert code == 0 and out.splitlines()[-1] == f"{tmp_path / 'ours'}: a pipeline"
    code, out, _ = run(capsys, "info", "--model", tmp_path / "ours", "--json")
    assert code == 0 and {"encoder", "decoder", "vae", "prior"} < json.loads(out)["components"].keys()
    options = ["--output", tmp_path / "prior_only", "--dtype", "bfloat16", "--quiet"]
    assert run(capsys, "convert", "--prior", prior, *options) == (0, "", "")
    assert FlexTokPriorForCausalLM.from_pretrained(tmp_path / "prior_only").dtype == torch.bfloat16


def test_the_conversion_script_is_the_same_as_the_command(capsys, tmp_path, monkeypatch):
    tokenizer, _, _ = write_tokenizer(tmp_path / "official")
    script = SCRIPTS / "convert_checkpoint.py"
    monkeypatch.setattr(sys, "argv", [str(script), str(tokenizer), "--output", str(tmp_path / "ours")])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(script), run_name="__main__")
    assert capsys.readouterr().out == f"{tmp_path / 'ours'}: a pipeline\n"
    assert (tmp_path / "ours" / "model_index.json").is_file()


def test_a_setting_can_be_ignored(capsys, tmp_path):
    tokenizer, _, _ = write_tokenizer(tmp_path / "official")
    config = json.loads((tokenizer / "config.json").read_text())
    config["pipeline"]["speed"] = "high"
    (tokenizer / "config.json").write_text(json.dumps(config))
    arguments = ["convert", tokenizer, "--output", tmp_path / "ours"]
    code, _, err = run(capsys, *arguments)
    assert code == 2 and "`pipeline.speed`" in err and "--ignore" in err and err.count("\n") == 1
    assert run(capsys, *arguments, "--ignore", "pipeline.speed", "--quiet") == (0, "", "")


@pytest.mark.parametrize("arguments, word", [
    (["convert", "--output", "new"], "pass a TOKENIZER, a --prior, or both"),
    (["convert", "nowhere", "--output", "new"], "'nowhere' is neither a folder or file nor a Hub id"),
    (["convert", "nowhere", "--output", "."], "exists and is not empty"),
    (["convert", "nowhere", "--output", "missing/new"], "mkdir -p"),
    (["convert", ".", "--output", "new", "--revision", "main"], "has no revisions"),
])  # fmt: skip
def test_wrong_conversion_arguments_get_one_line(capsys, tmp_path, monkeypatch, arguments, word):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    code, out, err = run(capsys, *arguments)
    assert code == 2 and word in err and err.count("\n") == 1 and out == ""


def test_info_reports_resolution_tokens_and_parameters(capsys, model):
    code, out, err = run(capsys, "info", "--json", "--model", model, "--device", "cpu")
    assert code == 0, err
    facts = json.loads(out)
    assert (facts["resolution"], facts["num_registers"], facts["codebook_size"]) == (16, 8, 25)
    assert set(facts["components"]) == {"encoder", "decoder", "scheduler", "prior", "text_encoder", "tokenizer"}
    assert facts["components"]["encoder"]["parameters"] > 0
    assert facts["components"]["encoder"]["bytes_on_disk"] > 0


@pytest.mark.parametrize("prompt", ["dog", "1"])
@pytest.mark.parametrize("command", ["generate", "stream"])
def test_a_class_prior_generates_from_names_and_numbers(capsys, tmp_path, named_class_pipeline, command, prompt):
    named_class_pipeline.save_pretrained(tmp_path / "classes")
    output = tmp_path / "dog.webp"
    code, _, err = run(
        capsys, command, prompt, "--model", tmp_path / "classes", "--output", output, "--num-inference-steps", 1
    )
    assert code == 0, err
    assert output.exists()


@needs_embedded_model
def test_the_embedded_model_is_the_default(capsys, tmp_path):
    path = tmp_path / "cat.png"
    code, out, err = run(capsys, "generate", "a cat", "--max-tokens", 4, "--output", path, "--device", "cpu")
    assert code == 0, err
    assert "4 tokens" in out and Image.open(path).mode == "RGB"
