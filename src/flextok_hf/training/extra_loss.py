"""A loss of one's own in the training of a tokenizer, given as `module:function`."""

import importlib
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..models.latents import decode_latents


# Called with the images, their reconstructions and their token ids
ExtraLoss = Callable[..., Tensor]


def load_extra_loss(name: str) -> ExtraLoss:
    """Import a function by "module:function".

    Raises:
        ValueError: the name has another form, or there is no such module or function.
    """
    module, colon, function = name.partition(":")
    if not colon or not all(piece.isidentifier() for piece in [*module.split("."), function]):
        raise ValueError(f"`extra_loss` must be of the form module:function, got {name!r}.")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"`extra_loss` {name!r} is not found: {error}. The module must be importable, for example in a folder of"
            " PYTHONPATH."
        ) from error
    if not callable(found):
        raise ValueError(f"`extra_loss` {name!r} is a {type(found).__name__}, not a function.")
    return found


def estimate_clean(noisy_latents: Tensor, velocity: Tensor, sigma: Tensor) -> Tensor:
    """Return the one-step estimate of the clean latents (B, C, h, w) at noise levels (B,).

    Noisy latents are (1 - sigma) latents + sigma noise, and the velocity is noise - latents (Liu et al., 2023,
    arXiv 2209.03003), so one step of size sigma leads back to the latents.
    """
    return noisy_latents - sigma.view(-1, 1, 1, 1) * velocity


def call_extra_loss(
    loss: ExtraLoss, vae: nn.Module | None, pixel_values: Tensor, latents: Tensor, token_ids: Tensor, **more: Any
) -> Tensor:
    """Decode estimated latents and call the loss.

    Args:
        loss: called as `loss(images=..., reconstructions=..., token_ids=..., num_tokens=..., sigma=...)`, images and
            reconstructions (B, 3, H, W) in [-1, 1], the latter with gradients; returns one number.
        vae: of the tokenizer, frozen; its decoder passes gradients on.
        pixel_values: the images.
        latents: estimated, (B, C, h, w).
        token_ids: (B, K).
        more: `num_tokens` (B,) that were kept, 0 where the tokens were ignored, and the noise level `sigma` (B,).

    Raises:
        ValueError: it does not return one number as a tensor.
    """
    value = loss(images=pixel_values, reconstructions=decode_latents(vae, latents), token_ids=token_ids, **more)
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"`extra_loss` must return a tensor with one number, got {got}. Take the mean over the images."
        )
    return value.reshape(())
