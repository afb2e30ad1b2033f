"""Map-style datasets: images or token ids, with captions and classes.

Letters: H W sides of an image.
"""

from dataclasses import replace
from typing import Any

import datasets
import pyarrow.compute
from torch.utils.data import Dataset

from .buckets import Shape, ShapeStacks
from .columns import Columns, class_range_message, undecoded
from .row_reader import read_rows, read_shapes
from .samples import ImageTransform, draw_conditions, read_sample
from .seeds import seeded_generator
from .skipped_rows import MAX_UNREADABLE_ROWS, SkippedRows, UnreadableRow, no_image_error


class ImageDataset(Dataset):
    """Map-style dataset of images, or their token ids, with captions and classes.

    Items are indexed by row, or by (row, draw), where `draw` seeds flips, crops and the caption choice; without it
    these come from the worker's global generator. An unreadable row is replaced by the next readable one, in its own
    shape, so that batches keep their size.

    Args:
        dataset: the rows.
        transform: turns an image into `pixel_values`.
        columns: what to read from a row.
        cache_in_memory: decode everything up front and keep 3 * H * W bytes per image; unreadable rows are dropped.
        num_workers: processes that decode images for the cache, or read their shapes.
        fail_on_unreadable: raise an error for an unreadable row.

    Attributes:
        skipped: {row of `dataset`: reason} for the rows that this process found unreadable.
        row_shapes: height and width of each row's image, if `transform` has several; otherwise `None`.
        class_names: class names, or class numbers as strings if there are no names; `None` without classes.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        transform: ImageTransform,
        columns: Columns,
        cache_in_memory: bool = False,
        num_workers: int = 0,
        fail_on_unreadable: bool = False,
    ):
        columns.check(dataset.features)
        self.class_names = columns.class_names(dataset.features)
        if self.class_names is not None:
            columns = replace(columns, num_classes=len(self.class_names))
            check_classes(dataset, columns)
        self.transform = transform
        self.columns = columns
        self.skipped = SkippedRows(fail_on_unreadable)
        self.pixels: ShapeStacks | None = None  # (3, H, W) uint8 once cached
        self.rows: Any = undecoded(dataset, columns)
        self.row_shapes: list[Shape] | None = None
        if cache_in_memory:
            self._fill_cache(num_workers)
        elif len(transform.shapes) > 1:
            self.row_shapes = read_shapes(self.rows, transform, columns, num_workers)

    def __len__(self) -> int:
        return len(self.rows)

    def caption_rows(self, most: int | None = None) -> list[list[str]]:
        """Return the captions of all rows, or of at most `most` rows spread over the data."""
        return caption_rows(self.rows, str(self.columns.caption), most)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        row, draw = key if isinstance(key, tuple) else (key, None)
        if not 0 <= row < len(self):
            raise IndexError(f"Row {row} is out of range for a dataset of {len(self)} rows.")
        if self.pixels is not None:  # unreadable rows were dropped already
            generator = seeded_generator(draw)
            pixel_values = self.transform.to_values(self.pixels[row], generator)
            return {"pixel_values": pixel_values, **draw_conditions(self.rows[row], self.columns, generator)}
        num_tries = min(len(self), MAX_UNREADABLE_ROWS)
        unreadable: dict[int, str] = {}
        for candidate in (index % len(self) for index in range(row, row + num_tries)):
            try:
                if candidate not in self.skipped:
                    generator = seeded_generator(draw)  # does not depend on when earlier rows failed
                    shape = None if self.row_shapes is None else self.row_shapes[row]
                    sample = read_sample(self.rows[candidate], self.columns, self.transform, generator, shape)
                    return {**sample, "unreadable": unreadable} if unreadable else sample
            except UnreadableRow as error:
                self.skipped.add(candidate, error)
                unreadable[candidate] = str(error)
        raise no_image_error(f"the {num_tries} rows from row {row} on", self.columns)

    def _fill_cache(self, num_workers: int) -> None:
        found = list(read_rows(self.rows, self.transform, self.columns, self.skipped, num_workers))
        if not found:
            raise no_image_error(f"all {len(self.rows)} rows", self.columns)
        self.rows = [values for _, values in found]  # plain dicts: reading single rows of an Arrow table is slow
        self.pixels = ShapeStacks([pixels for pixels, _ in found])
        if len(self.transform.shapes) > 1:
            self.row_shapes = self.pixels.shapes()


def check_classes(dataset: datasets.Dataset, columns: Columns) -> None:
    """Raise a ValueError if a class number is too large; rows without a class are skipped later."""
    name, num_classes = columns.class_label, columns.num_classes
    assert name is not None and num_classes is not None
    largest = pyarrow.compute.max(dataset.select_columns([name]).with_format("arrow")[:][name]).as_py()
    if largest is not None and largest >= num_classes:
        raise ValueError(class_range_message(name, largest, num_classes))


def caption_rows(rows: Any, column: str, most: int | None = None) -> list[list[str]]:
    """Return the captions of the rows of a data set, or of a list of rows; each may have one caption, several or none.

    Args:
        rows: rows with this column.
        column: of captions, each a string or a list of them.
        most: maximum number of rows, spread over the data; `None` is all.
    """
    stride = 1 if most is None else max(1, -(-len(rows) // most))
    if isinstance(rows, datasets.Dataset):
        captions = rows.select_columns([column]).select(range(0, len(rows), stride))[column]
    else:
        captions = [row[column] for row in rows[::stride]]
    return [[caption] if isinstance(caption, str) else list(caption or []) for caption in captions]
