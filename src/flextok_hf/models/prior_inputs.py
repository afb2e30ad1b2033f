"""Input checks of the prior: shapes always, values only where reading them does not stall an accelerator."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ..utils.numbers import is_whole_number
from .configuration_prior import FlexTokPriorConfig


UNCONDITIONAL_LABEL = -1  # class label that adds nothing
IGNORED_LABEL = -100  # target that the loss ignores, as in Transformers
MAX_LOG_RATIO = 20.0  # of areas or sides: far beyond any image that a model takes

# name of an input, its values, the smallest and the largest that is allowed, and what they mean
RangeCheck = tuple[str, Tensor, float, float, str]


@dataclass(frozen=True)
class PriorInputs:
    """The token side of a forward pass: what runs, where it stands, what it attends to, and what it predicts.

    ids (B, L), or embeds (B, L, D) instead; labels (B, L); attention_mask (B, S); position_ids (1 or B, L).
    """

    ids: Tensor | None
    embeds: Tensor | None = None
    labels: Tensor | None = None
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None

    @property
    def values(self) -> Tensor:
        """Ids or embeddings, whichever there are."""
        values = self.ids if self.embeds is None else self.embeds
        assert values is not None  # checked at the door
        return values

    @property
    def length(self) -> int:
        """Inputs L of this pass."""
        return self.values.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the inputs are."""
        return self.values.device

    def without_last(self) -> "PriorInputs":
        """Drop the last input, which has nothing to predict."""
        parts = (self.ids, self.embeds, None, self.attention_mask, self.position_ids)
        return PriorInputs(*(None if part is None else part[:, :-1] for part in parts))


def check_forward_inputs(
    config: FlexTokPriorConfig,
    inputs: PriorInputs,
    encoder_hidden_states: Tensor | None,
    encoder_attention_mask: Tensor | None,
    class_labels: Tensor | None,
    cache: Cache | None,
    shape_features: Tensor | None = None,
) -> None:
    """Raise an error if a model of this configuration cannot run on these inputs (see its `forward`)."""
    check_sequences(config, inputs)
    check_cache(cache)
    if inputs.labels is not None:
        check_labels(config, inputs.values[:, :, 0] if inputs.ids is None else inputs.ids, inputs.labels, cache)
    past_length = 0 if cache is None else cache.get_seq_length()
    # the last of `[BOS, all tokens]` is not run
    num_inputs = inputs.length - (inputs.labels is not None or cache is None)
    if isinstance(past_length, int) and past_length + num_inputs > config.max_position_embeddings:
        raise ValueError(
            f"`input_ids` needs {past_length + inputs.length} positions, but the model has"
            f" {config.max_position_embeddings} (`max_position_embeddings`; the start token takes one). Pass fewer."
        )
    is_start = isinstance(past_length, int) and past_length == 0
    batch_size = inputs.values.shape[0]
    check_text(config, batch_size, encoder_hidden_states, encoder_attention_mask, is_start)
    check_classes(config, batch_size, class_labels, is_start)
    check_shape(config, batch_size, shape_features)
    mask = inputs.attention_mask
    if mask is not None and isinstance(past_length, int):
        check_mask(mask, (batch_size, past_length + inputs.length))
    positions = inputs.position_ids
    shapes = [(rows, inputs.length) for rows in (1, batch_size)]
    if positions is not None and (tuple(positions.shape) not in shapes or not is_integer(positions)):
        raise ValueError(
            f"`position_ids` must be integers of shape {shapes[0]} or {shapes[1]}, got {positions.dtype} of shape"
            f" {tuple(positions.shape)}."
        )
    if not torch.compiler.is_compiling() and inputs.device.type == "cpu":  # elsewhere reading values would stall
        ranges = condition_ranges(config, encoder_attention_mask, class_labels) + shape_ranges(shape_features)
        if inputs.ids is not None:
            ranges.append(("input_ids", inputs.ids, 0, config.codebook_size, "The largest is `bos_token_id`."))
        if positions is not None:
            ranges.append(("position_ids", positions, 0, config.max_position_embeddings - 1, "BOS stands at 0."))
        check_ranges(ranges)


def check_sequences(config: FlexTokPriorConfig, inputs: PriorInputs) -> None:
    """Raise an error unless there are either ids (B, L) or embeddings (B, L, D)."""
    ids, embeds = inputs.ids, inputs.embeds
    if (ids is None) == (embeds is None):
        raise ValueError("Pass either `input_ids` or `inputs_embeds`, and not both.")
    check_tensors(input_ids=ids, inputs_embeds=embeds, labels=inputs.labels)
    check_tensors(attention_mask=inputs.attention_mask, position_ids=inputs.position_ids)
    if ids is not None and (ids.ndim != 2 or ids.shape[1] == 0 or not is_integer(ids)):
        raise ValueError(
            f"`input_ids` must be integers of shape (batch, length) with length 1 or more, got {ids.dtype} of"
            f" shape {tuple(ids.shape)}. Sequences start with `bos_token_id`: `model.prepend_bos(token_ids)`."
        )
    if embeds is not None and (embeds.ndim != 3 or embeds.shape[1] == 0 or embeds.shape[2] != config.hidden_size):
        raise ValueError(
            f"`inputs_embeds` must have the shape (batch, length, {config.hidden_size}) with length 1 or more, got"
            f" {tuple(embeds.shape)}."
        )


def condition_ranges(
    config: FlexTokPriorConfig,
    attention_mask: Tensor | None,
    class_labels: Tensor | None,
    hidden_states: Tensor | None = None,
    name: str = "encoder",
) -> list[RangeCheck]:
    """Checks of a text mask (B, M), labels (B,) and, once per `generate`, text states (B, M, text_hidden_size)."""
    ranges: list[RangeCheck] = []
    if attention_mask is not None:
        kept = attention_mask.bool().any(dim=1)
        remedy = "It masks the whole text of a row. Even the empty prompt has a token: tokenize '' and pass its mask."
        if hidden_states is not None:
            ranges.append((f"{name}_attention_mask", attention_mask, 0, 1, "1 is for text and 0 for padding."))
        ranges.append((f"{name}_attention_mask", kept, 1, 1, remedy))
    if class_labels is not None and config.num_classes is not None:
        remedy = f"{UNCONDITIONAL_LABEL} means no class."
        ranges.append(("class_labels", class_labels, UNCONDITIONAL_LABEL, config.num_classes - 1, remedy))
    if hidden_states is not None:
        largest = torch.finfo(hidden_states.dtype).max
        ranges.append((f"{name}_hidden_states", hidden_states, -largest, largest, "They are not finite."))
    return ranges


def check_labels(config: FlexTokPriorConfig, input_ids: Tensor, labels: Tensor, cache: Cache | None) -> None:
    """Raise an error unless `labels` are targets for `input_ids`."""
    if labels.shape != input_ids.shape or labels.shape[1] < 2 or cache is not None:
        raise ValueError(
            f"`labels` of shape {tuple(labels.shape)} do not fit `input_ids` of shape {tuple(input_ids.shape)}: both"
            " must be (batch, length) with the start id and 1 token or more, usually the same tensor, and cannot be"
            " combined with `cache`."
        )
    if not torch.compiler.is_compiling() and labels.device.type == "cpu":
        targets = labels[:, 1:]  # the first is the start id, which is never predicted
        kept = torch.where(targets == IGNORED_LABEL, 0, targets)
        check_ranges([("labels", kept, 0, config.codebook_size - 1, f"Use {IGNORED_LABEL} to ignore one.")])


def check_targets(shift_labels: Tensor | None, logits_to_keep: Any, inputs: PriorInputs) -> None:
    """Raise an error unless `logits_to_keep` says which logits (B, L, V) to compute, and `shift_labels` are theirs."""
    check_tensors(shift_labels=shift_labels)
    is_count = is_whole_number(logits_to_keep) and logits_to_keep >= 0
    is_positions = isinstance(logits_to_keep, Tensor) and is_integer(logits_to_keep) and logits_to_keep.ndim == 1
    if not is_count and not is_positions:
        raise TypeError(
            "`logits_to_keep` must be a whole number of 0 or more, or positions in a 1-D tensor, got"
            f" {logits_to_keep!r}."
        )
    if is_positions and logits_to_keep.device.type == "cpu" and not torch.compiler.is_compiling():
        last = inputs.length - 1
        check_ranges([("logits_to_keep", logits_to_keep, -last - 1, last, "Negative ones count from the end.")])
    has_targets = inputs.labels is not None or shift_labels is not None
    if has_targets and not (is_count and logits_to_keep == 0):
        raise ValueError("`logits_to_keep` cannot be combined with `labels`, whose loss is over all positions.")
    if shift_labels is not None and shift_labels.shape != inputs.values.shape[:2]:
        raise ValueError(
            f"`shift_labels` must have the shape {tuple(inputs.values.shape[:2])}, one target for each input, got"
            f" {tuple(shift_labels.shape)}."
        )


def check_text(
    config: FlexTokPriorConfig,
    batch_size: int,
    hidden_states: Tensor | None,
    attention_mask: Tensor | None,
    is_start: bool,
    name: str = "encoder",
) -> None:
    """Raise an error unless text states (B, M, text_hidden_size) and mask (B, M) fit; required only at the start."""
    states_name, mask_name = f"{name}_hidden_states", f"{name}_attention_mask"
    check_tensors(**{states_name: hidden_states, mask_name: attention_mask})
    if config.text_hidden_size is None:
        if hidden_states is not None or attention_mask is not None:
            raise ValueError(
                f"`{states_name}` was given, but this model reads no text (`text_hidden_size` is None). Leave it out."
            )
        return
    if hidden_states is None:
        if is_start:
            raise ValueError(
                f"`{states_name}` is missing: this model reads text. Pass the last hidden states of its text encoder,"
                f" (batch, text length, {config.text_hidden_size}); without a prompt, those of the empty string."
            )
    elif (
        hidden_states.ndim != 3
        or hidden_states.shape[1] == 0
        or not hidden_states.is_floating_point()
        or (hidden_states.shape[0], hidden_states.shape[2]) != (batch_size, config.text_hidden_size)
    ):
        raise ValueError(
            f"`{states_name}` must have shape ({batch_size}, text length, {config.text_hidden_size}) and floats, got"
            f" {hidden_states.dtype} of shape {tuple(hidden_states.shape)}. Use the text encoder this model was"
            " trained with, one text per row."
        )
    if attention_mask is not None and hidden_states is not None and attention_mask.shape != hidden_states.shape[:2]:
        raise ValueError(
            f"`{mask_name}` must have shape {tuple(hidden_states.shape[:2])}, like the text states, got"
            f" {tuple(attention_mask.shape)}."
        )


def check_classes(config: FlexTokPriorConfig, batch_size: int, class_labels: Tensor | None, is_start: bool) -> None:
    """Raise an error unless class labels (B,) fit; required only at the start."""
    check_tensors(class_labels=class_labels)
    if config.num_classes is None:
        if class_labels is not None:
            raise ValueError(
                "`class_labels` was given, but this model has no classes (`num_classes` is None). Leave it out."
            )
        return
    if class_labels is None:
        if is_start:
            raise ValueError(
                f"`class_labels` is missing: this model has {config.num_classes} classes. Pass one label per row, or"
                f" {UNCONDITIONAL_LABEL} for none."
            )
    elif class_labels.shape != (batch_size,) or not is_integer(class_labels):
        raise ValueError(
            f"`class_labels` must be integers of shape ({batch_size},), got {class_labels.dtype} of shape"
            f" {tuple(class_labels.shape)}."
        )


def check_shape(config: FlexTokPriorConfig, batch_size: int, shape_features: Tensor | None) -> None:
    """Raise an error unless the two numbers that describe each image's shape, (B, 2), fit."""
    check_tensors(shape_features=shape_features)
    if shape_features is None:
        return
    if not config.shape_conditioning:
        raise ValueError(
            "`shape_features` was given, but this model is not told the shape (`shape_conditioning` is False). Leave"
            " it out."
        )
    if shape_features.shape != (batch_size, 2) or not shape_features.is_floating_point():
        raise ValueError(
            f"`shape_features` must be floats of shape ({batch_size}, 2), log(area / trained area) and"
            f" log(height / width) of each image, got {shape_features.dtype} of shape {tuple(shape_features.shape)}."
        )


def shape_ranges(shape_features: Tensor | None) -> list[RangeCheck]:
    """Check of the values of `shape_features`."""
    if shape_features is None:
        return []
    return [("shape_features", shape_features, -MAX_LOG_RATIO, MAX_LOG_RATIO, "They are logarithms of ratios.")]


def check_mask(mask: Tensor, shape: tuple[int, ...]) -> None:
    """Raise an error unless a padding mask has the shape (B, S)."""
    if mask.shape != shape:
        raise ValueError(
            f"`attention_mask` must have the shape {shape}, batch and positions so far, got {tuple(mask.shape)}."
        )


def check_cache(cache: Any) -> None:
    """Raise an error unless this is a cache of Transformers or `None`."""
    if cache is not None and not isinstance(cache, Cache):
        raise TypeError(f"`cache` (`past_key_values`) must be a Transformers `Cache`, got {type(cache).__name__}.")


def check_tensors(**values: Any) -> None:
    """Raise an error unless every value is a tensor or `None`."""
    for name, value in values.items():
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"`{name}` must be a tensor, got {type(value).__name__}.")


def check_ranges(ranges: list[RangeCheck]) -> None:
    """Raise an error unless all values lie in their ranges; a device is read once for all of them."""
    ranges = [each for each in ranges if each[1].numel()]
    if not ranges:
        return
    bounds = [
        bound
        for _, values, *_ in ranges
        for bound in (values.byte() if values.dtype == torch.bool else values).aminmax()
    ]
    device = bounds[0].device
    if device.type == "cpu":
        numbers = [bound.item() for bound in bounds]
    else:
        numbers = torch.stack([bound.to(device, torch.float32) for bound in bounds]).tolist()
    for (name, _, low, high, remedy), smallest, largest in zip(ranges, numbers[::2], numbers[1::2], strict=True):
        if not (low <= smallest and largest <= high):  # false for NaN, too
            raise ValueError(
                f"`{name}` must hold values from {low:g} to {high:g}, got values from {smallest:g} to {largest:g}."
                f" {remedy}"
            )


def is_integer(values: Tensor) -> bool:
    """Whether an embedding accepts these values."""
    return values.dtype in (torch.int32, torch.int64)
