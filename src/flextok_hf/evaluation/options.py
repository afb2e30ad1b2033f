"""Options of the three measurements: one dataclass each, read from flags and a YAML file like those of training."""

from dataclasses import dataclass, field

from .image_measures import EXTRA_MEASURES
from .sampling import Sampling


NO_NETWORK = "none"


@dataclass(kw_only=True)
class EvaluationOptions:
    """Options that all measurements share."""

    data: str = field(metadata={"help": "Folder, parquet file or Hub name of real images, or `synthetic`."})
    output: str = field(metadata={"help": "Folder for the results; made if missing."})
    model: str | None = field(default=None, metadata={"help": "Folder or Hub id; by default the embedded model."})
    model_name: str | None = field(default=None, metadata={"help": "What the results call it; by default `model`."})
    device: str | None = field(default=None, metadata={"help": "Where to run it; by default the best device."})
    image_column: str = field(default="image", metadata={"help": "Column of the images."})
    token_counts: list[int] | None = field(
        default=None, metadata={"help": "Tokens per image; by default 1, 2, 4, ... all."}
    )
    batch_size: int = field(default=16, metadata={"help": "Samples drawn at a time; figures do not depend on it."})
    seed: int = field(default=0, metadata={"help": "Sample i is drawn with seed + i; also draws the samples."})
    feature_network: str = field(
        default=NO_NETWORK,
        metadata={"help": "For distances between sets: `inception`, its .pth file, a vision model, or `none`."},
    )
    num_inference_steps: int = field(default=20, metadata={"help": "Steps of the flow decoder."})
    guidance: str = field(default="apg", metadata={"help": "Rule of the decoder's guidance, `apg` or `cfg`."})
    sheet_rows: int = field(default=12, metadata={"help": "Rows of the contact sheet."})

    def __post_init__(self):
        if self.batch_size < 1 or self.sheet_rows < 1:
            raise ValueError(
                f"`batch_size` and `sheet_rows` must be 1 or more, got {self.batch_size} and {self.sheet_rows}."
            )


@dataclass(kw_only=True)
class ReconstructionOptions(EvaluationOptions):
    """Images -> tokens -> images: how close, and how real as a set, for each number of tokens."""

    split: str = field(default="validation", metadata={"help": "Split to reconstruct."})
    max_images: int | None = field(default=None, metadata={"help": "Draw this many images at random."})
    guidance_scale: float | None = field(default=None, metadata={"help": "By default that of the model."})
    extra_measures: list[str] = field(
        default_factory=list, metadata={"help": "`lpips`, `dreamsim`; their packages must be installed."}
    )
    group_column: str = field(default="style", metadata={"help": "Means by its values, if the data has it."})
    sheet_group: str | None = field(default=None, metadata={"help": "Show images of this group only."})

    def __post_init__(self):
        super().__post_init__()
        wrong = sorted(set(self.extra_measures) - set(EXTRA_MEASURES))
        if wrong:
            raise ValueError(f"`extra_measures` must be among {', '.join(EXTRA_MEASURES)}, got {wrong}.")

    def sampling(self) -> Sampling:
        """Return how images are drawn."""
        return Sampling(
            num_inference_steps=self.num_inference_steps, guidance=self.guidance, guidance_scale=self.guidance_scale
        )


@dataclass(kw_only=True)
class ConditionOptions(EvaluationOptions):
    """Options of measurements that draw from prompts or classes."""

    max_prompts: int | None = field(default=None, metadata={"help": "Draw this many prompts of each set at random."})
    attributes: list[str] = field(
        default_factory=list,
        metadata={"help": "Columns that the nearest real image must share; default: name and style, where known."},
    )
    top_k: int = field(default=0, metadata={"help": "Best ids that the prior chooses among; 0: all."})
    top_p: float = field(default=1.0, metadata={"help": "Probability of the ids that it chooses among."})


@dataclass(kw_only=True)
class GenerationOptions(ConditionOptions):
    """Prompts or classes -> images: as asked for, and real as a set, per number of tokens, guidance, temperature."""

    split: str = field(default="validation", metadata={"help": "Split of the prompts, unless the data has sets."})
    reference_split: str = field(default="train", metadata={"help": "Split that images are compared with as a set."})
    caption_column: str | None = field(default=None, metadata={"help": "Prompts, for data without prompt columns."})
    class_column: str | None = field(default=None, metadata={"help": "Classes instead of prompts."})
    guidance_scale: list[float] = field(
        default_factory=list, metadata={"help": "Values to try; by default that of the model."}
    )
    prior_guidance_scale: list[float] = field(
        default_factory=list, metadata={"help": "Values to try; by default that of the model."}
    )
    temperature: list[float] = field(default_factory=lambda: [1.0], metadata={"help": "Values to try."})
    clip_model: str | None = field(default=None, metadata={"help": "CLIP model for the CLIP score, folder or Hub id."})

    def __post_init__(self):
        super().__post_init__()
        if self.caption_column is not None and self.class_column is not None:
            raise ValueError("Name `caption_column` or `class_column`, not both.")
        if not self.temperature:
            raise ValueError("`temperature` is empty: name at least one value.")

    def samplings(self) -> list[Sampling]:
        """Return how images are drawn, one for each combination of the values to try."""
        default: list[float | None] = [None]
        return [
            Sampling(
                num_inference_steps=self.num_inference_steps,
                guidance=self.guidance,
                guidance_scale=guidance_scale,
                prior_guidance_scale=prior_guidance_scale,
                temperature=temperature,
                top_k=self.top_k,
                top_p=self.top_p,
            )
            for guidance_scale in [*self.guidance_scale] or default
            for prior_guidance_scale in [*self.prior_guidance_scale] or default
            for temperature in self.temperature
        ]


@dataclass(kw_only=True)
class ComplexityOptions(ConditionOptions):
    """How many tokens a condition needs: adherence of prompts of growing detail, and where it stops growing."""

    split: str = field(default="train", metadata={"help": "Split of the prompts."})
    levels: list[str] = field(
        default_factory=lambda: ["prompt=name", "styled_prompt=name,style"],
        metadata={"help": "Column of prompts and what they ask for, from little detail to much."},
    )
    guidance_scale: float | None = field(default=None, metadata={"help": "By default that of the model."})
    prior_guidance_scale: float | None = field(default=None, metadata={"help": "By default that of the model."})
    temperature: float = field(default=1.0, metadata={"help": "Of the prior."})
    saturation: float = field(
        default=0.95, metadata={"help": "Adherence counts as full from this share of its largest value on."}
    )

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.saturation <= 1:
            raise ValueError(f"`saturation` must lie in (0, 1], got {self.saturation}.")
        if not self.levels:
            raise ValueError("`levels` is empty: name at least one, such as prompt=name.")
        for level in self.levels:
            if "=" not in level or not all(level.partition("=")[::2]):
                raise ValueError(f"`levels` has {level!r}; each must read column=attribute,attribute.")

    def parsed_levels(self) -> list[tuple[str, tuple[str, ...]]]:
        """Return the column of the prompts and the attributes asked for, per level."""
        return [(level.partition("=")[0], tuple(level.partition("=")[2].split(","))) for level in self.levels]

    def sampling(self) -> Sampling:
        """Return how images are drawn."""
        return Sampling(
            num_inference_steps=self.num_inference_steps,
            guidance=self.guidance,
            guidance_scale=self.guidance_scale,
            prior_guidance_scale=self.prior_guidance_scale,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
        )
