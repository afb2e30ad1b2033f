"""Input preprocessing of frozen vision networks from Transformers."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.image_processing_base import ImageProcessingMixin


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class ImagePreprocessing:
    """The inputs that a network expects.

    Attributes:
        size: side of the square input in pixels.
        mean: mean of each channel for pixels in [0, 1], (3, 1, 1).
        std: standard deviation of each channel, (3, 1, 1).
    """

    size: int
    mean: Tensor
    std: Tensor


def read_preprocessing(name: str) -> ImagePreprocessing:
    """Read the preprocessing of a network, a folder or Hub id; ImageNet's at 224 pixels if none is stored."""
    try:
        values, _ = ImageProcessingMixin.get_image_processor_dict(name)
    except OSError:
        values = {}
    size = values.get("crop_size") or values.get("size") or 224
    if isinstance(size, dict):
        size = size.get("height") or size.get("shortest_edge") or 224
    mean, std = values.get("image_mean", IMAGENET_MEAN), values.get("image_std", IMAGENET_STD)
    return ImagePreprocessing(int(size), torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1))
