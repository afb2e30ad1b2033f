"""Checks that token ids from scripts/tokenize_dataset.py were made with a given tokenizer."""

from pathlib import Path

import torch

from ..pipelines.pipeline_flextok import FlexTokPipeline
from ..utils.files import read_json
from ..utils.measures import weights_hash


SETTINGS_FILE = "settings.json"  # next to the shards: the settings that produced the ids


def check_token_data(sources: list[str], tokenizer: str) -> None:
    """Check that the ids were made with the weights of `tokenizer`, which is loaded only for this check.

    Ids without a settings file are accepted as they are.

    Raises:
        ValueError: if the weights differ.
    """
    folders = {path.parent if path.is_file() else path for path in map(Path, sources)}
    for path in (folder / SETTINGS_FILE for folder in sorted(folders)):
        if not path.is_file():
            continue
        settings = read_json(path)
        dtype = getattr(torch, settings["dtype"])
        unused = {"prior": None, "text_encoder": None, "tokenizer": None}
        pipe = FlexTokPipeline.from_pretrained(tokenizer, dtype=dtype, **unused)
        parts = {name: getattr(pipe, name) for name in ("encoder", "vae") if getattr(pipe, name) is not None}
        if weights_hash(parts) != settings["weights_sha256"]:
            raise ValueError(
                f"The token ids of `train_data` {str(path.parent)!r} were made by {settings['model']!r} with other"
                f" weights than those of `tokenizer` {tokenizer!r}. Pass the one that made them, or remake the ids."
            )
