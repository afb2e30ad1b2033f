"""Sizes on the command line: photos keep their proportions, files keep their sizes, and wrong ones are refused."""

import json

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from tiny_models import make_decoder, make_encoder, make_prior

from flextok_hf import FlexTokPipeline
from flextok_hf.cli import arguments as cli


STRETCH = {"positions": "stretch"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    prior = make_prior(text_hidden_size=None, num_classes=3)
    parts = make_encoder(**STRETCH), make_decoder(**STRETCH), FlowMatchEulerDiscreteScheduler()
    FlexTokPipeline(*parts, prior=prior).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A wide, a tall, a square and another wide photo."""
    paths = []
    for number, (height, width) in enumerate([(30, 120), (120, 30), (50, 50), (60, 240)]):
        pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        paths.append(str(tmp_path_factory.mktemp("photo") / f"{number}.png"))
        Image.fromarray(pixels).save(paths[-1])
    return paths


def run(*options):
    return cli.main([*map(str, options), "--device", "cpu", "--quiet"])


SIZES = [(8, 32), (32, 8), (16, 16), (8, 32)]


def test_photos_keep_their_proportions_through_a_file_of_ids(model, photos, tmp_path):
    ids, out = tmp_path / "ids.json", tmp_path / "out.png"
    assert run("tokenize", *photos, "--size", "keep", "--output", ids, "--model", model) == 0
    entries = json.loads(ids.read_text())["images"]
    assert [(entry["height"], entry["width"]) for entry in entries] == SIZES
    pipe = FlexTokPipeline.from_pretrained(model)
    assert [entry["token_ids"] for entry in entries] == pipe.tokenize(photos, size="keep").tolist()
    decoding = ["--output", out, "--model", model, "--num-inference-steps", 1]
    assert run("detokenize", ids, *decoding) == 0
    images = [Image.open(tmp_path / f"out-{number}.png").size for number in (1, 2, 3, 4)]
    assert images == [(width, height) for height, width in SIZES]
    assert run("detokenize", ids, "--size", "8x12", *decoding) == 0
    assert {Image.open(tmp_path / f"out-{number}.png").size for number in (1, 2, 3, 4)} == {(12, 8)}


def test_files_without_sizes_give_squares(model, tmp_path):
    (tmp_path / "ids.json").write_text("[[1, 2], [3]]")
    options = ["--output", tmp_path / "out.png", "--model", model, "--num-inference-steps", 1]
    assert run("detokenize", tmp_path / "ids.json", *options) == 0
    assert {Image.open(tmp_path / f"out-{number}.png").size for number in (1, 2)} == {(16, 16)}


@pytest.mark.parametrize("size", [(), ("--size", "keep"), ("--size", "8x32"), ("--size", "32")])
def test_reconstructions_stand_next_to_what_the_model_sees(model, photos, tmp_path, size):
    path = tmp_path / "sheet.png"
    options = ["--max-tokens", 1, 4, "--num-inference-steps", 1, "--model", model, "--output", path]
    assert run("reconstruct", *photos, *size, *options) == 0
    with Image.open(path) as sheet:
        assert sheet.width == 8 + 3 * 136 and sheet.height > 4 * 136
        first = np.array(sheet.crop((8, sheet.height - 4 * 136, 136, sheet.height - 3 * 136 - 8)))
    rows = np.flatnonzero((first != 255).any(axis=(1, 2)))
    assert rows[-1] - rows[0] + 1 == (32 if size in (("--size", "keep"), ("--size", "8x32")) else 128)


def test_generated_images_and_streams_have_the_size(model, photos, tmp_path):
    common = ["--size", "8x24", "--num-inference-steps", 1, "--model", model, "--output", tmp_path / "out.png"]
    assert run("generate", "1", "--image", photos[0], "--keep-tokens", 2, *common) == 0
    assert Image.open(tmp_path / "out.png").size == (24, 8)
    assert run("stream", "1", "--token-counts", 4, *common) == 0
    assert Image.open(tmp_path / "out-4.png").size == (24, 8)


@pytest.mark.parametrize("size", ["0", "-16", "16x", "x16", "16x16x16", "wide", "1.5", "", "\u00b2", "9999999999999"])
def test_what_is_no_size_is_refused(capsys, size):
    for command in (["tokenize", "a.png"], ["detokenize", "a.json"], ["generate", "a"]):
        with pytest.raises(SystemExit):
            cli.main([*command, "--output", "b.json", f"--size={size}"])
        assert "expected a side, such as 128, or HxW, such as 96x160" in capsys.readouterr().err


@pytest.mark.parametrize("size", ["15", "16x68", "4x20", "1024"])
def test_sizes_that_the_model_does_not_accept_are_refused(model, photos, tmp_path, capsys, size):
    ids = tmp_path / "ids.json"
    ids.write_text("[1, 2]")
    commands = {"a.json": ["tokenize", photos[0]], "a.png": ["detokenize", ids], "b.png": ["generate", "1"]}
    for output, command in commands.items():
        assert run(*command, "--size", size, "--output", tmp_path / output, "--model", model) == 2
        assert "multiples of 4, neither more than 4 times the other" in capsys.readouterr().err


def test_a_model_of_squares_refuses_to_keep_proportions(photos, tmp_path, capsys):
    torch.manual_seed(0)
    FlexTokPipeline(make_encoder(), make_decoder(), FlowMatchEulerDiscreteScheduler()).save_pretrained(tmp_path / "m")
    output = ["--output", tmp_path / "a.json", "--model", tmp_path / "m"]
    assert run("tokenize", photos[0], "--size", "keep", *output) == 2
    assert "knows its square only" in capsys.readouterr().err
