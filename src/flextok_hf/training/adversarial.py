"""Patch discriminator that sharpens a VAE's reconstructions.

VAE and discriminator share one optimizer and one backward pass: the generator loss treats the discriminator's weights
as constants, the discriminator loss the reconstructions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call


MAX_ADAPTIVE_WEIGHT = 1e4


class PatchDiscriminator(nn.Module):
    """Tells real from reconstructed image patches (PatchGAN; Isola et al., 2017, https://arxiv.org/abs/1611.07004).

    Uses group instead of batch normalization to keep the samples of a batch independent.
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
        """Return patch scores (B, 1, rows, columns) of images (B, 3, H, W) in [-1, 1]; positive means real."""
        return self.layers(pixel_values)


def generator_loss(discriminator: PatchDiscriminator, fake: Tensor) -> Tensor:
    """Return a loss that is low if `fake` (B, 3, H, W) passes for real; the discriminator gets no gradient."""
    constants = {name: weight.detach() for name, weight in discriminator.named_parameters()}
    return -functional_call(discriminator, constants, fake).float().mean()


def discriminator_loss(discriminator: PatchDiscriminator, real: Tensor, fake: Tensor) -> Tensor:
    """Return the hinge loss (Lim and Ye, 2017, arXiv 1705.02894); `fake` must be detached."""
    real_scores, fake_scores = discriminator(torch.cat([real, fake])).float().chunk(2)
    return 0.5 * (F.relu(1 - real_scores).mean() + F.relu(1 + fake_scores).mean())


def adaptive_weight(reconstruction_loss: Tensor, adversarial_loss: Tensor, last_weight: Tensor) -> Tensor:
    """Balance two losses by their gradients at the last layer (Esser et al., 2021, arXiv 2012.09841, equation 7)."""
    target, *_ = torch.autograd.grad(reconstruction_loss, last_weight, retain_graph=True)
    actual, *_ = torch.autograd.grad(adversarial_loss, last_weight, retain_graph=True)
    return (target.norm() / (actual.norm() + 1e-6)).clamp(max=MAX_ADAPTIVE_WEIGHT).detach()
