"""The `flextok` command: `flextok_hf` starts without PyTorch if this module is loaded before it."""

from flextok_hf.cli import main as main
