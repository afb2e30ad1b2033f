"""Setup before the model is built: devices, precision and trackers."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import LoggerType, ProjectConfiguration
from PIL import Image

from .arguments import TrainingArguments


def build_accelerator(arguments: TrainingArguments) -> Accelerator:
    """Set up devices and precision.

    Raises:
        ValueError: the tracker is unknown or not installed, or DeepSpeed is set to ZeRO-3.
    """
    output_dir = Path(arguments.output_dir)
    trackers = [kind.value for kind in LoggerType if kind.value != "all"]
    if arguments.report_to is not None and arguments.report_to not in trackers:
        raise ValueError(f"`report_to` must be one of {', '.join(trackers)}, got {arguments.report_to!r}.")
    accelerator = Accelerator(
        mixed_precision=arguments.mixed_precision,
        gradient_accumulation_steps=arguments.gradient_accumulation_steps,
        log_with=arguments.report_to,
        project_config=ProjectConfiguration(project_dir=str(output_dir), logging_dir=str(output_dir / "logs")),
    )
    if arguments.report_to is not None and not accelerator.log_with:  # accelerate drops it silently
        raise ValueError(f"`report_to` {arguments.report_to!r} is not installed: install it, or leave it out.")
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None:
        if plugin.zero_stage == 3:
            raise ValueError("DeepSpeed's ZeRO-3 does not allow averaging of weights: use ZeRO-2 or FSDP2.")
        # accelerate would read this from a data loader, but it prepares none here
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = arguments.train_batch_size
    torch.backends.cudnn.benchmark = True  # all batches have one shape, so autotuning is worth it
    return accelerator


def start_trackers(arguments: TrainingArguments, accelerator: Accelerator) -> None:
    """Start the tracker that the options name, if any."""
    if arguments.report_to is not None:
        plain = {
            name: value if isinstance(value, int | float) else str(value) for name, value in asdict(arguments).items()
        }
        accelerator.init_trackers("flextok_hf", config=plain)


@contextmanager
def loading(option: str, source: str) -> Iterator[None]:
    """Add the option and its value to errors raised while loading."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise ValueError(f"`{option}` {source!r} cannot be loaded: {error}") from error


def log_image(accelerator: Accelerator, image: Image.Image, step: int) -> None:
    """Send an image to the trackers that support images."""
    for tracker in accelerator.trackers:
        if hasattr(tracker, "log_images"):
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"validation": np.asarray(image)[None]}, step=step, **layout)
