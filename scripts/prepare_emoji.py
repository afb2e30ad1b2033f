"""Make the embedded model's training set: a few hundred emoji with plain captions, cut to the drawing and reduced.

    python scripts/prepare_emoji.py --source emoji128 --output emoji48

`--source` is a folder (or a Hub data set) with the splits train and validation and the columns image, name and style.
`--output` receives train.parquet and validation.parquet with the columns

    image            PNG, RGB on white, resolution x resolution
    captions         list of wordings, styled and unstyled; draw one per training step
    name             what a person calls it ("car", not "automobile")
    style            3d, noto or flat
    split            train or validation
    prompt           the plain wording ("a car"), the same for every style
    styled_prompt    the plain wording with the style ("a 3d car")

The validation split holds (name, style) combinations whose name is in train in another style only.
"""

import argparse
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset, DatasetDict, Features, Image, List, Value, load_dataset
from PIL import Image as PILImage
from PIL import ImageChops


FORMS = ("count", "plural", "mass", "unique")
STYLES = ("3d", "noto", "flat")
DEFAULT_NAMES_FILE = Path(__file__).parent / "configs" / "embedded_names.txt"
WHITE = (255, 255, 255)

# Letters deceive: a vowel letter that sounds like a consonant, and the reverse.
A_DESPITE_VOWEL = ("uni", "ufo", "eu", "one", "use", "uku")
AN_DESPITE_CONSONANT = ("hour", "honest", "heir", "x-ray")

PLAIN_WORDINGS = ("{noun}", "{bare}", "a picture of {noun}", "an emoji of {noun}", "{bare} emoji")
STYLED_WORDINGS = {
    "3d": ("{styled}", "{bare}, 3d emoji", "3d {bare}", "a 3d picture of {noun}", "{noun} in 3d"),
    "noto": ("{styled}", "{bare}, noto emoji", "noto {bare}", "a noto emoji of {noun}", "{noun} in noto style"),
    "flat": ("{styled}", "{bare}, flat emoji", "flat {bare}", "a flat drawing of {noun}", "{noun} in flat style"),
}


@dataclass(frozen=True, kw_only=True)
class Noun:
    """A name to train on: how the source and how people call it, and how it is inflected."""

    source_name: str
    name: str
    form: str = "count"
    synonyms: tuple[str, ...] = ()


def read_names(lines: Iterable[str]) -> list[Noun]:
    """Parse lines of `source name [= name] [; form] [; synonym, synonym]`; empty lines and `#` lines are skipped.

    Raises:
        ValueError: if a form is unknown, or two nouns share a name or a synonym.
    """
    nouns = []
    for line in lines:
        if not line.strip() or line.startswith("#"):
            continue
        fields = [field.strip() for field in line.split(";")] + ["", ""]
        source_name, _, name = (part.strip() for part in fields[0].partition("="))
        form = fields[1] or "count"
        if form not in FORMS or len(fields) > 5:
            raise ValueError(f"Cannot read the line {line.strip()!r}: the second field must be one of {FORMS}.")
        synonyms = tuple(synonym.strip() for synonym in fields[2].split(",") if synonym.strip())
        nouns.append(Noun(source_name=source_name, name=name or source_name.lower(), form=form, synonyms=synonyms))

    owner = {}
    for noun in nouns:
        for word in (noun.name, *noun.synonyms):
            if word in owner:
                raise ValueError(
                    f"{word!r} stands for both {owner[word]!r} and {noun.name!r}; give it to one of them."
                )
            owner[word] = noun.name
    return nouns


def article_for(word: str) -> str:
    """Return `a` or `an`, by the sound of the first word as far as its letters tell."""
    if word.startswith(AN_DESPITE_CONSONANT):
        return "an"
    is_vowel = word[0] in "aeiou" and not word.startswith(A_DESPITE_VOWEL)
    return "an" if is_vowel else "a"


def noun_phrases(word: str, form: str, style: str | None = None) -> list[str]:
    """Return the word with its articles, the best one first: `a cat`, `a 3d cat`, `grapes`, `the sun` and `a sun`."""
    bare = word if style is None else f"{style} {word}"
    if form in ("plural", "mass"):
        return [bare]
    indefinite = f"{article_for(bare)} {bare}"
    if form == "unique":
        # "the 3d sun" would be odd: with a style it is one of several
        return [f"the {bare}", indefinite] if style is None else [indefinite]
    return [indefinite]


def make_captions(noun: Noun, style: str) -> list[str]:
    """Return distinct wordings of one picture, unstyled and styled, for its name and its synonyms."""
    captions = []
    for word in (noun.name, *noun.synonyms):
        styled = noun_phrases(word, noun.form, style)[0]
        for phrase in noun_phrases(word, noun.form):
            for wording in (*PLAIN_WORDINGS, *STYLED_WORDINGS[style]):
                captions.append(wording.format(noun=phrase, bare=word, styled=styled))
    return list(dict.fromkeys(captions))


def crop_to_drawing(image: PILImage.Image, margin: float = 0.04, threshold: int = 12) -> PILImage.Image:
    """Cut the white border away and pad to a square, so that small pictures spend their pixels on the drawing.

    Args:
        image: RGB on white.
        margin: white border to leave on each side, as a share of the square's side.
        threshold: difference from white, 0 to 255, from which a pixel belongs to the drawing (soft shadows do not).

    Raises:
        ValueError: if nothing is drawn.
    """
    difference = ImageChops.difference(image, PILImage.new("RGB", image.size, WHITE))
    is_drawn = np.asarray(difference).max(axis=-1) > threshold  # (H, W)
    if not is_drawn.any():
        raise ValueError("The picture is white all over; leave its name out of the list.")
    rows, columns = np.flatnonzero(is_drawn.any(axis=1)), np.flatnonzero(is_drawn.any(axis=0))
    drawing = image.crop((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
    side = round(max(drawing.size) / (1 - 2 * margin))
    square = PILImage.new("RGB", (side, side), WHITE)
    square.paste(drawing, ((side - drawing.width) // 2, (side - drawing.height) // 2))
    return square


def choose_held_out(pairs: Sequence[tuple[str, str]], preferred: set[tuple[str, str]], share: float, seed: int) -> set:
    """Choose (name, style) pairs to hold out: the preferred ones, and a seeded share of the others.

    At most one style of a name is held out, and only if another one remains. The choice for one pair does not
    depend on the order of the list, so adding names later moves no old pair.
    """
    styles_of: dict[str, list[str]] = {}
    for name, style in sorted(set(pairs)):
        styles_of.setdefault(name, []).append(style)

    def draw(name: str, style: str) -> float:
        digest = hashlib.sha256(f"{seed}/{name}/{style}".encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64

    held_out = set()
    for name, styles in styles_of.items():
        if len(styles) < 2:
            continue
        candidates = [s for s in styles if (name, s) in preferred] or [s for s in styles if draw(name, s) < share]
        if candidates:
            held_out.add((name, min(candidates, key=lambda style: draw(name, style))))
    return held_out


def prepare(
    source: DatasetDict,
    nouns: Sequence[Noun],
    styles: Sequence[str],
    resolution: int,
    held_out_share: float,
    seed: int,
) -> DatasetDict:
    """Select, caption, crop and reduce; see the module docstring for the columns.

    Raises:
        ValueError: if a name has no picture in the source.
    """
    noun_of = {noun.source_name: noun for noun in nouns}
    rows, preferred = {}, set()
    for split, records in source.items():
        # names and styles first: pictures that are not wanted need not be decoded
        wanted = [
            index
            for index, (name, style) in enumerate(zip(records["name"], records["style"]))
            if name in noun_of and style in styles
        ]
        for record in records.select(wanted):
            noun, style = noun_of[record["name"]], record["style"]
            picture = crop_to_drawing(record["image"].convert("RGB"))
            rows[noun.name, style] = {
                "image": picture.resize((resolution, resolution), PILImage.Resampling.LANCZOS),
                "captions": make_captions(noun, style),
                "name": noun.name,
                "style": style,
                "prompt": noun_phrases(noun.name, noun.form)[0],
                "styled_prompt": noun_phrases(noun.name, noun.form, style)[0],
            }
            if split == "validation":
                preferred.add((noun.name, style))
    missing = sorted({noun.source_name for noun in nouns if not any(noun.name == name for name, _ in rows)})
    if missing:
        raise ValueError(f"The source has no picture of {missing} in the styles {tuple(styles)}; correct the list.")

    held_out = choose_held_out(list(rows), preferred, held_out_share, seed)
    features = Features(
        {"image": Image(), "captions": List(Value("string"))}
        | {column: Value("string") for column in ("name", "style", "split", "prompt", "styled_prompt")}
    )
    splits: dict[str, list[dict]] = {"train": [], "validation": []}
    for pair in sorted(rows):
        split = "validation" if pair in held_out else "train"
        splits[split].append(rows[pair] | {"split": split})
    return DatasetDict({split: Dataset.from_list(records, features=features) for split, records in splits.items()})


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", required=True, help="folder with parquet files, or a Hub data set")
    parser.add_argument("--output", required=True, type=Path, help="folder for train.parquet and validation.parquet")
    parser.add_argument("--names", type=Path, default=DEFAULT_NAMES_FILE, help="list of names, one per line")
    parser.add_argument("--styles", nargs="+", default=list(STYLES), choices=STYLES, help="styles to keep")
    parser.add_argument("--resolution", type=int, default=48, help="side of the pictures in pixels")
    parser.add_argument("--held_out_share", type=float, default=0.05, help="share of further pairs to hold out")
    parser.add_argument("--seed", type=int, default=0, help="seed of the held-out choice")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    nouns = read_names(arguments.names.read_text(encoding="utf-8").splitlines())
    prepared = prepare(
        load_dataset(arguments.source),
        nouns,
        arguments.styles,
        arguments.resolution,
        arguments.held_out_share,
        arguments.seed,
    )
    arguments.output.mkdir(parents=True, exist_ok=True)
    for split, records in prepared.items():
        records.to_parquet(arguments.output / f"{split}.parquet")
        styles = {style: records["style"][:].count(style) for style in arguments.styles}
        print(f"{split}: {len(records)} pictures of {len(set(records['name']))} names, {styles}")


if __name__ == "__main__":
    main()
