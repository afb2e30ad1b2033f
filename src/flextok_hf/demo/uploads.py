"""Files that visitors upload: read from one folder only, once, and up to a limit."""

import os
import stat


MAX_PHOTO_BYTES = 20 * 2**20
# One message for every file, so that answers do not tell which files exist.
NOT_UPLOADED = "The photo must be a file that was uploaded on this page. Choose it again."


def is_inside(path: str, folder: str) -> bool:
    """Whether a path, as written and with links resolved, is in a folder."""
    real = os.path.realpath(folder)
    try:
        is_written_inside = any(
            os.path.commonpath([os.path.abspath(path), parent]) == parent for parent in (os.path.abspath(folder), real)
        )  # first, so that paths elsewhere are not even looked up
        return is_written_inside and os.path.commonpath([os.path.realpath(path), real]) == real
    except (ValueError, OSError):  # a null character, another drive, a name that is too long
        return False


def read_upload(path: str, folder: str) -> bytes:
    """Return the content of a file in a folder. It is opened once, without waiting for pipes, and checked once open.

    Raises:
        ValueError: the same for every path that is not a regular file in the folder, or if it is too large.
    """
    if not is_inside(path, folder):
        raise ValueError(NOT_UPLOADED)
    flags = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_NONBLOCK", "O_NOFOLLOW", "O_BINARY"))
    try:
        with open(os.open(path, flags), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ValueError(NOT_UPLOADED)
            content = file.read(MAX_PHOTO_BYTES + 1)
    except OSError:
        raise ValueError(NOT_UPLOADED) from None
    if len(content) > MAX_PHOTO_BYTES:
        raise ValueError(f"This file is too large: upload one of at most {MAX_PHOTO_BYTES >> 20} MB.")
    return content
