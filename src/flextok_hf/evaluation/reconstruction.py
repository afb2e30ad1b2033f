"""Measure reconstruction: every image is encoded once and decoded from several numbers of tokens."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..models.latents import decode_latents, encode_latents
from ..utils.files import save_image
from ..utils.sheets import contact_sheet, token_count_title
from ..utils.tables import markdown_table, measure_title
from .accumulators import Checksum, GroupedMean, KeptImages, MeanWithInterval, share_of
from .adherence import Reference
from .distributions import FeatureMoments, frechet_distance
from .image_index import ImageIndex
from .image_measures import ALL_MEASURES, EXTRA_MEASURES, IS_LOWER_BETTER, PLAIN_MEASURES, ImageMeasure, measure_images
from .images import draw_rows, image_checksums, load_split, round_to_8_bits, to_pil, to_unit_range
from .measurement import Cost, Measurement
from .options import ReconstructionOptions
from .plots import plot_curves
from .recognition import SPACES, Candidates
from .results import interval_text, protocol_lines, write_record
from .sampling import reconstruct
from .thumbnails import code_as_thumbnails, thumbnail_bits, thumbnail_size


GROUP_COLUMN = "style"
THUMBNAIL, VAE = "thumbnail", "vae"  # baselines


class Reconstruction(Measurement):
    """Reconstruction of a split, from options to a record."""

    options: ReconstructionOptions

    def __init__(self, options: ReconstructionOptions):
        super().__init__("reconstruction", options)
        self.sampling = options.sampling().resolved(self.pipe)
        rows = load_split(options.data, options.split, options.image_column)
        drawn = draw_rows(range(len(rows)), options.max_images, options.seed)
        self.rows = rows.select(drawn)
        self.originals = self.images(self.rows)
        self.check_distribution(len(drawn), "`max_images`")
        self.protocol |= {
            "split": options.split,
            "num_images": len(drawn),
            "sampling": self.sampling.described,
            "reference": "the originals themselves",
        }
        self.reference: Reference | None = None
        self.index: ImageIndex  # for perceptual distances: of all real images, or of the candidates
        if "name" in rows.column_names:
            every = self.load_all_splits()
            self.reference = Reference(self.images(every).read_all(), [{"name": row["name"]} for row in every])
            self.index = self.reference.index
            self.protocol["neighbors"] = f"{self.reference.description}, train and validation"
        column = options.group_column or GROUP_COLUMN
        if options.group_column is not None and column not in rows.column_names:
            raise ValueError(f"`group_column` {column!r} is not one of the columns {', '.join(rows.column_names)}.")
        self.candidates = self.draw_candidates(rows, drawn)
        self.groups: list[str] | None = None
        if column in rows.column_names:
            self.group_column = column
            names = getattr(rows.features[column], "names", None)
            self.groups = [str(value) if names is None else names[value] for value in self.rows[column]]
        self.measures = self.build_measures()
        self.accumulators = self.build_accumulators()

    def draw_candidates(self, rows: Any, drawn: list[int]) -> Candidates | None:
        """Return the originals of the selected rows and random others of the split, for recognition, if it is asked.

        Raises:
            ValueError: if the split has too few rows, or more are selected.
        """
        number = self.options.recognition_among
        if number is None:
            return None
        if not len(drawn) <= number <= len(rows):
            raise ValueError(
                f"`recognition_among` must be at least the {len(drawn)} images to measure and at most the {len(rows)}"
                f" of the split, got {number}."
            )
        others = draw_rows(sorted({*range(len(rows))} - {*drawn}), number - len(drawn), self.options.seed)
        images = self.images(rows.select([*drawn, *others]))
        found, pixels = images.read(range(number))
        self.protocol |= {
            "recognition_among": len(found),
            "checksum_of_candidates": f"{int(image_checksums(pixels).sum()) & (2**63 - 1):016x}",
        }
        if self.reference is None:
            self.index = ImageIndex(pixels)
        return Candidates(pixels, found)

    def build_measures(self) -> dict[str, ImageMeasure]:
        """Return the per-image measures by name."""
        measures = dict(PLAIN_MEASURES)
        if self.reference is not None or self.candidates is not None:
            measures["perceptual_distance"] = self.index.distance_between
        return measures | {name: EXTRA_MEASURES[name](self.device) for name in self.options.extra_measures}

    def build_means(self) -> nn.ModuleDict:
        """Return the running sums of one kind of images that the model or a baseline makes."""
        shares = [] if self.candidates is None else [f"recognized_by_{name}" for name in SPACES]
        return nn.ModuleDict({name: MeanWithInterval() for name in (*self.measures, *shares)})

    def build_accumulators(self) -> nn.ModuleDict:
        """Return the running sums of all token counts."""
        counts = nn.ModuleDict()
        for count in self.counts:
            sums = self.build_means()
            if self.reference is not None:
                sums["name"] = MeanWithInterval()
            if self.groups is not None:
                sums["by_group"] = GroupedMean(sorted(set(self.groups)), len(self.measures))
            if self.network is not None:
                sums["features"] = FeatureMoments(self.network.description.num_features)
            counts[str(count)] = sums
        shared = {"cost": Cost(), "checksum": Checksum(), "counts": counts}
        shared["baselines"] = nn.ModuleDict({name: self.build_means() for name in self.baseline_names()})
        shared["kept"] = KeptImages(self.shown_rows(), 1 + len(self.counts), self.pipe.resolution)
        if self.network is not None:
            shared["features"] = FeatureMoments(self.network.description.num_features)
        return nn.ModuleDict(shared)

    def baseline_names(self) -> list[str]:
        """Return a thumbnail per token count, and the VAE if there is one; none unless asked for."""
        if not self.options.baselines:
            return []
        return [*(f"{THUMBNAIL}_{count}" for count in self.counts), *([VAE] if self.pipe.vae is not None else [])]

    def bits_of(self, count: int) -> float:
        """Return the bits of `count` tokens."""
        return count * math.log2(math.prod(self.pipe.encoder.config.fsq_levels))

    def baseline_images(self, name: str, originals: Tensor) -> Tensor:
        """Return the images of a baseline, (B, 3, R, R) uint8."""
        vae = self.pipe.vae
        if name != VAE or vae is None:
            size = thumbnail_size(self.bits_of(int(name.removeprefix(f"{THUMBNAIL}_"))))
            return round_to_8_bits(code_as_thumbnails(to_unit_range(originals), size))
        pixel_values = (2 * to_unit_range(originals) - 1).to(vae.device, vae.dtype)
        return round_to_8_bits((decode_latents(vae, encode_latents(vae, pixel_values)) + 1).clamp(0, 2) / 2)

    def shown_rows(self) -> list[int]:
        """Return the rows on the contact sheet, evenly spaced over all rows or those of `sheet_group`."""
        wanted, number = self.options.sheet_group, self.options.sheet_rows
        if wanted is None:
            rows = list(range(len(self.rows)))
        else:
            rows = [row for row, group in enumerate(self.groups or []) if group == wanted]
        if not rows:
            raise ValueError(f"`sheet_group` {wanted!r} is not a value of `group_column` in the selected images.")
        return rows[:: max(1, len(rows) // number)][:number]

    def measure_batch(self, samples: list[int]) -> dict[int, str]:
        """Add samples to the running sums and return those that could not be read, with reasons."""
        found, originals = self.originals.read(samples)
        skipped = {sample: self.originals.skipped[sample] for sample in samples if sample not in found}
        if not found:
            return skipped
        sums = self.accumulators
        sums["checksum"].update(image_checksums(originals))
        sums["kept"].update(0, originals, found)
        if self.network is not None:
            sums["features"].update(self.network(originals)[0], found)
        make = partial(reconstruct, self.pipe, originals, self.counts, found, self.options.seed, self.sampling)
        for column, (count, images) in enumerate(zip(self.counts, sums["cost"].track(make), strict=True), start=1):
            sums["kept"].update(column, images, found)
            self.add_images(sums["counts"][str(count)], images, originals, found)
        for name, baseline in sums["baselines"].items():
            self.add_means(baseline, self.baseline_images(name, originals), originals, found)
        return skipped

    def add_means(self, sums: Any, images: Tensor, originals: Tensor, found: list[int]) -> Tensor:
        """Add images (B, 3, R, R) uint8 to the sums of the measures per image; return their values, (B, measures)."""
        values = measure_images(self.measures, to_unit_range(images), to_unit_range(originals))
        for name, value in values.items():
            sums[name].update(value, found)
        if self.candidates is not None:
            for name, hits in self.candidates.recognize(to_unit_range(images), found).items():
                sums[f"recognized_by_{name}"].update(hits, found)
        return torch.stack(list(values.values()), dim=1)

    def add_images(self, sums: Any, images: Tensor, originals: Tensor, found: list[int]) -> None:
        """Add images (B, 3, R, R) uint8 of one token count to its sums."""
        values = self.add_means(sums, images, originals, found)
        if self.groups is not None:
            sums["by_group"].update(values, [self.groups[i] for i in found])
        if self.network is not None:
            sums["features"].update(self.network(images)[0], found)
        if self.reference is not None:
            _, neighbors = self.reference.index.search(images, 1)
            names = [self.reference.rows[i]["name"] for i in neighbors[:, 0].tolist()]
            hits = [name == self.rows[sample]["name"] for name, sample in zip(names, found, strict=True)]
            sums["name"].update(torch.tensor(hits), found)

    def summarize_means(self, sums: Any) -> dict:
        """Return the means of the measures per image, and the shares that were recognized."""
        figures: dict = {name: sums[name].compute() for name in self.measures}
        if self.candidates is not None:
            figures |= {f"recognized_by_{name}": share_of(sums[f"recognized_by_{name}"]) for name in SPACES}
        return figures

    def summarize(self, sums: Any) -> dict:
        """Return the figures of one token count."""
        figures = self.summarize_means(sums)
        if self.network is not None:
            key = "fid" if self.network.description.is_inception else "frechet_distance"
            figures[key] = frechet_distance(self.accumulators["features"], sums["features"], is_paired=True)
        if self.reference is not None:
            figures["name"] = share_of(sums["name"])
        if self.groups is not None:
            figures[f"by_{self.group_column}"] = {
                name: {"count": count} | dict(zip(self.measures, means, strict=True))
                for name, (count, means) in sums["by_group"].compute().items()
            }
        return figures

    def measure(self) -> dict:
        """Measure everything, write the results, and return the record."""
        self.run("images", self.accumulators, len(self.rows), self.measure_batch)
        return self.finish(self.make_record, [self.accumulators["cost"]], self.write)

    def make_record(self) -> dict:
        """Return the figures of all token counts."""
        num_measured = int(self.accumulators["checksum"].count)
        if num_measured == 0:
            raise ValueError(f"None of the {len(self.rows)} images could be read; first error: {self.first_skipped()}")
        self.check_distribution(num_measured, "readable images")
        self.protocol["checksum_of_images"] = self.accumulators["checksum"].compute()
        results = {str(count): self.summarize(self.accumulators["counts"][str(count)]) for count in self.counts}
        record = {"count": num_measured, "settings": self.sampling.described, "results": results}
        baselines = self.accumulators["baselines"]
        if baselines:
            record["baselines"] = {name: self.summarize_means(sums) for name, sums in baselines.items()}
            record["thumbnails"] = {str(count): self.describe_thumbnail(count) for count in self.counts}
        return record

    def describe_thumbnail(self, count: int) -> dict[str, Any]:
        """Return size and bits of the thumbnail that is compared with `count` tokens, and the bits of these."""
        size = thumbnail_size(self.bits_of(count))
        return {"size": list(size), "bits": thumbnail_bits(size), "bits_of_tokens": self.bits_of(count)}

    def first_skipped(self) -> str:
        """Return the reason why the first image was skipped."""
        return next(iter(self.skipped.values()), "unknown")

    def write(self, record: dict) -> None:
        """Write record, page, curves and contact sheet."""
        folder = Path(self.options.output)
        write_record(folder, self.name, record, make_markdown(record))
        columns = ["original", *(token_count_title(count) for count in self.counts)]
        rows = [[to_pil(image) for image in row] for row in self.accumulators["kept"].compute()]
        save_image(contact_sheet(rows, columns), folder / "reconstruction.png")
        curves = {
            column_title(record, key): {"": [figures[key] for figures in record["results"].values()]}
            for key in measured_keys(record)
        }
        plot_curves(self.counts, curves, "tokens", folder / "reconstruction_curves.png")


def measured_keys(record: dict) -> list[str]:
    """Return the keys of the figures with intervals per token count."""
    first = next(iter(record["results"].values()))
    return [key for key, value in first.items() if "low" in value]


def column_title(record: dict, key: str) -> str:
    """Return the title of a figure; for a Frechet distance, with the name of its feature network."""
    network = record["protocol"]["feature_network"]
    return "rFID" if key == "fid" else measure_title(key, network and network["name"])


def make_markdown(record: dict) -> str:
    """Return the record as a Markdown page."""
    keys = measured_keys(record)
    titles = [column_title(record, key) for key in keys]
    results = record["results"]

    def improves(key: str) -> str:
        means = [figures[key]["mean"] * (-1 if key in IS_LOWER_BETTER else 1) for figures in results.values()]
        return "yes" if means == sorted(means) else "no"

    ordered = ", ".join(f"{measure_title(key)}: {improves(key)}" for key in keys if key in ALL_MEASURES)
    lines = [
        "# Reconstruction",
        "",
        f"{record['count']} images.",
        "",
        *protocol_lines(record),
        "",
        "Means with 95% bootstrap intervals over images. Distances between sets (95% jackknife intervals) are larger"
        " for smaller sets: compare only sets of equal size. Perceptual distance: color and shape, 0 for the same"
        " image, 1 for two unrelated ones. Name found: the nearest real image has the same name (Wilson interval).",
        "",
        markdown_table(
            ["tokens", *titles],
            [[count, *(interval_text(figures[key]) for key in keys)] for count, figures in results.items()],
        ),
        "",
        f"Improves with every increase in tokens: {ordered}.",
        *baseline_lines(record),
    ]
    group = next((key for key in next(iter(results.values())) if key.startswith("by_")), None)
    if group is not None:
        measures = [key for key in keys if key in ALL_MEASURES]
        rows = [
            [count, name, means["count"], *(f"{means[key]:.3f}" for key in measures)]
            for count, figures in results.items()
            for name, means in figures[group].items()
        ]
        header = ["tokens", group.removeprefix("by_"), "count", *(measure_title(key) for key in measures)]
        lines += ["", markdown_table(header, rows)]
    return "\n".join(lines)


def baseline_lines(record: dict) -> list[str]:
    """Return a table of the baselines, if they were measured."""
    baselines = record.get("baselines", {})
    if not baselines:
        return []
    keys = list(next(iter(baselines.values())))
    rows = []
    for count, thumbnail in record["thumbnails"].items():
        figures = baselines[f"{THUMBNAIL}_{count}"]
        size = "{} x {} pixels, {} bits".format(*thumbnail["size"], thumbnail["bits"])
        rows.append(
            [f"{count} ({thumbnail['bits_of_tokens']:.0f} bits)", size, *(interval_text(figures[key]) for key in keys)]
        )
    if VAE in baselines:
        rows.append(["", "the VAE alone", *(interval_text(baselines[VAE][key]) for key in keys)])
    return [
        "",
        "Baselines: thumbnails with at least as many bits as the tokens, 12 per pixel, enlarged bicubically; and the"
        " VAE, which bounds the model.",
        "",
        markdown_table(["tokens", "baseline", *(measure_title(key) for key in keys)], rows),
    ]
