"""Type checks for numbers passed by callers."""

import math
from numbers import Integral, Real
from typing import Any


def is_whole_number(value: Any) -> bool:
    """Return whether `value` is a Python or NumPy integer, but not a boolean."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_finite_number(value: Any) -> bool:
    """Return whether `value` is a finite Python or NumPy number that fits a float, but not a boolean."""
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number of more than 308 digits
        return False
