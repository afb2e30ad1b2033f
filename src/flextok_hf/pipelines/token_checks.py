"""Checks of token counts and token ids; errors say what is allowed and how to fix the call."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..models.nested_dropout import token_ladder
from ..utils.numbers import is_whole_number
from .input_checks import brief


def as_list(values: Any) -> list | None:
    """Return the entries of a list, tuple, range, array or tensor, of tensors as Python numbers; `None` for others."""
    if isinstance(values, Tensor | np.ndarray):
        values = values.tolist()
    if not isinstance(values, list | tuple | range):
        return None
    return [value.item() if isinstance(value, Tensor | np.ndarray) and value.ndim == 0 else value for value in values]


def resolve_max_tokens(max_tokens: Any, batch_size: int, num_registers: int) -> list[int]:
    """Turn `max_tokens`, an upper bound, into one token count per sample.

    Args:
        max_tokens: one bound for all, one per sample, or `None` for `num_registers`; also as an array or a tensor.
        batch_size: number of samples.
        num_registers: maximum sequence length; larger bounds mean this one.

    Raises:
        ValueError: if a bound is not a whole number of 1 or more, or their number differs from `batch_size`.
    """
    bounds = as_list(max_tokens)
    if bounds is None:
        return [resolve_count(max_tokens, "max_tokens", num_registers)] * batch_size
    if len(bounds) != batch_size:
        raise ValueError(
            f"`max_tokens` has {len(bounds)} values, but there are {batch_size} prompts, classes or images. Pass one"
            " number for all, or a list with one each."
        )
    return [resolve_count(bound, "max_tokens", num_registers) for bound in bounds]


def resolve_count(count: Any, name: str, num_registers: int) -> int:
    """Return one upper bound as a token count; `None` means `num_registers`, and so does a larger number.

    Raises:
        ValueError: if it is not a whole number of 1 or more.
    """
    if isinstance(count, Tensor | np.ndarray) and count.ndim == 0:
        count = count.item()
    if count is None:
        return num_registers
    if not is_whole_number(count) or count < 1:
        raise ValueError(
            f"`{name}` must be a whole number of 1 or more, got {brief(count)}. An image needs at least one token, and"
            f" {num_registers} or more are all."
        )
    return min(int(count), num_registers)


def resolve_counts(token_counts: Any, name: str, num_registers: int) -> list[int]:
    """Return token counts, each at most `num_registers`; `None` means 1, 2, 4, ... up to all, a number just this one.

    Raises:
        ValueError: if there are none, or one is not a whole number of 1 or more.
    """
    if token_counts is None:
        return token_ladder(num_registers)
    counts = as_list(token_counts)
    if counts == []:
        raise ValueError(f"`{name}` is an empty list. Pass at least one number of tokens.")
    if counts is not None and None in counts:
        raise ValueError(f"`{name}` must be whole numbers of 1 or more, got {brief(token_counts)}.")
    return [resolve_count(count, name, num_registers) for count in ([token_counts] if counts is None else counts)]


def check_token_counts(token_counts: Any, num_registers: int) -> list[int]:
    """Return increasing token counts, each at most `num_registers`; `None` means 1, 2, 4, ... up to all.

    Raises:
        ValueError: if there are none, one is not a whole number of 1 or more, or they do not increase.
    """
    counts = resolve_counts(token_counts, "token_counts", num_registers)
    asked = as_list(token_counts)
    if asked is not None and asked != sorted(set(asked)):
        raise ValueError(f"`token_counts` must be growing numbers, such as [1, 4, 16], got {brief(token_counts)}.")
    return list(dict.fromkeys(counts))


def check_keep_tokens(keep_tokens: Any, limit: int, reason: str) -> None:
    """Raise a ValueError unless `keep_tokens` is a whole number from 1 to `limit`."""
    if not is_whole_number(keep_tokens) or not 1 <= keep_tokens <= limit:
        raise ValueError(
            f"`keep_tokens` must be a whole number from 1 to {limit} ({reason}), got {brief(keep_tokens)}. It is the"
            " number of image tokens to keep; the prior generates the rest."
        )


def check_prefix_ids(token_ids: Any, keep_tokens: Any, codebook_size: int, num_registers: int) -> Tensor:
    """Return the first `keep_tokens` ids to continue from, (B, p); all of them if it is `None`.

    Raises:
        ValueError: if there are fewer, or the rows differ in length and `keep_tokens` is `None`.
    """
    padded_ids, lengths = pad_token_ids(token_ids, codebook_size, num_registers)
    if keep_tokens is not None:
        check_keep_tokens(keep_tokens, min(lengths), "the length of the shortest row of `token_ids`")
    elif min(lengths) < max(lengths):
        raise ValueError(
            f"`token_ids` has rows of {min(lengths)} to {max(lengths)} ids, but all images must continue from the same"
            f" number. Set `keep_tokens` to at most {min(lengths)}."
        )
    return padded_ids[:, :keep_tokens]


def check_prefix_fits(prefix: Tensor, num_conditions: int, counts: Sequence[int]) -> None:
    """Raise a ValueError if a prefix (1 or prompts, p) does not match the number of prompts or exceeds a count."""
    if prefix.shape[0] not in (1, num_conditions):
        raise ValueError(
            f"{prefix.shape[0]} images or rows of `token_ids` do not match {num_conditions} prompts or classes. Pass"
            " one for all, or one each."
        )
    if prefix.shape[1] > min(counts):
        raise ValueError(
            f"{prefix.shape[1]} tokens are kept, but an image may have only {min(counts)}. Keep fewer (`keep_tokens`),"
            " or allow more (`max_tokens`, `token_counts`)."
        )


def pad_token_ids(token_ids: Any, codebook_size: int, num_registers: int) -> tuple[Tensor, list[int]]:
    """Combine sequences of equal or different lengths into one tensor.

    Args:
        token_ids: (B, k) integers as a tensor, an array or lists; or B such rows of different lengths, also as a
            column of `datasets`.
        codebook_size: ids must be below it.
        num_registers: maximum sequence length.

    Returns:
        Ids (B, longest), int64, on the CPU, padded with 0, and the length of each sequence.

    Raises:
        TypeError: if they are not rows of integers.
        ValueError: if there are none, a row is empty or too long, or an id is out of range.
    """
    if not isinstance(token_ids, Tensor | np.ndarray | Sequence) or isinstance(token_ids, str | bytes):
        raise TypeError(
            f"`token_ids` must be a tensor, an array or a list of rows of integers, got {type(token_ids).__name__}."
        )
    rows = [token_ids] if getattr(token_ids, "ndim", 1) == 0 else list(token_ids)
    if not rows:
        raise ValueError("`token_ids` is empty. Pass at least one sequence.")
    if any(is_whole_number(row) or getattr(row, "ndim", 1) == 0 for row in rows):
        raise ValueError(
            "`token_ids` must have the shape (batch, num_tokens), but has no batch dimension. For one image, pass"
            " `token_ids[None]` of a tensor or an array, or `[token_ids]` of a list."
        )
    names = [f"`token_ids[{index}]`" for index in range(len(rows))]
    sequences = [check_sequence(row, name, codebook_size, num_registers) for row, name in zip(rows, names)]
    tensors = [torch.from_numpy(np.array(ids, dtype=np.int64)) for ids in sequences]  # faster than from a list
    padded_ids = torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True)
    return padded_ids, [len(ids) for ids in sequences]


def check_sequence(row: Any, name: str, codebook_size: int, num_registers: int) -> list[int]:
    """Return a row of ids as numbers; raise a TypeError or ValueError that starts with `name` if it is no such row."""
    ids = row.tolist() if isinstance(row, Tensor | np.ndarray) else as_list(row)
    if ids is None or set(map(type, ids)) != {int}:  # a fast check first: there may be thousands of ids
        wrong = [row] if ids is None else [entry for entry in ids if not is_whole_number(entry)]
        if ids is None or wrong:
            raise TypeError(
                f"{name} must be a row of integers, got {brief(wrong[0])}. Pass ids as `tokenize` returns them."
            )
        ids = [int(token_id) for token_id in ids]
    if not 1 <= len(ids) <= num_registers:
        raise ValueError(
            f"{name} must contain 1 to {num_registers} ids, got {len(ids)}. Truncate longer sequences with"
            " `token_ids[:, :n]`; never pad shorter ones."
        )
    low, high = min(ids), max(ids)
    if low < 0 or high >= codebook_size:
        raise ValueError(
            f"{name} must lie in [0, {codebook_size}), the codebook, but ranges from {brief(low)} to {brief(high)}."
            " The ids may come from another model, or still include a start token."
        )
    return ids
