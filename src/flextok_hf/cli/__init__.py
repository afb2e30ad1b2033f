"""The command line: `arguments.py` and `checks.py` parse and check the arguments, `commands.py` runs the commands.

Imports every other folder, but only after the arguments have been checked: `flextok --help` does not load PyTorch.
"""

from .arguments import build_parser as build_parser
from .arguments import main as main
