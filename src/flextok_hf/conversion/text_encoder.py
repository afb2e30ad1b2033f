"""The text encoder of a prior: a T5 encoder with its tokenizer, from its own folder or repository."""

import os
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, T5EncoderModel

from .prior_settings import TextSettings
from .references import resolve_reference
from .settings import shorten_list
from .source import Checkpoint


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
    config = AutoConfig.from_pretrained(name, **hub_options)
    if config.model_type != "t5" or config.d_model != text_hidden_size:
        raise ValueError(
            f"the text encoder {str(name)!r} is of type {config.model_type!r} and width"
            f" {getattr(config, 'd_model', None)}; {checkpoint.name!r} needs a T5 encoder of width {text_hidden_size}."
        )
    tokenizer = AutoTokenizer.from_pretrained(name, **hub_options)
    if settings.max_length is not None:
        tokenizer.model_max_length = settings.max_length
    model, report = T5EncoderModel.from_pretrained(
        name, dtype=dtype or "auto", use_safetensors=True, output_loading_info=True, **hub_options
    )
    if report["missing_keys"]:
        missing = shorten_list(sorted(report["missing_keys"]))
        raise ValueError(f"the text encoder {str(name)!r} lacks weights: {missing}. Fetch it again.")
    broken = [name for name, tensor in model.named_parameters() if not tensor.isfinite().all()]
    if broken:
        raise ValueError(
            f"the text encoder {str(name)!r} holds values that are not finite: {shorten_list(broken)}. Fetch it again."
        )
    return model.eval(), tokenizer
