"""Type checks for numbers passed by callers."""

from numbers import Integral
from typing import Any


def is_whole_number(value: Any) -> bool:
    """Return whether `value` is a Python or NumPy integer, but not a boolean."""
    return isinstance(value, Integral) and not isinstance(value, bool)
