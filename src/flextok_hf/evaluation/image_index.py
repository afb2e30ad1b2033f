"""Images -> the most similar real images by color and shape, without learned weights.

Letters: B batch, H W image sides, N reference images, F features. Images are RGB, (B, 3, H, W), in
[0, 1] or uint8.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


FEATURE_RESOLUTION = 48  # side in pixels at which images are compared
COLOR_BLUR, COLOR_STRIDE = 2.0, 2
SHAPE_BLUR, SHAPE_CELL, SHAPE_ORIENTATIONS = 1.0, 8, 8
CHUNK = 256  # reference images processed at a time
SPARE_CANDIDATES = 16


def gaussian_blur(images: Tensor, blur: float) -> Tensor:
    """Blur (B, C, H, W) with a Gaussian of standard deviation `blur` in pixels; borders are replicated."""
    radius = math.ceil(3 * blur)
    weights = torch.exp(-(torch.arange(-radius, radius + 1, dtype=images.dtype) ** 2) / (2 * blur**2))
    weights = (weights / weights.sum()).to(images.device)
    channels = images.shape[1]
    padded = F.pad(images, (radius,) * 4, mode="replicate")
    rows = F.conv2d(padded, weights.view(1, 1, -1, 1).expand(channels, -1, -1, -1), groups=channels)
    return F.conv2d(rows, weights.view(1, 1, 1, -1).expand(channels, -1, -1, -1), groups=channels)


def rgb_to_lab(images: Tensor) -> Tensor:
    """Convert sRGB (B, 3, H, W) in [0, 1] to CIE Lab under D65: L in [0, 100], a and b about [-128, 127]."""
    linear = torch.where(images <= 0.04045, images / 12.92, ((images.clamp(min=0) + 0.055) / 1.055) ** 2.4)
    to_xyz = images.new_tensor(
        [[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]]
    )
    white = to_xyz.sum(dim=1).view(3, 1, 1)
    ratio = torch.einsum("xc,bchw->bxhw", to_xyz, linear) / white
    root = torch.where(ratio > 0.008856, ratio.clamp(min=1e-6) ** (1 / 3), 7.787 * ratio + 16 / 116)
    x, y, z = root.unbind(dim=1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=1)


def oriented_gradients(images: Tensor, cell: int, orientations: int = SHAPE_ORIENTATIONS) -> Tensor:
    """Return histograms of oriented gradients (Dalal and Triggs, 2005, doi:10.1109/CVPR.2005.177).

    Gradients are taken from the color channel where they are strongest and split between the two nearest orientations;
    cells are normalized in blocks of 2 x 2 (clipped at 0.2, then normalized again).

    Args:
        images: (B, 3, H, W) in [0, 1].
        cell: side of a cell in pixels.
        orientations: number of bins over 180 degrees.

    Returns:
        (B, F).
    """
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
    dx = (padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]) / 2
    dy = (padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]) / 2
    strongest = (dx**2 + dy**2).argmax(dim=1, keepdim=True)  # (B, 1, H, W)
    dx, dy = dx.gather(1, strongest), dy.gather(1, strongest)
    position = torch.atan2(dy, dx).remainder(math.pi) * orientations / math.pi  # (B, 1, H, W) in [0, orientations]
    centers = torch.arange(orientations, device=images.device).view(1, -1, 1, 1)
    offset = (position - centers).remainder(orientations)
    share = (1 - torch.minimum(offset, orientations - offset)).clamp(min=0)  # (B, orientations, H, W)
    cells = F.avg_pool2d(share * torch.hypot(dx, dy), cell)
    blocks = F.unfold(cells, kernel_size=2)  # (B, 4 * orientations, blocks)
    blocks = F.normalize(blocks, dim=1, eps=1e-3).clamp(max=0.2)
    return F.normalize(blocks, dim=1, eps=1e-3).flatten(1)


def color_features(images: Tensor) -> Tensor:
    """Return the layout of colors, (B, F): Lab, blurred so that small shifts do not matter, every other pixel."""
    return gaussian_blur(rgb_to_lab(images), COLOR_BLUR)[:, :, ::COLOR_STRIDE, ::COLOR_STRIDE].flatten(1)


def shape_features(images: Tensor) -> Tensor:
    """Return outlines regardless of color, (B, F): oriented gradients after a light blur against noise."""
    return oriented_gradients(gaussian_blur(images, SHAPE_BLUR), SHAPE_CELL)


class ImageIndex(nn.Module):
    """Reference images, searched by color and shape together.

    Color and shape have equal weight and are scaled so that the mean squared distance between two reference images
    is 1: a distance of 0 means the same image, and 1 two unrelated images.
    `adherence.measure_feature_space` measures what this space can and cannot tell apart.

    Args:
        images: (N, 3, H, W), uint8 or in [0, 1], N at least 2.

    Raises:
        ValueError: if there are fewer than 2 images, or all are identical.
    """

    BLOCKS = (color_features, shape_features)

    def __init__(self, images: Tensor):
        super().__init__()
        if len(images) < 2:
            raise ValueError(f"`images` must hold at least 2 reference images, got {len(images)}.")
        raw = [torch.cat([block(self._resize(part)) for part in images.split(CHUNK)]) for block in self.BLOCKS]
        # Mean squared distance between two different rows = 2 * total variance (with N - 1 in the denominator).
        self.scales = [(2 * block.var(dim=0).sum()).sqrt().item() * math.sqrt(len(raw)) for block in raw]
        if min(self.scales) == 0:
            raise ValueError("All `images` are the same; an index needs different images.")
        features = torch.cat([block / scale for block, scale in zip(raw, self.scales)], dim=1)
        self.register_buffer("features", features, persistent=False)

    @staticmethod
    def _resize(images: Tensor) -> Tensor:
        images = images.float() / 255 if images.dtype == torch.uint8 else images.float()
        if images.shape[-2:] == (FEATURE_RESOLUTION, FEATURE_RESOLUTION):
            return images
        size = (FEATURE_RESOLUTION, FEATURE_RESOLUTION)
        return F.interpolate(images, size, mode="bicubic", antialias=True).clamp(0, 1)

    def describe(self, images: Tensor) -> Tensor:
        """Return features (B, F) of images (B, 3, H, W); distances are Euclidean in these features."""
        resized = self._resize(images)
        return torch.cat([block(resized) / scale for block, scale in zip(self.BLOCKS, self.scales)], dim=1)

    def search(self, images: Tensor, count: int = 5, leave_out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Find the reference images most like each image.

        Args:
            images: (B, 3, H, W).
            count: neighbors per image, at most N.
            leave_out: per image, the index of a reference image to exclude, (B,).

        Returns:
            Distances (B, count), nearest first, and the indices of the reference images (B, count).
        """
        described = self.describe(images)  # (B, F)
        # The matmul form is fast but inaccurate for near-identical images: it only selects candidates.
        distances = torch.cdist(described, self.features, compute_mode="use_mm_for_euclid_dist")
        if leave_out is not None:
            distances.scatter_(1, leave_out.view(-1, 1), math.inf)
        num_candidates = min(count + SPARE_CANDIDATES, len(self.features) - (leave_out is not None))
        candidates = distances.topk(num_candidates, dim=1, largest=False).indices
        exact = torch.stack([(row - self.features[near]).norm(dim=1) for row, near in zip(described, candidates)])
        nearest = exact.topk(count, dim=1, largest=False)
        return nearest.values, candidates.gather(1, nearest.indices)

    def distance_between(self, images: Tensor, originals: Tensor) -> Tensor:
        """Return the distance of each image (B, 3, H, W) to its original, (B,)."""
        return (self.describe(images) - self.describe(originals)).norm(dim=1)
