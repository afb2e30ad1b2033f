"""Hugging Face data sets -> training batches: `pixel_values`, and `captions` or `class_labels` where there are any.

    dataset = load_training_dataset("folder", transform=ImageTransform(64), caption_column="text")
    for batch in training_batches(build_dataloader(dataset, batch_size=32)): ...

Rows whose picture cannot be read are counted, named in a warning and never used.

Letters: R resolution (side of the square pictures).
"""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from datasets.distributed import split_dataset_by_node
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from flextok_hf.synthetic import SyntheticShapes
from flextok_hf.training.batches import EpochBatchSampler, build_dataloader, draw_seed, training_batches
from flextok_hf.training.caching import read_rows
from flextok_hf.training.rows import Columns, ImageTransform, UnreadableRow, collate, draw_conditions, read_picture


__all__ = [
    "Columns",
    "EpochBatchSampler",
    "ImageDataset",
    "ImageTransform",
    "StreamedImageDataset",
    "build_dataloader",
    "collate",
    "load_training_dataset",
    "training_batches",
]

logger = logging.getLogger(__name__)

SYNTHETIC = "synthetic"
SYNTHETIC_ROWS = {"train": 10_000, "validation": 500}
MAX_UNREADABLE_ROWS = 100  # one after the other; more than that is not a damaged file but a wrong data set


class ImageDataset(Dataset):
    """Pictures with captions and classes, found by their row.

    An item is asked for by row, or by (row, draw) with a `draw` number that decides flips, crops and wordings; without
    it they come from the global generator of the worker. A row that cannot be read is replaced by the next one that
    can, so that batches keep their size.

    Args:
        cache_in_memory: decode everything now and keep 3 * R * R bytes per picture; unreadable rows are left out.
        num_workers: processes that decode for the cache.

    Attributes:
        skipped: reasons by row of `dataset`, for the rows this process found unreadable.
        class_names: names of the classes if the column has them, else None.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        transform: ImageTransform,
        columns: Columns,
        cache_in_memory: bool = False,
        num_workers: int = 0,
    ):
        columns.check(dataset.features)
        self.transform = transform
        self.columns = columns
        self.class_names = getattr(dataset.features.get(columns.class_label), "names", None)
        self.skipped: dict[int, str] = {}
        self.pixels: Tensor | None = None  # (rows, 3, R, R) uint8 once cached
        self.rows: Any = _undecoded(dataset, columns)
        if cache_in_memory:
            self._fill_cache(num_workers)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def num_skipped(self) -> int:
        """Rows found unreadable so far; with workers, each counts those that it met."""
        return len(self.skipped)

    def all_captions(self) -> list[str]:
        """Every wording of every row."""
        name = self.columns.caption
        captions = self.rows[name] if self.pixels is None else [row[name] for row in self.rows]
        return [text for caption in captions for text in ([caption] if isinstance(caption, str) else caption or [])]

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        row, draw = key if isinstance(key, tuple) else (key, None)
        if not 0 <= row < len(self):
            raise IndexError(f"Row {row} does not exist in a data set of {len(self)} rows.")
        generator = None if draw is None else torch.Generator().manual_seed(draw)
        if self.pixels is not None:  # unreadable rows are gone already
            pixel_values = self.transform.to_values(self.pixels[row], generator)
            return {"pixel_values": pixel_values, **draw_conditions(self.rows[row], self.columns, generator)}
        num_tries = min(len(self), MAX_UNREADABLE_ROWS)
        for candidate in (index % len(self) for index in range(row, row + num_tries)):
            try:
                if candidate not in self.skipped:
                    return self._read(candidate, generator)
            except UnreadableRow as error:
                self.skip(candidate, error)
        raise self.no_picture_error(f"{num_tries} rows from row {row} on")

    def _read(self, row: int, generator: torch.Generator | None) -> dict[str, Any]:
        values = self.rows[row]
        pixel_values = self.transform(read_picture(values[self.columns.image]), generator)
        return {"pixel_values": pixel_values, **draw_conditions(values, self.columns, generator)}

    def skip(self, row: int, reason: Exception) -> None:
        """Count a row that cannot be used and warn of it, once."""
        _skip(self.skipped, row, reason)

    def no_picture_error(self, where: str) -> ValueError:
        """Say that nothing usable was found in `where`."""
        return _no_picture_error(where, self.columns)

    def _fill_cache(self, num_workers: int) -> None:
        found = [(values, pixels) for _, pixels, values in read_rows(self, num_workers)]
        if not found:
            raise self.no_picture_error(f"all {len(self.rows)} rows")
        self.rows = [values for values, _ in found]  # plain dictionaries: reading one row of an Arrow table is slow
        self.pixels = torch.stack([pixels for _, pixels in found]).share_memory_()  # one copy for all workers


class StreamedImageDataset(IterableDataset):
    """Pictures with captions and classes, read one after the other; nothing is downloaded or decoded ahead of its use.

    Args:
        shuffle_buffer: rows to draw from at random, 0 to keep the order of the source.
        seed: decides the order of shards, the draws from the buffer, flips, crops and wordings.

    Attributes:
        skipped: as in `ImageDataset`, by the place in the stream of this process and epoch.
    """

    def __init__(
        self,
        dataset: datasets.IterableDataset,
        transform: ImageTransform,
        columns: Columns,
        shuffle_buffer: int = 0,
        seed: int = 0,
    ):
        super().__init__()
        if dataset.features is None:
            raise ValueError("The columns of this data set are not known in a stream. Load it without `streaming`.")
        columns.check(dataset.features)
        self.transform = transform
        self.columns = columns
        self.class_names = getattr(dataset.features.get(columns.class_label), "names", None)
        self.seed = seed
        self.epoch = 0
        self.process_index = 0
        self.num_processes = 1
        self.skipped: dict[int, str] = {}
        self.rows = _undecoded(dataset, columns)
        if shuffle_buffer > 0:
            self.rows = self.rows.shuffle(seed=seed, buffer_size=shuffle_buffer)

    @property
    def num_skipped(self) -> int:
        """Rows found unreadable so far; with workers, each counts those that it met."""
        return len(self.skipped)

    def set_epoch(self, epoch: int) -> None:
        """Let the next iteration take the order and the draws of `epoch`."""
        self.epoch = epoch

    def set_processes(self, process_index: int, num_processes: int) -> None:
        """Read only the part of process `process_index`."""
        self.process_index, self.num_processes = process_index, num_processes

    def __iter__(self) -> Iterator[dict[str, Any]]:
        rows = self.rows
        if self.num_processes > 1:
            rows = split_dataset_by_node(rows, self.process_index, self.num_processes)
        rows.set_epoch(self.epoch)
        worker = get_worker_info()
        place = (self.seed, self.epoch, self.process_index, 0 if worker is None else worker.id)
        num_failed = 0
        for index, values in enumerate(rows):
            generator = torch.Generator().manual_seed(draw_seed(*place, index))
            try:
                pixel_values = self.transform(read_picture(values[self.columns.image]), generator)
                sample = {"pixel_values": pixel_values, **draw_conditions(values, self.columns, generator)}
            except UnreadableRow as error:
                _skip(self.skipped, index, error)
                num_failed += 1
                if num_failed >= MAX_UNREADABLE_ROWS:
                    raise _no_picture_error(f"{num_failed} rows up to row {index}", self.columns) from error
            else:
                num_failed = 0
                yield sample


def load_training_dataset(
    source: str | Path | Sequence[str | Path],
    split: str = "train",
    *,
    transform: ImageTransform,
    image_column: str = "image",
    caption_column: str | None = None,
    class_column: str | None = None,
    streaming: bool = False,
    shuffle_buffer: int = 1000,
    cache_in_memory: bool = False,
    num_workers: int = 0,
    max_samples: int | None = None,
    seed: int = 0,
    config_name: str | None = None,
    revision: str | None = None,
) -> ImageDataset | StreamedImageDataset:
    """Load one split of a data set for training; serve it with `build_dataloader`.

    Args:
        source: "synthetic" for the project's own shapes (captions in "text"); else a folder of pictures (with or
            without a metadata file, class folders become "label"), a folder of parquet files, one or more parquet
            files, a folder of `save_to_disk`, or a name on the Hub.
        split: its name, "train" or "validation" in most data sets. Files given by name are all of this split.
        transform: how a picture becomes `pixel_values`.
        image_column: holds the pictures.
        caption_column: holds a caption, or a list of wordings of which each draw takes one.
        class_column: holds whole numbers.
        streaming: read while training, without a local copy.
        shuffle_buffer: rows to draw from in a streamed training; ignored otherwise. 0 keeps the order.
        cache_in_memory: decode all pictures once, for small data sets that are not streamed.
        num_workers: processes that decode for the cache.
        max_samples: use only the first rows.
        seed: decides the synthetic pictures and the order and draws of a streamed data set.
        config_name: of a data set on the Hub that has several.
        revision: of a data set on the Hub.
    """
    if streaming and cache_in_memory:
        raise ValueError("`cache_in_memory` needs all rows at the start: turn off either it or `streaming`.")
    if max_samples is not None and max_samples < 1:
        raise ValueError(f"`max_samples` must be 1 or more, or None for all rows, got {max_samples}.")
    columns = Columns(image_column, caption_column, class_column)
    if isinstance(source, (list, tuple)) and len(source) == 1:
        source = source[0]  # a list of one is that one: a name or folder need not be a file
    if source == SYNTHETIC:
        if split not in SYNTHETIC_ROWS:
            raise ValueError(f"`split` of the synthetic data set must be train or validation, got '{split}'.")
        num_examples = max_samples or SYNTHETIC_ROWS[split]
        rows = SyntheticShapes(num_examples, seed, transform.resolution, split=split, streaming=streaming)
    else:
        rows = load_rows(source, split, streaming, config_name, revision)
        if max_samples is not None:
            rows = rows.take(max_samples)
    if streaming:
        return StreamedImageDataset(rows, transform, columns, shuffle_buffer, seed)
    return ImageDataset(rows, transform, columns, cache_in_memory, num_workers)


def load_rows(
    source: str | Path | Sequence[str | Path],
    split: str,
    streaming: bool,
    config_name: str | None,
    revision: str | None,
) -> datasets.Dataset | datasets.IterableDataset:
    """Find out what `source` is and load it with the matching call of `datasets`."""
    paths = [Path(source)] if isinstance(source, (str, Path)) else [Path(path) for path in source]
    if all(path.is_file() for path in paths) and paths:
        if any(path.suffix != ".parquet" for path in paths):
            raise ValueError(f"`source` names files that are not all parquet: {[str(path) for path in paths]}.")
        files = {split: [str(path) for path in paths]}
        return datasets.load_dataset("parquet", data_files=files, split=split, streaming=streaming)
    if len(paths) != 1:
        missing = [str(path) for path in paths if not path.is_file()]
        raise FileNotFoundError(f"`source` must be parquet files that exist, a folder or a name; missing: {missing}.")
    path = paths[0]
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        saved = datasets.load_from_disk(str(path))
        if isinstance(saved, datasets.DatasetDict):
            if split not in saved:
                raise ValueError(f"`split` '{split}' is not in {path}, which has {', '.join(saved)}.")
            saved = saved[split]
        return saved.to_iterable_dataset() if streaming else saved
    if path.is_dir():
        return datasets.load_dataset(str(path), split=split, streaming=streaming)
    if isinstance(source, Path) or str(source).startswith((".", "/", "~")) or path.suffix == ".parquet":
        raise FileNotFoundError(f"`source` '{source}' does not exist. Give a folder, a parquet file or a Hub name.")
    return datasets.load_dataset(str(source), config_name, split=split, streaming=streaming, revision=revision)


def _undecoded(dataset: Any, columns: Columns) -> Any:
    """Keep the columns in use and leave the pictures as bytes: decoding happens row by row, where it may fail."""
    names = [name for name in (columns.image, columns.caption, columns.class_label) if name is not None]
    return dataset.select_columns(names).cast_column(columns.image, datasets.Image(decode=False))


def _skip(skipped: dict[int, str], row: int, reason: Exception) -> None:
    """Count a row that cannot be used and warn of it, once."""
    if row not in skipped:
        skipped[row] = str(reason)
        logger.warning("Row %d is skipped: %s Rows skipped so far: %d.", row, reason, len(skipped))


def _no_picture_error(where: str, columns: Columns) -> ValueError:
    return ValueError(
        f"No usable picture in {where}; the warnings above say why. Check `image_column` ('{columns.image}') and"
        f" `caption_column` ('{columns.caption}')."
    )
