"""Files: results appear whole or not at all, JSON is read with errors that name the file."""

import json
import os
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image


IMAGE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
ANIMATED = ".webp"  # the kind of file that can hold several images in turn


def check_output_path(path: str | os.PathLike, extensions: tuple[str, ...]) -> Path:
    """Return `path` if a file of one of the kinds in `extensions` can be written there; made to be called early.

    Args:
        path: where the result of a long job is to go; an existing file may be replaced.
        extensions: allowed endings in lower case, each with its dot.

    Raises:
        ValueError: unknown ending, missing or read-only folder, or a folder stands in the way.
    """
    path = Path(path)
    if path.suffix.lower() not in extensions:
        kind = f"ends in '{path.suffix}'" if path.suffix else "has no file extension"
        raise ValueError(f"`output` {str(path)!r} {kind}; use one of {', '.join(extensions)}")
    if path.is_dir():
        raise ValueError(
            f"`output` {str(path)!r} is a folder; name a file in it, such as {path / ('out' + path.suffix)}"
        )
    check_folder_around(path)
    return path


def check_output_folder(path: str | os.PathLike) -> Path:
    """Return `path` if a new folder can be made there; made to be called early.

    Args:
        path: must not exist, or be an empty folder.

    Raises:
        ValueError: something is there already, or the folder around it is missing or read-only.
    """
    path = Path(path)
    if path.is_dir() and any(path.iterdir()):
        raise ValueError(f"`output` {str(path)!r} exists and is not empty; choose another name, or remove it first")
    if path.exists() and not path.is_dir():
        raise ValueError(f"`output` {str(path)!r} is a file; choose the name of a new folder")
    check_folder_around(path)
    return path


def check_folder_around(path: Path) -> None:
    """Raise a `ValueError` if the folder in which `path` is to be made is missing or read-only."""
    if not path.parent.is_dir():
        raise ValueError(
            f"`output` {str(path)!r} lies in a folder that does not exist; create it: mkdir -p {path.parent}"
        )
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"the folder of `output` {str(path)!r} cannot be written to; choose another one")


def read_json(path: str | os.PathLike, default: Any = None) -> Any:
    """Read a JSON file.

    Args:
        path: of the file.
        default: returned if there is no such file; `None` makes that an error.

    Raises:
        FileNotFoundError: there is no such file, and no `default`.
        ValueError: it is not JSON.
    """
    path = Path(path)
    if default is not None and not path.is_file():
        return default
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not a JSON file: {error}") from error


def write_atomically(path: str | os.PathLike, write: Callable[[str], object]) -> None:
    """Let `write` fill a temporary file next to `path`, then move it there in one step.

    An interrupted or failed job leaves the file that was there before as it was.

    Args:
        path: final name; the temporary name has the same ending, so that writers which go by it still work.
        write: is called with the temporary name.
    """
    path = Path(path)
    temporary = temporary_beside(path)
    temporary.touch(exist_ok=False)  # with the permissions of any new file, which `tempfile` would not give
    try:
        write(str(temporary))
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def temporary_beside(path: Path) -> Path:
    """Return a hidden, unused name beside `path` with the same ending."""
    return path.with_name(f".{path.stem}-{secrets.token_hex(8)}{path.suffix}")


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text file in UTF-8 as a whole."""
    write_atomically(path, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))


def save_image(image: Image.Image, path: str | os.PathLike) -> None:
    """Write one image as a whole; its kind follows from the ending of `path`.

    Args:
        image: any mode that the kind of file can hold.
        path: its ending is one of `IMAGE_EXTENSIONS`.
    """
    write_atomically(path, image.save)


def save_animation(frames: Sequence[Image.Image], path: str | os.PathLike, frame_ms: int) -> None:
    """Write images as one lossless animated WebP that plays without end and rests on the last image.

    Args:
        frames: images of one size, at least one.
        path: ends in `ANIMATED`.
        frame_ms: how long each is shown, in milliseconds; the last one three times as long.
    """
    durations = [frame_ms] * (len(frames) - 1) + [3 * frame_ms]

    def write(temporary: str) -> None:
        frames[0].save(
            temporary, save_all=True, append_images=frames[1:], duration=durations, loop=0, lossless=True, method=6
        )

    write_atomically(path, write)


def numbered_paths(path: str | os.PathLike, count: int) -> list[Path]:
    """Return `path` itself for one result, `name-1.png`, `name-2.png`, ... for several.

    Args:
        path: what the user asked for.
        count: number of results, at least 1; numbers are padded to sort well.
    """
    path = Path(path)
    if count == 1:
        return [path]
    width = len(str(count))
    return [path.with_stem(f"{path.stem}-{number:0{width}d}") for number in range(1, count + 1)]
