"""Options shared by all training stages, validated on construction.

Options shared with Diffusers' training scripts have the same names.
"""

from dataclasses import dataclass, field
from math import inf
from typing import Any, ClassVar

from diffusers.optimization import SchedulerType

from ..models.patches import MAX_AREA
from .adapter_arguments import AdapterArguments


SIDE = 256  # of training images of a new model


def option(default: Any, text: str) -> Any:
    """Return a dataclass field with a default and the help text of its flag."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


def check_shapes(arguments: "TrainingArguments", positions: str) -> None:
    """Raise a ValueError if training on other shapes than the square needs other positions than the model has."""
    for name in ("buckets", "max_area", "shape_conditioning"):
        if getattr(arguments, name, False) and positions != "stretch":
            raise ValueError(
                f'`{name}` needs a tokenizer for any shape, but its `positions` are "{positions}": train one with'
                ' `positions` "stretch", also from a `pretrained_tokenizer`.'
            )


@dataclass(kw_only=True)
class TrainingArguments(AdapterArguments):
    """Options shared by all stages."""

    output_dir: str = field(metadata={"help": "Folder for checkpoints and the trained model."})
    train_data: list[str] = option(
        ["synthetic"], "Hub dataset, folder, parquet or tar files, or `synthetic` for shapes rendered by this package."
    )
    validation_data: list[str] | None = option(
        None, "Held-out images; if unset, the synthetic validation split if training on `synthetic`, else none."
    )
    dataset_config_name: str | None = option(None, "Configuration of a Hub dataset that has several.")
    image_column: str = option("image", "Image column.")
    resolution: int = option(
        None, f"Height and width of the training images, in pixels; if unset, of the model to start from, or {SIDE}."
    )
    buckets: bool = option(
        False, "Aspect ratio buckets: train on images of all proportions, in batches of one shape, not on squares."
    )
    max_area: int | None = option(None, "Pixels per training image, at most; if unset, `resolution` squared.")
    random_flip: bool = option(False, "Flip images horizontally with probability 0.5.")
    random_crop: bool = option(False, "Take a random crop instead of the center crop.")
    min_crop_scale: float = option(
        1.0, "With `random_crop`: smallest size of the crop, relative to the largest one that fits into the image."
    )
    streaming: bool = option(False, "Stream the data while training, without a local copy.")
    shuffle_buffer: int = option(1000, "Rows shuffled together when streaming; 0 keeps the row order.")
    cache_in_memory: bool = option(False, "Decode a small dataset once and keep it in memory.")
    cache_latents: bool = option(False, "Encode all images with the VAE once and reuse the latents.")
    max_train_samples: int | None = option(None, "Use only this many samples, the first ones.")
    dataloader_num_workers: int = option(0, "Worker processes that decode images.")
    fail_on_unreadable: bool = option(False, "Fail on an unreadable image instead of skipping it.")

    seed: int = option(0, "Seed of the initial weights, the data order and all noise.")
    max_train_steps: int = option(1000, "Total number of optimizer steps.")
    train_batch_size: int = option(32, "Images per process and micro-batch.")
    gradient_accumulation_steps: int = option(1, "Micro-batches per optimizer step.")
    learning_rate: float = option(1e-3, "Peak learning rate.")
    lr_scheduler: str = option("cosine", "Learning rate schedule after warm-up.")
    lr_warmup_steps: int = option(100, "Steps of linear warm-up.")
    lr_end_ratio: float = option(0.0, "Final learning rate relative to the peak, for schedules that decay to 0.")
    adam_beta1: float = option(0.9, "AdamW: decay rate of the first moment.")
    adam_beta2: float = option(0.95, "AdamW: decay rate of the second moment.")
    weight_decay: float = option(0.01, "AdamW: weight decay of matrices.")
    max_grad_norm: float = option(1.0, "Clip gradients to this norm.")
    mixed_precision: str | None = option(None, "Mixed precision mode; if unset, that of `accelerate config`.")
    gradient_checkpointing: bool = option(False, "Recompute activations to save memory.")
    compile: bool = option(False, "Compile the model with torch.compile.")
    ema_decay: float = option(0.999, "Decay of the exported EMA weights; 0: no EMA.")

    logging_steps: int = option(20, "Log every N steps, each time the means since the last entry.")
    checkpointing_steps: int = option(500, "Save a checkpoint every N steps.")
    checkpoints_total_limit: int = option(2, "Number of newest checkpoints to keep.")
    resume_from_checkpoint: str | None = option(None, "Checkpoint to resume from: `latest` or a folder.")
    validation_steps: int = option(500, "Run validation every N steps; 0: never.")
    num_validation_images: int = option(8, "Number of images on the validation sheet.")
    export_dtype: str = option("float32", "Dtype of the saved model.")
    report_to: str | None = option(None, "Accelerate tracker, for example `tensorboard` or `wandb`.")
    push_to_hub: bool = option(False, "Upload the trained model and its model card to the Hub.")
    hub_model_id: str | None = option(None, "Hub repository for `push_to_hub`; if unset, the name of `output_dir`.")

    @property
    def starts_from_model(self) -> bool:
        """Whether the run starts from a model, whose resolution it has unless the options say otherwise."""
        return any(getattr(self, name, None) is not None for name in ("pretrained_tokenizer", "pretrained_prior"))

    # Smallest and largest allowed values of options that have bounds.
    LIMITS: ClassVar[dict[str, tuple[float, float]]] = AdapterArguments.LORA_LIMITS | {
        "resolution": (1, inf),
        "max_area": (1, inf),
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
        if self.resolution is None and not self.starts_from_model:
            self.resolution = SIDE
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
        if self.max_area is not None and self.resolution and self.max_area > MAX_AREA * self.resolution**2:
            raise ValueError(
                f"`max_area` must be at most {MAX_AREA} times the square of `resolution` ({self.resolution}), which is"
                f" {MAX_AREA * self.resolution**2}, got {self.max_area}."
            )
        if self.buckets and self.train_data == ["synthetic"]:
            raise ValueError("`buckets` needs images of other shapes, but those of `train_data` synthetic are square.")
        self.check_adapter()
        if self.hub_model_id is not None and not self.push_to_hub:
            raise ValueError(
                f"`hub_model_id` is {self.hub_model_id!r}, but nothing is uploaded: set `push_to_hub` too."
            )
