"""Evaluate a model, or compare two measurements.

    python scripts/evaluate.py reconstruction --data data/embedded128 --output docs/results/embedded
    python scripts/evaluate.py generation --data data/embedded128 --output docs/results/embedded --max_prompts 100
    python scripts/evaluate.py complexity --data data/embedded128 --output docs/results/embedded --max_prompts 100
    python scripts/evaluate.py steps --data data/embedded128 --output docs/results/embedded --max_images 64
    python scripts/evaluate.py two_objects --data data/next_canvases128 --drawings data/next_prompts128 --output out
    python scripts/evaluate.py compare first/reconstruction.json second/reconstruction.json

Several processes share the work under `accelerate launch` or `torchrun`. An interrupted measurement resumes when
started again with the same options. Its main table is printed at the end. Requires the extra `flextok_hf[eval]`.
"""

import argparse
import sys
from pathlib import Path

from flextok_hf.evaluation.complexity import Complexity
from flextok_hf.evaluation.generation import Generation
from flextok_hf.evaluation.options import ComplexityOptions, GenerationOptions, ReconstructionOptions
from flextok_hf.evaluation.reconstruction import Reconstruction
from flextok_hf.evaluation.results import compare_records, read_record
from flextok_hf.evaluation.steps import Steps, StepsOptions
from flextok_hf.evaluation.two_objects import TwoObjects, TwoObjectsOptions
from flextok_hf.utils.option_parsing import parse_arguments
from flextok_hf.utils.plain_errors import plain_errors
from flextok_hf.utils.tables import first_table, markdown_table


MEASUREMENTS = {
    "reconstruction": (ReconstructionOptions, Reconstruction),
    "generation": (GenerationOptions, Generation),
    "complexity": (ComplexityOptions, Complexity),
    "steps": (StepsOptions, Steps),
    "two_objects": (TwoObjectsOptions, TwoObjects),
}


def compare(argv: list[str]) -> str:
    """Return a table of all metrics that two result files share."""
    parser = argparse.ArgumentParser(prog="evaluate.py compare", description=compare.__doc__)
    parser.add_argument("paths", nargs=2, metavar="RECORD.json", help="result file of a measurement")
    paths = parser.parse_args(argv).paths
    rows = compare_records(*map(read_record, paths))
    cells = [[name, f"{a:.4f}", f"{b:.4f}", f"{d:+.4f}", "yes" if apart else ""] for name, a, b, d, apart in rows]
    return markdown_table(["figure", "first", "second", "difference", "intervals apart"], cells)


def main(argv: list[str]) -> None:
    """Run the command given by the first argument with the options that follow."""
    parser = argparse.ArgumentParser(prog="evaluate.py", description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=(*MEASUREMENTS, "compare"), help="`--help` after it lists its options")
    command = parser.parse_args(argv[:1]).command
    if command == "compare":
        print(compare(argv[1:]))
        return
    kind, measurement = MEASUREMENTS[command]
    options = parse_arguments(kind, argv[1:])
    if measurement(options).measure():  # only the main process has a record
        path = Path(options.output) / command
        print(f"{first_table(path.with_suffix('.md').read_text(encoding='utf-8'))}\n\nWrote {path}.json")


if __name__ == "__main__":
    with plain_errors():
        main(sys.argv[1:])
