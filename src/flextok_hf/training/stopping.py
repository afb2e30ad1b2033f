"""SIGTERM and Ctrl-C during training: the first one stops it after a step, with a checkpoint; the second at once."""

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor


SIGNALS = (signal.SIGINT, signal.SIGTERM)
# A scheduler and a launcher may each pass on the same signal; only a later one is a second wish.
SAME_WISH_S = 1.0


class TrainingStopped(SystemExit):
    """Training was stopped by a signal, after a checkpoint; ends the program with 128 + signal: 130 or 143."""


class StopRequest:
    """Whether this run was asked to stop; signals are caught inside `with`, and only in the main thread."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.signal = 0
        self.time = 0.0
        self.process = os.getpid()
        self.earlier: Tensor | None = None
        self.handlers: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            caught = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            self.handlers = {number: signal.signal(number, self.handle) for number in caught}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Note the first signal; die of the second one."""
        if os.getpid() != self.process:  # a forked worker, which its parent ends
            return
        if self.signal and time.monotonic() - self.time > SAME_WISH_S:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        if not self.signal:
            self.signal, self.time = number, time.monotonic()
            if self.accelerator.is_main_process:  # by `os`, as the signal may have interrupted a print
                os.write(2, b"\nStopping after this step, with a checkpoint; once more stops at once.\n")

    def agreed(self) -> int:
        """Return the signal on which all processes stop now, or 0; call this after each step.

        Several processes compare what they had after the step before, so that no device is waited for.
        """
        if self.accelerator.num_processes == 1:
            return self.signal
        earlier, self.earlier = self.earlier, torch.full((), self.signal, device=self.accelerator.device)
        torch.distributed.all_reduce(self.earlier, torch.distributed.ReduceOp.MAX)
        return 0 if earlier is None else int(earlier)
