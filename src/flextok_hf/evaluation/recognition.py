"""Is an image still recognizable? Its original must be the nearest of many to its reconstruction.

Two spaces that need no learned weights: small color thumbnails, which blurred blobs of color already pass, and maps of
edges, which ask for shapes in their places. Letters: B batch, N candidates, H W image sides, F features.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .image_index import CHUNK


THUMBNAIL_SIDE, EDGE_SIDE = 16, 32
LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R BT.601


def color_thumbnails(images: Tensor) -> Tensor:
    """Return the images (B, 3, H, W) in [0, 1] averaged over areas to 16 x 16 colors, (B, F)."""
    return F.adaptive_avg_pool2d(images, THUMBNAIL_SIDE).flatten(1)


def edge_maps(images: Tensor) -> Tensor:
    """Return horizontal and vertical luminance gradients at 32 x 32, (B, F), of length 1 or all 0 without edges.

    The length is normalized because a reconstruction may have less contrast than its original, and flat originals
    would otherwise be near to everything.
    """
    luminance = torch.einsum("c,bchw->bhw", images.new_tensor(LUMINANCE), images).unsqueeze(1)
    padded = F.pad(F.adaptive_avg_pool2d(luminance, EDGE_SIDE), (1, 1, 1, 1), mode="replicate")
    across = padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]
    down = padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]
    maps = torch.cat([across, down], dim=1).flatten(1)
    return torch.where(maps.abs().amax(dim=1, keepdim=True) > 1e-5, F.normalize(maps, dim=1), torch.zeros_like(maps))


SPACES: dict[str, Callable[[Tensor], Tensor]] = {"thumbnail": color_thumbnails, "edges": edge_maps}


class Candidates:
    """Originals among which an image must find its own.

    Args:
        images: (N, 3, H, W) uint8.
        rows: the row of each image in the data.
    """

    def __init__(self, images: Tensor, rows: Sequence[int]):
        self.positions = {row: position for position, row in enumerate(rows)}
        self.features = {
            name: torch.cat([describe(part.float() / 255) for part in images.split(CHUNK)])
            for name, describe in SPACES.items()
        }

    def __len__(self) -> int:
        return len(self.positions)

    def recognize(self, images: Tensor, rows: Sequence[int]) -> dict[str, Tensor]:
        """Return per space whether the original is nearer to each image than all other candidates are.

        Args:
            images: (B, 3, H, W) in [0, 1].
            rows: the row of each image's original, one of the candidates.

        Returns:
            (B,) bool by name of the space. An image equally near to its original and to another one is not recognized.
        """
        own = torch.tensor([self.positions[row] for row in rows]).unsqueeze(1)
        found = {}
        for name, describe in SPACES.items():
            described = describe(images)
            distances = torch.stack([(row - self.features[name]).square().sum(dim=1) for row in described])  # (B, N)
            others = distances.scatter(1, own, torch.inf).amin(dim=1)
            found[name] = distances.gather(1, own).squeeze(1) < others
        return found
