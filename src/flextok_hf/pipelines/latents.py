"""Pixels <-> latents: a VAE with its scaling factor, or the identity for pixel-space models.

On the CPU, VAE inputs use the channels-last memory format, in which convolutions are computed there; on an H200 this
made encoding a fifth slower (docs/speed.md).
"""

import torch
from diffusers import AutoencoderKL
from torch import Tensor


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
