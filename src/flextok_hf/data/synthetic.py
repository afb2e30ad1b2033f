"""Captioned images of colored shapes, drawn by this package: training and tests without a download.

A scene has one to three shapes, each with a size and a color, in a given arrangement on a plain background. Scene i
is a pure function of (split, seed, i), and its image a function of the scene and the resolution. Its caption describes
it in varied wording, and `parse_caption` recovers the attributes exactly.

Held-out combinations: in the train split, color number c (in the order of COLORS) never has shape number -c modulo
len(SHAPES), so each color lacks one shape and each shape one or two colors. In the validation split every image with
an odd number has such a combination (`is_held_out`); those with an even number have none.
"""

import math
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from io import BytesIO
from typing import Any

import datasets
from datasets import Value
from PIL import Image, ImageDraw

from .synthetic_captions import write_caption


SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross")
COLORS = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 220),
    "yellow": (245, 210, 40),
    "orange": (245, 140, 30),
    "purple": (140, 60, 190),
    "pink": (240, 130, 180),
    "brown": (130, 80, 40),
}
BACKGROUNDS = {"white": (255, 255, 255), "black": (0, 0, 0), "gray": (128, 128, 128)}
DIAMETERS = {"small": 0.16, "large": 0.3}  # relative to the image side; the same in every arrangement
PLACES = {  # of a single shape: x to the right, y down, relative to the image side
    "center": (0.5, 0.5),
    "top left": (0.25, 0.25),
    "top right": (0.75, 0.25),
    "bottom left": (0.25, 0.75),
    "bottom right": (0.75, 0.75),
}
TWO_RELATIONS = ("left of", "above")  # of the first shape to the second; captions may also state the reverse
THREE_RELATIONS = ("left to right", "top to bottom")
SPLITS = ("train", "validation")
MIN_RESOLUTION = 16  # below that, a small shape is only two pixels wide
SUPERSAMPLING = 4
SHARD_SIZE = 250  # images per shard when streaming; shards are split among workers and processes

FEATURES = datasets.Features(
    {
        "image": datasets.Image(),
        "text": Value("string"),
        "background": Value("string"),
        "relation": Value("string"),
        "objects": datasets.List(
            {
                "shape": Value("string"),
                "color": Value("string"),
                "size": Value("string"),
                "x": Value("float64"),
                "y": Value("float64"),
                "diameter": Value("float64"),
            }
        ),
        "is_held_out": Value("bool"),
    }
)


@dataclass(frozen=True)
class SceneObject:
    """A shape with its center and diameter, relative to the image side."""

    shape: str
    color: str
    size: str
    x: float
    y: float
    diameter: float


@dataclass(frozen=True)
class Scene:
    """What an image shows. Objects are ordered from left to right or from top to bottom."""

    objects: tuple[SceneObject, ...]
    relation: str
    background: str
    caption: str

    @property
    def is_held_out(self) -> bool:
        """Whether any shape has a color that it never has in the train split."""
        return any(is_held_out(item.shape, item.color) for item in self.objects)


def is_held_out(shape: str, color: str) -> bool:
    """Whether `shape` never has this `color` in the train split."""
    return (SHAPES.index(shape) + list(COLORS).index(color)) % len(SHAPES) == 0


def make_scene(index: int, seed: int = 0, split: str = "train") -> Scene:
    """Draw the attributes and the caption of image number `index` at random."""
    if split not in SPLITS:
        raise ValueError(f"`split` must be one of {', '.join(SPLITS)}, got {split!r}.")
    rng = random.Random(f"{split}/{seed}/{index}")
    pairs = _choose_pairs(rng, 1 + _choose(rng, range(3)), split == "validation" and index % 2 == 1)
    relations = (tuple(PLACES), TWO_RELATIONS, THREE_RELATIONS)[len(pairs) - 1]
    relation = _choose(rng, relations)
    objects = []
    for (shape, color), (x, y) in zip(pairs, _choose_centers(rng, len(pairs), relation), strict=True):
        size = _choose(rng, tuple(DIAMETERS))
        objects.append(SceneObject(shape, color, size, x, y, DIAMETERS[size]))
    background = _choose(rng, tuple(BACKGROUNDS))
    nouns = [(item.size, item.color, item.shape) for item in objects]
    return Scene(tuple(objects), relation, background, write_caption(nouns, relation, background, rng))


def draw_scene(scene: Scene, resolution: int) -> Image.Image:
    """Render a scene as a square, antialiased RGB image."""
    if resolution < MIN_RESOLUTION:
        raise ValueError(f"`resolution` must be {MIN_RESOLUTION} or more to tell the shapes apart, got {resolution}.")
    side = resolution * SUPERSAMPLING
    image = Image.new("RGB", (side, side), BACKGROUNDS[scene.background])
    canvas = ImageDraw.Draw(image)
    for item in scene.objects:
        x, y, radius = item.x * side, item.y * side, item.diameter * side / 2
        if item.shape == "circle":
            canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=COLORS[item.color])
        else:
            corners = [(x + radius * dx, y + radius * dy) for dx, dy in OUTLINES[item.shape]]
            canvas.polygon(corners, fill=COLORS[item.color])
    return image.reduce(SUPERSAMPLING)


def make_row(index: int, seed: int, resolution: int, split: str) -> dict[str, Any]:
    """Return image number `index` as a row of the dataset, with the image as PNG bytes."""
    scene = make_scene(index, seed, split)
    content = BytesIO()
    draw_scene(scene, resolution).save(content, format="PNG", compress_level=1)
    return {
        "image": {"bytes": content.getvalue(), "path": None},
        "text": scene.caption,
        "background": scene.background,
        "relation": scene.relation,
        "objects": [asdict(item) for item in scene.objects],
        "is_held_out": scene.is_held_out,
    }


def SyntheticShapes(  # noqa: N802, the name of a dataset
    num_examples: int, seed: int = 0, resolution: int = 64, *, split: str = "train", streaming: bool = False
) -> datasets.Dataset | datasets.IterableDataset:
    """Return the dataset of colored shapes, with the columns of FEATURES.

    Args:
        num_examples: number of images, 1 or more.
        seed: different seeds give different images.
        resolution: side of the square images in pixels.
        split: "train", or "validation" with a held-out combination in every second image.
        streaming: draw each image when it is read. Otherwise all are drawn now and kept in memory as PNG, about a
            kilobyte each. Neither form writes images to the cache folder of `datasets`.
    """
    if num_examples < 1:
        raise ValueError(f"`num_examples` must be 1 or more, got {num_examples}.")
    draw_scene(make_scene(0, seed, split), resolution)  # invalid arguments fail here, not in a worker
    if not streaming:
        rows = [make_row(index, seed, resolution, split) for index in range(num_examples)]
        return datasets.Dataset.from_list(rows, features=FEATURES)
    shards = [range(start, min(start + SHARD_SIZE, num_examples)) for start in range(0, num_examples, SHARD_SIZE)]
    arguments = {"shards": shards, "seed": seed, "resolution": resolution, "split": split}
    return datasets.IterableDataset.from_generator(_make_rows, features=FEATURES, gen_kwargs=arguments)


def _make_rows(shards: list[range], seed: int, resolution: int, split: str) -> Iterator[dict[str, Any]]:
    for shard in shards:
        for index in shard:
            yield make_row(index, seed, resolution, split)


def _choose(rng: random.Random, options: Any) -> Any:
    """Pick one option. `Random.choice` may change between Python versions, `Random.random` may not."""
    return options[int(rng.random() * len(options))]


def _choose_pairs(rng: random.Random, count: int, with_held_out: bool) -> list[tuple[str, str]]:
    """Draw `count` different (shape, color) pairs, at least one of them held out if asked, otherwise none."""
    all_pairs = [(shape, color) for shape in SHAPES for color in COLORS]
    seen = [pair for pair in all_pairs if not is_held_out(*pair)]
    first_held_out = int(rng.random() * count)
    pairs: list[tuple[str, str]] = []
    for place in range(count):
        options = seen
        if with_held_out:
            options = [pair for pair in all_pairs if pair not in seen] if place == first_held_out else all_pairs
        pairs.append(_choose(rng, [pair for pair in options if pair not in pairs]))
    return pairs


def _choose_centers(rng: random.Random, count: int, relation: str) -> list[tuple[float, float]]:
    """Draw the centers: on a line, with little jitter along it and more across it; shapes never touch."""
    if count == 1:
        x, y = PLACES[relation]
        return [(x + 0.1 * (rng.random() - 0.5), y + 0.1 * (rng.random() - 0.5))]
    centers = []
    for step in range(count):
        along = (0.3, 0.7)[step] if count == 2 else (0.18, 0.5, 0.82)[step]
        along += 0.02 * (rng.random() - 0.5)
        across = 0.5 + 0.2 * (rng.random() - 0.5)
        centers.append((along, across) if relation in ("left of", "left to right") else (across, along))
    return centers


def _regular_outline(num_corners: int, inner_radius: float | None = None) -> list[tuple[float, float]]:
    """Return corners on the unit circle, from the top; with `inner_radius`, every second one lies on that radius."""
    total = num_corners if inner_radius is None else 2 * num_corners
    corners = []
    for corner in range(total):
        radius = 1.0 if inner_radius is None or corner % 2 == 0 else inner_radius
        angle = 2 * math.pi * corner / total
        corners.append((radius * math.sin(angle), -radius * math.cos(angle)))
    return corners


_ARM = 0.34  # half the width of a cross's arm
OUTLINES = {  # corners around the center (0, 0), in radii
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "triangle": _regular_outline(3),
    "star": _regular_outline(5, inner_radius=0.42),
    "diamond": _regular_outline(4),
    "cross": [
        *((-_ARM, -1), (_ARM, -1), (_ARM, -_ARM), (1, -_ARM), (1, _ARM), (_ARM, _ARM)),
        *((_ARM, 1), (-_ARM, 1), (-_ARM, _ARM), (-1, _ARM), (-1, -_ARM), (-_ARM, -_ARM)),
    ],
}
