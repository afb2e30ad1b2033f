"""Metrics that do not need the `eval` extra. Letters: B batch, H W image height and width."""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn


MAX_PSNR_DB = 100.0  # for identical images, whose error is zero


def stack_images(images: Sequence[Image.Image]) -> Tensor:
    """Return PIL images of the same size as (B, 3, H, W) in [0, 1].

    Raises:
        ValueError: if there are no images, or their sizes differ.
    """
    sizes = {image.size for image in images}
    if len(sizes) != 1:
        raise ValueError(f"`images` must have the same size, got {sorted(sizes) or 'no image'}; resize them first.")
    arrays = [np.asarray(image.convert("RGB"), dtype=np.float32) / 255 for image in images]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


def peak_signal_to_noise(images: Tensor, originals: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio of each image in dB for a peak of 1, (B,); 100 for identical images."""
    errors = (images - originals).square().flatten(1).mean(dim=1)
    return (-10 * errors.log10()).clamp(max=MAX_PSNR_DB)


def weights_hash(modules: dict[str, nn.Module]) -> str:
    """Return a SHA-256 hash of the names, dtypes, shapes and bytes of all parameters and buffers."""
    digest = hashlib.sha256()
    for component in sorted(modules):
        for name, tensor in sorted(modules[component].state_dict().items()):
            digest.update(f"{component}.{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
