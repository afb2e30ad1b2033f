"""The half of the pipeline that turns prompts and classes into token ids.

Letters: B images, p tokens given, M text length.
"""

import functools
import logging
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..models.modeling_encoder import FlexTokEncoder
from ..models.modeling_prior import FlexTokPriorForCausalLM
from ..utils.numbers import is_whole_number
from ..utils.words import describe_unknown, unknown_words
from . import input_checks as inputs
from . import token_checks as tokens
from .conditions import GivenTexts, TextParts, cut_notes, encode_condition
from .token_writer import TokenWriter


logger = logging.getLogger(__name__)

MAX_IMAGES = 2**16  # of one prompt


class PriorHalf(DiffusionPipeline):
    """What a pipeline with a prior does with it."""

    encoder: FlexTokEncoder
    # these three may be `None`, which encoding a condition refuses
    prior: FlexTokPriorForCausalLM
    text_encoder: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    prior_options: dict[str, Any]  # for the prior's `generate`; set by `enable_compile`

    @property
    def num_registers(self) -> int:
        """Maximum number K of tokens per image."""
        return self.encoder.config.num_registers

    def token_writer(
        self,
        prompt: str | list[str] | None,
        class_labels: Any,
        num_images_per_prompt: int,
        max_tokens: int | Sequence[int] | None,
        prefix: Tensor,
        prior_guidance_scale: float | None,
        generator: torch.Generator | list[torch.Generator] | None,
        texts: GivenTexts = GivenTexts(),
        shape_features: Tensor | None = None,
        **sampling: Any,
    ) -> TokenWriter:
        """Check and encode what the prior needs to continue from `prefix` (1 or prompts, p), without sampling yet.

        Of the shape of the images, (1, 2), only priors are told that were trained with it.
        """
        num_conditions, conditions = self.encode_condition(prompt, class_labels, num_images_per_prompt, texts)
        counts = tokens.resolve_max_tokens(max_tokens, num_conditions, self.num_registers)
        counts = [count for count in counts for _ in range(num_images_per_prompt)]
        tokens.check_prefix_fits(prefix, num_conditions, counts)
        if prior_guidance_scale is None:
            prior_guidance_scale = self.config.default_prior_guidance_scale
        if shape_features is not None and self.prior.config.shape_conditioning:
            conditions["shape_features"] = shape_features.expand(len(counts), -1).to(self._execution_device)
        options = inputs.check_generation(prior_guidance_scale=prior_guidance_scale, **sampling)
        return TokenWriter(
            self.prior,
            prefix.expand(num_conditions, -1).repeat_interleave(num_images_per_prompt, dim=0),  # (B, p)
            counts,
            conditions,
            self.progress_bar,
            guidance_scale=options.pop("prior_guidance_scale"),
            generator=inputs.spread_generators(generator, len(counts)),
            **options,
            **self.prior_options,
        )

    def encode_condition(
        self,
        prompt: str | list[str] | None,
        class_labels: Any,
        num_images_per_prompt: int,
        texts: GivenTexts = GivenTexts(),
    ) -> tuple[int, dict[str, Tensor]]:
        """Return the number of prompts or classes, and arguments for the prior's `generate`, one row per image."""
        if self.prior is None:
            raise ValueError(
                "This pipeline has no prior, so it cannot generate from a prompt or class. Use `tokenize`,"
                " `detokenize` and `reconstruct`, or pass `prior=FlexTokPriorForCausalLM.from_pretrained(...)`."
            )
        if not is_whole_number(num_images_per_prompt) or not 1 <= num_images_per_prompt <= MAX_IMAGES:
            got = inputs.brief(num_images_per_prompt)
            raise ValueError(f"`num_images_per_prompt` must be a whole number from 1 to {MAX_IMAGES}, got {got}.")
        parts = TextParts(self.text_encoder, self.tokenizer, self._execution_device)
        condition = encode_condition(prompt, class_labels, int(num_images_per_prompt), self.prior, parts, texts)
        for given in (prompt, texts.negative_prompt):
            self._warn_of_unknown(given)
        return condition

    def prompt_notes(self, prompt: str | list[str]) -> list[str]:
        """Return what is worth knowing about prompts before drawing them, in sentences; usually nothing.

        Args:
            prompt: one prompt or a list.

        Returns:
            A sentence for each prompt that is too long and will be cut, and one about all words that the model was
            not trained on, if it knows: `prior.config.known_words`, which training writes.
        """
        prompts = inputs.check_prompts(prompt)
        notes = [] if self.tokenizer is None else cut_notes(prompts, self.tokenizer)
        unknown = self._unknown_words(prompts)
        return notes + ([describe_unknown(unknown, self.prior.config.known_words or ())] if unknown else [])

    @functools.cached_property
    def _reported_words(self) -> set[str]:
        return set()

    def _unknown_words(self, prompts: list[str]) -> list[str]:
        known = None if self.prior is None else self.prior.config.known_words
        return unknown_words(" ".join(prompts), set(known)) if known else []

    def _warn_of_unknown(self, prompts: str | list[str] | None) -> None:
        """Log the words that the model was not trained on, each once."""
        unknown = [] if prompts is None else self._unknown_words(inputs.check_prompts(prompts))
        unknown = [word for word in unknown if word not in self._reported_words]
        if unknown:
            self._reported_words.update(unknown)
            logger.warning(describe_unknown(unknown, self.prior.config.known_words or ()))

    @torch.no_grad()
    def encode_prompt(self, prompt: str | list[str]) -> tuple[Tensor, Tensor]:
        """Encode prompts for `prompt_embeds` and `prompt_attention_mask`; needs text encoder and tokenizer only.

        Returns:
            States (prompts, M, text_hidden_size), and their mask (prompts, M), 0 for padding.
        """
        parts = TextParts(self.text_encoder, self.tokenizer, self._execution_device)
        return parts.embed(prompt, None, None, 0)
