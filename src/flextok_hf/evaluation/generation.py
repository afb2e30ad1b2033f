"""Measure generation: prompts or classes become images from several numbers of tokens.

Adherence to the condition is measured on every set of prompts; realism and diversity on the first set only.
Reconstructions of real images, scored in the same way, are the upper bound that a perfect prior could reach with the
tokenizer; shuffled prompts are the lower bound.
"""

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..utils.files import save_image
from ..utils.sheets import contact_sheet, token_count_title
from .accumulators import Checksum, KeptImages, MeanWithInterval, share_of
from .adherence import AdherenceScore, measure_feature_space
from .conditions import Condition, ConditionedMeasurement, checksum
from .distributions import FeatureMoments, FeatureReservoir, StreamedScore, frechet_distance, precision_and_recall
from .feature_networks import ClipScore
from .generation_pages import make_markdown, panels_of
from .images import image_checksums, to_pil
from .intervals import wilson_interval
from .measurement import Cost
from .options import GenerationOptions
from .plots import plot_curves
from .results import write_record
from .sampling import Sampling, generate, reconstruct


BOUND, SHUFFLED = "reconstructions", "_shuffled"


class Generation(ConditionedMeasurement):
    """Generation, from options to a record."""

    options: GenerationOptions

    def __init__(self, options: GenerationOptions):
        super().__init__("generation", options)
        self.samplings = [sampling.resolved(self.pipe) for sampling in options.samplings()]
        column = options.caption_column or options.class_column
        in_split = [row for row in self.all_rows if row["split"] == options.split]
        self.reference_rows = [row for row in self.all_rows if row["split"] == options.reference_split]
        if column is not None:
            if not in_split:
                raise ValueError(f"`split` {options.split!r} of {options.data!r} is missing or empty.")
            self.sets = {"prompts": self.column_set(column, in_split)}
        elif self.has_prompt_sets:
            self.sets = self.prompt_sets()
            in_split = [row for row in self.all_rows if row["split"] == "train"]
        else:
            raise ValueError(f"{options.data!r} has no sets of prompts: specify `caption_column` or `class_column`.")
        if self.reference is None and self.network is None:
            raise ValueError("Nothing to measure: specify `attributes` or a `feature_network`.")
        self.first_set = next(iter(self.sets))
        self.jobs = [(key, index) for key, conditions in self.sets.items() for index in range(len(conditions))]
        self.to_reconstruct = self.draw(in_split)
        self.originals = self.images(self.to_reconstruct)
        self.clip = ClipScore(options.clip_model).to(self.device) if options.clip_model else None
        self.protocol |= {"num_prompts": {key: len(conditions) for key, conditions in self.sets.items()}}
        self.protocol["conditions"] = column or "sets of prompts"
        self.protocol["checksum_of_conditions"] = checksum(self.sets)
        self.protocol["clip_sha256"] = None if self.clip is None else self.clip.sha256
        if self.network is not None:
            if not self.reference_rows:
                raise ValueError(
                    f"`reference_split` {options.reference_split!r} of {options.data!r} is missing or empty."
                )
            self.check_distribution(len(self.reference_rows), "`reference_split`")
            self.check_distribution(len(self.sets[self.first_set]), "`max_prompts`")
            self.protocol["reference"] = f"{len(self.reference_rows)} images of {options.reference_split}"

    def real_accumulators(self, num_features: int) -> nn.ModuleDict:
        """Return the running sums over the reference set."""
        return nn.ModuleDict(
            {
                "checksum": Checksum(),
                "features": FeatureMoments(num_features),
                "reservoir": FeatureReservoir(num_features),
            }
        )

    def set_accumulators(self, with_distribution: bool) -> nn.ModuleDict:
        """Return the running sums of one set of prompts at one token count."""
        sums: dict[str, nn.Module] = {}
        if self.checks:
            sums["adherence"] = AdherenceScore(self.checks)
        if self.clip is not None:
            sums["clip_score"] = MeanWithInterval()
        if self.network is not None and self.network.class_names is not None:
            sums["recognized"] = MeanWithInterval()
        if self.network is not None and with_distribution:
            description = self.network.description
            sums["features"] = FeatureMoments(description.num_features)
            sums["reservoir"] = FeatureReservoir(description.num_features)
            if description.num_classes:
                sums["score"] = StreamedScore(description.num_classes)
        return nn.ModuleDict(sums)

    def build_accumulators(self, names: Sequence[str]) -> nn.ModuleDict:
        """Return the running sums of a pass over the sets `names`."""
        sets = nn.ModuleDict()
        for name in names:
            with_distribution = name == self.first_set
            by_count = {str(count): self.set_accumulators(with_distribution) for count in self.counts}
            sets[name] = nn.ModuleDict(by_count)
        return nn.ModuleDict({"cost": Cost(), "sets": sets})

    def measure_reference(self, sums: Any, samples: list[int]) -> dict[int, str]:
        """Add images of the reference set."""
        images = self.images(self.reference_rows)
        found, pixels = images.read(samples)
        if found and self.network is not None:
            features, _ = self.network(pixels)
            sums["checksum"].update(image_checksums(pixels))
            sums["features"].update(features, found)
            sums["reservoir"].update(features, found)
        return images.skipped

    def measure_prompts(self, sums: Any, sampling: Sampling, samples: list[int]) -> dict[int, str]:
        """Generate images for prompts and add them to the sums of their sets."""
        jobs = [self.jobs[sample] for sample in samples]
        indices = [index for _, index in jobs]
        conditions = [self.sets[key][index]["condition"] for key, index in jobs]
        make = partial(generate, self.pipe, conditions, self.counts, indices, self.options.seed, sampling)
        for column, (count, images) in enumerate(zip(self.counts, sums["cost"].track(make), strict=True)):
            for key in self.sets:
                chosen = [position for position, (name, _) in enumerate(jobs) if name == key]
                if chosen:
                    part = [indices[position] for position in chosen]
                    self.add_images(sums["sets"], key, count, images[chosen], part)
                    if "kept" in sums and key == self.shown_set:
                        sums["kept"].update(column, images[chosen], part)
        return {}

    def measure_bound(self, sums: Any, samples: list[int]) -> dict[int, str]:
        """Reconstruct real images and score them like generated ones."""
        found, originals = self.originals.read(samples)
        if found and self.reference is not None:
            make = partial(reconstruct, self.pipe, originals, self.counts, found, self.options.seed, self.samplings[0])
            for count, images in zip(self.counts, sums["cost"].track(make), strict=True):
                wanted = [self.attributes_of(self.to_reconstruct[index]) for index in found]
                answer = self.reference.answer(self.checks, images, wanted)
                sums["sets"][BOUND][str(count)]["adherence"].update(*answer, found)
        return {sample: reason for sample, reason in self.originals.skipped.items() if sample in samples}

    def add_images(self, sets: Any, key: str, count: int, images: Tensor, indices: list[int]) -> None:
        """Add images (B, 3, R, R) uint8 of one set and token count to its sums."""
        conditions = self.sets[key]
        wanted = [conditions[index] for index in indices]
        sums = sets[key][str(count)]
        if self.reference is not None:
            sums["adherence"].update(*self.reference.answer(self.checks, images, wanted), indices)
            if key == self.first_set:
                # neighboring prompts may share a name; prompts half the list apart do not
                others = [conditions[(index + len(conditions) // 2) % len(conditions)] for index in indices]
                answer = self.reference.answer(self.checks, images, others)
                sets[key + SHUFFLED][str(count)]["adherence"].update(*answer, indices)
        if self.clip is not None and isinstance(wanted[0]["condition"], str):
            sums["clip_score"].update(self.clip(images, [row["condition"] for row in wanted]), indices)
        if self.network is None or not ({"recognized", "features"} & set(sums)):
            return
        features, log_probabilities = self.network(images)
        if "features" in sums:
            sums["features"].update(features, indices)
            sums["reservoir"].update(features, indices)
        if log_probabilities is not None:
            self.add_classes(sums, log_probabilities.cpu(), self.network.class_names or [], wanted, indices)

    @staticmethod
    def add_classes(
        sums: Any, log_probabilities: Tensor, class_names: list[str], wanted: list[Condition], indices: list[int]
    ) -> None:
        """Add the classifier's output (B, C) to its score, and whether it predicts the class asked for."""
        if "score" in sums:
            sums["score"].update(log_probabilities, indices)
        chosen = [position for position, row in enumerate(wanted) if row.get("name") in class_names]
        if chosen:
            seen = [class_names[index] for index in log_probabilities[chosen].argmax(dim=1).tolist()]
            hits = [name == wanted[position]["name"] for name, position in zip(seen, chosen, strict=True)]
            sums["recognized"].update(torch.tensor(hits), [indices[position] for position in chosen])

    @property
    def shown_set(self) -> str:
        """The set of prompts on the contact sheet: everyday names if there are any."""
        return "everyday" if "everyday" in self.sets else self.first_set

    def measure(self) -> dict:
        """Measure everything, write the results, and return the record."""
        options = self.options
        self.protocol["samplings"] = [asdict(sampling) for sampling in self.samplings]
        names = [*self.sets, self.first_set + SHUFFLED] if self.reference is not None else list(self.sets)
        passes = []
        for number, sampling in enumerate(self.samplings):
            sums = self.build_accumulators(names)
            if number == 0:
                total = len(self.sets[self.shown_set])
                shown = range(0, total, max(1, total // options.sheet_rows))[: options.sheet_rows]
                sums["kept"] = KeptImages(list(shown), len(self.counts), self.pipe.resolution)
            self.run(f"prompts-{number + 1}", sums, len(self.jobs), partial(self.measure_prompts, sums, sampling))
            passes.append(sums)
        real, bound = None, None
        if self.network is not None:
            real = self.real_accumulators(self.network.description.num_features)
            self.run("reference", real, len(self.reference_rows), partial(self.measure_reference, real))
        if self.reference is not None:
            bound = self.build_accumulators([BOUND])
            self.run("reconstructions", bound, len(self.originals), partial(self.measure_bound, bound))
        self.kept = passes[0]["kept"]
        costs = [sums["cost"] for sums in (*passes, *([bound] if bound is not None else []))]
        return self.finish(partial(self.make_record, real, passes, bound), costs, self.write)

    def make_record(self, real: Any, passes: list[Any], bound: Any) -> dict:
        """Return the figures of all sets, token counts and settings."""
        if real is not None:
            self.protocol["checksum_of_reference"] = real["checksum"].compute()
        record: dict = {"real_images": len(self.all_rows), "settings": asdict(self.samplings[0])}
        if "name" in self.attributes:
            record["names"] = len({row["name"] for row in self.all_rows})
        if self.reference is not None:
            maximum = self.options.max_prompts
            record["feature_space"] = measure_feature_space(
                self.reference, self.checks, self.pixels, maximum, self.options.seed
            )
        results = [self.summarize_pass(sums, real) for sums in passes]
        if bound is not None:
            results[0] |= self.summarize_pass(bound, None)
        record["results"] = results[0]
        record["sweep"] = [
            {"sampling": asdict(sampling), "results": result}
            for sampling, result in zip(self.samplings[1:], results[1:], strict=True)
        ]
        return record

    def summarize_pass(self, sums: Any, real: Any) -> dict:
        """Return the figures of each set and token count."""
        return {
            name: {count: self.summarize(figures, real) for count, figures in by_count.items()}
            for name, by_count in sums["sets"].items()
        }

    def summarize(self, sums: Any, real: Any) -> dict:
        """Return the figures of one set at one token count."""
        figures: dict = sums["adherence"].compute() if "adherence" in sums else {}
        if "clip_score" in sums and sums["clip_score"].count > 0:
            figures["clip_score"] = sums["clip_score"].compute()
        if "recognized" in sums and sums["recognized"].count > 0:
            figures["recognized"] = share_of(sums["recognized"])
        if "features" in sums and self.network is not None:
            is_inception = self.network.description.is_inception
            key = "fid" if is_inception else "frechet_distance"
            figures[key] = frechet_distance(real["features"], sums["features"], is_paired=False)
            if "score" in sums:
                figures["inception_score" if is_inception else "classifier_score"] = sums["score"].compute()
            kept = {"real": real["reservoir"].compute(), "fake": sums["reservoir"].compute()}
            for name, share, count in zip(
                ("precision", "recall"),
                precision_and_recall(kept["real"], kept["fake"]),
                (len(kept["fake"]), len(kept["real"])),
                strict=True,
            ):
                low, high = wilson_interval(share * count, count)
                figures[name] = {"share": share, "low": low, "high": high}
        return figures

    def write(self, record: dict) -> None:
        """Write record, page, curves and contact sheet."""
        folder = Path(self.options.output)
        write_record(folder, self.name, record, make_markdown(record))
        rows = [[to_pil(image) for image in row] for row in self.kept.compute()]
        save_image(contact_sheet(rows, [token_count_title(count) for count in self.counts]), folder / "generation.png")
        plot_curves(self.counts, panels_of(record), "tokens", folder / "generation_curves.png")
