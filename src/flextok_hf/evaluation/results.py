"""Records of an evaluation: what was measured and how, as JSON and Markdown; comparison of two records.

The `protocol` of a record holds everything that its figures depend on besides the model: images, crop, sampling,
feature network, seeds. Two records can be compared only if their protocols agree.
"""

import json
import platform
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..utils.files import read_json, write_text
from ..utils.measures import weights_hash


PACKAGES = ("torch", "transformers", "diffusers", "torchmetrics")
# May differ between compared records; the token counts that both have are compared.
FREE_PROTOCOL_KEYS = ("token_counts",)


def public_name(name: str) -> str:
    """Return the name of a model, network or dataset in result files: a Hub id as is, or the last part of a path."""
    path = Path(name).expanduser()
    return path.resolve().name if path.exists() else name


def describe_model(pipe: Any, name: str) -> dict[str, Any]:
    """Return what identifies the model: its name, the hash of its weights, and the parameters per component."""
    modules = {key: module for key, module in pipe.components.items() if isinstance(module, nn.Module)}
    return {
        "model": name,
        "weights_sha256": weights_hash(modules),
        "parameters": {key: sum(p.numel() for p in module.parameters()) for key, module in modules.items()},
    }


def describe_machine(device: str | torch.device, num_processes: int) -> dict[str, Any]:
    """Return the hardware, the processes and threads, and the package versions behind a record."""
    is_cuda = str(device).startswith("cuda")
    return {
        "device": torch.cuda.get_device_name() if is_cuda else platform.machine(),
        "num_processes": num_processes,
        "num_threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in PACKAGES},
    }


def write_record(folder: Path, name: str, record: dict, markdown: str) -> None:
    """Write `name`.json and `name`.md to a folder, each atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {".json": json.dumps(record, indent=2, allow_nan=False) + "\n", ".md": markdown.rstrip() + "\n"}
    for ending, text in texts.items():
        write_text(folder / f"{name}{ending}", text)


def read_record(path: str | Path) -> dict:
    """Read a result file.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is not JSON, or not a record with a protocol.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no result file {str(path)!r}.")
    record = read_json(path)
    if not isinstance(record, dict) or not {"protocol", "results"} <= set(record):
        raise ValueError(f"{str(path)!r} is not a result file: it has no `protocol` or no `results`. Measure again.")
    return record


def protocol_differences(first: Any, second: Any, path: str = "") -> list[str]:
    """Return one line per difference between two protocols."""
    if isinstance(first, dict) and isinstance(second, dict):
        lines = []
        for key in sorted({*first, *second}):
            if path == "" and key in FREE_PROTOCOL_KEYS:
                continue
            name = f"{path}.{key}" if path else key
            lines += protocol_differences(first.get(key, "missing"), second.get(key, "missing"), name)
        return lines
    return [] if first == second else [f"{path}: {first!r} and {second!r}"]


def figures(results: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict[str, float]]]:
    """Yield every figure with an interval in nested results: its path, and a dictionary with `low` and `high`."""
    if not isinstance(results, dict):
        return
    if {"low", "high"} <= set(results):
        yield path, results
        return
    for key, value in results.items():
        yield from figures(value, (*path, str(key)))


def point(figure: dict[str, float]) -> float:
    """Return the point estimate of a figure: its mean, share or value."""
    return next(figure[key] for key in ("mean", "share", "value") if key in figure)


def compare_records(first: dict, second: dict) -> list[list[Any]]:
    """Compare all figures that two records share.

    Returns:
        Rows of path, first value, second value, difference, and whether the 95% intervals are disjoint.

    Raises:
        ValueError: if the protocols differ, or the records have no figure in common.
    """
    differences = protocol_differences(first["protocol"], second["protocol"])
    if differences:
        raise ValueError("These results cannot be compared: their protocols differ.\n- " + "\n- ".join(differences))
    theirs = dict(figures(second["results"]))
    rows: list[list[Any]] = []
    for path, ours in figures(first["results"]):
        if path in theirs:
            other = theirs[path]
            are_apart = ours["high"] < other["low"] or other["high"] < ours["low"]
            rows.append([" / ".join(path), point(ours), point(other), point(other) - point(ours), are_apart])
    if not rows:
        raise ValueError("These results have no figure in common: their token counts differ.")
    return rows


def interval_text(figure: dict[str, float], digits: int = 3) -> str:
    """Return `12.3 (12.1 to 12.5)`, or `81.0% (78.0 to 84.0)` for a share."""
    if "share" in figure:
        return f"{figure['share']:.1%} ({100 * figure['low']:.1f} to {100 * figure['high']:.1f})"
    return f"{point(figure):.{digits}f} ({figure['low']:.{digits}f} to {figure['high']:.{digits}f})"


def rounded(value: Any, digits: int = 4) -> Any:
    """Round every float in nested dictionaries and lists, for result files."""
    if isinstance(value, float):
        return round(value, digits)
    if isinstance(value, dict):
        return {key: rounded(item, digits) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item, digits) for item in value]
    return value


def protocol_lines(record: dict) -> list[str]:
    """Return the model, the protocol and the cost of a record as list items for the top of a page."""
    protocol, cost = record["protocol"], record["cost"]
    lines = [f"- model {record['model']}, weights SHA-256 {record['weights_sha256'][:16]}"]
    for key, value in protocol.items():
        text = json.dumps(value) if isinstance(value, (dict, list)) else str(value)
        lines.append(f"- {key.replace('_', ' ')}: {text}")
    skipped = record.get("skipped", {})
    if skipped:
        lines.append(f"- {len(skipped)} images could not be read: {json.dumps(skipped)}")
    lines.append(
        f"- {record['wall_time_s']:.0f} s on {record['device']}, {record['num_processes']} process(es) with"
        f" {record['num_threads']} thread(s): {cost['images_per_s']:.2f} images/s,"
        f" {cost['tflop_per_image']:.4f} TFLOP per image"
    )
    return lines
