"""Stage 2: train the prior, and its small text encoder if it has one, on the token ids of a frozen tokenizer."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..configuration_prior import FlexTokPriorConfig
from ..modeling_prior import FlexTokPriorForCausalLM
from ..pipeline_flextok import FlexTokPipeline
from .arguments import PriorArguments
from .caching import latents_of


UNCONDITIONAL_LABEL = -1


class PriorForTraining(nn.Module):
    """Prior and text encoder with their loss; the image tokenizer is frozen and not part of the module."""

    def __init__(
        self,
        prior: FlexTokPriorForCausalLM,
        text_encoder: PreTrainedModel | None,
        text_tokenizer: PreTrainedTokenizerBase | None,
        image_tokenizer: FlexTokPipeline,
        arguments: PriorArguments,
    ):
        super().__init__()
        self.prior = prior
        self.text_encoder = text_encoder
        self.text_tokenizer = text_tokenizer
        self.arguments = arguments
        self.frozen = {"image_tokenizer": image_tokenizer}  # in a dictionary, so that it is neither trained nor saved

    def train(self, mode: bool = True) -> "PriorForTraining":
        """Switch between training and evaluation; a frozen text encoder stays in evaluation, without dropout."""
        super().train(mode)
        if self.text_encoder is not None and not any(
            weight.requires_grad for weight in self.text_encoder.parameters()
        ):
            self.text_encoder.eval()
        return self

    def forward(
        self, batch: dict[str, Any], step: int, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of a batch.

        Args:
            batch: `pixel_values` (B, 3, H, W) in [-1, 1], or cached `latents` (B, C, h, w), with `captions`, a list of
                B texts, or `class_labels` (B,).
            step: optimizer steps done so far.
            generator: source of the condition dropout, on the device of the model.

        Returns:
            The cross-entropy in nats per token, and figures to log.
        """
        # 1. Pictures -> token ids
        with torch.no_grad():
            tokenizer = self.frozen["image_tokenizer"]
            latents = latents_of(batch, tokenizer.vae, self.prior.device)  # (B, C, h, w)
            token_ids = tokenizer.encoder(latents).token_ids  # (B, K)
        # 2. Conditions, some of them dropped for guidance
        drop_probability = self.arguments.condition_dropout_probability
        is_dropped = torch.rand(token_ids.shape[0], generator=generator, device=generator.device) < drop_probability
        condition = self.encode_condition(batch, is_dropped)
        # 3. Loss
        input_ids = self.prior.prepend_bos(token_ids)  # (B, K + 1)
        loss = self.prior(input_ids=input_ids, labels=input_ids, **condition).loss
        return loss, {}

    def encode_condition(self, batch: dict[str, Any], is_dropped: Tensor) -> dict[str, Tensor]:
        """Turn captions or classes into arguments of the prior; dropped ones become "" or class -1."""
        device = self.prior.device
        if self.text_encoder is None or self.text_tokenizer is None:
            class_labels = batch["class_labels"].to(device)
            return {"class_labels": torch.where(is_dropped, UNCONDITIONAL_LABEL, class_labels)}
        captions = [
            "" if drop else caption for caption, drop in zip(batch["captions"], is_dropped.tolist(), strict=True)
        ]
        text = self.text_tokenizer(captions, padding=True, truncation=True, return_tensors="pt").to(device)
        states = self.text_encoder(input_ids=text.input_ids, attention_mask=text.attention_mask).last_hidden_state
        return {"encoder_hidden_states": states, "encoder_attention_mask": text.attention_mask}


def build_prior(
    arguments: PriorArguments, tokenizer: FlexTokPipeline, text_hidden_size: int | None, num_classes: int | None
) -> FlexTokPriorForCausalLM:
    """Make a fresh prior for the ids of `tokenizer`; feed-forward layers are 8/3 as wide, as published."""
    return FlexTokPriorForCausalLM(
        FlexTokPriorConfig(
            codebook_size=tokenizer.codebook_size,
            hidden_size=arguments.hidden_size,
            num_hidden_layers=arguments.num_layers,
            num_attention_heads=arguments.num_heads,
            intermediate_size=-(-8 * arguments.hidden_size // (3 * 64)) * 64,
            max_position_embeddings=tokenizer.num_registers,
            qk_norm=arguments.qk_norm,
            cross_qk_norm=arguments.qk_norm,
            text_hidden_size=text_hidden_size,
            num_classes=num_classes,
            dropout=arguments.dropout,
        )
    )
