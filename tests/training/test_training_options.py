"""Training options: their sources, and that invalid ones are refused by name before the first step."""

import dataclasses
import json

import datasets
import pytest
import torch
from image_rows import png, write_parquet
from test_training_loop import prior_arguments, tokenizer_arguments
from test_vae_training import vae_arguments

from flextok_hf.training.arguments import PriorArguments, TokenizerArguments, VaeArguments
from flextok_hf.training.loop import Trainer
from flextok_hf.training.stages import train_prior, train_tokenizer, train_vae
from flextok_hf.utils.option_parsing import parse_arguments


STAGES = (VaeArguments, TokenizerArguments, PriorArguments)


@pytest.fixture(autouse=True)
def no_training_step(tmp_path, monkeypatch):
    """Fail on any training step, and keep the `datasets` cache out of the user's folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(Trainer, "train_step", lambda *_: pytest.fail("a training step was run"))


def write_config(folder, text):
    path = folder / "config.yaml"
    path.write_text(text)
    return str(path)


# YAML file and flags


def test_flags_override_the_file(tmp_path):
    config = write_config(tmp_path, "output_dir: x\nlearning_rate: 1e-2\nfsq_levels: [8, 5]\ncompile: true\n")
    arguments = parse_arguments(TokenizerArguments, ["--config", config, "--output_dir", "y"])
    assert (arguments.output_dir, arguments.learning_rate) == ("y", 0.01)
    assert (arguments.fsq_levels, arguments.compile) == ([8, 5], True)


@pytest.mark.parametrize("kind", STAGES)
def test_every_option_round_trips_through_a_file(tmp_path, kind):
    required = {field.name: "x" for field in dataclasses.fields(kind) if field.default is field.default_factory}
    condition = {"caption_column": "text", "tokenizer": "x"} if kind is PriorArguments else {}
    arguments = kind(**required, **condition)
    config = write_config(tmp_path, json.dumps(dataclasses.asdict(arguments)))
    assert parse_arguments(kind, ["--config", config]) == arguments


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 0.1", "unknown options: learning_rat. Did you mean learning_rate?"),
        ("- a list", "must hold lines `option: value`"),
        ("fsq_levels: [8, 5", "no valid YAML"),
        ("fsq_levels: []", "`fsq_levels` in .* is empty. Leave it out to get the default, \\[8, 8, 8"),
        ("resolution: [64, 64]", "`resolution` in .* takes one value, got \\[64, 64\\]"),
        ("keep_mode: sometimes", "`keep_mode` must be one of uniform, powers_of_two, uniform_rounded_up, got"),
        ("lr_scheduler: triangle", "`lr_scheduler` must be one of linear, cosine"),
        ("mixed_precision: no", "`mixed_precision` in .* YAML reads as False: put it in quotes"),
        ("mixed_precision: fp4", "`mixed_precision` must be one of no, bf16, fp16"),
        ("resolution: 0", "`resolution` must be 1 or more, got 0"),
        ("null_condition_probability: 1.5", "`null_condition_probability` must be from 0 to 1, got 1.5"),
        ("ema_decay: 1.0", "`ema_decay` must be from 0 to 1"),
        ("export_dtype: float8", "`export_dtype` must be one of float32, float16, bfloat16"),
        ("encoder_hidden_size: 100", "`encoder_hidden_size` must be a multiple of `head_dim` \\(64\\)"),
        ("fsq_levels: [8, 1]", "`fsq_levels` must be a non-empty list of numbers of at least 2"),
        ("min_crop_scale: 0.5", "`min_crop_scale` is 0.5, but crops are fixed: set `random_crop`"),
        ("hub_model_id: someone/model", "`hub_model_id` .* set `push_to_hub`"),
        ("joint_lengths: true\nfull_length_probability: 0.5", "`joint_lengths` .* `full_length_probability` to 0"),
        ("freeze_encoder: true", "`freeze_encoder` needs .* `pretrained_tokenizer`"),
        (
            "freeze_encoder: true\npretrained_tokenizer: x\nfeature_penalty: 0.1",
            "`feature_penalty` trains the encoder",
        ),
        ("repa_network: x\ncache_latents: true", "`repa_network` needs images, which `cache_latents`"),
    ],
)
def test_options_are_checked_when_they_are_read(tmp_path, text, message):
    config = write_config(tmp_path, "output_dir: x\n" * (not text.startswith("-")) + text)
    with pytest.raises(ValueError, match=message):
        parse_arguments(TokenizerArguments, ["--config", config])


@pytest.mark.parametrize(
    ("text", "name"),
    [("resolution: large", "resolution"), ("resolution: 64.5", "resolution"), ("compile: perhaps", "compile")],
)
def test_a_value_of_the_wrong_type_is_refused_by_name(tmp_path, text, name, capsys):
    with pytest.raises(SystemExit):
        parse_arguments(TokenizerArguments, ["--config", write_config(tmp_path, f"output_dir: x\n{text}")])
    assert name in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--learning_ra", "0.1"], ["--unknown", "1"]])
def test_unknown_and_shortened_flags_are_refused(flags, capsys):
    with pytest.raises((SystemExit, ValueError), match="|".join([flags[0], "2"])):
        parse_arguments(TokenizerArguments, ["--output_dir", "x", *flags])


def test_a_missing_file_is_refused():
    with pytest.raises(FileNotFoundError, match="`config` 'nowhere.yaml' is no file"):
        parse_arguments(TokenizerArguments, ["--config", "nowhere.yaml"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"caption_column": None}, "Set either `caption_column` or `class_column`"),
        ({"class_column": "label"}, "Set either `caption_column` or `class_column`"),
        ({"hidden_size": 30, "num_heads": 4}, "`hidden_size` must be a multiple of `num_heads` \\(4\\), got 30"),
        ({"token_column": "ids", "random_flip": True}, "`random_flip` applies to images, but `token_column`"),
        ({"text_vocab_size": 100}, "`text_vocab_size` must be 259 or more"),
    ],
)
def test_options_of_the_prior_are_checked_on_construction(options, message):
    with pytest.raises(ValueError, match=message):
        prior_arguments("x", "y", **options)


# What the options refer to


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resolution": 18}, "`resolution` 18 .*`encoder_patch_size`"),
        ({"token_layout": "grid"}, "`num_registers` is 4, but a grid has a token per patch: .* set it to 16"),
        ({"vae": "./nowhere"}, "`vae` './nowhere' cannot be loaded"),
        ({"pretrained_tokenizer": "./nowhere"}, "`pretrained_tokenizer` './nowhere' cannot be loaded"),
        ({"repa_network": "./nowhere", "repa_layer": 0}, "`repa_network` './nowhere' cannot be loaded"),
        ({"train_data": ["./nowhere"]}, "'./nowhere' does not exist"),
        ({"report_to": "paper"}, "`report_to` must be one of .*tensorboard.*wandb.*, got 'paper'"),
        ({"train_batch_size": 13}, "12 rows do not fill one batch"),
    ],
)
def test_invalid_options_of_the_tokenizer_are_refused(tmp_path, options, message):
    with pytest.raises((ValueError, OSError), match=message):
        train_tokenizer(tokenizer_arguments(tmp_path, **options))


def test_a_tracker_that_is_not_installed_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`report_to` 'clearml' is not installed"):
        train_tokenizer(tokenizer_arguments(tmp_path, report_to="clearml"))


def test_a_tokenizer_of_another_size_is_refused(tiny_tokenizer_pipeline, tmp_path):
    tiny_tokenizer_pipeline.save_pretrained(tmp_path / "tokenizer")
    options = {"pretrained_tokenizer": str(tmp_path / "tokenizer"), "resolution": 32}
    with pytest.raises(ValueError, match="`resolution` is 32, but `pretrained_tokenizer` .* works at 16 pixels"):
        train_tokenizer(tokenizer_arguments(tmp_path / "run", **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resolution": 33}, "`resolution` 33 must be a multiple of 2"),
        ({"pretrained_vae": "./nowhere"}, "`pretrained_vae` './nowhere' cannot be loaded"),
        ({"perceptual_network": "./nowhere"}, "`perceptual_network` './nowhere' cannot be loaded"),
    ],
)
def test_invalid_options_of_the_vae_are_refused(tmp_path, options, message):
    with pytest.raises((ValueError, OSError), match=message):
        train_vae(vae_arguments(tmp_path, **options))


PRIOR_CASES = {
    "no such column": ({"caption_column": "words"}, "`caption_column` is 'words', but .* columns image, text, label"),
    "no caption at all": ({"caption_column": "nothing"}, "No usable image .* `caption_column` \\('nothing'\\)"),
    "classes without names": ({"caption_column": None, "class_column": "label"}, "set `num_classes`"),
    "a class too large": (
        {"caption_column": None, "class_column": "label", "num_classes": 5},
        "`class_column` 'label' holds [5-9], but classes are numbered from 0 to 4",
    ),
    "images for token ids": ({"token_column": "text"}, "`token_column` 'text' must hold whole numbers"),
    "no tokenizer": ({"tokenizer": "./nowhere"}, "`tokenizer` './nowhere' cannot be loaded"),
    "no text encoder": ({"text_encoder": "./nowhere"}, "`text_encoder` './nowhere' cannot be loaded"),
    "no class of that name": (
        {
            "caption_column": None,
            "class_column": "label",
            "num_classes": 10,
            "validation_prompts": ["cat"],
            "validation_steps": 1,
        },
        "`validation_prompts` contains 'cat', which is not a class. Classes: 0, 1, 2",
    ),
}


@pytest.mark.parametrize("streaming", [False, True], ids=["rows", "stream"])
@pytest.mark.parametrize(("options", "message"), PRIOR_CASES.values(), ids=PRIOR_CASES)
def test_invalid_options_of_the_prior_are_refused(
    tiny_tokenizer_pipeline, tmp_path, options, message, streaming, monkeypatch
):
    monkeypatch.setattr("flextok_hf.data.image_stream.MAX_UNREADABLE_ROWS", 5)
    options = dict(options)
    if streaming and options.get("caption_column", "text") is not None and "text_encoder" not in options:
        options = {"text_encoder": str(tmp_path / "t5"), **options}
        save_text_encoder(tmp_path / "t5")
    tiny_tokenizer_pipeline.save_pretrained(tmp_path / "tokenizer")
    columns = {"text": [f"row {row}" for row in range(10)], "label": list(range(10)), "nothing": [None] * 10}
    data = str(write_rows(tmp_path / "a.parquet", columns))
    arguments = prior_arguments(
        tmp_path / "run",
        options.pop("tokenizer", tmp_path / "tokenizer"),
        # in one batch, so that a stream reads every row before the first step
        **{"train_data": [data], "max_train_samples": None, "streaming": streaming, "train_batch_size": 10, **options},
    )
    with pytest.raises((ValueError, TypeError), match=message):
        train_prior(arguments)


def write_rows(path, columns):
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "text": datasets.Value("string"),
            "label": datasets.Value("int64"),
            "nothing": datasets.Value("string"),
        }
    )
    images = [{"bytes": png(row), "path": None} for row in range(10)]
    datasets.Dataset.from_dict({"image": images, **columns}, features=features).to_parquet(str(path))
    return path


def save_text_encoder(folder):
    from flextok_hf.training.text import build_text_encoder, train_text_tokenizer

    tokenizer = train_text_tokenizer(["a row"], vocab_size=300, max_length=24)
    torch.manual_seed(0)
    build_text_encoder(tokenizer, hidden_size=32, num_layers=1, dropout=0.0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("streaming", [False, True], ids=["rows", "stream"])
def test_an_empty_dataset_is_refused(tmp_path, streaming):
    path = write_parquet(tmp_path / "a.parquet", num_rows=0)
    options = {"train_data": [str(path)], "streaming": streaming, "max_train_samples": None}
    with pytest.raises(ValueError, match="has no rows"):
        train_tokenizer(tokenizer_arguments(tmp_path / "run", **options))
