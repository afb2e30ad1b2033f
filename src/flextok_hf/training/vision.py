"""Frozen vision networks of Transformers, fed with our images.

Letters: B batch, H W sides of an image, N patches, F width of the network.
"""

import inspect

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel

from ..utils.vision_networks import read_preprocessing


class FrozenVision(nn.Module):
    """A network that is not trained, and the normalization that it expects.

    Args:
        name: folder or Hub id.
    """

    def __init__(self, name: str):
        super().__init__()
        self.name = name
        self.network = AutoModel.from_pretrained(name, dtype=torch.float32).requires_grad_(False).eval()
        expected = read_preprocessing(name)
        # [-1, 1] -> [0, 1] -> what the network was trained on, in one step
        self.register_buffer("shift", (0.5 - expected.mean) / expected.std, persistent=False)
        self.register_buffer("scale", 0.5 / expected.std, persistent=False)

    def normalize(self, pixel_values: Tensor) -> Tensor:
        """Turn images (B, 3, H, W) in [-1, 1] into the network's inputs of the same shape."""
        return pixel_values * self.scale + self.shift

    @torch.no_grad()
    def patch_features(self, pixel_values: Tensor, grid_size: int) -> Tensor:
        """Describe images by the last states of a vision transformer, one for each field of a grid.

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
