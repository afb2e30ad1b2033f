"""Paths in the repository that tests use."""

from pathlib import Path


ROOT = Path(__file__).parents[1]
FIXTURES = ROOT / "tests" / "fixtures"
SCRIPTS = ROOT / "scripts"
PHOTO = ROOT / "docs" / "assets" / "parrots.jpg"
