"""Options of the training scripts: one dataclass per stage, read from the command line and a YAML file."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser


EXPORT_DTYPES = ("float32", "float16", "bfloat16")
RECONSTRUCTION_LOSSES = ("l1", "l2")


@dataclass(kw_only=True)
class TrainingArguments:
    """Options that all stages share."""

    output_dir: str = field(metadata={"help": "Folder for checkpoints and for the trained model."})
    train_data: list[str] = field(
        default_factory=lambda: ["synthetic"],
        metadata={"help": "Hub name, picture folder, parquet files, or `synthetic` for shapes drawn by this package."},
    )
    validation_data: list[str] | None = field(
        default=None,
        metadata={"help": "Held-out pictures; default: the validation split of the synthetic set, else none."},
    )
    image_column: str = field(default="image", metadata={"help": "Column of the pictures."})
    resolution: int = field(default=256, metadata={"help": "Side of the square training pictures, in pixels."})
    random_flip: bool = field(default=False, metadata={"help": "Mirror half of the pictures."})
    streaming: bool = field(default=False, metadata={"help": "Read the data while training, without a local copy."})
    cache_in_memory: bool = field(default=False, metadata={"help": "Decode a small data set once and keep it."})
    cache_latents: bool = field(default=False, metadata={"help": "Encode all pictures with the VAE only once."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only the first samples."})
    dataloader_num_workers: int = field(default=0, metadata={"help": "Processes that decode pictures."})

    seed: int = field(default=0, metadata={"help": "Decides initial weights, order of the data and all noise."})
    max_train_steps: int = field(default=1000, metadata={"help": "Optimizer steps of the whole training."})
    train_batch_size: int = field(default=32, metadata={"help": "Pictures per process and micro-batch."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Micro-batches per optimizer step."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate."})
    lr_scheduler: str = field(default="cosine", metadata={"help": "Schedule name as in diffusers' `get_scheduler`."})
    lr_warmup_steps: int = field(default=100, metadata={"help": "Steps of linear warm-up."})
    adam_beta1: float = field(default=0.9, metadata={"help": "AdamW: decay of the mean gradient."})
    adam_beta2: float = field(default=0.95, metadata={"help": "AdamW: decay of the mean squared gradient."})
    weight_decay: float = field(default=0.01, metadata={"help": "AdamW: weight decay of matrices."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Clip gradients to this norm."})
    mixed_precision: str = field(default="no", metadata={"help": "`no`, `bf16` or `fp16`."})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Recompute activations to save memory."})
    compile: bool = field(default=False, metadata={"help": "Compile the model with torch.compile."})
    ema_decay: float = field(
        default=0.999, metadata={"help": "Decay of the weight average that is exported; 0: none."}
    )

    checkpointing_steps: int = field(default=500, metadata={"help": "Save the state of training every so many steps."})
    checkpoints_total_limit: int = field(default=2, metadata={"help": "Keep only the newest checkpoints."})
    resume_from_checkpoint: str | None = field(default=None, metadata={"help": "`latest` or a checkpoint folder."})
    validation_steps: int = field(
        default=500, metadata={"help": "Draw validation pictures every so many steps; 0: never."}
    )
    num_validation_images: int = field(default=8, metadata={"help": "Rows of the validation picture."})
    export_dtype: str = field(default="float32", metadata={"help": "Precision of the saved pipeline, or `float16`."})
    report_to: str | None = field(default=None, metadata={"help": "Tracker, for instance `tensorboard` or `wandb`."})

    def __post_init__(self):
        for name in ("resolution", "max_train_steps", "train_batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be 1 or more, got {getattr(self, name)}.")
        if self.export_dtype not in EXPORT_DTYPES:
            raise ValueError(f"`export_dtype` must be one of {', '.join(EXPORT_DTYPES)}, got {self.export_dtype!r}.")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"`ema_decay` must lie in [0, 1), got {self.ema_decay}.")


@dataclass(kw_only=True)
class VaeArguments(TrainingArguments):
    """Options of stage 0: the VAE between pixels and latents."""

    pretrained_vae: str | None = field(default=None, metadata={"help": "Start from this VAE, folder or Hub id."})
    block_out_channels: list[int] = field(
        default_factory=lambda: [128, 256, 512, 512],
        metadata={"help": "Width per resolution; each but the last halves the side."},
    )
    layers_per_block: int = field(default=2, metadata={"help": "Residual blocks per resolution."})
    latent_channels: int = field(default=16, metadata={"help": "Channels of the latents."})
    norm_num_groups: int = field(default=32, metadata={"help": "Groups of the normalization."})
    reconstruction_loss: str = field(default="l1", metadata={"help": "`l1` or `l2`."})
    kl_weight: float = field(default=1e-4, metadata={"help": "Weight of the KL divergence per latent value."})
    perceptual_network: str | None = field(
        default=None, metadata={"help": "Vision model for a perceptual term, folder or Hub id; none: no such term."}
    )
    perceptual_weight: float = field(default=0.1, metadata={"help": "Weight of the perceptual term."})
    adversarial_weight: float = field(
        default=0.0, metadata={"help": "Weight of a patch critic, on top of its adaptive weight; 0: none."}
    )
    adversarial_start: int = field(default=0, metadata={"help": "Step from which the critic takes part."})

    def __post_init__(self):
        super().__post_init__()
        if self.reconstruction_loss not in RECONSTRUCTION_LOSSES:
            raise ValueError(
                f"`reconstruction_loss` must be one of {', '.join(RECONSTRUCTION_LOSSES)},"
                f" got {self.reconstruction_loss!r}."
            )


@dataclass(kw_only=True)
class TokenizerArguments(TrainingArguments):
    """Options of stage 1: encoder, quantizer and flow decoder."""

    vae: str | None = field(
        default=None, metadata={"help": "Frozen AutoencoderKL, folder or Hub id; none: pixel space."}
    )
    pretrained_tokenizer: str | None = field(default=None, metadata={"help": "Start from this pipeline's tokenizer."})
    num_registers: int = field(default=256, metadata={"help": "Longest token sequence."})
    fsq_levels: list[int] = field(default_factory=lambda: [8, 8, 8, 5, 5, 5], metadata={"help": "FSQ levels."})
    head_dim: int = field(default=64, metadata={"help": "Width of an attention head."})
    encoder_hidden_size: int = field(default=768, metadata={"help": "Width of the encoder."})
    encoder_num_layers: int = field(default=12, metadata={"help": "Blocks of the encoder."})
    encoder_patch_size: int = field(default=2, metadata={"help": "Side of an encoder patch, in latent cells."})
    decoder_hidden_size: int = field(default=768, metadata={"help": "Width of the decoder."})
    decoder_num_layers: int = field(default=12, metadata={"help": "Blocks of the decoder."})
    decoder_patch_size: int = field(default=2, metadata={"help": "Side of a decoder patch, in latent cells."})

    sigma_distribution: str = field(default="logit_normal", metadata={"help": "`logit_normal`, `mode` or `uniform`."})
    logit_mean: float = field(default=0.0, metadata={"help": "Mean of the logit-normal; positive: noisier."})
    logit_std: float = field(default=1.0, metadata={"help": "Standard deviation of the logit-normal."})
    mode_scale: float = field(default=0.25, metadata={"help": "Warp of the mode distribution."})
    keep_mode: str = field(default="powers_of_two", metadata={"help": "How many tokens a sample keeps."})
    full_length_probability: float = field(default=0.0, metadata={"help": "Share of samples that keep all tokens."})
    null_condition_probability: float = field(default=0.1, metadata={"help": "Share of samples that ignore tokens."})
    encoder_learning_rate_scale: float = field(default=1.0, metadata={"help": "Encoder's learning rate, relative."})
    unrounded_probability: float = field(
        default=0.0,
        metadata={"help": "Share of samples that skip rounding at the start; fades out over 40% of training."},
    )
    feature_penalty: float = field(
        default=0.0, metadata={"help": "Weight that keeps features spread before rounding; fades to a sixth over 40%."}
    )


@dataclass(kw_only=True)
class PriorArguments(TrainingArguments):
    """Options of stage 2: the autoregressive prior, and its text encoder if that is trained along."""

    tokenizer: str = field(metadata={"help": "Pipeline with the trained tokenizer, folder or Hub id."})
    caption_column: str | None = field(
        default=None, metadata={"help": "Column of the captions (text, or a list of texts)."}
    )
    class_column: str | None = field(default=None, metadata={"help": "Column of the class labels."})
    hidden_size: int = field(default=768, metadata={"help": "Width of the prior."})
    num_layers: int = field(default=12, metadata={"help": "Blocks of the prior."})
    num_heads: int = field(default=12, metadata={"help": "Attention heads of the prior."})
    qk_norm: bool = field(default=False, metadata={"help": "Normalize queries and keys."})
    dropout: float = field(default=0.0, metadata={"help": "Dropout of residual updates."})
    condition_dropout_probability: float = field(
        default=0.1, metadata={"help": "Share of samples without a condition."}
    )
    text_encoder: str | None = field(
        default=None, metadata={"help": "Frozen T5 encoder, folder or Hub id; none: train a small one along."}
    )
    text_hidden_size: int = field(default=128, metadata={"help": "Width of the small text encoder."})
    text_num_layers: int = field(default=3, metadata={"help": "Blocks of the small text encoder."})
    text_vocab_size: int = field(default=2000, metadata={"help": "Pieces of the small text tokenizer, at most."})
    max_text_length: int = field(default=120, metadata={"help": "Longest prompt, in pieces."})
    validation_prompts: list[str] = field(
        default_factory=list, metadata={"help": "Prompts of the validation picture; none: no validation."}
    )


def parse_arguments(kind: type[TrainingArguments], argv: list[str]) -> Any:
    """Read options of one stage: `--config file.yaml` gives defaults, further flags win.

    Raises:
        SystemExit: an option is unknown or of the wrong type.
        ValueError: the YAML file names an option that does not exist.
    """
    parser = HfArgumentParser(kind, description=kind.__doc__)
    parser.add_argument("--config", help="YAML file with defaults for these options.")
    config = None
    for index, flag in enumerate(argv):
        if flag == "--config" and index + 1 < len(argv):
            config = argv[index + 1]
        elif flag.startswith("--config="):
            config = flag.removeprefix("--config=")
    if config is not None:
        defaults = yaml.safe_load(Path(config).read_text()) or {}
        known = {action.dest: action for action in parser._actions}
        unknown = sorted(set(defaults) - set(known))
        if unknown:
            raise ValueError(f"{config} names unknown options: {', '.join(unknown)}. `--help` lists those that exist.")
        for name in defaults:
            known[name].required = False
        parser.set_defaults(**defaults)
    namespace = vars(parser.parse_args(argv))
    namespace.pop("config")
    return kind(**namespace)
