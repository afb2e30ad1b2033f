"""One row of a data set -> one training sample, and samples -> a batch.

Letters: B batch, R resolution (side of the square pictures).
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

from flextok_hf.images import image_to_pixels, load_image, pixels_to_values, resize_and_crop, to_rgb


class UnreadableRow(ValueError):
    """A row that cannot be trained on: its picture is damaged or its caption is missing."""


@dataclass(frozen=True)
class ImageTransform:
    """Turns a PIL picture into float32 `pixel_values` (3, R, R) in [-1, 1]; can be sent to workers.

    Args:
        resolution: R.
        random_flip: mirror half of the pictures. Leave it off where left and right matter, as in captions.
        random_crop: cut the square at a random place of the longer side instead of the middle.
    """

    resolution: int
    random_flip: bool = False
    random_crop: bool = False

    def to_pixels(self, image: Image.Image, generator: torch.Generator | None = None) -> Tensor:
        """Resize and crop to uint8 (3, R, R): the costly half, and without `random_crop` the same for every draw."""
        image = to_rgb(image)
        if self.random_crop and image.width != image.height:
            side, offset = min(image.size), torch.rand((), generator=generator).item()
            left, top = round((image.width - side) * offset), round((image.height - side) * offset)
            image = image.crop((left, top, left + side, top + side))
        return image_to_pixels(resize_and_crop(image, self.resolution))

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
    """Where a data set keeps the picture, and where it keeps its caption and its class, if it has them."""

    image: str = "image"
    caption: str | None = None
    class_label: str | None = None

    def check(self, features: datasets.Features) -> None:
        """Raise a ValueError or TypeError if `features` lacks a column or has one of a kind that cannot be used."""
        for argument, name in (("image", self.image), ("caption", self.caption), ("class", self.class_label)):
            if name is not None and name not in features:
                raise ValueError(
                    f"`{argument}_column` is '{name}', but the data set has the columns {', '.join(features)}."
                    " Name one of them."
                )
        if not isinstance(features[self.image], datasets.Image):
            raise TypeError(
                f"`image_column` '{self.image}' holds {features[self.image]}, not pictures. Choose another column, or"
                " turn it into pictures with `dataset.cast_column(name, datasets.Image())`."
            )
        if self.caption is not None:
            feature = features[self.caption]
            item = getattr(feature, "feature", feature)  # a list of wordings or a single one
            if not (isinstance(item, Value) and item.dtype in ("string", "large_string")):
                raise TypeError(
                    f"`caption_column` '{self.caption}' must hold strings or lists of them, not {feature}."
                )
        if self.class_label is not None:
            feature = features[self.class_label]
            if not (isinstance(feature, ClassLabel) or (isinstance(feature, Value) and "int" in feature.dtype)):
                raise TypeError(
                    f"`class_column` '{self.class_label}' must hold whole numbers, not {feature}. Number the names"
                    " with `dataset.class_encode_column(name)`."
                )


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


def draw_flip(generator: torch.Generator | None) -> bool:
    """Decide whether to mirror a picture: every other one."""
    return torch.rand((), generator=generator).item() < 0.5


def draw_conditions(row: dict[str, Any], columns: Columns, generator: torch.Generator | None) -> dict[str, Any]:
    """Take from a row one of its captions, drawn with `generator`, and its class, as far as `columns` name them.

    Raises:
        UnreadableRow: if one of them is missing.
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
        conditions["class_labels"] = label
    return conditions


def collate(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Stack samples into {"pixel_values": (B, 3, R, R), "captions": list of B strings, "class_labels": (B,) int64}.

    Captions and classes are there if the samples have them; cached samples have "latents", (B, C, h, w), for pixels.
    """
    picture = "latents" if "latents" in samples[0] else "pixel_values"
    batch: dict[str, Any] = {picture: torch.stack([sample[picture] for sample in samples])}
    if "captions" in samples[0]:
        batch["captions"] = [sample["captions"] for sample in samples]
    if "class_labels" in samples[0]:
        batch["class_labels"] = torch.tensor([sample["class_labels"] for sample in samples], dtype=torch.int64)
    return batch
