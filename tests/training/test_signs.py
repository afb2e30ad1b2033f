"""Warnings about runs that will not learn what they should."""

import logging

import pytest
from training_processes import SMALL_TOKENIZER

from flextok_hf.training.arguments import TokenizerArguments, VaeArguments
from flextok_hf.training.signs import learning_rates, schedule_notes, validation_notes
from flextok_hf.training.stages import train_tokenizer


def arguments(**changes):
    options = {"max_train_steps": 100, "lr_warmup_steps": 10, "learning_rate": 1e-3, **changes}
    return TokenizerArguments(output_dir="unused", **options)


def test_usual_options_are_not_remarked_on():
    assert schedule_notes(arguments()) == schedule_notes(VaeArguments(output_dir="unused")) == []


@pytest.mark.parametrize("steps", [100, 200])
def test_warm_up_as_long_as_training_is_remarked_on(steps):
    (note,) = schedule_notes(arguments(lr_warmup_steps=steps))
    assert f"`lr_warmup_steps` {steps}" in note and "never reaches 0.001" in note


def test_another_learning_rate_of_the_encoder_is_remarked_on_and_logged():
    halved = arguments(encoder_learning_rate_scale=0.5)
    assert "encoder trains at a learning rate of 0.0005, the decoder at 0.001" in schedule_notes(halved)[0]
    assert learning_rates(halved, 0.1) == pytest.approx({"lr": 1e-4, "encoder_lr": 5e-5})


@pytest.mark.parametrize(
    ("metrics", "is_remarked_on"),
    [
        ({"psnr_1": 12.65, "psnr_4": 12.7, "psnr_32": 12.77}, True),
        ({"psnr_1": 18.4, "psnr_16": 18.1, "psnr_16_16x32": 30.0}, True),
        ({"psnr_1": 11.0, "psnr_32": 16.8}, False),
        ({"psnr_1": 12.0}, False),
        ({"psnr": 24.1, "validation_loss": 0.3}, False),
    ],
)
def test_tokens_that_change_nothing_are_remarked_on(metrics, is_remarked_on):
    assert bool(validation_notes(metrics)) == is_remarked_on


def test_a_run_says_at_its_first_step_what_is_odd(tmp_path, caplog):
    options = {"resolution": 16, "max_train_samples": 4, "train_batch_size": 4, "num_validation_images": 2}
    options |= {
        "max_train_steps": 1,
        "lr_warmup_steps": 5,
        "encoder_learning_rate_scale": 0.5,
        "validation_steps": 100,
    }
    with caplog.at_level(logging.WARNING, logger="flextok_hf"):
        train_tokenizer(TokenizerArguments(output_dir=str(tmp_path), **SMALL_TOKENIZER, **options))
    messages = " ".join(caplog.messages)
    assert "`lr_warmup_steps` 5" in messages and "The encoder trains" in messages and "`psnr_1`" in messages
    assert (tmp_path / "validation-1.png").is_file()
