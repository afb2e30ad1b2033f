"""Sizes of images: which ones a model accepts, and images of several sizes in one call.

Letters: H W height and width of an image in pixels, h w of its latents, B batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils import BaseOutput
from torch import Tensor

from ..models.patches import MAX_AREA, MAX_ASPECT, features_of_sizes, is_allowed_grid
from ..utils.numbers import is_whole_number
from .input_checks import brief
from .token_checks import as_list


Size = tuple[int, int]  # height and width


@dataclass
class FlexTokTokenizerOutput(BaseOutput):
    """Tokens of images and the sizes at which they were read.

    Attributes:
        token_ids (`torch.LongTensor` of shape `(B, k)`): coarsest first.
        sizes (`list[tuple[int, int]]`): height and width of each image, in pixels; `detokenize` takes them.
    """

    token_ids: Tensor
    sizes: list[Size]


@dataclass(frozen=True)
class SizeRules:
    """Which sizes a model accepts, in pixels or in cells of its latents.

    Args:
        step: side of a whole patch.
        side: side of the square that the model was trained with.
        is_free: whether it accepts any shape (`positions` "stretch"), or only parts of the square ("crop").
    """

    step: int
    side: int
    is_free: bool

    @property
    def allowed(self) -> str:
        """What is allowed, in words."""
        if not self.is_free:
            return f'multiples of {self.step} up to {self.side}: this model (`positions` "crop") knows its square only'
        return (
            f"multiples of {self.step}, neither more than {MAX_ASPECT} times the other, their product at most"
            f" {MAX_AREA * self.side**2}"
        )

    def accepts(self, height: Any, width: Any) -> bool:
        """Whether the model accepts a size."""
        if not all(is_whole_number(side) and side > 0 and side % self.step == 0 for side in (height, width)):
            return False
        if not self.is_free:
            return max(height, width) <= self.side
        return is_allowed_grid(height // self.step, width // self.step, self.side // self.step)

    def check(self, height: Any, width: Any, name: str = "`height` and `width`") -> Size:
        """Return a size; raises `ValueError` if the model does not accept it."""
        if not self.accepts(height, width):
            raise ValueError(f"{name} must be {self.allowed}; got {brief(height)} and {brief(width)}.")
        return int(height), int(width)

    def keep(self, height: int, width: int) -> Size:
        """Return the size of about the trained area with the proportions of an image, in whole patches."""
        patches = self.side // self.step  # of a side of the square
        height, width = min(height, MAX_ASPECT * width), min(width, MAX_ASPECT * height)
        rows = max(1, round(patches * (height / width) ** 0.5))
        columns = max(1, round(patches * (width / height) ** 0.5))
        return min(rows, MAX_ASPECT * columns) * self.step, min(columns, MAX_ASPECT * rows) * self.step

    def chooser(self, size: Any) -> Callable[[int, int], Size]:
        """Return a function from the height and width of an image to the size it is resized to.

        Args:
            size: `None` for the square, "keep" for `keep`, or height and width.

        Raises:
            ValueError: if it is something else, or the model does not accept it.
        """
        if isinstance(size, str) and size == "keep":
            if not self.is_free:
                raise ValueError(f'`size` is "keep", but sizes must be {self.allowed}. Pass `None` or such a size.')
            return self.keep
        if size is None:
            return lambda height, width: (self.side, self.side)
        if not isinstance(size, list | tuple) or len(size) != 2:
            raise ValueError(f'`size` must be `None`, "keep" or (height, width), got {brief(size)}.')
        chosen = self.check(size[0], size[1], name="`size`, height and width,")
        return lambda height, width: chosen

    def check_each(self, height: Any, width: Any, batch_size: int) -> list[Size] | None:
        """Return one size per image, or `None` if neither height nor width is given; one alone has the square's other.

        Args:
            height, width: numbers for all images, or lists with one each.
            batch_size: number of images.

        Raises:
            ValueError: if their number differs, or the model does not accept a size.
        """
        if height is None and width is None:
            return None
        sides = []
        for name, value in (("height", height), ("width", width)):
            is_column = isinstance(value, Sequence) and not isinstance(value, str)  # lists, columns of datasets
            values = as_list(list(value) if is_column else value)
            values = [value] * batch_size if values is None else values
            if len(values) != batch_size:
                raise ValueError(
                    f"`{name}` has {len(values)} values, but there are {batch_size} images. Pass one number for all,"
                    " or a list with one each."
                )
            sides.append([self.side if value is None else value for value in values])
        return [self.check(rows, columns) for rows, columns in zip(*sides, strict=True)]

    def features(self, sizes: Sequence[Size] | None) -> Tensor | None:
        """Return what a prior with `shape_conditioning` is told of sizes, (B, 2); `None` for the square."""
        return None if sizes is None else features_of_sizes(torch.tensor(sizes), self.side)


def in_groups(tensors: Sequence[Tensor], run: Callable[[Tensor, list[int]], Sequence]) -> list:
    """Process tensors of several shapes, those of one shape together.

    Args:
        tensors: one per image.
        run: gets stacked tensors and their indices, and returns one result each.

    Returns:
        The results in the order of `tensors`.
    """
    groups: dict[torch.Size, list[int]] = {}
    for index, tensor in enumerate(tensors):
        groups.setdefault(tensor.shape, []).append(index)
    results: list[Any] = [None] * len(tensors)
    for rows in groups.values():
        for row, result in zip(rows, run(torch.stack([tensors[row] for row in rows]), rows), strict=True):
            results[row] = result
    return results


def check_latents(
    latents: Any, batch_size: int, channels: int, rules: SizeRules, shapes: Sequence[Size] | None
) -> Tensor | list[Tensor]:
    """Return initial noise, (B, C, h, w); a list of (C, h, w) if the sizes differ.

    Args:
        latents: what was passed: one tensor, or a list with one per image.
        batch_size, channels: B and C.
        rules: which h and w the decoder accepts.
        shapes: h and w that each image needs; `None` for any.

    Raises:
        TypeError: if it is not a tensor of floats, or a list of them.
        ValueError: if a shape does not fit, or values are not finite.
    """
    is_list = isinstance(latents, list | tuple)
    if is_list and len(latents) != batch_size:
        raise ValueError(f"`latents` is a list of {len(latents)} tensors, but there are {batch_size} images.")
    leading = (channels,) if is_list else (batch_size, channels)
    for noise in latents if is_list else [latents]:
        if not isinstance(noise, Tensor) or not noise.is_floating_point():
            kind = noise.dtype if isinstance(noise, Tensor) else type(noise).__name__
            raise TypeError(f"`latents` must be noise, a tensor of floats, got {kind}.")
        if noise.ndim != len(leading) + 2 or noise.shape[:-2] != leading or not rules.accepts(*noise.shape[-2:]):
            raise ValueError(
                f"`latents` must be noise of the shape ({', '.join(map(str, leading))}, height, width), height and"
                f" width {rules.allowed}; got {tuple(noise.shape)}."
            )
        if not noise.isfinite().all():
            raise ValueError(
                "`latents` contains values that are not finite. Draw them again, as standard normal noise."
            )
    found = [tuple(noise.shape[-2:]) for noise in latents]
    if shapes is not None and found != list(shapes):
        raise ValueError(f"`latents` are noise of {found}, but `height` and `width` need {list(shapes)}. Pass either.")
    return torch.stack(list(latents)) if is_list and len(set(found)) == 1 else latents
