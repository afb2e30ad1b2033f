"""Measure prompts for two objects: is each of them there, and do they stand as the prompt says?

An image on a plain background is halved along an axis; what stands out in a half is compared with real drawings, each
cut out and enlarged to the same frame, and has the name of the nearest. Both names are right if the halves along
either axis show them in any order; the arrangement is right if they do so along the axis and in the order of the
prompt. The same on real canvases is the most that the measure can find.

Letters: B batch, N drawings, R side of the square images, S side of a frame.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor, nn

from ..data.canvases import RELATIONS, find_background
from ..utils.files import save_image
from ..utils.sheets import contact_sheet, token_count_title
from ..utils.tables import markdown_table
from .accumulators import KeptImages, MeanWithInterval, share_of
from .conditions import STYLES_WITHOUT_LIKENESS, checksum
from .image_index import ImageIndex
from .images import draw_rows, load_split, to_pil
from .measurement import Cost, Measurement
from .options import EvaluationOptions, check_positive
from .results import interval_text, protocol_lines, write_record
from .sampling import Sampling, generate


FRAME = 64  # S
TOLERANCE = 24  # largest difference of a background pixel from its color, of 255
SPECKS = 5  # side of the median filter that removes what is too small for an object
PLAIN_ENDING = " background"  # of captions that name a plain color
BOTH, ARRANGED = "both_names", "arrangement"  # the second among images that pass the first
AXES = dict(zip(RELATIONS, (1, 0), strict=True))  # of rows and columns, the one that a relation is along


def frame_object(pixels: np.ndarray, is_object: np.ndarray) -> Tensor | None:
    """Return what `is_object` (H, W) marks in an image (H, W, 3), on white and enlarged to a frame, (3, S, S) uint8.

    `None` if it marks nothing.
    """
    rows, columns = np.flatnonzero(is_object.any(axis=1)), np.flatnonzero(is_object.any(axis=0))
    if len(rows) == 0:
        return None
    part: tuple[slice, slice] = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    content = Image.fromarray(np.where(is_object[part][..., None], pixels[part], 255).astype(np.uint8))
    square = Image.new("RGB", (max(content.size),) * 2, "white")
    square.paste(content, ((square.width - content.width) // 2, (square.height - content.height) // 2))
    framed = square.resize((FRAME, FRAME), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(framed)).permute(2, 0, 1)


def find_objects(pixels: np.ndarray) -> np.ndarray:
    """Return where something stands out from the color of the border of an image (H, W, 3): (H, W) boolean."""
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    found = ~find_background(pixels, np.median(border, axis=0), TOLERANCE)
    mask = Image.fromarray(np.where(found, 255, 0).astype(np.uint8))
    return np.asarray(mask.filter(ImageFilter.MedianFilter(SPECKS))) > 0


class ObjectNames:
    """Names what stands in the halves of images.

    Args:
        drawings: real drawings on a plain color, N of (3, R, R) uint8.
        names: of each.

    Raises:
        ValueError: if a drawing has one color only, or there are fewer than two different ones.
    """

    def __init__(self, drawings: Sequence[Tensor], names: Sequence[str]):
        frames = []
        for number, drawing in enumerate(drawings):
            pixels = drawing.permute(1, 2, 0).numpy()
            frame = frame_object(pixels, find_objects(pixels))
            if frame is None:
                raise ValueError(f"Drawing {number}, {names[number]!r}, is of one color: there is nothing to compare.")
            frames.append(frame)
        self.index, self.names = ImageIndex(torch.stack(frames)), list(names)

    def name_halves(self, image: Tensor) -> dict[str, tuple[str | None, ...]]:
        """Return the names in the left and right, and upper and lower half of an image (3, R, R) uint8, by relation.

        `None` stands for an empty half.
        """
        pixels = image.permute(1, 2, 0).numpy()
        found = find_objects(pixels)
        middle = found.shape[0] // 2
        frames: list[Tensor | None] = []
        for axis in AXES.values():
            for half in (slice(None, middle), slice(middle, None)):
                part = (half, slice(None)) if axis == 0 else (slice(None), half)
                frames.append(frame_object(pixels[part], found[part]))
        seen = [frame for frame in frames if frame is not None]
        nearest = iter(self.index.search(torch.stack(seen), 1)[1][:, 0].tolist() if seen else [])
        named = [None if frame is None else self.names[next(nearest)] for frame in frames]
        return {relation: tuple(named[2 * i : 2 * i + 2]) for i, relation in enumerate(AXES)}

    def check(self, images: Tensor, wanted: Sequence[tuple[str, str, str]]) -> dict[str, Tensor]:
        """Return by check whether images (B, 3, R, R) uint8 show (first name, relation, second name), (B,) boolean."""
        passed: dict[str, list[bool]] = {BOTH: [], ARRANGED: []}
        for image, (first, relation, second) in zip(images, wanted, strict=True):
            halves = self.name_halves(image)
            passed[BOTH].append(any(set(pair) == {first, second} for pair in halves.values()))
            passed[ARRANGED].append(halves[relation] == (first, second))
        return {key: torch.tensor(values) for key, values in passed.items()}


@dataclass(kw_only=True)
class TwoObjectsOptions(EvaluationOptions):
    """Prompts for two objects -> images: both names, and their arrangement, per number of tokens."""

    drawings: str = field(metadata={"help": "Drawings that name objects: a set of scripts/prepare_embedded_data.py."})
    max_prompts: int | None = field(default=None, metadata={"help": "Random subset of this many prompts per set."})
    guidance_scale: float | None = field(default=None, metadata={"help": "Decoder guidance; default: the model's."})
    prior_guidance_scale: float | None = field(
        default=None, metadata={"help": "Prior guidance; default: the model's."}
    )
    temperature: float = field(default=1.0, metadata={"help": "Temperature of the prior."})

    def __post_init__(self):
        super().__post_init__()
        check_positive("max_prompts", self.max_prompts)


class TwoObjects(Measurement):
    """Names and arrangement in images from prompts for two objects, from options to a record.

    `options.data` is from scripts/prepare_canvases.py; of its validation split, canvases on a plain color are used,
    each with the prompt that names the color.
    """

    options: TwoObjectsOptions

    def __init__(self, options: TwoObjectsOptions):
        super().__init__("two_objects", options)
        if self.pipe.prior is None:
            raise ValueError("This model has no prior, so it cannot generate. Pass another `model`.")
        canvases = load_split(options.data, "validation", options.image_column)
        drawings = load_split(options.drawings, "train", options.image_column)
        for name, rows, needed in (
            ("data", canvases, {"name", "captions", "held_out"}),
            ("drawings", drawings, {"name", "style", "everyday"}),
        ):
            if missing := sorted(needed - set(rows.column_names)):
                raise ValueError(f"`{name}` {getattr(options, name)!r} lacks the columns {', '.join(missing)}.")
        usable = [
            row for row in drawings if row["everyday"] and row["style"] not in (*STYLES_WITHOUT_LIKENESS, "plain")
        ]
        names = [row["name"] for row in usable]
        self.names = ObjectNames(list(self.images(usable).read_all()), names) if usable else None
        plain = [(row, prompt) for row in canvases if (prompt := plain_prompt(row["captions"])) is not None]
        if self.names is None or not plain:
            raise ValueError("There is nothing to measure: no everyday `drawings`, or no canvas on a color in `data`.")
        self.sets: dict[str, list[tuple[dict, str]]] = {}
        for key, is_held_out in (("trained_pairs", False), ("held_out_pairs", True)):
            chosen = [pair for pair in plain if pair[0]["held_out"] == is_held_out]
            if chosen:
                self.sets[key] = draw_rows(chosen, options.max_prompts, options.seed)
        self.jobs = [(key, index) for key, pairs in self.sets.items() for index in range(len(pairs))]
        self.sampling = Sampling(
            num_inference_steps=options.num_inference_steps,
            guidance=options.guidance,
            guidance_scale=options.guidance_scale,
            prior_guidance_scale=options.prior_guidance_scale,
            temperature=options.temperature,
        ).resolved(self.pipe)
        self.protocol |= {
            "sampling": asdict(self.sampling),
            "num_prompts": {key: len(pairs) for key, pairs in self.sets.items()},
            "checksum_of_conditions": checksum([prompt for pairs in self.sets.values() for _, prompt in pairs]),
            "drawings": len(names),
        }
        columns = ["real", *map(str, self.counts)]
        shares = nn.ModuleDict()
        for key in self.sets:
            by_column = {
                column: nn.ModuleDict({BOTH: MeanWithInterval(), ARRANGED: MeanWithInterval()}) for column in columns
            }
            shares[key] = nn.ModuleDict(by_column)
        shown = range(0, len(self.jobs), max(1, len(self.jobs) // options.sheet_rows))[: options.sheet_rows]
        kept = KeptImages(list(shown), len(self.counts), self.pipe.resolution)
        self.sums = nn.ModuleDict({"cost": Cost(), "kept": kept, "sets": shares})

    def measure_batch(self, samples: list[int]) -> dict[int, str]:
        """Generate images for prompts and check them, and the real canvases of the same prompts."""
        jobs = [self.jobs[sample] for sample in samples]
        pairs = [self.sets[key][index] for key, index in jobs]
        wanted = [split_name(row["name"]) for row, _ in pairs]
        prompts = [prompt for _, prompt in pairs]
        make = partial(generate, self.pipe, prompts, self.counts, samples, self.options.seed, self.sampling)
        made = self.sums["cost"].track(make)
        for number, images in enumerate(made):
            self.sums["kept"].update(number, images, samples)
        real = self.images([row for row, _ in pairs]).read_all()
        for column, images in zip(("real", *map(str, self.counts)), (real, *made), strict=True):
            assert self.names is not None
            passed = self.names.check(images, wanted)
            for key in self.sets:
                of_set = torch.tensor([name == key for name, _ in jobs])
                for check, counted in ((BOTH, of_set), (ARRANGED, of_set & passed[BOTH])):
                    chosen = counted.nonzero()[:, 0].tolist()
                    if chosen:
                        update = self.sums["sets"][key][column][check].update
                        update(passed[check][chosen], [samples[position] for position in chosen])
        return {}

    def measure(self) -> dict:
        """Measure everything, write the results, and return the record."""
        self.run("prompts", self.sums, len(self.jobs), self.measure_batch)
        return self.finish(self.make_record, [self.sums["cost"]], self.write)

    def make_record(self) -> dict:
        """Return the shares of each set, for real canvases and for each number of tokens."""
        results = {
            key: {
                column: {name: share_of(share) for name, share in shares.items() if share.count > 0}
                for column, shares in table.items()
            }
            for key, table in self.sums["sets"].items()
        }
        return {"results": results}

    def write(self, record: dict) -> None:
        """Write record, page and contact sheet."""
        folder = Path(self.options.output)
        write_record(folder, self.name, record, make_markdown(record))
        rows = [[to_pil(image) for image in row] for row in self.sums["kept"].compute()]
        save_image(
            contact_sheet(rows, [token_count_title(count) for count in self.counts]), folder / "two_objects.png"
        )


def plain_prompt(captions: Sequence[str]) -> str | None:
    """Return the first caption of a canvas that names its plain background; `None` if it has another one."""
    return next((caption for caption in captions if caption.endswith(PLAIN_ENDING)), None)


def split_name(name: str) -> tuple[str, str, str]:
    """Split the name of a canvas, "cat left of cup", into first name, relation and second name."""
    for relation in RELATIONS:
        first, separator, second = name.partition(f" {relation} ")
        if separator:
            return first, relation, second
    raise ValueError(f"`name` {name!r} has none of the relations {', '.join(RELATIONS)}: `data` holds other images.")


def make_markdown(record: dict[str, Any]) -> str:
    """Return the record as a Markdown page."""
    rows = [
        [
            key.replace("_", " "),
            column,
            *(interval_text(figures[name]) if name in figures else "" for name in (BOTH, ARRANGED)),
        ]
        for key, table in record["results"].items()
        for column, figures in table.items()
    ]
    lines = [
        "# Two objects",
        "",
        *protocol_lines(record),
        "",
        "Shares with 95% Wilson intervals. Real canvases are the most that the measure can find.",
        "",
        markdown_table(["pairs", "tokens", "both names", "arrangement of these"], rows),
    ]
    return "\n".join(lines)
