"""Token ids made by scripts/tokenize_dataset.py: are they those of this tokenizer?"""

from pathlib import Path

import torch

from ..pipelines.pipeline_flextok import FlexTokPipeline
from ..utils.files import read_json
from ..utils.measures import weights_hash


SETTINGS_FILE = "settings.json"  # beside the shards: what decided the ids


def check_token_data(sources: list[str], tokenizer: str) -> None:
    """Compare the weights that made the ids with those of `tokenizer`, which is loaded for that moment.

    Ids without a record of their making are taken as they are.

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
                f" weights than those of `tokenizer` {tokenizer!r}. Name that one, or make the ids anew."
            )
