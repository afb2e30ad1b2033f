"""`python -m flextok_hf.cli` is the command `flextok`."""

import sys

from .arguments import main


sys.exit(main())
