"""Rows of a data set -> pictures to measure: cut in one way, rounded to 8 bits, the unreadable ones counted by name.

Letters: B batch, R side of the square pictures.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..data.samples import UnreadableRow, read_picture
from ..data.sources import load_rows
from ..data.synthetic import SyntheticShapes
from ..data.training_dataset import SYNTHETIC, SYNTHETIC_ROWS
from ..pipelines.images import image_to_pixels, resize_and_crop


CROP = "center square, then Lanczos (Pillow, antialiased)"  # what `resize_and_crop` does, for the protocol


def load_split(source: str | Sequence[str], split: str, image_column: str = "image") -> datasets.Dataset:
    """Load one split with its pictures undecoded.

    Args:
        source: "synthetic", a folder, parquet files or a Hub name, as in `load_training_dataset`.
        split: its name.
        image_column: holds the pictures.

    Raises:
        FileNotFoundError: if there is no such source.
        ValueError: if it has no such split, no such column, or no row.
    """
    if isinstance(source, (list, tuple)) and len(source) == 1:
        source = source[0]
    if source == SYNTHETIC:
        rows = SyntheticShapes(SYNTHETIC_ROWS.get(split, 0), split=split)
    else:
        try:
            rows = load_rows(source, split, False, None)
        except ValueError as error:
            raise ValueError(f"`data` {source!r} cannot be read as split {split!r}: {error}") from error
    if image_column not in rows.column_names:
        raise ValueError(f"`image_column` is {image_column!r}, but {source!r} has {', '.join(rows.column_names)}.")
    if len(rows) == 0:
        raise ValueError(f"The split {split!r} of {source!r} is empty.")
    return rows.cast_column(image_column, datasets.Image(decode=False))


def draw_rows(items: Sequence, count: int | None, seed: int) -> list:
    """Return `count` items drawn at random, in their order; all of them if `count` is `None` or not less."""
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed)).tolist()
    return [items[index] for index in sorted(order[:count])]


class EvaluationPictures:
    """Pictures found by their row, each cut to R x R pixels of 8 bits.

    Args:
        rows: a data set from `load_split`, or a list of dictionaries with undecoded pictures.
        resolution: R.
        image_column: holds the pictures.

    Attributes:
        skipped: reasons by row, for the rows that could not be read.
    """

    def __init__(self, rows: Any, resolution: int, image_column: str = "image"):
        self.rows = rows
        self.resolution = resolution
        self.image_column = image_column
        self.skipped: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, indices: Sequence[int]) -> tuple[list[int], Tensor]:
        """Read pictures.

        Returns:
            The rows that could be read, and their pictures (B, 3, R, R) uint8.
        """
        found, pictures = [], []
        for index in indices:
            try:
                image = read_picture(self.rows[index][self.image_column])
            except UnreadableRow as error:
                self.skipped[index] = str(error)
                continue
            pictures.append(image_to_pixels(resize_and_crop(image, self.resolution)))
            found.append(index)
        empty = torch.empty(0, 3, self.resolution, self.resolution, dtype=torch.uint8)
        return found, torch.stack(pictures) if pictures else empty

    def read_all(self) -> Tensor:
        """Read every picture, (N, 3, R, R) uint8, for a reference set that is searched as a whole.

        Raises:
            ValueError: if one cannot be read; a reference set has to be complete.
        """
        _, pixels = self.read(range(len(self)))
        if self.skipped:
            row, reason = next(iter(self.skipped.items()))
            raise ValueError(
                f"{len(self.skipped)} pictures of the reference set cannot be read, the first in row {row}: {reason}"
                " Repair or remove them."
            )
        return pixels


def to_unit_range(pixels: Tensor) -> Tensor:
    """Turn uint8 into float32 in [0, 1], the form that all measures take."""
    return pixels.float() / 255


def round_to_8_bits(pictures: Tensor) -> Tensor:
    """Round pictures in [0, 1] to uint8 on the CPU, as a file would hold them; figures are of what a user can see."""
    return (pictures.float() * 255).round().clamp(0, 255).to("cpu", torch.uint8)


def to_pil(pixels: Tensor) -> Image.Image:
    """Return a picture (3, H, W) uint8 as PIL."""
    return Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()))


def picture_checksums(pixels: Tensor) -> Tensor:
    """Return 63 bits of the SHA-256 of each picture (B, 3, H, W) uint8, as int64 (B,).

    Their sum names a set of pictures whatever its order: another crop or another resize filter gives another sum.
    """
    digests = [hashlib.sha256(picture.contiguous().numpy().tobytes()).digest() for picture in pixels]
    return torch.tensor([int.from_bytes(digest[:8], "big") >> 1 for digest in digests], dtype=torch.int64)
