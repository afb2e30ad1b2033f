"""How different two pictures look to a frozen vision network."""

import torch
from torch import Tensor, nn
from transformers import AutoModel
from transformers.image_processing_base import ImageProcessingMixin


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class PerceptualDistance(nn.Module):
    """Distance of normalized features at all depths (LPIPS without its learned weights; Zhang et al., 2018,
    https://arxiv.org/abs/1801.03924).

    Args:
        network: a vision model of Transformers with hidden states (ResNet, ConvNeXt, ViT ...), folder or Hub id.
    """

    def __init__(self, network: str):
        super().__init__()
        self.network = AutoModel.from_pretrained(network, dtype=torch.float32).requires_grad_(False).eval()
        try:
            statistics, _ = ImageProcessingMixin.get_image_processor_dict(network)
        except OSError:
            statistics = {}
        mean = torch.tensor(statistics.get("image_mean", IMAGENET_MEAN))
        std = torch.tensor(statistics.get("image_std", IMAGENET_STD))
        # [-1, 1] -> [0, 1] -> what the network was trained on, in one step
        self.register_buffer("shift", (0.5 - mean).view(-1, 1, 1) / std.view(-1, 1, 1), persistent=False)
        self.register_buffer("scale", 0.5 / std.view(-1, 1, 1), persistent=False)

    def forward(self, pictures: Tensor, originals: Tensor) -> Tensor:
        """Mean distance of pictures (B, 3, H, W) in [-1, 1] to their originals, a scalar."""
        inputs = torch.cat([pictures, originals]) * self.scale + self.shift
        outputs = self.network(pixel_values=inputs, output_hidden_states=True)
        distances = []
        for states in outputs.hidden_states:
            channel_axis = 1 if states.ndim == 4 else -1  # (B, C, h, w) of a convolution or (B, L, C) of a transformer
            ours, theirs = nn.functional.normalize(states.float(), dim=channel_axis).chunk(2)
            distances.append((ours - theirs).square().sum(dim=channel_axis).mean())
        return torch.stack(distances).mean()
