"""Data sets that are read one row after the other, and go on exactly where they stopped.

Every batch carries the place in the stream that follows it, so that a checkpoint can hold it whatever the reading
processes have prepared ahead. Rows are shuffled in blocks: to go on within one, only that block is read again.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import datasets
import torch
from datasets.distributed import split_dataset_by_node
from torch.utils.data import IterableDataset, get_worker_info

from .columns import Columns, undecoded
from .samples import ImageTransform, collate, read_sample
from .seeds import draw_seed
from .skipped_rows import MAX_UNREADABLE_ROWS, SkippedRows, UnreadableRow, no_image_error


READ_BLOCK = 64  # rows between two places that are kept, where nothing is shuffled

# Where a stream stands: "rows", the state of the data set before the block; "row", the number of the block's first
# row; "offset", the rows of the block that are done. `None` is the beginning.
Place = dict[str, Any] | None


class StreamedImageDataset(IterableDataset):
    """Images, or their token ids, with captions and classes, read in order; nothing is decoded ahead of its use.

    Args:
        dataset: the rows.
        transform: how an image becomes `pixel_values`.
        columns: what to read of a row.
        shuffle_buffer: rows that are shuffled together, in a new order of the shards; 0 keeps the order of the source.
        seed: decides the order, flips, crops and wordings.
        fail_on_unreadable: an unreadable row is an error.

    Attributes:
        skipped: reasons by place in the stream, for the rows this process found unreadable.
        class_names: as in `ImageDataset`.
    """

    def __init__(
        self,
        dataset: datasets.IterableDataset,
        transform: ImageTransform,
        columns: Columns,
        shuffle_buffer: int = 0,
        seed: int = 0,
        fail_on_unreadable: bool = False,
    ):
        super().__init__()
        if dataset.features is None:
            raise ValueError("The columns of this data set are not known in a stream. Load it without `streaming`.")
        columns.check(dataset.features)
        self.class_names = columns.class_names(dataset.features)
        if self.class_names is not None:
            columns = replace(columns, num_classes=len(self.class_names))
        self.transform = transform
        self.columns = columns
        self.shuffle_buffer = shuffle_buffer
        self.seed = seed
        self.process_index = 0
        self.skipped = SkippedRows(fail_on_unreadable)
        self.rows = undecoded(dataset, columns)
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Let the next iteration take the order and the draws of `epoch`; not called by readers, which share it."""
        self.epoch = epoch
        # `datasets` takes the number of an epoch for the seed of the order of shards, and 0 for "as they are"
        self.rows.set_epoch(draw_seed(self.seed, epoch) % 2**31 + 1 if self.shuffle_buffer else 0)

    def set_processes(self, process_index: int, num_processes: int) -> None:
        """Read only the part of process `process_index`; to be called once."""
        self.process_index = process_index
        if num_processes > 1:
            self.rows = split_dataset_by_node(self.rows, process_index, num_processes)
            self.set_epoch(self.epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (sample for sample, _ in self.read(None))

    def read(self, place: Place) -> Iterator[tuple[dict[str, Any], Place]]:
        """Yield samples from a place on, each with the place after it; skipped rows are noted in `skipped`."""
        num_failed = 0
        for row, values, place_after in self._read_rows(place):
            generator = torch.Generator().manual_seed(draw_seed(*self._reader(), row))
            try:
                sample = read_sample(values, self.columns, self.transform, generator)
            except UnreadableRow as error:
                process, worker = self._reader()[2:]
                self.skipped.add(f"{row} (epoch {self.epoch}, process {process}, reader {worker})", error)
                num_failed += 1
                if num_failed >= MAX_UNREADABLE_ROWS:
                    raise no_image_error(f"{num_failed} rows up to row {row}", self.columns) from error
            else:
                num_failed = 0
                yield sample, place_after

    def _reader(self) -> tuple[int, int, int, int]:
        """Seed, epoch, process and worker: what tells one sequence of rows from another."""
        worker = get_worker_info()
        return self.seed, self.epoch, self.process_index, 0 if worker is None else worker.id

    def _read_rows(self, place: Place) -> Iterator[tuple[int, dict[str, Any], Place]]:
        """Yield (number of the row, row, place after it)."""
        place = place or {"rows": None, "row": 0, "offset": 0}
        state, first_row, offset = place["rows"], place["row"], place["offset"]
        self.rows.load_state_dict(state)
        source = iter(self.rows)
        while block := list(islice(source, self.shuffle_buffer or READ_BLOCK)):
            order = list(range(len(block)))
            if self.shuffle_buffer:
                generator = torch.Generator().manual_seed(draw_seed(*self._reader(), first_row, len(block)))
                order = torch.randperm(len(block), generator=generator).tolist()
            for number in range(offset, len(block)):
                place_after = {"rows": state, "row": first_row, "offset": number + 1}
                yield first_row + order[number], block[order[number]], place_after
            state, first_row, offset = self.rows.state_dict(), first_row + len(block), 0


class StreamBatches(IterableDataset):
    """Batches of a stream: {..., "reader": number of the worker, "place": where it stands after the batch}.

    Args:
        dataset: the stream.
        batch_size: samples per batch.
        drop_last: leave out what does not fill a batch at the end of an epoch.
    """

    def __init__(self, dataset: StreamedImageDataset, batch_size: int, drop_last: bool):
        super().__init__()
        self.dataset = dataset
        self.batch_size = batch_size
        self.drop_last = drop_last
        self.places: dict[str, Place] = {}

    def set_position(self, epoch: int, places: dict[str, Place]) -> None:
        """Let the next iteration go on in `epoch`, each reader from its place."""
        self.dataset.set_epoch(epoch)
        self.places = places

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        reader = "0" if worker is None else str(worker.id)
        place = self.places.get(reader)
        samples: list[dict[str, Any]] = []
        num_reported = len(self.dataset.skipped)

        def news() -> dict[str, Any]:
            nonlocal num_reported
            fresh = dict(islice(self.dataset.skipped.items(), num_reported, None))
            num_reported = len(self.dataset.skipped)
            return {"reader": reader, "place": place, **({"unreadable": fresh} if fresh else {})}

        for sample, place in self.dataset.read(place):
            samples.append(sample)
            if len(samples) == self.batch_size:
                yield {**collate(samples), **news()}
                samples = []
        if samples and not self.drop_last:
            yield {**collate(samples), **news()}
        elif len(self.dataset.skipped) > num_reported:
            yield news()
