"""Plots of figures and their intervals over the number of tokens."""

from pathlib import Path

from ..utils.files import write_atomically
from .results import point


Curves = dict[str, dict[str, list[dict]]]  # panel title -> curve name -> figures with `low` and `high`


def plot_curves(counts: list[int], panels: Curves, x_title: str, path: Path) -> None:
    """Plot one panel per title, with its curves over `counts`, as a PNG file.

    Args:
        counts: numbers of tokens.
        panels: curves by panel title; every curve has one figure per count, `None` if missing.
        x_title: label of the horizontal axes.
        path: file to write.
    """
    from matplotlib.figure import Figure  # without pyplot: no global state, no display needed

    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.2 * rows))
    for position, (title, curves) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(rows, columns, position)
        for name, values in curves.items():
            known = [(place, value) for place, value in enumerate(values) if value is not None]
            x = [place for place, _ in known]
            line = axes.plot(x, [point(value) for _, value in known], marker="o", markersize=3, label=name)[0]
            low, high = ([value[key] for _, value in known] for key in ("low", "high"))
            axes.fill_between(x, low, high, alpha=0.2, color=line.get_color(), linewidth=0)
        axes.set_xticks(range(len(counts)), [str(count) for count in counts])  # evenly spaced, as counts double
        axes.set_xlabel(x_title)
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
        if any(curves):
            axes.legend(fontsize=7, loc="upper left")  # loc="best" is slow
    figure.subplots_adjust(0.06, 0.08, 0.98, 0.94, 0.2, 0.4)
    write_atomically(path, lambda name: figure.savefig(name, dpi=100, bbox_inches="tight"))
