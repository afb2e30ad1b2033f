"""Token files: what `flextok tokenize` writes and `flextok detokenize` reads."""

import json
import os
from typing import Any

from ..utils.files import write_text


TOKEN_FILE_FORMAT = "flextok-token-ids"


def write_token_file(
    path: str | os.PathLike, images: list[dict[str, Any]], codebook_size: int, num_registers: int
) -> None:
    """Write token ids as JSON.

    Args:
        path: output file.
        images: one entry per image, with its `file`, `height`, `width` and `token_ids`.
        codebook_size: number of codes of the model that made the ids; checked on reading.
        num_registers: maximum sequence length of that model.
    """
    content = {
        "format": TOKEN_FILE_FORMAT,
        "version": 3,
        "codebook_size": codebook_size,
        "num_registers": num_registers,
        "images": images,
    }
    write_text(path, json.dumps(content) + "\n")


def parse_token_file(
    content: Any, path: str, codebook_size: int, num_registers: int
) -> tuple[list[list[int]], list[tuple[int, int] | None]]:
    """Return the token sequences in a JSON file, after checking them, and height and width of each image if there.

    Args:
        content: what `flextok tokenize` writes, or one list of ids, or a list of such lists; lengths may differ.
        path: where it came from, for messages.
        codebook_size: every id must be below it.
        num_registers: no sequence may be longer.

    Raises:
        ValueError: if the content is something else, or was made for another model.
    """
    entries: Any = None
    if isinstance(content, dict):
        entries = content.get("images", content.get("pictures"))  # their key in files of version 1
        if content.get("format") != TOKEN_FILE_FORMAT or not isinstance(entries, list):
            raise ValueError(
                f"{path!r} was not written by `flextok tokenize`: its `format` is {content.get('format')!r}"
            )
        if content.get("codebook_size") != codebook_size:
            raise ValueError(
                f"{path!r} holds ids of a codebook of {content.get('codebook_size')} codes, but this model has"
                f" {codebook_size}; pass the model they were made with as --model"
            )
        content = [entry.get("token_ids") if isinstance(entry, dict) else entry for entry in entries]
    elif isinstance(content, list) and content and all(type(entry) is int for entry in content):
        content = [content]
    if not isinstance(content, list) or not content:
        raise ValueError(f"{path!r} holds no token ids; expected a list of ids or a list of such lists")
    for number, sequence in enumerate(content):
        if not isinstance(sequence, list) or not all(type(token_id) is int for token_id in sequence):
            raise ValueError(f"{path!r}, sequence {number}: expected a list of integers, got {str(sequence)[:60]}")
        if not 1 <= len(sequence) <= num_registers:
            raise ValueError(f"{path!r}, sequence {number}: {len(sequence)} ids, expected 1 to {num_registers}")
        wrong = next((token_id for token_id in sequence if not 0 <= token_id < codebook_size), None)
        if wrong is not None:
            raise ValueError(f"{path!r}, sequence {number}: id {wrong} is outside 0 to {codebook_size - 1}")
    return content, [read_size(entry, path) for entry in entries or content]


def read_size(entry: Any, path: str) -> tuple[int, int] | None:
    """Return height and width of an entry of a token file; `None` if it has neither, as before version 3."""
    height, width = (entry.get("height"), entry.get("width")) if isinstance(entry, dict) else (None, None)
    if height is None and width is None:
        return None
    if type(height) is not int or type(width) is not int or not 0 < min(height, width) <= max(height, width) < 2**31:
        raise ValueError(f"{path!r} has an image of {str(height)[:20]} x {str(width)[:20]}; expected whole numbers")
    return height, width
