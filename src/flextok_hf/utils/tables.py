"""Markdown tables, and the titles of metrics in them."""

from collections.abc import Sequence
from itertools import dropwhile, takewhile
from typing import Any


MEASURE_TITLES = {
    "psnr_db": "PSNR (dB)",
    "ssim": "SSIM",
    "mae": "MAE",
    "perceptual_distance": "perceptual distance",
    "lpips": "LPIPS",
    "dreamsim": "DreamSim",
    "name": "name found",
    "recognized_by_thumbnail": "recognized by 16 x 16 colors",
    "recognized_by_edges": "recognized by edges",
    "all": "all attributes",
    "clip_score": "CLIP score",
    "fid": "FID",
    "inception_score": "Inception score",
}


def measure_title(name: str, network: str | None = None) -> str:
    """Return the title of a metric, by default its name in words; `network` is the source of its features."""
    if name == "frechet_distance" and network is not None:
        return f"Frechet distance ({network})"
    if name == "classifier_score" and network is not None:
        return f"score ({network})"
    return MEASURE_TITLES.get(name, name.replace("_", " "))


def markdown_table(header: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def first_table(page: str) -> str:
    """Return the first table of a Markdown page, its columns padded to equal width for a terminal; "" without one."""
    lines = dropwhile(lambda line: not line.startswith("|"), page.splitlines())
    rows = [line[2:-2].split(" | ") for line in takewhile(lambda line: line.startswith("|"), lines)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    padded = [[cell.ljust(width, "-" if cell == "---" else " ") for cell, width in zip(row, widths)] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in padded)
