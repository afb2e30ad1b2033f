"""Datasets that are streamed row by row and resume exactly where they stopped.

Every batch carries the position in the stream after it, so a checkpoint can store it no matter how far the workers
have prefetched. Rows are shuffled in blocks: to resume within a block, only that block is read again.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import datasets
import torch
from datasets.distributed import split_dataset_by_node
from torch.utils.data import IterableDataset, get_worker_info
from xxhash import xxh3_64

from .columns import Columns, undecoded
from .samples import ImageTransform, collate, read_sample
from .seeds import draw_seed
from .skipped_rows import MAX_UNREADABLE_ROWS, SkippedRows, UnreadableRow, no_image_error


READ_BLOCK = 64  # rows per block if nothing is shuffled

# Position in a stream: "rows", the state of the dataset before the current block; "row", the number of the block's
# first row; "offset", how many of its rows are done; "waiting", those of them that do not fill a batch of their shape
# yet, as blocks with their "rows", "row" and "offsets". `None` is the beginning.
Place = dict[str, Any] | None


class StreamedImageDataset(IterableDataset):
    """Stream of images, or their token ids, with captions and classes; nothing is decoded before it is needed.

    Args:
        dataset: the rows.
        transform: turns an image into `pixel_values`.
        columns: what to read from a row.
        shuffle_buffer: rows that are shuffled together, after shuffling the shards; 0 keeps the order of the source.
        seed: seeds the order, flips, crops and caption choices.
        fail_on_unreadable: raise an error for an unreadable row.

    Attributes:
        skipped: {path, hash and count of equal rows: reason} for the rows that this process found unreadable.
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
            raise ValueError("The columns of this dataset are unknown when streaming. Load it without `streaming`.")
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
        """Make the next iteration use the order and draws of `epoch`; not called by workers, which share it."""
        self.epoch = epoch
        # `datasets` seeds the order of the shards with the epoch number; 0 leaves them as they are
        self.rows.set_epoch(draw_seed(self.seed, epoch) % 2**31 + 1 if self.shuffle_buffer else 0)

    def set_processes(self, process_index: int, num_processes: int) -> None:
        """Read only the share of process `process_index`; call this once."""
        self.process_index = process_index
        if num_processes > 1:
            self.rows = split_dataset_by_node(self.rows, process_index, num_processes)
            self.set_epoch(self.epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (sample for sample, _ in self.read(None))

    def read(self, place: Place) -> Iterator[tuple[dict[str, Any], Place]]:
        """Yield (sample, position after it), starting at `place`; skipped rows are recorded in `skipped`.

        The rows that were waiting at `place` are not among them.
        """
        num_failed, equal = 0, Counter[str]()
        for row, values, place_after in self._read_rows(place):
            try:
                sample = self._read_sample(row, values)
            except UnreadableRow as error:
                process, worker = self._reader()[2:]
                where = f"first met at row {row} of epoch {self.epoch}, process {process}, reader {worker}"
                name = self._name(values)
                equal[name] += 1
                self.skipped.add(f"{name}, {equal[name]}", UnreadableRow(f"{error} ({where})"))
                num_failed += 1
                if num_failed >= MAX_UNREADABLE_ROWS:
                    raise no_image_error(f"{num_failed} rows up to row {row}", self.columns) from error
            else:
                num_failed = 0
                yield sample, place_after

    def read_waiting(self, place: Place) -> Iterator[tuple[dict[str, Any], Place]]:
        """Yield (sample, position after it) for the rows that were waiting at `place`."""
        for block in (place or {}).get("waiting", ()):
            left = set(block["offsets"])
            for row, values, place_after in self._read_rows({**block, "offset": 0}):
                assert place_after is not None
                if place_after["offset"] in left:
                    yield self._read_sample(row, values), place_after
                    left.remove(place_after["offset"])
                if not left:
                    break

    def _read_sample(self, row: int, values: dict[str, Any]) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(draw_seed(*self._reader(), row))
        return read_sample(values, self.columns, self.transform, generator)

    def _reader(self) -> tuple[int, int, int, int]:
        """Seed, epoch, process and worker, which identify one sequence of rows."""
        worker = get_worker_info()
        return self.seed, self.epoch, self.process_index, 0 if worker is None else worker.id

    def _name(self, values: dict[str, Any]) -> str:
        """Name a row by its content, since its number changes with the epoch."""
        content = xxh3_64(repr(sorted(values.items())).encode()).hexdigest()
        image = values.get(self.columns.image) or {}
        return f"{image.get('path') or 'without a path'} ({content})"

    def _read_rows(self, place: Place) -> Iterator[tuple[int, dict[str, Any], Place]]:
        """Yield (row number, row, position after it)."""
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
    """Batches of a stream: {..., "reader": worker number, "place": its position after the batch}.

    All images of a batch have the same shape.

    Args:
        dataset: the stream.
        batch_size: samples per batch.
        drop_last: drop samples that do not fill a batch at the end of an epoch.
    """

    def __init__(self, dataset: StreamedImageDataset, batch_size: int, drop_last: bool):
        super().__init__()
        self.dataset = dataset
        self.batch_size = batch_size
        self.drop_last = drop_last
        self.places: dict[str, Place] = {}

    def set_position(self, epoch: int, places: dict[str, Place]) -> None:
        """Make the next iteration resume in `epoch`, each reader from its place."""
        self.dataset.set_epoch(epoch)
        self.places = places

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        reader = "0" if worker is None else str(worker.id)
        place = self.places.get(reader)
        waiting: dict[Any, list[tuple[dict[str, Any], Any]]] = {}  # of each shape, with their places
        num_reported = len(self.dataset.skipped)

        def report() -> dict[str, Any]:
            nonlocal num_reported
            fresh = dict(islice(self.dataset.skipped.items(), num_reported, None))
            num_reported = len(self.dataset.skipped)
            blocks = group_by_block([one for group in waiting.values() for _, one in group])
            here = {**place, "waiting": blocks} if place and blocks else place
            return {"reader": reader, "place": here, **({"unreadable": fresh} if fresh else {})}

        def take(group: list[tuple[dict[str, Any], Any]]) -> dict[str, Any]:
            samples = [sample for sample, _ in group[: self.batch_size]]
            del group[: self.batch_size]
            return {**collate(samples), **report()}

        for sample, one in self.dataset.read_waiting(place):
            waiting.setdefault(shape_of(sample), []).append((sample, one))
        for sample, place in self.dataset.read(place):
            group = waiting.setdefault(shape_of(sample), [])
            group.append((sample, place))
            if len(group) >= self.batch_size:
                yield take(group)
        for group in waiting.values():
            while group and not self.drop_last:
                yield take(group)
        if len(self.dataset.skipped) > num_reported:
            yield report()


def shape_of(sample: dict[str, Any]) -> Any:
    """Return what the samples of a batch must share."""
    return sample["pixel_values"].shape if "pixel_values" in sample else None


def group_by_block(places: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the blocks of single rows, given by the places after them, in the order of the stream."""
    blocks: dict[int, dict[str, Any]] = {}
    for place in sorted(places, key=lambda place: (place["row"], place["offset"])):
        block = blocks.setdefault(place["row"], {"rows": place["rows"], "row": place["row"], "offsets": []})
        block["offsets"].append(place["offset"])
    return list(blocks.values())
