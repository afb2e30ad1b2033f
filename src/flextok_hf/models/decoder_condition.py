"""What modulates the blocks of the decoder: the noise level, or both ends of an interval of them, shape and guidance.

A decoder that predicts the velocity is modulated by one noise level. One that predicts the mean velocity between two
levels, t and the lower r, reads t in its first blocks and r in the last `interval_blocks` and the head (Lee et al.,
2025, https://arxiv.org/abs/2510.24474). With r = t it is the decoder that it was distilled from.

Letters: B batch, D hidden size, M all modulations of a decoder.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..utils.numbers import is_finite_number, is_whole_number
from .argument_checks import MAX_GUIDANCE_SCALE, check_tensor
from .packed_linear import linear
from .patches import shape_features


PREDICTIONS = ("velocity", "mean_velocity")


def check_prediction(predicts: Any, interval_blocks: Any, num_layers: int, guidance_range: Any) -> None:
    """Raise a ValueError unless the settings of what a decoder predicts fit together."""
    if not isinstance(predicts, str) or predicts not in PREDICTIONS:
        raise ValueError(f"`predicts` must be one of {', '.join(PREDICTIONS)}, got {predicts!r}.")
    if predicts == "velocity":
        if interval_blocks is not None or guidance_range is not None:
            raise ValueError(
                '`interval_blocks` and `guidance_range` are for decoders whose `predicts` is "mean_velocity", got'
                f" {interval_blocks!r} and {guidance_range!r}. Leave them out."
            )
        return
    if not is_whole_number(interval_blocks) or not 0 <= interval_blocks <= num_layers:
        raise ValueError(
            f"`interval_blocks` must be a whole number from 0 to `num_layers` ({num_layers}), got {interval_blocks!r}."
        )
    is_pair = isinstance(guidance_range, list | tuple) and len(guidance_range) == 2
    if not is_pair or not all(is_finite_number(scale) for scale in guidance_range):
        raise ValueError(f"`guidance_range` must be the lowest and the highest scale, got {guidance_range!r}.")
    if not 0 <= guidance_range[0] <= guidance_range[1] <= MAX_GUIDANCE_SCALE:
        raise ValueError(
            f"`guidance_range` must be two numbers from 0 to {MAX_GUIDANCE_SCALE:g}, the lower one first, got"
            f" {guidance_range!r}."
        )


def guidance_features(guidance_scale: Tensor) -> Tensor:
    """Return what a decoder reads of guidance scales (B,) of 0 or more: (B, 1) in [-1, 1), 0 for no guidance."""
    scale = guidance_scale.float()[:, None]
    return (scale - 1) / (scale + 1)


class DecoderConditionMixin:
    """Embedding of the condition and the modulation that follows from it, for `FlexTokFlowDecoder`."""

    config: Any
    dtype: torch.dtype
    transformer_blocks: nn.ModuleList
    final_modulation: nn.Linear
    time_embedder: nn.Module
    shape_proj: nn.Linear
    guidance_proj: nn.Linear

    @property
    def predicts_mean(self) -> bool:
        """Whether the decoder predicts the mean velocity between two noise levels."""
        return self.config.predicts == "mean_velocity"

    def check_levels(
        self, batch_size: int, sigma: Tensor | None, next_sigma: Tensor | None, guidance_scale: Tensor | None
    ) -> None:
        """Check noise levels and guidance scales, each (B,) or (1,) for all."""

        def check(name: str, value: Tensor | None) -> None:
            is_shared = isinstance(value, Tensor) and value.shape == (1,)
            check_tensor(name, value, "floats", 1 if is_shared else batch_size)

        check("sigma", sigma)
        if self.predicts_mean:
            if guidance_scale is None:
                raise TypeError(
                    "`guidance_scale` is missing: this decoder is distilled to few steps, and has guidance in its"
                    " weights. Training and other uses of the velocity at one level need the decoder it was distilled"
                    ' from, in the subfolder "flow_decoder" if the model has it.'
                )
            check("guidance_scale", guidance_scale)
            if next_sigma is not None:
                check("next_sigma", next_sigma)
            return
        for name, value in (("next_sigma", next_sigma), ("guidance_scale", guidance_scale)):
            if value is not None:
                raise ValueError(
                    f"`{name}` is for decoders that predict the mean velocity, but this one's `predicts` is"
                    ' "velocity". Leave it out.'
                )

    def embed_condition(
        self,
        sigma: Tensor,
        latent_shape: Sequence[int] | None,
        next_sigma: Tensor | None = None,
        guidance_scale: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Embed noise levels (B,), with shape and guidance scale if the model knows them, as (B, D).

        Returns:
            The embedding for the first blocks, and the one for the last blocks and the head.
        """
        temb = self.time_embedder(sigma, self.dtype)
        more = None
        if self.config.shape_conditioning:
            more = self.shape_proj(shape_features(latent_shape, self.config, temb))
            temb = temb + more
        if not self.predicts_mean:
            return temb, temb
        assert guidance_scale is not None
        guidance = self.guidance_proj(guidance_features(guidance_scale).to(self.dtype))
        next_temb = temb
        if next_sigma is not None:
            next_temb = self.time_embedder(next_sigma, self.dtype)
            next_temb = next_temb if more is None else next_temb + more
        return temb + guidance, next_temb + guidance

    def compute_modulation(
        self,
        sigma: Tensor,
        latent_shape: Sequence[int] | None = None,
        next_sigma: Tensor | None = None,
        guidance_scale: Tensor | None = None,
    ) -> Tensor:
        """Compute everything that depends only on noise levels (B,) and shape, (B, M); it uses half of the weights.

        A sampler knows its noise levels in advance, so it computes all rows in one go and passes one to each call.
        `latent_shape` ends with height and width; `None` is the trained square. `next_sigma` and `guidance_scale` are
        those of `forward`. Raises `ValueError` while groups of blocks are offloaded: their weights are there during
        `forward` only.
        """
        hooks = getattr(self.transformer_blocks[0], "_diffusers_hook", None)
        if hooks is not None and hooks.get_hook("group_offloading") is not None:
            raise ValueError("With blocks offloaded, `compute_modulation` has no weights. Pass `sigma` to each call.")
        check_tensor("sigma", sigma, "floats", "B")
        self.check_levels(sigma.shape[0], sigma, next_sigma, guidance_scale)
        pair = self.embed_condition(sigma, latent_shape, next_sigma, guidance_scale)  # 2 x (B, D)
        tembs = [F.silu(temb) for temb in pair]
        layers = zip(self.modulation_layers(), self.lateness(), strict=True)
        parts = [linear(layer, tembs[is_late]) for layer, is_late in layers]
        rows = max(part.shape[0] for part in parts)  # (1,) stands for all
        return torch.cat([part.expand(rows, -1) for part in parts], dim=-1)

    def modulation_layers(self) -> list[nn.Module]:
        """Return the layers that read the noise level: one per block and one for the head."""
        return [*(block.modulation for block in self.transformer_blocks), self.final_modulation]

    def lateness(self) -> list[bool]:
        """Return which of the `modulation_layers` read the lower end of the interval."""
        num_layers = len(self.transformer_blocks)
        num_early = num_layers - (self.config.interval_blocks or 0)
        return [index >= num_early for index in range(num_layers + 1)]

    def split_modulation(self, modulation: Tensor | None) -> Sequence[Tensor | None]:
        """Split `compute_modulation`'s result into one part per block and one for the head; `None` stays `None`."""
        if modulation is None:
            return [None] * (len(self.transformer_blocks) + 1)
        return modulation.split([layer.out_features for layer in self.modulation_layers()], dim=-1)
