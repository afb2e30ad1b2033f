"""The number of decoder steps that a saved model names: one, or a table by the number of tokens."""

from collections.abc import Mapping
from typing import Any

from ..utils.numbers import is_whole_number


NUM_INFERENCE_STEPS = 20  # of models that name none
MAX_STEPS = 1000  # Diffusers' default `num_train_timesteps`, the most that its schedulers take


def check_default_steps(steps: Any) -> None:
    """Raise a ValueError unless `steps` is `None`, a number of steps, or a table {tokens: steps} of them."""
    is_table = isinstance(steps, Mapping) and len(steps) > 0
    counts = list(steps) if is_table else []
    numbers = list(steps.values()) if is_table else [] if steps is None else [steps]
    has_counts = all(is_count(count) for count in counts) and len({int(count) for count in counts}) == len(counts)
    if not has_counts or not all(is_whole_number(number) and 1 <= number <= MAX_STEPS for number in numbers):
        raise ValueError(
            f"`default_num_inference_steps` must be a whole number from 1 to {MAX_STEPS}, or a table of them by number"
            f" of tokens such as {{1: 40, 4: 20}}, got {repr(steps)[:200]}."
        )


def is_count(count: Any) -> bool:
    """Whether a key of the table is a number of tokens; JSON files hold it as a string."""
    if isinstance(count, str):
        return count.isascii() and count.isdecimal() and len(count) < 10 and int(count) >= 1
    return is_whole_number(count) and count >= 1


def steps_for(steps: int | Mapping[Any, int] | None, num_tokens: int) -> int:
    """Return the number of steps for an image of `num_tokens` tokens.

    An entry of a table holds from its number of tokens up to the next entry, and the first one also below: few tokens
    need the most steps, so that what lies between two measured counts gets the steps of the lower one.
    """
    if steps is None:
        return NUM_INFERENCE_STEPS
    if not isinstance(steps, Mapping):
        return int(steps)
    table = {int(count): int(number) for count, number in steps.items()}
    reached = [count for count in table if count <= num_tokens]
    return table[max(reached) if reached else min(table)]
