"""Confidence intervals (95%) from running sums, which do not depend on batches or processes.

A bootstrap normally needs all samples at hand; here each resample gives every sample a Poisson weight that depends on
its index alone (Chamandy et al., 2012, "Estimating Uncertainty for Massive Data Streams"). For figures that are not
means, a jackknife leaves out one of `NUM_GROUPS` groups of samples at a time: a bootstrap would repeat samples, which
increases Frechet distances.

Letters: B batch, R resamples.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


NUM_RESAMPLES = 1000
NUM_GROUPS = 8
STUDENT_T = 2.364624  # two-sided 95% quantile with NUM_GROUPS - 1 degrees of freedom


def poisson_weights(indices: Sequence[int]) -> Tensor:
    """Return how often each resample draws each sample, (B, R), which depends on the index of the sample alone."""
    ones = torch.ones(NUM_RESAMPLES)
    draws = [torch.poisson(ones, torch.Generator().manual_seed(index)) for index in indices]
    return torch.stack(draws).double()


def jackknife(statistic: Callable[[int | None], float]) -> dict[str, float]:
    """Return a statistic of all samples, with the 95% interval from leaving out one group at a time.

    Args:
        statistic: takes the group to leave out, or `None` to keep all.

    Returns:
        Value, low and high; NaN bounds if the statistic is undefined without one of the groups.
    """
    value = statistic(None)
    parts = torch.tensor([statistic(group) for group in range(NUM_GROUPS)], dtype=torch.float64)
    error = math.sqrt((NUM_GROUPS - 1) / NUM_GROUPS * (parts - parts.mean()).square().sum().item())
    return {"value": value, "low": value - STUDENT_T * error, "high": value + STUDENT_T * error}


def percentile_interval(resampled: Tensor) -> tuple[float, float]:
    """Return the 2.5th and 97.5th percentiles of resampled values, ignoring NaN."""
    low, high = resampled[~resampled.isnan()].quantile(torch.tensor([0.025, 0.975], dtype=resampled.dtype)).tolist()
    return low, high


def wilson_interval(successes: float, trials: float, z: float = 1.959964) -> tuple[float, float]:
    """Return the Wilson score interval of a share (Wilson, 1927, doi:10.2307/2276774); 95% by default."""
    if not 0 <= successes <= trials or trials == 0:
        raise ValueError(f"`successes` must lie in [0, `trials`], and `trials` above 0, got {successes} of {trials}.")
    share = successes / trials
    center = share + z**2 / (2 * trials)
    half_width = z * math.sqrt(share * (1 - share) / trials + z**2 / (4 * trials**2))
    low, high = ((center + sign * half_width) / (1 + z**2 / trials) for sign in (-1, 1))
    return max(0.0, low), min(1.0, high)
