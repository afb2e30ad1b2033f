"""Hugging Face data sets -> training batches: `pixel_values`, and `captions` or `class_labels` where there are any.

    dataset = load_training_dataset("folder", transform=ImageTransform(64), columns=Columns(caption="text"))
    for batch in TrainingBatches(build_dataloader(dataset, batch_size=32)).start(): ...

Rows whose image cannot be read are counted, named in a warning and never used.
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
    """Load one split of a data set for training; serve it with `build_dataloader`.

    Args:
        source: as in `load_rows`. Synthetic captions are in "text"; class folders become "label".
        split: its name, "train" or "validation" in most data sets.
        transform: how an image becomes `pixel_values`.
        columns: what to read of a row.
        streaming: read while training, without a local copy.
        shuffle_buffer: rows of a stream that are shuffled together; ignored otherwise. 0 keeps the order.
        cache_in_memory: decode all images once, for small data sets that are not streamed.
        num_workers: processes that decode for the cache.
        max_samples: use only the first rows.
        seed: decides the synthetic images and the order and draws of a streamed data set.
        fail_on_unreadable: an unreadable row is an error.
        config_name: of a data set on the Hub that has several.
    """
    if streaming and cache_in_memory:
        raise ValueError("`cache_in_memory` needs all rows at the start: turn off either it or `streaming`.")
    if max_samples is not None and max_samples < 1:
        raise ValueError(f"`max_samples` must be 1 or more, or None for all rows, got {max_samples}.")
    if source in (SYNTHETIC, [SYNTHETIC]) and columns.token_ids is not None:
        raise ValueError("`source` synthetic has no token ids: leave out `token_column`.")
    rows = load_rows(source, split, streaming, config_name, max_samples, seed, transform.resolution)
    if streaming:
        return StreamedImageDataset(rows, transform, columns, shuffle_buffer, seed, fail_on_unreadable)
    return ImageDataset(rows, transform, columns, cache_in_memory, num_workers, fail_on_unreadable)
