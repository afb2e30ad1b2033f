"""One row of a data set -> one training sample, and samples -> a batch.

Letters: B batch, R resolution (side of the square pictures), K tokens of a picture.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from datasets import ClassLabel, Value
from datasets.utils.file_utils import xopen
from PIL import Image
from torch import Tensor

from ..pipelines.images import image_to_pixels, load_image, pixels_to_values, resize_and_crop, to_rgb


class UnreadableRow(ValueError):
    """A row that cannot be trained on: its picture is damaged or its caption is missing."""


@dataclass(frozen=True)
class ImageTransform:
    """Turns a PIL picture into float32 `pixel_values` (3, R, R) in [-1, 1]; can be sent to workers.

    Args:
        resolution: R.
        random_flip: mirror half of the pictures. Leave it off where left and right matter, as in captions.
        random_crop: cut the square at a random place instead of the middle. Its proportions always stay.
        min_crop_scale: smallest side of a random square, relative to the shorter side of the picture.
    """

    resolution: int
    random_flip: bool = False
    random_crop: bool = False
    min_crop_scale: float = 1.0

    def to_pixels(self, image: Image.Image, generator: torch.Generator | None = None) -> Tensor:
        """Resize and crop to uint8 (3, R, R): the costly half, and without `random_crop` the same for every draw."""
        image = to_rgb(image)
        if self.random_crop:
            image = image.crop(self.draw_box(image.width, image.height, generator))
        return image_to_pixels(resize_and_crop(image, self.resolution))

    def draw_box(self, width: int, height: int, generator: torch.Generator | None) -> tuple[int, int, int, int]:
        """Choose the square to keep of a picture: left, top, right and bottom."""
        scale, across, down = torch.rand(3, generator=generator).tolist()
        side = max(1, round(min(width, height) * (self.min_crop_scale + (1 - self.min_crop_scale) * scale)))
        left, top = round((width - side) * across), round((height - side) * down)
        return left, top, left + side, top + side

    def to_values(self, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Mirror perhaps, and scale uint8 (3, R, R) to float32 in [-1, 1]."""
        if self.random_flip and draw_flip(generator):
            pixels = pixels.flip(-1)
        return pixels_to_values(pixels)

    def __call__(self, image: Image.Image, generator: torch.Generator | None = None) -> Tensor:
        """Turn `image` into (3, R, R); chance comes from `generator`, default the global one of the worker."""
        return self.to_values(self.to_pixels(image, generator), generator)


@dataclass(frozen=True)
class Columns:
    """Where a data set keeps what training reads.

    Args:
        image: pictures.
        caption: captions, a text or a list of wordings, if they are read.
        class_label: numbers of classes, if they are read.
        token_ids: token ids of one or more crops of each picture; then no picture is read.
        num_classes: number of classes, if the column does not name them.
        num_tokens: token ids of each crop.
        codebook_size: token ids are smaller.
    """

    image: str = "image"
    caption: str | None = None
    class_label: str | None = None
    token_ids: str | None = None
    num_classes: int | None = None
    num_tokens: int | None = None
    codebook_size: int | None = None

    def names(self) -> list[str]:
        """Return the columns that are read."""
        source = self.image if self.token_ids is None else self.token_ids
        return [name for name in (source, self.caption, self.class_label) if name is not None]

    def check(self, features: datasets.Features) -> None:
        """Raise a ValueError or TypeError if `features` lacks a column or has one of a kind that cannot be used."""
        options = {"caption": self.caption, "class": self.class_label, "token": self.token_ids}
        for argument, name in (options if self.token_ids else {"image": self.image, **options}).items():
            if name is not None and name not in features:
                raise ValueError(
                    f"`{argument}_column` is '{name}', but the data set has the columns {', '.join(features)}."
                    " Name one of them."
                )
        if self.token_ids is None and not isinstance(features[self.image], datasets.Image):
            raise TypeError(
                f"`image_column` '{self.image}' holds {features[self.image]}, not pictures. Choose another column, or"
                " turn it into pictures with `dataset.cast_column(name, datasets.Image())`."
            )
        if self.token_ids is not None and not _holds(features[self.token_ids], 2, ("int", "uint")):
            raise TypeError(
                f"`token_column` '{self.token_ids}' must hold whole numbers, one list for each crop of a picture, not"
                f" {features[self.token_ids]}. Write it with scripts/tokenize_dataset.py."
            )
        if self.caption is not None and not _holds(features[self.caption], 1, ("string", "large_string")):
            raise TypeError(
                f"`caption_column` '{self.caption}' must hold strings or lists of them, not {features[self.caption]}."
            )
        if self.class_label is not None:
            feature = features[self.class_label]
            if not (isinstance(feature, ClassLabel) or (isinstance(feature, Value) and "int" in feature.dtype)):
                raise TypeError(
                    f"`class_column` '{self.class_label}' must hold whole numbers, not {feature}. Number the names"
                    " with `dataset.class_encode_column(name)`."
                )

    def class_names(self, features: datasets.Features) -> list[str] | None:
        """Return the names of the classes, numbers if only their number is known, `None` without classes.

        Raises:
            ValueError: how many classes there are is not known, or said twice.
        """
        if self.class_label is None:
            return None
        names = getattr(features[self.class_label], "names", None)
        if names and self.num_classes not in (None, len(names)):
            raise ValueError(
                f"`num_classes` is {self.num_classes}, but '{self.class_label}' names {len(names)} classes: leave it"
                " out."
            )
        if not names and self.num_classes is None:
            raise ValueError(
                f"`class_column` '{self.class_label}' has numbers without names, so nobody knows how many there are:"
                " set `num_classes`."
            )
        return names or [str(number) for number in range(self.num_classes or 0)]


def _holds(feature: Any, depth: int, kinds: tuple[str, ...]) -> bool:
    """Whether a feature holds values of a kind, inside up to `depth` lists."""
    for _ in range(depth):
        feature = getattr(feature, "feature", feature)
    return isinstance(feature, Value) and feature.dtype.rstrip("0123456789") in kinds


def read_picture(value: dict[str, Any] | None) -> Image.Image:
    """Open an undecoded value {"bytes", "path"} of an image column as RGB.

    Raises:
        UnreadableRow: if the picture is missing or damaged. A network that fails is not the row's fault: its error
            passes.
    """
    if value is None or (value["bytes"] is None and value["path"] is None):
        raise UnreadableRow("there is no picture")
    content = value["bytes"]
    try:
        if content is None and not Path(value["path"]).is_file() and "://" in value["path"]:
            with xopen(value["path"], "rb") as file:
                content = file.read()
        return load_image(value["path"] if content is None else content)
    except (ValueError, FileNotFoundError) as error:
        raise UnreadableRow(str(error)) from error


def seeded_generator(draw: int | None) -> torch.Generator | None:
    """Return the source of chance of one draw; `None` is PyTorch's global one."""
    return None if draw is None else torch.Generator().manual_seed(draw)


def draw_flip(generator: torch.Generator | None) -> bool:
    """Decide whether to mirror a picture: every other one."""
    return torch.rand((), generator=generator).item() < 0.5


def draw_conditions(row: dict[str, Any], columns: Columns, generator: torch.Generator | None) -> dict[str, Any]:
    """Take from a row one of its captions, drawn with `generator`, and its class, as far as `columns` name them.

    Raises:
        UnreadableRow: if one of them is missing.
        ValueError: if the class is not one of `columns.num_classes`.
    """
    conditions: dict[str, Any] = {}
    if columns.caption is not None:
        wordings = row[columns.caption]
        if isinstance(wordings, list):
            chosen = torch.randint(max(1, len(wordings)), (), generator=generator).item()
            wordings = wordings[chosen] if wordings else None
        if wordings is None:
            raise UnreadableRow(f"its '{columns.caption}' is empty")
        conditions["captions"] = wordings
    if columns.class_label is not None:
        label = row[columns.class_label]
        if label is None or label < 0:
            raise UnreadableRow(f"its '{columns.class_label}' is {label}, not a class")
        if columns.num_classes is not None and label >= columns.num_classes:
            raise ValueError(class_range_message(columns.class_label, label, columns.num_classes))
        conditions["class_labels"] = label
    return conditions


def class_range_message(name: str, label: int, num_classes: int) -> str:
    """Say that a class does not exist."""
    return (
        f"`class_column` '{name}' holds {label}, but classes are numbered from 0 to {num_classes - 1}. Correct the"
        " data or `num_classes`."
    )


def no_picture_error(where: str, columns: Columns) -> ValueError:
    """Say that nothing usable was found in `where`."""
    return ValueError(
        f"No usable picture in {where}; the warnings above say why. Check `image_column` ('{columns.image}') and"
        f" `caption_column` ('{columns.caption}')."
    )


def draw_token_ids(value: Any, columns: Columns, generator: torch.Generator | None) -> Tensor:
    """Take the token ids of one crop, (K,) int64, from those of all crops of a picture.

    Raises:
        UnreadableRow: if there are none.
        ValueError: if they are of another tokenizer.
    """
    if not value:
        raise UnreadableRow("it has no token ids")
    if isinstance(value[0], list):
        value = value[torch.randint(len(value), (), generator=generator).item()]
    token_ids = torch.tensor(value, dtype=torch.int64)
    num_tokens, codebook_size = columns.num_tokens or len(value), columns.codebook_size
    if len(value) != num_tokens or (codebook_size is not None and max(value) >= codebook_size):
        raise ValueError(
            f"`token_column` '{columns.token_ids}' holds {len(value)} ids up to {max(value)}, but the tokenizer writes"
            f" {num_tokens} ids below {codebook_size}. Name the `tokenizer` that the data was made with; if the ids"
            " were cut by `--max_tokens`, make them again without it."
        )
    return token_ids


def read_sample(
    row: dict[str, Any], columns: Columns, transform: ImageTransform, generator: torch.Generator | None
) -> dict[str, Any]:
    """Turn a row into a sample: `pixel_values` (3, R, R) or `token_ids` (K,), with its conditions.

    Raises:
        UnreadableRow: if the row lacks something or is damaged.
    """
    if columns.token_ids is not None:
        sample = {"token_ids": draw_token_ids(row[columns.token_ids], columns, generator)}
    else:
        sample = {"pixel_values": transform(read_picture(row[columns.image]), generator)}
    return {**sample, **draw_conditions(row, columns, generator)}


def collate(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Stack samples into a batch.

    Args:
        samples: each with `pixel_values` (3, R, R), `latents` (C, h, w) or `token_ids` (K,), and perhaps `captions`, a
            text, `class_labels`, a number, and `unreadable`, the rows that were left out on the way to it.

    Returns:
        The same with a dimension B in front: captions as a list, class labels as (B,) int64.
    """
    batch: dict[str, Any] = {}
    for name in ("pixel_values", "latents", "token_ids"):
        if name in samples[0]:
            batch[name] = torch.stack([sample[name] for sample in samples])
    if "captions" in samples[0]:
        batch["captions"] = [sample["captions"] for sample in samples]
    if "class_labels" in samples[0]:
        batch["class_labels"] = torch.tensor([sample["class_labels"] for sample in samples], dtype=torch.int64)
    unreadable = {row: reason for sample in samples for row, reason in sample.get("unreadable", {}).items()}
    return {**batch, "unreadable": unreadable} if unreadable else batch
