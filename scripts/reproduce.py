r"""Run the study of docs/reproduction.md: data, models, measurements, summary. Finished steps are skipped.

    python scripts/reproduce.py --output runs/reproduction --results docs/results/reproduction

One flexible tokenizer, a two-dimensional grid, and one tokenizer per fixed length, all with the same recipe and budget
and a prior for each. `--toy` runs every step in miniature to check that it works; its results are meaningless.
"""

import argparse
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import reproduction_summary
import train_feature_network
from prepare_reproduction_data import main as prepare_data

from flextok_hf.utils.plain_errors import plain_errors


SCRIPTS = Path(__file__).parent
CONFIGS = SCRIPTS / "configs" / "reproduction"

# Changes of each tokenizer to the recipe.
MODELS: dict[str, dict[str, str]] = {
    "flexible": {},
    # registers have their own modulation; one more block gives the grid a similar number of parameters
    "grid": {"token_layout": "grid", "decoder_num_layers": "5"},
    "fixed-2": {"num_registers": "2", "full_length_probability": "1"},
    "fixed-4": {"num_registers": "4", "full_length_probability": "1"},
    "fixed-16": {"num_registers": "16", "full_length_probability": "1"},
}
MEASUREMENTS = ("reconstruction", "generation")
DETAIL_MODELS = ("flexible", "grid")  # measured for complexity; the others have a single length

TOY_DATA = {"num_train": "120", "num_validation": "40"}
TOY_TRAINING = {"max_train_steps": "4", "train_batch_size": "8", "lr_warmup_steps": "1"}
TOY_SAMPLING = {"num_inference_steps": "2", "batch_size": "20"}
TOY_MEASUREMENTS = {
    "reconstruction": TOY_SAMPLING | {"max_images": "40"},
    "generation": TOY_SAMPLING | {"max_prompts": "40"},
    "complexity": TOY_SAMPLING | {"max_prompts": "10"},
}


def flags(values: dict[str, str]) -> list[str]:
    """Return options as command line arguments."""
    return [word for name, value in values.items() for word in (f"--{name}", value)]


def training_steps(options: argparse.Namespace) -> Iterator[tuple[Path, list[str]]]:
    """Yield the output of each training run and its command."""
    data = ["--train_data", str(options.data / "train.parquet"), "--resume_from_checkpoint", "latest"]
    toy = flags(TOY_TRAINING) if options.toy else []
    for name, changes in MODELS.items():
        tokenizer, prior = (options.output / name / stage for stage in ("tokenizer", "prior"))
        common = [*data, *toy, "--output_dir"]
        recipe = ["tokenizer", "--config", str(CONFIGS / "tokenizer.yaml"), *flags(changes)]
        yield tokenizer / "pipeline", ["train.py", *recipe, *common, str(tokenizer)]
        recipe = ["prior", "--config", str(CONFIGS / "prior.yaml"), "--tokenizer", str(tokenizer / "pipeline")]
        yield prior / "pipeline", ["train.py", *recipe, *common, str(prior)]


def measuring_steps(options: argparse.Namespace) -> Iterator[tuple[Path, list[str]]]:
    """Yield the result file of each measurement and its command."""
    for name in MODELS:
        for kind in (*MEASUREMENTS, *(["complexity"] if name in DETAIL_MODELS else [])):
            folder = options.results / name
            values = {
                "config": str(CONFIGS / f"{kind}.yaml"),
                "data": str(options.data),
                "model": str(options.output / name / "prior" / "pipeline"),
                "model_name": name,
                "output": str(folder),
            }
            if kind in MEASUREMENTS:
                values["feature_network"] = str(options.output / "feature_network")
            if options.toy:
                values |= TOY_MEASUREMENTS[kind]
            yield folder / f"{kind}.json", ["evaluate.py", kind, *flags(values)]


def run(steps: Iterator[tuple[Path, list[str]]]) -> None:
    """Run the steps whose result does not exist yet, each in its own process."""
    for result, (script, *words) in steps:
        if result.exists():
            print(f"{result} exists, skipped")
            continue
        print(f"{result} ...", flush=True)
        subprocess.run([sys.executable, str(SCRIPTS / script), *words], check=True)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("data/reproduction"), help="data folder; created if missing")
    parser.add_argument("--output", type=Path, default=Path("runs/reproduction"), help="models and their checkpoints")
    parser.add_argument(
        "--results", type=Path, default=Path("docs/results/reproduction"), help="result files, curves, summary"
    )
    parser.add_argument("--toy", action="store_true", help="every step in miniature; use separate folders")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    options = parse_arguments(argv)
    if not (options.data / "validation.parquet").exists():
        prepare_data(["--output", str(options.data), *(flags(TOY_DATA) if options.toy else [])])
    network = options.output / "feature_network"
    if not (network / "training.json").exists():
        sizes = ["--label_column", "object", "--side", "24", "--hidden_sizes", "16", "32", "64", "32", "--flip"]
        words = ["--data", str(options.data), "--output", str(network), "--name", "shapes_resnet", *sizes]
        train_feature_network.main([*words, "--epochs", "1" if options.toy else "8", "--batch_size", "64"])
    run(training_steps(options))
    run(measuring_steps(options))
    reproduction_summary.write_summary(options.output, options.results, list(MODELS))
    print(f"Wrote {options.results / 'summary.md'}")


if __name__ == "__main__":
    with plain_errors():
        main()
