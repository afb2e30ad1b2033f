"""Pixels <-> latents: a VAE with its scaling factor, or the identity for models that work on pixels.

On the CPU, what goes into the VAE has its channels last in memory, which is the order that convolutions compute in
there; on an H200 that made encoding a fifth slower (docs/speed.md).
"""

import torch
from diffusers import AutoencoderKL
from torch import Tensor


@torch.no_grad()
def encode_latents(vae: AutoencoderKL | None, pixel_values: Tensor) -> Tensor:
    """Encode images (B, 3, H, W) in [-1, 1] as latents (B, C, h, w) of about unit variance.

    The mean of the VAE's posterior is taken, not a sample, so that tokenizing an image always gives the same ids.
    """
    if vae is None:
        return pixel_values
    return vae.encode(_prepare(pixel_values, vae)).latent_dist.mode() * vae.config.scaling_factor


def decode_latents(vae: AutoencoderKL | None, latents: Tensor) -> Tensor:
    """Decode latents (B, C, h, w) as images (B, 3, H, W), about [-1, 1] and not clamped."""
    if vae is None:
        return latents
    return vae.decode(_prepare(latents / vae.config.scaling_factor, vae)).sample


def _prepare(tensor: Tensor, vae: AutoencoderKL) -> Tensor:
    layout = torch.channels_last if tensor.device.type == "cpu" else torch.preserve_format
    return tensor.to(vae.dtype, memory_format=layout)
