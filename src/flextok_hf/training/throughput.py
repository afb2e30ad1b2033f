"""How fast training is, and how far from what the machine could do."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


TIMED_PRODUCTS = 5
MATMUL_SIDE = {"cpu": 1024}  # large enough to reach the peak, small enough to take milliseconds
MATMUL_SIDE_OF_ACCELERATORS = 8192
# A multiplication with two operands costs twice in the backward pass what it costs forward.
FORWARD_AND_BACKWARD = 3
clock = time.perf_counter  # a benchmark on a busy machine may count the processor's time instead


class FlopCounter(TorchDispatchMode):
    """Context that counts the floating-point operations of products, with and without a gradient.

    Attributes:
        trained: operations that the backward pass will go through.
        frozen: operations under `torch.no_grad`.
    """

    def __init__(self):
        super().__init__()
        self.trained = 0
        self.frozen = 0
        aten = torch.ops.aten
        # PyTorch's own table lacks the attention kernel of the CPU; its arguments are those of the others
        attention = flop_registry[aten._scaled_dot_product_flash_attention]
        self.formulas = flop_registry | {aten._scaled_dot_product_flash_attention_for_cpu: attention}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        formula = self.formulas.get(func.overloadpacket)
        if formula is not None:
            flops = formula(*args, **(kwargs or {}), out_val=outputs)
            if torch.is_grad_enabled():
                self.trained += flops
            else:
                self.frozen += flops
        return outputs


def count_training_flops(forward: Callable[[], Any]) -> int:
    """Operations of a training step whose forward pass is `forward`; recomputed activations do not count."""
    with FlopCounter() as counter, torch.enable_grad(), torch.compiler.set_stance("force_eager"):
        forward()
    return FORWARD_AND_BACKWARD * counter.trained + counter.frozen


def measure_matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of the machine's own product of two large square matrices, the best of several."""
    side = MATMUL_SIDE.get(device.type, MATMUL_SIDE_OF_ACCELERATORS)
    left, right = (torch.ones(side, side, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(1 + TIMED_PRODUCTS):
        synchronize(device)
        start = clock()
        left @ right
        synchronize(device)
        seconds.append(clock() - start)
    return 2 * side**3 / min(seconds[1:])


def synchronize(device: torch.device) -> None:
    """Wait until an accelerator has done what was asked of it."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


class Meter:
    """Measures the steps between two entries of the log.

    Args:
        images_per_step: of all processes together.
        flops_per_step: of one process; 0 if unknown.
        matmul_rate: of one process, see `measure_matmul_rate`.
    """

    def __init__(self, images_per_step: int, flops_per_step: float, matmul_rate: float):
        self.images_per_step = images_per_step
        self.flops_per_step = flops_per_step
        self.matmul_rate = matmul_rate
        self.restart()

    def restart(self) -> None:
        """Begin anew: what lies between, such as validation, does not count."""
        self.start, self.steps, self.waited_s = clock(), 0, 0.0

    def waiting(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Pass batches on and measure how long training had to wait for them."""
        while True:
            start = clock()
            batch = next(batches)
            self.waited_s += clock() - start
            yield batch

    def read(self) -> dict[str, float]:
        """Return speed and use of the machine since the last call."""
        elapsed_s = clock() - self.start
        rate = self.steps * self.flops_per_step / elapsed_s
        figures = {
            "images_per_s": self.steps * self.images_per_step / elapsed_s,
            "data_wait_share": self.waited_s / elapsed_s,
            "tflops_per_process": rate / 1e12,
            "matmul_share": rate / self.matmul_rate,
        }
        self.restart()
        return figures
