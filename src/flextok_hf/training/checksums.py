"""Checksums of a checkpoint's files, written last, so that damage is found and named before anything is loaded."""

import json
from pathlib import Path
from zipfile import BadZipFile, ZipFile

from safetensors import SafetensorError, safe_open
from xxhash import xxh3_128

from ..utils.files import read_json


CHECKSUM_FILE = "checksums.json"
READ_BYTES = 2**20
ZIP_FILES = (".bin", ".pkl", ".pt")  # written by `torch.save`


def write_checksums(folder: Path) -> None:
    """Write the checksums of all files below a folder. XXH3 hashes several times as fast as SHA-256."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sums = {path.relative_to(folder).as_posix(): checksum(path) for path in files}
    (folder / CHECKSUM_FILE).write_text(json.dumps(sums, indent=2) + "\n")


def checksum(path: Path) -> str:
    """Return the XXH3 of a file, 128 bits in hexadecimal digits: it detects damage, not forgery."""
    digest, buffer = xxh3_128(), memoryview(bytearray(READ_BYTES))  # memory of its own for each read would cost more
    with open(path, "rb", buffering=0) as file:
        while size := file.readinto(buffer):
            digest.update(buffer[:size])
    return digest.hexdigest()


def find_damage(folder: Path) -> str | None:
    """Return what is wrong with the files below a folder, or `None` if nothing is; other files are ignored."""
    path = folder / CHECKSUM_FILE
    try:
        sums = read_json(path)
        if not isinstance(sums, dict) or not sums:
            return f"{CHECKSUM_FILE} holds no checksums"
        for name, expected in sums.items():
            if not (folder / name).is_file():
                return f"{name} is missing or no file"
            if checksum(folder / name) != expected:
                return f"{name} differs from its checksum"
    except (OSError, ValueError) as error:
        return f"a file cannot be read: {error}"
    return None


def find_unreadable(folder: Path) -> str | None:
    """Return which file below a folder without checksums is not of its format, or `None`."""
    for path in sorted(path for path in folder.rglob("*") if not path.is_dir()):
        try:
            if not path.is_file():
                return f"{path.name} is no regular file"
            if path.suffix == ".safetensors":
                with safe_open(path, "pt"):
                    pass
            elif path.suffix == ".json":
                read_json(path)
            elif path.suffix in ZIP_FILES:
                with ZipFile(path) as file:
                    if file.testzip() is not None:
                        return f"{path.name} is damaged"
        except (OSError, ValueError, RuntimeError, SafetensorError, BadZipFile) as error:
            return f"{path.name} is damaged: {error}"
    return None
