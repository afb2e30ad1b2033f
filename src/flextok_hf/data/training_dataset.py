"""Hugging Face data sets -> training batches: `pixel_values`, and `captions` or `class_labels` where there are any.

    dataset = load_training_dataset("folder", transform=ImageTransform(64), columns=Columns(caption="text"))
    for batch in TrainingBatches(build_dataloader(dataset, batch_size=32)).start(): ...

Rows whose picture cannot be read are counted, named in a warning and never used.
"""

from collections.abc import Sequence
from pathlib import Path

from .batches import EpochBatchSampler, TrainingBatches, build_dataloader
from .image_dataset import ImageDataset
from .image_stream import StreamedImageDataset
from .samples import Columns, ImageTransform, collate
from .sources import load_rows
from .synthetic import SyntheticShapes


__all__ = [
    "Columns",
    "EpochBatchSampler",
    "ImageDataset",
    "ImageTransform",
    "StreamedImageDataset",
    "TrainingBatches",
    "build_dataloader",
    "collate",
    "load_training_dataset",
]

SYNTHETIC = "synthetic"
SYNTHETIC_ROWS = {"train": 10_000, "validation": 500}


def load_training_dataset(
    source: str | Path | Sequence[str | Path],
    split: str = "train",
    *,
    transform: ImageTransform,
    columns: Columns = Columns(),
    streaming: bool = False,
    shuffle_buffer: int = 1000,
    cache_in_memory: bool = False,
    num_workers: int = 0,
    max_samples: int | None = None,
    seed: int = 0,
    fail_on_unreadable: bool = False,
    config_name: str | None = None,
) -> ImageDataset | StreamedImageDataset:
    """Load one split of a data set for training; serve it with `build_dataloader`.

    Args:
        source: "synthetic" for the project's own shapes (captions in "text"); else a folder of pictures (with or
            without a metadata file, class folders become "label"), one or more parquet files or tar files in
            WebDataset form, a folder of them, a folder of `save_to_disk`, or a name on the Hub.
        split: its name, "train" or "validation" in most data sets. Files given by name are all of this split.
        transform: how a picture becomes `pixel_values`.
        columns: what to read of a row.
        streaming: read while training, without a local copy.
        shuffle_buffer: rows of a stream that are shuffled together; ignored otherwise. 0 keeps the order.
        cache_in_memory: decode all pictures once, for small data sets that are not streamed.
        num_workers: processes that decode for the cache.
        max_samples: use only the first rows.
        seed: decides the synthetic pictures and the order and draws of a streamed data set.
        fail_on_unreadable: an unreadable row is an error.
        config_name: of a data set on the Hub that has several.
    """
    if streaming and cache_in_memory:
        raise ValueError("`cache_in_memory` needs all rows at the start: turn off either it or `streaming`.")
    if max_samples is not None and max_samples < 1:
        raise ValueError(f"`max_samples` must be 1 or more, or None for all rows, got {max_samples}.")
    if isinstance(source, (list, tuple)) and len(source) == 1:
        source = source[0]  # a list of one is that one: a name or folder need not be a file
    if source == SYNTHETIC:
        if split not in SYNTHETIC_ROWS:
            raise ValueError(f"`split` of the synthetic data set must be train or validation, got '{split}'.")
        if columns.token_ids is not None:
            raise ValueError("`source` synthetic has no token ids: leave out `token_column`.")
        num_examples = max_samples or SYNTHETIC_ROWS[split]
        rows = SyntheticShapes(num_examples, seed, transform.resolution, split=split, streaming=streaming)
    else:
        rows = load_rows(source, split, streaming, config_name)
        if max_samples is not None:
            rows = rows.take(max_samples)
    if streaming:
        return StreamedImageDataset(rows, transform, columns, shuffle_buffer, seed, fail_on_unreadable)
    return ImageDataset(rows, transform, columns, cache_in_memory, num_workers, fail_on_unreadable)
