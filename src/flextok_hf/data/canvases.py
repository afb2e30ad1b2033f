"""Two drawings on one canvas, with exact captions: composition to learn and to measure, from any captioned drawings.

Canvas i is a pure function of (split, seed, i) and of the drawings it is composed of. The first object lies in
the left or upper half, the second in the right or lower one, and neither crosses the middle, so that each half can be
looked at alone.

Held-out pairs: names whose hash chooses them never stand together in the train split. In the validation split every
canvas with an odd number shows such a pair, and those with an even number show none.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np
from PIL import Image

from .synthetic import SPLITS


BACKGROUNDS = {
    "white": (255, 255, 255),
    "gray": (200, 200, 200),
    "blue": (190, 215, 245),
    "green": (200, 235, 200),
    "yellow": (250, 240, 180),
    "pink": (250, 210, 225),
}
PHOTO_SHARE = 0.25  # of the canvases whose background is a photo, if there are any
SAME_STYLE_SHARE = 0.7
HELD_OUT_SHARE = 0.1  # of all pairs of names
RELATIONS = ("left of", "above")  # of the first object to the second
CENTERS = (0.27, 0.73)  # along the relation, relative to the side of the canvas
JITTER, SHIFT = 0.02, 0.15  # along and across it
SIZES = (0.3, 0.42)  # longer side of an object, relative to the side of the canvas
WHITE = 240  # pixels at least this bright in all channels and connected to the border are background
MAX_ATTEMPTS = 10_000

PLAIN_BACKGROUND_WORDINGS = ("", " on a {background} background", " on {background}")
PHOTO_WORDINGS = ("", " in front of {background}")
WORDINGS = {
    "left of": (
        "{first} left of {second}",
        "{first} to the left of {second}",
        "{second} right of {first}",
        "{second} to the right of {first}",
        "{first} next to {second}",
    ),
    "above": (
        "{first} above {second}",
        "{first} over {second}",
        "{second} below {first}",
        "{second} under {first}",
    ),
}
UNORDERED_WORDINGS = ("{first} and {second}", "{second} and {first}")


@dataclass(frozen=True)
class Drawing:
    """A drawing on white, with its name and the phrases that captions are made of."""

    name: str
    style: str
    phrase: str
    styled_phrase: str


@dataclass(frozen=True)
class PlacedDrawing:
    """Which drawing lies where: center and longer side, relative to the side of the canvas."""

    drawing: int
    x: float
    y: float
    size: float


@dataclass(frozen=True)
class Canvas:
    """What a canvas shows; `photo` is the number of the photo behind it, or `None` for a plain color."""

    first: PlacedDrawing
    second: PlacedDrawing
    relation: str
    background: str
    photo: int | None
    captions: tuple[str, ...]
    is_held_out: bool


def is_held_out_pair(first: str, second: str) -> bool:
    """Whether two names never stand on one canvas of the train split, in either order."""
    digest = sha256("|".join(sorted((first, second))).encode()).digest()
    return int.from_bytes(digest[:8], "big") < HELD_OUT_SHARE * 2**64


class CanvasComposer:
    """Composes canvases of the same drawings and photos.

    Args:
        drawings: at least two different names.
        photos: phrases of the photos that can lie behind the objects, such as "a photo of a cup"; may be empty.

    Raises:
        ValueError: if there are fewer than two names, or all their pairs are held out, or none is.
    """

    def __init__(self, drawings: Sequence[Drawing], photos: Sequence[str] = ()):
        self.drawings, self.photos = list(drawings), list(photos)
        self.by_name: dict[str, dict[str, list[int]]] = {}
        for number, drawing in enumerate(self.drawings):
            self.by_name.setdefault(drawing.name, {}).setdefault(drawing.style, []).append(number)
        self.names = sorted(self.by_name)
        pairs = {is_held_out_pair(a, b) for i, a in enumerate(self.names) for b in self.names[i + 1 :]}
        if len(pairs) < 2:
            raise ValueError(
                f"`drawings` have {len(self.names)} names, and their pairs are all trained or all held out: pass more."
            )

    def compose(self, index: int, seed: int = 0, split: str = "train") -> Canvas:
        """Return canvas number `index`.

        Raises:
            ValueError: if `split` is neither train nor validation.
        """
        if split not in SPLITS:
            raise ValueError(f"`split` must be one of {', '.join(SPLITS)}, got {split!r}.")
        rng = random.Random(f"canvas/{split}/{seed}/{index}")
        held_out = split == "validation" and index % 2 == 1
        names = self._choose_names(rng, held_out)
        numbers = self._choose_drawings(rng, names)
        relation = _choose(rng, RELATIONS)
        places = []
        for number, center in zip(numbers, CENTERS, strict=True):
            along = center + JITTER * (2 * rng.random() - 1)
            across = 0.5 + SHIFT * (2 * rng.random() - 1)
            size = SIZES[0] + (SIZES[1] - SIZES[0]) * rng.random()
            x, y = (along, across) if relation == "left of" else (across, along)
            places.append(PlacedDrawing(number, x, y, size))
        photo, background = None, _choose(rng, tuple(BACKGROUNDS))
        if self.photos and rng.random() < PHOTO_SHARE:
            photo = int(rng.random() * len(self.photos))
            background = self.photos[photo]
        captions = write_captions(
            [self.drawings[number] for number in numbers], relation, background, photo is not None
        )
        return Canvas(places[0], places[1], relation, background, photo, captions, held_out)

    def _choose_names(self, rng: random.Random, held_out: bool) -> tuple[str, str]:
        for _ in range(MAX_ATTEMPTS):
            first, second = _choose(rng, self.names), _choose(rng, self.names)
            if first != second and is_held_out_pair(first, second) == held_out:
                return first, second
        raise ValueError(f"`drawings` have too few pairs of names that are{'' if held_out else ' not'} held out.")

    def _choose_drawings(self, rng: random.Random, names: tuple[str, str]) -> list[int]:
        """Draw a drawing of each name, often both in one style."""
        first, second = (self.by_name[name] for name in names)
        common = sorted(first.keys() & second.keys())
        if common and rng.random() < SAME_STYLE_SHARE:
            styles = [_choose(rng, common)] * 2
        else:
            styles = [_choose(rng, sorted(options)) for options in (first, second)]
        return [_choose(rng, options[style]) for options, style in zip((first, second), styles, strict=True)]


def write_captions(drawings: Sequence[Drawing], relation: str, background: str, is_photo: bool) -> tuple[str, ...]:
    """Return exact wordings, the one to use as a prompt first: "a cat left of a cup", "a 3d cup right of a 3d cat"."""
    endings = PHOTO_WORDINGS if is_photo else PLAIN_BACKGROUND_WORDINGS
    captions = []
    for phrases in ([p.phrase for p in drawings], [p.styled_phrase for p in drawings]):
        for wording in (*WORDINGS[relation], *UNORDERED_WORDINGS):
            sentence = wording.format(first=phrases[0], second=phrases[1])
            captions += [sentence + ending.format(background=background) for ending in endings]
    return tuple(dict.fromkeys(captions))


def find_background(rgb: np.ndarray, color: Sequence[int], tolerance: int) -> np.ndarray:
    """Return where an image has its background: pixels near a color in all channels that are connected to the border.

    Args:
        rgb: (H, W, 3) uint8.
        color: of the background, three numbers.
        tolerance: largest difference in a channel.

    Returns:
        (H, W) boolean.
    """
    near = (np.abs(rgb.astype(np.int16) - np.asarray(color, np.int16)) <= tolerance).all(axis=2)
    outside = np.zeros_like(near)
    outside[[0, -1], :], outside[:, [0, -1]] = near[[0, -1], :], near[:, [0, -1]]
    while True:
        grown = outside.copy()
        grown[1:] |= outside[:-1]
        grown[:-1] |= outside[1:]
        grown[:, 1:] |= outside[:, :-1]
        grown[:, :-1] |= outside[:, 1:]
        grown &= near
        if (grown == outside).all():
            return outside
        outside = grown


def make_transparent(image: Image.Image) -> Image.Image:
    """Return a drawing on white as RGBA, with the white that touches the border transparent."""
    rgb = np.asarray(image.convert("RGB"))
    alpha = np.where(find_background(rgb, BACKGROUNDS["white"], 255 - WHITE), 0, 255).astype(np.uint8)
    return Image.fromarray(np.dstack([rgb, alpha]), "RGBA")


def cut_out(image: Image.Image) -> Image.Image:
    """Return a drawing on white as RGBA, without the white that touches the border, cropped to what is left.

    Raises:
        ValueError: if nothing is left.
    """
    whole = make_transparent(image)
    box = whole.getchannel("A").getbbox()
    if box is None:
        raise ValueError("`image` is white all over: there is nothing to cut out.")
    return whole.crop(box)


def draw_canvas(
    canvas: Canvas, drawings: Sequence[Image.Image], photo: Image.Image | None, resolution: int
) -> Image.Image:
    """Render a canvas as a square RGB image.

    Args:
        canvas: from `CanvasComposer.compose`.
        drawings: the first and the second drawing, on white.
        photo: the photo behind them, square; `None` for a plain color.
        resolution: side of the image in pixels.

    Raises:
        ValueError: if the canvas has a photo and none is passed, or the reverse.
    """
    if (photo is None) != (canvas.photo is None):
        raise ValueError(f"`photo` must be {'None' if canvas.photo is None else 'an image'} for this canvas.")
    if photo is None:
        image = Image.new("RGB", (resolution, resolution), BACKGROUNDS[canvas.background])
    else:
        image = photo.convert("RGB").resize((resolution, resolution), Image.Resampling.LANCZOS)
    for place, drawing in zip((canvas.first, canvas.second), drawings, strict=True):
        cutout = cut_out(drawing)
        scale = place.size * resolution / max(cutout.size)
        width, height = (max(1, round(side * scale)) for side in cutout.size)
        small = cutout.resize((width, height), Image.Resampling.LANCZOS)
        image.paste(small, (round(place.x * resolution - width / 2), round(place.y * resolution - height / 2)), small)
    return image


def _choose(rng: random.Random, options: Sequence[Any]) -> Any:
    """Pick one option. `Random.choice` may change between Python versions, `Random.random` may not."""
    return options[int(rng.random() * len(options))]
