"""Checks of what `generate` gets: what to continue, conditions, options of sampling."""

import math
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from ..utils.numbers import is_finite_number, is_whole_number
from .argument_checks import MAX_GUIDANCE_SCALE
from .configuration_prior import FlexTokPriorConfig
from .prior_cache import CACHE_NAME
from .prior_inputs import (
    RangeCheck,
    check_cache,
    check_classes,
    check_mask,
    check_ranges,
    check_shape,
    check_tensors,
    check_text,
    condition_ranges,
    is_integer,
    shape_ranges,
)


LEAST_COUNTS = {"max_new_tokens": 1, "max_length": 1, "min_new_tokens": 0, "min_length": 0, "top_k": 0}
TRAINING_INPUTS = ("labels", "shift_labels", "num_items_in_batch", "position_ids")
LEAST_COUNTS |= {"num_beams": 1, "num_return_sequences": 1}  # smallest value of each option of `generate`


def check_generate_inputs(
    config: FlexTokPriorConfig,
    inputs: Tensor | None,
    conditions: dict,
    guidance_scale: Any,
    negative: tuple[Tensor | None, Tensor | None],
    class_zero_guidance: bool = False,
) -> None:
    """Raise an error if `generate` cannot run on these arguments; values are checked too, in one transfer per call."""
    text, mask = conditions.get("encoder_hidden_states"), conditions.get("encoder_attention_mask")
    labels, embeds = conditions.get("class_labels"), conditions.get("inputs_embeds")
    shape = conditions.get("shape_features")
    padding = conditions.get("attention_mask")
    check_tensors(inputs=inputs, inputs_embeds=embeds, attention_mask=padding)
    if inputs is not None and embeds is not None:
        raise ValueError("Pass either `inputs` or `inputs_embeds`, and not both.")
    check_cache(conditions.get(CACHE_NAME))
    rows = {"inputs": inputs, "inputs_embeds": embeds, "encoder_hidden_states": text, "class_labels": labels}
    rows["shape_features"] = shape
    given = [(name, value.shape[0]) for name, value in rows.items() if isinstance(value, Tensor) and value.ndim]
    name, batch_size = given[0] if given else ("inputs", 1)
    if batch_size == 0:
        raise ValueError(f"`{name}` must have 1 row or more, got 0.")
    ranges = prefix_ranges(config, batch_size, inputs, embeds, padding)
    check_text(config, batch_size, text, mask, is_start=True)
    check_classes(config, batch_size, labels, is_start=True)
    check_shape(config, batch_size, shape)
    ranges += condition_ranges(config, mask, labels, text) + shape_ranges(shape)
    if class_zero_guidance and (config.num_classes is None or config.text_hidden_size is not None):
        raise ValueError(
            "`class_zero_guidance` is for models with classes and without text, the only ones ever sampled with it."
            " Leave it out."
        )
    if not is_finite_number(guidance_scale) or abs(guidance_scale) > MAX_GUIDANCE_SCALE:
        limit = f"from {-MAX_GUIDANCE_SCALE:g} to {MAX_GUIDANCE_SCALE:g}"
        raise TypeError(f"`guidance_scale` must be a number {limit}, got {guidance_scale!r}.")
    if guidance_scale != 1.0 and text is None and labels is None:
        raise ValueError(f"`guidance_scale` is {guidance_scale}, but this model is unconditional. Use 1.")
    if guidance_scale != 1.0 and text is not None:
        num_rows = 1 if isinstance(negative[0], Tensor) and negative[0].shape[:1] == (1,) else batch_size
        check_text(config, num_rows, *negative, is_start=True, name="negative_encoder")
        ranges += condition_ranges(config, negative[1], None, negative[0], name="negative_encoder")
    check_ranges(ranges)


def prefix_ranges(
    config: FlexTokPriorConfig,
    batch_size: int,
    inputs: Tensor | None,
    embeds: Tensor | None,
    padding: Tensor | None,
) -> list[RangeCheck]:
    """Check the shapes of what `generate` continues; returns the checks of its values.

    Ids (B, L), or embeddings (B, L, D) whose ids are unknown; padding mask (B, L).
    """
    if inputs is not None and (inputs.ndim != 2 or inputs.shape[1] == 0 or not is_integer(inputs)):
        raise ValueError(
            f"`inputs` must be integers of shape (batch, 1 or more), got {inputs.dtype} of shape"
            f" {tuple(inputs.shape)}. For token ids, pass `model.prepend_bos(token_ids)`."
        )
    prefix = inputs if embeds is None else embeds
    is_token = None
    ranges: list[RangeCheck] = []
    if padding is not None:
        check_mask(padding, (batch_size, 1 if prefix is None else prefix.shape[1]))
        is_token = padding.bool()
        steps = torch.cat([padding.float().diff(dim=1), padding[:, -1:].float()], dim=1)
        ranges.append(("attention_mask", steps, 0, 1, "Padding, marked by 0, stands on the left."))
        ranges.append(("attention_mask", padding[:, -1], 1, 1, "Every row ends in a token, marked by 1."))
    if inputs is None or embeds is not None:
        return ranges
    bos = config.codebook_size  # the configuration allows no other
    if is_token is None:
        starts, codes = inputs[:, :1], inputs[:, 1:]
    else:
        is_start = is_token & (is_token.long().cumsum(dim=1) == 1)
        starts = torch.where(is_start, inputs, bos)
        codes = torch.where(is_token & ~is_start, inputs, 0)
        ranges.append(("inputs", inputs, 0, config.codebook_size, "Padding may be any id."))
    start = f"All rows start with `bos_token_id` ({bos}): `model.prepend_bos(token_ids)` adds it."
    ranges.append(("inputs", starts, bos, bos, start))
    ranges.append(("inputs", codes, 0, config.codebook_size - 1, "Only the first may be `bos_token_id`."))
    return ranges


def check_options(options: dict) -> None:
    """Raise an error if an option of `generate` is out of its range, or an input of `forward` has no use in it."""
    unused = [name for name in TRAINING_INPUTS if options.get(name) is not None]
    if unused and not options.get("is_assistant"):  # Transformers passes all it has to an assistant
        raise ValueError(f"`{unused[0]}` has no use in `generate`: leave it out.")
    for name, least in LEAST_COUNTS.items():
        value = options.get(name)
        if value is not None and not (is_whole_number(value) and value >= least):
            raise ValueError(f"`{name}` must be a whole number of {least} or more, got {value!r}.")
    for name, most, what in (("temperature", math.inf, "above 0"), ("top_p", 1.0, "in (0, 1]; 1 is all")):
        value = options.get(name)
        if value is not None and not (is_finite_number(value) and 0 <= value <= most):
            raise ValueError(f"`{name}` must be a finite number {what}, got {value!r}.")
    for name in ("do_sample", "return_log_probs", "return_dict_in_generate", "use_cache"):
        value = options.get(name)
        if value is not None and not isinstance(value, bool):
            raise TypeError(f"`{name}` must be True or False, got {value!r}.")
    for name in ("assistant_early_exit", "prefill_chunk_size"):
        if options.get(name) is not None:
            raise ValueError(f"`{name}` does not work with the prior: leave it out. `assistant_model` takes a prior.")


def check_special_tokens(config: FlexTokPriorConfig, options: GenerationConfig) -> None:
    """Raise a ValueError unless the special tokens of a generation configuration are those of the model, or codes."""
    ids = {name: getattr(options, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    for name, value in ids.items():
        allowed = [config.bos_token_id] if name == "bos_token_id" else range(config.codebook_size)
        given = value if isinstance(value, list) else [] if value is None else [value]
        if not all(is_whole_number(each) and each in allowed for each in given):
            raise ValueError(f"`{name}` of the prior's generation configuration is {value!r}, not one of {allowed}.")


def check_generator(generator: Any) -> None:
    """Raise an error unless `generator` is a generator, a list of them, or `None`."""
    for each in generator if isinstance(generator, list) else [generator]:
        if not isinstance(each, torch.Generator) and not (each is None and generator is None):
            raise TypeError(
                f"`generator` must be a `torch.Generator` or a list with one per row, got {generator!r}. For a seed:"
                " `torch.Generator().manual_seed(seed)`."
            )
