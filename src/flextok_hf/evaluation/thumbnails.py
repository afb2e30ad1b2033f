"""Images -> what the simplest codec keeps of them: a small thumbnail, enlarged again. A baseline of equal bits.

Letters: B batch, H W image sides.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


BITS_PER_CHANNEL = 4
BITS_PER_PIXEL = 3 * BITS_PER_CHANNEL


def thumbnail_size(bits: float) -> tuple[int, int]:
    """Return rows and columns of the smallest thumbnail with at least `bits`: n x n pixels, or n x (n + 1).

    The thumbnail is never given fewer bits than what it is compared with.

    Raises:
        ValueError: if `bits` is not a positive number.
    """
    if not 0 < bits < math.inf:
        raise ValueError(f"`bits` must be a positive number, got {bits}.")
    pixels = bits / BITS_PER_PIXEL
    rows = max(1, math.floor(math.sqrt(pixels)))
    for size in ((rows, rows), (rows, rows + 1)):
        if size[0] * size[1] >= pixels:
            return size
    return rows + 1, rows + 1


def thumbnail_bits(size: tuple[int, int]) -> int:
    """Return the bits of a thumbnail of these rows and columns."""
    return BITS_PER_PIXEL * size[0] * size[1]


def code_as_thumbnails(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Reduce images to thumbnails of 12 bits per pixel and enlarge them again.

    Args:
        images: (B, 3, H, W) in [0, 1].
        size: rows and columns of the thumbnails, at most H and W.

    Returns:
        (B, 3, H, W) in [0, 1]: reduced by averaging areas, rounded to 16 values per channel, enlarged bicubically.

    Raises:
        ValueError: if the thumbnail is larger than the images.
    """
    if size[0] > images.shape[-2] or size[1] > images.shape[-1]:
        raise ValueError(
            f"`size` must be at most that of the images, {tuple(images.shape[-2:])}, got {size}: there are more bits"
            " than a thumbnail of the whole image needs."
        )
    top = 2**BITS_PER_CHANNEL - 1
    small = (F.adaptive_avg_pool2d(images, size) * top).round() / top
    enlarged = F.interpolate(small, images.shape[-2:], mode="bicubic", align_corners=False)
    return torch.clamp(enlarged, 0, 1)
