"""Perceptual distance between images, from a frozen vision network."""

import torch
from torch import Tensor, nn

from .vision import FrozenVision


class PerceptualDistance(FrozenVision):
    """Distance of normalized features at all depths (LPIPS without its learned weights; Zhang et al., 2018,
    https://arxiv.org/abs/1801.03924), for a vision model with hidden states (ResNet, ConvNeXt, ViT ...).
    """

    def forward(self, images: Tensor, originals: Tensor) -> Tensor:
        """Return the mean distance of images (B, 3, H, W) in [-1, 1] to their originals, a scalar."""
        inputs = self.normalize(torch.cat([images, originals]))
        outputs = self.network(pixel_values=inputs, output_hidden_states=True)
        distances = []
        for states in outputs.hidden_states:
            channel_axis = 1 if states.ndim == 4 else -1  # (B, C, h, w) of a convolution or (B, L, C) of a transformer
            features, targets = nn.functional.normalize(states.float(), dim=channel_axis).chunk(2)
            distances.append((features - targets).square().sum(dim=channel_axis).mean())
        return torch.stack(distances).mean()
