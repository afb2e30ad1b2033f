"""Summarize the result files of the study: the models side by side, and which of the paper's claims held.

A difference counts only if the 95% intervals of the two figures do not overlap; otherwise the result is inconclusive.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from flextok_hf.evaluation.plots import plot_curves
from flextok_hf.evaluation.results import interval_text, point, read_record, write_record
from flextok_hf.utils.tables import markdown_table


LOWER_IS_BETTER = {"mae", "frechet_distance"}
RECONSTRUCTION = {
    "psnr_db": "PSNR (dB)",
    "ssim": "SSIM",
    "frechet_distance": "Frechet distance (shapes_resnet), reconstructed",
}
GENERATION = {
    "all": "generated images with the requested color, size and place",
    "color": "with the color",
    "size": "with the size",
    "place": "with the place",
    "frechet_distance": "Frechet distance (shapes_resnet), generated",
    "precision": "precision",
    "recall": "recall",
}

Figure = dict[str, float]


def judge(key: str, first: Figure, second: Figure) -> str:
    """Return how the second figure compares with the first: better, worse, or no clear difference."""
    sign = -1 if key in LOWER_IS_BETTER else 1
    if second["low"] > first["high"]:
        return "better" if sign > 0 else "worse"
    if second["high"] < first["low"]:
        return "worse" if sign > 0 else "better"
    return "no clear difference"


def conclude(key: str, first: Figure, second: Figure) -> str:
    """Return whether the claim held that the second figure is better than the first."""
    return {"better": "held", "worse": "did not hold"}.get(judge(key, first, second), "inconclusive")


def figure_of(records: dict, model: str, kind: str, count: int | str, key: str) -> Figure | None:
    """Return one figure of one model, or `None` where it was not measured."""
    results = records[model][kind]["results"]
    if kind == "generation":
        results = results["prompts"]
    return results.get(str(count), {}).get(key)


def side_by_side(records: dict, kind: str, keys: dict[str, str]) -> list[str]:
    """Return a table per figure: models as rows, token counts as columns."""
    counts = records["flexible"][kind]["token_counts"]
    lines = []
    for key, title in keys.items():
        rows = []
        for model in records:
            values = [figure_of(records, model, kind, count, key) for count in counts]
            rows.append([model, *("" if value is None else interval_text(value) for value in values)])
        lines += [f"**{title}**", "", markdown_table(["model", *(f"{count} tokens" for count in counts)], rows), ""]
    return lines


def claim_lengths(records: dict) -> list[str]:
    """Plausible images at every length: images from one token, compared with a cut fixed-length model and the grid."""
    counts = records["flexible"]["generation"]["token_counts"]
    longest = max((name for name in records if name.startswith("fixed-")), key=lambda name: int(name.split("-")[1]))
    few, cut, grid = (
        figure_of(records, model, "generation", counts[0], "frechet_distance")
        for model in ("flexible", longest, "grid")
    )
    every = figure_of(records, "flexible", "generation", counts[-1], "frechet_distance")
    held = conclude("frechet_distance", cut, few)
    precision = [figure_of(records, "flexible", "generation", count, "precision") for count in (counts[0], counts[-1])]
    return [
        f"**Plausible images at every length: {held}.** The Frechet distance of images generated with {counts[0]}"
        f" token is {interval_text(few)}, and {interval_text(cut)} for {longest} cut to {counts[0]}; with {counts[-1]}"
        f" tokens it is {interval_text(every)}. The grid with {counts[0]} token has {interval_text(grid)}; the ordered"
        f" model compared with it: {judge('frechet_distance', grid, few)}. Precision is {interval_text(precision[0])}"
        f" with {counts[0]} token and {interval_text(precision[1])} with {counts[-1]}."
    ]


def claim_more_tokens(records: dict) -> list[str]:
    """More tokens, better images: reconstruction and generation at the shortest and the longest sequence."""
    counts = records["flexible"]["reconstruction"]["token_counts"]
    lines = []
    for kind, key, title in (
        ("reconstruction", "psnr_db", "PSNR of reconstructions"),
        ("reconstruction", "frechet_distance", "Frechet distance of reconstructions"),
        ("generation", "all", "adherence of generated images to full sentences"),
        ("generation", "frechet_distance", "Frechet distance of generated images"),
    ):
        first, last = (figure_of(records, "flexible", kind, count, key) for count in (counts[0], counts[-1]))
        lines.append(
            f"**More tokens improve the {title}: {conclude(key, first, last)}.** {interval_text(first)} with"
            f" {counts[0]}, {interval_text(last)} with {counts[-1]} tokens."
        )
    return lines


def claim_simple_conditions(records: dict) -> list[str]:
    """Fewer tokens suffice for simpler conditions."""
    needed = records["flexible"]["complexity"]["tokens_needed"]
    known = {level: figure for level, figure in needed.items() if figure is not None}
    listed = "; ".join(f"{level}: {interval_text(figure, 0)}" for level, figure in known.items())
    values = [point(figure) for figure in known.values()]
    simple, detailed = (list(known.values())[index] for index in (0, -1)) if known else ({}, {})
    if len(known) < 2:
        held = "inconclusive"
    elif values != sorted(values) or values[0] >= values[-1]:
        held = "did not hold"
    else:
        held = "held" if simple["high"] < detailed["low"] else "inconclusive"
    return [f"**Fewer tokens suffice for simpler conditions: {held}.** Tokens needed, by condition: {listed}."]


def claim_one_token(records: dict) -> list[str]:
    """One token covers more of a simple condition: adherence as a share of the best with any number of tokens."""
    shares = {}
    for level, by_count in records["flexible"]["complexity"]["results"].items():
        adherence = {int(count): figures["adherence"] for count, figures in by_count.items()}
        best = max(figure["share"] for figure in adherence.values())
        if best > 0:
            shares[level] = {key: adherence[min(adherence)][key] / best for key in ("share", "low", "high")}
    held = "inconclusive"
    if len(shares) > 1:
        simple, *_, detailed = shares.values()
        held = conclude("share", detailed, simple)
    listed = "; ".join(f"{level}: {interval_text(figure)}" for level, figure in shares.items())
    return [
        f"**One token covers more of a simple condition: {held}.** Adherence with the fewest tokens, as a share of"
        f" the best with any number, whose own interval is ignored: {listed}."
    ]


def claim_order(records: dict) -> list[str]:
    """Ordered tokens against a two-dimensional grid, at every number of tokens."""
    lines = []
    for kind, key, title in (
        ("reconstruction", "psnr_db", "PSNR of reconstructions"),
        ("reconstruction", "frechet_distance", "Frechet distance of reconstructions"),
        ("generation", "all", "adherence of generated images"),
    ):
        counts = records["flexible"][kind]["token_counts"]
        parts = []
        for count in counts:
            pair = [figure_of(records, model, kind, count, key) for model in ("grid", "flexible")]
            parts.append(f"{count} token{'s' * (count > 1)}: {judge(key, *pair)}")
        lines.append(f"**Ordered tokens against the grid, {title}.** The ordered model with {'; '.join(parts)}.")
    return lines


def claim_fixed(records: dict) -> list[str]:
    """One flexible model against models trained at one length each."""
    lines = []
    for model in (name for name in records if name.startswith("fixed-")):
        count = int(model.removeprefix("fixed-"))
        parts = []
        for kind, key, title in (
            ("reconstruction", "psnr_db", "PSNR"),
            ("reconstruction", "frechet_distance", "Frechet distance of reconstructions"),
            ("generation", "all", "adherence"),
        ):
            pair = [figure_of(records, name, kind, count, key) for name in (model, "flexible")]
            parts.append(f"{title} {interval_text(pair[1])} against {interval_text(pair[0])} ({judge(key, *pair)})")
        lines.append(f"**The flexible model against {model}, at {count} tokens:** {'; '.join(parts)}.")
    return lines


CLAIMS: Sequence[Callable[[dict], list[str]]] = (
    claim_lengths,
    claim_more_tokens,
    claim_simple_conditions,
    claim_one_token,
    claim_order,
    claim_fixed,
)


def training_table(output: Path, models: Sequence[str]) -> str:
    """Return a table of the training images and minutes of each model, from its logs."""
    rows = []
    for model in models:
        cells: list[object] = [model]
        for stage in ("tokenizer", "prior"):
            folder = output / model / stage
            log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
            arguments = json.loads((folder / "arguments.json").read_text())
            images = arguments["max_train_steps"] * arguments["train_batch_size"]
            speeds = [entry["images_per_s"] for entry in log if entry.get("images_per_s")]
            seconds = images / (sum(speeds) / len(speeds)) if speeds else float("nan")
            cells += [f"{images:,}", f"{seconds / 60:.1f}"]
        rows.append(cells)
    header = ["model", "tokenizer: images", "minutes", "prior: images", "minutes"]
    return markdown_table(header, rows)


def write_summary(output: Path, results: Path, models: Sequence[str]) -> None:
    """Write summary.json, summary.md and summary_curves.png from the result files of all models.

    Args:
        output: folder of the trained models.
        results: folder with one folder of result files per model.
        models: names of the models, which are also the folder names.
    """
    records: dict = {}
    for model in models:
        paths = sorted((results / model).glob("*.json"))
        records[model] = {path.stem: read_record(path) for path in paths}
    claims = [line for claim in CLAIMS for line in claim(records)]
    network = records["flexible"]["reconstruction"]["protocol"]["feature_network"]
    parameters = [
        [model, *(f"{count:,}" for count in records[model]["generation"]["parameters"].values())] for model in models
    ]
    first = records["flexible"]["generation"]
    lines = [
        "# Summary of the study",
        "",
        "Created by `scripts/reproduce.py` from the result files next to it. Intervals are 95%; a difference counts"
        " only if they do not overlap. One run of each model: the intervals do not cover other training seeds.",
        "",
        f"- {first['protocol']['data']}: images of {first['protocol']['resolution']} pixels; measured on"
        f" {first['device']}",
        f"- feature network {network['name']}, SHA-256 {network['sha256'][:16]}, accuracy on held-out images"
        f" {network['validation_accuracy']:.1%}; its distances are not FID",
        "",
        "## What held",
        "",
        *(f"- {line}" for line in claims),
        "",
        "## Models",
        "",
        markdown_table(["model", *first["parameters"]], parameters),
        "",
        training_table(output, models),
        "",
        "## Reconstruction of held-out images",
        "",
        *side_by_side(records, "reconstruction", RECONSTRUCTION),
        "## Images generated from full sentences",
        "",
        *side_by_side(records, "generation", GENERATION),
    ]
    summary = {"claims": claims, "models": list(models), "feature_network": network}
    write_record(results, "summary", summary, "\n".join(lines))
    counts = records["flexible"]["reconstruction"]["token_counts"]
    panels = {
        title: {model: [figure_of(records, model, kind, count, key) for count in counts] for model in models}
        for kind, keys in (("reconstruction", RECONSTRUCTION), ("generation", GENERATION))
        for key, title in keys.items()
    }
    plot_curves(counts, panels, "tokens", results / "summary_curves.png")
