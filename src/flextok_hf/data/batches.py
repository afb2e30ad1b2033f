"""Batch order for training: which rows form batch n, for any number of workers and processes.

A batch of a map-style dataset is a pure function of (seed, epoch, batch number), so a resumed run sees exactly what
an uninterrupted one would have seen, without saved state. A stream saves the positions of its readers.
"""

import itertools
import os
import signal
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from .buckets import Shape
from .image_stream import Place, StreamBatches, StreamedImageDataset
from .samples import collate
from .seeds import draw_seed


class EpochBatchSampler(Sampler[list[tuple[int, int]]]):
    """Yields batches of (row, draw) keys; `draw` seeds the flips, crops and caption choice of that row and epoch.

    All processes iterate over the same order and take neighboring slices of it, so n processes with batches of B
    together see what one process with batches of n * B sees.

    Args:
        num_rows: rows in the dataset.
        batch_size: rows per batch and process.
        drop_last: drop the rows, of each bucket, that do not fill a batch on every process. Otherwise the last batch
            is smaller; with several processes it is padded from the start of the order, since each must get the same
            number of rows.
        buckets: the bucket of each row, if the rows of a batch, on all processes, must share it; the batches of all
            buckets are then shuffled too.
    """

    def __init__(
        self,
        num_rows: int,
        batch_size: int,
        shuffle: bool,
        seed: int,
        drop_last: bool,
        process_index: int = 0,
        num_processes: int = 1,
        buckets: Sequence[Shape] | None = None,
    ):
        self.num_rows = num_rows
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.drop_last = drop_last
        self.process_index = process_index
        self.num_processes = num_processes
        self.epoch = 0
        self.first_batch = 0
        self.counts, self.buckets = [num_rows], None
        if buckets is not None:
            counts = Counter(buckets)
            numbers = {bucket: number for number, bucket in enumerate(sorted(counts))}
            self.counts = [counts[bucket] for bucket in numbers]
            self.buckets = torch.tensor([numbers[bucket] for bucket in buckets])

    def __len__(self) -> int:
        """Return the batches per full epoch on this process, wherever the next iteration starts."""
        stride = self.batch_size * self.num_processes
        return sum(count // stride if self.drop_last else -(-count // stride) for count in self.counts)

    def set_position(self, epoch: int, first_batch: int = 0) -> None:
        """Make the next iteration run through `epoch`, starting at `first_batch`."""
        self.epoch, self.first_batch = epoch, first_batch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = self.epoch
        for rows in self._all_batches(epoch)[self.first_batch : len(self)]:
            rows = rows[self.process_index * self.batch_size : (self.process_index + 1) * self.batch_size].tolist()
            yield [(row, draw_seed(self.seed, epoch, row)) for row in rows]

    def _all_batches(self, epoch: int) -> list[Tensor]:
        """Return the rows of every batch of an epoch, on all processes."""
        generator = torch.Generator().manual_seed(draw_seed(self.seed, epoch))
        shuffled = partial(torch.randperm, generator=generator) if self.shuffle else torch.arange
        order, stride = shuffled(self.num_rows), self.batch_size * self.num_processes
        groups = [order]
        if self.buckets is not None:
            groups = [order[self.buckets[order] == number] for number in range(len(self.counts))]
        batches: list[Tensor] = []
        for group in groups:
            for rows in group.split(stride):
                if len(rows) < stride and self.num_processes > 1:
                    rows = torch.cat([rows, group[torch.arange(stride - len(rows)) % len(group)]])
                batches.append(rows)
            if self.drop_last and len(group) % stride:
                batches.pop()
        return batches if self.buckets is None else [batches[number] for number in shuffled(len(batches))]


def shield_worker(worker: int) -> None:
    """Let a worker end only when its own process says so: Ctrl-C and schedulers signal all processes at once."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # says who sent a signal; not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=obey_parent, daemon=True).start()


def obey_parent() -> None:
    """End this process once its parent sends SIGTERM."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def build_dataloader(
    dataset: Dataset,
    batch_size: int,
    *,
    shuffle: bool = True,
    seed: int = 0,
    num_workers: int = 0,
    drop_last: bool = True,
    process_index: int = 0,
    num_processes: int = 1,
    pin_memory: bool = False,
) -> DataLoader:
    """Return a dataloader over `dataset`, from `load_training_dataset`, with batches made by `collate`.

    Do not pass it to `accelerator.prepare`: `process_index` and `num_processes` already split it among the processes,
    and accelerate cannot split captions. The batches are on the CPU.

    Args:
        batch_size: images per batch and process.
        shuffle: draw a new order in each epoch. Streamed datasets use their own `shuffle_buffer` instead.
        seed: seeds the order, flips, crops and caption choices; keep it on all processes and when resuming.

    Raises:
        ValueError: if `batch_size` is below 1, or the dataset has too few rows for a single batch.
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be 1 or more, got {batch_size}.")
    if not 0 <= process_index < num_processes:
        raise ValueError(f"`process_index` must be in [0, `num_processes` = {num_processes}), got {process_index}.")
    options: dict[str, Any] = {"num_workers": num_workers, "collate_fn": collate, "pin_memory": pin_memory}
    options["worker_init_fn"] = shield_worker
    options["generator"] = torch.Generator().manual_seed(seed)  # leaves the global generator alone
    if isinstance(dataset, StreamedImageDataset):
        dataset.set_processes(process_index, num_processes)
        options["collate_fn"] = None
        return DataLoader(StreamBatches(dataset, batch_size, drop_last), batch_size=None, **options)
    buckets = getattr(dataset, "row_shapes", None)
    split = (process_index, num_processes, buckets)
    sampler = EpochBatchSampler(len(dataset), batch_size, shuffle, seed, drop_last, *split)
    if len(sampler) == 0:
        of_one_shape = "" if buckets is None else " in any bucket"
        raise ValueError(
            f"{len(dataset)} rows do not fill one batch of `batch_size` {batch_size}{of_one_shape} on {num_processes}"
            " process(es). Lower `batch_size`, or set `drop_last=False`."
        )
    return DataLoader(dataset, batch_sampler=sampler, persistent_workers=num_workers > 0, **options)


class TrainingBatches:
    """Endless batches, epoch after epoch.

    Args:
        dataloader: from `build_dataloader`.
    """

    def __init__(self, dataloader: DataLoader):
        self.dataloader = dataloader
        self._state: dict[str, Any] | None = None

    @property
    def skipped(self) -> dict[int | str, str]:
        """{row: reason} for the rows that could not be used so far."""
        return self._dataset().skipped

    def _dataset(self) -> Any:
        dataset = self.dataloader.dataset
        return dataset.dataset if isinstance(dataset, StreamBatches) else dataset

    def state(self) -> dict[str, Any] | None:
        """Return the position of a stream after the last batch, for JSON; `None` for a map-style dataset."""
        return self._state

    def start(self, first_batch: int = 0, state: dict[str, Any] | None = None) -> Iterator[dict[str, Any]]:
        """Yield batches, starting from the beginning or from a saved position.

        Args:
            first_batch: for a map-style dataset, number of batches already trained on, counted over all epochs; with
                gradient accumulation these are micro-batches.
            state: for a stream, what `state` returned after those batches.
        """
        is_stream = isinstance(self.dataloader.dataset, StreamBatches)
        batches = self._stream(state) if is_stream else self._map_style(first_batch)
        for batch in batches:
            # rows that a worker found unreadable become known to this process here
            self.skipped.update(batch.pop("unreadable", {}))
            yield batch

    def _map_style(self, first_batch: int) -> Iterator[dict[str, Any]]:
        sampler = self.dataloader.batch_sampler
        assert isinstance(sampler, EpochBatchSampler)
        first_epoch, offset = divmod(first_batch, len(sampler))
        for epoch in itertools.count(first_epoch):
            sampler.set_position(epoch, offset if epoch == first_epoch else 0)
            yield from self.dataloader

    def _stream(self, state: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
        """Read epochs; workers deliver in turn, and a state holds their places at the start of the current round."""
        state = state or {"epoch": 0, "places": {}, "num_in_round": 0}
        places: dict[str, Place] = dict(state["places"])
        num_to_skip, is_whole_epoch = state["num_in_round"], not places
        for epoch in itertools.count(state["epoch"]):
            self.dataloader.dataset.set_position(epoch, dict(places))
            round_places, num_in_round, last_reader, num_read = dict(places), 0, "", 0
            for batch in self.dataloader:
                reader, place = batch.pop("reader"), batch.pop("place")
                if not batch.keys() - {"unreadable"}:  # end of the stream: no samples, only a report
                    self.skipped.update(batch["unreadable"])
                    continue
                if last_reader and int(reader) <= int(last_reader):
                    round_places, num_in_round = dict(places), 0
                last_reader, places[reader] = reader, place
                num_in_round, num_read = num_in_round + 1, num_read + 1
                self._state = {"epoch": epoch, "places": round_places, "num_in_round": num_in_round}
                if num_to_skip > 0:
                    num_to_skip -= 1
                else:
                    yield batch
            if num_read == 0 and is_whole_epoch:
                if next(iter(self._dataset().rows), None) is None:
                    raise ValueError("The stream has no rows for this process. Check `train_data` and its split.")
                raise ValueError("The stream did not fill one batch. Lower `batch_size` or set `drop_last=False`.")
            places, is_whole_epoch = {}, True
