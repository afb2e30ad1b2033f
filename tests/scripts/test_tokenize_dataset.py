"""Tokenizing a dataset end to end with a tiny pipeline: output, resume, refused settings and skipped rows."""

import json
from importlib import import_module

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Sequence, Value, load_dataset
from datasets import Image as ImageFeature
from diffusers import FlowMatchEulerDiscreteScheduler
from huggingface_hub import DatasetCard
from PIL import Image
from tiny_models import CODEBOOK_SIZE, NUM_REGISTERS, make_decoder, make_encoder, make_pipeline

from flextok_hf import FlexTokPipeline


tokenize_dataset = import_module("tokenize_dataset")

NUM_ROWS, SHARD_SIZE, DAMAGED = 7, 3, 4


def image(row):
    generator = torch.Generator().manual_seed(row)
    return Image.fromarray(torch.randint(0, 256, (20, 30, 3), dtype=torch.uint8, generator=generator).numpy())


@pytest.fixture(scope="module")
def pipe():
    return make_pipeline()


@pytest.fixture(scope="module")
def model(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Seven images in parquet, one of them damaged."""
    folder = tmp_path_factory.mktemp("source")
    images = [image(row) for row in range(NUM_ROWS)]
    features = {"image": ImageFeature(), "text": Sequence(Value("string")), "label": ClassLabel(names=["a", "b"])}
    rows = Dataset.from_dict(
        {
            "image": images,
            "text": [[f"row {row}", f"number {row}"] for row in range(NUM_ROWS)],
            "label": [row % 2 for row in range(NUM_ROWS)],
        },
        features=Features(features),
    ).cast_column("image", ImageFeature(decode=False))

    def damage(row, index):
        return {**row, "image": {"bytes": row["image"]["bytes"][:40], "path": None}} if index == DAMAGED else row

    path = folder / "images.parquet"
    rows.map(damage, with_indices=True, features=rows.features).cast_column("image", ImageFeature()).to_parquet(path)
    return path


def run(source, model, output, *more):
    options = ["--train_data", source, "--model", model, "--output", output, "--caption_column", "text"]
    options += ["--class_column", "label", "--shard_size", SHARD_SIZE, "--device", "cpu", "--batch_size", 4, *more]
    tokenize_dataset.main([str(option) for option in options])
    return load_dataset("parquet", data_files=f"{output}/train-*.parquet", split="train")


def test_ids_captions_and_classes_are_written_and_damaged_images_reported(source, model, pipe, tmp_path, capsys):
    rows = run(source, model, tmp_path / "tokens", "--crops", 3, "--random_flip")
    kept = [row for row in range(NUM_ROWS) if row != DAMAGED]
    assert rows.features["token_ids"] == Sequence(Sequence(Value("uint16")))
    assert rows.features["label"].names == ["a", "b"]
    assert rows["text"][:] == [[f"row {row}", f"number {row}"] for row in kept]
    assert rows["label"][:] == [row % 2 for row in kept]
    assert [len(crops) for crops in rows["token_ids"]] == [3] * len(kept)
    expected = pipe.tokenize([image(row) for row in kept])
    assert [crops[0] for crops in rows["token_ids"]] == expected.tolist()
    assert any(crops[1] != crops[0] for crops in rows["token_ids"])
    reports = [json.loads(path.read_text()) for path in sorted((tmp_path / "tokens").glob("train-*.json"))]
    assert [report["rows"] for report in reports] == [3, 2, 1]
    assert list(reports[1]["skipped"]) == [str(DAMAGED)] and "is not an image" in reports[1]["skipped"][str(DAMAGED)]
    assert "7 images in" in capsys.readouterr().out
    card = DatasetCard.load(tmp_path / "tokens" / "README.md")
    assert "6 images as token ids; 1 could not be read" in card.text
    assert card.data.configs[0]["data_files"] == [{"split": "train", "path": "train-*.parquet"}]


def test_sizes_are_stored_beside_the_ids_and_read_back(source, tmp_path):
    parts = make_encoder(positions="stretch"), make_decoder(positions="stretch"), FlowMatchEulerDiscreteScheduler()
    pipe = FlexTokPipeline(*parts)
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(tmp_path / "model")
    kept = [row for row in range(NUM_ROWS) if row != DAMAGED]
    expected = pipe.tokenize([image(row) for row in kept], size="keep", return_dict=True)
    for size, sizes in (("keep", expected.sizes), ("32x8", [(32, 8)] * len(kept)), (None, [(16, 16)] * len(kept))):
        options = [] if size is None else ["--size", size]
        rows = run(source, tmp_path / "model", tmp_path / f"tokens-{size}", "--crops", 2, *options)
        assert [(row["height"], row["width"]) for row in rows] == sizes
        assert [len(crops) for crops in rows["token_ids"]] == [2] * len(kept)
        given = None if size is None else sizes[0] if size == "32x8" else "keep"
        ids = pipe.tokenize([image(row) for row in kept], size=given)
        assert [crops[0] for crops in rows["token_ids"]] == ids.tolist()
    back = pipe.detokenize(
        torch.tensor([crops[0] for crops in rows["token_ids"]]),
        height=rows["height"][:],
        width=rows["width"][:],
        num_inference_steps=1,
    )
    assert [one.size for one in back.images] == [(16, 16)] * len(kept)


def test_images_of_many_shapes_keep_their_order(tmp_path):
    parts = make_encoder(positions="stretch"), make_decoder(positions="stretch"), FlowMatchEulerDiscreteScheduler()
    pipe = FlexTokPipeline(*parts)
    pipe.save_pretrained(tmp_path / "model")
    shapes = [(10, 40), (20, 20), (40, 10), (20, 20), (10, 40), (30, 40), (20, 21), (12, 40)]
    generator = torch.Generator().manual_seed(0)
    images = [
        Image.fromarray(torch.randint(0, 256, (*shape, 3), dtype=torch.uint8, generator=generator).numpy())
        for shape in shapes
    ]
    Dataset.from_dict(
        {"image": images, "text": [str(shape) for shape in shapes], "label": [0] * len(shapes)},
        features=Features({"image": ImageFeature(), "text": Value("string"), "label": ClassLabel(names=["a"])}),
    ).to_parquet(tmp_path / "images.parquet")
    rows = run(tmp_path / "images.parquet", tmp_path / "model", tmp_path / "tokens", "--size", "keep")
    expected = pipe.tokenize(images, size="keep", return_dict=True)
    assert rows["text"][:] == [str(shape) for shape in shapes]
    assert [crops[0] for crops in rows["token_ids"]] == expected.token_ids.tolist()
    assert [(row["height"], row["width"]) for row in rows] == expected.sizes


def test_columns_of_the_output_are_no_captions(capsys):
    with pytest.raises(SystemExit):
        tokenize_dataset.parse_arguments(["--train_data", "x", "--output", "y", "--caption_column", "height"])
    assert "`--caption_column` 'height' is a column of the output" in capsys.readouterr().err


def test_a_second_run_creates_only_missing_shards_with_the_same_content(source, model, tmp_path):
    first = run(source, model, tmp_path, "--crops", 2, "--max_tokens", 2)["token_ids"][:]
    shards = sorted(tmp_path.glob("train-*.parquet"))
    assert [path.name for path in shards] == [f"train-{shard:05d}-of-00003.parquet" for shard in range(3)]
    shards[1].unlink()
    times = [path.stat().st_mtime_ns for path in (shards[0], shards[2])]
    assert run(source, model, tmp_path, "--crops", 2, "--max_tokens", 2)["token_ids"][:] == first
    assert [path.stat().st_mtime_ns for path in (shards[0], shards[2])] == times
    assert {len(ids) for crops in first for ids in crops} == {2}


def test_shards_of_other_settings_are_not_mixed(source, model, tmp_path):
    run(source, model, tmp_path)
    with pytest.raises(ValueError, match="num_tokens was 6 and is 3.*Choose another folder"):
        run(source, model, tmp_path, "--max_tokens", 3)


def test_processes_share_the_shards(source, tmp_path):
    options = tokenize_dataset.parse_arguments(
        ["--train_data", "x", "--output", str(tmp_path), "--shard_size", str(SHARD_SIZE)]
    )
    rows = Dataset.from_dict({"image": [None] * NUM_ROWS})

    class Source:
        def __init__(self):
            self.rows = rows

        def __len__(self):
            return NUM_ROWS

    writer = tokenize_dataset.ShardWriter(options, Source(), CODEBOOK_SIZE)
    parts = [writer.missing_rows(index, 2) for index in range(2)]
    assert parts == [[0, 1, 2, 6], [3, 4, 5]]


def test_all_tokens_of_the_model_are_kept_by_default(source, model, tmp_path):
    rows = run(source, model, tmp_path)
    assert {len(ids) for crops in rows["token_ids"] for ids in crops} == {NUM_REGISTERS}


@pytest.mark.parametrize("name", ["crops", "batch_size", "shard_size"])
def test_counts_below_one_are_refused(name, capsys):
    with pytest.raises(SystemExit):
        tokenize_dataset.parse_arguments(["--train_data", "x", "--output", "y", f"--{name}", "0"])
    assert f"`--{name}` must be 1 or more, got 0" in capsys.readouterr().err
