"""Data sets whose rows are found by their number: pictures or token ids, with captions and classes.

Letters: R resolution (side of the square pictures).
"""

import logging
from dataclasses import replace
from typing import Any

import datasets
import pyarrow.compute
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .latent_cache import read_rows
from .samples import (
    Columns,
    ImageTransform,
    UnreadableRow,
    class_range_message,
    draw_conditions,
    no_picture_error,
    read_sample,
    seeded_generator,
)


logger = logging.getLogger(__name__)

MAX_UNREADABLE_ROWS = 100  # one after the other; more than that is not a damaged file but a wrong data set
MAX_WARNINGS = 20  # of unreadable rows, from each reading process; the report has them all


class SkippedRows(dict):
    """Reasons by row, for the rows that could not be used. The first ones are warned of.

    Args:
        fail: raise an error at the first one instead.
    """

    def __init__(self, fail: bool):
        super().__init__()
        self.fail = fail

    def add(self, row: int | str, reason: Exception) -> None:
        """Note a row, once.

        Raises:
            ValueError: if unreadable rows are to stop the training.
        """
        if row in self:
            return
        if self.fail:
            raise ValueError(f"Row {row} cannot be used: {reason}, and `fail_on_unreadable` is set.") from reason
        self[row] = str(reason)
        if len(self) <= MAX_WARNINGS:
            last = " Further ones are not named here." if len(self) == MAX_WARNINGS else ""
            logger.warning("Row %s is skipped: %s Rows skipped so far: %d.%s", row, reason, len(self), last)


class ImageDataset(Dataset):
    """Pictures, or their token ids, with captions and classes, found by their row.

    An item is asked for by row, or by (row, draw) with a `draw` number that decides flips, crops and wordings; without
    it they come from the global generator of the worker. A row that cannot be read is replaced by the next one that
    can, so that batches keep their size.

    Args:
        dataset: the rows.
        transform: how a picture becomes `pixel_values`.
        columns: what to read of a row.
        cache_in_memory: decode everything now and keep 3 * R * R bytes per picture; unreadable rows are left out.
        num_workers: processes that decode for the cache.
        fail_on_unreadable: an unreadable row is an error.

    Attributes:
        skipped: reasons by row of `dataset`, for the rows this process found unreadable.
        class_names: names of the classes, or their numbers if they have no names; `None` without classes.
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
        self.pixels: Tensor | None = None  # (rows, 3, R, R) uint8 once cached
        self.rows: Any = undecoded(dataset, columns)
        if cache_in_memory:
            self._fill_cache(num_workers)

    def __len__(self) -> int:
        return len(self.rows)

    def all_captions(self) -> list[str]:
        """Every wording of every row."""
        name = self.columns.caption
        captions = self.rows[name] if self.pixels is None else [row[name] for row in self.rows]
        return [text for caption in captions for text in ([caption] if isinstance(caption, str) else caption or [])]

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        row, draw = key if isinstance(key, tuple) else (key, None)
        if not 0 <= row < len(self):
            raise IndexError(f"Row {row} does not exist in a data set of {len(self)} rows.")
        if self.pixels is not None:  # unreadable rows are gone already
            generator = seeded_generator(draw)
            pixel_values = self.transform.to_values(self.pixels[row], generator)
            return {"pixel_values": pixel_values, **draw_conditions(self.rows[row], self.columns, generator)}
        num_tries = min(len(self), MAX_UNREADABLE_ROWS)
        unreadable: dict[int, str] = {}
        for candidate in (index % len(self) for index in range(row, row + num_tries)):
            try:
                if candidate not in self.skipped:
                    generator = seeded_generator(draw)  # the same whether a row before failed now or is known to
                    sample = read_sample(self.rows[candidate], self.columns, self.transform, generator)
                    return {**sample, "unreadable": unreadable} if unreadable else sample
            except UnreadableRow as error:
                self.skipped.add(candidate, error)
                unreadable[candidate] = str(error)
        raise no_picture_error(f"{num_tries} rows from row {row} on", self.columns)

    def _fill_cache(self, num_workers: int) -> None:
        found = [(values, pixels) for _, pixels, values in read_rows(self, num_workers)]
        if not found:
            raise no_picture_error(f"all {len(self.rows)} rows", self.columns)
        self.rows = [values for values, _ in found]  # plain dictionaries: reading one row of an Arrow table is slow
        self.pixels = torch.stack([pixels for _, pixels in found]).share_memory_()  # one copy for all workers


def check_classes(dataset: datasets.Dataset, columns: Columns) -> None:
    """Raise a ValueError if a class number is too large; missing ones are left to be skipped."""
    name, num_classes = columns.class_label, columns.num_classes
    assert name is not None and num_classes is not None
    largest = pyarrow.compute.max(dataset.select_columns([name]).with_format("arrow")[:][name]).as_py()
    if largest is not None and largest >= num_classes:
        raise ValueError(class_range_message(name, largest, num_classes))


def undecoded(dataset: Any, columns: Columns) -> Any:
    """Keep the columns in use and leave the pictures as bytes: decoding happens row by row, where it may fail."""
    dataset = dataset.select_columns(columns.names())
    return dataset if columns.token_ids else dataset.cast_column(columns.image, datasets.Image(decode=False))
