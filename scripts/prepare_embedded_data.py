r"""Create the training sets of the embedded model: emoji with simple captions, and photos of objects.

    python scripts/prepare_embedded_data.py --emoji emoji128 --photos caltech101_128 --max_photos 3500 \
        --output data/embedded128
    python scripts/prepare_embedded_data.py --emoji emoji128 --photos caltech101_128 --max_photos 1200 \
        --everyday_only --styles 3d flat gradient noto --output data/everyday128

The first set has emoji of all names and styles; the second, for the later training stages, has everyday names only.

`--emoji` is a folder or a Hub dataset with the splits train and validation and the columns image, name and style;
`--photos` is the same with the columns image and name. Writes train.parquet and validation.parquet with the columns

    image            lossy WebP, RGB, resolution x resolution
    captions         list of phrasings, with and without style; training samples one per step
    name             the common name ("car", not "automobile")
    style            3d, flat, gradient, noto, monochrome, plain (flags) or photo
    everyday         whether the name is on the list of everyday names
    split            train or validation
    prompt           the phrasing without style ("a car")
    styled_prompt    the phrasing with style ("a 3d car"); same as prompt if there is no style to mention

The validation split is that of the source: emoji whose name is in train in another style, and photos of known classes.
"""

import argparse
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset, DatasetDict, Features, Image, List, Value, load_dataset
from PIL import Image as PILImage

from flextok_hf.pipelines.images import resize_and_crop, to_rgb
from flextok_hf.utils.plain_errors import plain_errors


FORMS = ("count", "plural", "mass", "unique", "either")
DEFAULT_NAMES_FILE = Path(__file__).parent / "configs" / "embedded_names.txt"
# Offensive, or letters rather than objects.
EXCLUDED_NAMES = ("middle finger", "regional indicator")
# Photo folder names that nobody would type as a prompt.
PHOTO_NAMES = {
    "Leopards": "leopard",
    "Motorbikes": "motorcycle",
    "airplanes": "airplane",
    "car side": "car",
    "cellphone": "mobile phone",
    "cougar body": "cougar",
    "sea horse": "seahorse",
    "water lilly": "water lily",
}
WEBP_QUALITY = {"photo": 80}  # drawings use 90: compression artifacts are more visible at their edges

# Exceptions: words whose initial vowel letter sounds like a consonant, and the reverse.
A_DESPITE_VOWEL = ("uni", "ufo", "eu", "one", "use", "uku")
AN_DESPITE_CONSONANT = ("hour", "honest", "heir", "x-ray")

PLAIN_WORDINGS = ("{noun}", "{bare}", "a picture of {noun}", "an emoji of {noun}", "{bare} emoji")
STYLED_WORDINGS = {
    "3d": ("{styled}", "{bare}, 3d emoji", "3d {bare}", "a 3d picture of {noun}", "{noun} in 3d"),
    "flat": ("{styled}", "{bare}, flat emoji", "flat {bare}", "a flat drawing of {noun}", "{noun} in flat style"),
    "gradient": ("{styled}", "{bare}, gradient emoji", "gradient {bare}", "{noun} with color gradients"),
    "noto": ("{styled}", "{bare}, noto emoji", "noto {bare}", "a noto emoji of {noun}", "{noun} in noto style"),
    "monochrome": (
        "{styled}",
        "{bare}, black and white emoji",
        "black and white {bare}",
        "a black and white drawing of {noun}",
        "{noun} in black and white",
    ),
    "photo": ("a photo of {noun}", "a photograph of {noun}", "{bare}, photo", "photo of {noun}", "{bare} photo"),
    "plain": (),
}
STYLE_WORDS = {"monochrome": "black and white"}
# A user who asks an emoji model for "a cat" does not expect a black and white drawing or a photo.
STYLES_NAMED_ALWAYS = ("monochrome", "photo")


@dataclass(frozen=True, kw_only=True)
class Noun:
    """A name to train on: the name in the source, the common name, and how it is inflected."""

    source_name: str
    name: str
    form: str = "count"
    synonyms: tuple[str, ...] = ()


def read_names(lines: Iterable[str]) -> list[Noun]:
    """Parse lines of `source name [= name] [; form] [; synonym, synonym]`, skipping empty lines and `#` comments.

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
                    f"{word!r} stands for both {owner[word]!r} and {noun.name!r}; assign it to one of them."
                )
            owner[word] = noun.name
    return nouns


def article_for(word: str) -> str:
    """Return `a` or `an`, by the sound of the first word as far as its spelling shows."""
    if word.startswith(AN_DESPITE_CONSONANT):
        return "an"
    is_vowel = word[0] in "aeiou" and not word.startswith(A_DESPITE_VOWEL)
    return "an" if is_vowel else "a"


def noun_phrases(word: str, form: str, style_word: str | None = None) -> list[str]:
    """Return the word with its articles, the best first: `a cat`, `a 3d cat`, `grapes`, `the sun`, `a sun`."""
    bare = word if style_word is None else f"{style_word} {word}"
    if form in ("plural", "mass"):
        return [bare]
    indefinite = f"{article_for(bare)} {bare}"
    if form == "either":  # unknown: train on both
        return [bare, indefinite]
    if form == "unique":
        # "the 3d sun" would sound odd: with a style it is one of several
        return [f"the {bare}", indefinite] if style_word is None else [indefinite]
    return [indefinite]


def make_captions(noun: Noun, style: str) -> list[str]:
    """Return distinct phrasings for one image, with and without its style, for its name and its synonyms."""
    plain = () if style in STYLES_NAMED_ALWAYS else PLAIN_WORDINGS
    captions = []
    for word in (noun.name, *noun.synonyms):
        styled = noun_phrases(word, noun.form, STYLE_WORDS.get(style, style))[0]
        for phrase in noun_phrases(word, noun.form):
            for wording in (*plain, *STYLED_WORDINGS[style]):
                captions.append(wording.format(noun=phrase, bare=word, styled=styled))
    return list(dict.fromkeys(captions))


def compress(image: PILImage.Image, resolution: int, style: str) -> bytes:
    """Crop and resize an image to a square and return it as WebP, a fifth of the size of PNG."""
    buffer = io.BytesIO()
    square = resize_and_crop(to_rgb(image), resolution)
    square.save(buffer, "WEBP", quality=WEBP_QUALITY.get(style, 90), method=6)
    return buffer.getvalue()


def choose(source: DatasetDict, names: set[str] | None, styles: Sequence[str]) -> DatasetDict:
    """Keep the emoji of the given styles and names (`None`: all names)."""

    def is_wanted(name: str, style: str) -> bool:
        return style in styles and (names is None or name in names)

    return source.filter(is_wanted, input_columns=["name", "style"])


def make_rows(records: Dataset, noun_of: dict[str, Noun], style: str | None, resolution: int) -> Iterator[dict]:
    """Yield the rows of one split; `style` applies to all images, or is `None` if the style is a column.

    A name that is not in `noun_of` is used in lower case, with and without an article.
    """
    for record in records:
        source_name = record["name"].replace("_", " ")
        source_name = PHOTO_NAMES.get(source_name, source_name) if style == "photo" else source_name
        if source_name.startswith(EXCLUDED_NAMES):
            continue
        fallback = Noun(source_name=source_name, name=source_name.lower(), form="either")
        noun = noun_of.get(source_name, fallback)
        row_style = style or record["style"]
        captions = make_captions(noun, row_style)
        styled = STYLED_WORDINGS[row_style][:1] or PLAIN_WORDINGS[:1]
        word, phrase = STYLE_WORDS.get(row_style, row_style), noun_phrases(noun.name, noun.form)[0]
        yield {
            "image": {"bytes": compress(record["image"], resolution, row_style), "path": None},
            "captions": captions,
            "name": noun.name,
            "style": row_style,
            "everyday": noun is not fallback,
            "prompt": phrase,
            "styled_prompt": styled[0].format(noun=phrase, styled=noun_phrases(noun.name, noun.form, word)[0]),
        }


def prepare(
    sources: Iterable[tuple[DatasetDict, str | None]], nouns: Iterable[Noun], resolution: int
) -> dict[str, Dataset]:
    """Caption, crop and resize; see the module docstring for the columns.

    Args:
        sources: datasets with the splits train and validation, each with the style of all its images or `None`.
        nouns: everyday names, with their inflection and synonyms.
        resolution: side of the images in pixels.

    Raises:
        ValueError: if an everyday name has no image in the sources.
    """
    noun_of = {noun.source_name: noun for noun in nouns}
    features = Features(
        {"image": Image(), "captions": List(Value("string")), "everyday": Value("bool")}
        | {column: Value("string") for column in ("name", "style", "split", "prompt", "styled_prompt")}
    )
    splits: dict[str, list[dict]] = {"train": [], "validation": []}
    for source, style in sources:
        for split, rows in splits.items():
            rows.extend(row | {"split": split} for row in make_rows(source[split], noun_of, style, resolution))
    found = {row["name"] for rows in splits.values() for row in rows}
    missing = sorted(noun.source_name for noun in noun_of.values() if noun.name not in found)
    if missing:
        raise ValueError(f"The sources have no image of {missing}. Correct the list of names.")
    return {split: Dataset.from_list(rows, features=features) for split, rows in splits.items()}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--emoji", required=True, help="folder with parquet files, or a Hub dataset")
    parser.add_argument("--photos", help="the same for photos (default: emoji only)")
    parser.add_argument("--everyday_only", action="store_true", help="keep only emoji with everyday names")
    parser.add_argument("--styles", nargs="+", default=list(STYLED_WORDINGS), choices=STYLED_WORDINGS, help="of emoji")
    parser.add_argument("--max_photos", type=int, help="number of training photos, chosen at random (all)")
    parser.add_argument("--output", required=True, type=Path, help="folder for train.parquet and validation.parquet")
    parser.add_argument("--names", type=Path, default=DEFAULT_NAMES_FILE, help="list of everyday names, one per line")
    parser.add_argument("--resolution", type=int, default=128, help="side of the images in pixels")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    nouns = read_names(arguments.names.read_text(encoding="utf-8").splitlines())
    names = {noun.source_name for noun in nouns} if arguments.everyday_only else None
    sources = [(choose(load_dataset(arguments.emoji), names, arguments.styles), None)]
    if arguments.photos:
        photos = load_dataset(arguments.photos)
        if arguments.max_photos is not None:  # shuffled first, because the source is sorted by class
            photos["train"] = photos["train"].shuffle(seed=0).take(arguments.max_photos)
        sources.append((photos, "photo"))
    prepared = prepare(sources, nouns, arguments.resolution)
    arguments.output.mkdir(parents=True, exist_ok=True)
    for split, records in prepared.items():
        records.to_parquet(arguments.output / f"{split}.parquet")
        styles = {style: records["style"][:].count(style) for style in STYLED_WORDINGS}
        print(f"{split}: {len(records)} images of {len(set(records['name']))} names, {styles}")


if __name__ == "__main__":
    with plain_errors():
        main()
