"""Image processor of the tokenizer for Transformers: images of any kind -> `pixel_values`."""

from typing import Any

import torch
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

from ..utils.numbers import is_whole_number
from .images import prepare_images


class FlexTokImageProcessor(BaseImageProcessor):
    """Crops and resizes images to one size and maps them to [-1, 1], exactly as `FlexTokPipeline.tokenize` does.

    Args:
        size: side R of a square, the pipeline's `resolution`; or {"height": H, "width": W}.
    """

    model_input_names = ["pixel_values"]

    def __init__(self, size: int | dict[str, int] = 256, **kwargs):
        super().__init__(**kwargs)
        height, width = resolve_size(size)
        self.size = {"height": height, "width": width}

    def preprocess(  # type: ignore[override]
        self,
        images: Any,
        return_tensors: str | None = None,
        size: int | dict[str, int] | None = None,
        device: torch.device | str | None = None,
    ) -> BatchFeature:
        """Turn images into `pixel_values`, (B, 3, H, W) float32 in [-1, 1]; also by calling the processor.

        Args:
            images: an image or a list of images: path, PIL, numpy or torch, any size (see `prepare_images`).
            return_tensors: "pt" for a tensor, "np" for an array; `None` is a list of tensors.
            size: other than that of the processor.
            device: of the result, the CPU by default.

        Raises:
            TypeError, ValueError: as `prepare_images`, or if another argument is invalid.
        """
        if return_tensors not in (None, "pt", "np"):
            raise ValueError(f'`return_tensors` must be "pt", "np" or `None`, got {return_tensors!r}.')
        pixel_values = prepare_images(images, resolve_size(self.size if size is None else size), device)
        data = {"pixel_values": list(pixel_values) if return_tensors is None else pixel_values}
        return BatchFeature(data, tensor_type=return_tensors)


def resolve_size(size: Any) -> tuple[int, int]:
    """Return height and width of a size, a number or {"height": H, "width": W}."""
    is_pair = isinstance(size, dict) and size.keys() == {"height", "width"}
    sides = (size["height"], size["width"]) if is_pair else (size, size)
    if not all(is_whole_number(side) and side >= 1 for side in sides):
        raise ValueError(f'`size` must be a whole number R of 1 or more or {{"height": H, "width": W}}, got {size!r}.')
    return int(sides[0]), int(sides[1])
