"""Frozen vision networks of Transformers, fed with our pictures.

Letters: B batch, H W sides of a picture, N patches, F width of the network.
"""

import inspect

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel
from transformers.image_processing_base import ImageProcessingMixin


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class FrozenVision(nn.Module):
    """A network that is not trained, and the normalization that it expects.

    Args:
        name: folder or Hub id.
    """

    def __init__(self, name: str):
        super().__init__()
        self.name = name
        self.network = AutoModel.from_pretrained(name, dtype=torch.float32).requires_grad_(False).eval()
        try:
            statistics, _ = ImageProcessingMixin.get_image_processor_dict(name)
        except OSError:
            statistics = {}
        mean = torch.tensor(statistics.get("image_mean", IMAGENET_MEAN))
        std = torch.tensor(statistics.get("image_std", IMAGENET_STD))
        # [-1, 1] -> [0, 1] -> what the network was trained on, in one step
        self.register_buffer("shift", (0.5 - mean).view(-1, 1, 1) / std.view(-1, 1, 1), persistent=False)
        self.register_buffer("scale", 0.5 / std.view(-1, 1, 1), persistent=False)

    def normalize(self, pixel_values: Tensor) -> Tensor:
        """Turn pictures (B, 3, H, W) in [-1, 1] into the network's inputs of the same shape."""
        return pixel_values * self.scale + self.shift

    @torch.no_grad()
    def patch_features(self, pixel_values: Tensor, grid_size: int) -> Tensor:
        """Describe pictures by the last states of a vision transformer, one for each field of a grid.

        Args:
            pixel_values: (B, 3, H, W) in [-1, 1]; resized, so that the network's patches are the fields of the grid.
            grid_size: fields in a row and in a column.

        Returns:
            (B, N, F), row by row.

        Raises:
            ValueError: if the network is no vision transformer.
        """
        patch_size = getattr(self.network.config, "patch_size", None)
        if not isinstance(patch_size, int):
            raise ValueError(f"`repa_network` {self.name!r} has no patches: name a vision transformer such as DINOv2.")
        side = grid_size * patch_size
        resized = F.interpolate(pixel_values, (side, side), mode="bicubic", antialias=True)
        takes_any_size = "interpolate_pos_encoding" in inspect.signature(self.network.forward).parameters
        options = {"interpolate_pos_encoding": True} if takes_any_size else {}
        states = self.network(pixel_values=self.normalize(resized), **options).last_hidden_state
        return states[:, states.shape[1] - grid_size**2 :]  # class and register tokens come first
