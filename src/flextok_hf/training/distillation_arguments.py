"""Options of distillation, which turns a trained flow decoder into one of few steps."""

from dataclasses import dataclass, field
from math import inf
from typing import ClassVar

from .arguments import TrainingArguments, option


STEP_COUNTS = (1, 2, 4)  # a distilled decoder learns the steps of runs of that many


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
    teacher_steps: int = option(
        12, "Steps of the teacher's run from noise to data, one run per image; a multiple of 4."
    )
    intervals_per_image: int = option(8, "Intervals of that run that the student learns from, per image and step.")
    empty_share: float = option(0.25, "Fraction of intervals that are empty, where it learns the velocity itself.")

    LIMITS: ClassVar[dict[str, tuple[float, float]]] = TrainingArguments.LIMITS | {
        "min_guidance_scale": (0, inf),
        "max_guidance_scale": (0, inf),
        "interval_blocks": (0, inf),
        "teacher_steps": (STEP_COUNTS[-1], inf),
        "intervals_per_image": (1, inf),
        "empty_share": (0, 1),
    }

    ADAPTED_PARTS: ClassVar[tuple[str, ...]] = ("decoder",)
    START: ClassVar[str] = "pretrained_tokenizer"

    def __post_init__(self):
        super().__post_init__()
        low, high = self.min_guidance_scale, self.max_guidance_scale
        if (low is None) != (high is None):
            raise ValueError(f"Set both `min_guidance_scale` and `max_guidance_scale`, or none; got {low} and {high}.")
        if low is not None and high is not None and low > high:
            raise ValueError(f"`min_guidance_scale` ({low}) must not be above `max_guidance_scale` ({high}).")
        if self.teacher_steps % STEP_COUNTS[-1]:
            raise ValueError(f"`teacher_steps` must be a multiple of {STEP_COUNTS[-1]}, got {self.teacher_steps}.")
