"""Ablate the training of a small tokenizer, one change at a time with several seeds each, and write a table.

    python scripts/ablate_tokenizer.py --config scripts/configs/ablation_tokenizer.yaml --output docs/results/ablations

All variants train on the same number of images, except `joint_lengths_same_work`: as much compute as the baseline.
Finished runs are kept in `output_dir` of the configuration and not repeated, so the script can be stopped at any time.
"""

import argparse
import json
import statistics
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from flextok_hf import FlexTokPipeline
from flextok_hf.data.columns import Columns
from flextok_hf.data.samples import ImageTransform
from flextok_hf.data.training_dataset import load_training_dataset
from flextok_hf.models.nested_dropout import token_ladder
from flextok_hf.pipelines.flow import add_noise, velocity_target
from flextok_hf.training.arguments import TokenizerArguments
from flextok_hf.training.collapse import count_distinct
from flextok_hf.training.stages import train_tokenizer
from flextok_hf.utils.files import read_json, write_text
from flextok_hf.utils.measures import peak_signal_to_noise
from flextok_hf.utils.option_parsing import parse_arguments
from flextok_hf.utils.plain_errors import plain_errors


SAME_WORK = "joint_lengths_same_work"
VARIANTS: dict[str, dict[str, Any]] = {
    "baseline": {},
    "uniform": {"keep_mode": "uniform"},
    "uniform_rounded_up": {"keep_mode": "uniform_rounded_up"},
    "half_at_full_length": {"full_length_probability": 0.5},
    "joint_lengths": {"joint_lengths": True},
    SAME_WORK: {"joint_lengths": True},  # and fewer steps
    "dropped_tokens_removed": {"remove_dropped": True},
    "null_condition_0": {"null_condition_probability": 0.0},
    "null_condition_0.3": {"null_condition_probability": 0.3},
    "no_aids_against_collapse": {"unrounded_probability": 0.0, "feature_penalty": 0.0},
    "correlation_penalty": {"correlation_penalty": 0.5},
}
NUM_IMAGES = 256  # held-out
NOISE_LEVELS = (0.3, 0.5, 0.7, 0.9)  # where the loss is measured
EULER_STEPS, GUIDANCE = 8, 2.0


@torch.no_grad()
def evaluate(pipe: FlexTokPipeline, images: torch.Tensor) -> dict[str, float]:
    """Measure a tokenizer on held-out images (B, 3, R, R) in [-1, 1], with the same noise for every model."""
    pipe.set_progress_bar_config(disable=True)
    features = pipe.encoder.compute_features(images)
    codes = pipe.encoder.quantizer(features)
    token_ids = pipe.encoder.quantizer.codes_to_ids(codes)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    figures = {"distinct_ids": count_distinct(token_ids).item()}
    counts = token_ladder(pipe.num_registers)
    for count in counts:
        losses = []
        for level in NOISE_LEVELS:
            sigma = torch.full((len(images),), level)
            velocity = pipe.decoder(add_noise(images, noise, sigma), sigma, codes[:, :count]).velocity
            losses.append((velocity - velocity_target(images, noise)).square().mean().item())
        figures[f"loss_{count}"] = statistics.mean(losses)
        for name, guidance_scale in (("psnr", 1.0), ("guided_psnr", GUIDANCE)):
            decoded = pipe.detokenize(
                token_ids[:, :count], EULER_STEPS, guidance_scale, latents=noise, output_type="pt"
            ).images
            figures[f"{name}_{count}"] = peak_signal_to_noise(decoded, images / 2 + 0.5).mean().item()
    return figures


def steps_of_same_work(log: Path, joint_log: Path, steps: int) -> int:
    """Return how many steps with joint lengths cost as much as `steps` without, by the FLOPs in the logs."""

    def work_per_image(path: Path) -> float:
        entry = json.loads(path.read_text().splitlines()[0])
        return entry["tflops_per_process"] / entry["images_per_s"]

    return round(steps * work_per_image(log) / work_per_image(joint_log))


def run_variant(base: TokenizerArguments, name: str, seed: int, images: torch.Tensor) -> dict[str, float]:
    """Train one variant with one seed and measure it; reuse the result if there is one of the same options."""
    folder = Path(base.output_dir) / f"{name}-{seed}"
    result = folder / "figures.json"
    arguments = replace(base, **VARIANTS[name], output_dir=str(folder), seed=seed, resume_from_checkpoint="latest")
    if name == SAME_WORK:
        logs = [Path(base.output_dir) / f"{other}-{seed}" / "log.jsonl" for other in ("baseline", "joint_lengths")]
        arguments = replace(arguments, max_train_steps=steps_of_same_work(*logs, base.max_train_steps))
    asked = json.loads(json.dumps(asdict(arguments), default=str))
    known = read_json(result, {})
    if "arguments" in known:
        changed = [key for key, value in asked.items() if known["arguments"].get(key) != value]
        if changed:
            raise ValueError(f"{folder} holds a run with other {', '.join(changed)}. Choose another `output_dir`.")
        return known["figures"]
    pipe = FlexTokPipeline.from_pretrained(train_tokenizer(arguments))
    figures = evaluate(pipe, images)
    write_text(result, json.dumps({"arguments": asked, "figures": figures}, indent=2))
    return figures


def table(results: dict[str, list[dict[str, float]]], columns: list[str]) -> str:
    """Return a Markdown table of means over seeds, plus or minus half the range."""
    lines = ["| variant | " + " | ".join(columns) + " |", "|" + " --- |" * (len(columns) + 1)]
    for name, runs in results.items():
        cells = []
        for column in columns:
            values = [run[column] for run in runs]
            digits = 4 if column.startswith("loss") else 2
            cells.append(f"{statistics.mean(values):.{digits}f} \u00b1 {(max(values) - min(values)) / 2:.{digits}f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, help="YAML file with the baseline configuration")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--train_data", nargs="+", help="replaces both datasets of the configuration")
    parser.add_argument("--validation_data", nargs="+", help="validation data, with --train_data")
    parser.add_argument("--output", type=Path, required=True, help="folder for table.md and figures.json")
    options = parser.parse_args()
    if options.validation_data and not options.train_data:
        parser.error("--validation_data needs --train_data, which replaces both datasets of the configuration")
    base = parse_arguments(TokenizerArguments, ["--config", options.config])
    if options.train_data:
        base = replace(base, train_data=options.train_data, validation_data=options.validation_data)

    held_out = load_training_dataset(
        base.validation_data or base.train_data,
        "validation",
        transform=ImageTransform(base.resolution),
        columns=Columns(base.image_column),
        max_samples=NUM_IMAGES,
    )
    images = torch.stack([held_out[row]["pixel_values"] for row in range(len(held_out))])
    results: dict[str, list[dict[str, float]]] = {name: [] for name in options.variants}
    for seed in options.seeds:  # seeds in the outer loop: an interrupted run still leaves a complete table
        for name in options.variants:
            results[name].append(run_variant(base, name, seed, images))
            print(name, seed, results[name][-1], flush=True)
        options.output.mkdir(parents=True, exist_ok=True)
        record = {"arguments": vars(base), "seeds": options.seeds[: len(results[name])], "results": results}
        record["held_out"] = len(images)
        text = json.dumps(record, indent=2, default=str)
        write_text(options.output / "figures.json", text)
        shown = [name for name in results[options.variants[0]][0] if not name.startswith("guided")]
        tables = "\n\n".join(table(results, columns) for columns in (shown[:1] + shown[1::2], shown[2::2]))
        write_text(options.output / "table.md", tables + "\n")


if __name__ == "__main__":
    with plain_errors():
        main()
