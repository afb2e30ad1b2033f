"""The text encoder of a prior: a T5 encoder with its tokenizer, from its own folder or repository."""

import os
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, T5EncoderModel

from ..models.saved_model import (
    check_folder,
    check_foreign_model,
    check_loaded,
    check_saved_model,
    lacking,
    local_folder,
    named_errors,
    weight_names,
)
from .prior_settings import TextSettings
from .references import resolve_reference
from .settings import shorten_list
from .source import Checkpoint


TOKENIZER_FILES = ("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "spiece.model")


def load_text_encoder(
    name: str | os.PathLike | None,
    settings: TextSettings,
    checkpoint: Checkpoint,
    text_hidden_size: int,
    dtype: torch.dtype | None,
    **hub_options: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the text encoder and the text tokenizer, which truncates texts to the length in the checkpoint.

    Args:
        name: Hub id or folder that the user chose; `None` for the one in the configuration of the checkpoint.
        settings: from the checkpoint's configuration.
        checkpoint: the prior.
        text_hidden_size: width of the text states that the prior takes.
        dtype: of the weights; `None` keeps the stored data type.
        hub_options: `cache_dir`, `token` and `local_files_only`.

    Raises:
        ValueError: if it is not a T5 encoder of that width, or weights are missing or not finite.
    """
    if name is None:
        remedy = "Pass a folder or Hub id as `text_encoder`."
        name = resolve_reference(settings.reference, checkpoint, settings.where, remedy)
    source = f"the text encoder {str(name)!r}"
    with named_errors(source, str(name)):
        names = ["config.json", *TOKENIZER_FILES, *weight_names(T5EncoderModel, None, use_safetensors=True)]
        folder = local_folder(name, names, **hub_options)
        config = check_folder(folder).get("config.json")
        if config is None:
            raise FileNotFoundError(f"{source} has no `config.json`. Fetch it again, or pass another `text_encoder`.")
        if config.get("model_type") != "t5" or config.get("d_model") != text_hidden_size:
            raise ValueError(
                f"{source} is of type {config.get('model_type')!r} and width {config.get('d_model')};"
                f" {checkpoint.name!r} needs a T5 encoder of width {text_hidden_size}."
            )
        check_foreign_model(folder, T5EncoderModel, check_saved_model(folder, T5EncoderModel, None, True))
        tokenizer = AutoTokenizer.from_pretrained(folder)
        if settings.max_length is not None:
            tokenizer.model_max_length = settings.max_length
        model, report = T5EncoderModel.from_pretrained(
            folder, dtype=dtype or "auto", use_safetensors=True, output_loading_info=True
        )
        if report["missing_keys"]:
            raise lacking(T5EncoderModel, folder, sorted(report["missing_keys"]))
        check_loaded(model, source)
    broken = [name for name, tensor in model.named_parameters() if not tensor.isfinite().all()]
    if broken:
        raise ValueError(f"{source} holds values that are not finite: {shorten_list(broken)}. Fetch it again.")
    return model.eval(), tokenizer
