"""Training from options to a saved pipeline: checkpoints, exact resuming, and whether anything is learned."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import torch
from huggingface_hub import ModelCard
from image_rows import write_parquet
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import Dataset
from training_processes import SMALL_TOKENIZER

from flextok_hf.data.batches import TrainingBatches, build_dataloader
from flextok_hf.data.sources import load_rows
from flextok_hf.pipelines.pipeline_flextok import FlexTokPipeline
from flextok_hf.training.arguments import PriorArguments, TokenizerArguments
from flextok_hf.training.checkpoints import list_checkpoints
from flextok_hf.training.loop import Trainer
from flextok_hf.training.optimization import split_by_decay
from flextok_hf.training.prior import PriorForTraining, build_prior
from flextok_hf.training.setup import build_accelerator
from flextok_hf.training.stages import train_prior, train_tokenizer
from flextok_hf.training.step_rng import StepRng
from flextok_hf.training.tokenizer import TokenizerForTraining, build_tokenizer
from flextok_hf.utils.measures import weights_hash
from flextok_hf.utils.words import split_words


SMALL_DATA = {"resolution": 16, "max_train_samples": 12, "train_batch_size": 4, "num_validation_images": 2}


def tokenizer_arguments(folder, **changes):
    schedule = {"max_train_steps": 6, "lr_warmup_steps": 2, "ema_decay": 0.9, "checkpointing_steps": 3}
    return TokenizerArguments(
        output_dir=str(folder), **{**SMALL_DATA, **SMALL_TOKENIZER, **schedule, "validation_steps": 0, **changes}
    )


def prior_arguments(folder, tokenizer, **changes):
    small = {
        "caption_column": "text",
        "hidden_size": 32,
        "num_layers": 1,
        "num_heads": 2,
        "dropout": 0.1,
        "text_hidden_size": 32,
        "text_num_layers": 1,
        "text_vocab_size": 300,
        "max_text_length": 24,
        "max_train_steps": 4,
        "checkpointing_steps": 2,
        "validation_steps": 0,
    }
    return PriorArguments(output_dir=str(folder), tokenizer=str(tokenizer), **{**SMALL_DATA, **small, **changes})


def all_weights(folder):
    """Return all tensors in the files under a folder, by file and name."""
    files = sorted(Path(folder).rglob("*.safetensors"))
    return {(file.name, name): tensor for file in files for name, tensor in load_file(file).items()}


def assert_same_weights(folder, other):
    one, two = all_weights(folder), all_weights(other)
    assert one and one.keys() == two.keys()
    assert [key for key in one if not torch.equal(one[key], two[key])] == []


def read_log(folder):
    path = Path(folder) / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def copy_checkpoint(source, step, target):
    """Create an output folder as if the run in `source` had been stopped after `step`."""
    shutil.copytree(Path(source) / f"checkpoint-{step}", Path(target) / f"checkpoint-{step}")


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """An uninterrupted run of 6 steps over several epochs, with validation and two micro-batches per step."""
    folder = tmp_path_factory.mktemp("whole")
    train_tokenizer(tokenizer_arguments(folder, gradient_accumulation_steps=2, validation_steps=3))
    return folder


def test_a_run_writes_checkpoints_log_images_and_a_pipeline(whole_run):
    assert [path.name for path in list_checkpoints(whole_run)] == ["checkpoint-3", "checkpoint-6"]
    steps = [json.loads(line)["step"] for line in (whole_run / "log.jsonl").read_text().splitlines()]
    assert steps == [1, 3, 6, 6]  # of validation at 1, 3 and 6, and of the last step
    assert (whole_run / "validation-1.png").is_file() and (whole_run / "validation-6.png").is_file()
    assert not list(whole_run.glob("*.partial"))
    recipe = json.loads((whole_run / "pipeline" / "training.json").read_text())
    assert recipe["steps"] == 6 and recipe["seconds"] > 0
    assert "Stage `tokenizer`: 6 steps of" in (whole_run / "pipeline" / "README.md").read_text()


def test_the_saved_pipeline_reconstructs_an_image(whole_run):
    pipe = FlexTokPipeline.from_pretrained(whole_run / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    batches = pipe.reconstruct(torch.rand(3, 16, 16), [1, 4], num_inference_steps=1)
    assert [batch[0].size for batch in batches] == [(16, 16)] * 2


def test_the_saved_pipeline_has_the_averaged_weights(whole_run):
    average = load_file(whole_run / "checkpoint-6" / "ema.safetensors")
    saved = load_file(whole_run / "pipeline" / "encoder" / "model.safetensors")
    assert any(torch.equal(saved["register_tokens"], tensor) for tensor in average.values())
    trained = load_file(whole_run / "checkpoint-6" / "model.safetensors")
    assert not torch.equal(saved["register_tokens"], trained["encoder.register_tokens"])


def test_a_resumed_run_gives_bitwise_the_same_result(whole_run, tmp_path):
    copy_checkpoint(whole_run, 3, tmp_path)
    options = {"gradient_accumulation_steps": 2, "validation_steps": 3, "resume_from_checkpoint": "latest"}
    train_tokenizer(tokenizer_arguments(tmp_path, **options))
    assert_same_weights(whole_run / "checkpoint-6", tmp_path / "checkpoint-6")
    assert_same_weights(whole_run / "pipeline", tmp_path / "pipeline")


def test_an_unfinished_checkpoint_is_ignored(whole_run, tmp_path):
    copy_checkpoint(whole_run, 6, tmp_path)
    (tmp_path / "checkpoint-9.partial").mkdir()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-6"]
    train_tokenizer(tokenizer_arguments(tmp_path, resume_from_checkpoint="latest"))
    assert_same_weights(whole_run / "pipeline", tmp_path / "pipeline")


def test_a_folder_that_is_not_a_checkpoint_is_refused_by_name(tmp_path):
    arguments = tokenizer_arguments(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    with pytest.raises(FileNotFoundError, match="`resume_from_checkpoint` .*checkpoint-5"):
        train_tokenizer(arguments)


def test_resuming_before_the_first_checkpoint_starts_from_the_beginning(tmp_path):
    train_tokenizer(tokenizer_arguments(tmp_path, max_train_steps=1, resume_from_checkpoint="latest"))
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-1"]


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    train_tokenizer(
        tokenizer_arguments(tmp_path, max_train_steps=11, checkpointing_steps=3, checkpoints_total_limit=2)
    )
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-11"]


class Repeated(Dataset):
    """The same images in each epoch, without randomness."""

    def __init__(self, pixel_values):
        self.pixel_values, self.skipped = pixel_values, {}

    def __len__(self):
        return len(self.pixel_values)

    def __getitem__(self, key):
        return {"pixel_values": self.pixel_values[key[0]]}


def test_a_repeated_batch_is_learned(tmp_path):
    arguments = tokenizer_arguments(
        tmp_path, max_train_steps=60, learning_rate=5e-3, checkpointing_steps=1000, ema_decay=0.0, train_batch_size=8
    )
    accelerator = build_accelerator(arguments)
    torch.manual_seed(0)
    encoder, decoder = build_tokenizer(arguments, vae=None)
    model = TokenizerForTraining(encoder, decoder, arguments)
    batch = {"pixel_values": torch.where(torch.rand(8, 3, 1, 1) < 0.5, -1.0, 1.0).expand(-1, -1, 16, 16)}

    @torch.no_grad()
    def loss():
        draws = [model(batch, 0, StepRng(seed))[0] for seed in range(8)]
        return torch.stack(draws).mean().item()

    before = loss()
    trainer = Trainer(arguments, accelerator, model, split_by_decay([model], arguments.learning_rate))
    trainer.train(TrainingBatches(build_dataloader(Repeated(batch["pixel_values"]), 8)))
    assert loss() < 0.6 * before


def test_a_prior_is_trained_resumed_and_generates_from_a_prompt(tiny_tokenizer_pipeline, tmp_path):
    tiny_tokenizer_pipeline.save_pretrained(tmp_path / "tokenizer")
    arguments = prior_arguments(tmp_path / "whole", tmp_path / "tokenizer")
    folder = train_prior(arguments)
    copy_checkpoint(tmp_path / "whole", 2, tmp_path / "resumed")
    again = train_prior(replace(arguments, output_dir=str(tmp_path / "resumed"), resume_from_checkpoint="latest"))
    assert_same_weights(folder, again)

    pipe = FlexTokPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    output = pipe("a red circle", num_inference_steps=1)
    assert output.images[0].size == (16, 16) and output.token_ids.shape == (1, 6)
    captions = load_rows("synthetic", "train", max_rows=12, resolution=16)["text"]
    assert set(pipe.prior.config.known_words) == set(split_words(" ".join(captions)))


def test_a_prior_in_half_precision_learns_the_ids_that_the_tokenizer_gives(tiny_tokenizer_pipeline):
    arguments = prior_arguments("unused", "unused", caption_column=None, class_column="label")
    prior = build_prior(arguments, 15, 6, None, 3)
    model = PriorForTraining(prior, None, None, tiny_tokenizer_pipeline, arguments)
    pixel_values = torch.rand(32, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.autocast("cpu", torch.bfloat16):
        token_ids = model.tokenize({"pixel_values": pixel_values})
        assert not tiny_tokenizer_pipeline.tokenize_pixels(pixel_values).equal(token_ids)
    assert tiny_tokenizer_pipeline.tokenize_pixels(pixel_values).equal(token_ids)


def test_a_prior_exported_in_half_precision_has_the_rounded_weights(tiny_tokenizer_pipeline, tmp_path):
    tiny_tokenizer_pipeline.save_pretrained(tmp_path / "tokenizer")
    arguments = prior_arguments(tmp_path / "full", tmp_path / "tokenizer", max_train_steps=1)
    half = replace(arguments, output_dir=str(tmp_path / "half"), export_dtype="float16")
    full_folder, half_folder = train_prior(arguments), train_prior(half)
    assert {tensor.dtype for tensor in all_weights(half_folder / "prior").values()} == {torch.float16}
    for part in ("encoder", "decoder", "prior", "text_encoder"):
        full_weights, half_weights = all_weights(full_folder / part), all_weights(half_folder / part)
        assert full_weights.keys() == half_weights.keys()
        for name, tensor in half_weights.items():
            assert torch.equal(tensor, full_weights[name].to(tensor.dtype)), name

    pipe = FlexTokPipeline.from_pretrained(half_folder)
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a red circle", num_inference_steps=1).images[0].size == (16, 16)


def test_a_frozen_text_encoder_is_saved_with_the_prior_and_not_in_checkpoints(tiny_pipeline, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path / "whole")
    tiny_pipeline.text_encoder.save_pretrained(tmp_path / "t5")
    tiny_pipeline.tokenizer.save_pretrained(tmp_path / "t5")
    arguments = prior_arguments(tmp_path / "run", tmp_path / "whole", text_encoder=str(tmp_path / "t5"))
    folder = train_prior(arguments)
    before, after = all_weights(tmp_path / "t5"), all_weights(folder / "text_encoder")
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    names = load_file(tmp_path / "run" / "checkpoint-4" / "model.safetensors").keys()
    assert {name.split(".")[0] for name in names} == {"prior"}
    pipe = FlexTokPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a red circle", num_inference_steps=1).images[0].size == (16, 16)


def test_validating_a_prior_generates_images_of_its_prompts(tiny_tokenizer_pipeline, tmp_path):
    tiny_tokenizer_pipeline.save_pretrained(tmp_path / "tokenizer")
    options = {"max_train_steps": 1, "validation_steps": 1, "validation_prompts": ["a red circle", "a star"]}
    train_prior(prior_arguments(tmp_path / "run", tmp_path / "tokenizer", **options))
    assert (tmp_path / "run" / "validation-1.png").is_file()
    figures = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    assert figures["distinct_first_ids"] in (1.0, 2.0)


def test_a_prior_is_trained_on_classes(tiny_tokenizer_pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    tiny_tokenizer_pipeline.save_pretrained(tmp_path / "tokenizer")
    for index, name in enumerate(["dark", "bright"]):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (20, 16), (200 * index + number,) * 3).save(tmp_path / "data" / name / f"{number}.png")
    options = {"train_data": [str(tmp_path / "data")], "caption_column": None, "class_column": "label"}
    folder = train_prior(prior_arguments(tmp_path / "run", tmp_path / "tokenizer", max_train_steps=1, **options))

    pipe = FlexTokPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.prior.config.num_classes == 2 and pipe.text_encoder is None
    assert len(pipe(class_labels=["bright", "dark"], num_inference_steps=1).images) == 2


def test_a_grid_tokenizer_is_trained_and_reconstructs(tmp_path):
    options = {"token_layout": "grid", "num_registers": 16, "full_length_probability": 1.0}
    pipe = FlexTokPipeline.from_pretrained(train_tokenizer(tokenizer_arguments(tmp_path, **options)))
    pipe.set_progress_bar_config(disable=True)
    assert pipe.encoder.config.token_layout == "grid" and not pipe.decoder.config.nested_dropout
    images = pipe.reconstruct(torch.rand(3, 16, 16), [16], num_inference_steps=1)
    assert images[0][0].size == (16, 16)


# Training the decoder alone


def test_a_decoder_trained_alone_does_not_change_the_tokens(tiny_tokenizer_pipeline, tmp_path):
    tiny_tokenizer_pipeline.save_pretrained(tmp_path / "tokenizer")
    options = {"pretrained_tokenizer": str(tmp_path / "tokenizer"), "freeze_encoder": True, "weight_decay": 0.5}
    folder = train_tokenizer(tokenizer_arguments(tmp_path / "run", learning_rate=0.01, num_registers=None, **options))
    before, after = all_weights(tmp_path / "tokenizer" / "encoder"), all_weights(folder / "encoder")
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    before, after = all_weights(tmp_path / "tokenizer" / "decoder"), all_weights(folder / "decoder")
    assert {name for file, name in before if torch.equal(before[file, name], after[file, name])} == {
        "patch_embedding.positions"
    }
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    token_ids = tiny_tokenizer_pipeline.tokenize(images)
    assert torch.equal(FlexTokPipeline.from_pretrained(folder).tokenize(images), token_ids)


def test_the_record_has_the_sizes_that_were_trained_not_those_of_options_without_effect(
    tiny_tokenizer_pipeline, tmp_path
):
    tiny_tokenizer_pipeline.save_pretrained(tmp_path / "tokenizer")
    options = {"pretrained_tokenizer": str(tmp_path / "tokenizer"), "encoder_hidden_size": 768, "num_registers": None}
    folder = train_tokenizer(tokenizer_arguments(tmp_path / "run", **options))
    recorded = json.loads((folder / "training.json").read_text())["arguments"]
    config = tiny_tokenizer_pipeline.encoder.config
    assert recorded["encoder_hidden_size"] == config.hidden_size
    assert recorded["num_registers"] == config.num_registers
    assert recorded["decoder_num_layers"] == tiny_tokenizer_pipeline.decoder.config.num_layers


def write_classes(path, names):
    write_parquet(path, 8, label=[row % len(names) for row in range(8)])
    rows = datasets.Dataset.from_parquet(str(path), cache_dir=str(path.parent / "cache"))
    rows.cast_column("label", datasets.ClassLabel(names=names)).to_parquet(str(path.with_name(f"named_{path.name}")))


def test_a_prior_does_not_resume_with_other_classes(tiny_tokenizer_pipeline, tmp_path):
    tiny_tokenizer_pipeline.save_pretrained(tmp_path / "tokenizer")
    options = {"caption_column": None, "class_column": "label", "max_train_samples": None, "max_train_steps": 2}
    for name, classes in (("a", ["cat", "dog"]), ("b", ["dog", "cat"])):
        write_classes(tmp_path / f"{name}.parquet", classes)
    arguments = prior_arguments(
        tmp_path / "run", tmp_path / "tokenizer", train_data=[str(tmp_path / "named_a.parquet")], **options
    )
    train_prior(arguments)
    other = {"train_data": [str(tmp_path / "named_b.parquet")], "max_train_steps": 3}
    with pytest.raises(ValueError, match="The classes, or the text tokens, .* differ from"):
        train_prior(replace(arguments, **other, resume_from_checkpoint="latest"))
    other = {"validation_data": [str(tmp_path / "named_b.parquet")], "validation_steps": 1}
    with pytest.raises(ValueError, match="`validation_data` and .* different classes, such as 'dog' and 'cat'"):
        train_prior(replace(arguments, **other, output_dir=str(tmp_path / "new")))


def test_averaging_cannot_start_at_a_resume_but_may_end(tmp_path):
    train_tokenizer(tokenizer_arguments(tmp_path / "without", ema_decay=0.0, max_train_steps=1))
    resumed = {"resume_from_checkpoint": "latest", "max_train_steps": 2}
    with pytest.raises(ValueError, match="`ema_decay` is 0.9, but the checkpoint was made without averaged weights"):
        train_tokenizer(tokenizer_arguments(tmp_path / "without", **resumed))
    train_tokenizer(tokenizer_arguments(tmp_path / "with", max_train_steps=1))
    train_tokenizer(tokenizer_arguments(tmp_path / "with", ema_decay=0.0, **resumed))


def test_a_checkpoint_of_an_earlier_version_can_be_resumed(whole_run, tmp_path, caplog):
    copy_checkpoint(whole_run, 3, tmp_path)
    file = tmp_path / "checkpoint-3" / "training_state.json"
    state = json.loads(file.read_text())
    del state["vocabulary"], state["checksums"]
    file.write_text(json.dumps(state))
    (tmp_path / "checkpoint-3" / "checksums.json").unlink()
    options = {"gradient_accumulation_steps": 2, "validation_steps": 3, "resume_from_checkpoint": "latest"}
    train_tokenizer(tokenizer_arguments(tmp_path, **options))
    assert_same_weights(whole_run / "pipeline", tmp_path / "pipeline")
    assert "is of a version without checksums" in caplog.text


# Unreadable data


@pytest.mark.parametrize("data", [{}, {"dataloader_num_workers": 1}, {"streaming": True}, {"cache_in_memory": True}])
def test_unreadable_images_are_counted_and_reported(tmp_path, monkeypatch, data):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = write_parquet(tmp_path / "a.parquet", 12, damaged=(3, 7))
    options = {"train_data": [str(path)], "max_train_samples": None, "logging_steps": 1, **data}
    train_tokenizer(tokenizer_arguments(tmp_path / "run", **options))
    assert read_log(tmp_path / "run")[-1]["unreadable_rows"] == 2
    report = json.loads((tmp_path / "run" / "unreadable_rows.json").read_text())
    assert all("a file of 4 bytes is not an image" in reason for reason in report.values())
    assert len(report) == 2 if "streaming" in data else report.keys() == {"3", "7"}


@pytest.mark.parametrize("data", [{}, {"streaming": True}, {"cache_in_memory": True}])
def test_an_unreadable_image_stops_training_with_fail_on_unreadable(tmp_path, monkeypatch, data):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = write_parquet(tmp_path / "a.parquet", 12, damaged=(3,))
    options = {"train_data": [str(path)], "max_train_samples": None, "fail_on_unreadable": True, **data}
    with pytest.raises(ValueError, match="Row .* cannot be used: .* `fail_on_unreadable` is set"):
        train_tokenizer(tokenizer_arguments(tmp_path / "run", **options))


# Token ids instead of images


def write_token_ids(path, num_rows=16, num_crops=3, num_tokens=6, largest=7):
    """Write a dataset like scripts/tokenize_dataset.py, with ids determined by the class."""
    rows = {"token_ids": [], "text": [], "label": []}
    for row in range(num_rows):
        label = row % 2
        rows["token_ids"].append([[label * largest] * num_tokens for _ in range(num_crops)])
        rows["text"].append(["a star", "a circle"][label])
        rows["label"].append(label)
    features = datasets.Features(
        {
            "token_ids": datasets.List(datasets.List(datasets.Value("uint16"))),
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["star", "circle"]),
        }
    )
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(path))
    return str(path)


@pytest.mark.parametrize("streaming", [False, True], ids=["rows", "stream"])
@pytest.mark.parametrize("column", ["text", "label"])
def test_a_prior_learns_from_token_ids_without_the_tokenizer(
    tiny_tokenizer_pipeline, tmp_path, monkeypatch, streaming, column
):
    if streaming and column == "text":
        pytest.skip("a text tokenizer cannot be learned from a stream")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    tiny_tokenizer_pipeline.save_pretrained(tmp_path / "tokenizer")
    data = write_token_ids(tmp_path / "ids.parquet")
    options = {"train_data": [data], "max_train_samples": None, "token_column": "token_ids", "streaming": streaming}
    options |= {"max_train_steps": 80, "learning_rate": 1e-2, "dropout": 0.0, "checkpointing_steps": 80}
    options |= {"validation_data": [data], "validation_steps": 80, "train_batch_size": 8, "lr_warmup_steps": 5}
    options |= {"caption_column": None, "class_column": "label"} if column == "label" else {}

    loaded = []
    load = FlexTokPipeline.from_pretrained.__func__

    def note(kind, *arguments, **options):
        loaded.append(len(read_log(tmp_path / "run")))
        return load(kind, *arguments, **options)

    monkeypatch.setattr(FlexTokPipeline, "from_pretrained", classmethod(note))
    folder = train_prior(prior_arguments(tmp_path / "run", tmp_path / "tokenizer", **options))
    assert loaded == [len(read_log(tmp_path / "run"))]  # once, after the last log entry

    assert read_log(tmp_path / "run")[-1]["validation_loss"] < 0.2
    pipe = FlexTokPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    condition = {"class_labels": [0, 1]} if column == "label" else {"prompt": ["a star", "a circle"]}
    token_ids = pipe(**condition, num_inference_steps=1, temperature=0.05).token_ids
    assert token_ids.tolist() == [[0] * 6, [7] * 6]


@pytest.mark.parametrize(
    ("change", "message"), [({"num_tokens": 5}, "holds 5 ids"), ({"largest": 15}, "ids up to 15, .* below 15")]
)
def test_token_ids_of_another_tokenizer_are_refused(tiny_tokenizer_pipeline, tmp_path, monkeypatch, change, message):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    tiny_tokenizer_pipeline.save_pretrained(tmp_path / "tokenizer")
    data = write_token_ids(tmp_path / "ids.parquet", **change)
    options = {"train_data": [data], "max_train_samples": None, "token_column": "token_ids"}
    with pytest.raises(ValueError, match=message):
        train_prior(prior_arguments(tmp_path / "run", tmp_path / "tokenizer", **options))


def test_token_ids_of_other_weights_are_refused(tiny_tokenizer_pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    tiny_tokenizer_pipeline.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "ids").mkdir()
    data = write_token_ids(tmp_path / "ids" / "train-00000-of-00001.parquet")
    options = {"train_data": [data], "max_train_samples": None, "token_column": "token_ids", "max_train_steps": 1}
    settings = {"dtype": "float32", "model": "elsewhere"}
    digest = weights_hash({"encoder": tiny_tokenizer_pipeline.encoder})
    for name, value in (("other", "0" * 64), ("same", digest)):
        (tmp_path / "ids" / "settings.json").write_text(json.dumps({**settings, "weights_sha256": value}))
        arguments = prior_arguments(tmp_path / name, tmp_path / "tokenizer", **options)
        if name == "other":
            with pytest.raises(ValueError, match="were made by 'elsewhere' with other weights"):
                train_prior(arguments)
        else:
            train_prior(arguments)


def test_a_class_conditional_prior_is_validated_by_class_name(tiny_tokenizer_pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    tiny_tokenizer_pipeline.save_pretrained(tmp_path / "tokenizer")
    options = {"train_data": [write_token_ids(tmp_path / "ids.parquet")], "max_train_samples": None}
    options |= {"token_column": "token_ids", "caption_column": None, "class_column": "label", "max_train_steps": 1}
    options |= {"validation_prompts": ["circle", "star"], "validation_steps": 1}
    train_prior(prior_arguments(tmp_path / "run", tmp_path / "tokenizer", **options))
    assert (tmp_path / "run" / "validation-1.png").is_file()


# Log, model card, schedule and trackers


def test_the_log_reports_throughput(whole_run):
    entry = next(entry for entry in read_log(whole_run) if "images_per_s" in entry)
    assert entry["images_per_s"] > 0 and entry["tflops_per_process"] > 0
    assert 0 < entry["matmul_share"] < 1 and 0 <= entry["data_wait_share"] < 1
    assert {"loss", "flow_loss", "grad_norm", "lr", "distinct_ids", "unreadable_rows"} < entry.keys()
    assert 0 < read_log(whole_run)[-1]["validation_loss"] < 5


def test_the_model_is_saved_with_a_card(whole_run):
    card = ModelCard.load(whole_run / "pipeline" / "README.md")
    assert card.data.library_name == "flextok_hf" and "arxiv:2502.13967" in card.data.tags
    assert "6 steps of 8 images" in card.text and "precision float32" in card.text


def test_the_learning_rate_ends_at_lr_end_ratio(tmp_path):
    options = {"max_train_steps": 9, "lr_warmup_steps": 3, "lr_end_ratio": 0.1, "learning_rate": 1.0}
    train_tokenizer(tokenizer_arguments(tmp_path, logging_steps=1, **options))
    rates = [entry["lr"] for entry in read_log(tmp_path)]
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1])
    assert rates[-1] == pytest.approx(0.1) and rates[3:] == sorted(rates[3:], reverse=True)


def test_trackers_receive_metrics_and_images(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train_tokenizer(tokenizer_arguments(tmp_path, report_to="tensorboard", validation_steps=6, logging_steps=2))
    events = EventAccumulator(str(next((tmp_path / "logs").rglob("events*")).parent)).Reload()
    assert [event.step for event in events.Scalars("loss")] == [2, 4, 6]
    assert [event.step for event in events.Images("validation")] == [1, 6]
