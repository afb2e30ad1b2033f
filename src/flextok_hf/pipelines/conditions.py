"""Prompts, embedded prompts and classes -> the prior's conditioning inputs.

Letters: B images, P prompts or classes, M text length, T text_hidden_size.
"""

import logging
import textwrap
import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..models.modeling_prior import FlexTokPriorForCausalLM
from ..utils.numbers import is_finite_number
from .input_checks import check_class_labels, check_prompt_embeds, check_prompts


logger = logging.getLogger(__name__)

MAX_SHOWN_CHARACTERS = 80  # of a prompt, in a message
TOKENIZER_IN_USE = threading.Lock()  # a tokenizer of Transformers keeps the padding of the call that it is in


@dataclass(frozen=True)
class GivenTexts:
    """What a call may pass besides the prompt: embedded prompts, and what to steer away from.

    prompt_embeds (P, M, T) and prompt_attention_mask (P, M); the negative ones are for all prompts, or one each.
    """

    prompt_embeds: Tensor | None = None
    prompt_attention_mask: Tensor | None = None
    negative_prompt: str | list[str] | None = None
    negative_prompt_embeds: Tensor | None = None
    negative_prompt_attention_mask: Tensor | None = None


@dataclass(frozen=True)
class TextParts:
    """The components that read text, and the device to compute on."""

    text_encoder: PreTrainedModel | None
    tokenizer: PreTrainedTokenizerBase | None
    device: torch.device

    def embed(
        self, prompt: Any, prompt_embeds: Any, attention_mask: Any, hidden_size: int, prefix: str = ""
    ) -> tuple[Tensor, Tensor]:
        """Return states (P, M, T) and mask (P, M) of the prompts, or check those that were passed instead.

        Raises:
            ValueError: if neither or both are passed, they do not fit, or prompts cannot be encoded.
            TypeError: if an argument has the wrong type.
        """
        if prompt_embeds is not None:
            if prompt is not None:
                raise ValueError(f"Pass either `{prefix}prompt` or `{prefix}prompt_embeds`, not both.")
            states, mask = check_prompt_embeds(prompt_embeds, attention_mask, hidden_size, prefix)
            return states.to(self.device), mask.to(self.device)
        if attention_mask is not None:
            raise ValueError(f"`{prefix}prompt_attention_mask` belongs to `{prefix}prompt_embeds`, which is missing.")
        if self.text_encoder is None or self.tokenizer is None:
            raise ValueError(
                f"This pipeline has no text encoder for `{prefix}prompt`. Load it with `text_encoder=` and"
                f" `tokenizer=`, or pass `{prefix}prompt_embeds`."
            )
        return encode_prompts(check_prompts(prompt, f"{prefix}prompt"), self.text_encoder, self.tokenizer, self.device)


def encode_condition(
    prompt: str | list[str] | None,
    class_labels: Any,
    num_images_per_prompt: int,
    prior: FlexTokPriorForCausalLM,
    parts: TextParts,
    texts: GivenTexts,
) -> tuple[int, dict[str, Tensor]]:
    """Encode prompts or classes, whichever is given.

    Returns:
        The number P of prompts or classes, and arguments for the prior's `generate`, one row per image.

    Raises:
        ValueError: if neither or both are given, or the model does not support the kind that is.
        TypeError: if an argument has the wrong type.
    """
    if (prompt is None and texts.prompt_embeds is None) == (class_labels is None):
        raise ValueError("Pass either `prompt` or `class_labels`, not both; `prompt_embeds` may stand for a `prompt`.")
    if class_labels is not None:
        labels = check_class_labels(class_labels, prior.config).to(parts.device)
        extra = [f"`{name}`" for name, value in vars(texts).items() if value is not None]
        if extra:
            raise ValueError(f"{', '.join(extra)} cannot be combined with `class_labels`. Leave it out.")
        return len(labels), {"class_labels": labels.repeat_interleave(num_images_per_prompt)}
    width = prior.config.text_hidden_size
    if width is None:
        raise ValueError("A `prompt` was passed, but the prior of this pipeline reads no text. Pass `class_labels`.")
    states, mask = parts.embed(prompt, texts.prompt_embeds, texts.prompt_attention_mask, width)
    given = (texts.negative_prompt_embeds, texts.negative_prompt_attention_mask)
    no_text = "" if texts.negative_prompt is None and given[0] is None else texts.negative_prompt
    negative_states, negative_mask = parts.embed(no_text, *given, width, "negative_")
    if len(negative_states) not in (1, len(states)):
        raise ValueError(
            f"{len(negative_states)} negative prompts (`negative_prompt`, `negative_prompt_embeds`) do not match"
            f" {len(states)} prompts. Pass one for all, or one each."
        )
    copies = num_images_per_prompt if len(negative_states) > 1 else 1
    return len(states), {
        "encoder_hidden_states": states.to(prior.dtype).repeat_interleave(num_images_per_prompt, dim=0),
        "encoder_attention_mask": mask.repeat_interleave(num_images_per_prompt, dim=0),
        "negative_encoder_hidden_states": negative_states.to(prior.dtype).repeat_interleave(copies, dim=0),
        "negative_encoder_attention_mask": negative_mask.repeat_interleave(copies, dim=0),
    }


def encode_prompts(
    prompts: list[str], text_encoder: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Encode texts as states (P, M, T) and their mask (P, M), 1 for text and 0 for padding.

    Prompts longer than the tokenizer's `model_max_length` are truncated, and a warning is logged.
    """
    for note in cut_notes(prompts, tokenizer):
        logger.warning(note)
    with TOKENIZER_IN_USE:
        options = {"return_attention_mask": True, "return_tensors": "pt"}
        batch = tokenizer(prompts, padding=True, truncation=True, **options).to(device)
    if batch.input_ids.shape[1] == 0:
        raise ValueError("The `tokenizer` finds no tokens in the prompts, not even an end token. Is it damaged?")
    states = text_encoder(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
    return states, batch.attention_mask


def cut_notes(prompts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return a sentence about each prompt that the tokenizer will truncate."""
    limit = tokenizer.model_max_length
    if not is_finite_number(limit) or limit < 1:
        raise ValueError(f"`model_max_length` of the `tokenizer` must be a number of 1 or more, got {limit!r}.")
    with TOKENIZER_IN_USE:
        lengths = [len(ids) for ids in tokenizer(prompts, verbose=False).input_ids]
    return [
        f"The prompt {textwrap.shorten(prompt, MAX_SHOWN_CHARACTERS)!r} has {length:,} tokens; only the first {limit}"
        " are used."
        for prompt, length in zip(prompts, lengths, strict=True)
        if length > limit
    ]
