"""File helpers: results are written atomically, and JSON errors include the file name."""

import json
import os
import re
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors import SafetensorError


IMAGE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
ANIMATED = (".webp", ".gif")  # the formats that can hold an animation


def check_output_path(path: str | os.PathLike, extensions: tuple[str, ...]) -> Path:
    """Return `path` if a file with one of `extensions` can be written there; call this before a long job.

    Args:
        path: where the result will be written; an existing file may be replaced.
        extensions: allowed file extensions in lower case, each with its dot.

    Raises:
        ValueError: unsupported extension, missing or read-only folder, or `path` is a folder.
    """
    path = Path(path)
    if path.suffix.lower() not in extensions:
        kind = f"ends in '{path.suffix}'" if path.suffix else "has no file extension"
        raise ValueError(f"`output` {str(path)!r} {kind}; use one of {', '.join(extensions)}")
    if path.is_dir():
        raise ValueError(
            f"`output` {str(path)!r} is a folder; specify a file in it, such as {path / ('out' + path.suffix)}"
        )
    check_folder_around(path)
    return path


def check_output_folder(path: str | os.PathLike) -> Path:
    """Return `path` if a new folder can be created there; call this before a long job.

    Args:
        path: must not exist, or be an empty folder.

    Raises:
        ValueError: it already exists and is not an empty folder, or its parent is missing or read-only.
    """
    path = Path(path)
    if path.is_dir() and any(path.iterdir()):
        raise ValueError(f"`output` {str(path)!r} exists and is not empty; choose another name, or remove it first")
    if path.exists() and not path.is_dir():
        raise ValueError(f"`output` {str(path)!r} is a file; specify a new folder")
    check_folder_around(path)
    return path


def check_image_folder(folder: Path) -> None:
    """Raise a `FileNotFoundError` if there is no folder to read images from."""
    if not folder.is_dir():
        raise FileNotFoundError(f"`folder` {str(folder)!r} is no folder. Pass one with images.")


def check_folder_around(path: Path) -> None:
    """Raise a `ValueError` if the parent folder of `path` is missing or read-only."""
    if not path.parent.is_dir():
        raise ValueError(
            f"`output` {str(path)!r} is in a folder that does not exist; create it: mkdir -p {path.parent}"
        )
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"the folder of `output` {str(path)!r} cannot be written to; choose another one")


def read_json(path: str | os.PathLike, default: Any = None) -> Any:
    """Read a JSON file.

    Args:
        path: the file.
        default: returned if the file does not exist; with `None`, that is an error.

    Raises:
        FileNotFoundError: the file does not exist, and there is no `default`.
        ValueError: it is not valid JSON.
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

    An interrupted or failed write leaves any existing file untouched.

    Args:
        path: final name; the temporary name has the same extension, so writers that infer the format still work.
        write: called with the temporary name.
    """
    path = Path(path)
    temporary = temporary_beside(path)
    temporary.touch(exist_ok=False)  # with default permissions, unlike `tempfile`
    try:
        write(str(temporary))
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if (named := writing_error(error, path)) is not None:
            raise named from error
        raise


def writing_error(error: BaseException, path: Path) -> OSError | None:
    """Return an error of the system with the name of the file or folder that was to be written; else `None`."""
    hidden = re.search(r"os error (\d+)", str(error)) if isinstance(error, SafetensorError) else None
    number = int(hidden[1]) if hidden else getattr(error, "errno", None)
    return OSError(number, os.strerror(number), str(path)) if number else None


def temporary_beside(path: Path) -> Path:
    """Return a hidden, unused path next to `path` with the same extension."""
    return path.with_name(f".{path.stem}-{secrets.token_hex(8)}{path.suffix}")


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    write_atomically(path, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))


def save_image(image: Image.Image, path: str | os.PathLike) -> None:
    """Write one image atomically; the extension of `path` sets the format.

    Args:
        image: in any mode that the format supports.
        path: a file name with one of `IMAGE_EXTENSIONS`.
    """
    write_atomically(path, image.save)


def save_animation(frames: Sequence[Image.Image], path: str | os.PathLike, frame_ms: int) -> None:
    """Write images as one animation that loops and pauses on the last image: a lossless WebP, or a GIF of 256 colors.

    Args:
        frames: one or more images of the same size.
        path: ends in one of `ANIMATED`.
        frame_ms: how long each frame is shown, in milliseconds; the last one is shown three times as long.
    """
    durations = [frame_ms] * (len(frames) - 1) + [3 * frame_ms]

    def write(temporary: str) -> None:
        of_format = {} if temporary.lower().endswith(".gif") else {"lossless": True, "method": 6}
        shared = {"append_images": frames[1:], "duration": durations, "loop": 0}
        frames[0].save(temporary, save_all=True, **shared, **of_format)

    write_atomically(path, write)


def numbered_paths(path: str | os.PathLike, count: int) -> list[Path]:
    """Return `path` itself for one result, `name-1.png`, `name-2.png`, ... for several.

    Args:
        path: what the user asked for.
        count: number of results, at least 1; numbers are zero-padded so that the names sort.
    """
    path = Path(path)
    if count == 1:
        return [path]
    width = len(str(count))
    return [path.with_stem(f"{path.stem}-{number:0{width}d}") for number in range(1, count + 1)]
