"""The half of the pipeline that draws noise and follows the decoder's velocity to latents.

Letters: B batch, C latent channels, h w latent grid, k codes, Q code dimensions.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..models.default_steps import steps_for
from ..models.latents import downsampling_factor
from ..models.modeling_decoder import FlexTokFlowDecoder
from ..models.packed_linear import packed_weights
from . import input_checks as inputs
from .flow import set_noise_levels
from .guided_velocity import GuidanceScale, GuidedVelocity
from .images import OUTPUT_TYPES
from .mean_velocity import MeanVelocity, check_scales, check_scheduler
from .sizes import Size, SizeRules, check_latents


StepCallback = Callable[[Any, int, Tensor, dict], dict | None]


class DecoderHalf(DiffusionPipeline):
    """What a pipeline with a flow decoder and a scheduler does with them."""

    decoder: FlexTokFlowDecoder
    vae: AutoencoderKL | None
    scheduler: SchedulerMixin
    _callback_tensor_inputs = ["latents"]
    # of a run; each has a copy of the pipeline with values of its own
    _num_timesteps: int | None = None
    _interrupt = False

    @property
    def num_timesteps(self) -> int | None:
        """Number of decoder steps of the run that a callback belongs to; `None` outside of one."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether a callback has stopped its run, with `pipe._interrupt = True`."""
        return self._interrupt

    @property
    def latent_size(self) -> int:
        """Side length of the square latents."""
        return self.decoder.config.grid_size * self.decoder.config.patch_size

    @property
    def resolution(self) -> int:
        """Side length of the square images, in pixels."""
        return self.latent_size * downsampling_factor(self.vae)

    def check_decoding(
        self, num_inference_steps: int | None, guidance_scale: GuidanceScale | None, guidance: str, output_type: str
    ) -> dict[str, Any]:
        """Check the sampling options of the flow decoder; return them with the default guidance scale filled in.

        The number of steps stays `None` if it is, since the default depends on the number of tokens.
        """
        if guidance_scale is None:
            guidance_scale = self.config.default_guidance_scale
        max_steps = self.scheduler.config.num_train_timesteps
        kinds = (*OUTPUT_TYPES, "latent")
        inputs.check_sampling(num_inference_steps, guidance_scale, guidance, output_type, max_steps, kinds)
        if self.decoder.predicts_mean and not callable(guidance_scale):
            check_scales(self.decoder, [float(guidance_scale)], guidance)
        return {
            "num_inference_steps": None if num_inference_steps is None else int(num_inference_steps),
            "guidance_scale": guidance_scale,
            "guidance": guidance,
            "output_type": output_type,
        }

    def choose_steps(self, num_inference_steps: int | None, counts: Sequence[int]) -> int:
        """Return the number of steps for a batch of images with these numbers of tokens: the most that any needs."""
        if num_inference_steps is not None:
            return num_inference_steps
        default = self.decoder.config.default_num_inference_steps
        return min(max(steps_for(default, count) for count in counts), self.scheduler.config.num_train_timesteps)

    def check_callback(self, callback: StepCallback | None, tensor_inputs: Sequence[str]) -> dict[str, Any]:
        """Check a callback and the tensors it asks for; return them as arguments of `integrate_flow`."""
        tensor_inputs = getattr(callback, "tensor_inputs", tensor_inputs)  # `PipelineCallback`s bring their own
        inputs.check_callback(callback, tensor_inputs, self._callback_tensor_inputs)
        return {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": tensor_inputs}

    def prepare_latents(
        self,
        batch_size: int,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | Sequence[Tensor] | None = None,
        sizes: Sequence[Size] | None = None,
    ) -> Tensor | list[Tensor]:
        """Draw the initial noise, float32, or check the one that was passed.

        Args:
            batch_size: number of images B.
            generator: one for all, or one per image.
            latents: noise to use, (B, C, h, w) or a list of (C, h, w).
            sizes: height and width of the images in pixels, one for all or one each; by default those of `latents`,
                otherwise the square.

        Returns:
            Noise (B, C, h, w); a list of (C, h, w) if the sizes differ.
        """
        config, device = self.decoder.config, self._execution_device
        factor = self.resolution // self.latent_size  # pixels per latent cell
        square = (self.latent_size, self.latent_size)
        shapes = [square] if sizes is None else [(height // factor, width // factor) for height, width in sizes]
        if latents is not None:
            rules = SizeRules(config.patch_size, self.latent_size, config.positions == "stretch")
            wanted = None if sizes is None else shapes * (batch_size // len(shapes))
            checked = check_latents(latents, batch_size, config.in_channels, rules, wanted)
            move = {"device": device, "dtype": torch.float32}
            return checked.to(**move) if isinstance(checked, Tensor) else [noise.to(**move) for noise in checked]
        # a single generator also draws image by image, so that a batch starts with the noise that one image gets
        generators = [generator] * batch_size if isinstance(generator, torch.Generator) else generator
        if len(set(shapes)) == 1:
            return randn_tensor((batch_size, config.in_channels, *shapes[0]), generators, device, torch.float32)
        own = [None] * batch_size if generators is None else generators
        return [
            randn_tensor((config.in_channels, *shape), generator, device, torch.float32)
            for shape, generator in zip(shapes, own, strict=True)
        ]

    def integrate_flow(
        self,
        latents: Tensor,
        codes: Tensor,
        num_tokens: Tensor,
        num_inference_steps: int,
        guidance_scale: GuidanceScale = 1.0,
        guidance: str = "apg",
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> Tensor:
        """Follow the velocity from noise (B, C, h, w) at sigma 1 to latents at sigma 0."""
        run = copy.copy(self)  # schedulers count steps: each run has its own, so that threads do not meet
        run.__dict__.update(scheduler=copy.deepcopy(self.scheduler), _interrupt=False)
        check_scheduler(self.decoder, run.scheduler)
        sigmas = set_noise_levels(run.scheduler, num_inference_steps, latents.device)
        timesteps = run.scheduler.timesteps
        run._num_timesteps = len(timesteps)
        kind: Any = GuidedVelocity
        if self.decoder.predicts_mean:
            kind, sigmas = MeanVelocity, run.scheduler.sigmas.cpu()  # with the one after the last step
        velocity_at = kind(self.decoder, sigmas, codes, num_tokens, guidance_scale, guidance, latents.shape)
        loop = packed_weights(self.decoder, num_calls=len(timesteps))
        with loop, self.progress_bar(total=len(timesteps)) as progress_bar:
            for step, timestep in enumerate(timesteps):
                latents = run.scheduler.step(velocity_at(latents, step), timestep, latents, return_dict=False)[0]
                if callback_on_step_end is not None:
                    named = {"latents": latents} if "latents" in callback_on_step_end_tensor_inputs else {}
                    changes = callback_on_step_end(run, step, timestep, named)
                    latents = inputs.apply_changes(changes, latents)
                progress_bar.update()
                if run.interrupt:
                    break
        if not latents.isfinite().all():
            raise ValueError(
                "The decoder's latents are not finite: its weights are damaged, `guidance_scale` is too large, or its"
                f" precision ({self.decoder.dtype}) is too low. Load the model again in float32 or bfloat16."
            )
        return latents
