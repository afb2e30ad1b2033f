"""Training throughput, and how it compares to what the machine can reach."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..utils.flops import FlopCounter


TIMED_MATMULS = 5
MATMUL_SIDE = {"cpu": 1024}  # large enough to reach the peak, small enough to take milliseconds
MATMUL_SIDE_OF_ACCELERATORS = 8192
# The backward pass of a matmul costs twice as much as its forward pass.
FORWARD_AND_BACKWARD = 3
clock = time.perf_counter  # a benchmark on a busy machine may set it to CPU time


def count_training_flops(forward: Callable[[], Any]) -> int:
    """Count the FLOPs of a training step with forward pass `forward`, without recomputed activations."""
    with FlopCounter() as counter, torch.enable_grad(), torch.compiler.set_stance("force_eager"):
        forward()
    return FORWARD_AND_BACKWARD * counter.trained + counter.frozen


def measure_matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the machine's FLOP/s in a matmul of two large square matrices, the best of several runs."""
    side = MATMUL_SIDE.get(device.type, MATMUL_SIDE_OF_ACCELERATORS)
    left, right = (torch.ones(side, side, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(1 + TIMED_MATMULS):
        synchronize(device)
        start = clock()
        left @ right
        synchronize(device)
        seconds.append(clock() - start)
    return 2 * side**3 / min(seconds[1:])


def synchronize(device: torch.device) -> None:
    """Wait until an accelerator has finished its queued work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


class Meter:
    """Measures throughput between two log entries.

    Args:
        images_per_step: images of all processes together.
        flops_per_step: FLOPs of one process; 0 if unknown.
        matmul_rate: FLOP/s of one process, see `measure_matmul_rate`.
    """

    def __init__(self, images_per_step: int, flops_per_step: float, matmul_rate: float):
        self.images_per_step = images_per_step
        self.flops_per_step = flops_per_step
        self.matmul_rate = matmul_rate
        self.restart()

    def restart(self) -> None:
        """Start over, so that time since the last call, such as validation, does not count."""
        self.start, self.steps, self.waited_s = clock(), 0, 0.0

    def waiting(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Yield the batches, and measure how long training waits for them."""
        while True:
            start = clock()
            batch = next(batches)
            self.waited_s += clock() - start
            yield batch

    def read(self) -> dict[str, float]:
        """Return throughput and utilization since the last call."""
        elapsed_s = clock() - self.start
        rate = self.steps * self.flops_per_step / elapsed_s
        metrics = {
            "images_per_s": self.steps * self.images_per_step / elapsed_s,
            "data_wait_share": self.waited_s / elapsed_s,
            "tflops_per_process": rate / 1e12,
            "matmul_share": rate / self.matmul_rate,
        }
        self.restart()
        return metrics
