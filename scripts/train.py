"""Train a stage of FlexTok.

accelerate launch scripts/train.py vae --config scripts/configs/embedded_vae.yaml
accelerate launch scripts/train.py tokenizer --config scripts/configs/embedded_tokenizer.yaml
accelerate launch scripts/train.py prior --config scripts/configs/embedded_prior.yaml
accelerate launch scripts/train.py distill --config scripts/configs/embedded_distill.yaml
"""

import argparse
import logging
import sys

from flextok_hf.training.arguments import PriorArguments, TokenizerArguments, VaeArguments
from flextok_hf.training.distillation_arguments import DistillationArguments
from flextok_hf.training.distillation_stage import train_distillation
from flextok_hf.training.stages import train_prior, train_tokenizer, train_vae
from flextok_hf.utils.option_parsing import parse_arguments
from flextok_hf.utils.plain_errors import plain_errors


STAGES = {
    "vae": (VaeArguments, train_vae),
    "tokenizer": (TokenizerArguments, train_tokenizer),
    "prior": (PriorArguments, train_prior),
    "distill": (DistillationArguments, train_distillation),
}


def main(argv: list[str]) -> None:
    """Run the stage given by the first argument with the options that follow."""
    parser = argparse.ArgumentParser(prog="train.py", description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=STAGES, help="`--help` after it lists its options")
    stage = parser.parse_args(argv[:1]).stage
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    kind, train = STAGES[stage]
    try:
        arguments = parse_arguments(kind, argv[1:])
    except ValueError as error:
        parser.error(str(error))
    folder = train(arguments)
    print(f"Saved {folder}")


if __name__ == "__main__":
    with plain_errors():
        main(sys.argv[1:])
