"""Dataset row -> training sample, and samples -> batch.

Letters: B batch, R resolution (side of a square image), H W sides of the images of a batch, K tokens per image.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets.utils.file_utils import xopen
from PIL import Image
from torch import Tensor

from ..pipelines.images import image_to_pixels, load_image, pixels_to_values, resize_and_crop, to_rgb
from .buckets import Shape, nearest_shape
from .columns import SIZE_COLUMNS, Columns, class_range_message
from .skipped_rows import UnreadableRow


@dataclass(frozen=True)
class ImageTransform:
    """Turns a PIL image into float32 `pixel_values` (3, H, W) in [-1, 1]; picklable for workers.

    Args:
        resolution: R; H and W, unless there are `shapes`.
        random_flip: mirror half of the images. Leave it off if left and right matter, as in captions.
        random_crop: crop at a random position instead of the center. The aspect ratio is kept either way.
        min_crop_scale: smallest size of a random crop, relative to the largest one that fits into the image.
        shapes: an image gets the one that its proportions are closest to, as its height and width.
    """

    resolution: int
    random_flip: bool = False
    random_crop: bool = False
    min_crop_scale: float = 1.0
    shapes: tuple[Shape, ...] = ()

    def to_pixels(
        self, image: Image.Image, generator: torch.Generator | None = None, shape: Shape | None = None
    ) -> Tensor:
        """Resize and crop to uint8 (3, H, W), by default of the nearest shape: deterministic without `random_crop`."""
        image = to_rgb(image)
        shape = shape or nearest_shape((image.height, image.width), self.shapes or [(self.resolution,) * 2])
        if self.random_crop:
            image = image.crop(self.draw_box(image.width, image.height, generator, shape))
        return image_to_pixels(resize_and_crop(image, shape))

    def draw_box(
        self, width: int, height: int, generator: torch.Generator | None, shape: Shape = (1, 1)
    ) -> tuple[int, int, int, int]:
        """Draw the box with the proportions of `shape` to crop from an image: left, top, right and bottom."""
        scale, across, down = torch.rand(3, generator=generator).tolist()
        scale = self.min_crop_scale + (1 - self.min_crop_scale) * scale
        box_width = max(1, round(min(width, height * shape[1] / shape[0]) * scale))
        box_height = max(1, round(min(height, width * shape[0] / shape[1]) * scale))
        left, top = round((width - box_width) * across), round((height - box_height) * down)
        return left, top, left + box_width, top + box_height

    def to_values(self, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Mirror at random if `random_flip` is set, and scale uint8 (3, H, W) to float32 in [-1, 1]."""
        if self.random_flip and draw_flip(generator):
            pixels = pixels.flip(-1)
        return pixels_to_values(pixels)

    def __call__(
        self, image: Image.Image, generator: torch.Generator | None = None, shape: Shape | None = None
    ) -> Tensor:
        """Turn `image` into (3, H, W); random draws use `generator`, by default the worker's global one."""
        return self.to_values(self.to_pixels(image, generator, shape), generator)


def read_image(value: dict[str, Any] | None, read: Callable[[Any], Any] = load_image) -> Any:
    """Read an undecoded value {"bytes", "path"} of an image column, by default as RGB.

    Raises:
        UnreadableRow: if the image is missing, damaged or may not be read.
        OSError: if the network or the disk fails, or too many files are open, which is not the row's fault.
    """
    if value is None or (value["bytes"] is None and value["path"] is None):
        raise UnreadableRow("there is no image")
    content = value["bytes"]
    try:
        if content is None and not Path(value["path"]).is_file() and "://" in value["path"]:
            with xopen(value["path"], "rb") as file:
                content = file.read()
        return read(value["path"] if content is None else content)
    except (ValueError, FileNotFoundError, PermissionError) as error:
        raise UnreadableRow(str(error)) from error


def draw_flip(generator: torch.Generator | None) -> bool:
    """Decide at random whether to mirror an image, with probability 0.5."""
    return torch.rand((), generator=generator).item() < 0.5


def draw_conditions(row: dict[str, Any], columns: Columns, generator: torch.Generator | None) -> dict[str, Any]:
    """Return one caption of a row, drawn with `generator`, and its class, if `columns` specifies such columns.

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


def draw_token_ids(value: Any, columns: Columns, generator: torch.Generator | None) -> Tensor:
    """Return the token ids of one crop, (K,) int64, drawn from all crops of an image.

    Raises:
        UnreadableRow: if there are none.
        ValueError: if they do not fit the tokenizer.
    """
    if not value:
        raise UnreadableRow("it has no token ids")
    if isinstance(value[0], list):
        value = value[torch.randint(len(value), (), generator=generator).item()]
    token_ids = torch.tensor(value, dtype=torch.int64)
    num_tokens, codebook_size = columns.num_tokens or len(value), columns.codebook_size
    if len(value) != num_tokens or (codebook_size is not None and max(value) >= codebook_size):
        raise ValueError(
            f"`token_column` '{columns.token_ids}' holds {len(value)} ids up to {max(value)}, but the tokenizer"
            f" produces {num_tokens} ids below {codebook_size}. Pass the `tokenizer` that the data was made with; if"
            " `--max_tokens` truncated the ids, create them again without it."
        )
    return token_ids


def read_size(row: dict[str, Any]) -> Tensor:
    """Return height and width of the image that token ids stand for, (2,) int64.

    Raises:
        UnreadableRow: if one of them is missing.
    """
    sides = [row[name] for name in SIZE_COLUMNS]
    if not all(side is not None and side > 0 for side in sides):
        raise UnreadableRow(f"its {' and '.join(SIZE_COLUMNS)} are {sides}, not a size")
    return torch.tensor(sides, dtype=torch.int64)


def read_sample(
    row: dict[str, Any],
    columns: Columns,
    transform: ImageTransform,
    generator: torch.Generator | None,
    shape: Shape | None = None,
) -> dict[str, Any]:
    """Turn a row into a sample: `pixel_values` (3, H, W) or `token_ids` (K,) and `sizes` (2,), plus its conditions.

    Raises:
        UnreadableRow: if the row is incomplete or damaged.
    """
    if columns.token_ids is not None:
        sample = {"token_ids": draw_token_ids(row[columns.token_ids], columns, generator)}
        if columns.reads_sizes:
            sample["sizes"] = read_size(row)
    else:
        sample = {"pixel_values": transform(read_image(row[columns.image]), generator, shape)}
    return {**sample, **draw_conditions(row, columns, generator)}


def collate(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Stack samples into a batch.

    Args:
        samples: each with `pixel_values` (3, H, W), `latents` (C, h, w) or `token_ids` (K,), and optionally `sizes`
            (2,), `captions`, a string, `class_labels`, a number, and `unreadable`, the rows skipped to get to it.

    Returns:
        The same with a leading dimension B: captions as a list, class labels as (B,) int64.
    """
    batch: dict[str, Any] = {}
    for name in ("pixel_values", "latents", "token_ids", "sizes"):
        if name in samples[0]:
            batch[name] = torch.stack([sample[name] for sample in samples])
    if "captions" in samples[0]:
        batch["captions"] = [sample["captions"] for sample in samples]
    if "class_labels" in samples[0]:
        batch["class_labels"] = torch.tensor([sample["class_labels"] for sample in samples], dtype=torch.int64)
    unreadable = {row: reason for sample in samples for row, reason in sample.get("unreadable", {}).items()}
    return {**batch, "unreadable": unreadable} if unreadable else batch
