"""Dataset rows -> images to measure: all cropped the same way, 8 bits, unreadable ones recorded with the reason.

Letters: B batch, R side of the square images.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..data.samples import read_image
from ..data.skipped_rows import UnreadableRow
from ..data.sources import load_rows
from ..pipelines.images import image_to_pixels, resize_and_crop


CROP = "center square, then Lanczos (Pillow, antialiased)"  # what `resize_and_crop` does, for the protocol


def load_split(source: str | Sequence[str], split: str, image_column: str = "image") -> datasets.Dataset:
    """Load one split without decoding its images.

    Args:
        source: "synthetic", a folder, parquet files or a Hub id, as in `load_rows`.
        split: name of the split.
        image_column: column of the images.

    Raises:
        FileNotFoundError: if the source does not exist.
        ValueError: if it has no such split or column, or no rows.
    """
    try:
        rows = load_rows(source, split)
    except ValueError as error:
        raise ValueError(f"Split {split!r} of `data` {source!r} cannot be loaded: {error}") from error
    if image_column not in rows.column_names:
        raise ValueError(f"`image_column` is {image_column!r}, but {source!r} has {', '.join(rows.column_names)}.")
    if len(rows) == 0:
        raise ValueError(f"The split {split!r} of {source!r} is empty.")
    return rows.cast_column(image_column, datasets.Image(decode=False))


def draw_rows(items: Sequence, count: int | None, seed: int) -> list:
    """Return `count` items drawn at random, in their original order; all of them if `count` is `None` or too large."""
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed)).tolist()
    return [items[index] for index in sorted(order[:count])]


class EvaluationImages:
    """Images by row, each cropped and resized to R x R pixels of 8 bits.

    Args:
        rows: a dataset from `load_split`, or a list of dictionaries with undecoded images.
        resolution: R.
        image_column: column of the images.

    Attributes:
        skipped: reason by row, for rows that could not be read.
    """

    def __init__(self, rows: Any, resolution: int, image_column: str = "image"):
        self.rows = rows
        self.resolution = resolution
        self.image_column = image_column
        self.skipped: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, indices: Sequence[int]) -> tuple[list[int], Tensor]:
        """Read the images of the rows `indices`.

        Returns:
            The rows that could be read, and their images (B, 3, R, R) uint8.
        """
        found, images = [], []
        for index in indices:
            try:
                image = read_image(self.rows[index][self.image_column])
            except UnreadableRow as error:
                self.skipped[index] = str(error)
                continue
            images.append(image_to_pixels(resize_and_crop(image, self.resolution)))
            found.append(index)
        empty = torch.empty(0, 3, self.resolution, self.resolution, dtype=torch.uint8)
        return found, torch.stack(images) if images else empty

    def read_all(self) -> Tensor:
        """Read all images, (N, 3, R, R) uint8, for a reference set that is searched as a whole.

        Raises:
            ValueError: if one cannot be read; a reference set must be complete.
        """
        _, pixels = self.read(range(len(self)))
        if self.skipped:
            row, reason = next(iter(self.skipped.items()))
            raise ValueError(
                f"{len(self.skipped)} images of the reference set cannot be read, the first in row {row}: {reason}"
                " Fix or remove them."
            )
        return pixels


def to_unit_range(pixels: Tensor) -> Tensor:
    """Convert uint8 to float32 in [0, 1], the range that all measures expect."""
    return pixels.float() / 255


def round_to_8_bits(images: Tensor) -> Tensor:
    """Round images in [0, 1] to uint8 on the CPU, as a file stores them, so that figures describe what a user sees."""
    return (images.float() * 255).round().clamp(0, 255).to("cpu", torch.uint8)


def to_pil(pixels: Tensor) -> Image.Image:
    """Return an image (3, H, W) uint8 as a PIL image."""
    return Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()))


def image_checksums(pixels: Tensor) -> Tensor:
    """Return 63 bits of the SHA-256 of each image (B, 3, H, W) uint8, as int64 (B,).

    Their sum identifies a set of images regardless of order; another crop or resize filter changes it.
    """
    digests = [hashlib.sha256(image.contiguous().numpy().tobytes()).digest() for image in pixels]
    return torch.tensor([int.from_bytes(digest[:8], "big") >> 1 for digest in digests], dtype=torch.int64)
