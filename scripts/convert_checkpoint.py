"""Convert official checkpoints to a model of this package; same as `flextok convert`.

python scripts/convert_checkpoint.py EPFL-VILAB/flextok_d18_d28_dfn --prior EPFL-VILAB/FlexAR-3B-T2I --output flextok
"""

import sys

from flextok_hf.cli import main


if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
