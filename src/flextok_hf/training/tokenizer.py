"""Stage 1: train encoder, quantizer and flow decoder together with the rectified-flow loss."""

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from ..configuration_encoder import FlexTokEncoderConfig
from ..flow import add_noise, sample_sigma, velocity_target
from ..length_groups import LengthGroups
from ..modeling_decoder import FlexTokFlowDecoder
from ..modeling_encoder import FlexTokEncoder
from ..nested_dropout import sample_num_tokens
from .arguments import TokenizerArguments
from .caching import latents_of


FADE_SHARE = 0.4  # part of the training over which the aids against collapsed codes fade out


class TokenizerForTraining(nn.Module):
    """Encoder and decoder with their loss, one module for all ways of distributing it."""

    def __init__(self, encoder: FlexTokEncoder, decoder: FlexTokFlowDecoder, arguments: TokenizerArguments, vae=None):
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.arguments = arguments
        self.frozen = {"vae": vae}  # in a dictionary, so that its weights are neither trained nor saved

    def forward(
        self, batch: dict[str, Tensor], step: int, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of a batch.

        Args:
            batch: `pixel_values` (B, 3, H, W) in [-1, 1], or cached `latents` (B, C, h, w).
            step: optimizer steps done so far.
            generator: source of all randomness, on the device of the model.

        Returns:
            The loss, and figures to log.
        """
        # 1. Data, noise, and what each sample keeps of its tokens
        latents = latents_of(batch, self.frozen["vae"], self.encoder.device)  # (B, C, h, w)
        noise = torch.randn(latents.shape, generator=generator, device=latents.device)
        sigma, num_tokens, is_unconditional, is_rounded = self.draw(latents.shape[0], step, generator)

        # 2. Latents -> features -> codes -> velocity
        features = self.encoder.compute_features(latents)  # (B, K, Q)
        codes = self.encoder.quantizer(features, is_rounded)  # (B, K, Q)
        noisy_latents = add_noise(latents, noise, sigma)  # (B, C, h, w)
        if latents.device.type == "cpu" and not self.arguments.compile:
            groups = LengthGroups(self.decoder, codes, num_tokens, is_unconditional)
            velocity = groups.predict_velocity(noisy_latents, sigma)  # (B, C, h, w)
        else:  # compiled code wants batches of one shape, and an accelerator no wait for the lengths
            velocity = self.decoder(noisy_latents, sigma, codes, num_tokens, is_unconditional).velocity

        # 3. Loss
        flow_loss = F.mse_loss(velocity.float(), velocity_target(latents, noise).float())
        metrics = {"flow_loss": flow_loss.detach()}
        with torch.no_grad():
            token_ids = self.encoder.quantizer.codes_to_ids(self.encoder.quantizer(features))
            metrics["distinct_ids"] = count_distinct(token_ids)
        weight = self.arguments.feature_penalty * (1 - 5 / 6 * self.fade(step))
        if weight == 0:
            return flow_loss, metrics
        return flow_loss + weight * spread_penalty(features), metrics

    def draw(self, batch_size: int, step: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Draw noise levels, kept tokens, null conditions and which samples are rounded, each (B,)."""
        arguments = self.arguments
        sigma = sample_sigma(
            batch_size,
            arguments.sigma_distribution,
            arguments.logit_mean,
            arguments.logit_std,
            arguments.mode_scale,
            is_stratified=True,
            generator=generator,
        )
        num_registers = self.encoder.config.num_registers
        num_tokens = sample_num_tokens(batch_size, num_registers, arguments.keep_mode, generator)

        def happens(probability: float) -> Tensor:
            return torch.rand(batch_size, generator=generator, device=generator.device) < probability

        num_tokens = torch.where(happens(arguments.full_length_probability), num_registers, num_tokens)
        is_unconditional = happens(arguments.null_condition_probability)
        is_rounded = ~happens(arguments.unrounded_probability * (1 - self.fade(step)))
        return sigma, num_tokens, is_unconditional, is_rounded

    def fade(self, step: int) -> float:
        """How far the aids against collapsed codes have faded, from 0 at the start to 1."""
        return min(1.0, step / (FADE_SHARE * self.arguments.max_train_steps))


def spread_penalty(features: Tensor) -> Tensor:
    """Keep each feature near mean 0 and standard deviation 1 or more over the batch; plain FSQ collapses without it.

    Args:
        features: before quantization, (B, K, Q).

    Returns:
        Mean over K and Q, a scalar.
    """
    features = features.float()
    mean, std = features.mean(dim=0), features.std(dim=0, unbiased=False)
    return (mean.square() + F.relu(1 - std).square()).mean()


def count_distinct(token_ids: Tensor) -> Tensor:
    """Mean number of distinct ids per position of (B, K), as a scalar: 1 means that the codes collapsed."""
    ordered = token_ids.sort(dim=0).values
    return 1 + (ordered[1:] != ordered[:-1]).sum(dim=0).float().mean()


def build_tokenizer(
    arguments: TokenizerArguments, vae: AutoencoderKL | None
) -> tuple[FlexTokEncoder, FlexTokFlowDecoder]:
    """Make a fresh encoder and decoder of the sizes in the options; latents are pixels without a VAE."""
    channels, factor = 3, 1
    if vae is not None:
        channels, factor = vae.config.latent_channels, 2 ** (len(vae.config.block_out_channels) - 1)
    side = arguments.resolution // factor
    for name in ("encoder_patch_size", "decoder_patch_size"):
        if arguments.resolution % (factor * getattr(arguments, name)):
            raise ValueError(
                f"`resolution` {arguments.resolution} must be a multiple of {factor * getattr(arguments, name)},"
                f" `{name}` times {factor}, the reduction of the VAE."
            )
    encoder = FlexTokEncoder(
        FlexTokEncoderConfig(
            in_channels=channels,
            patch_size=arguments.encoder_patch_size,
            grid_size=side // arguments.encoder_patch_size,
            hidden_size=arguments.encoder_hidden_size,
            num_hidden_layers=arguments.encoder_num_layers,
            head_dim=arguments.head_dim,
            num_registers=arguments.num_registers,
            fsq_levels=arguments.fsq_levels,
        )
    )
    decoder = FlexTokFlowDecoder(
        in_channels=channels,
        patch_size=arguments.decoder_patch_size,
        grid_size=side // arguments.decoder_patch_size,
        hidden_size=arguments.decoder_hidden_size,
        num_layers=arguments.decoder_num_layers,
        head_dim=arguments.head_dim,
        num_registers=arguments.num_registers,
        code_dim=len(arguments.fsq_levels),
    )
    return encoder, decoder
