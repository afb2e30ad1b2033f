"""Options of distillation, which turns a trained flow decoder into one of few steps."""

from dataclasses import dataclass, field
from math import inf
from typing import ClassVar

from ..pipelines.flow import SIGMA_DISTRIBUTIONS
from .arguments import TrainingArguments, option


@dataclass(kw_only=True)
class DistillationArguments(TrainingArguments):
    """Options of distillation: the decoder of a trained pipeline learns to take few steps."""

    pretrained_tokenizer: str = field(
        metadata={"help": "Pipeline whose decoder is distilled (folder or Hub id); all else is saved as it is."}
    )
    min_guidance_scale: float | None = option(
        None, "Lowest guidance scale to learn, for all between it and the highest; if unset, the model's default only."
    )
    max_guidance_scale: float | None = option(None, "Highest guidance scale to learn; set both or none.")
    interval_blocks: int | None = option(
        None, "Number of last decoder blocks that read the end of a step; if unset, a third of them."
    )
    sigma_distribution: str = option("logit_normal", "Distribution of the noise levels at which a step begins.")
    logit_mean: float = option(0.0, "Mean of the logit-normal; positive means more noise.")
    logit_std: float = option(1.0, "Standard deviation of the logit-normal.")
    mode_scale: float = option(0.25, "Scale parameter of the mode distribution.")
    noise_probability: float = option(
        0.2, "Fraction of steps that begin with noise alone, as the first of a run does."
    )
    data_probability: float = option(0.2, "Fraction of steps that end with data, as the last of a run does.")

    LIMITS: ClassVar[dict[str, tuple[float, float]]] = TrainingArguments.LIMITS | {
        "min_guidance_scale": (0, inf),
        "max_guidance_scale": (0, inf),
        "interval_blocks": (0, inf),
        "logit_std": (0, inf),
        "noise_probability": (0, 1),
        "data_probability": (0, 1),
    }
    CHOICES: ClassVar[dict[str, tuple[str, ...]]] = TrainingArguments.CHOICES | {
        "sigma_distribution": SIGMA_DISTRIBUTIONS
    }

    def __post_init__(self):
        super().__post_init__()
        low, high = self.min_guidance_scale, self.max_guidance_scale
        if (low is None) != (high is None):
            raise ValueError(f"Set both `min_guidance_scale` and `max_guidance_scale`, or none; got {low} and {high}.")
        if low is not None and high is not None and low > high:
            raise ValueError(f"`min_guidance_scale` ({low}) must not be above `max_guidance_scale` ({high}).")
