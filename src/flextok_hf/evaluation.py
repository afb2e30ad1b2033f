"""Measure pictures: is it the one that was asked for, how close is it to the original, how sure are we.

Nothing here needs downloaded weights. Letters: B batch, H W picture sides, N reference pictures, F features.
All pictures are RGB tensors (B, 3, H, W) in [0, 1].
"""

import hashlib
import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn


FEATURE_RESOLUTION = 48  # side in pixels at which pictures are compared
COLOR_BLUR, COLOR_STRIDE = 2.0, 2
SHAPE_BLUR, SHAPE_CELL, SHAPE_ORIENTATIONS = 1.0, 8, 8


def stack_pictures(pictures: Sequence[Image.Image]) -> Tensor:
    """Return PIL pictures of one size as (B, 3, H, W) in [0, 1].

    Raises:
        ValueError: if there is none, or their sizes differ.
    """
    sizes = {picture.size for picture in pictures}
    if len(sizes) != 1:
        raise ValueError(f"`pictures` must be of one size, got {sorted(sizes) or 'no picture'}; resize them first.")
    arrays = [np.asarray(picture.convert("RGB"), dtype=np.float32) / 255 for picture in pictures]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


def gaussian_blur(pictures: Tensor, blur: float) -> Tensor:
    """Blur (B, C, H, W) with a Gaussian of standard deviation `blur` in pixels; borders repeat their last pixel."""
    radius = math.ceil(3 * blur)
    weights = torch.exp(-(torch.arange(-radius, radius + 1, dtype=pictures.dtype) ** 2) / (2 * blur**2))
    weights = (weights / weights.sum()).to(pictures.device)
    channels = pictures.shape[1]
    padded = F.pad(pictures, (radius,) * 4, mode="replicate")
    rows = F.conv2d(padded, weights.view(1, 1, -1, 1).expand(channels, -1, -1, -1), groups=channels)
    return F.conv2d(rows, weights.view(1, 1, 1, -1).expand(channels, -1, -1, -1), groups=channels)


def rgb_to_lab(pictures: Tensor) -> Tensor:
    """Convert sRGB (B, 3, H, W) in [0, 1] to CIE Lab under D65: L in [0, 100], a and b about [-128, 127]."""
    linear = torch.where(pictures <= 0.04045, pictures / 12.92, ((pictures.clamp(min=0) + 0.055) / 1.055) ** 2.4)
    to_xyz = pictures.new_tensor(
        [[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]]
    )
    white = to_xyz.sum(dim=1).view(3, 1, 1)
    ratio = torch.einsum("xc,bchw->bxhw", to_xyz, linear) / white
    root = torch.where(ratio > 0.008856, ratio.clamp(min=1e-6) ** (1 / 3), 7.787 * ratio + 16 / 116)
    x, y, z = root.unbind(dim=1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=1)


def oriented_gradients(pictures: Tensor, cell: int, orientations: int = SHAPE_ORIENTATIONS) -> Tensor:
    """Describe shapes by histograms of oriented gradients (Dalal and Triggs, 2005, doi:10.1109/CVPR.2005.177).

    Gradients are taken of the color channel where they are strongest; a gradient is shared between its two nearest
    orientations; cells are normalized in blocks of 2 x 2 (clipped at 0.2, then again).

    Args:
        pictures: (B, 3, H, W) in [0, 1].
        cell: side of a cell in pixels.
        orientations: number of directions over half a turn.

    Returns:
        (B, F).
    """
    padded = F.pad(pictures, (1, 1, 1, 1), mode="replicate")
    dx = (padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]) / 2
    dy = (padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]) / 2
    strongest = (dx**2 + dy**2).argmax(dim=1, keepdim=True)  # (B, 1, H, W)
    dx, dy = dx.gather(1, strongest), dy.gather(1, strongest)
    position = torch.atan2(dy, dx).remainder(math.pi) * orientations / math.pi  # (B, 1, H, W) in [0, orientations]
    centers = torch.arange(orientations, device=pictures.device).view(1, -1, 1, 1)
    offset = (position - centers).remainder(orientations)
    share = (1 - torch.minimum(offset, orientations - offset)).clamp(min=0)  # (B, orientations, H, W)
    cells = F.avg_pool2d(share * torch.hypot(dx, dy), cell)
    blocks = F.unfold(cells, kernel_size=2)  # (B, 4 * orientations, blocks)
    blocks = F.normalize(blocks, dim=1, eps=1e-3).clamp(max=0.2)
    return F.normalize(blocks, dim=1, eps=1e-3).flatten(1)


def color_features(pictures: Tensor) -> Tensor:
    """Describe where which color is: Lab, blurred so that small shifts do not matter, every other pixel. (B, F)."""
    return gaussian_blur(rgb_to_lab(pictures), COLOR_BLUR)[:, :, ::COLOR_STRIDE, ::COLOR_STRIDE].flatten(1)


def shape_features(pictures: Tensor) -> Tensor:
    """Describe outlines whatever their color: oriented gradients after a light blur against noise. (B, F)."""
    return oriented_gradients(gaussian_blur(pictures, SHAPE_BLUR), SHAPE_CELL)


class PictureIndex(nn.Module):
    """Reference pictures with names, searched by color and shape together.

    Color and shape count the same: each is scaled so that the mean squared distance between two reference pictures
    is 1. Distances are thus in units of "two unrelated pictures": 0 is the same picture, 1 is no resemblance.
    `scripts/evaluate_adherence.py` measures what this space can and cannot tell apart.

    Args:
        pictures: (N, 3, H, W) in [0, 1], N at least 2.
        names: N names.
        styles: N styles.
    """

    BLOCKS = (color_features, shape_features)

    def __init__(self, pictures: Tensor, names: Sequence[str], styles: Sequence[str]):
        super().__init__()
        if not len(pictures) == len(names) == len(styles) or len(names) < 2:
            raise ValueError(
                f"`pictures`, `names` and `styles` must have one entry per picture and at least 2, got"
                f" {len(pictures)}, {len(names)} and {len(styles)}."
            )
        self.names, self.styles = list(names), list(styles)
        raw = [block(self._resize(pictures)) for block in self.BLOCKS]
        # Mean squared distance between two different rows = 2 * total variance (with N - 1 in the denominator).
        self.scales = [(2 * block.var(dim=0).sum()).sqrt().item() * math.sqrt(len(raw)) for block in raw]
        if min(self.scales) == 0:
            raise ValueError("All `pictures` are the same; an index needs different ones.")
        self.register_buffer("features", self.describe(pictures), persistent=False)

    @staticmethod
    def _resize(pictures: Tensor) -> Tensor:
        if pictures.shape[-2:] == (FEATURE_RESOLUTION, FEATURE_RESOLUTION):
            return pictures
        size = (FEATURE_RESOLUTION, FEATURE_RESOLUTION)
        return F.interpolate(pictures, size, mode="bicubic", antialias=True).clamp(0, 1)

    def describe(self, pictures: Tensor) -> Tensor:
        """Return the features of pictures (B, 3, H, W) in [0, 1] as (B, F); their Euclidean distances are ours."""
        resized = self._resize(pictures.float())
        return torch.cat([block(resized) / scale for block, scale in zip(self.BLOCKS, self.scales)], dim=1)

    def search(self, pictures: Tensor, count: int = 5, leave_out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Find the reference pictures most like each picture.

        Args:
            pictures: (B, 3, H, W) in [0, 1].
            count: neighbors per picture.
            leave_out: per picture, the index of one reference picture that must not be found, (B,).

        Returns:
            Distances (B, count), nearest first, and indices into `names` and `styles` (B, count).
        """
        # The direct formula: the faster matrix product cancels for near-identical pictures.
        distances = torch.cdist(self.describe(pictures), self.features, compute_mode="donot_use_mm_for_euclid_dist")
        if leave_out is not None:
            distances.scatter_(1, leave_out.view(-1, 1), math.inf)
        nearest = distances.topk(count, dim=1, largest=False)
        return nearest.values, nearest.indices


def distance_between(index: PictureIndex, pictures: Tensor, originals: Tensor) -> Tensor:
    """Return the distance of each picture to its original in the space of `index`, (B,)."""
    return (index.describe(pictures) - index.describe(originals)).norm(dim=1)


def peak_signal_to_noise(pictures: Tensor, originals: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio of each picture in dB, (B,), for a peak of 1."""
    return -10 * (pictures - originals).square().flatten(1).mean(dim=1).clamp(min=1e-10).log10()


def structural_similarity(pictures: Tensor, originals: Tensor) -> Tensor:
    """Return the structural similarity of each picture, (B,), 1 for equal pictures.

    Wang et al., 2004 (doi:10.1109/TIP.2003.819861), with its Gaussian window of 11 x 11 pixels (standard deviation
    1.5), per color channel, over the pixels whose window lies inside the picture.
    """
    position = torch.arange(-5, 6, dtype=pictures.dtype, device=pictures.device)
    window = torch.exp(-(position**2) / (2 * 1.5**2))
    window = torch.outer(window, window) / window.sum() ** 2
    kernel = window.expand(3, 1, -1, -1)

    def local_mean(values: Tensor) -> Tensor:
        return F.conv2d(values, kernel, groups=3)

    mean_x, mean_y = local_mean(pictures), local_mean(originals)
    variance_x = local_mean(pictures**2) - mean_x**2
    variance_y = local_mean(originals**2) - mean_y**2
    covariance = local_mean(pictures * originals) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    similarity = similarity / ((mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2))
    return similarity.flatten(1).mean(dim=1)


def wilson_interval(successes: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """Return the score interval of a share (Wilson, 1927, doi:10.2307/2276774); 95% by default."""
    if not 0 <= successes <= trials or trials == 0:
        raise ValueError(f"`successes` must lie in [0, `trials`] and `trials` above 0, got {successes} of {trials}.")
    share = successes / trials
    center = share + z**2 / (2 * trials)
    half_width = z * math.sqrt(share * (1 - share) / trials + z**2 / (4 * trials**2))
    low, high = ((center + sign * half_width) / (1 + z**2 / trials) for sign in (-1, 1))
    return max(0.0, low), min(1.0, high)


def bootstrap_interval(values: Sequence[float], seed: int = 0, num_resamples: int = 2000) -> tuple[float, float]:
    """Return the 95% percentile interval of the mean of `values` under resampling (Efron, 1979)."""
    numbers = np.asarray(values, dtype=np.float64)
    picks = np.random.default_rng(seed).integers(0, len(numbers), size=(num_resamples, len(numbers)))
    low, high = np.percentile(numbers[picks].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


def weights_hash(modules: dict[str, nn.Module]) -> str:
    """Return a SHA-256 over the names, types and bytes of all parameters: the same weights, the same hash."""
    digest = hashlib.sha256()
    for component in sorted(modules):
        for name, tensor in sorted(modules[component].state_dict().items()):
            digest.update(f"{component}.{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
