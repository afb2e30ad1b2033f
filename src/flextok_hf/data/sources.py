"""What a user may name as data -> rows: folders, files, names on the Hub, or shapes that this package draws."""

from collections.abc import Sequence
from pathlib import Path

import datasets

from .synthetic import SyntheticShapes


SYNTHETIC = "synthetic"
SYNTHETIC_ROWS = {"train": 10_000, "validation": 500}
# How files are read, by their ending; a folder may hold files of one kind, or images.
BUILDERS = {".parquet": "parquet", ".tar": "webdataset"}


def load_folder(path: Path, split: str, streaming: bool) -> datasets.Dataset | datasets.IterableDataset:
    """Load a split of a folder, which `datasets` tells by the names in it; all is "train" if there are none."""
    try:
        return datasets.load_dataset(str(path), split=split, streaming=streaming)
    except ValueError as error:
        if not str(error).startswith(("Unknown split", "Bad split")):  # of a whole data set, and of a stream
            raise
        raise ValueError(
            f"`split` '{split}' is not in {path}: {error} Put what belongs to it into {path / split}, and what to"
            f" train with into {path / 'train'}."
        ) from error


def load_rows(
    source: str | Path | Sequence[str | Path],
    split: str,
    streaming: bool = False,
    config_name: str | None = None,
    max_rows: int | None = None,
    seed: int = 0,
    resolution: int = 64,
) -> datasets.Dataset | datasets.IterableDataset:
    """Find out what `source` is and load one split of it.

    Args:
        source: "synthetic" for shapes that this package draws; else a folder of images, one or more parquet files or
            tar files in WebDataset form, a folder of them, a folder of `save_to_disk`, or a name on the Hub.
        split: its name. Files given by name are all of this split.
        streaming: read while iterating, without a local copy.
        config_name: of a data set on the Hub that has several.
        max_rows: only the first rows; `None` is all.
        seed, resolution: of the synthetic images.

    Raises:
        FileNotFoundError: files, or a folder given as a path, that do not exist.
        ValueError: files of different or unknown kinds, or a split that is not there.
    """
    if isinstance(source, (list, tuple)) and len(source) == 1:
        source = source[0]  # a list of one is that one: a name or folder need not be a file
    if source == SYNTHETIC:
        if split not in SYNTHETIC_ROWS:
            raise ValueError(f"`split` of the synthetic data set must be train or validation, got '{split}'.")
        return SyntheticShapes(max_rows or SYNTHETIC_ROWS[split], seed, resolution, split=split, streaming=streaming)
    rows = load_named(source, split, streaming, config_name)
    return rows if max_rows is None else rows.take(max_rows)


def load_named(
    source: str | Path | Sequence[str | Path], split: str, streaming: bool, config_name: str | None
) -> datasets.Dataset | datasets.IterableDataset:
    """Load files, a folder or a name on the Hub with the matching call of `datasets`; see `load_rows`."""
    paths = [Path(source)] if isinstance(source, (str, Path)) else [Path(path) for path in source]
    if paths and all(path.is_file() for path in paths):
        kinds = {path.suffix for path in paths}
        if len(kinds) > 1 or not kinds <= BUILDERS.keys():
            raise ValueError(
                f"`source` must be files of one kind, {' or '.join(BUILDERS)}, got {[str(path) for path in paths]}."
            )
        files = {split: [str(path) for path in paths]}
        return datasets.load_dataset(BUILDERS[kinds.pop()], data_files=files, split=split, streaming=streaming)
    if len(paths) != 1:
        missing = [str(path) for path in paths if not path.is_file()]
        raise FileNotFoundError(f"`source` must be files that exist, a folder or a name; missing: {missing}.")
    path = paths[0]
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        saved = datasets.load_from_disk(str(path))
        if isinstance(saved, datasets.DatasetDict):
            if split not in saved:
                raise ValueError(f"`split` '{split}' is not in {path}, which has {', '.join(saved)}.")
            saved = saved[split]
        return saved.to_iterable_dataset() if streaming else saved
    if path.is_dir():
        return load_folder(path, split, streaming)
    if isinstance(source, Path) or str(source).startswith((".", "/", "~")) or path.suffix in BUILDERS:
        raise FileNotFoundError(f"`source` '{source}' does not exist. Give a folder, files or a Hub name.")
    return datasets.load_dataset(str(source), config_name, split=split, streaming=streaming)
