"""Random draws of a training step: the same for any split of its images into micro-batches and processes.

Letters: B images of a micro-batch.
"""

from collections.abc import Callable

import torch
from torch import Tensor


class StepRng:
    """Random draws for one micro-batch: made for all images of the step, then cut to its own.

    Args:
        seed: one per step, the same for all its micro-batches.
        device: device of the draws.
        first: index of the micro-batch's first image in the step.
        total: images of the step; `None` if the micro-batch is the whole step.
    """

    def __init__(self, seed: int, device: torch.device | str = "cpu", first: int = 0, total: int | None = None):
        self.generator = torch.Generator(device).manual_seed(seed)
        self.first = first
        self.total = total

    def own(self, draw: Callable[[int], Tensor], batch_size: int) -> Tensor:
        """Call `draw` for all images of the step and return the B rows of this micro-batch."""
        total = batch_size if self.total is None else self.total
        return draw(total)[self.first : self.first + batch_size]

    def normal_like(self, tensor: Tensor) -> Tensor:
        """Draw standard normal noise, float32 (B, ...) in the shape of `tensor`."""
        shape, generator = tensor.shape[1:], self.generator
        return self.own(
            lambda count: torch.randn(count, *shape, generator=generator, device=generator.device), tensor.shape[0]
        )

    def bernoulli(self, probability: float, batch_size: int) -> Tensor:
        """Draw a boolean for each image, (B,)."""
        generator = self.generator
        return self.own(lambda count: torch.rand(count, generator=generator, device=generator.device), batch_size).lt(
            probability
        )
