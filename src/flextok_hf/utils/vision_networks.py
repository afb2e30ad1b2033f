"""The inputs that frozen vision networks of Transformers expect."""

import torch
from torch import Tensor
from transformers.image_processing_base import ImageProcessingMixin


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def read_preprocessing(name: str) -> tuple[int, Tensor, Tensor]:
    """Read the preprocessing of a network, a folder or Hub id; ImageNet's at 224 pixels where nothing is stored.

    Returns:
        Side of the square input in pixels, mean and standard deviation of each channel in [0, 1], (3, 1, 1).
    """
    try:
        values, _ = ImageProcessingMixin.get_image_processor_dict(name)
    except OSError:
        values = {}
    size = values.get("crop_size") or values.get("size") or 224
    if isinstance(size, dict):
        size = size.get("height") or size.get("shortest_edge") or 224
    mean, std = values.get("image_mean", IMAGENET_MEAN), values.get("image_std", IMAGENET_STD)
    return int(size), torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1)
