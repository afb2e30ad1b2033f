"""Write a model card from configuration, recipe and result files, and copy these files next to it.

    python scripts/write_model_card.py --model src/flextok_hf/embedded_model --results docs/results/embedded \
        --facts scripts/configs/embedded_card.yaml --images docs/assets/strip.webp

`flextok_hf.cards.model_card` describes these files. Results measured on other weights are refused.
"""

import argparse
import shutil
from pathlib import Path

from torch import nn

from flextok_hf import FlexTokPipeline
from flextok_hf.cards.model_card import FACTS_FILE, IMAGES_FOLDER, RESULTS_FOLDER, write_model_card
from flextok_hf.utils.files import read_json
from flextok_hf.utils.measures import weights_hash
from flextok_hf.utils.plain_errors import plain_errors


def check_results(model: Path, results: list[Path]) -> None:
    """Raise a ValueError if a result file was not measured on the weights of this model."""
    pipe = FlexTokPipeline.from_pretrained(model)
    expected = weights_hash({name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)})
    for path in results:
        measured = read_json(path).get("weights_sha256")
        if measured != expected:
            raise ValueError(
                f"{path} was measured on weights {str(measured)[:16]}, but {model} has {expected[:16]}. Measure again."
            )


def copy_beside(files: list[Path], folder: Path) -> None:
    """Replace the content of a folder with copies of these files, which may be in it.

    Raises:
        ValueError: if two files have the same name.
    """
    contents = {path.name: path.read_bytes() for path in files}
    if len(contents) < len(files):
        raise ValueError(f"Two of {', '.join(map(str, files))} have the same name; rename one.")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in contents.items():
        (folder / name).write_bytes(content)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of the pipeline; README.md is written there")
    parser.add_argument("--name", help="name that users load the model by (default: the folder name)")
    parser.add_argument("--facts", type=Path, help="YAML file with title, license, data and limits")
    parser.add_argument("--results", type=Path, help="folder with result files")
    parser.add_argument("--images", type=Path, nargs="+", default=[], help="images to show")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    if options.facts:
        (options.model / FACTS_FILE).write_bytes(options.facts.read_bytes())
    if options.results:
        results = [path for path in sorted(options.results.glob("*.json")) if read_json(path).get("results")]
        check_results(options.model, results)
        copy_beside(results, options.model / RESULTS_FOLDER)
    if options.images:
        copy_beside(options.images, options.model / IMAGES_FOLDER)
    print(write_model_card(options.model, options.name))


if __name__ == "__main__":
    with plain_errors():
        main()
