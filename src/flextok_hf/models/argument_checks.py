"""Checks of what callers pass to the models: types, shapes and sizes, without reading values from a device."""

from typing import Any

import torch
from torch import Tensor

from ..utils.numbers import is_whole_number


MAX_SIZE = 2**24  # of any dimension of a model
MAX_GUIDANCE_SCALE = 1e6  # beyond, float32 overflows or keeps no precision
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def check_tensor(name: str, value: Any, kind: str, *shape: int | str) -> None:
    """Check an argument.

    Args:
        name: its name.
        value: what was passed.
        kind: "floats", "integers" or "booleans".
        shape: size of each dimension; a letter is any size, but h and w are at least 1.

    Raises:
        TypeError: if it is not a tensor of this kind.
        ValueError: if its shape differs.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"`{name}` must be a tensor of {kind}, got {type(value).__name__}.")
    is_integer = value.dtype in INTEGERS
    is_kind = {"floats": value.is_floating_point(), "integers": is_integer, "booleans": value.dtype == torch.bool}
    if not is_kind[kind]:
        raise TypeError(f"`{name}` must be a tensor of {kind}, got {value.dtype}.")
    fits = value.ndim == len(shape) and all(
        have == size if isinstance(size, int) else have > 0 or size not in ("h", "w")
        for have, size in zip(value.shape, shape, strict=True)
    )
    if not fits:
        wanted = ", ".join(str(size) for size in shape) + ("," if len(shape) == 1 else "")
        raise ValueError(f"`{name}` must have the shape ({wanted}), got {tuple(value.shape)}.")


def check_sizes(**sizes: Any) -> None:
    """Raise a ValueError unless every size is a whole number from 1 to `MAX_SIZE`."""
    for name, size in sizes.items():
        if not is_whole_number(size) or not 1 <= size <= MAX_SIZE:
            raise ValueError(f"`{name}` must be a whole number from 1 to {MAX_SIZE}, got {size!r}.")
