"""The command line: `arguments.py` reads and checks what the user typed, `commands.py` does it.

Imports every other folder, but only once the arguments are known to be good: `flextok --help` loads no PyTorch.
"""

from .arguments import build_parser, main


__all__ = ["build_parser", "main"]
