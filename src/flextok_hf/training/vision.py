"""Frozen vision networks from Transformers, applied to our images.

Letters: B batch, H W sides of an image, N patches, F width of the network.
"""

import inspect

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel

from ..utils.vision_networks import read_preprocessing


class FrozenVision(nn.Module):
    """A frozen network with the normalization that it expects.

    Args:
        name: folder or Hub id.
    """

    def __init__(self, name: str):
        super().__init__()
        self.name = name
        self.network = AutoModel.from_pretrained(name, dtype=torch.float32).requires_grad_(False).eval()
        _, mean, std = read_preprocessing(name)
        # [-1, 1] -> [0, 1] -> normalization of the network, in one step
        self.register_buffer("shift", (0.5 - mean) / std, persistent=False)
        self.register_buffer("scale", 0.5 / std, persistent=False)

    def normalize(self, pixel_values: Tensor) -> Tensor:
        """Turn images (B, 3, H, W) in [-1, 1] into network inputs of the same shape."""
        return pixel_values * self.scale + self.shift

    @torch.no_grad()
    def patch_features(self, pixel_values: Tensor, grid_size: int) -> Tensor:
        """Return the last hidden states of a vision transformer, one per grid cell.

        Args:
            pixel_values: (B, 3, H, W) in [-1, 1]; resized so that the network's patches match the grid cells.
            grid_size: cells per row and per column.

        Returns:
            (B, N, F), row by row.

        Raises:
            ValueError: the network is not a vision transformer.
        """
        patch_size = getattr(self.network.config, "patch_size", None)
        if not isinstance(patch_size, int):
            raise ValueError(f"`repa_network` {self.name!r} has no patches: use a vision transformer such as DINOv2.")
        side = grid_size * patch_size
        resized = F.interpolate(pixel_values, (side, side), mode="bicubic", antialias=True)
        takes_any_size = "interpolate_pos_encoding" in inspect.signature(self.network.forward).parameters
        options = {"interpolate_pos_encoding": True} if takes_any_size else {}
        states = self.network(pixel_values=self.normalize(resized), **options).last_hidden_state
        return states[:, states.shape[1] - grid_size**2 :]  # class and register tokens come first
