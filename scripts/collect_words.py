"""Write down in a trained model which words its captions have, as training does, for models that lack them.

    python scripts/collect_words.py --model runs/prior/pipeline --train_data data/captioned --caption_column text

The pipeline then warns of words in prompts that the model was not trained on, and `flextok info --names` lists those
it was. Only the configuration of the prior changes.
"""

import argparse
import json
from pathlib import Path

from flextok_hf.data.image_dataset import caption_rows
from flextok_hf.data.sources import load_rows
from flextok_hf.utils.files import read_json, write_text
from flextok_hf.utils.plain_errors import plain_errors
from flextok_hf.utils.words import MAX_CAPTION_ROWS, collect_words


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of a pipeline whose prior reads text")
    parser.add_argument("--train_data", nargs="+", required=True, help="what the prior was trained on, as in training")
    parser.add_argument("--caption_column", default="text", help="column of captions, strings or lists of them (text)")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    path = options.model / "prior" / "config.json"
    config = read_json(path)
    rows = load_rows(options.train_data, "train")
    if options.caption_column not in rows.column_names:
        raise ValueError(
            f"`caption_column` is {options.caption_column!r}, but the data set has {', '.join(rows.column_names)}."
        )
    names, words = collect_words(caption_rows(rows, options.caption_column, MAX_CAPTION_ROWS))
    config |= {"known_names": names, "known_words": words}
    write_text(path, json.dumps(config, indent=2, sort_keys=True) + "\n")
    print(f"{options.model}: {len(names)} names, {len(words)} words")


if __name__ == "__main__":
    with plain_errors():
        main()
