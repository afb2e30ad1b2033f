"""Decoding a whole dataset once, in order, to keep its pixels or latents in memory.

Letters: R resolution.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from .columns import Columns
from .samples import ImageTransform, draw_conditions, read_image
from .skipped_rows import SkippedRows, UnreadableRow


READ_BATCH = 64  # rows that a worker sends in one go


class RowReader(Dataset):
    """Row number -> (pixels (3, R, R) uint8, the row without its image), or (None, the error)."""

    def __init__(self, rows: Any, transform: ImageTransform, columns: Columns):
        self.rows, self.transform, self.columns = rows, transform, columns

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> tuple[Any, Any]:
        values = dict(self.rows[row])
        try:
            pixels = self.transform.to_pixels(read_image(values.pop(self.columns.image)))
            draw_conditions(values, self.columns, torch.Generator())  # raises if the caption is missing
        except UnreadableRow as error:
            return None, error
        return pixels.numpy(), values  # NumPy: sending tensors between processes takes an open file each


def read_rows(
    rows: Any, transform: ImageTransform, columns: Columns, skipped: SkippedRows, num_workers: int
) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """Decode all rows in order and yield pixels (3, R, R) uint8 and the row without its image.

    Unreadable rows are added to `skipped` and omitted.
    """
    if transform.random_crop:
        raise ValueError("A cache keeps one crop of each image: turn off `random_crop` or the cache.")
    reader = RowReader(rows, transform, columns)
    loader = DataLoader(reader, batch_size=READ_BATCH, num_workers=num_workers, collate_fn=list)
    with tqdm(total=len(reader), desc="Reading images", unit="image", mininterval=2) as bar:
        for start, items in zip(range(0, len(reader), READ_BATCH), loader, strict=True):
            for row, (pixels, values) in enumerate(items, start):
                if pixels is None:
                    skipped.add(row, values)
                else:
                    yield torch.from_numpy(pixels), values
            bar.update(len(items))
