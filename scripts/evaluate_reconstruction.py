"""Measure reconstruction of held-out pictures at several token counts, and show it.

    python scripts/evaluate_reconstruction.py --data data/embedded128 --output docs/results/embedded --max_pictures 200

The validation pictures of `--data` (made by prepare_embedded_data.py), photos and drawings, are encoded, cut to the
first 1, 2, 4, ... tokens and decoded again. Reported per count, with 95% bootstrap intervals over pictures:

- PSNR in dB;
- SSIM (Wang et al., 2004);
- perceptual distance: blurred CIE Lab colors and histograms of oriented gradients, equally weighted
  (`flextok_hf.evaluation.PictureIndex`); 0 is the same picture, 1 the mean distance of two different real pictures;
- the share whose nearest neighbor among all real pictures has the name of the original (Wilson interval).

Writes reconstruction.json, reconstruction.md and reconstruction.png.
"""

import argparse
import json
import time
from collections.abc import Sequence

import torch
from evaluation_common import (
    add_common_arguments,
    describe_run,
    draw_rows,
    load_pipeline,
    load_rows,
    reconstruct,
    to_pil,
    write_results,
)
from torch import Tensor
from tqdm.auto import tqdm

from flextok_hf.evaluation import (
    PictureIndex,
    bootstrap_interval,
    distance_between,
    peak_signal_to_noise,
    stack_pictures,
    structural_similarity,
    wilson_interval,
)
from flextok_hf.outputs import save_picture
from flextok_hf.sheets import contact_sheet, token_count_title


MEASURES = {"psnr_db": "PSNR (dB)", "ssim": "SSIM", "perceptual_distance": "perceptual distance"}


def summarize(values: Sequence[float], seed: int) -> dict:
    """Return the mean of one value per picture with its bootstrap interval."""
    low, high = bootstrap_interval(values, seed)
    mean = sum(values) / len(values)
    return {"mean": round(mean, 4), "low": round(low, 4), "high": round(high, 4)}


def compare(index: PictureIndex, pictures: Tensor, originals: Tensor, rows: Sequence[dict], seed: int) -> dict:
    """Compare reconstructions (B, 3, H, W) with their originals, over all pictures and per style."""
    values = {
        "psnr_db": peak_signal_to_noise(pictures, originals),
        "ssim": structural_similarity(pictures, originals),
        "perceptual_distance": distance_between(index, pictures, originals),
    }
    neighbors = index.search(pictures, count=1)[1][:, 0].tolist()
    hits = sum(index.names[found] == row["name"] for found, row in zip(neighbors, rows))
    low, high = wilson_interval(hits, len(rows))
    result: dict = {key: summarize(value.tolist(), seed) for key, value in values.items()}
    result["name"] = {"share": round(hits / len(rows), 4), "low": round(low, 4), "high": round(high, 4)}
    result["by_style"] = {}
    for style in sorted({row["style"] for row in rows}):
        chosen = torch.tensor([row["style"] == style for row in rows])
        means = {key: round(value[chosen].mean().item(), 4) for key, value in values.items()}
        result["by_style"][style] = {"count": int(chosen.sum())} | means
    return result


def make_markdown(record: dict) -> str:
    """Return the record as tables for reading."""

    def cell(value: dict) -> str:
        return f"{value['mean']:.3f} ({value['low']:.3f} to {value['high']:.3f})"

    def gains(measure: str) -> str:
        means = [value[measure]["mean"] for value in record["results"].values()]
        ordered = means if measure != "perceptual_distance" else [-mean for mean in means]
        return "yes" if ordered == sorted(ordered) else "no"

    titles = " | ".join(MEASURES.values())
    lines = [
        "# Reconstruction of held-out pictures",
        "",
        f"- model {record['model']}, weights SHA-256 {record['weights_sha256'][:16]}",
        f"- {record['count']} pictures of the validation split, drawn at random: photos, and drawings whose name is in"
        " train in another style, which may resemble them (flat, gradient and 3d are twins): see the table by style",
        f"- settings {json.dumps(record['settings'])}, seed {record['seed']}, {record['wall_time_s']:.0f} s on"
        f" {record['device']}",
        "",
        "Means with 95% bootstrap intervals over pictures. Perceptual distance: color and shape features, 0 the same"
        " picture, 1 two unrelated ones. Name: the nearest real picture has the original's name (Wilson interval).",
        "",
        f"| tokens | {titles} | name |",
        "|---|---|---|---|---|",
    ]
    for count, value in record["results"].items():
        name = value["name"]
        share = f"{name['share']:.1%} ({100 * name['low']:.1f} to {100 * name['high']:.1f})"
        lines.append(f"| {count} | {' | '.join(cell(value[key]) for key in MEASURES)} | {share} |")
    better = ", ".join(f"{title}: {gains(key)}" for key, title in MEASURES.items())
    lines += ["", f"Better with every step in tokens: {better}.", "", f"| tokens | style | count | {titles} |"]
    lines += ["|---|---|---|---|---|---|"]
    for count, value in record["results"].items():
        for style, means in value["by_style"].items():
            cells = " | ".join(f"{means[key]:.3f}" for key in MEASURES)
            lines.append(f"| {count} | {style} | {means['count']} | {cells} |")
    return "\n".join(lines) + "\n"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_common_arguments(parser)
    parser.add_argument("--max_pictures", type=int, help="draw this many validation pictures")
    parser.add_argument("--sheet_rows", type=int, default=12, help="pictures on the contact sheet")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    rows = load_rows(options.data)
    index = PictureIndex(
        stack_pictures([row["image"] for row in rows]), [row["name"] for row in rows], [row["style"] for row in rows]
    )
    held_out = draw_rows([row for row in rows if row["split"] == "validation"], options.max_pictures, options.seed)
    originals = stack_pictures([row["image"] for row in held_out])
    pipe = load_pipeline(options)

    start = time.perf_counter()
    results, columns = {}, [originals]
    with tqdm(total=len(held_out) * len(options.token_counts), unit="picture") as bar:
        for count in options.token_counts:
            bar.set_description(token_count_title(count))
            pictures = reconstruct(pipe, [row["image"] for row in held_out], count, options, bar)
            results[count] = compare(index, pictures, originals, held_out, options.seed)
            columns.append(pictures)
    record = {"count": len(held_out), "seed": options.seed, "wall_time_s": round(time.perf_counter() - start, 1)}
    record |= describe_run(pipe, options) | {"results": results}
    write_results(options.output, "reconstruction", record, make_markdown(record))

    shown = range(0, len(held_out), max(1, len(held_out) // options.sheet_rows))[: options.sheet_rows]
    titles = ["original", *(token_count_title(count) for count in options.token_counts)]
    sheet = contact_sheet([[to_pil(pictures[i]) for pictures in columns] for i in shown], titles)
    save_picture(sheet, options.output / "reconstruction.png")


if __name__ == "__main__":
    main()
