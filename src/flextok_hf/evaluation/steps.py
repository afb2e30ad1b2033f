"""Measure how many decoder steps each number of tokens needs, and write them to a model as its default.

A run of many steps, by default 100, is the reference: fewer steps are enough if their images, from the same tokens and
the same noise, are within a perceptual distance of it. Few tokens leave much open, so that their images need the most.
"""

import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..models.default_steps import MAX_STEPS, check_default_steps
from ..utils.files import read_json, write_text
from ..utils.tables import markdown_table
from .accumulators import Checksum, MeanWithInterval
from .image_index import ImageIndex
from .image_measures import EXTRA_MEASURES, ImageMeasure
from .images import draw_rows, image_checksums, load_split, to_unit_range
from .measurement import Cost, Measurement
from .options import EvaluationOptions, check_positive
from .plots import plot_curves
from .results import interval_text, protocol_lines, write_record
from .sampling import Sampling, reconstruct


PERCEPTUAL = "perceptual_distance"


@dataclass(kw_only=True)
class StepsOptions(EvaluationOptions):
    """How many decoder steps an image needs, per number of tokens: the fewest that agree with very many."""

    split: str = field(default="validation", metadata={"help": "Split of the images."})
    max_images: int | None = field(default=None, metadata={"help": "Random subset of this many images."})
    guidance_scale: float | None = field(default=None, metadata={"help": "Decoder guidance; default: the model's."})
    step_counts: list[int] = field(
        default_factory=lambda: [1, 2, 4, 8, 12, 16, 20, 30, 50], metadata={"help": "Numbers of steps to try."}
    )
    reference_steps: int = field(default=100, metadata={"help": "Steps of the images to agree with."})
    measure: str = field(
        default=PERCEPTUAL, metadata={"help": "Distance: `perceptual_distance`, `lpips` or `dreamsim`."}
    )
    tolerance: float = field(default=0.1, metadata={"help": "Largest mean distance to the reference images."})
    write_to_model: bool = field(
        default=False, metadata={"help": "Write the result to `model`, a folder, as its default number of steps."}
    )

    def __post_init__(self):
        super().__post_init__()
        check_positive("max_images", self.max_images)
        if not self.step_counts or sorted(set(self.step_counts)) != self.step_counts or self.step_counts[0] < 1:
            raise ValueError(f"`step_counts` must be increasing numbers of 1 or more, got {self.step_counts}.")
        if not self.step_counts[-1] < self.reference_steps <= MAX_STEPS:
            raise ValueError(
                f"`reference_steps` must be above all `step_counts`, at most {MAX_STEPS}, got {self.reference_steps}."
            )
        if self.measure not in (PERCEPTUAL, *EXTRA_MEASURES):
            known = ", ".join((PERCEPTUAL, *EXTRA_MEASURES))
            raise ValueError(f"`measure` must be one of {known}, got {self.measure!r}.")
        if not self.tolerance > 0:
            raise ValueError(f"`tolerance` must be above 0, got {self.tolerance}.")
        if self.num_inference_steps is not None:
            raise ValueError("`num_inference_steps` is what this measures: set `step_counts` instead.")
        if self.write_to_model and (
            self.model is None or not (Path(self.model) / "decoder" / "config.json").is_file()
        ):
            raise ValueError(f"`write_to_model` needs `model` to be the folder of a pipeline, got {self.model!r}.")

    def sampling(self, num_inference_steps: int) -> Sampling:
        """Return the sampling settings with a number of steps."""
        return Sampling(
            num_inference_steps=num_inference_steps, guidance=self.guidance, guidance_scale=self.guidance_scale
        )


class Steps(Measurement):
    """Distances of images from few steps to those from many, from options to a record."""

    options: StepsOptions

    def __init__(self, options: StepsOptions):
        super().__init__("steps", options)
        rows = load_split(options.data, options.split, options.image_column)
        drawn = draw_rows(range(len(rows)), options.max_images, options.seed)
        self.rows = rows.select(drawn)
        self.originals = self.images(self.rows)
        reference = options.sampling(options.reference_steps).resolved(self.pipe)
        self.samplings = {steps: options.sampling(steps).resolved(self.pipe) for steps in options.step_counts}
        self.reference = reference
        self.protocol |= {
            "split": options.split,
            "num_images": len(drawn),
            "guidance": {"guidance_scale": reference.guidance_scale, "guidance": reference.guidance},
            "reference": f"the same tokens and noise with {options.reference_steps} steps",
            "measure": options.measure,
            "tolerance": options.tolerance,
        }
        self.measure_distance: ImageMeasure
        if options.measure == PERCEPTUAL:
            self.measure_distance = ImageIndex(self.originals.read_all()).distance_between
        else:
            self.measure_distance = EXTRA_MEASURES[options.measure](self.device)
        counts = nn.ModuleDict()
        for count in self.counts:
            counts[str(count)] = nn.ModuleDict({str(steps): MeanWithInterval() for steps in options.step_counts})
        self.accumulators = nn.ModuleDict({"cost": Cost(), "checksum": Checksum(), "counts": counts})

    def measure_batch(self, samples: list[int]) -> dict[int, str]:
        """Add samples to the running sums and return those that could not be read, with reasons."""
        found, originals = self.originals.read(samples)
        skipped = {sample: self.originals.skipped[sample] for sample in samples if sample not in found}
        if not found:
            return skipped
        self.accumulators["checksum"].update(image_checksums(originals))

        def make(sampling: Sampling) -> list[Tensor]:
            call = partial(reconstruct, self.pipe, originals, self.counts, found, self.options.seed, sampling)
            return self.accumulators["cost"].track(call)

        references = [to_unit_range(images) for images in make(self.reference)]
        for steps, sampling in self.samplings.items():
            for count, images, reference in zip(self.counts, make(sampling), references, strict=True):
                distance = self.measure_distance(to_unit_range(images), reference)
                self.accumulators["counts"][str(count)][str(steps)].update(distance, found)
        return skipped

    def measure(self) -> dict:
        """Measure everything, write the results, and return the record."""
        self.run("images", self.accumulators, len(self.rows), self.measure_batch)
        record = self.finish(self.make_record, [self.accumulators["cost"]], self.write)
        if record and self.options.write_to_model:
            write_default_steps(Path(str(self.options.model)), record["default_num_inference_steps"])
        return record

    def make_record(self) -> dict:
        """Return the distances of all token counts, and the steps that are enough."""
        num_measured = int(self.accumulators["checksum"].count)
        if num_measured == 0:
            reason = next(iter(self.skipped.values()), "unknown")
            raise ValueError(f"None of the {len(self.rows)} images could be read; first error: {reason}")
        self.protocol["checksum_of_images"] = self.accumulators["checksum"].compute()
        results = {
            count: {f"{steps}_steps": mean.compute() for steps, mean in by_steps.items()}
            for count, by_steps in self.accumulators["counts"].items()
        }
        means = {
            int(count): {steps: row[f"{steps}_steps"]["mean"] for steps in self.samplings}
            for count, row in results.items()
        }
        table = choose_steps(means, self.options.tolerance, self.options.reference_steps)
        return {"count": num_measured, "default_num_inference_steps": table, "results": results}

    def write(self, record: dict) -> None:
        """Write record, page and curves."""
        folder = Path(self.options.output)
        write_record(folder, self.name, record, make_markdown(record))
        columns = list(next(iter(record["results"].values())))
        by_count = {f"{count} tokens": [row[name] for name in columns] for count, row in record["results"].items()}
        curves = {f"{self.options.measure} to {self.options.reference_steps} steps": by_count}
        plot_curves(self.options.step_counts, curves, "steps", folder / "steps_curves.png")


def choose_steps(means: dict[int, dict[int, float]], tolerance: float, reference_steps: int) -> dict[str, int]:
    """Return the fewest steps from which on all distances are within a tolerance, by number of tokens.

    Args:
        means: number of tokens -> number of steps -> mean distance to the reference.
        tolerance: largest distance that counts as agreement.
        reference_steps: what a number of tokens gets if none of the tried numbers of steps is enough.

    Returns:
        A table for `default_num_inference_steps`: numbers of tokens, as in JSON, without those that need as many steps
        as the entry before.
    """
    table: dict[str, int] = {}
    for count, by_steps in sorted(means.items()):
        enough = reference_steps
        for steps, distance in sorted(by_steps.items(), reverse=True):
            if distance > tolerance:
                break
            enough = steps
        if not table or enough != list(table.values())[-1]:
            table[str(count)] = enough
    return table


def write_default_steps(model: Path, steps: dict[str, int]) -> None:
    """Write the default number of steps to the configuration of a saved pipeline's decoder."""
    check_default_steps(steps)
    path = model / "decoder" / "config.json"
    settings: dict[str, Any] = {**read_json(path), "default_num_inference_steps": steps}
    write_text(path, json.dumps(settings, indent=2, sort_keys=True) + "\n")


def make_markdown(record: dict) -> str:
    """Return the record as a Markdown page."""
    results, table = record["results"], record["default_num_inference_steps"]
    columns = list(next(iter(results.values())))
    rows = [[count, *(interval_text(row[name]) for name in columns)] for count, row in results.items()]
    protocol = record["protocol"]
    lines = [
        "# Steps",
        "",
        f"{record['count']} images.",
        "",
        *protocol_lines(record),
        "",
        f"Mean {protocol['measure'].replace('_', ' ')} to {protocol['reference']}, with 95% bootstrap intervals over"
        " images.",
        "",
        markdown_table(["tokens", *(name.replace("_", " ") for name in columns)], rows),
        "",
        f"Fewest steps within {protocol['tolerance']:g}: "
        + ", ".join(f"{steps} from {count} tokens" for count, steps in table.items())
        + ".",
    ]
    return "\n".join(lines)
