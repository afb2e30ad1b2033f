"""Checks of the pipeline's arguments; errors say what is allowed and how to fix the call."""

import difflib
import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..models.configuration_prior import FlexTokPriorConfig
from ..models.nested_dropout import token_ladder
from ..utils.numbers import is_whole_number
from .guidance import check_guidance


def resolve_max_tokens(max_tokens: int | Sequence[int] | None, batch_size: int, num_registers: int) -> list[int]:
    """Turn `max_tokens`, an upper bound, into one token count per sample.

    Args:
        max_tokens: one bound for all, one per sample, or `None` for `num_registers`.
        batch_size: number of samples.
        num_registers: maximum sequence length; larger bounds mean this one.

    Raises:
        ValueError: if a bound is not a whole number of 1 or more, or their number differs from `batch_size`.
    """
    if isinstance(max_tokens, Tensor | np.ndarray):
        max_tokens = max_tokens.tolist()
    bounds: Any = [num_registers] * batch_size if max_tokens is None else max_tokens
    if not isinstance(bounds, list | tuple):
        bounds = [bounds] * batch_size
    if len(bounds) != batch_size:
        raise ValueError(
            f"`max_tokens` has {len(bounds)} values for {batch_size} images or prompts. Pass one number for all, or"
            " a list with one each."
        )
    for bound in bounds:
        if not is_whole_number(bound) or bound < 1:
            raise ValueError(
                f"`max_tokens` must be whole numbers of 1 or more, got {bound!r}. An image needs at least one token;"
                f" omit `max_tokens` to use all {num_registers}."
            )
    return [min(int(bound), num_registers) for bound in bounds]


def check_token_counts(token_counts: Any, num_registers: int) -> list[int]:
    """Return increasing token counts, each at most `num_registers`; `None` means 1, 2, 4, ... up to all.

    Raises:
        ValueError: if there are none, one is not a whole number of 1 or more, or they do not increase.
    """
    if token_counts is None:
        return token_ladder(num_registers)
    is_several = isinstance(token_counts, list | tuple | range | np.ndarray)
    asked = list(token_counts) if is_several else [token_counts]
    counts = resolve_max_tokens(asked, len(asked), num_registers)
    if not asked or asked != sorted(set(asked)):
        raise ValueError(f"`token_counts` must be growing numbers, such as [1, 4, 16], got {token_counts!r}.")
    return list(dict.fromkeys(counts))


def check_keep_tokens(keep_tokens: Any, limit: int, reason: str) -> None:
    """Raise a ValueError unless `keep_tokens` is a whole number from 1 to `limit`."""
    if not is_whole_number(keep_tokens) or not 1 <= keep_tokens <= limit:
        raise ValueError(
            f"`keep_tokens` must be a whole number from 1 to {limit} ({reason}), got {keep_tokens!r}. It is the"
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


def check_prompts(prompt: Any) -> list[str]:
    """Return the prompts as a list; an empty string is allowed and means unconditional.

    Raises:
        TypeError: if `prompt` is neither a string nor a list of strings.
        ValueError: if the list is empty.
    """
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, list | tuple) or not all(isinstance(text, str) for text in prompts):
        raise TypeError(f"`prompt` must be a string or a list of strings, got {prompt!r}.")
    if len(prompts) == 0:
        raise ValueError("`prompt` is an empty list. Pass at least one prompt.")
    return list(prompts)


def check_class_labels(class_labels: Any, config: FlexTokPriorConfig) -> Tensor:
    """Return class labels as a (B,) int64 tensor; names are looked up in `config.id2label`.

    Raises:
        TypeError: if they are neither whole numbers nor names.
        ValueError: if there are none, one is out of range or unknown, or the prior has no classes.
    """
    if config.num_classes is None:
        raise ValueError("`class_labels` were passed, but this model's prior has no classes. Pass a `prompt` instead.")
    labels = class_labels.tolist() if isinstance(class_labels, Tensor | np.ndarray) else class_labels
    labels = labels if isinstance(labels, list | tuple) else [labels]
    if len(labels) == 0:
        raise ValueError("`class_labels` is empty. Pass at least one class.")
    numbers = [find_class(label, config) if isinstance(label, str) else label for label in labels]
    for label in numbers:
        if not is_whole_number(label):
            raise TypeError(f"`class_labels` must be whole numbers or names, got {label!r}.")
        if not 0 <= label < config.num_classes:
            raise ValueError(
                f"`class_labels` must lie in [0, {config.num_classes}), the classes of this prior, got {label}."
            )
    return torch.tensor(numbers)


def find_class(name: str, config: FlexTokPriorConfig) -> int:
    """Return the number of the class called `name`."""
    names = config.id2label if len(config.id2label) == config.num_classes else {}
    for number, known in names.items():
        if known == name:
            return number
    if not names:
        raise ValueError(f"The classes of this prior have no names, so {name!r} is unknown. Pass numbers.")
    similar = difflib.get_close_matches(name, names.values()) or list(names.values())[:10]
    raise ValueError(
        f"`class_labels` contains {name!r}, not one of the {len(names)} classes, such as {', '.join(similar)}."
    )


def check_sampling(
    num_inference_steps: Any, guidance_scale: Any, guidance: str, output_type: str, output_types: Sequence[str]
) -> None:
    """Raise a ValueError or TypeError unless the sampling options of the flow decoder are valid."""
    if not is_whole_number(num_inference_steps) or num_inference_steps < 1:
        raise ValueError(f"`num_inference_steps` must be a whole number of 1 or more, got {num_inference_steps!r}.")
    is_number = isinstance(guidance_scale, Real) and not isinstance(guidance_scale, bool)
    if not callable(guidance_scale) and not (is_number and math.isfinite(guidance_scale)):
        raise TypeError(f"`guidance_scale` must be a finite number or a function of sigma, got {guidance_scale!r}.")
    check_guidance(guidance)
    if output_type not in output_types:
        raise ValueError(f"`output_type` must be one of {', '.join(output_types)}, got {output_type!r}.")


def check_generation(**options: Any) -> dict[str, Any]:
    """Return the options of the prior's sampling as plain numbers.

    Args:
        options: `prior_guidance_scale`, `temperature` above 0, `top_k` of 0 or more, `top_p` in (0, 1].

    Raises:
        TypeError: if one is not a finite number.
        ValueError: if one is out of range.
    """
    allowed = {
        "prior_guidance_scale": (lambda value: True, "a finite number"),
        "temperature": (lambda value: value > 0, "a number above 0"),
        "top_k": (lambda value: value >= 0 and value == int(value), "a whole number of 0 or more; 0 is all"),
        "top_p": (lambda value: 0 < value <= 1, "a number in (0, 1]; 1 is all"),
    }
    for name, value in options.items():
        is_allowed, what = allowed[name]
        if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
            raise TypeError(f"`{name}` must be {what}, got {value!r}.")
        if not is_allowed(value):
            raise ValueError(f"`{name}` must be {what}, got {value!r}.")
    return {name: int(value) if name == "top_k" else float(value) for name, value in options.items()}


def spread_generators(
    generator: torch.Generator | Sequence[torch.Generator] | None, batch_size: int
) -> list[torch.Generator] | torch.Generator | None:
    """Check that a list of generators has one per sample; a single generator or `None` is returned as is.

    Raises:
        TypeError: if they are not generators.
        ValueError: if the number of generators differs from `batch_size`.
    """
    if generator is None or isinstance(generator, torch.Generator):
        return generator
    if not isinstance(generator, list | tuple) or not all(isinstance(each, torch.Generator) for each in generator):
        raise TypeError(
            f"`generator` must be a `torch.Generator` or a list of them, got {generator!r}. For a seed, pass"
            " `torch.Generator().manual_seed(seed)`."
        )
    if len(generator) != batch_size:
        raise ValueError(
            f"`generator` has {len(generator)} entries for {batch_size} images. Pass a single generator, or one per"
            " image (prompts times `num_images_per_prompt`)."
        )
    return list(generator)
