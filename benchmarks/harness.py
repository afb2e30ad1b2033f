"""Shared by all benchmarks: timing, hardware limits, memory, and the JSON record at the end of every output.

A scenario is data. Calls that are compared run in turn, so that other load on the machine affects them equally. The
first call of each, which includes setup and compilation, is reported separately.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from flextok_hf.utils import tuning


Call = Callable[[], object]
GIGA = 1e9


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def measure(
    calls: Mapping[str, Call],
    device: str = "cpu",
    num_repeats: int = 5,
    has_warm_up: bool = True,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, dict[str, float]]:
    """Time several calls in turn; on a busy machine with `time.process_time` as `clock`, and one thread.

    Returns:
        Per call `median_s`, `low_s` and `high_s` of the repeats, and `first_s` if there was a warm-up.
    """
    latencies: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(has_warm_up + num_repeats):
        for name, call in calls.items():
            synchronize(device)
            start = clock()
            call()
            synchronize(device)
            latencies[name].append(clock() - start)
    return {name: summarize(values, has_warm_up) for name, values in latencies.items()}


def summarize(latencies: list[float], has_warm_up: bool) -> dict[str, float]:
    """Return median and range of timings in seconds; a warm-up, the first entry, is reported separately."""
    repeats = latencies[1:] if has_warm_up else latencies
    summary = {"median_s": statistics.median(repeats), "low_s": min(repeats), "high_s": max(repeats)}
    if has_warm_up:
        summary["first_s"] = latencies[0]
    return {name: round(value, 6) for name, value in summary.items()}


def matmul_call(dtype: torch.dtype, device: str = "cpu", flops: int = 0) -> tuple[Call, int]:
    """Return a call with large matmuls and its FLOPs: timed in turn with a model, it gives the upper limit for it.

    Given the `flops` of the model's call, it takes about as long: a short matmul would rarely hit the slow moments of
    a shared machine, which a long call always does.
    """
    size = 8192 if device == "cuda" else 1536
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    result = torch.empty_like(left)
    num_matmuls = max(1, round(flops / (2 * size**3)))

    def multiply() -> None:
        for _ in range(num_matmuls):
            torch.matmul(left, right, out=result)

    return multiply, num_matmuls * 2 * size**3


def read_call(device: str = "cpu") -> tuple[Call, int]:
    """Return a call that only reads memory and its bytes: the upper limit for a step of the prior."""
    values = torch.ones(2**27, device=device)
    return values.sum, 4 * values.numel()


def peak_memory(call: Call, device: str = "cpu") -> int | None:
    """Return the peak MiB while `call` runs: of the process on a CPU, else of the device; `None` if unknown."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        call()
        synchronize(device)
        return torch.cuda.max_memory_allocated() // 2**20
    try:
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak; Linux only
        call()
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) // 1024 for line in lines if line.startswith("VmHWM"))
    except OSError:
        call()
        return None


def in_new_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a module-level function in a fresh process and return its result."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def describe_machine(device: str) -> dict[str, Any]:
    """Return hardware, threads, versions and date, which belong with every measurement."""
    name = torch.cuda.get_device_name() if device == "cuda" else cpu_name()
    packages = ("torch", "transformers", "diffusers")
    return {
        "device": f"{device}: {name}",
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "versions": {package: version(package) for package in packages},
        "date": date.today().isoformat(),
        "fastest": tuning.choices() if device == "cpu" else {},
    }


def cpu_name() -> str:
    """Return the model name of the CPU, or its architecture if unknown."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def build_parser(description: str) -> argparse.ArgumentParser:
    """Return a parser with the options that all benchmarks share."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads (all)")
    parser.add_argument("--repeats", type=int, help="timed calls per scenario (default: set by the scenario)")
    parser.add_argument("--results", type=Path, help="folder for tables and record (default: only print)")
    return parser


def print_table(rows: Iterable[Mapping[str, Any]], columns: list[str]) -> str:
    """Print rows as a Markdown table and return it; floats have three significant digits."""
    lines = ["| " + " | ".join(columns) + " |", "| " + " | ".join("---" for _ in columns) + " |"]
    lines += ["| " + " | ".join(show(row.get(column)) for column in columns) + " |" for row in rows]
    table = "\n".join(lines)
    print(table, flush=True)
    return table


def show(value: Any) -> str:
    """Return a value as a table cell."""
    if value is None:
        return "not measured"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def finish(name: str, record: dict[str, Any], tables: list[str], results: Path | None) -> None:
    """Print the record as the last line, and save it with its tables if `results` is given."""
    if results is not None:
        results.mkdir(parents=True, exist_ok=True)
        machine = record["machine"]
        heading = f"# {name}\n\n{machine['device']}, {machine['threads']} threads, {machine['date']}"
        versions = ", ".join(f"{package} {number}" for package, number in machine["versions"].items())
        choices = [f"- {choice}: {way}" for choice, way in machine["fastest"].items()]
        text = "\n\n".join([f"{heading}, {versions}.", *tables, *filter(None, ["\n".join(choices)])]) + "\n"
        (results / f"{name}.md").write_text(text, encoding="utf-8")
        (results / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record), flush=True)
