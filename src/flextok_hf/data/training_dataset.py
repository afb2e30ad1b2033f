"""Hugging Face datasets -> training batches: `pixel_values`, and `captions` or `class_labels` if available.

    dataset = load_training_dataset("folder", transform=ImageTransform(64), columns=Columns(caption="text"))
    for batch in TrainingBatches(build_dataloader(dataset, batch_size=32)).start(): ...

Rows whose image cannot be read are counted, reported in a warning and never used.
"""

from collections.abc import Sequence
from pathlib import Path

from .columns import Columns
from .image_dataset import ImageDataset
from .image_stream import StreamedImageDataset
from .samples import ImageTransform
from .sources import SYNTHETIC, load_rows


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
    """Load one split of a dataset for training; pass the result to `build_dataloader`.

    Args:
        source: as in `load_rows`. Synthetic captions are in column "text"; class folders become column "label".
        split: name of the split, "train" or "validation" in most datasets.
        transform: turns an image into `pixel_values`.
        columns: what to read from a row.
        streaming: read while training, without a local copy.
        shuffle_buffer: number of rows of a stream to shuffle together; ignored otherwise. 0 keeps the order.
        cache_in_memory: decode all images once, for small datasets that are not streamed.
        num_workers: processes that decode images for the cache.
        max_samples: use only the first rows.
        seed: seeds the synthetic images, and the order and random draws of a streamed dataset.
        fail_on_unreadable: raise an error for an unreadable row.
        config_name: configuration of a Hub dataset that has several.

    Raises:
        ValueError: options or columns do not fit; `load_rows` lists further errors.
    """
    if streaming and cache_in_memory:
        raise ValueError("`cache_in_memory` needs all rows up front: turn off either it or `streaming`.")
    if max_samples is not None and max_samples < 1:
        raise ValueError(f"`max_samples` must be 1 or more, or None for all rows, got {max_samples}.")
    if source in (SYNTHETIC, [SYNTHETIC]) and columns.token_ids is not None:
        raise ValueError("`source` synthetic has no token ids: leave out `token_column`.")
    rows = load_rows(source, split, streaming, config_name, max_samples, seed, transform.resolution)
    if streaming:
        return StreamedImageDataset(rows, transform, columns, shuffle_buffer, seed, fail_on_unreadable)
    return ImageDataset(rows, transform, columns, cache_in_memory, num_workers, fail_on_unreadable)
