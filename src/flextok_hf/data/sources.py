"""Data sources -> rows: folders, files, Hub ids, or shapes that this package draws."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
from datasets.data_files import SPLIT_KEYWORDS, DataFilesList
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

from .synthetic import SyntheticShapes


SYNTHETIC = "synthetic"
SYNTHETIC_ROWS = {"train": 10_000, "validation": 500}
# How files are read, by extension; a folder may hold files of one kind, or images.
BUILDERS = {".parquet": "parquet", ".tar": "webdataset"}
# Folder names that make a split, such as "val" -> "validation"
SPLITS = {name: str(split) for split, names in SPLIT_KEYWORDS.items() for name in names}


def list_files(folder: str, parents: tuple[str, ...] = ()) -> Iterator[str]:
    """Yield the visible files below a folder, also behind links; a link back to a parent is not followed."""
    here = os.path.realpath(folder)
    if here in parents:
        return
    for entry in os.scandir(folder):
        if entry.name.startswith("."):
            continue
        if entry.is_dir() and not entry.name.startswith("__"):  # __MACOSX, __pycache__
            yield from list_files(entry.path, (*parents, here))
        elif entry.is_file():  # not a broken link
            yield entry.path


def load_folder(path: Path, split: str, streaming: bool) -> datasets.Dataset | datasets.IterableDataset:
    """Load one split of a folder: of its images, if these are most of its files; otherwise `datasets` decides."""
    root = os.path.abspath(path)
    files = sorted(list_files(root))
    images = [file for file in files if os.path.splitext(file)[1].lower() in ImageFolder.EXTENSIONS]
    metadata = [file for file in files if os.path.basename(file) in ImageFolder.METADATA_FILENAMES]
    tables = [file for file in files if file.endswith((*BUILDERS, ".zip")) and file not in metadata]
    if not images and not tables:
        raise ValueError(
            f"`source` {path} holds no images. Pass a folder of images, of {' or of '.join(BUILDERS)} files, or one"
            " from `save_to_disk`."
        )
    try:
        if len(images) > len(tables):
            return load_images(root, images, metadata, split, streaming)
        return datasets.load_dataset(str(path), split=split, streaming=streaming)
    except ValueError as error:
        if not str(error).startswith(("Unknown split", "Bad split")):  # map-style and streamed
            raise
        raise ValueError(
            f"`split` '{split}' is not in {path}: {error} Put its files into {path / split}, and the"
            f" training files into {path / 'train'}."
        ) from error


def load_images(
    root: str, images: list[str], metadata: list[str], split: str, streaming: bool
) -> datasets.Dataset | datasets.IterableDataset:
    """Load one split of the images below `root`. It has several if all are in folders such as train and test."""
    tops = {file: os.path.relpath(file, root).split(os.sep)[0] for file in images + metadata}
    has_splits = all(tops[file] in SPLITS for file in images)
    splits = {file: SPLITS.get(top, "") if has_splits else "train" for file, top in tops.items()}
    found = sorted({splits[file] for file in images})
    if split not in found:
        raise ValueError(f"Unknown split '{split}'. There is {', '.join(found)}.")
    metadata = [file for file in metadata if splits[file] == split]
    if metadata:  # as `DataFilesList`, paths are not patterns; the times tell the cache of changes
        times = [(str(os.stat(file).st_mtime_ns),) for file in metadata]
        data_files = {split: DataFilesList(metadata, times)}
        return datasets.load_dataset("imagefolder", data_files=data_files, split=split, streaming=streaming)

    # Class folders are all at the same depth, below the folders of splits
    folders = {os.path.relpath(os.path.dirname(file), root) for file in images}
    depths = {0 if folder == "." else folder.count(os.sep) + 1 for folder in folders}
    names = sorted({os.path.basename(folder) for folder in folders})
    features: dict[str, Any] = {"image": datasets.Image()}
    if len(names) > 1 and len(depths) == 1 and min(depths) > has_splits:
        features["label"] = datasets.ClassLabel(names=names)
    images = [file for file in images if splits[file] == split]
    columns = datasets.Features(features)
    classes = tuple(names) if "label" in features else None  # a tuple: lists are split into shards
    if streaming:  # one shard per image, so that shuffling the shards shuffles all images
        arguments = {"images": images, "names": classes}
        return datasets.IterableDataset.from_generator(_make_rows, features=columns, gen_kwargs=arguments)
    return datasets.Dataset.from_list(list(_make_rows(images, classes)), columns)


def _make_rows(images: list[str], names: tuple[str, ...] | None) -> Iterator[dict[str, Any]]:
    numbers = {name: number for number, name in enumerate(names or ())}
    for file in images:
        label = {} if names is None else {"label": numbers[os.path.basename(os.path.dirname(file))]}
        yield {"image": file, **label}


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
        ValueError: files are of different or unknown kinds, or the split does not exist or has no rows.
    """
    if isinstance(source, (list, tuple)) and len(source) == 1:
        source = source[0]  # unwrap a list of one, which may be a folder or Hub id
    if source == SYNTHETIC:
        if split not in SYNTHETIC_ROWS:
            raise ValueError(f"`split` of the synthetic dataset must be train or validation, got '{split}'.")
        return SyntheticShapes(max_rows or SYNTHETIC_ROWS[split], seed, resolution, split=split, streaming=streaming)
    try:
        rows = load_named(source, split, streaming, config_name)
        is_empty = not streaming and len(rows) == 0
    except (IndexError, ValueError) as error:  # of `datasets`, for saved folders and for files without rows
        if isinstance(error, ValueError) and "corresponds to no data" not in str(error):
            raise
        is_empty = True
    if is_empty:
        raise ValueError(f"`source` {source} has no rows in split '{split}'. Check the files, or pass others.")
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
