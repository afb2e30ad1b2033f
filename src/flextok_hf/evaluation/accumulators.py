"""Running sums of all measures: memory does not depend on the number of images, nor results on the batch size.

Each is a `torchmetrics.Metric` whose states can be saved, loaded and merged, so that an evaluation can be resumed and
split over processes. How a sample is weighted in an interval depends on its index alone (see `intervals`).

Letters: B batch, R side of the square images.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from .intervals import NUM_RESAMPLES, percentile_interval, poisson_weights, wilson_interval


CONCATENATED_STATES = ("ranks", "features")  # of `FeatureReservoir`; all other states are summed over processes


class Accumulator(Metric):
    """A metric on the CPU, in double precision, that never syncs with other processes: they share states as files."""

    full_state_update = False

    def __init__(self) -> None:
        super().__init__(sync_on_compute=False)

    def add_sum(self, name: str, *shape: int, dtype: torch.dtype = torch.float64) -> None:
        """Add a state that starts at 0 and is summed over processes."""
        self.add_state(name, torch.zeros(shape, dtype=dtype), dist_reduce_fx="sum", persistent=True)

    def mark_as_used(self) -> None:
        """Mark loaded states as updated; otherwise torchmetrics warns that the metric is empty."""
        self._update_count = 1
        self._computed = None


class MeanWithInterval(Accumulator):
    """Mean of one value per sample, with its 95% bootstrap interval."""

    def __init__(self) -> None:
        super().__init__()
        self.add_sum("total")
        self.add_sum("count")
        self.add_sum("resampled_totals", NUM_RESAMPLES)
        self.add_sum("resampled_counts", NUM_RESAMPLES)

    def update(self, values: Tensor, indices: Sequence[int]) -> None:
        """Add values (B,) of the samples `indices`."""
        values = values.detach().cpu().double()
        weights = poisson_weights(indices)
        self.total += values.sum()
        self.count += len(values)
        self.resampled_totals += values @ weights
        self.resampled_counts += weights.sum(dim=0)

    def resampled_means(self) -> Tensor:
        """Return the mean of each resample, (resamples,); NaN for an empty resample (with very few samples)."""
        return self.resampled_totals / self.resampled_counts

    def compute(self) -> dict[str, float]:
        """Return mean, low and high."""
        low, high = percentile_interval(self.resampled_means())
        return {"mean": (self.total / self.count).item(), "low": low, "high": high}


def share_of(metric: MeanWithInterval) -> dict[str, float]:
    """Return the share of ones among zeros and ones, with its 95% Wilson interval."""
    low, high = wilson_interval(metric.total.item(), metric.count.item())
    return {"share": (metric.total / metric.count).item(), "low": low, "high": high}


class GroupedMean(Accumulator):
    """Means of several measures per named group, without intervals."""

    def __init__(self, names: Sequence[str], num_measures: int):
        super().__init__()
        self.names = list(names)
        self.add_sum("totals", len(names), num_measures)
        self.add_sum("counts", len(names))

    def update(self, values: Tensor, names: Sequence[str]) -> None:
        """Add values (B, measures) of samples from the groups `names`."""
        rows = torch.tensor([self.names.index(name) for name in names])
        self.totals.index_add_(0, rows, values.detach().cpu().double())
        self.counts.index_add_(0, rows, torch.ones(len(rows), dtype=torch.float64))

    def compute(self) -> dict[str, tuple[int, list[float]]]:
        """Return count and means of each group that has samples."""
        means = self.totals / self.counts.unsqueeze(1)
        return {
            name: (int(self.counts[row]), means[row].tolist())
            for row, name in enumerate(self.names)
            if self.counts[row] > 0
        }


class StreamedMedian(Accumulator):
    """Median of non-negative values, accurate to half a bin; values beyond the last bin are counted in it."""

    BIN, NUM_BINS = 0.005, 800

    def __init__(self) -> None:
        super().__init__()
        self.add_sum("histogram", self.NUM_BINS)

    def update(self, values: Tensor) -> None:
        """Add values of any shape."""
        bins = (values.detach().cpu().flatten() / self.BIN).long().clamp(0, self.NUM_BINS - 1)
        self.histogram += torch.bincount(bins, minlength=self.NUM_BINS).double()

    def compute(self) -> float:
        """Return the center of the bin that holds the median; 0 for the first bin."""
        share = self.histogram.cumsum(0) / self.histogram.sum()
        index = int((share < 0.5).sum())
        return 0.0 if index == 0 else (index + 0.5) * self.BIN


class Checksum(Accumulator):
    """Sum of checksums modulo 2 ** 63: identifies a set of images regardless of order."""

    def __init__(self) -> None:
        super().__init__()
        self.total: Tensor
        self.add_sum("total", dtype=torch.int64)
        self.add_sum("count", dtype=torch.int64)

    def update(self, checksums: Tensor) -> None:
        """Add checksums (B,) int64."""
        self.total = (self.total + checksums.sum()) & (2**63 - 1)
        self.count += len(checksums)

    def compute(self) -> str:
        """Return 16 hexadecimal digits."""
        return f"{int(self.total) & (2**63 - 1):016x}"


class KeptImages(Accumulator):
    """A few images for a contact sheet, in rows and columns; each cell is filled once, by any one process."""

    def __init__(self, rows: Sequence[int], num_columns: int, resolution: int):
        super().__init__()
        self.rows = list(rows)
        self.add_sum("pixels", len(self.rows), num_columns, 3, resolution, resolution, dtype=torch.uint8)

    def update(self, column: int, pixels: Tensor, indices: Sequence[int]) -> None:
        """Keep those images (B, 3, R, R) uint8 whose index is in `rows`."""
        for position, index in enumerate(indices):
            if index in self.rows:
                self.pixels[self.rows.index(index), column] = pixels[position]

    def compute(self) -> Tensor:
        """Return the images, (rows, columns, 3, R, R) uint8."""
        return self.pixels
