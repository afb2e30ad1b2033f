"""Plot training curves from logs: a panel per metric, a color per run.

    python scripts/plot_training.py runs/caltech_tokenizer --figures loss psnr_1 psnr_32 --output curves.png

Requires matplotlib: pip install "flextok_hf[eval]".
"""

import argparse
import json
from pathlib import Path

import matplotlib


matplotlib.use("Agg")  # files only, no window

from matplotlib import pyplot  # noqa: E402, after the backend is set

from flextok_hf.utils.plain_errors import plain_errors


DEFAULT_FIGURES = ("loss", "validation_loss", "grad_norm", "lr")


def read_log(folder: Path) -> list[dict[str, float]]:
    """Return the entries of a training log."""
    path = folder / "log.jsonl"
    if not path.is_file():
        raise SystemExit(f"{folder} has no log.jsonl. Pass output folders of training runs.")
    return [json.loads(line) for line in path.read_text().splitlines()]


def plot(logs: dict[str, list[dict[str, float]]], figures: list[str], output: Path) -> None:
    """Plot one panel per metric, each of which must occur in at least one log."""
    known = {name for log in logs.values() for entry in log for name in entry}
    missing = [name for name in figures if name not in known]
    if missing:
        raise SystemExit(f"No log has {', '.join(missing)}. Available: {', '.join(sorted(known - {'step'}))}.")
    canvas, panels = pyplot.subplots(1, len(figures), figsize=(4 * len(figures), 3), squeeze=False)
    for panel, name in zip(panels[0], figures, strict=True):
        for run, log in logs.items():
            points = [(entry["step"], entry[name]) for entry in log if name in entry]
            if points:
                panel.plot(*zip(*points, strict=True), label=run, marker="." if len(points) < 20 else None)
        panel.set_title(name)
        panel.set_xlabel("step")
        panel.grid(alpha=0.3)
    if len(logs) > 1:
        panels[0][0].legend(fontsize="small")
    canvas.tight_layout()
    canvas.savefig(output, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="output folders of training runs")
    parser.add_argument(
        "--figures", nargs="+", default=list(DEFAULT_FIGURES), help="metrics to plot, as named in the log"
    )
    parser.add_argument("--output", type=Path, required=True, help="image file")
    options = parser.parse_args()
    plot({folder.name: read_log(folder) for folder in options.runs}, options.figures, options.output)


if __name__ == "__main__":
    with plain_errors():
        main()
