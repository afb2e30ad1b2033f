"""Files that a command leaves behind: whole or not at all."""

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image


PICTURE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
ANIMATED = ".webp"  # the kind of file that can hold several pictures in turn


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


def write_atomically(path: str | os.PathLike, write: Callable[[str], object]) -> None:
    """Let `write` fill a temporary file next to `path`, then move it there in one step.

    An interrupted or failed job leaves the file that was there before as it was.

    Args:
        path: final name; the temporary name has the same ending, so that writers which go by it still work.
        write: is called with the temporary name.
    """
    path = Path(path)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    try:
        write(temporary)
        # mkstemp makes files for the owner only; give back what an ordinary new file would have.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def save_picture(picture: Image.Image, path: str | os.PathLike) -> None:
    """Write one picture as a whole; its kind follows from the ending of `path`.

    Args:
        picture: any mode that the kind of file can hold.
        path: its ending is one of `PICTURE_EXTENSIONS`.
    """
    write_atomically(path, picture.save)


def save_animation(frames: Sequence[Image.Image], path: str | os.PathLike, frame_ms: int) -> None:
    """Write pictures as one lossless animated WebP that plays without end and rests on the last picture.

    Args:
        frames: pictures of one size, at least one.
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
