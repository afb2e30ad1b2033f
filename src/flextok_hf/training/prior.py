"""Stage 2: train the prior, and its small text encoder if it has one, on the token ids of a frozen tokenizer.

Letters: B batch, C latent channels, H W sides of an image, h w latent grid, K tokens of an image.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.latent_cache import latents_of
from ..models.configuration_prior import FlexTokPriorConfig
from ..models.modeling_prior import FlexTokPriorForCausalLM
from ..models.patches import features_of_sizes
from ..models.prior_inputs import UNCONDITIONAL_LABEL
from ..pipelines.pipeline_flextok import FlexTokPipeline
from .arguments import PriorArguments
from .step_rng import StepRng


class PriorForTraining(nn.Module):
    """Prior and text encoder with their loss; the image tokenizer is frozen and not a submodule.

    Args:
        prior: prior to train.
        text_encoder: trained jointly, or frozen; `None` for a class-conditional prior.
        text_tokenizer: tokenizer of the text encoder.
        image_tokenizer: turns images into token ids; may be `None` if batches contain token ids and the prior is not
            told the shape.
        arguments: options of the stage.
    """

    _no_split_modules = ["PriorBlock"]  # units that FSDP shards

    def __init__(
        self,
        prior: FlexTokPriorForCausalLM,
        text_encoder: PreTrainedModel | None,
        text_tokenizer: PreTrainedTokenizerBase | None,
        image_tokenizer: FlexTokPipeline | None,
        arguments: PriorArguments,
    ):
        super().__init__()
        self.prior = prior
        is_frozen = text_encoder is not None and bool(arguments.text_encoder or arguments.pretrained_prior)
        self.text_encoder = None if is_frozen else text_encoder
        self.text_tokenizer = text_tokenizer
        self.arguments = arguments
        # in a dictionary, so that their weights are neither trained nor saved
        self.frozen: dict[str, Any] = {
            "image_tokenizer": image_tokenizer,
            "text_encoder": text_encoder if is_frozen else None,
        }

    def forward(self, batch: dict[str, Any], step: int, rng: StepRng) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of a batch.

        Args:
            batch: `token_ids` (B, K), cached `latents` (B, C, h, w) or `pixel_values` (B, 3, H, W) in [-1, 1], with
                `captions`, a list of B texts, or `class_labels` (B,); with `shape_conditioning`, token ids come with
                `sizes` (B, 2), height and width.
            step: optimizer steps done so far.
            rng: source of the condition dropout.

        Returns:
            The cross-entropy in nats per token, and metrics to log.
        """
        token_ids = self.tokenize(batch)  # (B, K)
        # on the host, where the captions are
        is_dropped = rng.host_bernoulli(self.arguments.condition_dropout_probability, token_ids.shape[0])  # (B,)
        condition = self.encode_condition(batch, is_dropped if self.training else torch.zeros_like(is_dropped))
        if self.prior.config.shape_conditioning:  # never dropped: guidance is about text and class
            condition["shape_features"] = self.shape_features(batch).to(self.prior.device, non_blocking=True)
        input_ids = self.prior.prepend_bos(token_ids)  # (B, K + 1)
        loss = self.prior(input_ids=input_ids, labels=input_ids, **condition).loss
        return loss, {}

    @torch.no_grad()
    def tokenize(self, batch: dict[str, Any]) -> Tensor:
        """Return the token ids of a batch, (B, K)."""
        if "token_ids" in batch:
            return batch["token_ids"].to(self.prior.device, non_blocking=True)
        tokenizer = self.frozen["image_tokenizer"]
        # in full precision whatever the prior trains in, so that the ids match those from inference
        with torch.autocast(self.prior.device.type, enabled=False):
            latents = latents_of(batch, tokenizer.vae, self.prior.device)  # (B, C, h, w)
            return tokenizer.encoder(latents).token_ids

    def shape_features(self, batch: dict[str, Any]) -> Tensor:
        """Return what the prior is told of the shapes of a batch, (B, 2)."""
        tokenizer = self.frozen["image_tokenizer"]
        if "sizes" in batch:
            return features_of_sizes(batch["sizes"], tokenizer.resolution)
        is_encoded = "latents" in batch
        shape = batch["latents" if is_encoded else "pixel_values"].shape  # of every image
        side = tokenizer.latent_size if is_encoded else tokenizer.resolution
        return features_of_sizes(torch.tensor(shape[-2:]).expand(shape[0], 2), side)

    def encode_condition(self, batch: dict[str, Any], is_dropped: Tensor) -> dict[str, Tensor]:
        """Convert captions or classes to arguments of the prior; dropped ones become "" or class -1."""
        device = self.prior.device
        if self.text_tokenizer is None:
            class_labels = torch.where(is_dropped, UNCONDITIONAL_LABEL, batch["class_labels"])
            return {"class_labels": class_labels.to(device, non_blocking=True)}
        captions = [
            "" if drop else caption for caption, drop in zip(batch["captions"], is_dropped.tolist(), strict=True)
        ]
        text = self.text_tokenizer(captions, padding=True, truncation=True, return_tensors="pt")
        text = text.to(device, non_blocking=True)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.text_encoder is not None):
            encoder = self.text_encoder or self.frozen["text_encoder"].to(device)
            states = encoder(input_ids=text.input_ids, attention_mask=text.attention_mask).last_hidden_state
        return {"encoder_hidden_states": states, "encoder_attention_mask": text.attention_mask}


def build_prior(
    arguments: PriorArguments,
    codebook_size: int,
    num_registers: int,
    text_hidden_size: int | None,
    num_classes: int | None,
) -> FlexTokPriorForCausalLM:
    """Build a new prior for the ids of a tokenizer; feed-forward layers are 8/3 times as wide, as published."""
    return FlexTokPriorForCausalLM(
        FlexTokPriorConfig(
            codebook_size=codebook_size,
            hidden_size=arguments.hidden_size,
            num_hidden_layers=arguments.num_layers,
            num_attention_heads=arguments.num_heads,
            intermediate_size=-(-8 * arguments.hidden_size // (3 * 64)) * 64,
            max_position_embeddings=num_registers,
            qk_norm=arguments.qk_norm,
            cross_qk_norm=arguments.qk_norm,
            text_hidden_size=text_hidden_size,
            num_classes=num_classes,
            shape_conditioning=arguments.shape_conditioning,
            dropout=arguments.dropout,
        )
    )
