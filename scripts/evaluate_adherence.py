"""Measure prompt adherence: does the picture look most like the real pictures of what was asked for?

    python scripts/evaluate_adherence.py --data data/embedded128 --output docs/results/embedded --max_prompts 200

Every prompt becomes a picture at several token counts. Its nearest neighbor among all real drawings of `--data`
(made by prepare_embedded_data.py) is looked up by color and shape (`flextok_hf.evaluation.PictureIndex`); the prompt
is met if that neighbor carries the same name. Four sets of prompts are told apart: trained combinations of name and
style, combinations held out of training, and plain prompts without a style, of everyday names and of all names.
Reconstructions of the training pictures, scored the same way, bound from above what a perfect prior could reach with
this tokenizer; shuffled prompts bound from below. What the feature space itself can tell apart is measured on
distorted real pictures. Photos are left out: two photos of a thing need not resemble each other.

Writes adherence.json, adherence.md and adherence.png.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from evaluation_common import (
    add_common_arguments,
    chosen_settings,
    chunks,
    describe_run,
    draw_rows,
    load_pipeline,
    load_rows,
    reconstruct,
    seeded_generators,
    to_pil,
    write_results,
)
from torch import Tensor
from tqdm.auto import tqdm

from flextok_hf.evaluation import PictureIndex, gaussian_blur, stack_pictures, wilson_interval
from flextok_hf.outputs import save_picture
from flextok_hf.sheets import contact_sheet, token_count_title


TOP = 5
PRIOR_SETTINGS = ("prior_guidance_scale", "temperature", "top_k", "top_p")


def thumbnails(pictures: Tensor, side: int) -> Tensor:
    """Return pictures (B, 3, H, W) reduced to `side` pixels and enlarged again."""
    small = F.interpolate(pictures, (side, side), mode="area")
    return F.interpolate(small, pictures.shape[-2:], mode="bicubic").clamp(0, 1)


def shift(pictures: Tensor, pixels: int) -> Tensor:
    """Return pictures moved right and down by `pixels`, the border repeated."""
    return F.pad(pictures, (pixels, 0, pixels, 0), mode="replicate")[..., : pictures.shape[-2], : pictures.shape[-1]]


def distortions(seed: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return kinds of damage to pictures (B, 3, H, W) in [0, 1], by name."""

    def add_noise(pictures: Tensor, strength: float) -> Tensor:
        noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(seed))
        return (pictures + strength * noise).clamp(0, 1)

    return {
        "none": lambda pictures: pictures,
        "noise, standard deviation 0.1": lambda pictures: add_noise(pictures, 0.1),
        "noise, standard deviation 0.25": lambda pictures: add_noise(pictures, 0.25),
        "blur, 1.5 pixels": lambda pictures: gaussian_blur(pictures, 1.5),
        "blur, 3 pixels": lambda pictures: gaussian_blur(pictures, 3.0),
        "shift, 2 pixels": lambda pictures: shift(pictures, 2),
        "shift, 4 pixels": lambda pictures: shift(pictures, 4),
        "contrast 0.8": lambda pictures: 0.5 + 0.8 * (pictures - 0.5),
        "thumbnail, 12 x 12": lambda pictures: thumbnails(pictures, 12),
        "thumbnail, 8 x 8": lambda pictures: thumbnails(pictures, 8),
        "thumbnail, 6 x 6": lambda pictures: thumbnails(pictures, 6),
        "thumbnail, 4 x 4": lambda pictures: thumbnails(pictures, 4),
    }


def score(index: PictureIndex, pictures: Tensor, wanted: Sequence[dict], leave_out: Tensor | None = None) -> dict:
    """Compare the neighbors of pictures (B, 3, H, W) with the wanted rows.

    Returns:
        Shares with their 95% Wilson intervals: the nearest neighbor has the name; it has name and style (left out
        if a wanted row names no style); one of the nearest five has the name. And the median distance to it.
    """
    distances, neighbors = index.search(pictures, TOP, leave_out)
    names = [[index.names[i] for i in row] for row in neighbors.tolist()]
    hits = {
        "name": [found[0] == row["name"] for found, row in zip(names, wanted)],
        f"name_in_top_{TOP}": [row["name"] in found for found, row in zip(names, wanted)],
    }
    if all("style" in row for row in wanted):
        styles = [index.styles[i] for i in neighbors[:, 0].tolist()]
        hits["name_and_style"] = [
            hit and style == row["style"] for hit, style, row in zip(hits["name"], styles, wanted)
        ]
    result: dict = {"count": len(wanted), "median_distance": round(distances[:, 0].median().item(), 4)}
    for key, values in hits.items():
        low, high = wilson_interval(sum(values), len(values))
        result[key] = {"share": round(sum(values) / len(values), 4), "low": round(low, 4), "high": round(high, 4)}
    return result


def measure_feature_space(
    index: PictureIndex, rows: Sequence[dict], pictures: Tensor, max_rows: int | None, seed: int
) -> dict:
    """Measure what the space tells apart: damaged real pictures, and real pictures whose own entry is left out."""
    space: dict = {"distorted": {}, "own_picture_left_out": {}}
    drawn = draw_rows(range(len(rows)), max_rows, seed)
    for name, distort in distortions(seed).items():
        space["distorted"][name] = score(index, distort(pictures[drawn]), [rows[i] for i in drawn])
    for style in sorted({row["style"] for row in rows}):
        chosen = torch.tensor(draw_rows([i for i, row in enumerate(rows) if row["style"] == style], max_rows, seed))
        wanted = [rows[i] | {} for i in chosen.tolist()]
        for row in wanted:
            del row["style"]  # the same name in another style is all that is left to find
        space["own_picture_left_out"][style] = score(index, pictures[chosen], wanted, leave_out=chosen)
    return space


def prompt_sets(rows: Sequence[dict], max_prompts: int | None, seed: int) -> dict[str, list[dict]]:
    """Return the prompts by set; `max_prompts` draws that many of each at random."""

    def styled(split: str) -> list[dict]:
        keys = ("name", "style")
        return [{key: r[key] for key in keys} | {"prompt": r["styled_prompt"]} for r in rows if r["split"] == split]

    def plain(chosen: Sequence[dict]) -> list[dict]:
        return list({row["name"]: {"name": row["name"], "prompt": row["prompt"]} for row in chosen}.values())

    sets = {
        "trained": styled("train"),
        "held_out": styled("validation"),
        "everyday": plain([row for row in rows if row["everyday"]]),
        "plain": plain(rows),
    }
    return {key: draw_rows(items, max_prompts, seed) for key, items in sets.items()}


def generate(pipe, prompts: Sequence[str], num_tokens: int, options: argparse.Namespace, bar: tqdm) -> Tensor:
    """Return one picture per prompt (B, 3, H, W); picture i has a generator of its own, so batches do not matter."""
    settings = chosen_settings(options, PRIOR_SETTINGS)
    batches = []
    for start, batch in chunks(prompts, options.batch_size, bar):
        generators = seeded_generators(options.seed + start, len(batch))
        output = pipe(list(batch), max_tokens=num_tokens, generator=generators, **settings)
        batches.append(stack_pictures(output.images))
    return torch.cat(batches)


def measure_pipeline(
    pipe, index: PictureIndex, rows: Sequence[dict], options: argparse.Namespace
) -> tuple[dict, list]:
    """Generate and reconstruct at every token count.

    Returns:
        Scores by set of prompts and token count, and rows of sample pictures for a contact sheet.
    """
    sets = prompt_sets(rows, options.max_prompts, options.seed)
    train_rows = [row for row in rows if row["split"] == "train"]
    to_reconstruct = draw_rows(train_rows, options.max_prompts, options.seed)
    results: dict = {key: {} for key in (*sets, "trained_shuffled", "reconstructions")}
    total = (sum(map(len, sets.values())) + len(to_reconstruct)) * len(options.token_counts)
    samples = []
    with tqdm(total=total, unit="picture") as bar:
        for count in options.token_counts:
            for key, wanted in sets.items():
                bar.set_description(f"{key}, {token_count_title(count)}")
                pictures = generate(pipe, [row["prompt"] for row in wanted], count, options, bar)
                results[key][count] = score(index, pictures, wanted)
                if key == "trained":
                    # Neighboring rows share a name: half the list away they do not.
                    results["trained_shuffled"][count] = score(index, pictures.roll(len(wanted) // 2, 0), wanted)
                if key == "everyday":
                    samples.append(pictures[:: max(1, len(pictures) // 12)][:12])
            bar.set_description(f"reconstructions, {token_count_title(count)}")
            pictures = reconstruct(pipe, [row["image"] for row in to_reconstruct], count, options, bar)
            results["reconstructions"][count] = score(index, pictures, to_reconstruct)
    return results, samples


def share_text(value: dict | None) -> str:
    """Return `81% (78 to 84)`."""
    return "" if value is None else f"{value['share']:.1%} ({100 * value['low']:.1f} to {100 * value['high']:.1f})"


def table_row(*cells: object) -> str:
    """Return one line of a Markdown table."""
    return "| " + " | ".join(map(str, cells)) + " |"


def score_cells(value: dict) -> list:
    """Return the cells of one score: count, shares with intervals, median distance."""
    keys = ("name", "name_and_style", f"name_in_top_{TOP}")
    return [value["count"], *(share_text(value.get(key)) for key in keys), f"{value['median_distance']:.2f}"]


def make_markdown(record: dict) -> str:
    """Return the record as tables for reading."""
    columns = ["count", "name", "name and style", f"name in the nearest {TOP}", "median distance"]
    lines = []
    if "results" in record:
        lines += [
            "# Prompt adherence",
            "",
            "Share of pictures whose nearest neighbor among the real pictures carries the wanted name, with 95% Wilson"
            " intervals.",
            "",
            f"- model {record['model']}, weights SHA-256 {record['weights_sha256'][:16]}",
            f"- {record['real_pictures']} real pictures of {record['names']} names; chance {1 / record['names']:.2%}",
            f"- settings {json.dumps(record['settings'])}, seed {record['seed']}, {record['wall_time_s']:.0f} s on"
            f" {record['device']}",
            "",
            table_row("pictures", "tokens", *columns),
            table_row(*["---"] * (len(columns) + 2)),
        ]
        for key, by_count in record["results"].items():
            lines += [table_row(key.replace("_", " "), count, *score_cells(v)) for count, v in by_count.items()]
        lines += [
            "",
            'Trained and held out: prompts with a style ("a 3d cat"). Everyday and plain: without ("a cat"), of'
            " everyday names and of all names. Reconstructions of training pictures bound what a perfect prior could"
            " reach; shuffled prompts show the floor.",
            "",
        ]
    space = record["feature_space"]
    lines += [
        "# What the feature space tells apart",
        "",
        "Blurred CIE Lab colors and histograms of oriented gradients, equally weighted; 1 is the mean distance (root"
        " mean square) of two different real pictures. Damaged real pictures, searched among all real pictures:",
        "",
        table_row("damage", *columns),
        table_row(*["---"] * (len(columns) + 1)),
        *(table_row(name, *score_cells(value)) for name, value in space["distorted"].items()),
        "",
        "Real pictures with their own entry left out, so that only other styles of the name can be found:",
        "",
        table_row("style", *columns),
        table_row(*["---"] * (len(columns) + 1)),
        *(table_row(style, *score_cells(value)) for style, value in space["own_picture_left_out"].items()),
    ]
    return "\n".join(lines) + "\n"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_common_arguments(parser)
    parser.add_argument("--max_prompts", type=int, help="draw this many prompts per set")
    parser.add_argument("--prior_guidance_scale", type=float, help="by default that of the pipeline")
    parser.add_argument("--temperature", type=float, help="by default that of the pipeline")
    parser.add_argument("--top_k", type=int, help="by default that of the pipeline")
    parser.add_argument("--top_p", type=float, help="by default that of the pipeline")
    parser.add_argument("--feature_space_only", action="store_true", help="measure the real pictures only, no model")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    rows = [row for row in load_rows(options.data) if row["style"] != "photo"]
    pictures = stack_pictures([row["image"] for row in rows])
    index = PictureIndex(pictures, [row["name"] for row in rows], [row["style"] for row in rows])
    record = {"real_pictures": len(rows), "names": len({row["name"] for row in rows}), "seed": options.seed}
    record["feature_space"] = measure_feature_space(index, rows, pictures, options.max_prompts, options.seed)
    if options.feature_space_only:
        write_results(options.output, "feature_space", record, make_markdown(record))
        return

    pipe = load_pipeline(options)
    start = time.perf_counter()
    record["results"], samples = measure_pipeline(pipe, index, rows, options)
    record |= describe_run(pipe, options, PRIOR_SETTINGS) | {"wall_time_s": round(time.perf_counter() - start, 1)}
    write_results(options.output, "adherence", record, make_markdown(record))
    titles = [token_count_title(count) for count in options.token_counts]
    sheet = contact_sheet([[to_pil(picture) for picture in row] for row in zip(*samples)], titles)
    save_picture(sheet, options.output / "adherence.png")


if __name__ == "__main__":
    main()
