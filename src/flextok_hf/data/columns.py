"""Which columns of a data set are read, and whether they hold what is expected."""

from dataclasses import dataclass
from typing import Any

import datasets
from datasets import ClassLabel, Value


@dataclass(frozen=True)
class Columns:
    """Where a data set keeps what training reads.

    Args:
        image: images.
        caption: captions, a text or a list of wordings, if they are read.
        class_label: numbers of classes, if they are read.
        token_ids: token ids of one or more crops of each image; then no image is read.
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
                f"`image_column` '{self.image}' holds {features[self.image]}, not images. Choose another column, or"
                " turn it into images with `dataset.cast_column(name, datasets.Image())`."
            )
        if self.token_ids is not None and not _holds(features[self.token_ids], 2, ("int", "uint")):
            raise TypeError(
                f"`token_column` '{self.token_ids}' must hold whole numbers, one list for each crop of an image, not"
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


def class_range_message(name: str, label: int, num_classes: int) -> str:
    """Say that a class does not exist."""
    return (
        f"`class_column` '{name}' holds {label}, but classes are numbered from 0 to {num_classes - 1}. Correct the"
        " data or `num_classes`."
    )


def undecoded(dataset: Any, columns: Columns) -> Any:
    """Keep the columns in use and leave the images as bytes: decoding happens row by row, where it may fail."""
    dataset = dataset.select_columns(columns.names())
    return dataset if columns.token_ids else dataset.cast_column(columns.image, datasets.Image(decode=False))
