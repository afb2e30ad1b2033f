"""Does an image show what was asked for? Its nearest real images must have the attributes of the condition.

An attribute is a column of the reference images, such as `name` or `style`; a check lists the attributes that must
match and how many neighbors are considered. Letters: B batch.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .accumulators import MeanWithInterval, StreamedMedian, share_of
from .image_index import ImageIndex, gaussian_blur
from .images import draw_rows


TOP = 5


@dataclass(frozen=True)
class Check:
    """One question about an image.

    key: its name in result files.
    attributes: must match those asked for.
    top: number of nearest neighbors of which at least one must match.
    """

    key: str
    attributes: tuple[str, ...]
    top: int = 1


NAME_CHECKS = (
    Check("name", ("name",)),
    Check(f"name_in_top_{TOP}", ("name",), TOP),
    Check("name_and_style", ("name", "style")),
)


def checks_for(attributes: Sequence[str]) -> tuple[Check, ...]:
    """Return the checks of a dataset: one per attribute, plus all of them together if there are several."""
    if list(attributes) == ["name", "style"]:
        return NAME_CHECKS
    single = tuple(Check(attribute, (attribute,)) for attribute in attributes)
    return (*single, Check("all", tuple(attributes))) if len(single) > 1 else single


class Reference:
    """Real images with their attributes.

    Args:
        pixels: (N, 3, R, R) uint8.
        rows: attributes of each image.

    Attributes:
        description: number and checksum of images and attributes, for the protocol.
    """

    def __init__(self, pixels: Tensor, rows: Sequence[dict]):
        self.index = ImageIndex(pixels)
        self.rows = list(rows)
        digest = sha256(pixels.contiguous().numpy())
        digest.update(json.dumps(self.rows, sort_keys=True, default=str).encode())
        self.description = f"{len(self.rows)} images, checksum {digest.hexdigest()[:16]}"

    def answer(
        self, checks: Sequence[Check], pixels: Tensor, wanted: Sequence[dict], leave_out: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Run all checks on images.

        Args:
            checks: skipped if a row of `wanted` lacks one of their attributes.
            pixels: (B, 3, R, R) uint8 or in [0, 1].
            wanted: attributes asked for, per image.
            leave_out: per image, the index of a reference image to exclude from the search, (B,).

        Returns:
            Distance to the nearest image (B,), and by check key whether each image passed, (B,) boolean.
        """
        count = min(max(check.top for check in checks), len(self.rows) - (leave_out is not None))
        distances, neighbors = self.index.search(pixels, count, leave_out)
        found = [[self.rows[i] for i in row] for row in neighbors.tolist()]
        passed = {}
        for check in checks:
            if all(attribute in row for row in wanted for attribute in check.attributes):
                passed[check.key] = torch.tensor(
                    [
                        any(all(near[name] == row[name] for name in check.attributes) for near in nearest[: check.top])
                        for nearest, row in zip(found, wanted, strict=True)
                    ]
                )
        return distances[:, 0], passed


class AdherenceScore(nn.Module):
    """Running sums of check results."""

    def __init__(self, checks: Sequence[Check]):
        super().__init__()
        self.distance = StreamedMedian()
        self.passed = nn.ModuleDict({check.key: MeanWithInterval() for check in checks})

    def update(self, distances: Tensor, passed: dict[str, Tensor], indices: Sequence[int]) -> None:
        """Add the output of `Reference.answer` for the samples `indices`."""
        self.distance.update(distances)
        for key, values in passed.items():
            self.passed[key].update(values, indices)

    def compute(self) -> dict:
        """Return count, median distance, and shares with their 95% Wilson intervals; skipped checks are omitted."""
        result: dict = {"count": int(self.distance.histogram.sum()), "median_distance": self.distance.compute()}
        for key, metric in self.passed.items():
            if metric.count > 0:
                result[key] = share_of(metric)
        return result


def score(
    reference: Reference, checks: Sequence[Check], pixels: Tensor, wanted: Sequence[dict], leave_out=None
) -> dict:
    """Score images that are all in memory, (B, 3, R, R); see `Reference.answer` and `AdherenceScore.compute`."""
    total = AdherenceScore(checks)
    total.update(*reference.answer(checks, pixels, wanted, leave_out), range(len(wanted)))
    return total.compute()


def thumbnails(images: Tensor, side: int) -> Tensor:
    """Return images (B, 3, H, W) downscaled to `side` pixels and upscaled again."""
    small = F.interpolate(images, (side, side), mode="area")
    return F.interpolate(small, images.shape[-2:], mode="bicubic").clamp(0, 1)


def shift(images: Tensor, pixels: int) -> Tensor:
    """Return images shifted right and down by `pixels`, with replicated borders."""
    return F.pad(images, (pixels, 0, pixels, 0), mode="replicate")[..., : images.shape[-2], : images.shape[-1]]


def add_noise(images: Tensor, strength: float, seed: int) -> Tensor:
    """Return images with Gaussian noise of standard deviation `strength`."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    return (images + strength * noise).clamp(0, 1)


def distortions(images: Tensor, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Yield names of kinds of damage and damaged copies of images (B, 3, H, W) in [0, 1]; units are their pixels."""
    yield "none", images
    for strength in (0.1, 0.25):
        yield f"noise, standard deviation {strength}", add_noise(images, strength, seed)
    for blur in (1.5, 3.0):
        yield f"blur, {blur:g} pixels", gaussian_blur(images, blur)
    for pixels in (2, 4):
        yield f"shift, {pixels} pixels", shift(images, pixels)
    yield "contrast 0.8", 0.5 + 0.8 * (images - 0.5)
    for side in (12, 8, 6, 4):
        yield f"thumbnail, {side} x {side}", thumbnails(images, side)


def measure_feature_space(
    reference: Reference, checks: Sequence[Check], pixels: Tensor, max_rows: int | None, seed: int
) -> dict:
    """Measure what the feature space can tell apart: damaged real images, and real images without their own entry.

    Args:
        reference: the real images.
        checks: the checks to run.
        pixels: the same images, (N, 3, R, R) uint8.
        max_rows: size of a random subset to use; `None` for all.
        seed: for the subset and the noise.
    """
    rows = reference.rows
    drawn = draw_rows(range(len(rows)), max_rows, seed)
    images = pixels[drawn].float() / 255
    space: dict = {"distorted": {}, "own_image_left_out": {}}
    for name, damaged in distortions(images, seed):
        space["distorted"][name] = score(reference, checks, damaged, [rows[i] for i in drawn])
    if "style" not in rows[0]:
        return space
    for style in sorted({row["style"] for row in rows}):
        chosen = torch.tensor(draw_rows([i for i, row in enumerate(rows) if row["style"] == style], max_rows, seed))
        # only the same name in another style is left to be found
        wanted = [{key: value for key, value in rows[i].items() if key != "style"} for i in chosen.tolist()]
        space["own_image_left_out"][style] = score(reference, checks, pixels[chosen], wanted, leave_out=chosen)
    return space
