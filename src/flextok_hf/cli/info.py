"""`flextok info`: what there is to know about a model, and which models there are."""

import argparse
import json
import shutil
import textwrap
from pathlib import Path
from typing import Any

import torch

from ..embedded import list_models
from ..pipelines.known_words import known_names
from ..utils import tuning
from .opening import open_pipeline


def info(options: argparse.Namespace) -> None:
    """Print the components and sizes of a model, the models known by name, or what is the fastest on this machine."""
    if options.models:
        models = list_models()
        print(json.dumps(models, indent=2) if options.json else models_table(models))
        return
    if options.machine:
        choices = {"machine": tuning.machine(), "tuning": tuning.mode(), "fastest": tuning.choices()}
        print(json.dumps(choices, indent=2) if options.json else machine_table(choices))
        return
    pipe = open_pipeline(options)
    if options.names:
        known = known_names(pipe.prior)
        if not known:
            raise ValueError(
                "this model does not say what it was trained on; scripts/collect_words.py adds that to a prior that"
                " reads text"
            )
        print(json.dumps(known, indent=2, ensure_ascii=False) if options.json else names_list(known))
        return
    folder = Path(options.model)
    components = {}
    for name, component in pipe.components.items():
        if component is None:
            continue
        entry: dict[str, Any] = {"class": type(component).__name__}
        if isinstance(component, torch.nn.Module):
            entry["parameters"] = sum(parameter.numel() for parameter in component.parameters())
        if folder.is_dir():
            entry["bytes_on_disk"] = sum(file.stat().st_size for file in (folder / name).rglob("*") if file.is_file())
        components[name] = entry
    facts = {
        "model": options.model,
        "resolution": pipe.resolution,
        "num_registers": pipe.num_registers,
        "codebook_size": pipe.codebook_size,
        "components": components,
    }
    print(json.dumps(facts, indent=2) if options.json else info_table(facts))


def names_list(known: dict[str, list[str]]) -> str:
    """Return the lists of `flextok info --names`, wrapped to the width of the terminal."""
    titles = {"classes": "classes", "names": "names", "other_words": "other words, the most frequent first"}
    width = shutil.get_terminal_size().columns
    return "\n\n".join(
        f"{len(texts):,} {titles[kind]}\n" + textwrap.fill(", ".join(texts), width, break_on_hyphens=False)
        for kind, texts in known.items()
        if texts
    )


def models_table(models: list[dict[str, str]]) -> str:
    """Return the models of `flextok info --models` as a readable table."""
    rows = [list(models[0]), *(list(model.values()) for model in models)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def machine_table(facts: dict[str, Any]) -> str:
    """Return what `flextok info --machine` prints: which way of computing was the fastest here."""
    lines = [facts["machine"], f"FLEXTOK_TUNING={facts['tuning']}", ""]
    lines += [f"{choice}: {way}" for choice, way in facts["fastest"].items()]
    return "\n".join(lines if facts["fastest"] else [*lines, "nothing timed yet; the first long call does it"])


def info_table(facts: dict[str, Any]) -> str:
    """Return the facts of `flextok info` as a readable table."""
    side = facts["resolution"]
    lines = [
        f"model       {facts['model']}",
        f"images      {side} x {side}",
        f"tokens      1 to {facts['num_registers']} per image, {facts['codebook_size']:,} codes",
        "",
        f"{'component':<14}{'class':<34}{'parameters':>14}{'on disk':>12}",
    ]
    for name, entry in facts["components"].items():
        parameters = f"{entry['parameters']:,}" if "parameters" in entry else "-"
        on_disk = f"{entry['bytes_on_disk'] / 2**20:.1f} MiB" if "bytes_on_disk" in entry else "-"
        lines.append(f"{name:<14}{entry['class']:<34}{parameters:>14}{on_disk:>12}")
    total = sum(entry.get("parameters", 0) for entry in facts["components"].values())
    total_bytes = sum(entry.get("bytes_on_disk", 0) for entry in facts["components"].values())
    lines.append(f"{'total':<48}{total:>14,}{f'{total_bytes / 2**20:.1f} MiB' if total_bytes else '-':>12}")
    return "\n".join(lines)
