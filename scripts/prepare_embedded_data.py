r"""Create the training sets of the embedded model: emoji with simple captions, clip art, and photos of objects.

    python scripts/prepare_embedded_data.py --emoji emoji128 --photos caltech101_128 --max_photos 3500 \
        --output data/embedded128
    python scripts/prepare_embedded_data.py --emoji emoji128 --photos caltech101_128 --max_photos 1200 \
        --everyday_only --styles 3d flat gradient noto --output data/everyday128
    python scripts/prepare_embedded_data.py --emoji emoji128 twemoji128 --clipart clipart128 --photos caltech101_128 \
        --more_captions --held_out_share 0.05 --recolored_copies 1 --keep_proportions --output data/next128

The first set has emoji of all names and styles; the second, for the later training stages, has everyday names only.
These two trained the embedded model; the third is for the next one (docs/log.md).

`--emoji` are folders or Hub datasets with the splits train and validation and the columns image, name and style;
`--photos` is the same with the columns image and name, `--clipart` with image, text, keywords and label. Writes
train.parquet and validation.parquet with the columns

    image            lossy WebP, RGB, resolution x resolution, or with --keep_proportions the shorter side
    captions         list of phrasings, with and without style; training samples one per step
    name             the common name ("car", not "automobile")
    style            3d, flat, gradient, noto, twemoji, monochrome, plain (flags), clip art or photo
    everyday         whether the name is on the list of everyday names
    split            train or validation
    held_out         whether training has the name in other styles, but not in this one
    prompt           the phrasing without style ("a car")
    styled_prompt    the phrasing with style ("a 3d car"); same as prompt if there is no style to mention

The validation split is that of the source: emoji whose name is in train in another style, and photos of known classes.
`--held_out_share` moves more combinations of name and style there, chosen by a hash of both, if the name keeps
another style. `--recolored_copies` adds copies of the drawings to train, with other hues (not if a caption names a
color) and other plain backgrounds, for tokenizers: their latents are cached, so they see no random colors. Titles of
clip art say what it shows only in the folders of CLIPART_OF_THINGS; elsewhere the folder is named.
"""

import argparse
import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path

from datasets import Dataset, DatasetDict, Features, Image, List, Value, load_dataset
from embedded_augmentation import recolor
from embedded_captions import (
    PLAIN_WORDINGS,
    STYLED_WORDINGS,
    Noun,
    make_captions,
    make_more_captions,
    noun_phrases,
    read_names,
    styled_phrase,
)
from PIL import Image as PILImage

from flextok_hf.pipelines.images import resize_and_crop, to_rgb
from flextok_hf.utils.plain_errors import plain_errors


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
CLIP_ART, PHOTO = "clip art", "photo"
WEBP_QUALITY = {PHOTO: 80}  # drawings use 90: compression artifacts are more visible at their edges

CLIPART_OF_THINGS = ("animals", "buildings", "food", "plants", "recreation", "tools", "transportation")
MAX_SHARED_TITLE = 3  # a title of more images is that of a series, such as "lemon theme"
STYLES_WITHOUT_COMBINATIONS = ("plain", CLIP_ART, PHOTO)  # never held out: each image is of its own kind


def compress(image: PILImage.Image, resolution: int, style: str, keep_proportions: bool = False) -> bytes:
    """Crop an image to a square unless it keeps its proportions, resize its shorter side, and return it as WebP.

    WebP takes a fifth of the size of PNG.
    """
    buffer, image = io.BytesIO(), to_rgb(image)
    scale, shape = resolution / min(image.size), (resolution, resolution)
    if keep_proportions:
        shape = (round(image.height * scale), round(image.width * scale))
    resize_and_crop(image, shape).save(buffer, "WEBP", quality=WEBP_QUALITY.get(style, 90), method=6)
    return buffer.getvalue()


def choose(source: DatasetDict, names: set[str] | None, styles: Sequence[str]) -> DatasetDict:
    """Keep the emoji of the given styles and names (`None`: all names)."""

    def is_wanted(name: str, style: str) -> bool:
        return style in styles and (names is None or name in names)

    return source.filter(is_wanted, input_columns=["name", "style"])


def read_clip_art(source: DatasetDict, things_only: bool) -> DatasetDict:
    """Name clip art by its title, or where that says nothing, by its last keyword or its folder.

    Args:
        source: splits with the columns image, text, keywords and label.
        things_only: leave out the folders whose titles say nothing.

    Returns:
        Splits with the columns image, name, keywords, and captions: empty where they follow from the name.
    """
    shared = Counter(title for split in source.values() for title in split["text"])

    def describe(text: str, keywords: list[str], label: str) -> dict:
        folder = label.replace("_", " ")
        title = " ".join(re.sub(r"[^a-z\- ]", " ", text.lower()).split())
        if label not in CLIPART_OF_THINGS:
            return {"name": folder, "keywords": [], "captions": [CLIP_ART, f"{CLIP_ART}, {folder}"]}
        if not title or shared[text] > MAX_SHARED_TITLE:
            title = keywords[-1].lower() if keywords else folder
        return {"name": title, "keywords": keywords, "captions": []}

    columns = ["text", "keywords", "label"]
    if things_only:
        source = source.filter(lambda label: label in CLIPART_OF_THINGS, input_columns=["label"])
    described = source.map(describe, input_columns=columns)
    return described.select_columns(["image", "name", "keywords", "captions"])


def make_rows(
    records: Dataset,
    noun_of: dict[str, Noun],
    style: str | None,
    resolution: int,
    more_captions: bool,
    keep_proportions: bool = False,
) -> Iterator[dict]:
    """Yield the rows of one split; `style` applies to all images, or is `None` if the style is a column.

    A name that is not in `noun_of` is used in lower case, with and without an article.
    """
    for record in records:
        source_name = record["name"].replace("_", " ")
        source_name = PHOTO_NAMES.get(source_name, source_name) if style == PHOTO else source_name
        if source_name.startswith(EXCLUDED_NAMES):
            continue
        fallback = Noun(source_name=source_name, name=source_name.lower(), form="either")
        noun = noun_of.get(source_name, fallback)
        row_style = style or record["style"]
        captions = record.get("captions") or make_captions(noun, row_style)
        if more_captions and not record.get("captions"):
            captions += make_more_captions(noun, row_style, record.get("keywords") or [])
        styled = STYLED_WORDINGS[row_style][:1] or PLAIN_WORDINGS[:1]
        phrase = noun_phrases(noun.name, noun.form)[0]
        yield {
            "image": {"bytes": compress(record["image"], resolution, row_style, keep_proportions), "path": None},
            "captions": captions,
            "name": noun.name,
            "style": row_style,
            "everyday": noun is not fallback,
            "prompt": phrase,
            "styled_prompt": styled[0].format(noun=phrase, bare=noun.name, styled=styled_phrase(noun, row_style)),
        }


def is_chosen(name: str, style: str, share: float) -> bool:
    """Whether a combination is among the `share` of all combinations that a hash of both chooses."""
    return int.from_bytes(sha256(f"{name}/{style}".encode()).digest()[:8], "big") < share * 2**64


def hold_out(splits: dict[str, list[dict]], share: float) -> None:
    """Move a share of the combinations of name and style to validation, and mark those that train lacks, in place.

    A combination stays in train if its name would otherwise be in no other style there.
    """
    kept: dict[str, set[str]] = {}
    for row in splits["train"]:
        chosen = row["style"] not in STYLES_WITHOUT_COMBINATIONS and is_chosen(row["name"], row["style"], share)
        kept.setdefault(row["name"], set()).update(() if chosen else (row["style"],))
    train = []
    for row in splits["train"]:
        stays = row["style"] in kept[row["name"]] or not kept[row["name"]]
        (train if stays else splits["validation"]).append(row | {"split": "train" if stays else "validation"})
    splits["train"] = train
    seen: dict[str, set[str]] = {}
    for row in train:
        seen.setdefault(row["name"], set()).add(row["style"])
        row["held_out"] = False
    for row in splits["validation"]:
        styles = seen.get(row["name"], set())
        row["held_out"] = bool(styles) and row["style"] not in (*styles, *STYLES_WITHOUT_COMBINATIONS)


def recolored(rows: Iterable[dict], copies: int) -> Iterator[dict]:
    """Yield recolored copies of the drawings in rows of `prepare`; hues of flags ("plain") and grays stay."""
    for number, row in enumerate(rows):
        if row["style"] == PHOTO:
            continue
        image = PILImage.open(io.BytesIO(row["image"]["bytes"]))
        for copy in range(copies):
            key = f"{number}/{row['name']}/{row['style']}/{copy}"
            changed = recolor(image, row["captions"], key, keeps_hue=row["style"] == "plain")
            if changed is not None:
                content = compress(changed, min(image.size), row["style"], keep_proportions=True)
                yield row | {"image": {"bytes": content, "path": None}}


def prepare(
    sources: Iterable[tuple[DatasetDict, str | None]],
    nouns: Iterable[Noun],
    resolution: int,
    more_captions: bool = False,
    held_out_share: float = 0.0,
    recolored_copies: int = 0,
    keep_proportions: bool = False,
) -> dict[str, Dataset]:
    """Caption, crop and resize; see the module docstring for the columns.

    Args:
        sources: datasets with the splits train and validation, each with the style of all its images or `None`.
        nouns: everyday names, with their inflection and synonyms.
        resolution: side of the images in pixels.
        more_captions: add keywords and short sentences to the captions.
        held_out_share: share of the combinations of name and style in train to move to validation.
        recolored_copies: number of recolored copies of each drawing in train.
        keep_proportions: resize the shorter side to `resolution` instead of cropping to squares, for `buckets`.

    Raises:
        ValueError: if an everyday name has no image in the sources, or a number is out of range.
    """
    if not 0 <= held_out_share < 1:
        raise ValueError(f"`held_out_share` must lie in [0, 1), got {held_out_share}.")
    if recolored_copies < 0:
        raise ValueError(f"`recolored_copies` must be 0 or more, got {recolored_copies}.")
    noun_of = {noun.source_name: noun for noun in nouns}
    features = Features(
        {"image": Image(), "captions": List(Value("string")), "everyday": Value("bool"), "held_out": Value("bool")}
        | {column: Value("string") for column in ("name", "style", "split", "prompt", "styled_prompt")}
    )
    splits: dict[str, list[dict]] = {"train": [], "validation": []}
    for source, style in sources:
        for split, rows in splits.items():
            made = make_rows(source[split], noun_of, style, resolution, more_captions, keep_proportions)
            rows.extend(row | {"split": split} for row in made)
    hold_out(splits, held_out_share)
    splits["train"] += list(recolored(splits["train"], recolored_copies))
    found = {row["name"] for rows in splits.values() for row in rows}
    missing = sorted(noun.source_name for noun in noun_of.values() if noun.name not in found)
    if missing:
        raise ValueError(f"The sources have no image of {missing}. Correct the list of names.")
    return {split: Dataset.from_list(rows, features=features) for split, rows in splits.items()}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    styles = [style for style in STYLED_WORDINGS if style not in (CLIP_ART, PHOTO)]
    parser.add_argument("--emoji", required=True, nargs="+", help="folders with parquet files, or Hub datasets")
    parser.add_argument("--clipart", help="the same for clip art (default: none)")
    parser.add_argument("--photos", help="the same for photos (default: none)")
    parser.add_argument("--everyday_only", action="store_true", help="emoji with everyday names, clip art of things")
    parser.add_argument("--styles", nargs="+", default=styles, choices=STYLED_WORDINGS, help="of emoji")
    parser.add_argument("--max_photos", type=int, help="number of training photos, chosen at random (all)")
    parser.add_argument("--more_captions", action="store_true", help="also keywords and short sentences")
    parser.add_argument("--held_out_share", type=float, default=0.0, help="of combinations of name and style (0)")
    parser.add_argument("--keep_proportions", action="store_true", help="no squares, for training in `buckets`")
    parser.add_argument("--recolored_copies", type=int, default=0, help="of each drawing in train (0)")
    parser.add_argument("--output", required=True, type=Path, help="folder for train.parquet and validation.parquet")
    parser.add_argument("--names", type=Path, default=DEFAULT_NAMES_FILE, help="list of everyday names, one per line")
    parser.add_argument("--resolution", type=int, default=128, help="side of the images in pixels")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    nouns = read_names(arguments.names.read_text(encoding="utf-8").splitlines())
    names = {noun.source_name for noun in nouns} if arguments.everyday_only else None
    sources: list[tuple[DatasetDict, str | None]] = []
    for emoji in arguments.emoji:
        sources.append((choose(load_dataset(emoji), names, arguments.styles), None))
    if arguments.clipart:
        sources.append((read_clip_art(load_dataset(arguments.clipart), arguments.everyday_only), CLIP_ART))
    if arguments.photos:
        photos = load_dataset(arguments.photos)
        if arguments.max_photos is not None:  # shuffled first, because the source is sorted by class
            photos["train"] = photos["train"].shuffle(seed=0).take(arguments.max_photos)
        sources.append((photos, PHOTO))
    options = arguments.more_captions, arguments.held_out_share, arguments.recolored_copies
    options += (arguments.keep_proportions,)
    prepared = prepare(sources, nouns, arguments.resolution, *options)
    arguments.output.mkdir(parents=True, exist_ok=True)
    for split, records in prepared.items():
        records.to_parquet(arguments.output / f"{split}.parquet")
        styles = {style: records["style"][:].count(style) for style in STYLED_WORDINGS}
        held_out = sum(records["held_out"][:])
        print(f"{split}: {len(records)} images of {len(set(records['name']))} names, {styles}, {held_out} held out")


if __name__ == "__main__":
    with plain_errors():
        main()
