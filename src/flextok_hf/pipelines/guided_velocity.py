"""The velocity that a sampler follows: decoder, tokens and guidance, at noise levels known in advance.

Letters: B batch, C latent channels, h w latent grid, k codes, Q code dimensions, T noise levels.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..models.modeling_decoder import FlexTokFlowDecoder
from ..models.packed_linear import is_offloaded
from .guidance import Guidance
from .input_checks import check_guidance_scale
from .length_groups import LengthGroups


GuidanceScale = float | Callable[[float], float]


class GuidedVelocity:
    """Guided velocity of one sampling run; call it once per step, in order.

    Args:
        decoder: the flow decoder.
        sigmas: the noise levels of all steps, (T,).
        codes: (B, k, Q), on the decoder's device.
        num_tokens: number of codes to use per sample, (B,) in [1, k]; on the CPU, where it is read.
        guidance_scale: weight of the conditional velocity, 1 is no guidance; or a function of sigma.
        guidance: "apg" or "cfg".
        latent_shape: of the latents, of which height and width count; `None` is the trained square.
    """

    def __init__(
        self,
        decoder: FlexTokFlowDecoder,
        sigmas: Tensor,
        codes: Tensor,
        num_tokens: Tensor,
        guidance_scale: GuidanceScale = 1.0,
        guidance: str = "apg",
        latent_shape: Sequence[int] | None = None,
    ):
        if decoder.is_cache_enabled:
            decoder._reset_stateful_cache()  # clear what an interrupted run left
        self.decoder = decoder
        self.sigmas = sigmas.to(codes.device)
        self.codes = codes
        self.num_tokens = num_tokens
        self.scales = [scale_at(guidance_scale, level) for level in sigmas.tolist()]
        self.guide = Guidance(guidance)
        self.groups = {is_guided: self.group_rows(is_guided) for is_guided in {scale != 1 for scale in self.scales}}
        # Depends only on the noise level: computed once, unless offloading loads the weights only during a call.
        self.modulation = None if is_offloaded(decoder) else decoder.compute_modulation(self.sigmas, latent_shape)

    def group_rows(self, is_guided: bool) -> LengthGroups:
        """Split a step's rows into decoder calls: the samples and, with guidance, the same samples without tokens."""
        copies = 2 if is_guided else 1
        batch_size = self.codes.shape[0]
        is_unconditional = torch.arange(copies * batch_size) >= batch_size
        codes, num_tokens = self.codes.repeat(copies, 1, 1), self.num_tokens.repeat(copies)
        return LengthGroups(self.decoder, codes, num_tokens, is_unconditional)

    def __call__(self, latents: Tensor, step: int) -> Tensor:
        """Return the velocity (B, C, h, w) float32 for noisy latents of the same shape at `sigmas[step]`."""
        is_guided = self.scales[step] != 1
        noisy_latents = latents.to(self.decoder.dtype).repeat(2 if is_guided else 1, 1, 1, 1)
        level = slice(step, step + 1)
        modulation = None if self.modulation is None else self.modulation[level]
        velocity = self.groups[is_guided].predict_velocity(noisy_latents, self.sigmas[level], modulation).float()
        if not is_guided:
            return velocity
        conditional, unconditional = velocity.chunk(2)
        return self.guide(conditional, unconditional, self.scales[step])


def scale_at(guidance_scale: GuidanceScale, sigma: float) -> float:
    """Return the guidance scale at a noise level; raises an error if a function gives no finite number."""
    if not callable(guidance_scale):
        return guidance_scale
    return check_guidance_scale(guidance_scale(sigma), f"guidance_scale({sigma:g})")
