"""Distillation: the flow decoder learns the mean velocity over an interval of noise levels, for few steps.

From t to a lower level r the teacher's guided flow moves noisy latents by (t - r) u, where u is the mean of its
velocity v on the way. Differentiating along the path gives u = v - (t - r) du/dt, which needs no run of the teacher:
the student learns it with its own derivative in the target (MeanFlow, Geng et al., 2025,
https://arxiv.org/abs/2505.13447). Its last blocks read r in place of t (Decoupled MeanFlow, Lee et al., 2025,
https://arxiv.org/abs/2510.24474).

Letters: B batch, C latent channels, h w latent grid, K registers, Q code dimensions.
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
from ..pipelines.flow import add_noise, sample_sigma
from ..pipelines.guidance import Guidance
from ..pipelines.length_groups import LengthGroups
from .distillation_arguments import DistillationArguments
from .starting_points import decoder_settings
from .step_rng import StepRng


# In noise level. Decoders are not smooth on a finer scale: their features turn up to 20 radians in this difference. Of
# the embedded model, derivatives differ by 10% from those of 0.05, but with 0.005 by half and more.
DIFFERENCE = 0.02
FEW_TOKENS, FEW_TOKENS_SHARE = (1, 2, 4), 0.5  # where images change most along the path, and how often they are drawn
ERROR_POWER, ERROR_OFFSET = 1.0, 1e-3  # p and c of the adaptive weight 1 / (error + c)^p, MeanFlow's table 1
DISTILLED_STEPS = 4  # default of a distilled decoder


def mean_velocity_target(
    predict: Callable[[Tensor, Tensor], Tensor],
    velocity: Tensor,
    noisy_latents: Tensor,
    sigma: Tensor,
    next_sigma: Tensor,
) -> Tensor:
    """Return what the mean velocity should be, v - (t - r) du/dt, by central differences along the path.

    Near noise, where there is no level above, the target is a step of the teacher to the level below and the student's
    mean velocity from there, which is the same to first order: a one-sided difference would multiply the student's own
    error by (t - r) / `DIFFERENCE`.

    Args:
        predict: mean velocity of noisy latents (B, C, h, w) from levels (B,) to `next_sigma`; called twice.
        velocity: of the teacher at `sigma`, (B, C, h, w).
        noisy_latents: (B, C, h, w).
        sigma: noise levels t, (B,) in [0, 1].
        next_sigma: lower noise levels r, (B,) in [0, t].

    Returns:
        The target, (B, C, h, w) float32, without a gradient.
    """
    length = (sigma - next_sigma).view(-1, 1, 1, 1)
    lower, upper = torch.maximum(sigma - DIFFERENCE, next_sigma), sigma + DIFFERENCE
    is_near_noise = (upper > 1).view(-1, 1, 1, 1)
    upper = upper.clamp(max=1)

    def predict_at(level: Tensor) -> Tensor:
        return predict(noisy_latents + (level - sigma).view(-1, 1, 1, 1) * velocity, level).float()

    with torch.no_grad():
        velocity, after, before = velocity.float(), predict_at(lower), predict_at(upper)
        tiny = torch.finfo(torch.float32).tiny  # of an empty interval, only the velocity itself counts
        step = (sigma - lower).view(-1, 1, 1, 1)
        composed = torch.lerp(after, velocity, torch.where(length > 0, step / length.clamp(min=tiny), 1.0))
        derivative = (before - after) / (upper - lower).clamp(min=tiny).view(-1, 1, 1, 1)
        return torch.where(is_near_noise, composed, velocity - length * derivative)


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
            The loss, and metrics to log: squared errors where the interval is empty, and where it is not.
        """
        # 1. Images -> codes; noisy latents on their way to noise
        with torch.no_grad():
            encoder = self.frozen["encoder"]
            latents = latents_of(batch, self.frozen["vae"], encoder.device)  # (B, C, h, w)
            codes = encoder.quantizer(encoder.compute_features(latents))  # (B, K, Q)
        noise = rng.normal_like(latents)
        sigma, next_sigma, num_tokens, scale = self.draw(latents.shape[0], rng)
        # every other sample of the step: where the interval is empty, the student learns the teacher's velocity
        empty, full = slice(rng.first % 2, None, 2), slice((rng.first + 1) % 2, None, 2)
        next_sigma[empty] = sigma[empty]
        noisy_latents = add_noise(latents.float(), noise, sigma)

        # 2. The teacher's velocity, and with it the target; the derivative needs the precision of float32
        velocity = self.guided_velocity(noisy_latents, sigma, codes, num_tokens, scale)
        target = velocity.clone()

        def predict(noisy_latents: Tensor, sigma: Tensor) -> Tensor:
            levels = {"sigma": sigma, "next_sigma": next_sigma[full], "guidance_scale": scale[full]}
            return self.predict(self.decoder, noisy_latents, codes[full], num_tokens[full], **levels)

        if len(sigma[full]):
            with torch.autocast(latents.device.type, enabled=False):
                ends = (noisy_latents[full], sigma[full], next_sigma[full])
                target[full] = mean_velocity_target(predict, velocity[full], *ends)

        # 3. The student
        levels = {"sigma": sigma, "next_sigma": next_sigma, "guidance_scale": scale}
        prediction = self.predict(self.decoder, noisy_latents, codes, num_tokens, **levels)
        loss, errors = adaptive_loss(prediction, target)
        metrics = {
            "velocity_error": errors[empty].sum() / max(1, len(errors[empty])),
            "mean_velocity_error": errors[full].sum() / max(1, len(errors[full])),
        }
        return (loss if self.training else errors.mean()), metrics

    def draw(self, batch_size: int, rng: StepRng) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Draw noise levels, lower ones, numbers of tokens to keep, and guidance scales, each (B,)."""
        arguments, generator = self.arguments, rng.generator
        num_registers = self.decoder.config.num_registers

        def uniform(count: int) -> Tensor:
            return torch.rand(count, generator=generator, device=generator.device)

        def draw_sigma(count: int) -> Tensor:
            shape = (arguments.sigma_distribution, arguments.logit_mean, arguments.logit_std, arguments.mode_scale)
            return sample_sigma(count, *shape, is_stratified=True, generator=generator)

        def draw_num_tokens(count: int) -> Tensor:
            few = torch.tensor([number for number in FEW_TOKENS if number <= num_registers], device=generator.device)
            chosen = few[(uniform(count) * len(few)).long()]
            any_of_ladder = sample_num_tokens(count, num_registers, "powers_of_two", generator)
            return torch.where(uniform(count) < FEW_TOKENS_SHARE, chosen, any_of_ladder)

        sigma, share = rng.own(draw_sigma, batch_size), rng.own(uniform, batch_size)
        # samplers begin with noise alone, which no distribution draws, and one step ends with data
        sigma = torch.where(rng.bernoulli(arguments.noise_probability, batch_size), 1.0, sigma)
        share = torch.where(rng.bernoulli(arguments.data_probability, batch_size), 0.0, share)
        num_tokens = rng.own(draw_num_tokens, batch_size)
        low, high = self.decoder.config.guidance_range
        return sigma, sigma * share, num_tokens, low + (high - low) * rng.own(uniform, batch_size)

    @torch.no_grad()
    def guided_velocity(
        self, noisy_latents: Tensor, sigma: Tensor, codes: Tensor, num_tokens: Tensor, scale: Tensor
    ) -> Tensor:
        """Return the teacher's velocity (B, C, h, w) float32 with guidance scales (B,)."""
        teacher = self.frozen["teacher"]
        if self.decoder.config.guidance_range[1] == self.decoder.config.guidance_range[0] == 1:
            return self.predict(teacher, noisy_latents, codes, num_tokens, sigma=sigma).float()
        is_unconditional = torch.arange(2 * len(sigma), device=sigma.device) >= len(sigma)
        rows = (noisy_latents.repeat(2, 1, 1, 1), codes.repeat(2, 1, 1), num_tokens.repeat(2), is_unconditional)
        conditional, unconditional = self.predict(teacher, *rows, sigma=sigma.repeat(2)).float().chunk(2)
        return self.guidance.limit(conditional, unconditional, scale)

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
