"""What counts as a number where a caller passes one."""

from numbers import Integral
from typing import Any


def is_whole_number(value: Any) -> bool:
    """Tell integers, of Python or NumPy, from booleans and floats."""
    return isinstance(value, Integral) and not isinstance(value, bool)
