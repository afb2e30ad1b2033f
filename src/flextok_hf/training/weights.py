"""Averaged weights: used for validation and export, kept in checkpoints."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import nn


AVERAGE_FILE = "ema.safetensors"


class AveragedWeights:
    """Exponential average of a model's weights over the steps of its training.

    Args:
        model: the model in training.
        decay: share of the average that a step keeps; 0 means that there is no average.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model = model
        self.ema = EMAModel(model.parameters(), decay=decay, foreach=True) if decay else None

    def step(self) -> None:
        """Take in the weights after an optimizer step."""
        if self.ema is not None:
            self.ema.step(self.model.parameters())

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Let the model have its averaged weights, in evaluation mode; its own come back at the end."""
        self.model.eval()
        if self.ema is not None:
            self.ema.store(self.model.parameters())
            self.ema.copy_to(self.model.parameters())
        try:
            yield
        finally:
            if self.ema is not None:
                self.ema.restore(self.model.parameters())
            self.model.train()

    def save(self, folder: Path, is_main_process: bool) -> None:
        """Write the average into a checkpoint, under the names of the weights; all processes call this."""
        if self.ema is None:
            return
        names = [name for name, _ in self.model.named_parameters()]
        average = dict(zip(names, self.ema.shadow_params, strict=True))
        if is_main_process:
            save_file({name: tensor.contiguous() for name, tensor in average.items()}, folder / AVERAGE_FILE)

    def load(self, folder: Path, step: int) -> None:
        """Read the average from a checkpoint of `step`."""
        if self.ema is None:
            return
        average = load_file(folder / AVERAGE_FILE)
        names = [name for name, _ in self.model.named_parameters()]
        with torch.no_grad():
            for name, tensor in zip(names, self.ema.shadow_params, strict=True):
                tensor.copy_(average[name])
        self.ema.optimization_step = step
