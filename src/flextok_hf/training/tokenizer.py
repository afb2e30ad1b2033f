"""Stage 1: train encoder, quantizer and flow decoder together with the rectified-flow loss.

Letters: B batch, C latent channels, h w latent grid, N patches, K registers, D hidden size, Q code dimensions.
"""

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from ..data.latent_cache import latents_of
from ..models.configuration_encoder import FlexTokEncoderConfig, check_token_layout
from ..models.latents import downsampling_factor
from ..models.modeling_decoder import FlexTokFlowDecoder
from ..models.modeling_encoder import FlexTokEncoder
from ..models.nested_dropout import sample_num_tokens
from ..pipelines.flow import add_noise, sample_sigma, velocity_target
from ..pipelines.length_groups import LengthGroups
from .arguments import TokenizerArguments
from .collapse import correlation_penalty, count_distinct, spread_penalty
from .extra_loss import call_extra_loss, estimate_clean, load_extra_loss
from .repa import FeatureAlignment, LayerTap
from .step_rng import StepRng


FADE_SHARE = 0.4  # fraction of training over which the measures against code collapse fade out


class TokenizerForTraining(nn.Module):
    """Encoder and decoder with their loss, in one module for DDP, FSDP or DeepSpeed to wrap."""

    _no_split_modules = ["EncoderBlock", "DecoderBlock"]  # units that FSDP shards

    def __init__(
        self,
        encoder: FlexTokEncoder,
        decoder: FlexTokFlowDecoder,
        arguments: TokenizerArguments,
        vae: AutoencoderKL | None = None,
    ):
        super().__init__()
        self.encoder = encoder.requires_grad_(not arguments.freeze_encoder)
        self.decoder = decoder
        self.arguments = arguments
        self.frozen = {"vae": vae}  # in a dictionary, so that its weights are neither trained nor saved
        self.extra_loss = None if arguments.extra_loss is None else load_extra_loss(arguments.extra_loss)
        self.alignment = None
        if arguments.repa_network is not None:
            if arguments.repa_layer >= len(decoder.transformer_blocks):
                raise ValueError(
                    f"`repa_layer` is {arguments.repa_layer}, but the decoder has blocks 0 to"
                    f" {len(decoder.transformer_blocks) - 1}."
                )
            config = decoder.config
            self.alignment = FeatureAlignment(arguments.repa_network, config.hidden_size, config.grid_size)
            self.tap = LayerTap(decoder.transformer_blocks[arguments.repa_layer])

    def forward(self, batch: dict[str, Tensor], step: int, rng: StepRng) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of a batch; in evaluation mode, only the flow loss.

        Args:
            batch: `pixel_values` (B, 3, H, W) in [-1, 1], or cached `latents` (B, C, h, w).
            step: optimizer steps done so far.
            rng: source of all randomness, on the device of the model.

        Returns:
            The loss, and metrics to log.
        """
        # 1. Images -> features -> codes
        arguments = self.arguments
        latents = latents_of(batch, self.frozen["vae"], self.encoder.device)  # (B, C, h, w)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not arguments.freeze_encoder):
            features = self.encoder.compute_features(latents)  # (B, K, Q)
        is_rounded = ~rng.bernoulli(arguments.unrounded_probability * (1 - self.fade(step)), latents.shape[0])
        codes = self.encoder.quantizer(features, is_rounded)  # (B, K, Q)

        # 2. Noisy images and codes -> velocity; with joint lengths, each image twice, with different noise
        copies = ["full", "drawn"] if arguments.joint_lengths else ["drawn"]
        noise = torch.cat([rng.normal_like(latents) for _ in copies])
        draws = [self.draw(latents.shape[0], rng, is_full=copy == "full") for copy in copies]
        sigma, num_tokens, is_unconditional = map(torch.cat, zip(*draws, strict=True))
        latents, codes = latents.repeat(len(copies), 1, 1, 1), codes.repeat(len(copies), 1, 1)
        noisy_latents = add_noise(latents, noise, sigma)  # (B, C, h, w)
        velocity, patches = self.predict(noisy_latents, sigma, codes, num_tokens, is_unconditional)

        # 3. Losses
        flow_loss = F.mse_loss(velocity.float(), velocity_target(latents, noise).float())
        metrics = {"flow_loss": flow_loss}
        with torch.no_grad():
            token_ids = self.encoder.quantizer.codes_to_ids(self.encoder.quantizer(features))
            metrics["distinct_ids"] = count_distinct(token_ids)
        if not self.training:
            return flow_loss, {name: value.detach() for name, value in metrics.items()}
        loss = flow_loss
        scale = 1 - 5 / 6 * self.fade(step)
        if arguments.feature_penalty > 0:
            loss = loss + scale * arguments.feature_penalty * spread_penalty(features)
        if arguments.correlation_penalty > 0:
            loss = loss + scale * arguments.correlation_penalty * correlation_penalty(features)
        if self.alignment is not None or self.extra_loss is not None:
            images = batch["pixel_values"].to(latents.device, non_blocking=True).repeat(len(copies), 1, 1, 1)
        if self.alignment is not None:
            metrics["repa_loss"] = self.alignment(patches, images)
            loss = loss + arguments.repa_weight * metrics["repa_loss"]
        if self.extra_loss is not None:
            estimate = estimate_clean(noisy_latents, velocity, sigma)
            known = {"sigma": sigma, "num_tokens": num_tokens.masked_fill(is_unconditional, 0)}
            known["token_ids"] = token_ids.repeat(len(copies), 1)
            metrics["extra_loss"] = call_extra_loss(self.extra_loss, self.frozen["vae"], images, estimate, **known)
            loss = loss + arguments.extra_loss_weight * metrics["extra_loss"]
        return loss, {name: value.detach() for name, value in metrics.items()}

    def draw(self, batch_size: int, rng: StepRng, is_full: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Draw noise levels, numbers of tokens to keep, and which samples ignore their tokens, each (B,)."""
        arguments, generator = self.arguments, rng.generator
        num_registers = self.encoder.config.num_registers

        def draw_sigma(count: int) -> Tensor:
            shape = (arguments.sigma_distribution, arguments.logit_mean, arguments.logit_std, arguments.mode_scale)
            return sample_sigma(count, *shape, is_stratified=True, generator=generator)

        def draw_num_tokens(count: int) -> Tensor:
            return sample_num_tokens(count, num_registers, arguments.keep_mode, generator)

        sigma = rng.own(draw_sigma, batch_size)
        num_tokens = rng.own(draw_num_tokens, batch_size)
        keeps_all = rng.bernoulli(1.0 if is_full else arguments.full_length_probability, batch_size)
        num_tokens = torch.where(keeps_all, num_registers, num_tokens)
        return sigma, num_tokens, rng.bernoulli(arguments.null_condition_probability, batch_size)

    def predict(
        self, noisy_latents: Tensor, sigma: Tensor, codes: Tensor, num_tokens: Tensor, is_unconditional: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Predict the velocity (B, C, h, w), and with REPA return the patch states at its layer, (B, N, D)."""
        if self.alignment is not None:
            self.tap.clear()
        order = slice(None)
        if noisy_latents.device.type == "cpu" and not self.arguments.compile:
            groups = LengthGroups(self.decoder, codes, num_tokens, is_unconditional)
            velocity, order = groups.predict_velocity(noisy_latents, sigma), groups.places
        else:  # compiled code needs one batch shape, and an accelerator would have to wait for the lengths
            velocity = self.decoder(noisy_latents, sigma, codes, num_tokens, is_unconditional).velocity
        if self.alignment is None or not self.training:
            return velocity, None
        num_patches = self.alignment.grid_size**2
        return velocity, torch.cat([states[:, :num_patches] for states in self.tap.outputs])[order]

    def fade(self, step: int) -> float:
        """Return how far the measures against code collapse have faded, from 0 at the start to 1."""
        return min(1.0, step / (FADE_SHARE * self.arguments.max_train_steps))


def build_tokenizer(
    arguments: TokenizerArguments, vae: AutoencoderKL | None
) -> tuple[FlexTokEncoder, FlexTokFlowDecoder]:
    """Build a new encoder and decoder with the sizes in the options; without a VAE, latents are pixels."""
    channels, factor = 3 if vae is None else vae.config.latent_channels, downsampling_factor(vae)
    side = arguments.resolution // factor
    for name in ("encoder_patch_size", "decoder_patch_size"):
        if arguments.resolution % (factor * getattr(arguments, name)):
            raise ValueError(
                f"`resolution` {arguments.resolution} must be a multiple of {factor * getattr(arguments, name)},"
                f" `{name}` times {factor}, the downsampling factor of the VAE."
            )
        check_token_layout(arguments.token_layout, arguments.num_registers, side // getattr(arguments, name))
    encoder = FlexTokEncoder(
        FlexTokEncoderConfig(
            in_channels=channels,
            patch_size=arguments.encoder_patch_size,
            grid_size=side // arguments.encoder_patch_size,
            hidden_size=arguments.encoder_hidden_size,
            num_hidden_layers=arguments.encoder_num_layers,
            head_dim=arguments.head_dim,
            token_layout=arguments.token_layout,
            num_registers=arguments.num_registers,
            fsq_levels=arguments.fsq_levels,
            positions=arguments.positions,
            shape_conditioning=arguments.shape_conditioning,
        )
    )
    decoder = FlexTokFlowDecoder(
        in_channels=channels,
        patch_size=arguments.decoder_patch_size,
        grid_size=side // arguments.decoder_patch_size,
        hidden_size=arguments.decoder_hidden_size,
        num_layers=arguments.decoder_num_layers,
        head_dim=arguments.head_dim,
        token_layout=arguments.token_layout,
        num_registers=arguments.num_registers,
        # a grid that always keeps all tokens needs no mask token
        nested_dropout=arguments.token_layout == "registers" or arguments.full_length_probability < 1,
        code_dim=len(arguments.fsq_levels),
        remove_dropped=arguments.remove_dropped,
        positions=arguments.positions,
        shape_conditioning=arguments.shape_conditioning,
    )
    if arguments.mup_base_width is not None:
        # muP scales the initial output weights as 1 / width, Xavier as 1 / sqrt(width)
        ratio = arguments.mup_base_width / arguments.encoder_hidden_size
        with torch.no_grad():
            encoder.feature_proj.weight.mul_(ratio**0.5)
    return encoder, decoder
