"""Signs in the options and the log that a run will not learn what it should; docs/training.md explains them."""

import logging
import re
from collections.abc import Mapping, Sequence

from .arguments import TrainingArguments


logger = logging.getLogger(__name__)

MIN_GAIN_DB = 0.5  # of all tokens over one, below which the decoder hardly reads its tokens
BAR_METRICS = ("loss", "lr", "images_per_s")  # shown while training; the log has all


def schedule_notes(arguments: TrainingArguments) -> list[str]:
    """Return what is odd about the learning rate that these options give, in sentences."""
    notes = []
    if arguments.lr_warmup_steps >= arguments.max_train_steps:
        notes.append(
            f"`lr_warmup_steps` {arguments.lr_warmup_steps} is not below `max_train_steps`"
            f" {arguments.max_train_steps}: the learning rate never reaches {arguments.learning_rate:g}. A tenth"
            " of the steps is enough."
        )
    rates = learning_rates(arguments, 1.0)
    if len(rates) > 1:
        notes.append(
            f"The encoder trains at a learning rate of {rates['encoder_lr']:g}, the decoder at {rates['lr']:g}"
            " (`encoder_learning_rate_scale`)."
        )
    return notes


def learning_rates(arguments: TrainingArguments, factor: float) -> dict[str, float]:
    """Return the learning rates to log, where `factor` is how much of them the schedule allows now."""
    rates = {"lr": arguments.learning_rate * factor}
    scale = getattr(arguments, "encoder_learning_rate_scale", 1.0)
    if scale != 1 and not getattr(arguments, "freeze_encoder", False):
        rates["encoder_lr"] = rates["lr"] * scale
    return rates


def validation_notes(metrics: Mapping[str, float]) -> list[str]:
    """Return what the metrics of a validation of a tokenizer warn of, in sentences."""
    by_count = {int(name[5:]): value for name, value in metrics.items() if re.fullmatch(r"psnr_\d+", name)}
    if len(by_count) < 2:
        return []
    few, many = min(by_count), max(by_count)
    if by_count[many] - by_count[few] >= MIN_GAIN_DB:
        return []
    return [
        f"`psnr_{few}` ({by_count[few]:.2f} dB) is about `psnr_{many}` ({by_count[many]:.2f} dB): so far the decoder"
        " makes little use of its tokens. This is usual at first; if it lasts, see `Is it learning?` in"
        " docs/training.md."
    ]


def warn(notes: Sequence[str]) -> None:
    """Log each as a warning."""
    for note in notes:
        logger.warning(note)
