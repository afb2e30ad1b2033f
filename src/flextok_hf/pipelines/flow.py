"""Rectified flow: noise levels, the straight path between data and noise, and its velocity.

Liu et al., 2022, https://arxiv.org/abs/2209.03003. Sigma is the fraction of noise: 0 is data, 1 is noise.
"""

import math

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, SchedulerMixin
from torch import Tensor


SIGMA_DISTRIBUTIONS = ("logit_normal", "mode", "uniform")


def sample_sigma(
    batch_size: int,
    distribution: str = "logit_normal",
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
    mode_scale: float = 0.25,
    is_stratified: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw training noise levels.

    Args:
        batch_size: number of samples B.
        distribution: "logit_normal", "mode" (both Esser et al., 2024, https://arxiv.org/abs/2403.03206) or "uniform".
        logit_mean: mean of the normal before the sigmoid; positive means noisier.
        logit_std: its standard deviation.
        mode_scale: strength of the "mode" warp towards the middle.
        is_stratified: spread the draws of a batch evenly, which lowers the variance of the loss.
        generator: source of randomness; the result is on its device.

    Returns:
        Noise levels, (B,) float32 in [0, 1].
    """
    device = generator.device if generator is not None else None
    uniform = torch.rand(batch_size, generator=generator, device=device)
    if is_stratified:
        uniform = (torch.randperm(batch_size, generator=generator, device=device) + uniform) / batch_size
    if distribution == "uniform":
        return uniform
    if distribution == "mode":
        return mode_warp(uniform, mode_scale)
    if distribution == "logit_normal":
        # avoid the ends, where the inverse normal CDF is infinite
        normal = math.sqrt(2) * torch.erfinv(2 * uniform.clamp(1e-6, 1 - 1e-6) - 1)
        return torch.sigmoid(logit_mean + logit_std * normal)
    raise ValueError(f"`distribution` must be one of {', '.join(SIGMA_DISTRIBUTIONS)}, got {distribution!r}.")


def mode_warp(uniform: Tensor, scale: float) -> Tensor:
    """Warp uniform draws (B,) towards the middle noise levels (Esser et al., 2024, section 3.1, "mode sampling")."""
    return 1 - uniform - scale * (torch.cos(math.pi / 2 * uniform) ** 2 - 1 + uniform)


def add_noise(latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Interpolate from latents (B, C, h, w) towards noise of the same shape by the fraction `sigma`, (B,)."""
    return torch.lerp(latents, noise, sigma.to(latents).view(-1, 1, 1, 1))


def velocity_target(latents: Tensor, noise: Tensor) -> Tensor:
    """Direction of the straight path from latents to noise, (B, C, h, w)."""
    return noise - latents


def euler_sigmas(num_inference_steps: int) -> list[float]:
    """Noise levels at which Euler's method evaluates the velocity: uniform from 1 down to 1 / N.

    Diffusers' default grid ends at 0.001 instead, so these are passed to its scheduler explicitly.
    """
    return [step / num_inference_steps for step in range(num_inference_steps, 0, -1)]


def set_noise_levels(scheduler: SchedulerMixin, num_inference_steps: int, device: torch.device) -> Tensor:
    """Prepare a scheduler for a run.

    Args:
        scheduler: `FlowMatchEulerDiscreteScheduler`, or another Diffusers scheduler that supports flow matching.
        num_inference_steps: number of steps; some schedulers evaluate the velocity twice per step.
        device: device of the timesteps.

    Returns:
        The noise level of each evaluation, on the CPU.

    Raises:
        ValueError: if the scheduler does not support flow matching, or is not configured for it.
    """
    config = scheduler.config
    is_converted = getattr(config, "use_flow_sigmas", False) and config.prediction_type == "flow_prediction"
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        scheduler.set_timesteps(sigmas=euler_sigmas(num_inference_steps), device=device)
    elif isinstance(scheduler, FlowMatchHeunDiscreteScheduler) or is_converted:
        scheduler.set_timesteps(num_inference_steps, device=device)
    else:
        raise ValueError(
            f"`scheduler` is a {type(scheduler).__name__} that is not set up for flow matching. Use"
            " `FlowMatchEulerDiscreteScheduler()` or, for example, `UniPCMultistepScheduler(use_flow_sigmas=True,"
            ' prediction_type="flow_prediction")`.'
        )
    sigmas = scheduler.sigmas[: len(scheduler.timesteps)].cpu()
    if not (sigmas.isfinite().all() and (sigmas.diff() <= 0).all()):
        raise ValueError(
            f"The noise levels of the `scheduler` must fall from step to step, got {sigmas.tolist()[:5]}. Check"
            " its configuration, such as `shift` and `shift_terminal`."
        )
    return sigmas
