"""Recolored copies of drawings on white: another hue unless a caption names a color, another plain background."""

import random
import re
from collections.abc import Iterable

from PIL import Image

from flextok_hf.data.canvases import BACKGROUNDS, make_transparent


# Also things that are told by their color, and what a caption says of an image without hues.
COLOR_WORDS = frozenset(
    "amber beige black blonde blue brown cherry colored colorful colors cream crimson cyan dark gold golden gray green"
    " grey indigo lavender light lime magenta maroon navy olive orange pink purple rainbow red rose ruby silver tan"
    " turquoise violet white yellow".split()
)
HUES = 256  # of Pillow, the whole circle
MIN_SHIFT = 32  # smaller changes are hardly seen


def names_color(captions: Iterable[str]) -> bool:
    """Whether one of the captions holds a word for a color."""
    return any(COLOR_WORDS.intersection(re.findall(r"[a-z]+", caption.lower())) for caption in captions)


def shift_hue(image: Image.Image, shift: int) -> Image.Image:
    """Return an RGB image with its hues moved by `shift` of 256 steps around the circle; grays stay."""
    hue, saturation, value = image.convert("HSV").split()
    hue = hue.point([(level + shift) % HUES for level in range(HUES)])
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


def recolor(image: Image.Image, captions: Iterable[str], key: str, keeps_hue: bool = False) -> Image.Image | None:
    """Return a copy of a drawing with another hue and background.

    Args:
        image: the drawing; only white that is connected to the border counts as its background.
        captions: of the image; if one names a color, the hue stays.
        key: the random draws depend on nothing else.
        keeps_hue: the hue stays in any case, as of flags.

    Returns:
        The copy, RGB; `None` if neither may change.
    """
    rng = random.Random(f"recolor/{key}")
    image = image.convert("RGB")
    shift = MIN_SHIFT + int(rng.random() * (HUES - 2 * MIN_SHIFT))
    background = list(BACKGROUNDS.values())[int(rng.random() * len(BACKGROUNDS))]
    changed = image if keeps_hue or names_color(captions) else shift_hue(image, shift)
    mask = make_transparent(image).getchannel("A")
    result = Image.new("RGB", image.size, background)
    result.paste(changed, mask=mask)
    return None if result.tobytes() == image.tobytes() else result
