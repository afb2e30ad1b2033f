"""`python -m flextok_hf.cli` is the same as the command `flextok`."""

import sys

from .arguments import main


sys.exit(main())
