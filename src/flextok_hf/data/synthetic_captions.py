"""The caption grammar of the synthetic shapes: attributes -> one of many wordings, and back.

A shape is a noun (size, color, shape). `write_caption` and `parse_caption` share the tables below, so every caption
that one writes, the other can parse.
"""

import random
import re
from collections.abc import Sequence
from typing import Any


Noun = tuple[str, str, str]  # size, color, shape

SIZE_WORDS = {"small": ("small", "little", "tiny"), "large": ("large", "big")}
SHAPE_WORDS = {
    "circle": ("circle", "disc"),
    "square": ("square",),
    "triangle": ("triangle",),
    "star": ("star",),
    "diamond": ("diamond",),
    "cross": ("cross", "plus"),
}
OPENINGS = ("", "", "a picture of ", "an image of ", "a drawing of ")
BACKGROUND_WORDINGS = (" on a {background} background", " on {background}", ", {background} background")
PLACE_WORDINGS = {
    "center": ("", " in the middle", " in the center"),
    **{
        corner: (f" in the {corner} corner", f" at the {corner}")
        for corner in ("top left", "top right", "bottom left", "bottom right")
    },
}
# {first} is the shape on the left or on top, whichever the sentence mentions first.
TWO_WORDINGS: dict[str, tuple[str, ...]] = {
    "left of": (
        "{first} to the left of {second}",
        "{first} left of {second}",
        "{second} to the right of {first}",
        "{second} right of {first}",
    ),
    "above": ("{first} above {second}", "{first} over {second}", "{second} below {first}", "{second} under {first}"),
}
THREE_WORDINGS: dict[str, tuple[str, ...]] = {
    "left to right": (
        "{first}, {second} and {third} in a row",
        "{first}, {second} and {third} from left to right",
        "from left to right {first}, {second} and {third}",
    ),
    "top to bottom": (
        "{first}, {second} and {third} in a column",
        "{first}, {second} and {third} from top to bottom",
        "from top to bottom {first}, {second} and {third}",
    ),
}

_SIZES = {word: size for size, words in SIZE_WORDS.items() for word in words}
_SHAPES = {word: shape for shape, words in SHAPE_WORDS.items() for word in words}


def write_caption(nouns: Sequence[Noun], relation: str, background: str, rng: random.Random) -> str:
    """Describe a scene, worded with `rng`: "a big red circle above a small blue square on a white background"."""

    def choose(options: Sequence[str]) -> str:
        return options[int(rng.random() * len(options))]  # `Random.choice` may change between Python versions

    phrases = [f"a {choose(SIZE_WORDS[size])} {color} {choose(SHAPE_WORDS[shape])}" for size, color, shape in nouns]
    opening = choose(OPENINGS)
    sentence = choose(_wordings(len(nouns))[relation])
    if sentence.startswith("from"):
        opening = ""  # avoids "a picture of from left to right"
    names = dict(zip(("first", "second", "third"), phrases, strict=False))
    return opening + sentence.format(**names) + choose(BACKGROUND_WORDINGS).format(background=background)


def parse_caption(caption: str) -> dict[str, Any]:
    """Parse a caption made by `write_caption`.

    Returns:
        {"objects": [{"size", "color", "shape"}, ...] in the order of the scene, "relation", "background"}.

    Raises:
        ValueError: if the caption does not follow this grammar.
    """
    for pattern, relation in _PATTERNS:
        match = pattern.fullmatch(caption)
        if match is None:
            continue
        found = match.groupdict()
        objects = []
        for name in ("first", "second", "third"):
            if name in found:
                size, color, shape = found[name].split()[1:]
                objects.append({"size": _SIZES[size], "color": color, "shape": _SHAPES[shape]})
        return {"objects": objects, "relation": relation, "background": found["background"]}
    raise ValueError(f"`caption` does not follow the synthetic grammar: {caption!r}. Pass one from `write_caption`.")


def _wordings(count: int) -> dict[str, tuple[str, ...]]:
    """Sentence templates by relation for scenes of `count` shapes, with {first}, {second}, {third} to fill in."""
    if count == 1:
        return {place: tuple("{first}" + ending for ending in endings) for place, endings in PLACE_WORDINGS.items()}
    return TWO_WORDINGS if count == 2 else THREE_WORDINGS


def _compile_patterns() -> list[tuple[re.Pattern[str], str]]:
    """One regular expression per sentence and background wording, each accepting any opening."""
    noun = rf"a (?:{'|'.join(_SIZES)}) \w+ (?:{'|'.join(_SHAPES)})"
    opening = "|".join(sorted(set(OPENINGS)))
    patterns = []
    for wording in BACKGROUND_WORDINGS:
        ending = wording.format(background=r"(?P<background>\w+)")
        for count in (1, 2, 3):
            for relation, sentences in _wordings(count).items():
                for sentence in sentences:
                    named = {name: f"(?P<{name}>{noun})" for name in ("first", "second", "third")}
                    patterns.append((re.compile(f"(?:{opening}){sentence.format(**named)}{ending}"), relation))
    return patterns


_PATTERNS = _compile_patterns()
