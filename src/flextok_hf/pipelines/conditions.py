"""Prompts and classes -> the prior's conditioning inputs.

Letters: B images, M text length.
"""

import logging
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..models.modeling_prior import FlexTokPriorForCausalLM
from .input_checks import check_class_labels, check_prompts


logger = logging.getLogger(__name__)


def encode_condition(
    prompt: str | list[str] | None,
    class_labels: Any,
    num_images_per_prompt: int,
    prior: FlexTokPriorForCausalLM,
    text_encoder: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase | None,
    device: torch.device,
) -> tuple[int, dict[str, Tensor]]:
    """Encode prompts or classes, whichever is given.

    Returns:
        The number of prompts or classes, and arguments for the prior's `generate`, one row per image.

    Raises:
        ValueError: if neither or both are given, or the model does not support the kind that is.
        TypeError: if an argument has the wrong type.
    """
    if (prompt is None) == (class_labels is None):
        raise ValueError("Pass either `prompt` or `class_labels`, not both.")
    if class_labels is not None:
        labels = check_class_labels(class_labels, prior.config).to(device)
        return len(labels), {"class_labels": labels.repeat_interleave(num_images_per_prompt)}
    if prior.config.text_hidden_size is None or text_encoder is None or tokenizer is None:
        raise ValueError(
            "A `prompt` was passed, but this pipeline has no text encoder or its prior takes no text. Pass"
            " `class_labels`, or load the pipeline with `text_encoder=` and `tokenizer=`."
        )
    prompts = check_prompts(prompt)
    states, mask = encode_prompts(prompts, text_encoder, tokenizer, device)
    negative_states, negative_mask = encode_prompts([""], text_encoder, tokenizer, device)
    return len(prompts), {
        "encoder_hidden_states": states.to(prior.dtype).repeat_interleave(num_images_per_prompt, dim=0),
        "encoder_attention_mask": mask.repeat_interleave(num_images_per_prompt, dim=0),
        "negative_encoder_hidden_states": negative_states.to(prior.dtype),
        "negative_encoder_attention_mask": negative_mask,
    }


def encode_prompts(
    prompts: list[str], text_encoder: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Encode texts as states (B, M, text_hidden_size) and their mask (B, M), 1 for text and 0 for padding.

    Prompts longer than the tokenizer's `model_max_length` are truncated, and a warning is logged.
    """
    limit = tokenizer.model_max_length
    for prompt, ids in zip(prompts, tokenizer(prompts, verbose=False).input_ids, strict=True):
        if len(ids) > limit:
            logger.warning("The prompt %r has %d tokens; only the first %d are used.", prompt, len(ids), limit)
    batch = tokenizer(prompts, padding=True, truncation=True, return_tensors="pt").to(device)
    states = text_encoder(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
    return states, batch.attention_mask
