"""Options of the training scripts: one dataclass per stage, validated on construction."""

from dataclasses import dataclass
from math import inf
from typing import ClassVar

from ..models.configuration_encoder import TOKEN_LAYOUTS
from ..models.nested_dropout import KEEP_MODES
from ..models.patches import POSITIONS, check_positions
from ..pipelines.flow import SIGMA_DISTRIBUTIONS
from .shared_arguments import TrainingArguments, check_shapes, option


TOKENS = 256  # of a new tokenizer


@dataclass(kw_only=True)
class VaeArguments(TrainingArguments):
    """Options of stage 0: the VAE between pixels and latents."""

    pretrained_vae: str | None = option(None, "Start from this VAE (folder or Hub id) and keep its architecture.")
    block_out_channels: list[int] = option(
        [128, 256, 512, 512], "Width per level; each level but the last halves the resolution."
    )
    layers_per_block: int = option(2, "Residual blocks per level.")
    latent_channels: int = option(16, "Channels of the latents.")
    norm_num_groups: int = option(32, "Groups of the group normalization.")
    reconstruction_loss: str = option("l1", "Pixel loss: `l1` or `l2`.")
    kl_weight: float = option(1e-4, "Weight of the KL divergence per latent value.")
    perceptual_network: str | None = option(
        None, "Vision model for a perceptual loss (folder or Hub id); if unset, no perceptual loss."
    )
    perceptual_weight: float = option(0.1, "Weight of the perceptual loss.")
    adversarial_weight: float = option(0.0, "Weight of a patch discriminator, on top of its adaptive weight; 0: off.")
    adversarial_start: int = option(0, "Step at which the discriminator starts.")

    LIMITS: ClassVar[dict[str, tuple[float, float]]] = TrainingArguments.LIMITS | {
        "layers_per_block": (1, inf),
        "latent_channels": (1, inf),
        "norm_num_groups": (1, inf),
        "kl_weight": (0, inf),
        "perceptual_weight": (0, inf),
        "adversarial_weight": (0, inf),
        "adversarial_start": (0, inf),
    }
    CHOICES: ClassVar[dict[str, tuple[str, ...]]] = TrainingArguments.CHOICES | {"reconstruction_loss": ("l1", "l2")}


@dataclass(kw_only=True)
class TokenizerArguments(TrainingArguments):
    """Options of stage 1: encoder, quantizer and flow decoder."""

    vae: str | None = option(None, "Frozen AutoencoderKL (folder or Hub id); if unset, train in pixel space.")
    pretrained_tokenizer: str | None = option(
        None,
        "Start from this pipeline's tokenizer (folder or Hub id): its architecture, and its VAE unless `vae` is set.",
    )
    freeze_encoder: bool = option(False, "Train only the decoder: the tokens of an image do not change.")
    token_layout: str = option("registers", "Ordered `registers`, or a `grid` with one token per patch as a control.")
    positions: str = option(
        "crop", "Positions of other shapes than the square: `crop` as published, or `stretch`, for any shape."
    )
    shape_conditioning: bool = option(False, "Tell encoder and decoder size and proportions; with `stretch`.")
    num_registers: int = option(
        None,
        "Maximum number of tokens; for a grid, its number of patches. If unset, that of the model to start from, or"
        f" {TOKENS}; a model with fewer grows.",
    )
    fsq_levels: list[int] = option([8, 8, 8, 5, 5, 5], "FSQ levels per code dimension.")
    head_dim: int = option(64, "Dimension of an attention head.")
    encoder_hidden_size: int = option(768, "Width of the encoder.")
    encoder_num_layers: int = option(12, "Number of encoder blocks.")
    encoder_patch_size: int = option(2, "Encoder patch size, in latent cells.")
    decoder_hidden_size: int = option(768, "Width of the decoder.")
    decoder_num_layers: int = option(12, "Number of decoder blocks.")
    decoder_patch_size: int = option(2, "Decoder patch size, in latent cells.")
    mup_base_width: int | None = option(
        None, "Width at which `learning_rate` applies; muP scales it for other widths; if unset, no scaling."
    )

    sigma_distribution: str = option("logit_normal", "Distribution of the training noise levels.")
    logit_mean: float = option(0.0, "Mean of the logit-normal; positive means more noise.")
    logit_std: float = option(1.0, "Standard deviation of the logit-normal.")
    mode_scale: float = option(0.25, "Scale parameter of the mode distribution.")
    keep_mode: str = option("powers_of_two", "How to draw the number of tokens a sample keeps.")
    full_length_probability: float = option(0.0, "Fraction of samples that keep all tokens.")
    joint_lengths: bool = option(False, "Decode each sample twice per step: with all tokens and with those it keeps.")
    remove_dropped: bool = option(False, "Remove dropped tokens from the sequence instead of masking them.")
    null_condition_probability: float = option(0.1, "Fraction of samples that ignore their tokens.")
    encoder_learning_rate_scale: float = option(1.0, "Encoder learning rate relative to `learning_rate`.")
    unrounded_probability: float = option(
        0.0, "Initial fraction of samples that skip rounding; fades to 0 over the first 0.4 of training."
    )
    feature_penalty: float = option(
        0.0, "Weight of a penalty that spreads unrounded features; fades to a sixth over 0.4 of training."
    )
    correlation_penalty: float = option(
        0.0, "Weight of a penalty on features correlated over the batch; fades like `feature_penalty`."
    )
    repa_network: str | None = option(
        None,
        "Vision transformer whose features the decoder aligns with (REPA; folder or Hub id); if unset, no REPA.",
    )
    repa_weight: float = option(1.0, "Weight of the REPA loss.")
    repa_layer: int = option(1, "Decoder block whose output is aligned, counted from 0.")
    extra_loss: str | None = option(
        None, "Your own loss, `module:function`, on images, one-step reconstructions and token ids."
    )
    extra_loss_weight: float = option(1.0, "Weight of `extra_loss`.")

    LIMITS: ClassVar[dict[str, tuple[float, float]]] = TrainingArguments.LIMITS | {
        "num_registers": (1, inf),
        "head_dim": (1, inf),
        "encoder_hidden_size": (1, inf),
        "encoder_num_layers": (1, inf),
        "encoder_patch_size": (1, inf),
        "decoder_hidden_size": (1, inf),
        "decoder_num_layers": (1, inf),
        "decoder_patch_size": (1, inf),
        "mup_base_width": (1, inf),
        "logit_std": (0, inf),
        "full_length_probability": (0, 1),
        "null_condition_probability": (0, 1),
        "encoder_learning_rate_scale": (0, inf),
        "unrounded_probability": (0, 1),
        "feature_penalty": (0, inf),
        "correlation_penalty": (0, inf),
        "repa_weight": (0, inf),
        "repa_layer": (0, inf),
        "extra_loss_weight": (0, inf),
    }
    ADAPTED_PARTS, START = ("decoder", "encoder"), "pretrained_tokenizer"
    CHOICES: ClassVar[dict[str, tuple[str, ...]]] = TrainingArguments.CHOICES | {
        "sigma_distribution": SIGMA_DISTRIBUTIONS,
        "keep_mode": KEEP_MODES,
        "token_layout": TOKEN_LAYOUTS,
        "positions": POSITIONS,
    }

    def __post_init__(self):
        super().__post_init__()
        if self.num_registers is None and self.pretrained_tokenizer is None:
            self.num_registers = TOKENS
        for name in ("encoder_hidden_size", "decoder_hidden_size"):
            if getattr(self, name) % self.head_dim or getattr(self, name) % 4:
                raise ValueError(
                    f"`{name}` must be a multiple of `head_dim` ({self.head_dim}) and of 4, got {getattr(self, name)}."
                )
        if not self.fsq_levels or min(self.fsq_levels) < 2:
            raise ValueError(f"`fsq_levels` must be a non-empty list of numbers of at least 2, got {self.fsq_levels}.")
        check_positions(self.positions, self.shape_conditioning, self.token_layout)
        if self.pretrained_tokenizer is None:
            check_shapes(self, self.positions)
        if self.joint_lengths and self.full_length_probability > 0:
            raise ValueError(
                "`joint_lengths` decodes every sample at full length: set `full_length_probability` to 0."
            )
        if self.lora_rank and "encoder" not in self.adapted_parts:
            self.freeze_encoder = True  # token ids stay
        if self.freeze_encoder:
            if "encoder" in self.adapted_parts:
                raise ValueError("`freeze_encoder` is set, but `lora_targets` adapts the encoder: drop one of them.")
            if self.pretrained_tokenizer is None:
                raise ValueError(
                    "`freeze_encoder` needs a trained encoder: set `pretrained_tokenizer` to its pipeline."
                )
            for name in ("unrounded_probability", "feature_penalty", "correlation_penalty"):
                if getattr(self, name) > 0:
                    raise ValueError(f"`{name}` trains the encoder, which `freeze_encoder` freezes: set it to 0.")
        for name in ("repa_network", "extra_loss"):
            if getattr(self, name) is not None and self.cache_latents:
                raise ValueError(f"`{name}` needs images, which `cache_latents` does not keep: drop one of them.")
        if self.repa_network is not None and (self.buckets or self.max_area is not None):
            raise ValueError("`repa_network` needs squares of `resolution`: drop it, or `buckets` and `max_area`.")


@dataclass(kw_only=True)
class PriorArguments(TrainingArguments):
    """Options of stage 2: the autoregressive prior, and its text encoder if trained jointly."""

    tokenizer: str = option(
        None, "Pipeline with the trained tokenizer (folder or Hub id); if unset, that of `pretrained_prior`."
    )
    pretrained_prior: str | None = option(
        None, "Start from this pipeline's prior (folder or Hub id): its architecture, and its text encoder, frozen."
    )
    token_column: str | None = option(
        None, "Column of token ids from scripts/tokenize_dataset.py; if unset, tokenize images on the fly."
    )
    caption_column: str | None = option(None, "Caption column (text, or a list of texts).")
    class_column: str | None = option(None, "Class label column.")
    num_classes: int | None = option(None, "Number of classes, if the column holds numbers without names.")
    hidden_size: int = option(768, "Width of the prior.")
    num_layers: int = option(12, "Number of prior blocks.")
    num_heads: int = option(12, "Number of attention heads.")
    qk_norm: bool = option(False, "Normalize queries and keys.")
    shape_conditioning: bool = option(False, "Tell the prior size and proportions of the image, beside the condition.")
    dropout: float = option(0.0, "Dropout on residual branches.")
    condition_dropout_probability: float = option(0.1, "Fraction of samples trained without a condition.")
    text_encoder: str | None = option(None, "Frozen T5 encoder (folder or Hub id); if unset, a small one is trained.")
    text_hidden_size: int = option(128, "Width of the small text encoder.")
    text_num_layers: int = option(3, "Number of small text encoder blocks.")
    text_vocab_size: int = option(2000, "Maximum vocabulary size of the small text tokenizer.")
    max_text_length: int = option(120, "Maximum prompt length, in text tokens.")
    validation_prompts: list[str] = option([], "Prompts or class names for the validation sheet; if unset, no sheet.")

    LIMITS: ClassVar[dict[str, tuple[float, float]]] = TrainingArguments.LIMITS | {
        "num_classes": (1, inf),
        "hidden_size": (1, inf),
        "num_layers": (1, inf),
        "num_heads": (1, inf),
        "dropout": (0, 1 - 1e-9),
        "condition_dropout_probability": (0, 1),
        "text_hidden_size": (1, inf),
        "text_num_layers": (1, inf),
        "text_vocab_size": (259, inf),  # bytes and special tokens
        "max_text_length": (2, inf),
    }

    ADAPTED_PARTS, START, EXAMPLE = ("prior",), "pretrained_prior", "qkv_proj"

    def __post_init__(self):
        super().__post_init__()
        if self.tokenizer is None:
            if self.pretrained_prior is None:
                raise ValueError("`tokenizer` is not set: pass the pipeline with the trained tokenizer.")
            self.tokenizer = self.pretrained_prior
        if self.pretrained_prior is not None and self.text_encoder is not None:
            raise ValueError("`text_encoder` comes with `pretrained_prior`, which was trained with it: leave it out.")
        if (self.caption_column is None) == (self.class_column is None):
            raise ValueError(
                f"Set either `caption_column` or `class_column`, the condition that the prior learns; got"
                f" {self.caption_column!r} and {self.class_column!r}."
            )
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"`hidden_size` must be a multiple of `num_heads` ({self.num_heads}), got {self.hidden_size}."
            )
        if self.shape_conditioning and not (self.buckets or self.max_area or self.token_column):
            raise ValueError(
                "`shape_conditioning` learns nothing from squares of `resolution`: set `buckets`, `max_area` or"
                " `token_column` too."
            )
        if self.token_column is not None:
            for name in ("cache_latents", "cache_in_memory", "random_flip", "random_crop", "buckets", "max_area"):
                if getattr(self, name):
                    raise ValueError(f"`{name}` applies to images, but `token_column` reads token ids: leave it out.")
