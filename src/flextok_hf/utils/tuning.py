"""Measured choices between ways to compute the same: timed once on each machine, then remembered in a cache file.

Which kernel is fastest depends on CPU, number of threads, precision and shape; a rule from one machine is wrong on the
next. The environment variable `FLEXTOK_TUNING` controls it:

- "on" (default): long loops time what is not known yet and store it; everything uses what the file held at first use.
- "off": everything uses the kernels of the library that PyTorch calls by default.
- "refresh": as "on", but ignores what the file held.

Summation order differs between ways, so results may differ in the last digits between machines, and on one machine
between the process that measured and later ones.
"""

import contextlib
import functools
import json
import math
import os
import platform
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from huggingface_hub import cached_assets_path
from torch.utils._python_dispatch import _disable_current_modes

from .files import write_text


LIBRARY = "library"  # the way that PyTorch takes by itself
PACKING = "packing"  # no way, but timed with them: what some ways need once
MIN_GAIN = 0.05  # another way must take so much less time: smaller differences are noise
NUM_TIMINGS = 3  # of each way
MAX_SHARE = 0.06  # of the calls in a loop, to be timed; the ones that run most often cost a tenth of that
CACHE_BYTES = 2**26
MAX_FILE_BYTES = 2**20
MODES = ("on", "off", "refresh")

Times = dict[str, float]  # way -> seconds

forced: dict[str, str] = {}  # kind of choice -> way, for tests and benchmarks
measured: dict[str, dict[str, Times]] = {}  # machine -> choice -> seconds of each way, by this process
lock = threading.RLock()


def mode() -> str:
    """Return the value of `FLEXTOK_TUNING`; raises `ValueError` for an unknown one."""
    value = os.environ.get("FLEXTOK_TUNING", "on")
    if value not in MODES:
        raise ValueError(f"The environment variable FLEXTOK_TUNING is {value!r}; set it to {', '.join(MODES)}.")
    return value


def fastest(kind: str, ways: Sequence[str], times: Times | None, default: str = LIBRARY) -> str:
    """Return the way that takes the least time; the default without times, or if none is faster by a margin."""
    if forced.get(kind) in ways:
        return forced[kind]
    if times is None:
        return default
    best = min(ways, key=lambda way: times.get(way, math.inf))
    return best if times.get(best, math.inf) < (1 - MIN_GAIN) * times.get(default, math.inf) else default


def stored_times(choice: str) -> Times | None:
    """Return the seconds of each way that the file held when this process first looked, or `None`."""
    return stored().get(machine(), {}).get(choice) if mode() == "on" else None


def loop_times(choice: str, num_ways: int, num_calls: int, time_ways: Callable[[], Times]) -> Times | None:
    """Return the seconds of each way within a loop; what is not known is timed if the loop is long, else `None`.

    Args:
        choice: a name that no other choice has.
        num_ways: how many ways there are.
        num_calls: how often the loop computes this.
        time_ways: measures them.
    """
    if mode() == "off":
        return None
    with lock:  # other threads wait, so that all make the same choice
        times = measured.get(machine(), {}).get(choice) or stored_times(choice)
        if times is None and NUM_TIMINGS * (num_ways + 1) <= MAX_SHARE * num_calls:
            with _disable_current_modes():  # a counter of operations does not see them
                times = time_ways()
            measured.setdefault(machine(), {})[choice] = times
            store()
        return times


def power_of_two(count: int) -> int:
    """Return the next power of two, at least 1: sizes up to it share their choice."""
    return 1 << max(count - 1, 0).bit_length()


def time_calls(calls: Iterable[tuple[str, Callable[[], object]]], is_from_memory: bool = False) -> Times:
    """Return the least seconds of the calls with the same name; before each, `is_from_memory` empties the cache."""
    times: Times = {}
    other_data = torch.ones(CACHE_BYTES // 4 if is_from_memory else 1)
    for name, call in calls:
        other_data.sum()
        start = time.perf_counter()
        call()
        times[name] = min(time.perf_counter() - start, times.get(name, math.inf))
    return times


def choices() -> dict[str, str]:
    """Return the fastest way of everything that was timed on this machine, by this process or earlier ones."""
    known = {**stored().get(machine(), {}), **measured.get(machine(), {})}
    return {
        choice: fastest("", [way for way in times if way != PACKING], times) for choice, times in sorted(known.items())
    }


@functools.cache
def cpu() -> str:
    """Return the model of the CPU with the instructions that PyTorch uses."""
    names = ("vendor_id", "cpu family", "model", "model name")
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
        pairs = (line.partition(":") for line in lines)
        values = {name.strip(): value.strip() for name, _, value in pairs}
    except OSError:
        values = {}
    found = [values[name] for name in names if name in values] or [platform.machine(), platform.processor()]
    return ", ".join([*found, torch.backends.cpu.get_cpu_capability()])


def machine() -> str:
    """Return what the choices depend on: CPU, threads and version of PyTorch."""
    return f"{cpu()}; {torch.get_num_threads()} threads; torch {torch.__version__}"


def cache_file() -> Path:
    return cached_assets_path("flextok_hf", "tuning") / "times.json"


@functools.cache
def stored() -> dict[str, dict[str, Times]]:
    """Return what the file holds, read once per process; a missing or damaged file holds nothing."""
    return read_times()


def read_times() -> dict[str, dict[str, Times]]:
    try:
        path = cache_file()
        if path.stat().st_size > MAX_FILE_BYTES:
            return {}
        content = json.loads(path.read_text(encoding="utf-8"))
        return {
            place: {choice: dict(times) for choice, times in choices.items() if are_times(times)}
            for place, choices in content.items()
        }
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def are_times(times: dict) -> bool:
    return all(isinstance(seconds, float) and 0 < seconds < math.inf for seconds in times.values())


def store() -> None:
    """Add what this process measured to the file, if it can be written; processes replace it as a whole."""
    content = read_times()
    for place, choices in measured.items():
        content.setdefault(place, {}).update(choices)
    with contextlib.suppress(OSError, ValueError):  # read-only or full: the next process measures again
        write_text(cache_file(), json.dumps(content, indent=1) + "\n")
