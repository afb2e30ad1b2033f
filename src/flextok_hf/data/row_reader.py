"""Reading a whole dataset once, in order: decoded, to keep its pixels or latents in memory, or only the shapes.

Letters: H W sides of an image.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from ..pipelines.images import image_size
from .buckets import Shape, nearest_shape
from .columns import Columns
from .samples import ImageTransform, draw_conditions, read_image
from .skipped_rows import SkippedRows, UnreadableRow


READ_BATCH = 64  # rows that a worker sends in one go


class RowReader(Dataset):
    """Row number -> (pixels (3, H, W) uint8, the row without its image), or (None, the error)."""

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
    """Decode all rows in order and yield pixels (3, H, W) uint8 and the row without its image.

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


class ShapeReader(Dataset):
    """Row number -> the shape that its image gets; an image that cannot be read counts as a square."""

    def __init__(self, rows: Any, transform: ImageTransform, column: str):
        self.rows, self.transform, self.column = rows.select_columns([column]), transform, column

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Shape:
        try:
            size = read_image(self.rows[row][self.column], image_size)
        except UnreadableRow:  # it will fail again, and be reported, in training
            size = (1, 1)
        return nearest_shape(size, self.transform.shapes)


def read_shapes(rows: Any, transform: ImageTransform, columns: Columns, num_workers: int) -> list[Shape]:
    """Return the shape of every row, from the headers of its images."""
    reader = ShapeReader(rows, transform, columns.image)
    loader = DataLoader(reader, batch_size=READ_BATCH, num_workers=num_workers, collate_fn=list)
    return [shape for shapes in tqdm(loader, desc="Reading shapes", mininterval=2) for shape in shapes]
