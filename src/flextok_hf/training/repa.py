"""REPA: aligns hidden states of the decoder with the features of a frozen vision network.

Letters: B batch, H W sides of an image, N patches, D hidden size, F width of the network.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .setup import loading
from .vision import FrozenVision


class LayerTap:
    """Records the outputs of a layer in training mode.

    Args:
        layer: any module.
    """

    def __init__(self, layer: nn.Module):
        self.outputs: list[Tensor] = []
        layer.register_forward_hook(self._keep)

    def _keep(self, layer: nn.Module, inputs: tuple, output: Tensor) -> None:
        if layer.training:
            self.outputs.append(output)

    def clear(self) -> None:
        """Forget earlier outputs, such as those recomputed in a backward pass."""
        self.outputs = []


class FeatureAlignment(nn.Module):
    """Representation alignment (Yu et al., 2024, https://arxiv.org/abs/2410.06940): the features of the clean image
    are predicted from the decoder's states by a small network that is not exported with the model.

    Args:
        network: vision transformer, a folder or Hub id.
        hidden_size: D.
        grid_size: decoder patches per row and per column.
    """

    def __init__(self, network: str, hidden_size: int, grid_size: int):
        super().__init__()
        self.grid_size = grid_size
        with loading("repa_network", network):
            vision = FrozenVision(network)
        self.frozen = {"vision": vision}  # in a dictionary, so that its weights are neither trained nor saved
        width = vision.network.config.hidden_size
        self.projector = nn.Sequential(
            nn.Linear(hidden_size, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width)
        )

    def forward(self, patches: Tensor, pixel_values: Tensor) -> Tensor:
        """Return the mean cosine distance, a scalar: 0 for equal directions, 2 for opposite ones.

        Args:
            patches: hidden states of the decoder, (B, N, D).
            pixel_values: the clean images, (B, 3, H, W) in [-1, 1].
        """
        vision = self.frozen["vision"].to(pixel_values.device)
        with torch.autocast(pixel_values.device.type, enabled=False):
            features = vision.patch_features(pixel_values, self.grid_size)  # (B, N, F)
        return 1 - F.cosine_similarity(self.projector(patches).float(), features, dim=-1).mean()
