"""Options of the three measurements: one dataclass each, read from flags and a YAML file as in training."""

from dataclasses import dataclass, field

from .image_measures import EXTRA_MEASURES
from .sampling import Sampling


NO_NETWORK = "none"
AUTO = "auto"


def check_positive(name: str, value: int | None) -> None:
    """Raise a ValueError if a number of samples is set and below 1."""
    if value is not None and value < 1:
        raise ValueError(f"`{name}` must be 1 or more, got {value}. Leave it out to use all.")


@dataclass(kw_only=True)
class EvaluationOptions:
    """Options that all measurements share."""

    data: str = field(metadata={"help": "Real images: a folder, parquet file or Hub id, or `synthetic`."})
    output: str = field(metadata={"help": "Folder for the results; created if missing."})
    model: str | None = field(default=None, metadata={"help": "Folder or Hub id; by default the embedded model."})
    model_name: str | None = field(default=None, metadata={"help": "Model name in results; by default `model`."})
    decoder: str | None = field(
        default=None, metadata={"help": "Subfolder of the model's decoder, such as `flow_decoder`."}
    )
    device: str | None = field(default=None, metadata={"help": "Device to run on; by default the best available."})
    image_column: str = field(default="image", metadata={"help": "Column of the images."})
    token_counts: list[int] | None = field(
        default=None, metadata={"help": "Numbers of tokens to measure; by default 1, 2, 4, ... all."}
    )
    batch_size: str = field(
        default="16", metadata={"help": "Samples per batch, or `auto`; results do not depend on it."}
    )
    seed: int = field(default=0, metadata={"help": "Sample i uses seed + i; also selects random subsets."})
    feature_network: str = field(
        default=NO_NETWORK,
        metadata={"help": "For distances between sets: `inception`, its .pth file, a vision model, or `none`."},
    )
    num_inference_steps: int | None = field(default=None, metadata={"help": "Decoder steps; default: the model's."})
    guidance: str = field(default="apg", metadata={"help": "Guidance method of the decoder, `apg` or `cfg`."})
    sheet_rows: int = field(default=12, metadata={"help": "Rows of the contact sheet."})

    def __post_init__(self):
        size = str(self.batch_size)
        if size != AUTO and not (size.isdecimal() and int(size) >= 1):
            raise ValueError(f"`batch_size` must be 1 or more, or `{AUTO}`, got {size}.")
        if self.sheet_rows < 1:
            raise ValueError(f"`sheet_rows` must be 1 or more, got {self.sheet_rows}.")


@dataclass(kw_only=True)
class ReconstructionOptions(EvaluationOptions):
    """Images -> tokens -> images: closeness to the originals and realism as a set, per number of tokens."""

    split: str = field(default="validation", metadata={"help": "Split to reconstruct."})
    max_images: int | None = field(default=None, metadata={"help": "Random subset of this many images."})
    guidance_scale: float | None = field(default=None, metadata={"help": "Decoder guidance; default: the model's."})
    extra_measures: list[str] = field(
        default_factory=list, metadata={"help": "`lpips`, `dreamsim`; their packages must be installed."}
    )
    group_column: str | None = field(
        default=None, metadata={"help": "Also report means per value of this column; default: style, if present."}
    )
    sheet_group: str | None = field(default=None, metadata={"help": "Group to show on the contact sheet."})
    baselines: bool = field(
        default=False, metadata={"help": "Also measure thumbnails of as many bits as the tokens, and the VAE alone."}
    )
    recognition_among: int | None = field(
        default=None, metadata={"help": "Find each original among this many of the split; default: do not."}
    )

    def __post_init__(self):
        super().__post_init__()
        check_positive("max_images", self.max_images)
        if self.recognition_among is not None and self.recognition_among < 2:
            raise ValueError(
                f"`recognition_among` must be 2 or more, the originals to choose from, got {self.recognition_among}."
            )
        wrong = sorted(set(self.extra_measures) - set(EXTRA_MEASURES))
        if wrong:
            raise ValueError(f"`extra_measures` must be among {', '.join(EXTRA_MEASURES)}, got {wrong}.")

    def sampling(self) -> Sampling:
        """Return the sampling settings."""
        return Sampling(
            num_inference_steps=self.num_inference_steps, guidance=self.guidance, guidance_scale=self.guidance_scale
        )


@dataclass(kw_only=True)
class ConditionOptions(EvaluationOptions):
    """Options of measurements that generate from prompts or classes."""

    max_prompts: int | None = field(default=None, metadata={"help": "Random subset of this many prompts per set."})
    attributes: list[str] = field(
        default_factory=list,
        metadata={"help": "Columns that the nearest real image must match; default: name and style, if present."},
    )
    top_k: int = field(default=0, metadata={"help": "Number of most likely ids to sample from; 0: all."})
    top_p: float = field(default=1.0, metadata={"help": "Total probability of the most likely ids to sample from."})

    def __post_init__(self):
        super().__post_init__()
        check_positive("max_prompts", self.max_prompts)


@dataclass(kw_only=True)
class GenerationOptions(ConditionOptions):
    """Prompts or classes -> images: adherence and realism as a set, per number of tokens, guidance, temperature."""

    split: str = field(default="validation", metadata={"help": "Split of the caption or class column."})
    reference_split: str = field(default="train", metadata={"help": "Reference split for distances between sets."})
    caption_column: str | None = field(default=None, metadata={"help": "Column of prompts; default: prompt sets."})
    class_column: str | None = field(default=None, metadata={"help": "Column of classes, instead of prompts."})
    guidance_scale: list[float] = field(default_factory=list, metadata={"help": "Values; default: the model's."})
    prior_guidance_scale: list[float] = field(default_factory=list, metadata={"help": "Values; default: the model's."})
    temperature: list[float] = field(default_factory=lambda: [1.0], metadata={"help": "Values to try."})
    clip_model: str | None = field(default=None, metadata={"help": "CLIP model for the CLIP score, folder or Hub id."})

    def __post_init__(self):
        super().__post_init__()
        if self.caption_column is not None and self.class_column is not None:
            raise ValueError("Pass `caption_column` or `class_column`, not both.")
        if self.clip_model is not None and self.class_column is not None:
            raise ValueError("`clip_model` compares images with prompts, and `class_column` has none: leave one out.")
        if not self.temperature:
            raise ValueError("`temperature` is empty: pass at least one value.")

    def samplings(self) -> list[Sampling]:
        """Return the sampling settings, one for each combination of the values to try."""
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
    """How many tokens a condition needs: adherence to prompts of increasing detail, and where it saturates."""

    split: str = field(default="train", metadata={"help": "Split of the prompts."})
    levels: list[str] = field(
        default_factory=lambda: ["prompt=name", "styled_prompt=name,style"],
        metadata={"help": "Prompt column and the attributes it asks for, from least to most detailed."},
    )
    guidance_scale: float | None = field(default=None, metadata={"help": "Decoder guidance; default: the model's."})
    prior_guidance_scale: float | None = field(
        default=None, metadata={"help": "Prior guidance; default: the model's."}
    )
    temperature: float = field(default=1.0, metadata={"help": "Temperature of the prior."})
    saturation: float = field(
        default=0.95, metadata={"help": "Adherence counts as saturated from this share of its maximum."}
    )

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.saturation <= 1:
            raise ValueError(f"`saturation` must lie in (0, 1], got {self.saturation}.")
        if not self.levels:
            raise ValueError("`levels` is empty: pass at least one, such as prompt=name.")
        for level in self.levels:
            if "=" not in level or not all(level.partition("=")[::2]):
                raise ValueError(f"`levels` has {level!r}; each must have the form column=attribute,attribute.")
        levels = self.parsed_levels()
        unused = sorted(set(self.attributes) - {name for _, names in levels for name in names})
        if unused:
            raise ValueError(
                f"`attributes` {unused} are in none of the `levels` {self.levels}: no prompt asks for them."
            )
        if not all(names for _, names in levels):
            raise ValueError(f"Each of the `levels` {self.levels} must ask for one of `attributes` {self.attributes}.")
        if len(set(levels)) < len(levels):
            raise ValueError(f"`levels` {self.levels} hold a level twice.")

    def parsed_levels(self) -> list[tuple[str, tuple[str, ...]]]:
        """Return the prompt column and the attributes to check, per level: of those asked for, the `attributes`."""
        split = [level.partition("=")[::2] for level in self.levels]
        return [
            (column, tuple(name for name in names.split(",") if name in self.attributes or not self.attributes))
            for column, names in split
        ]

    def sampling(self) -> Sampling:
        """Return the sampling settings."""
        return Sampling(
            num_inference_steps=self.num_inference_steps,
            guidance=self.guidance,
            guidance_scale=self.guidance_scale,
            prior_guidance_scale=self.prior_guidance_scale,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
        )
