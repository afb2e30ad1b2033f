"""How time grows with tokens, images, steps and pixels, varied one at a time, at the d12-d12 size.

    python benchmarks/bench_scaling.py [--device cuda] [--results FOLDER]

Weights are random; float32 on a CPU, bfloat16 on a GPU. `--results` also gets a plot of the curves (requires
matplotlib). Last line: JSON.
"""

from pathlib import Path
from typing import Any

import harness
import models
import torch

from flextok_hf import FlexTokPipeline
from flextok_hf.utils.files import write_atomically


GUIDANCE_SCALE = 7.5
BASE = {"tokens": 32, "images": 1, "steps": 8, "pixels": 256}  # 8 steps are enough to trigger weight packing
VALUES = {
    "cpu": {
        "tokens": [1, 8, 32, 64, 128, 256],
        "images": [1, 2, 4],
        "steps": [1, 4, 8, 16, 32],
        "pixels": [128, 192, 256, 320],
    },
    "cuda": {
        "tokens": [1, 8, 32, 64, 128, 256],
        "images": [1, 4, 16, 64],
        "steps": [1, 4, 8, 16, 32],
        "pixels": [128, 256, 384, 512],
    },
}


def build_calls(pipe: FlexTokPipeline, tokens: int, images: int, steps: int, device: str) -> dict[str, harness.Call]:
    """Return calls in both directions, with inputs prepared outside of the timed code."""
    batch = torch.rand(images, 3, pipe.resolution, pipe.resolution, device=device)
    token_ids = torch.randint(0, pipe.codebook_size, (images, tokens), device=device)
    noise = pipe.prepare_latents(images)
    return {
        "tokenize": lambda: pipe.tokenize(batch, tokens),
        "detokenize": lambda: pipe.detokenize(token_ids, steps, GUIDANCE_SCALE, latents=noise, output_type="pt"),
    }


def draw_curves(rows: list[dict[str, Any]], path: Path) -> None:
    """Plot seconds per call, one panel for each quantity that was varied."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3))
    for place, name in enumerate(BASE, start=1):
        axes = figure.add_subplot(1, len(BASE), place)
        own = [row for row in rows if row["varied"] == name]
        for call in ("tokenize", "detokenize"):
            axes.plot(
                [row[name] for row in own], [row[f"{call}_s"] for row in own], marker="o", markersize=3, label=call
            )
        axes.set_xlabel(name)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("seconds per call")
    figure.axes[0].legend()
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=100, bbox_inches="tight"))


def main() -> None:
    parser = harness.build_parser(__doc__)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    dtype = torch.float32 if options.device == "cpu" else torch.bfloat16
    rows: list[dict[str, Any]] = []
    for name, values in VALUES[options.device].items():
        for value in values:
            point = BASE | {name: value}
            pipe = models.build_tokenizer("d12-d12", options.device, dtype, resolution=point.pop("pixels"))
            timings = harness.measure(
                build_calls(pipe, **point, device=options.device), options.device, options.repeats or 2
            )
            rows.append({"varied": name, **BASE, name: value, "timings": timings})
            rows[-1] |= {f"{call}_s": timing["median_s"] for call, timing in timings.items()}
            print({key: harness.show(entry) for key, entry in rows[-1].items() if key != "timings"}, flush=True)
    table = harness.print_table(rows, ["varied", *BASE, "tokenize_s", "detokenize_s"])
    record = {"machine": harness.describe_machine(options.device), "rows": rows}
    harness.finish("scaling", record, [table], options.results)
    if options.results is not None:
        draw_curves(rows, options.results / "scaling.png")


if __name__ == "__main__":
    main()
