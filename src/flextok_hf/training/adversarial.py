"""A critic of patches that sharpens a VAE's reconstructions.

Both players learn in one backward pass with one optimizer: to the generator's loss the critic's weights are constants,
to the critic's loss the reconstructions are.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call


MAX_ADAPTIVE_WEIGHT = 1e4


class PatchDiscriminator(nn.Module):
    """Tells real from reconstructed patches of images (PatchGAN; Isola et al., 2017, https://arxiv.org/abs/1611.07004).

    Group normalization instead of batch normalization keeps the samples of a batch independent.
    """

    def __init__(self, in_channels: int = 3, hidden_size: int = 64, num_layers: int = 3):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(in_channels, hidden_size, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        width = hidden_size
        for layer in range(1, num_layers + 1):
            is_last = layer == num_layers
            wider = hidden_size * min(2**layer, 8)
            layers += [
                nn.Conv2d(width, wider, 4, stride=1 if is_last else 2, padding=1, bias=False),
                nn.GroupNorm(hidden_size // 4, wider),
                nn.LeakyReLU(0.2),
            ]
            width = wider
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, 1, 4, padding=1))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Score the patches of images (B, 3, H, W) in [-1, 1]: above 0 is real, (B, 1, rows, columns)."""
        return self.layers(pixel_values)


def generator_loss(discriminator: PatchDiscriminator, fake: Tensor) -> Tensor:
    """Small when the critic takes `fake` (B, 3, H, W) for real; no gradient reaches the critic."""
    constants = {name: weight.detach() for name, weight in discriminator.named_parameters()}
    return -functional_call(discriminator, constants, fake).float().mean()


def discriminator_loss(discriminator: PatchDiscriminator, real: Tensor, fake: Tensor) -> Tensor:
    """Hinge loss of the critic (Lim and Ye, 2017, arXiv 1705.02894); `fake` comes without a gradient."""
    on_real, on_fake = discriminator(torch.cat([real, fake])).float().chunk(2)
    return 0.5 * (F.relu(1 - on_real).mean() + F.relu(1 + on_fake).mean())


def adaptive_weight(reconstruction_loss: Tensor, fooling_loss: Tensor, last_weight: Tensor) -> Tensor:
    """Balance two losses by their gradients at the last layer (Esser et al., 2021, arXiv 2012.09841, equation 7)."""
    wanted, *_ = torch.autograd.grad(reconstruction_loss, last_weight, retain_graph=True)
    found, *_ = torch.autograd.grad(fooling_loss, last_weight, retain_graph=True)
    return (wanted.norm() / (found.norm() + 1e-6)).clamp(max=MAX_ADAPTIVE_WEIGHT).detach()
