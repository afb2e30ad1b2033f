"""Train a stage of FlexTok.

accelerate launch scripts/train.py vae --config scripts/configs/embedded_vae.yaml
accelerate launch scripts/train.py tokenizer --config scripts/configs/embedded_tokenizer.yaml
accelerate launch scripts/train.py prior --config scripts/configs/embedded_prior.yaml
"""

import logging
import sys

from flextok_hf.training.arguments import PriorArguments, TokenizerArguments, VaeArguments
from flextok_hf.training.stages import train_prior, train_tokenizer, train_vae
from flextok_hf.utils.option_parsing import parse_arguments


STAGES = {
    "vae": (VaeArguments, train_vae),
    "tokenizer": (TokenizerArguments, train_tokenizer),
    "prior": (PriorArguments, train_prior),
}


def main(argv: list[str]) -> None:
    """Run the stage given by the first argument with the options that follow."""
    if not argv or argv[0] not in STAGES:
        raise SystemExit(
            f"usage: train.py {{{','.join(STAGES)}}} [--config FILE] [OPTIONS]; --help after the stage lists them"
        )
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    kind, train = STAGES[argv[0]]
    folder = train(parse_arguments(kind, argv[1:]))
    print(f"Saved {folder}")


if __name__ == "__main__":
    main(sys.argv[1:])
