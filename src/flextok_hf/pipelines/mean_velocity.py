"""The mean velocity that a sampler of few steps follows: a distilled decoder, with guidance in its weights.

Letters: B batch, C latent channels, h w latent grid, k codes, Q code dimensions, T steps.
"""

from collections.abc import Sequence

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SchedulerMixin
from torch import Tensor

from ..models.modeling_decoder import FlexTokFlowDecoder
from ..models.packed_linear import is_offloaded
from .guided_velocity import GuidanceScale, scale_at
from .length_groups import LengthGroups


def check_scheduler(decoder: FlexTokFlowDecoder, scheduler: SchedulerMixin) -> None:
    """Raise a ValueError if a decoder of mean velocities meets a solver that takes velocities at one noise level.

    An Euler step with the mean velocity between two levels is exact: z_r = z_t - (t - r) u. Solvers of higher order
    combine velocities of several levels, and the stochastic step adds noise, which only those at one level allow.
    """
    if not decoder.predicts_mean:
        return
    name = type(scheduler).__name__
    if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        raise ValueError(
            f"`scheduler` is a {name}, which needs the velocity at one noise level, but this decoder predicts its mean"
            " over a whole step. Use `FlowMatchEulerDiscreteScheduler()`."
        )
    for option in ("stochastic_sampling", "invert_sigmas"):
        if scheduler.config.get(option):
            raise ValueError(
                f"`scheduler` has `{option}`, but this decoder predicts the mean velocity over a step. Turn it off."
            )


def check_scales(decoder: FlexTokFlowDecoder, scales: Sequence[float], guidance: str) -> None:
    """Raise a ValueError if a distilled decoder was not trained for these guidance scales, or for the method."""
    low, high = decoder.config.guidance_range
    for scale in scales:
        if not low <= scale <= high:
            allowed = f"{low:g}" if low == high else f"from {low:g} to {high:g}"
            raise ValueError(
                f"`guidance_scale` must be {allowed}, since guidance is part of the weights of this distilled decoder,"
                f" got {scale:g}. Leave it out for the default, or load the decoder that it was distilled from, in the"
                ' subfolder "flow_decoder" if the model has it.'
            )
    if guidance != "apg":
        raise ValueError(
            f'`guidance` must be "apg", which is part of the weights of this distilled decoder, got {guidance!r}.'
        )


class MeanVelocity:
    """Mean velocities of one sampling run with a distilled decoder, in one pass per step; used like `GuidedVelocity`.

    Args:
        decoder: a decoder that predicts the mean velocity.
        sigmas: the noise levels of all steps and the one after the last step, falling, (T + 1,).
        codes: (B, k, Q), on the decoder's device.
        num_tokens: number of codes to use per sample, (B,) in [1, k]; on the CPU, where it is read.
        guidance_scale: a scale within the decoder's `guidance_range`, or a function of sigma.
        guidance: "apg", with which the decoder was distilled.
        latent_shape: of the latents, of which height and width count; `None` is the trained square.
    """

    def __init__(
        self,
        decoder: FlexTokFlowDecoder,
        sigmas: Tensor,
        codes: Tensor,
        num_tokens: Tensor,
        guidance_scale: GuidanceScale,
        guidance: str = "apg",
        latent_shape: Sequence[int] | None = None,
    ):
        scales = [scale_at(guidance_scale, level) for level in sigmas[:-1].tolist()]
        check_scales(decoder, scales, guidance)
        if decoder.is_cache_enabled:
            decoder._reset_stateful_cache()  # clear what an interrupted run left
        device = codes.device
        self.groups = LengthGroups(decoder, codes, num_tokens, torch.zeros(codes.shape[0], dtype=torch.bool))
        self.dtype = decoder.dtype
        self.sigmas, self.next_sigmas = sigmas[:-1].to(device), sigmas[1:].to(device)
        self.scales = torch.tensor(scales, dtype=torch.float32, device=device)
        self.modulation = None
        if not is_offloaded(decoder):  # otherwise the weights are there only during a call
            levels = (self.next_sigmas, self.scales)
            self.modulation = decoder.compute_modulation(self.sigmas, latent_shape, *levels)

    def __call__(self, latents: Tensor, step: int) -> Tensor:
        """Return the mean velocity (B, C, h, w) float32 from `sigmas[step]`, the level of the latents, to the next."""
        one = slice(step, step + 1)
        modulation = None if self.modulation is None else self.modulation[one]
        levels = (self.sigmas[one], modulation, self.next_sigmas[one], self.scales[one])
        return self.groups.predict_velocity(latents.to(self.dtype), *levels).float()
