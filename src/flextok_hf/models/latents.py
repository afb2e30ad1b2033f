"""Pixels <-> latents: a VAE with its scaling factor, or the identity for pixel-space models.

On the CPU, VAE inputs use the channels-last memory format, in which convolutions are computed there; on an H200 this
made encoding a fifth slower (docs/speed.md).

Letters: B batch, C latent channels, h w latent grid, H W image height and width, K registers.
"""

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn


@torch.no_grad()
def encode_latents(vae: AutoencoderKL | None, pixel_values: Tensor) -> Tensor:
    """Encode images (B, 3, H, W) in [-1, 1] as latents (B, C, h, w) of about unit variance.

    Uses the mean of the VAE's posterior, not a sample, so that tokenizing an image always gives the same ids.
    """
    if vae is None:
        return pixel_values
    return vae.encode(_prepare(pixel_values, vae)).latent_dist.mode() * vae.config.scaling_factor


def decode_latents(vae: AutoencoderKL | None, latents: Tensor) -> Tensor:
    """Decode latents (B, C, h, w) as images (B, 3, H, W), roughly in [-1, 1] and not clamped."""
    if vae is None:
        return latents
    return vae.decode(_prepare(latents / vae.config.scaling_factor, vae)).sample


def _prepare(tensor: Tensor, vae: AutoencoderKL) -> Tensor:
    layout = torch.channels_last if tensor.device.type == "cpu" else torch.preserve_format
    return tensor.to(vae.dtype, memory_format=layout)


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
