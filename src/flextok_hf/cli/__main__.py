"""`python -m flextok_hf.cli` is the command `flextok`."""

from .arguments import main


raise SystemExit(main())
