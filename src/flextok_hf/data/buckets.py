"""Aspect ratio buckets: a few shapes of about equal area, so that images of all proportions train in batches.

Shapes are (height, width), in pixels.
"""

from collections.abc import Sequence
from functools import partial
from math import isqrt, log

import torch
from torch import Tensor

from ..models.patches import MAX_ASPECT


Shape = tuple[int, int]

ASPECT_RATIOS = (1, 4 / 3, 3 / 2, 16 / 9, 2, 3, MAX_ASPECT)  # of the longer side to the shorter one


def bucket_shapes(area: int, unit: int, only_square: bool = False) -> tuple[Shape, ...]:
    """Return the shapes that come closest to `ASPECT_RATIOS`, wide and tall, and to an area from below.

    Args:
        area: pixels per image, at most.
        unit: sides are multiples of this.
        only_square: return only the square.

    Raises:
        ValueError: `area` is too small for any shape.
    """
    limit = area // unit**2
    if limit < 1:
        raise ValueError(f"`max_area` is {area}, but sides are multiples of {unit} pixels: set {unit**2} or more.")
    if only_square:
        return ((isqrt(limit) * unit,) * 2,)
    grids = [
        (rows, columns)
        for rows in range(1, isqrt(MAX_ASPECT * limit) + 1)
        for columns in (limit // rows, limit // rows - 1)
        if 0 < max(rows, columns) <= MAX_ASPECT * min(rows, columns)
    ]

    def miss(grid: Shape, ratio: float) -> float:
        rows, columns = grid
        return abs(log(columns / rows / ratio)) + 2 * log(limit / (rows * columns))  # area first: equal cost

    wide = [min(grids, key=partial(miss, ratio=ratio)) for ratio in ASPECT_RATIOS]
    both = wide + [(columns, rows) for rows, columns in wide]
    return tuple(sorted({(rows * unit, columns * unit) for rows, columns in both}))


def nearest_shape(size: Shape, shapes: Sequence[Shape]) -> Shape:
    """Return the shape with the proportions closest to those of an image of `size`."""
    return min(shapes, key=lambda shape: abs(log(size[1] * shape[0] / (size[0] * shape[1]))))


class ShapeStacks:
    """Tensors of a few shapes, by number; those of one shape are stacked in memory that all workers share."""

    def __init__(self, tensors: Sequence[Tensor]):
        groups: dict[torch.Size, list[Tensor]] = {}
        self.places = []
        for tensor in tensors:
            group = groups.setdefault(tensor.shape, [])
            self.places.append((tensor.shape, len(group)))
            group.append(tensor)
        self.stacks = {shape: torch.stack(group).share_memory_() for shape, group in groups.items()}

    def __len__(self) -> int:
        return len(self.places)

    def shapes(self) -> list[Shape]:
        """Return the last two dimensions of each tensor."""
        return [(shape[-2], shape[-1]) for shape, _ in self.places]

    def __getitem__(self, number: int) -> Tensor:
        shape, place = self.places[number]
        return self.stacks[shape][place]
