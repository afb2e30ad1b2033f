"""Everything that need not be done again in each epoch: decoded pictures, and latents of a frozen VAE.

Letters: B batch, R resolution, C latent channels, h w latent grid.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from ..pipelines.images import pixels_to_values
from ..pipelines.latents import encode_latents
from .samples import UnreadableRow, draw_conditions, draw_flip, no_picture_error, read_picture, seeded_generator


if TYPE_CHECKING:
    from .image_dataset import ImageDataset

READ_BATCH = 64  # rows that travel together from a reading process


class RowReader(Dataset):
    """Row number -> (pixels (3, R, R) uint8, the row without its picture), or (None, why it cannot be used)."""

    def __init__(self, dataset: "ImageDataset"):
        self.rows, self.transform, self.columns = dataset.rows, dataset.transform, dataset.columns

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> tuple[Any, Any]:
        values = dict(self.rows[row])
        try:
            pixels = self.transform.to_pixels(read_picture(values.pop(self.columns.image)))
            draw_conditions(values, self.columns, torch.Generator())  # is its caption there?
        except UnreadableRow as error:
            return None, error
        return pixels.numpy(), values  # an array travels between processes without an open file for each


def read_rows(dataset: "ImageDataset", num_workers: int) -> Iterator[tuple[int, Tensor, dict[str, Any]]]:
    """Decode a whole data set in order; yields row, pixels (3, R, R) uint8 and the row without its picture.

    Unreadable rows are reported to `dataset` and left out.
    """
    if dataset.transform.random_crop:
        raise ValueError("A cache keeps one crop of each picture: turn off `random_crop`, or the cache.")
    loader = DataLoader(RowReader(dataset), batch_size=READ_BATCH, num_workers=num_workers, collate_fn=list)
    with tqdm(total=len(dataset), desc="Reading pictures", unit="picture", mininterval=2) as bar:
        for start, items in zip(range(0, len(dataset), READ_BATCH), loader, strict=True):
            for row, (pixels, values) in enumerate(items, start):
                if pixels is None:
                    dataset.skipped.add(row, values)
                else:
                    yield row, torch.from_numpy(pixels), values
            bar.update(len(items))


class LatentDataset(Dataset):
    """Latents with captions and classes, asked for by row or by (row, draw) like an `ImageDataset`.

    Args:
        latents: (rows, views, C, h, w); view 1, if there is one, is the mirrored picture.
        rows: captions and classes of each row.
        source: data set that they were made of.
    """

    def __init__(self, latents: Tensor, rows: list[dict[str, Any]], source: "ImageDataset"):
        self.latents = latents.share_memory_()  # one copy for all workers
        self.rows = rows
        self.columns = source.columns
        self.class_names = source.class_names
        self.skipped = source.skipped

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        row, draw = key if isinstance(key, tuple) else (key, None)
        generator = seeded_generator(draw)
        view = int(self.latents.shape[1] > 1 and draw_flip(generator))
        return {"latents": self.latents[row, view], **draw_conditions(self.rows[row], self.columns, generator)}


@torch.no_grad()
def cache_latents(dataset: "ImageDataset", vae: AutoencoderKL, num_workers: int = 0) -> LatentDataset:
    """Encode every picture of `dataset` once, mirrored as well if it mirrors them.

    Latents are kept in half precision on the CPU: 4 KB for a picture of 128 pixels with 8 channels at an eighth of the
    size, so that millions of pictures fit.

    Raises:
        ValueError: if no picture can be used.
    """
    kept: list[dict[str, Any]] = []
    pending: list[Tensor] = []
    batches: list[Tensor] = []

    def encode() -> None:
        pixel_values = pixels_to_values(torch.stack(pending)).to(vae.device)  # (B, 3, R, R)
        views = [pixel_values, pixel_values.flip(-1)] if dataset.transform.random_flip else [pixel_values]
        latents = torch.stack([encode_latents(vae, view) for view in views], dim=1)  # (B, views, C, h, w)
        batches.append(latents.to("cpu", torch.float16))
        pending.clear()

    for _, pixels, values in read_rows(dataset, num_workers):
        pending.append(pixels)
        kept.append(values)
        if len(pending) == READ_BATCH:
            encode()
    if pending:
        encode()
    if not kept:
        raise no_picture_error(f"all {len(dataset)} rows", dataset.columns)
    return LatentDataset(torch.cat(batches), kept, dataset)


def latents_of(batch: dict[str, Any], vae: AutoencoderKL | None, device: torch.device) -> Tensor:
    """Return the latents (B, C, h, w) float32 of a training batch, cached or encoded now."""
    if "latents" in batch:
        return batch["latents"].to(device, non_blocking=True).float()
    return encode_latents(vae, batch["pixel_values"].to(device, non_blocking=True)).float()
