"""Data sources -> rows: folders, files, Hub ids, or shapes that this package draws."""

from collections.abc import Sequence
from pathlib import Path

import datasets

from .synthetic import SyntheticShapes


SYNTHETIC = "synthetic"
SYNTHETIC_ROWS = {"train": 10_000, "validation": 500}
# How files are read, by extension; a folder may hold files of one kind, or images.
BUILDERS = {".parquet": "parquet", ".tar": "webdataset"}


def load_folder(path: Path, split: str, streaming: bool) -> datasets.Dataset | datasets.IterableDataset:
    """Load one split of a folder; `datasets` infers splits from the names in it, and all is "train" otherwise."""
    try:
        return datasets.load_dataset(str(path), split=split, streaming=streaming)
    except ValueError as error:
        if not str(error).startswith(("Unknown split", "Bad split")):  # map-style and streamed
            raise
        raise ValueError(
            f"`split` '{split}' is not in {path}: {error} Put its files into {path / split}, and the"
            f" training files into {path / 'train'}."
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
    """Load one split of `source`, whatever its kind.

    Args:
        source: "synthetic" for shapes that this package draws; otherwise a folder of images, one or more parquet files
            or WebDataset tar files, a folder of these, a folder from `save_to_disk`, or a Hub id.
        split: name of the split. Files passed by path all belong to it.
        streaming: read while iterating, without a local copy.
        config_name: configuration of a Hub dataset that has several.
        max_rows: load only the first rows; `None` loads all.
        seed, resolution: for the synthetic images.

    Raises:
        FileNotFoundError: files, or a folder passed as a path, do not exist.
        ValueError: files are of different or unknown kinds, or the split does not exist.
    """
    if isinstance(source, (list, tuple)) and len(source) == 1:
        source = source[0]  # unwrap a list of one, which may be a folder or Hub id
    if source == SYNTHETIC:
        if split not in SYNTHETIC_ROWS:
            raise ValueError(f"`split` of the synthetic dataset must be train or validation, got '{split}'.")
        return SyntheticShapes(max_rows or SYNTHETIC_ROWS[split], seed, resolution, split=split, streaming=streaming)
    rows = load_named(source, split, streaming, config_name)
    return rows if max_rows is None else rows.take(max_rows)


def load_named(
    source: str | Path | Sequence[str | Path], split: str, streaming: bool, config_name: str | None
) -> datasets.Dataset | datasets.IterableDataset:
    """Load files, a folder or a Hub dataset with the matching `datasets` call; see `load_rows`."""
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
        raise FileNotFoundError(f"`source` must be existing files, a folder or a Hub id; missing: {missing}.")
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
        raise FileNotFoundError(f"`source` '{source}' does not exist. Pass a folder, files or a Hub id.")
    return datasets.load_dataset(str(source), config_name, split=split, streaming=streaming)
