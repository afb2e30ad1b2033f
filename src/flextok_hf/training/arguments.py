"""Options of the training scripts: one dataclass per stage, checked when it is made.

Options that also exist in Diffusers' training scripts have their names.
"""

from dataclasses import dataclass, field
from math import inf
from typing import Any, ClassVar

from diffusers.optimization import SchedulerType

from ..models.configuration_encoder import TOKEN_LAYOUTS
from ..models.nested_dropout import KEEP_MODES
from ..pipelines.flow import SIGMA_DISTRIBUTIONS


def option(default: Any, text: str) -> Any:
    """Make a field with a default and the help text of its flag."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass(kw_only=True)
class TrainingArguments:
    """Options that all stages share."""

    output_dir: str = field(metadata={"help": "Folder for checkpoints and for the trained model."})
    train_data: list[str] = option(
        ["synthetic"], "Hub name, folder, parquet or tar files, or `synthetic` for shapes drawn by this package."
    )
    validation_data: list[str] | None = option(
        None, "Held-out images; default: the validation split of the synthetic set, else none."
    )
    dataset_config_name: str | None = option(None, "Configuration of a Hub data set that has several.")
    image_column: str = option("image", "Column of the images.")
    resolution: int = option(256, "Side of the square training images, in pixels.")
    random_flip: bool = option(False, "Mirror half of the images.")
    random_crop: bool = option(False, "Cut the square at a random place instead of the middle; proportions stay.")
    min_crop_scale: float = option(
        1.0, "With `random_crop`: smallest side of the square, relative to the shorter side."
    )
    streaming: bool = option(False, "Read the data while training, without a local copy.")
    shuffle_buffer: int = option(1000, "Rows of a stream that are shuffled together; 0 keeps their order.")
    cache_in_memory: bool = option(False, "Decode a small data set once and keep it.")
    cache_latents: bool = option(False, "Encode all images with the VAE only once.")
    max_train_samples: int | None = option(None, "Use only the first samples.")
    dataloader_num_workers: int = option(0, "Processes that decode images.")
    fail_on_unreadable: bool = option(False, "Stop at an image that cannot be read, instead of leaving it out.")

    seed: int = option(0, "Decides initial weights, order of the data and all noise.")
    max_train_steps: int = option(1000, "Optimizer steps of the whole training.")
    train_batch_size: int = option(32, "Images per process and micro-batch.")
    gradient_accumulation_steps: int = option(1, "Micro-batches per optimizer step.")
    learning_rate: float = option(1e-3, "Peak learning rate.")
    lr_scheduler: str = option("cosine", "Course of the learning rate after the warm-up.")
    lr_warmup_steps: int = option(100, "Steps of linear warm-up.")
    lr_end_ratio: float = option(0.0, "Learning rate at the end, relative to the peak, where the schedule falls to 0.")
    adam_beta1: float = option(0.9, "AdamW: decay of the mean gradient.")
    adam_beta2: float = option(0.95, "AdamW: decay of the mean squared gradient.")
    weight_decay: float = option(0.01, "AdamW: weight decay of matrices.")
    max_grad_norm: float = option(1.0, "Clip gradients to this norm.")
    mixed_precision: str | None = option(None, "Precision of the products; default: that of `accelerate config`.")
    gradient_checkpointing: bool = option(False, "Recompute activations to save memory.")
    compile: bool = option(False, "Compile the model with torch.compile.")
    ema_decay: float = option(0.999, "Decay of the weight average that is exported; 0: none.")

    logging_steps: int = option(20, "Write the log every so many steps, each time the means since the last.")
    checkpointing_steps: int = option(500, "Save the state of training every so many steps.")
    checkpoints_total_limit: int = option(2, "Keep only the newest checkpoints.")
    resume_from_checkpoint: str | None = option(None, "`latest` or a checkpoint folder.")
    validation_steps: int = option(500, "Draw validation images every so many steps; 0: never.")
    num_validation_images: int = option(8, "Rows of the validation image.")
    export_dtype: str = option("float32", "Precision of the saved model.")
    report_to: str | None = option(None, "Tracker of accelerate, for instance `tensorboard` or `wandb`.")
    push_to_hub: bool = option(False, "Upload the trained model, with a card, when it is saved.")
    hub_model_id: str | None = option(None, "Repository for `push_to_hub`; default: the name of `output_dir`.")

    # The least and the largest value of an option that has such bounds.
    LIMITS: ClassVar[dict[str, tuple[float, float]]] = {
        "resolution": (1, inf),
        "min_crop_scale": (0.01, 1),
        "shuffle_buffer": (0, inf),
        "max_train_samples": (1, inf),
        "dataloader_num_workers": (0, inf),
        "max_train_steps": (1, inf),
        "train_batch_size": (1, inf),
        "gradient_accumulation_steps": (1, inf),
        "learning_rate": (0, inf),
        "lr_warmup_steps": (0, inf),
        "lr_end_ratio": (0, 1),
        "adam_beta1": (0, 1 - 1e-9),
        "adam_beta2": (0, 1 - 1e-9),
        "weight_decay": (0, inf),
        "max_grad_norm": (1e-9, inf),
        "ema_decay": (0, 1 - 1e-9),
        "logging_steps": (1, inf),
        "checkpointing_steps": (1, inf),
        "checkpoints_total_limit": (1, inf),
        "validation_steps": (0, inf),
        "num_validation_images": (1, inf),
    }
    CHOICES: ClassVar[dict[str, tuple[str, ...]]] = {
        "lr_scheduler": tuple(kind.value for kind in SchedulerType if kind.value != "piecewise_constant"),
        "mixed_precision": ("no", "bf16", "fp16"),
        "export_dtype": ("float32", "float16", "bfloat16"),
    }

    def __post_init__(self):
        for name, (low, high) in self.LIMITS.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                bounds = f"{low:g} or more" if high == inf else f"from {low:g} to {high:g}"
                raise ValueError(f"`{name}` must be {bounds}, got {value}.")
        for name, choices in self.CHOICES.items():
            if getattr(self, name) not in (*choices, None):
                raise ValueError(f"`{name}` must be one of {', '.join(choices)}, got {getattr(self, name)!r}.")
        if self.min_crop_scale < 1 and not self.random_crop:
            raise ValueError(f"`min_crop_scale` is {self.min_crop_scale}, but crops are fixed: set `random_crop` too.")
        if self.hub_model_id is not None and not self.push_to_hub:
            raise ValueError(
                f"`hub_model_id` is {self.hub_model_id!r}, but nothing is uploaded: set `push_to_hub` too."
            )


@dataclass(kw_only=True)
class VaeArguments(TrainingArguments):
    """Options of stage 0: the VAE between pixels and latents."""

    pretrained_vae: str | None = option(None, "Start from this VAE, folder or Hub id; its sizes hold.")
    block_out_channels: list[int] = option(
        [128, 256, 512, 512], "Width per resolution; each but the last halves the side."
    )
    layers_per_block: int = option(2, "Residual blocks per resolution.")
    latent_channels: int = option(16, "Channels of the latents.")
    norm_num_groups: int = option(32, "Groups of the normalization.")
    reconstruction_loss: str = option("l1", "Distance of pixels.")
    kl_weight: float = option(1e-4, "Weight of the KL divergence per latent value.")
    perceptual_network: str | None = option(
        None, "Vision model for a perceptual term, folder or Hub id; none: no such term."
    )
    perceptual_weight: float = option(0.1, "Weight of the perceptual term.")
    adversarial_weight: float = option(0.0, "Weight of a patch critic, on top of its adaptive weight; 0: none.")
    adversarial_start: int = option(0, "Step from which the critic takes part.")

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

    vae: str | None = option(None, "Frozen AutoencoderKL, folder or Hub id; none: pixel space.")
    pretrained_tokenizer: str | None = option(
        None,
        "Start from this pipeline's tokenizer, folder or Hub id; its sizes hold, and its VAE unless `vae` is set.",
    )
    freeze_encoder: bool = option(False, "Train the decoder only: the tokens of an image stay what they are.")
    token_layout: str = option("registers", "An ordered sequence, or a grid with a token per patch as the control.")
    num_registers: int = option(256, "Longest token sequence; for a grid, its number of patches.")
    fsq_levels: list[int] = option([8, 8, 8, 5, 5, 5], "FSQ levels.")
    head_dim: int = option(64, "Width of an attention head.")
    encoder_hidden_size: int = option(768, "Width of the encoder.")
    encoder_num_layers: int = option(12, "Blocks of the encoder.")
    encoder_patch_size: int = option(2, "Side of an encoder patch, in latent cells.")
    decoder_hidden_size: int = option(768, "Width of the decoder.")
    decoder_num_layers: int = option(12, "Blocks of the decoder.")
    decoder_patch_size: int = option(2, "Side of a decoder patch, in latent cells.")
    mup_base_width: int | None = option(
        None, "Width at which `learning_rate` holds: muP scales it for other widths; none: the same at all widths."
    )

    sigma_distribution: str = option("logit_normal", "How noise levels are drawn.")
    logit_mean: float = option(0.0, "Mean of the logit-normal; positive: noisier.")
    logit_std: float = option(1.0, "Standard deviation of the logit-normal.")
    mode_scale: float = option(0.25, "Warp of the mode distribution.")
    keep_mode: str = option("powers_of_two", "How many tokens a sample keeps.")
    full_length_probability: float = option(0.0, "Share of samples that keep all tokens.")
    joint_lengths: bool = option(False, "Decode each sample twice per step: with all tokens, and with those it keeps.")
    remove_dropped: bool = option(False, "Take dropped tokens out of the sequence, instead of a mask token for each.")
    null_condition_probability: float = option(0.1, "Share of samples that ignore tokens.")
    encoder_learning_rate_scale: float = option(1.0, "Encoder's learning rate, relative.")
    unrounded_probability: float = option(
        0.0, "Share of samples that skip rounding at the start; fades out over 40% of training."
    )
    feature_penalty: float = option(
        0.0, "Weight that keeps features spread before rounding; fades to a sixth over 40%."
    )
    correlation_penalty: float = option(
        0.0, "Weight of a penalty on features that say the same over the batch; fades like the other."
    )
    repa_network: str | None = option(
        None,
        "Vision transformer whose features the decoder is to resemble (REPA), folder or Hub id; none: no such term.",
    )
    repa_weight: float = option(1.0, "Weight of the REPA term.")
    repa_layer: int = option(1, "Decoder block whose output is compared, counted from 0.")

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
    }
    CHOICES: ClassVar[dict[str, tuple[str, ...]]] = TrainingArguments.CHOICES | {
        "sigma_distribution": SIGMA_DISTRIBUTIONS,
        "keep_mode": KEEP_MODES,
        "token_layout": TOKEN_LAYOUTS,
    }

    def __post_init__(self):
        super().__post_init__()
        for name in ("encoder_hidden_size", "decoder_hidden_size"):
            if getattr(self, name) % self.head_dim or getattr(self, name) % 4:
                raise ValueError(
                    f"`{name}` must be a multiple of `head_dim` ({self.head_dim}) and of 4, got {getattr(self, name)}."
                )
        if not self.fsq_levels or min(self.fsq_levels) < 2:
            raise ValueError(f"`fsq_levels` must hold one or more numbers of 2 or more, got {self.fsq_levels}.")
        if self.joint_lengths and self.full_length_probability > 0:
            raise ValueError(
                "`joint_lengths` decodes every sample at full length: set `full_length_probability` to 0."
            )
        if self.freeze_encoder:
            if self.pretrained_tokenizer is None:
                raise ValueError(
                    "`freeze_encoder` needs a trained encoder: name its pipeline in `pretrained_tokenizer`."
                )
            for name in ("unrounded_probability", "feature_penalty", "correlation_penalty"):
                if getattr(self, name) > 0:
                    raise ValueError(f"`{name}` trains the encoder, which `freeze_encoder` does not: set it to 0.")
        if self.repa_network is not None and self.cache_latents:
            raise ValueError("`repa_network` looks at images, which `cache_latents` does not keep: leave one out.")


@dataclass(kw_only=True)
class PriorArguments(TrainingArguments):
    """Options of stage 2: the autoregressive prior, and its text encoder if that is trained along."""

    tokenizer: str = field(metadata={"help": "Pipeline with the trained tokenizer, folder or Hub id."})
    token_column: str | None = option(
        None, "Column of token ids, as scripts/tokenize_dataset.py writes them; none: images are tokenized now."
    )
    caption_column: str | None = option(None, "Column of the captions (text, or a list of texts).")
    class_column: str | None = option(None, "Column of the class labels.")
    num_classes: int | None = option(None, "Number of classes, where the column has numbers without names.")
    hidden_size: int = option(768, "Width of the prior.")
    num_layers: int = option(12, "Blocks of the prior.")
    num_heads: int = option(12, "Attention heads of the prior.")
    qk_norm: bool = option(False, "Normalize queries and keys.")
    dropout: float = option(0.0, "Dropout of residual updates.")
    condition_dropout_probability: float = option(0.1, "Share of samples without a condition.")
    text_encoder: str | None = option(None, "Frozen T5 encoder, folder or Hub id; none: train a small one along.")
    text_hidden_size: int = option(128, "Width of the small text encoder.")
    text_num_layers: int = option(3, "Blocks of the small text encoder.")
    text_vocab_size: int = option(2000, "Pieces of the small text tokenizer, at most.")
    max_text_length: int = option(120, "Longest prompt, in pieces.")
    validation_prompts: list[str] = option(
        [], "Prompts, or names of classes, that the validation image shows; none: no image."
    )

    LIMITS: ClassVar[dict[str, tuple[float, float]]] = TrainingArguments.LIMITS | {
        "num_classes": (1, inf),
        "hidden_size": (1, inf),
        "num_layers": (1, inf),
        "num_heads": (1, inf),
        "dropout": (0, 1 - 1e-9),
        "condition_dropout_probability": (0, 1),
        "text_hidden_size": (1, inf),
        "text_num_layers": (1, inf),
        "text_vocab_size": (259, inf),  # bytes and special pieces
        "max_text_length": (2, inf),
    }

    def __post_init__(self):
        super().__post_init__()
        if (self.caption_column is None) == (self.class_column is None):
            raise ValueError(
                f"Name either `caption_column` or `class_column`, the condition that the prior learns; got"
                f" {self.caption_column!r} and {self.class_column!r}."
            )
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"`hidden_size` must be a multiple of `num_heads` ({self.num_heads}), got {self.hidden_size}."
            )
        if self.token_column is not None:
            for name in ("cache_latents", "cache_in_memory", "random_flip", "random_crop"):
                if getattr(self, name):
                    raise ValueError(f"`{name}` is about images, but `token_column` reads token ids: leave it out.")
