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


def pad_token_ids(
    token_ids: Tensor | Sequence[Tensor], codebook_size: int, num_registers: int
) -> tuple[Tensor, list[int]]:
    """Combine sequences of equal or different lengths into one tensor.

    Args:
        token_ids: (B, k) integers, or B one-dimensional tensors of different lengths.
        codebook_size: ids must be below it.
        num_registers: maximum sequence length.

    Returns:
        Ids (B, longest), int64, padded with 0, and the length of each sequence.

    Raises:
        TypeError: if they are not integer tensors.
        ValueError: if there are none, one is empty or too long, or an id is out of range.
    """
    if isinstance(token_ids, Tensor):
        sequences = list(token_ids) if token_ids.ndim == 2 else [token_ids]
        if token_ids.ndim != 2 or token_ids.shape[0] == 0:
            raise ValueError(
                f"`token_ids` must have the shape (batch, num_tokens), got {tuple(token_ids.shape)}. For one image,"
                " add the batch dimension with `token_ids[None]`."
            )
    elif isinstance(token_ids, list | tuple):
        sequences = list(token_ids)
    else:
        raise TypeError(f"`token_ids` must be a tensor or a list of tensors, got {type(token_ids).__name__}.")
    if not sequences:
        raise ValueError("`token_ids` is empty. Pass at least one sequence.")
    for index, sequence in enumerate(sequences):
        check_sequence(sequence, f"`token_ids[{index}]`", codebook_size, num_registers)
    rows = [sequence.long() for sequence in sequences]  # padding would cast all rows to the first one's data type
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), [len(row) for row in rows]


def check_sequence(sequence: Any, name: str, codebook_size: int, num_registers: int) -> None:
    """Raise a TypeError or ValueError that starts with `name` unless `sequence` is a decodable (k,) tensor."""
    if not isinstance(sequence, Tensor) or sequence.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8):
        kind = sequence.dtype if isinstance(sequence, Tensor) else type(sequence).__name__
        raise TypeError(f"{name} must be a tensor of integers, got {kind}. Pass ids as `tokenize` returns them.")
    if sequence.ndim != 1 or not 1 <= len(sequence) <= num_registers:
        raise ValueError(
            f"{name} must contain 1 to {num_registers} ids in one dimension, got the shape {tuple(sequence.shape)}."
            " Truncate longer sequences with `token_ids[:, :n]`; never pad shorter ones."
        )
    low, high = int(sequence.min()), int(sequence.max())
    if low < 0 or high >= codebook_size:
        raise ValueError(
            f"{name} must lie in [0, {codebook_size}), the codebook, but ranges from {low} to {high}. The ids may come"
            " from another model, or still include a start token."
        )
