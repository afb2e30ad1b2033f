"""Guidance: push a conditional velocity away from the unconditional one."""

from collections.abc import Callable

import torch
from torch import Tensor


GUIDANCE_METHODS = ("apg", "cfg")


def check_guidance(method: str) -> None:
    """Raise a ValueError if `method` is not a known guidance method."""
    if not isinstance(method, str) or method not in GUIDANCE_METHODS:
        raise ValueError(f"`guidance` must be one of {', '.join(GUIDANCE_METHODS)}, got {method!r}.")


class Guidance:
    """Guidance for one sampling run.

    "cfg" is classifier-free guidance (Ho and Salimans, 2022, https://arxiv.org/abs/2207.12598). "apg" is adaptive
    projected guidance (Sadat et al., 2024, https://arxiv.org/abs/2410.02416, algorithm 1): the updates are accumulated
    with negative momentum, their norm is capped, and only the part orthogonal to the conditional velocity is used,
    which avoids oversaturation at high scales. With either method, a scale of 1 means no guidance.
    """

    momentum = -0.5
    norm_threshold = 2.5

    def __init__(self, method: str = "apg"):
        check_guidance(method)
        self.method = method
        self.running_update: Tensor | float = 0.0

    def __call__(self, conditional: Tensor, unconditional: Tensor, guidance_scale: float) -> Tensor:
        """Combine two velocities (B, C, h, w) of the same step; call it once per step, in order."""
        update = conditional - unconditional
        if self.method == "cfg":
            return unconditional + guidance_scale * update
        self.running_update = update + self.momentum * self.running_update
        update = clip_norm(self.running_update, self.norm_threshold)
        return conditional + (guidance_scale - 1) * remove_projection(update, conditional)

    def limit(self, conditional: Tensor, unconditional: Tensor, guidance_scale: Tensor) -> Tensor:
        """Combine two velocities as a run of infinitely many steps does, without having called it before.

        From step to step the updates then hardly differ, and the momentum m adds them up to 1 / (1 - m) times one.

        Args:
            conditional, unconditional: (B, C, h, w).
            guidance_scale: one per sample, (B,).
        """
        scale = guidance_scale.view(-1, 1, 1, 1)
        update = conditional - unconditional
        if self.method == "cfg":
            return unconditional + scale * update
        update = clip_norm(update / (1 - self.momentum), self.norm_threshold)
        return conditional + (scale - 1) * remove_projection(update, conditional)


def guidance_interval(guidance_scale: float, low: float, high: float) -> Callable[[float], float]:
    """Guide only at noise levels from `low` to `high`, which halves the cost of the other steps.

    Guidance does little for the image at the lowest and highest levels (Kynkaanniemi et al., 2024,
    https://arxiv.org/abs/2404.07724). Pass the result as `guidance_scale` to the pipeline.
    """
    return lambda sigma: guidance_scale if low <= sigma <= high else 1.0


def clip_norm(update: Tensor, threshold: float) -> Tensor:
    """Clip every sample of (B, C, h, w) to a Euclidean norm of at most `threshold`."""
    norm = update.norm(p=2, dim=(1, 2, 3), keepdim=True)
    return update * torch.clamp(threshold / norm, max=1.0)


def remove_projection(update: Tensor, direction: Tensor) -> Tensor:
    """Remove from every sample of (B, C, h, w) its component along `direction`."""
    # float64 like the official code, where the device supports it: the projection subtracts nearly equal numbers
    dtype = torch.float32 if update.device.type == "mps" else torch.float64
    unit = torch.nn.functional.normalize(direction.to(dtype), dim=(1, 2, 3))
    component = (update.to(dtype) * unit).sum(dim=(1, 2, 3), keepdim=True)
    return (update.to(dtype) - component * unit).to(update.dtype)
