"""Random draws of a training step: the same for any split of its images into micro-batches and processes.

Letters: B images of a micro-batch.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..data.seeds import draw_seed


BLOCK = 8  # images of a step that share a noise generator: one for each would mean a kernel launch for each


class StepRng:
    """Random draws for one micro-batch.

    Numbers, one per image, are drawn for all images of the step and cut to its own. Noise, which is large, comes from
    one generator per block of images, so that only the blocks of its own images are drawn.

    Args:
        seed: one per step, the same for all its micro-batches.
        device: device of the draws.
        first: index of the micro-batch's first image in the step.
        total: images of the step; `None` if the micro-batch is the whole step.
    """

    def __init__(self, seed: int, device: torch.device | str = "cpu", first: int = 0, total: int | None = None):
        self.seed = seed
        self.generator = torch.Generator(device).manual_seed(seed)
        self.noise_generator = torch.Generator(device)
        self.num_noises = 0
        self.first = first
        self.total = total

    def own(self, draw: Callable[[int], Tensor], batch_size: int) -> Tensor:
        """Call `draw` for all images of the step and return the B rows of this micro-batch."""
        total = batch_size if self.total is None else self.total
        return draw(total)[self.first : self.first + batch_size]

    def normal_like(self, tensor: Tensor) -> Tensor:
        """Draw standard normal noise, float32 (B, ...) in the shape of `tensor`."""
        batch_size, shape = tensor.shape[0], tensor.shape[1:]
        blocks = range(self.first // BLOCK, -(-(self.first + batch_size) // BLOCK))
        noise = torch.empty(len(blocks), BLOCK, *shape, device=self.generator.device)
        for block, values in zip(blocks, noise, strict=True):
            values.normal_(generator=self.noise_generator.manual_seed(draw_seed(self.seed, self.num_noises, block)))
        self.num_noises += 1
        skipped = self.first - blocks.start * BLOCK
        return noise.flatten(0, 1)[skipped : skipped + batch_size]

    def bernoulli(self, probability: float, batch_size: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw a boolean for each image, (B,), by default on the device of the draws."""
        generator = generator or self.generator
        return self.own(lambda count: torch.rand(count, generator=generator, device=generator.device), batch_size).lt(
            probability
        )

    def host_bernoulli(self, probability: float, batch_size: int) -> Tensor:
        """Draw a boolean for each image, (B,), on the CPU: reading it does not wait for an accelerator."""
        return self.bernoulli(probability, batch_size, torch.Generator().manual_seed(draw_seed(self.seed, -1)))
