"""Which columns of a dataset are read, and checks of what they hold."""

from dataclasses import dataclass
from typing import Any

import datasets
from datasets import ClassLabel, Value


SIZE_COLUMNS = ("height", "width")  # beside token ids, as scripts/tokenize_dataset.py writes them


@dataclass(frozen=True)
class Columns:
    """The columns that training reads.

    Args:
        image: column of images.
        caption: column of captions, each a string or a list of alternatives, if captions are read.
        class_label: column of class numbers, if classes are read.
        token_ids: column of token ids for one or more crops of each image; if set, images are not read.
        num_classes: number of classes, if the column has no class names.
        num_tokens: number of token ids per crop.
        codebook_size: token ids are below this.
        reads_sizes: read `SIZE_COLUMNS` beside token ids, the size in pixels of the images they stand for.
    """

    image: str = "image"
    caption: str | None = None
    class_label: str | None = None
    token_ids: str | None = None
    num_classes: int | None = None
    num_tokens: int | None = None
    codebook_size: int | None = None
    reads_sizes: bool = False

    def names(self) -> list[str]:
        """Return the names of the columns to read."""
        sources = [self.image] if self.token_ids is None else [self.token_ids, *SIZE_COLUMNS * self.reads_sizes]
        return [name for name in (*sources, self.caption, self.class_label) if name is not None]

    def check(self, features: datasets.Features) -> None:
        """Raise a ValueError or TypeError if `features` lacks a column or has one of an unsupported type."""
        options = {"caption": self.caption, "class": self.class_label, "token": self.token_ids}
        for argument, name in (options if self.token_ids else {"image": self.image, **options}).items():
            if name is not None and name not in features:
                raise ValueError(
                    f"`{argument}_column` is '{name}', but the dataset has the columns {', '.join(features)}."
                    " Choose one of them."
                )
        if self.token_ids is None and not isinstance(features[self.image], datasets.Image):
            raise TypeError(
                f"`image_column` '{self.image}' holds {features[self.image]}, not images. Choose another column, or"
                " cast it with `dataset.cast_column(name, datasets.Image())`."
            )
        if self.token_ids is not None and not _holds(features[self.token_ids], 2, ("int", "uint")):
            raise TypeError(
                f"`token_column` '{self.token_ids}' must hold whole numbers, one list per crop of an image, not"
                f" {features[self.token_ids]}. Create it with scripts/tokenize_dataset.py."
            )
        for name in SIZE_COLUMNS if self.token_ids is not None and self.reads_sizes else ():
            if name not in features or not _holds(features[name], 0, ("int", "uint")):
                raise ValueError(
                    "`shape_conditioning` needs the size of the image of each row of token ids, but the dataset has no"
                    f" column '{name}' of whole numbers. scripts/tokenize_dataset.py writes it: make the ids again."
                )
        if self.caption is not None and not _holds(features[self.caption], 1, ("string", "large_string")):
            raise TypeError(
                f"`caption_column` '{self.caption}' must hold strings or lists of them, not {features[self.caption]}."
            )
        if self.class_label is not None:
            feature = features[self.class_label]
            if not (isinstance(feature, ClassLabel) or (isinstance(feature, Value) and "int" in feature.dtype)):
                raise TypeError(
                    f"`class_column` '{self.class_label}' must hold whole numbers, not {feature}. Convert class"
                    " names with `dataset.class_encode_column(name)`."
                )

    def class_names(self, features: datasets.Features) -> list[str] | None:
        """Return the class names, or class numbers as strings if there are no names; `None` without classes.

        Raises:
            ValueError: the number of classes is unknown, or contradicts the class names.
        """
        if self.class_label is None:
            return None
        names = getattr(features[self.class_label], "names", None)
        if names and self.num_classes not in (None, len(names)):
            raise ValueError(
                f"`num_classes` is {self.num_classes}, but '{self.class_label}' has {len(names)} class names: leave"
                " it out."
            )
        if not names and self.num_classes is None:
            raise ValueError(
                f"`class_column` '{self.class_label}' has no class names, so the number of classes is unknown: set"
                " `num_classes`."
            )
        return names or [str(number) for number in range(self.num_classes or 0)]


def _holds(feature: Any, depth: int, kinds: tuple[str, ...]) -> bool:
    """Whether a feature holds values of one of `kinds`, inside up to `depth` lists."""
    for _ in range(depth):
        feature = getattr(feature, "feature", feature)
    return isinstance(feature, Value) and feature.dtype.rstrip("0123456789") in kinds


def class_range_message(name: str, label: int, num_classes: int) -> str:
    """Return the error message for a class number that is out of range."""
    return (
        f"`class_column` '{name}' holds {label}, but classes are numbered from 0 to {num_classes - 1}. Fix the"
        " data or `num_classes`."
    )


def undecoded(dataset: Any, columns: Columns) -> Any:
    """Keep the columns in use, with images as bytes: they are decoded row by row, where errors can be handled."""
    dataset = dataset.select_columns(columns.names())
    return dataset if columns.token_ids else dataset.cast_column(columns.image, datasets.Image(decode=False))
