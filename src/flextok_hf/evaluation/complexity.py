"""Measure how many tokens a condition needs: prompts of increasing detail, and where adherence saturates.

A level is a column of prompts and the attributes that they ask for. An image adheres if its nearest real image has
all of them. The paper's claim is that a simple condition needs fewer tokens than a detailed one.
"""

import math
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..utils.files import save_image
from ..utils.sheets import contact_sheet, token_count_title
from ..utils.tables import markdown_table
from .accumulators import KeptImages, MeanWithInterval, share_of
from .adherence import Check
from .conditions import Condition, ConditionedMeasurement, checksum, has_value
from .images import to_pil
from .intervals import percentile_interval
from .measurement import Cost
from .options import ComplexityOptions
from .plots import plot_curves
from .results import interval_text, protocol_lines, write_record
from .sampling import generate


class Complexity(ConditionedMeasurement):
    """Tokens needed per level of detail, from options to a record."""

    options: ComplexityOptions

    def __init__(self, options: ComplexityOptions):
        levels = options.parsed_levels()
        super().__init__("complexity", options, list(dict.fromkeys(name for _, names in levels for name in names)))
        self.sampling = options.sampling().resolved(self.pipe)
        rows = [row for row in self.all_rows if row["split"] == options.split]
        if not rows:
            raise ValueError(f"`split` {options.split!r} of {options.data!r} is missing or empty.")
        self.names = [" + ".join(attributes) for _, attributes in levels]
        if len(set(self.names)) < len(levels):  # the same attributes in several wordings
            self.names = [f"{name} ({column})" for name, (column, _) in zip(self.names, levels, strict=True)]
        self.level_checks = [Check("passed", attributes) for _, attributes in levels]
        # the same rows at every level, so that levels differ only in detail
        rows = [row for row in rows if all(has_value(row, column) for column, _ in levels if column in row)]
        if not rows:
            raise ValueError(f"No row of `split` {options.split!r} has a prompt for each of the `levels`.")
        self.levels = [self.column_set(column, rows) for column, _ in levels]
        sizes = [len(conditions) for conditions in self.levels]
        self.jobs = [(level, index) for level, size in enumerate(sizes) for index in range(size)]
        self.protocol |= {
            "split": options.split,
            "levels": options.levels,
            "num_prompts": sizes,
            "checksum_of_conditions": checksum(self.levels),
            "saturation": options.saturation,
            "sampling": asdict(self.sampling),
        }
        self.accumulators = self.build_accumulators()

    def build_accumulators(self) -> nn.ModuleDict:
        """Return the running sums of all levels and token counts."""
        rows = [
            level * len(conditions) + index
            for level, conditions in enumerate(self.levels)
            for index in range(min(len(conditions), max(1, self.options.sheet_rows // len(self.levels))))
        ]
        levels = nn.ModuleDict(
            {
                str(level): nn.ModuleDict({str(count): MeanWithInterval() for count in self.counts})
                for level in range(len(self.levels))
            }
        )
        kept = KeptImages(rows, len(self.counts), self.pipe.resolution)
        return nn.ModuleDict({"cost": Cost(), "levels": levels, "kept": kept})

    def measure_batch(self, samples: list[int]) -> dict[int, str]:
        """Generate images for prompts of any level and add whether they adhere."""
        jobs = [self.jobs[sample] for sample in samples]
        conditions = [self.levels[level][index]["condition"] for level, index in jobs]
        indices = [index for _, index in jobs]
        make = partial(generate, self.pipe, conditions, self.counts, indices, self.options.seed, self.sampling)
        for column, (count, images) in enumerate(zip(self.counts, self.accumulators["cost"].track(make), strict=True)):
            self.accumulators["kept"].update(column, images, samples)
            for level, check in enumerate(self.level_checks):
                chosen = [position for position, job in enumerate(jobs) if job[0] == level]
                if chosen:
                    part = [indices[position] for position in chosen]
                    hits = self.ask(check, images[chosen], [self.levels[level][index] for index in part])
                    self.accumulators["levels"][str(level)][str(count)].update(hits, part)
        return {}

    def ask(self, check: Check, images: Tensor, wanted: list[Condition]) -> Tensor:
        """Return whether each of the images (B, 3, R, R) uint8 has what was asked for, (B,)."""
        assert self.reference is not None  # every level has attributes
        return self.reference.answer([check], images, wanted)[1][check.key]

    def measure(self) -> dict:
        """Measure everything, write the results, and return the record."""
        self.run("prompts", self.accumulators, len(self.jobs), self.measure_batch)
        return self.finish(self.make_record, [self.accumulators["cost"]], self.write)

    def make_record(self) -> dict:
        """Return adherence per level and token count, and the number of tokens that each level needs."""
        results, needed = {}, {}
        for level, name in enumerate(self.names):
            metrics = self.accumulators["levels"][str(level)]
            results[name] = {count: {"adherence": share_of(metric)} for count, metric in metrics.items()}
            needed[name] = self.tokens_needed(metrics)
        settings = self.protocol["sampling"]
        return {"count": len(self.jobs), "settings": settings, "results": results, "tokens_needed": needed}

    def tokens_needed(self, metrics: Any) -> dict[str, float] | None:
        """Return the smallest token count from which adherence stays near its maximum, with a bootstrap interval, or
        `None` if there is none, for instance because no image adheres.
        """
        shares = torch.stack([metric.total / metric.count for metric in metrics.values()])  # (counts,)
        value = saturation_point(shares, self.counts, self.options.saturation)
        if math.isnan(value):
            return None
        resampled = torch.stack([metric.resampled_means() for metric in metrics.values()])  # (counts, resamples)
        values = [saturation_point(row, self.counts, self.options.saturation) for row in resampled.T]
        low, high = percentile_interval(torch.tensor(values, dtype=torch.float64))
        return {"value": value, "low": low, "high": high}

    def write(self, record: dict) -> None:
        """Write record, page, curves and contact sheet."""
        folder = Path(self.options.output)
        write_record(folder, self.name, record, make_markdown(record))
        rows = [[to_pil(image) for image in row] for row in self.accumulators["kept"].compute()]
        save_image(contact_sheet(rows, [token_count_title(count) for count in self.counts]), folder / "complexity.png")
        curves = {
            name: [figures["adherence"] for figures in by_count.values()]
            for name, by_count in record["results"].items()
        }
        plot_curves(self.counts, {"adherence": curves}, "tokens", folder / "complexity_curves.png")


def saturation_point(shares: Tensor, counts: list[int], saturation: float) -> float:
    """Return the smallest count from which every share is at least `saturation` times the largest.

    Args:
        shares: adherence per count, (counts,).
        counts: numbers of tokens, ascending.
        saturation: in (0, 1].

    Returns:
        A count; NaN if there is none: no share is above zero, some are NaN, or the last one is too small.
    """
    largest = shares.max().item()
    if not largest > 0:
        return float("nan")
    reached = (shares >= saturation * largest).tolist()
    first = len(counts)
    while first > 0 and reached[first - 1]:
        first -= 1
    return float(counts[first]) if first < len(counts) else float("nan")


def make_markdown(record: dict) -> str:
    """Return the record as a Markdown page."""
    counts, needed = record["token_counts"], record["tokens_needed"]
    rows = [
        [
            name,
            *(interval_text(figures["adherence"]) for figures in by_count.values()),
            "" if needed[name] is None else interval_text(needed[name], 0),
        ]
        for name, by_count in record["results"].items()
    ]
    saturation = record["protocol"]["saturation"]
    lines = [
        "# Tokens needed per condition",
        "",
        *protocol_lines(record),
        "",
        "Share of images whose nearest real image has all requested attributes, by level of detail of the prompt (95%"
        " Wilson intervals). Tokens needed: the smallest number from which adherence stays at or above"
        f" {saturation:.0%} of its maximum (95% bootstrap interval over prompts).",
        "",
        markdown_table(["requested", *(token_count_title(count) for count in counts), "tokens needed"], rows),
    ]
    return "\n".join(lines)
