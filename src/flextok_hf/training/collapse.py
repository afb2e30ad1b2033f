"""Penalties against code collapse, computed on features over a batch, and a metric to detect it."""

import torch
import torch.nn.functional as F
from torch import Tensor


def spread_penalty(features: Tensor) -> Tensor:
    """Push each feature to mean 0 and standard deviation 1 or more over the batch; plain FSQ collapses without it.

    The batch is the micro-batch of all processes.

    Args:
        features: features before quantization, (B, K, Q).

    Returns:
        Mean over K and Q, a scalar.
    """
    mean, _, variance = moments(features.float())
    std = variance.clamp(min=1e-12).sqrt()  # the gradient of the root is infinite at 0
    return (mean.square() + F.relu(1 - std).square()).mean()


def correlation_penalty(features: Tensor) -> Tensor:
    """Decorrelate features: the covariance term of VICReg (https://arxiv.org/abs/2105.04906), scaled.

    Without it, all features start by encoding what images differ in most, such as their background. The batch is the
    micro-batch of all processes.

    Args:
        features: features before quantization, (B, K, Q); a single one gives 0.

    Returns:
        Mean of the squared correlations between different features of all tokens, from 0 to 1, a scalar.
    """
    _, centered, variance = moments(features.float().flatten(1))  # (B, K * Q)
    centered = centered / variance.clamp(min=1e-6).sqrt()
    correlation = mean_over_processes(centered.T @ centered / len(centered))  # (K * Q, K * Q)
    others = correlation - torch.diag(correlation.diagonal())
    return others.square().sum() / max(1, correlation.numel() - len(correlation))


def moments(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean, centered values and variance of features (B, ...) over the batch of all processes."""
    mean = mean_over_processes(features.mean(dim=0))
    centered = features - mean
    return mean, centered, mean_over_processes(centered.square().mean(dim=0))


class SumOverProcesses(torch.autograd.Function):
    """Sums a tensor over all processes; the gradient is summed in the same way."""

    @staticmethod
    def forward(context, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(context, gradient: Tensor) -> Tensor:
        return SumOverProcesses.forward(context, gradient)


def mean_over_processes(tensor: Tensor) -> Tensor:
    """Average a tensor over all processes, differentiably; a no-op outside distributed training."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return tensor
    return SumOverProcesses.apply(tensor) / torch.distributed.get_world_size()


def count_distinct(token_ids: Tensor) -> Tensor:
    """Return the mean number of distinct ids per position of (B, K), a scalar: 1 means collapsed codes."""
    ordered = token_ids.sort(dim=0).values
    return 1 + (ordered[1:] != ordered[:-1]).sum(dim=0).float().mean()
