"""Pixels <-> latents: a VAE with its scaling factor, or the identity for pixel-space models.

On the CPU, VAE inputs use the channels-last memory format, in which convolutions are computed there; on an H200 this
made encoding a fifth slower (docs/speed.md).

Letters: B batch, C latent channels, h w latent grid, H W image height and width, K registers.
"""

import copy

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from .packed_linear import is_emulated


@torch.no_grad()
def encode_latents(vae: AutoencoderKL | None, pixel_values: Tensor) -> Tensor:
    """Encode images (B, 3, H, W) in [-1, 1] as latents (B, C, h, w) of about unit variance.

    Uses the mean of the VAE's posterior, not a sample, so that tokenizing an image always gives the same ids.
    """
    if vae is None:
        return pixel_values
    latents = in_hardware_precision(vae).encode(_prepare(pixel_values, vae)).latent_dist.mode()
    return (latents * vae.config.scaling_factor).to(vae.dtype)


def decode_latents(vae: AutoencoderKL | None, latents: Tensor) -> Tensor:
    """Decode latents (B, C, h, w) as images (B, 3, H, W), roughly in [-1, 1] and not clamped."""
    if vae is None:
        return latents
    return in_hardware_precision(vae).decode(_prepare(latents / vae.config.scaling_factor, vae)).sample.to(vae.dtype)


def _prepare(tensor: Tensor, vae: AutoencoderKL) -> Tensor:
    layout = torch.channels_last if tensor.device.type == "cpu" else torch.preserve_format
    return tensor.to(torch.float32 if computes_in_float32(vae) else vae.dtype, memory_format=layout)


def computes_in_float32(vae: AutoencoderKL) -> bool:
    """Whether this CPU would emulate the precision of the VAE, whose convolutions then take 300 times as long."""
    return vae.device.type == "cpu" and is_emulated(vae.dtype) and not torch.is_grad_enabled()


def in_hardware_precision(vae: AutoencoderKL) -> AutoencoderKL:
    """Return the VAE, or where the CPU would emulate its precision, a copy in float32 for one call."""
    if not computes_in_float32(vae):
        return vae
    tensors = [*vae.parameters(), *vae.buffers()]
    converted = {id(tensor): tensor.detach().float() for tensor in tensors}  # in place of the copies
    for parameter in vae.parameters():
        converted[id(parameter)] = nn.Parameter(converted[id(parameter)], requires_grad=False)
    return copy.deepcopy(vae, converted)


def downsampling_factor(vae: AutoencoderKL | None) -> int:
    """Return the pixels per side of a latent cell; 1 if latents are pixels."""
    return 1 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)


def check_token_ids(token_ids: Tensor, pixel_values: Tensor, encoder: nn.Module, vae: AutoencoderKL | None) -> None:
    """Raise a `ValueError` that says why ids (B, K) are -1, the id of features that are not finite, if any are."""
    if not (token_ids < 0).any():
        return
    if not pixel_values.isfinite().all():
        raise ValueError(
            "`pixel_values` contain NaN or infinity. Fix the images, for example with `torch.nan_to_num`."
        )
    if vae is not None and not encode_latents(vae, pixel_values).isfinite().all():
        raise not_finite_error("The latents of the images", vae, "VAE")
    raise not_finite_error("The features of the images", encoder, "encoder")


def not_finite_error(what: str, component: nn.Module, name: str) -> ValueError:
    """Return the error for what a component computed from finite values; it says whether the weights are the cause."""
    weights = [(key, value) for key, value in component.named_parameters() if value.device.type != "meta"]
    broken = [key for key, value in weights if not value.isfinite().all()]
    remedy = (
        f"Its weights do, too ({broken[0]}): fetch or train it again."
        if broken
        else "If it runs in float16, use a `dtype` with a wider range, bfloat16 or float32."
    )
    return ValueError(f"{what}, computed by the {name}, contain NaN or infinity. {remedy}")
