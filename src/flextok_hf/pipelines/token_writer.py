"""Drawing in parts: pictures while the prior still writes, and pictures that go on from the tokens of another one.

Letters: B pictures, C latent channels, h w latent grid, K registers, p tokens given, k tokens wanted.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..models.generation_prior import CACHE_NAME
from ..models.modeling_prior import FlexTokPriorForCausalLM
from ..models.packed_linear import PackedWeights
from . import input_checks as inputs
from .images import OUTPUT_TYPES


class TokenWriter:
    """Lets the prior write sequences in parts. Each part goes on where the last one ended, with its cache, its
    generator and its packed weights, so that parts cost what writing at once costs and give the same tokens.

    Args:
        prior: the model.
        prefix: tokens that are given, (B, p); p may be 0.
        num_tokens: length k of the sequences in the end.
        conditions: texts or classes, as `prior.generate` takes them, one row per picture.
        options: of `prior.generate`: generator, guidance, temperature, filters, kind of cache.
    """

    def __init__(
        self,
        prior: FlexTokPriorForCausalLM,
        prefix: Tensor,
        num_tokens: int,
        conditions: dict[str, Tensor],
        **options: Any,
    ):
        self.prior = prior
        self.token_ids = prefix
        self.num_tokens = num_tokens
        self.packed: PackedWeights | None = None  # from the first part to the last
        # Log-probabilities bring the prior's own sampling loop in any case; Transformers' cannot go on from a cache.
        self.arguments = {**conditions, **options, "do_sample": True, "return_log_probs": True}

    def write(self, num_tokens: int) -> Tensor:
        """Return the first tokens of every sequence, (B, num_tokens); the prior writes those that are missing."""
        missing = num_tokens - self.token_ids.shape[1]
        if missing > 0:
            if self.packed is None:
                self.packed = PackedWeights(self.prior, self.num_tokens - self.token_ids.shape[1])
            start = self.prior.prepend_bos(self.token_ids)
            with self.packed.in_use():
                output = self.prior.generate(start, max_new_tokens=missing, **self.arguments)
            self.token_ids = output.sequences[:, 1:]
            self.arguments[CACHE_NAME] = getattr(output, CACHE_NAME)
            self.arguments.pop("cache_implementation", None)  # which is for a new cache
            if num_tokens >= self.num_tokens:
                self.packed.free()
                self.prior.keep_cache(self.arguments.pop(CACHE_NAME))
        return self.token_ids[:, :num_tokens]


class StreamingMixin:
    """What `FlexTokPipeline` needs to draw in parts; `self` is one, which the type checker cannot see from here."""

    @torch.no_grad()
    def stream(
        self: Any,
        prompt: str | None = None,
        token_counts: Sequence[int] | None = None,
        class_labels: int | str | None = None,
        num_inference_steps: int = 25,
        guidance_scale: float | Callable[[float], float] | None = None,
        prior_guidance_scale: float | None = None,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        class_zero_guidance: bool = False,
        guidance: str = "apg",
        generator: torch.Generator | None = None,
        latents: Tensor | None = None,
        image: Any = None,
        token_ids: Tensor | None = None,
        keep_tokens: int | None = None,
        output_type: str = "pil",
    ) -> Iterator[tuple[int, Any]]:
        """Draw one picture, and show it while its tokens are being written.

        All pictures come from the same tokens and the same noise, so that they refine and do not jump. The last one is
        what calling the pipeline with `max_tokens=token_counts[-1]` and the same generator gives. The prior writes
        every token once; every count costs one run of the flow decoder.

        Args:
            prompt: one text.
            token_counts: when to show the picture, growing; more than `num_registers` means all. `None` is 1, 2, 4,
                ... up to all tokens.
            class_labels: one class instead of a prompt, its number or name.
            num_inference_steps, guidance_scale, prior_guidance_scale, temperature, top_k, top_p, class_zero_guidance,
                guidance, generator, latents, image, token_ids, keep_tokens, output_type: as in calling the pipeline.

        Returns:
            An iterator over (number of tokens, picture).

        Raises:
            ValueError: at the call, not at the first picture, if an argument does not fit; also for several prompts.
            TypeError: if an argument is of the wrong kind.
        """
        if guidance_scale is None:
            guidance_scale = self.config.default_guidance_scale
        generator = inputs.spread_generators(generator, 1)
        inputs.check_sampling(num_inference_steps, guidance_scale, guidance, output_type, (*OUTPUT_TYPES, "latent"))
        counts = inputs.check_token_counts(token_counts, self.num_registers)
        num_conditions, conditions = self.encode_condition(prompt, class_labels, num_images_per_prompt=1)
        if num_conditions != 1:
            raise ValueError(
                f"`stream` draws one picture, got {num_conditions} prompts or classes. Call it for each of them."
            )
        prefix = self.encode_prefix(image, token_ids, keep_tokens, 1, 1)  # (1, p)
        inputs.check_prefix_fits(prefix.shape[1], counts[-1:])
        latents = self.prepare_latents(1, generator, latents)  # (1, C, h, w)
        sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "generator": generator}
        sampling["class_zero_guidance"] = class_zero_guidance
        writer = self.token_writer(conditions, prefix, counts[-1], prior_guidance_scale, **sampling)
        decoding = {
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "guidance": guidance,
            "latents": latents,
            "output_type": output_type,
        }
        return self._stream_pictures(writer, counts, decoding)

    @torch.no_grad()
    def _stream_pictures(
        self: Any, writer: TokenWriter, counts: list[int], decoding: dict
    ) -> Iterator[tuple[int, Any]]:
        for count in counts:
            yield count, self.detokenize(writer.write(count), **decoding).images[0]

    def token_writer(
        self: Any,
        conditions: dict[str, Tensor],
        prefix: Tensor,
        num_tokens: int,
        prior_guidance_scale: float | None,
        **options: Any,
    ) -> TokenWriter:
        """Prepare the prior to go on from `prefix` (B, p) to k tokens; `None` is the model's own guidance scale."""
        if prior_guidance_scale is None:
            prior_guidance_scale = self.config.default_prior_guidance_scale
        options |= {"guidance_scale": prior_guidance_scale, **self.prior_options}
        return TokenWriter(self.prior, prefix, num_tokens, conditions, **options)

    def encode_prefix(
        self: Any, image: Any, token_ids: Tensor | None, keep_tokens: int | None, num_conditions: int, num_images: int
    ) -> Tensor:
        """Prepare the tokens that new pictures begin with.

        Args:
            image: one picture for all prompts or classes, or a list with one each.
            token_ids: or their ids, (1 or number of prompts, n).
            keep_tokens: how many of them to keep.
            num_conditions: prompts or classes.
            num_images: pictures of each.

        Returns:
            Ids, (num_conditions * num_images, p) int64; p is 0 without a picture and ids.
        """
        if image is not None and token_ids is not None:
            raise ValueError("Pass either `image` or `token_ids` to go on from, and not both.")
        if image is None and token_ids is None:
            if keep_tokens is not None:
                raise ValueError("`keep_tokens` was given, but nothing to keep them of. Pass `image` or `token_ids`.")
            return torch.zeros(num_conditions * num_images, 0, dtype=torch.long, device=self._execution_device)
        if image is not None:
            inputs.check_keep_tokens(keep_tokens, self.num_registers, "the model has that many")
            token_ids = self.tokenize(image, keep_tokens)
        else:
            token_ids, lengths = inputs.pad_token_ids(token_ids, self.codebook_size, self.num_registers)
            if keep_tokens is not None:
                inputs.check_keep_tokens(keep_tokens, min(lengths), "the shortest row of `token_ids` has that many")
            elif min(lengths) < max(lengths):
                raise ValueError(
                    f"`token_ids` has rows of {min(lengths)} to {max(lengths)} ids, but pictures go on from equally"
                    f" many. Set `keep_tokens` to {min(lengths)} or fewer."
                )
        if token_ids.shape[0] not in (1, num_conditions):
            raise ValueError(
                f"{token_ids.shape[0]} pictures or rows of `token_ids` do not fit {num_conditions} prompts or classes."
                " Pass one for all of them, or one each."
            )
        prefix = token_ids[:, :keep_tokens].to(self._execution_device).long()
        return prefix.expand(num_conditions, -1).repeat_interleave(num_images, dim=0)
