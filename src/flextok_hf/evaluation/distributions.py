"""How similar two sets of images are: Frechet distance, Inception-style score, precision and recall, as running sums.

Letters: B batch, D features, C classes, G groups, M samples kept.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from .accumulators import Accumulator
from .intervals import NUM_GROUPS, jackknife


RESERVOIR_SIZE = 10_000
NUM_NEIGHBORS = 3


class FeatureMoments(Accumulator):
    """First and second moments of features, for the Frechet distance."""

    def __init__(self, num_features: int):
        super().__init__()
        self.add_sum("counts", NUM_GROUPS)
        self.add_sum("sums", NUM_GROUPS, num_features)
        self.add_sum("products", NUM_GROUPS, num_features, num_features)

    def update(self, features: Tensor, indices: Sequence[int]) -> None:
        """Add features (B, D) of the samples `indices`."""
        features = features.detach().cpu().double()
        groups = torch.tensor(indices) % NUM_GROUPS
        for group in groups.unique().tolist():
            part = features[groups == group]
            self.counts[group] += len(part)
            self.sums[group] += part.sum(dim=0)
            self.products[group] += part.T @ part

    def without_group(self, group: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return count, sum (D,) and sum of products (D, D) of the samples outside a group; `None` for all."""
        kept = torch.ones(NUM_GROUPS, dtype=torch.float64)
        if group is not None:
            kept[group] = 0
        return kept @ self.counts, kept @ self.sums, torch.einsum("g,gde->de", kept, self.products)

    def compute(self) -> int:
        """Return the number of samples."""
        return int(self.counts.sum())


def frechet_distance(real: FeatureMoments, fake: FeatureMoments, is_paired: bool) -> dict[str, float]:
    """Return the Frechet distance of two sets of features (Heusel et al., 2017, https://arxiv.org/abs/1706.08500).

    Args:
        real: moments of the reference set.
        fake: moments of the images to evaluate.
        is_paired: each fake sample was made from the real sample of the same index; the jackknife leaves out both.

    Returns:
        Value, low and high.

    Raises:
        ValueError: if a set has no more samples than features, which makes its covariance singular.
    """
    num_features = real.sums.shape[1]
    check_sample_count(min(real.compute(), fake.compute()), num_features)

    def distance(group: int | None) -> float:
        metric = FrechetInceptionDistance(PrecomputedFeatures(num_features), sync_on_compute=False)
        metric.orig_dtype = torch.float64
        count, metric.real_features_sum, metric.real_features_cov_sum = real.without_group(
            group if is_paired else None
        )
        metric.real_features_num_samples = count
        count, metric.fake_features_sum, metric.fake_features_cov_sum = fake.without_group(group)
        metric.fake_features_num_samples = count
        metric.update(torch.empty(0, num_features, dtype=torch.float64), real=False)  # empty: marks it used
        return metric.compute().item()

    return jackknife(distance)


class PrecomputedFeatures(nn.Module):
    """Replaces the feature network that torchmetrics expects, and is given features."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        """Return `features` unchanged."""
        return features


def check_sample_count(num_samples: int, num_features: int) -> None:
    """Raise a ValueError if there are too few samples for a Frechet distance."""
    if num_samples <= num_features:
        raise ValueError(
            f"A Frechet distance of {num_features} features needs more than {num_features} images, got"
            f" {num_samples}. Use more images, choose a feature network with fewer features, or disable it with"
            " `--feature_network none`."
        )


class StreamedScore(Accumulator):
    """Inception-style score: how confident a classifier is about each image, and how diverse its predictions are
    (Salimans et al., 2016, https://arxiv.org/abs/1606.03498), over all samples instead of ten splits.
    """

    def __init__(self, num_classes: int):
        super().__init__()
        self.add_sum("counts", NUM_GROUPS)
        self.add_sum("negative_entropies", NUM_GROUPS)
        self.add_sum("probabilities", NUM_GROUPS, num_classes)

    def update(self, log_probabilities: Tensor, indices: Sequence[int]) -> None:
        """Add log-probabilities (B, C) of the samples `indices`."""
        log_probabilities = log_probabilities.detach().cpu().double()
        probabilities = log_probabilities.exp()
        groups = torch.tensor(indices) % NUM_GROUPS
        self.counts.index_add_(0, groups, torch.ones(len(groups), dtype=torch.float64))
        self.negative_entropies.index_add_(0, groups, torch.xlogy(probabilities, probabilities).sum(dim=1))
        self.probabilities.index_add_(0, groups, probabilities)

    def compute(self) -> dict[str, float]:
        """Return value, low and high; 1 is the worst, the number of classes the best."""

        def score(group: int | None) -> float:
            kept = [other for other in range(NUM_GROUPS) if other != group]
            count = self.counts[kept].sum()
            marginal = self.probabilities[kept].sum(dim=0) / count
            divergence = self.negative_entropies[kept].sum() / count - torch.xlogy(marginal, marginal).sum()
            return divergence.exp().item()

        return jackknife(score)


class FeatureReservoir(Accumulator):
    """Features of at most `size` samples, drawn uniformly: those of lowest rank, a random number set by the index."""

    def __init__(self, num_features: int, size: int = RESERVOIR_SIZE):
        super().__init__()
        self.size = size
        self.ranks: Tensor
        self.features: Tensor
        self.add_state("ranks", torch.empty(0, dtype=torch.float64), dist_reduce_fx="cat", persistent=True)
        self.add_state("features", torch.empty(0, num_features), dist_reduce_fx="cat", persistent=True)

    def update(self, features: Tensor, indices: Sequence[int]) -> None:
        """Add features (B, D) of the samples `indices` as candidates."""
        seeded = [torch.Generator().manual_seed(index) for index in indices]
        ranks = torch.stack([torch.rand((), dtype=torch.float64, generator=generator) for generator in seeded])
        self.ranks = torch.cat([self.ranks, ranks])
        self.features = torch.cat([self.features, features.detach().cpu().float()])
        if len(self.ranks) > 2 * self.size:
            self.keep_lowest()

    def keep_lowest(self) -> None:
        """Keep only the `size` samples of the lowest rank, sorted by rank."""
        chosen = self.ranks.argsort()[: self.size]
        self.ranks, self.features = self.ranks[chosen], self.features[chosen]

    def compute(self) -> Tensor:
        """Return the features kept, (M, D)."""
        self.keep_lowest()
        return self.features


def precision_and_recall(real: Tensor, fake: Tensor, num_neighbors: int = NUM_NEIGHBORS) -> tuple[float, float]:
    """Return the share of fake samples within the real manifold, and of real samples within the fake manifold.

    A manifold is the union of balls around its samples, each as large as the distance to its k-th nearest neighbor
    (Kynkaanniemi et al., 2019, https://arxiv.org/abs/1904.06991).

    Args:
        real: features, (M, D).
        fake: features, (M', D).
        num_neighbors: k.

    Raises:
        ValueError: if a set has k samples or fewer.
    """
    if min(len(real), len(fake)) <= num_neighbors:
        raise ValueError(
            f"Precision and recall with {num_neighbors} neighbors need more than {num_neighbors} images per set, got"
            f" {len(real)} real and {len(fake)} generated."
        )
    return share_inside(fake, real, num_neighbors), share_inside(real, fake, num_neighbors)


def share_inside(samples: Tensor, manifold: Tensor, num_neighbors: int) -> float:
    """Return the share of `samples` (N, D) inside a ball of `manifold` (M, D)."""
    exact = {"compute_mode": "donot_use_mm_for_euclid_dist"}  # the matmul form is inaccurate for neighbors
    # a sample is its own nearest neighbor, at distance 0
    radii = [torch.cdist(part, manifold, **exact).kthvalue(num_neighbors + 1).values for part in manifold.split(500)]
    inside = [(torch.cdist(part, manifold, **exact) <= torch.cat(radii)).any(dim=1) for part in samples.split(500)]
    return torch.cat(inside).double().mean().item()
