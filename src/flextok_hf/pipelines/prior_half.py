"""The half of the pipeline that turns prompts and classes into token ids.

Letters: B images, p tokens given, M text length.
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..models.modeling_encoder import FlexTokEncoder
from ..models.modeling_prior import FlexTokPriorForCausalLM
from ..utils.numbers import is_whole_number
from . import input_checks as inputs
from . import token_checks as tokens
from .conditions import GivenTexts, TextParts, encode_condition
from .token_writer import TokenWriter


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
        return encode_condition(prompt, class_labels, int(num_images_per_prompt), self.prior, parts, texts)

    @torch.no_grad()
    def encode_prompt(self, prompt: str | list[str]) -> tuple[Tensor, Tensor]:
        """Encode prompts for `prompt_embeds` and `prompt_attention_mask`; needs text encoder and tokenizer only.

        Returns:
            States (prompts, M, text_hidden_size), and their mask (prompts, M), 0 for padding.
        """
        parts = TextParts(self.text_encoder, self.tokenizer, self._execution_device)
        return parts.embed(prompt, None, None, 0)
