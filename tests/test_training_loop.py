"""Training from options to a saved pipeline: checkpoints, exact resuming, and that something is learned."""

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from flextok_hf.pipeline_flextok import FlexTokPipeline
from flextok_hf.training.arguments import PriorArguments, TokenizerArguments, parse_arguments
from flextok_hf.training.loop import Trainer, build_accelerator, list_checkpoints, split_by_decay
from flextok_hf.training.stages import train_prior, train_tokenizer
from flextok_hf.training.tokenizer import TokenizerForTraining, build_tokenizer


SMALL_DATA = {"resolution": 16, "max_train_samples": 12, "train_batch_size": 4, "num_validation_images": 2}
SMALL_TOKENIZER = {
    "num_registers": 4,
    "fsq_levels": [5, 3],
    "head_dim": 16,
    "encoder_hidden_size": 32,
    "encoder_num_layers": 1,
    "encoder_patch_size": 4,
    "decoder_hidden_size": 32,
    "decoder_num_layers": 1,
    "decoder_patch_size": 4,
}


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
    """Every tensor in the files below a folder, by file and name."""
    files = sorted(Path(folder).rglob("*.safetensors"))
    return {(file.name, name): tensor for file in files for name, tensor in load_file(file).items()}


def assert_same_weights(folder, other):
    one, two = all_weights(folder), all_weights(other)
    assert one and one.keys() == two.keys()
    assert [key for key in one if not torch.equal(one[key], two[key])] == []


def copy_checkpoint(source, step, target):
    """Make an output folder that looks as if the run in `source` had been stopped after `step`."""
    shutil.copytree(Path(source) / f"checkpoint-{step}", Path(target) / f"checkpoint-{step}")


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """A run of 6 steps without a stop: validation and two micro-batches per step, several epochs."""
    folder = tmp_path_factory.mktemp("whole")
    train_tokenizer(tokenizer_arguments(folder, gradient_accumulation_steps=2, validation_steps=3))
    return folder


def test_a_run_leaves_checkpoints_log_pictures_and_a_pipeline(whole_run):
    assert [path.name for path in list_checkpoints(whole_run)] == ["checkpoint-3", "checkpoint-6"]
    steps = [json.loads(line)["step"] for line in (whole_run / "log.jsonl").read_text().splitlines()]
    assert steps == [3, 6, 6]
    assert (whole_run / "validation-6.png").is_file()
    assert not list(whole_run.glob("*.partial"))
    recipe = json.loads((whole_run / "pipeline" / "training.json").read_text())
    assert recipe["steps"] == 6 and recipe["seconds"] > 0
    assert "Stage `tokenizer`: 6 steps of" in (whole_run / "pipeline" / "README.md").read_text()


def test_the_saved_pipeline_reconstructs_a_picture(whole_run):
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


def test_a_resumed_run_ends_with_the_same_bits(whole_run, tmp_path):
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


def test_a_folder_that_is_no_checkpoint_is_refused_by_name(tmp_path):
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


def test_a_repeated_batch_is_learned(tmp_path):
    arguments = tokenizer_arguments(
        tmp_path, max_train_steps=60, learning_rate=5e-3, checkpointing_steps=1000, ema_decay=0.0
    )
    accelerator = build_accelerator(arguments)
    torch.manual_seed(0)
    encoder, decoder = build_tokenizer(arguments, vae=None)
    model = TokenizerForTraining(encoder, decoder, arguments)
    batch = {"pixel_values": torch.where(torch.rand(8, 3, 1, 1) < 0.5, -1.0, 1.0).expand(-1, -1, 16, 16)}

    @torch.no_grad()
    def loss():
        draws = [model(batch, 0, torch.Generator().manual_seed(seed))[0] for seed in range(8)]
        return torch.stack(draws).mean().item()

    before = loss()
    trainer = Trainer(arguments, accelerator, model, split_by_decay([model], arguments.learning_rate))
    trainer.train(lambda first_batch: itertools.repeat(batch))
    assert loss() < 0.6 * before


def test_a_prior_is_trained_resumed_and_draws_from_a_prompt(tiny_tokenizer_pipeline, tmp_path):
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


def test_validating_a_prior_draws_its_prompts(tiny_tokenizer_pipeline, tmp_path):
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
    assert len(pipe(class_labels=[0, 1], num_inference_steps=1).images) == 2


def test_a_prior_needs_exactly_one_condition(tmp_path):
    with pytest.raises(ValueError, match="`caption_column` or `class_column`"):
        train_prior(prior_arguments(tmp_path, tmp_path, class_column="label"))


# Options


def write_config(folder, text):
    path = folder / "config.yaml"
    path.write_text(text)
    return str(path)


def test_an_unknown_option_in_a_file_is_refused_by_name(tmp_path):
    config = write_config(tmp_path, "output_dir: x\nlearning_rat: 0.1\n")
    with pytest.raises(ValueError, match="unknown options: learning_rat"):
        parse_arguments(TokenizerArguments, ["--config", config])


def test_flags_win_over_the_file(tmp_path):
    config = write_config(tmp_path, "output_dir: x\nlearning_rate: 1e-2\nfsq_levels: [8, 5]\ncompile: true\n")
    arguments = parse_arguments(TokenizerArguments, ["--config", config, "--output_dir", "y"])
    assert (arguments.output_dir, arguments.learning_rate) == ("y", 0.01)
    assert (arguments.fsq_levels, arguments.compile) == ([8, 5], True)


@pytest.mark.parametrize(
    ("name", "value"), [("max_train_steps", 0), ("export_dtype", "float8"), ("ema_decay", 1.0), ("resolution", 0)]
)
def test_an_option_out_of_range_is_refused_by_name(name, value, tmp_path):
    with pytest.raises(ValueError, match=f"`{name}`"):
        tokenizer_arguments(tmp_path, **{name: value})


def test_a_resolution_that_patches_do_not_divide_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`resolution` 18 .*`encoder_patch_size`"):
        build_tokenizer(tokenizer_arguments(tmp_path, resolution=18), vae=None)
