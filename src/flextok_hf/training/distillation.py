"""Distillation: the flow decoder learns the mean velocity over an interval of noise levels, for few steps.

From t to a lower level r the teacher's guided flow moves noisy latents by (t - r) u, where u is the mean of its
velocity on the way (MeanFlow, Geng et al., 2025, https://arxiv.org/abs/2505.13447). The student's last blocks read r
in place of t (Decoupled MeanFlow, Lee et al., 2025, https://arxiv.org/abs/2510.24474). Its targets come from runs of
the teacher from noise to data: between any two points of a run, u is the way over the time. Those papers derive u from
the student's own derivative instead, which needs no runs, but many more steps of training (docs/log.md).

Letters: B batch, S steps of the teacher, P intervals per image, C latent channels, h w latent grid, K registers,
Q code dimensions.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from ..data.latent_cache import latents_of
from ..models.modeling_decoder import FlexTokFlowDecoder
from ..models.modeling_encoder import FlexTokEncoder
from ..models.nested_dropout import sample_num_tokens
from ..pipelines.guidance import Guidance
from ..pipelines.length_groups import LengthGroups
from .distillation_arguments import STEP_COUNTS, DistillationArguments
from .starting_points import decoder_settings
from .step_rng import StepRng


FEW_TOKENS, FEW_TOKENS_SHARE = (1, 2, 4), 0.5  # where images change most along the path, and how often they are drawn
ERROR_POWER, ERROR_OFFSET = 0.5, 1e-3  # p and c of the adaptive weight 1 / (error + c)^p, MeanFlow's equation 22
DISTILLED_STEPS = 4  # default of a distilled decoder


def follow(velocity: Callable[[Tensor, float], Tensor], noise: Tensor, num_steps: int) -> tuple[Tensor, Tensor]:
    """Follow a flow from noise to data on a uniform grid of noise levels.

    Each step extrapolates from the last velocity and the one before (the two-step Adams-Bashforth method), which is as
    cheap as Euler's and an order more accurate.

    Args:
        velocity: of points (B, C, h, w) at one noise level, (B, C, h, w) float32.
        noise: points at level 1, (B, C, h, w).
        num_steps: S.

    Returns:
        The points at levels 1, 1 - 1 / S, ... 0, (S + 1, B, C, h, w), and the velocities at all but the last,
        (S, B, C, h, w).
    """
    points, velocities = [noise], []
    for step in range(num_steps):
        velocities.append(velocity(points[-1], 1 - step / num_steps))
        slope = velocities[-1] if step == 0 else 1.5 * velocities[-1] - 0.5 * velocities[-2]
        points.append(points[-1] - slope / num_steps)
    return torch.stack(points), torch.stack(velocities)


def mean_velocities(points: Tensor, velocities: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Return the mean velocity between two points of each path; of an empty interval, the velocity at its point.

    Args:
        points, velocities: as `follow` returns them, (S + 1, B, C, h, w) and (S, B, C, h, w).
        start: index of the first point, (P, B) in [0, S).
        end: index of the last point, (P, B) in [start, S].

    Returns:
        Mean velocities, (P, B, C, h, w).
    """
    paths = torch.arange(points.shape[1], device=points.device)
    sigma_change = ((end - start) / len(velocities))[..., None, None, None]
    way = points[start, paths] - points[end, paths]
    return torch.where(sigma_change > 0, way / sigma_change.clamp(min=1 / len(velocities)), velocities[start, paths])


def adaptive_loss(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss of predictions (B, C, h, w), and the squared errors, (B,) without a gradient.

    Each sample is weighted by 1 / (error + c)^p, so that intervals with large errors do not drown the others.
    """
    errors = (prediction.float() - target).square().flatten(1).mean(1)
    weights = (errors.detach() + ERROR_OFFSET) ** -ERROR_POWER
    return (weights * errors).mean(), errors.detach()


class DistillationForTraining(nn.Module):
    """A student decoder with its loss, in one module for DDP, FSDP or DeepSpeed to wrap.

    Args:
        student: the decoder to train, with the weights of the teacher and zeros for its own.
        teacher: the decoder that predicts the velocity.
        encoder: gives the codes; it is frozen, so tokens stay what they are.
        arguments: options of the stage.
        vae: frozen; `None` if latents are pixels.
    """

    _no_split_modules = ["DecoderBlock"]  # units that FSDP shards

    def __init__(
        self,
        student: FlexTokFlowDecoder,
        teacher: FlexTokFlowDecoder,
        encoder: FlexTokEncoder,
        arguments: DistillationArguments,
        vae: AutoencoderKL | None = None,
    ):
        super().__init__()
        self.decoder = student.requires_grad_(True)
        self.arguments = arguments
        # in a dictionary, so that their weights are neither trained nor saved
        self.frozen: dict[str, Any] = {"teacher": teacher, "encoder": encoder, "vae": vae}
        for model in filter(None, self.frozen.values()):
            model.requires_grad_(False).eval()
        self.guidance = Guidance("apg")

    def forward(self, batch: dict[str, Tensor], step: int, rng: StepRng) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of a batch; in evaluation mode, the mean squared error.

        Args:
            batch: `pixel_values` (B, 3, H, W) in [-1, 1], or cached `latents` (B, C, h, w).
            step: optimizer steps done so far; unused.
            rng: source of all randomness, on the device of the model.

        Returns:
            The loss, and metrics to log: squared errors of empty intervals, and of others.
        """
        # 1. Images -> codes
        with torch.no_grad():
            encoder = self.frozen["encoder"]
            latents = latents_of(batch, self.frozen["vae"], encoder.device)  # (B, C, h, w)
            codes = encoder.quantizer(encoder.compute_features(latents))  # (B, K, Q)
        noise = rng.normal_like(latents)
        num_tokens, scale, start, end = self.draw(latents.shape[0], rng)

        # 2. A run of the teacher from noise -> targets
        num_steps, num_intervals = self.arguments.teacher_steps, self.arguments.intervals_per_image
        flow = self.guided_flow(codes, num_tokens, scale)
        points, velocities = follow(flow, noise, num_steps)  # (S + 1, B, C, h, w), (S, B, C, h, w)
        target = mean_velocities(points, velocities, start, end).flatten(0, 1)  # (P * B, C, h, w)
        noisy_latents = points[start, torch.arange(len(codes), device=start.device)].flatten(0, 1)

        # 3. The student
        levels = {"sigma": 1 - start.flatten() / num_steps, "next_sigma": 1 - end.flatten() / num_steps}
        rows = (codes.repeat(num_intervals, 1, 1), num_tokens.repeat(num_intervals))
        levels["guidance_scale"] = scale.repeat(num_intervals)
        prediction = self.predict(self.decoder, noisy_latents, *rows, **levels)
        loss, errors = adaptive_loss(prediction, target)
        is_empty = (start == end).flatten()
        metrics = {
            "velocity_error": (errors * is_empty).sum() / is_empty.sum().clamp(min=1),
            "mean_velocity_error": (errors * ~is_empty).sum() / (~is_empty).sum().clamp(min=1),
        }
        return (loss if self.training else errors.mean()), metrics

    def draw(self, batch_size: int, rng: StepRng) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Draw numbers of tokens to keep and guidance scales, each (B,), and starts and ends of intervals, (P, B)."""
        arguments, generator = self.arguments, rng.generator
        num_registers, num_steps = self.decoder.config.num_registers, arguments.teacher_steps

        def uniform(count: int) -> Tensor:
            return torch.rand(count, generator=generator, device=generator.device)

        def choose(options: tuple[int, ...], count: int) -> Tensor:
            return torch.tensor(options, device=generator.device)[(uniform(count) * len(options)).long()]

        def draw_num_tokens(count: int) -> Tensor:
            few = choose(tuple(number for number in FEW_TOKENS if number <= num_registers), count)
            any_of_ladder = sample_num_tokens(count, num_registers, "powers_of_two", generator)
            return torch.where(uniform(count) < FEW_TOKENS_SHARE, few, any_of_ladder)

        def draw_interval(count: int) -> Tensor:
            length = num_steps // choose(STEP_COUNTS, count)
            start = (uniform(count) * (num_steps // length)).long() * length
            any_level = (uniform(count) * num_steps).long()
            is_empty = uniform(count) < arguments.empty_share
            return torch.stack([torch.where(is_empty, any_level, start), torch.where(is_empty, 0, length)], dim=1)

        num_tokens = rng.own(draw_num_tokens, batch_size)
        low, high = self.decoder.config.guidance_range
        scale = low + (high - low) * rng.own(uniform, batch_size)
        intervals = torch.stack([rng.own(draw_interval, batch_size) for _ in range(arguments.intervals_per_image)])
        start, length = intervals.unbind(dim=2)
        return num_tokens, scale, start, start + length

    def guided_flow(self, codes: Tensor, num_tokens: Tensor, scale: Tensor) -> Callable[[Tensor, float], Tensor]:
        """Return the teacher's velocity with guidance scales (B,), as a function of latents and one noise level."""
        teacher = self.frozen["teacher"]
        copies = 1 if list(self.decoder.config.guidance_range) == [1, 1] else 2
        is_unconditional = torch.arange(copies * len(codes), device=codes.device) >= len(codes)
        rows = (codes.repeat(copies, 1, 1), num_tokens.repeat(copies), is_unconditional)

        @torch.no_grad()
        def velocity(noisy_latents: Tensor, sigma: float) -> Tensor:
            level = torch.full((len(is_unconditional),), sigma, device=codes.device)
            velocity = self.predict(teacher, noisy_latents.repeat(copies, 1, 1, 1), *rows, sigma=level).float()
            if copies == 1:
                return velocity
            conditional, unconditional = velocity.chunk(2)
            return self.guidance.limit(conditional, unconditional, scale)

        return velocity

    def predict(
        self,
        decoder: FlexTokFlowDecoder,
        noisy_latents: Tensor,
        codes: Tensor,
        num_tokens: Tensor,
        is_unconditional: Tensor | None = None,
        **levels: Tensor,
    ) -> Tensor:
        """Return what a decoder predicts, (B, C, h, w), from levels named as in its `forward`."""
        if is_unconditional is None:
            is_unconditional = torch.zeros_like(num_tokens, dtype=torch.bool)
        if noisy_latents.device.type == "cpu" and not self.arguments.compile:
            groups = LengthGroups(decoder, codes, num_tokens, is_unconditional)
            return groups.predict_velocity(noisy_latents, **levels)
        sigma = levels.pop("sigma")  # compiled code needs one batch shape
        return decoder(noisy_latents, sigma, codes, num_tokens, is_unconditional, **levels).velocity


def build_student(teacher: FlexTokFlowDecoder, arguments: DistillationArguments) -> FlexTokFlowDecoder:
    """Return a decoder of mean velocities with a teacher's weights: with an empty interval, it predicts the same.

    Args:
        teacher: predicts the velocity.
        arguments: with both guidance scales; without `interval_blocks`, a third of the blocks, rounded up.

    Raises:
        ValueError: if the teacher is distilled already, or has fewer blocks.
    """
    if teacher.predicts_mean:
        raise ValueError(
            "`pretrained_tokenizer` is distilled already: its decoder predicts the mean velocity. Distill the model"
            " that it was made from."
        )
    interval_blocks, scales = arguments.interval_blocks, [arguments.min_guidance_scale, arguments.max_guidance_scale]
    if interval_blocks is None:
        interval_blocks = math.ceil(teacher.config.num_layers / 3)
    changes = {"predicts": "mean_velocity", "interval_blocks": interval_blocks, "guidance_range": scales}
    settings = decoder_settings(teacher, **changes, default_num_inference_steps=DISTILLED_STEPS)
    student = FlexTokFlowDecoder(**settings)
    left = student.load_state_dict(teacher.state_dict(), strict=False)
    assert left.missing_keys == ["guidance_proj.weight"] and not left.unexpected_keys
    return student
