"""A folder of one's own images with their captions, checked before training starts."""

import csv
import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ..pipelines.images import load_image
from ..utils.files import IMAGE_EXTENSIONS, check_image_folder


MIN_IMAGES, MAX_IMAGES = 5, 500
METADATA_FILES = ("metadata.jsonl", "metadata.csv")
CAPTION_SOURCES = ("auto", "name", "files", "metadata")
MAX_SHOWN = 5


@dataclass
class PersonalImages:
    """Images to learn.

    Attributes:
        images: upright, in RGB.
        captions: one for each; all contain the name.
        notes: what was skipped or filled in, one sentence each.
    """

    images: list[Image.Image]
    captions: list[str]
    notes: list[str]


def read_personal_images(folder: Path, name: str, source: str = "auto") -> PersonalImages:
    """Read the images of a folder; those that cannot be read are skipped and named.

    Args:
        folder: with image files, and perhaps a metadata file with the columns `file_name` and `text`.
        name: what the images show; captions without it get it in front.
        source: of the captions: "metadata", "files" for the names of the files, "name" for the name alone, or "auto"
            for a metadata file if there is one, else the name.

    Raises:
        ValueError: there are no images, none can be read, there are too many, or the metadata is not valid.
        FileNotFoundError: there is no such folder, or no metadata file although it was asked for.
    """
    if source not in CAPTION_SOURCES:
        raise ValueError(f"`captions` must be one of {', '.join(CAPTION_SOURCES)}, got {source!r}.")
    check_image_folder(folder)
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_EXTENSIONS and path.is_file())
    if not paths:
        raise ValueError(
            f"`folder` {str(folder)!r} has no images ({', '.join(IMAGE_EXTENSIONS)}). Add {MIN_IMAGES} to"
            f" {MAX_IMAGES}."
        )
    if len(paths) > MAX_IMAGES:
        raise ValueError(
            f"`folder` {str(folder)!r} has {len(paths)} images, but at most {MAX_IMAGES} are learned this way. Train"
            " with `scripts/train.py` instead."
        )
    texts, notes = {}, []
    metadata = [folder / file for file in METADATA_FILES if (folder / file).is_file()]
    if source == "metadata" and not metadata:
        raise FileNotFoundError(f"`folder` {str(folder)!r} has no {' or '.join(METADATA_FILES)}, as `captions` asks.")
    if source in ("auto", "metadata") and metadata:
        texts = read_metadata(metadata[0])
        notes += describe(
            "without a caption, learned as the name alone", [p.name for p in paths if p.name not in texts]
        )
        notes += describe("captioned but missing", sorted(set(texts) - {path.name for path in paths}))
    elif source == "files":
        texts = {path.name: words_of(path.stem) for path in paths}
    images, captions, unreadable = [], [], []
    for path in paths:
        try:
            images.append(load_image(path))
        except (ValueError, OSError):
            unreadable.append(path.name)
            continue
        captions.append(with_name(name, texts.get(path.name, "")))
    notes = describe("unreadable and skipped", unreadable) + notes
    if not images:
        raise ValueError(f"`folder` {str(folder)!r}: none of its {len(paths)} images can be read.")
    if len(images) < MIN_IMAGES:
        notes.append(f"{len(images)} of at least {MIN_IMAGES} images: the adapter will draw little else than these.")
    return PersonalImages(images, captions, notes)


def read_metadata(path: Path) -> dict[str, str]:
    """Read the captions of images by file name; later lines replace earlier ones, empty ones count as none."""
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".csv":
            rows = list(csv.DictReader(text.splitlines()))
        else:
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        found = {row["file_name"]: row.get("text") or "" for row in rows}
    except (ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
        raise ValueError(
            f"{str(path)!r} must have lines with `file_name` and `text`, but cannot be read so: {error!r}."
        ) from error
    for name, caption in found.items():
        if not isinstance(name, str) or not isinstance(caption, str):
            raise ValueError(f"{str(path)!r}: `file_name` and `text` must be texts, got {name!r} and {caption!r}.")
    return {name: caption.strip() for name, caption in found.items() if caption.strip()}


def words_of(stem: str) -> str:
    """Return the name of a file as words, without its numbers: "red_ball-02" is "red ball"."""
    return " ".join(re.sub(r"[\W\d_]+", " ", stem).split())


def with_name(name: str, caption: str) -> str:
    """Return a caption that contains the name."""
    if not caption:
        return name
    return caption if name.lower() in caption.lower() else f"{name}, {caption}"


def describe(what: str, names: list[str]) -> list[str]:
    """Return a sentence that counts and names files, or none."""
    if not names:
        return []
    shown = ", ".join(names[:MAX_SHOWN]) + (" ..." if len(names) > MAX_SHOWN else "")
    return [f"{len(names)} image{'s'[: len(names) > 1]} {what}: {shown}."]


def prompts_of(captions: list[str], name: str) -> list[str]:
    """Return the name and the most frequent captions, as examples of what was learned."""
    return list(dict.fromkeys([name, *(caption for caption, _ in Counter(captions).most_common(4))]))[:4]
