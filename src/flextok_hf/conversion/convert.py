"""Convert official checkpoints to a folder in the format of this package."""

import json
import os
from pathlib import Path
from typing import Any

import torch

from ..cards.model_card import write_model_card
from ..cards.provenance import ORIGINAL_FILE
from ..models.saved_model import named_errors
from ..pipelines.pipeline_flextok import FlexTokPipeline
from ..utils.files import check_output_folder
from .original import Original, read_original
from .writing import check_space, new_folder, num_bytes, write_component


MAX_SHARD_BYTES = 5 * 10**9


def convert_checkpoint(
    output: str | os.PathLike,
    tokenizer: str | os.PathLike | None = None,
    prior: str | os.PathLike | None = None,
    text_encoder: str | os.PathLike | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    is_quiet: bool = False,
    **options: Any,
) -> list[str]:
    """Convert official checkpoints to a folder for `from_pretrained`.

    Tensors are read, checked and written one at a time, so the model need not fit in memory; only a text encoder is
    loaded as a whole.

    Args:
        output: folder to create: a pipeline if `tokenizer` is given, otherwise a `FlexTokPriorForCausalLM`. It appears
            once everything is written, or not at all.
        tokenizer: Hub id, folder or safetensors file.
        prior: the same; if `tokenizer` is given, it becomes part of the pipeline.
        text_encoder: Hub id or folder of the prior's text encoder; `None` for the one in the prior's configuration.
        dtype: of the weights; `None` keeps the stored data type.
        max_shard_bytes: maximum size of a weight file; larger weights are split into several files.
        is_quiet: hide the progress bars.
        options: `revision`, `prior_revision`, `ignore`, and `cache_dir`, `token`, `local_files_only` for the Hub.

    Returns:
        Notes on what differs from the official code or was not converted.

    Raises:
        ValueError: if a checkpoint is damaged, incomplete, unknown or not supported.
        OSError: if files are missing, the Hub cannot be reached, or the disk is too full.
    """
    output = check_output_folder(Path(output).expanduser())
    with named_errors(f"the checkpoint {str(tokenizer or prior)!r}", ""):
        original = read_original(tokenizer, prior, text_encoder, dtype=dtype, **options)
        text_encoder_model = original.others.get("text_encoder")
        needed = 0 if text_encoder_model is None else sum(one.nbytes for one in text_encoder_model.parameters())
        check_space(output.parent, needed + sum(num_bytes(one.layout(dtype)) for one in original.components.values()))
        with new_folder(output) as folder:
            if tokenizer is not None:
                write_pipeline_files(folder, original, max_shard_bytes)
            for name, component in original.components.items():
                place = folder if tokenizer is None else folder / name
                write_component(place, component, dtype, max_shard_bytes, None if is_quiet else name)
            (folder / ORIGINAL_FILE).write_text(json.dumps(original.record, indent=2) + "\n", encoding="utf-8")
            if tokenizer is not None:
                write_model_card(folder, output.name)
    return original.notes


def write_pipeline_files(folder: Path, original: Original, max_shard_bytes: int) -> None:
    """Write what a pipeline's `save_pretrained` writes, except the converted models."""
    models = {name: one.model for name, one in original.components.items()}
    pipe = FlexTokPipeline(**original.pipeline_arguments(models))
    pipe.save_config(folder)  # model_index.json
    pipe.scheduler.save_pretrained(folder / "scheduler")
    if pipe.text_encoder is not None and pipe.tokenizer is not None:
        pipe.text_encoder.save_pretrained(folder / "text_encoder", max_shard_size=max_shard_bytes)
        pipe.tokenizer.save_pretrained(folder / "tokenizer")
