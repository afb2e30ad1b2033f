"""Stage 0: train the VAE that turns images into latents and latents into images.

Letters: B batch, C latent channels, h w latent grid.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn

from .adversarial import PatchDiscriminator, adaptive_weight, discriminator_loss, generator_loss
from .arguments import VaeArguments
from .perceptual import PerceptualDistance
from .setup import loading
from .step_rng import StepRng


class VaeForTraining(nn.Module):
    """A VAE with its loss: reconstruction, KL divergence, and optionally perceptual and adversarial terms."""

    def __init__(self, vae: AutoencoderKL, arguments: VaeArguments):
        super().__init__()
        self.vae = vae
        self.arguments = arguments
        self.discriminator = PatchDiscriminator() if arguments.adversarial_weight > 0 else None
        perceptual = None
        if arguments.perceptual_network is not None:
            with loading("perceptual_network", arguments.perceptual_network):
                perceptual = PerceptualDistance(arguments.perceptual_network)
        self.frozen = {"perceptual": perceptual}  # in a dictionary, so that its weights are neither trained nor saved

    def forward(self, batch: dict[str, Tensor], step: int, rng: StepRng) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of a batch.

        Args:
            batch: `pixel_values` (B, 3, H, W) in [-1, 1].
            step: optimizer steps done so far.
            rng: source of the posterior noise, on the device of the model.

        Returns:
            The loss, and metrics to log.
        """
        arguments = self.arguments
        # 1. Images -> posterior -> latents -> reconstructions
        pixel_values = batch["pixel_values"].to(self.vae.device, non_blocking=True)
        moments = self.vae.encode(pixel_values).latent_dist.parameters  # (B, 2 C, h, w)
        posterior = DiagonalGaussianDistribution(moments.float())
        latents = posterior.mean + posterior.std * rng.normal_like(posterior.mean)  # (B, C, h, w)
        reconstruction = self.vae.decode(latents).sample.float()  # (B, 3, H, W)

        # 2. Losses, each a mean per pixel value or per latent value, so that loss weights fit any size
        distance = F.l1_loss if arguments.reconstruction_loss == "l1" else F.mse_loss
        loss = distance(reconstruction, pixel_values)
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        metrics = {"reconstruction_loss": loss.detach(), "kl": kl.detach()}
        if self.frozen["perceptual"] is not None:
            perceptual = self.frozen["perceptual"].to(pixel_values.device)(reconstruction, pixel_values)
            metrics["perceptual_loss"] = perceptual.detach()
            loss = loss + arguments.perceptual_weight * perceptual
        total = loss + arguments.kl_weight * kl
        if self.discriminator is None or not self.training:
            return total, metrics
        if step < arguments.adversarial_start:
            # a zero gradient, as distributed training expects one for every parameter in every step
            return total + 0.0 * sum(weight.sum() for weight in self.discriminator.parameters()), metrics
        adversarial = generator_loss(self.discriminator, reconstruction)
        weight = adaptive_weight(loss, adversarial, self.vae.decoder.conv_out.weight)
        hinge = discriminator_loss(self.discriminator, pixel_values, reconstruction.detach())
        metrics |= {"generator_loss": adversarial.detach(), "discriminator_loss": hinge.detach()}
        return total + arguments.adversarial_weight * weight * adversarial + hinge, metrics


def build_vae(arguments: VaeArguments) -> AutoencoderKL:
    """Build a new VAE with the sizes in the options, or load `pretrained_vae`."""
    vae = None
    if arguments.pretrained_vae is not None:
        with loading("pretrained_vae", arguments.pretrained_vae):
            vae = AutoencoderKL.from_pretrained(arguments.pretrained_vae)
    num_blocks = len(arguments.block_out_channels if vae is None else vae.config.block_out_channels)
    if arguments.resolution % 2 ** (num_blocks - 1):
        raise ValueError(
            f"`resolution` {arguments.resolution} must be a multiple of {2 ** (num_blocks - 1)}, the downsampling"
            f" factor of {num_blocks} `block_out_channels`."
        )
    if vae is not None:
        return vae
    if any(channels % arguments.norm_num_groups for channels in arguments.block_out_channels):
        raise ValueError(
            f"`block_out_channels` {arguments.block_out_channels} must be multiples of `norm_num_groups`"
            f" ({arguments.norm_num_groups})."
        )
    return AutoencoderKL(
        block_out_channels=tuple(arguments.block_out_channels),
        down_block_types=("DownEncoderBlock2D",) * num_blocks,
        up_block_types=("UpDecoderBlock2D",) * num_blocks,
        layers_per_block=arguments.layers_per_block,
        latent_channels=arguments.latent_channels,
        norm_num_groups=arguments.norm_num_groups,
        sample_size=arguments.resolution,
        scaling_factor=1.0,  # measured at the end
    )


@torch.no_grad()
def measure_scaling_factor(vae: AutoencoderKL, batches: Iterable[Tensor]) -> float:
    """Return the factor that scales the latents of images (B, 3, H, W) to unit variance around their mean."""
    count, total, squares = 0, 0.0, 0.0
    for pixel_values in batches:
        latents = vae.encode(pixel_values.to(vae.device, vae.dtype)).latent_dist.mode().double()  # (B, C, h, w)
        count += latents.numel()
        total += latents.sum().item()
        squares += latents.square().sum().item()
    return (squares / count - (total / count) ** 2) ** -0.5
