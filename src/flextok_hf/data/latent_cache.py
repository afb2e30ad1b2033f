"""Latents of a frozen VAE, encoded once instead of in every epoch.

Letters: B batch, H W sides of an image, C latent channels, h w latent grid.
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.utils.data import Dataset

from ..models.latents import encode_latents, not_finite_error
from ..pipelines.images import pixels_to_values
from .buckets import Shape, ShapeStacks
from .image_dataset import ImageDataset
from .row_reader import READ_BATCH, read_rows
from .samples import draw_conditions, draw_flip
from .seeds import seeded_generator
from .skipped_rows import no_image_error


class LatentDataset(Dataset):
    """Latents with captions and classes, indexed by row or by (row, draw) like an `ImageDataset`.

    Args:
        latents: (views, C, h, w) of each row; view 1, if present, is the mirrored image.
        rows: caption and class of each row.
        row_shapes: height and width of each row's image.
        source: the dataset that was encoded.
    """

    def __init__(
        self, latents: Sequence[Tensor], rows: list[dict[str, Any]], row_shapes: list[Shape], source: ImageDataset
    ):
        self.latents = ShapeStacks(latents)
        self.rows = rows
        self.row_shapes = row_shapes if len(source.transform.shapes) > 1 else None
        self.columns = source.columns
        self.class_names = source.class_names
        self.skipped = source.skipped

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        row, draw = key if isinstance(key, tuple) else (key, None)
        generator = seeded_generator(draw)
        views = self.latents[row]
        view = int(views.shape[0] > 1 and draw_flip(generator))
        return {"latents": views[view], **draw_conditions(self.rows[row], self.columns, generator)}


@torch.no_grad()
def cache_latents(dataset: ImageDataset, vae: AutoencoderKL, num_workers: int = 0) -> LatentDataset:
    """Encode every image of `dataset` once, and its mirrored copy too if `random_flip` is set.

    Latents are kept in half precision on the CPU: 4 KB for a 128-pixel image with 8 channels at an eighth of the
    size, so millions of images fit.

    Raises:
        ValueError: if there is no usable image, or latents are not finite in half precision.
    """
    kept: list[dict[str, Any]] = []
    row_shapes: list[Shape] = []
    pending: dict[Shape, list[tuple[int, Tensor]]] = {}
    encoded: dict[int, Tensor] = {}

    def encode(shape: Shape) -> None:
        numbers, pixels = zip(*pending.pop(shape), strict=True)
        pixel_values = pixels_to_values(torch.stack(pixels)).to(vae.device)  # (B, 3, H, W)
        views = [pixel_values, pixel_values.flip(-1)] if dataset.transform.random_flip else [pixel_values]
        latents = torch.stack([encode_latents(vae, view) for view in views], dim=1)  # (B, views, C, h, w)
        latents = latents.to("cpu", torch.float16)
        if not latents.isfinite().all():
            raise not_finite_error("The latents of the images", vae, "VAE")
        encoded.update(zip(numbers, latents, strict=True))

    for pixels, values in read_rows(dataset.rows, dataset.transform, dataset.columns, dataset.skipped, num_workers):
        shape = (pixels.shape[-2], pixels.shape[-1])
        pending.setdefault(shape, []).append((len(kept), pixels))
        kept.append(values)
        row_shapes.append(shape)
        if len(pending[shape]) == READ_BATCH:
            encode(shape)
    for shape in list(pending):
        encode(shape)
    if not kept:
        raise no_image_error(f"all {len(dataset)} rows", dataset.columns)
    return LatentDataset([encoded[number] for number in range(len(kept))], kept, row_shapes, dataset)


def latents_of(batch: dict[str, Any], vae: AutoencoderKL | None, device: torch.device) -> Tensor:
    """Return the latents (B, C, h, w) float32 of a training batch, cached or encoded now."""
    if "latents" in batch:
        return batch["latents"].to(device, non_blocking=True).float()
    return encode_latents(vae, batch["pixel_values"].to(device, non_blocking=True)).float()
