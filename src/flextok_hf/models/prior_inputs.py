"""Input checks of the prior: shapes always, values only where reading them does not stall an accelerator."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from .configuration_prior import FlexTokPriorConfig


UNCONDITIONAL_LABEL = -1  # class label that adds nothing
IGNORED_LABEL = -100  # target that the loss ignores, as in Transformers


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
) -> None:
    """Raise an error if a model of this configuration cannot run on these inputs (see its `forward`)."""
    check_sequences(config, inputs)
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
    mask = inputs.attention_mask
    if mask is not None and isinstance(past_length, int) and mask.shape != (batch_size, past_length + inputs.length):
        raise ValueError(
            f"`attention_mask` must have the shape ({batch_size}, {past_length + inputs.length}), batch and positions"
            f" so far, got {tuple(mask.shape)}."
        )
    if not torch.compiler.is_compiling() and inputs.device.type == "cpu":  # elsewhere reading values would stall
        if inputs.ids is not None:
            check_range("input_ids", inputs.ids, 0, config.codebook_size + 1, "The largest is `bos_token_id`.")
        if inputs.position_ids is not None:
            check_range("position_ids", inputs.position_ids, 0, config.max_position_embeddings, "BOS stands at 0.")
        check_condition_values(config, encoder_attention_mask, class_labels)


def check_sequences(config: FlexTokPriorConfig, inputs: PriorInputs) -> None:
    """Raise an error unless there are either ids (B, L) or embeddings (B, L, D)."""
    if (inputs.ids is None) == (inputs.embeds is None):
        raise ValueError("Pass either `input_ids` or `inputs_embeds`, and not both.")
    for name, value in (("input_ids", inputs.ids), ("inputs_embeds", inputs.embeds)):
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"`{name}` must be a tensor, got {type(value).__name__}.")
    ids, embeds = inputs.ids, inputs.embeds
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


def check_generate_inputs(
    config: FlexTokPriorConfig,
    inputs: Tensor | None,
    conditions: dict,
    guidance_scale: float,
    negative: tuple[Tensor | None, Tensor | None],
    class_zero_guidance: bool = False,
) -> None:
    """Raise an error if `generate` cannot run on these arguments; values are checked too, once per call."""
    text, mask = conditions.get("encoder_hidden_states"), conditions.get("encoder_attention_mask")
    labels = conditions.get("class_labels")
    batch_size = next((value.shape[0] for value in (inputs, text, labels) if value is not None), 1)
    padding = conditions.get("attention_mask")
    if padding is not None and not padding.bool().all():
        raise ValueError("`attention_mask` hides positions, but sequences to continue start with `bos_token_id`.")
    check_text(config, batch_size, text, mask, is_start=True)
    check_classes(config, batch_size, labels, is_start=True)
    check_condition_values(config, mask, labels)
    if inputs is not None:
        if inputs.ndim != 2 or inputs.shape[1] == 0 or (inputs[:, 0] != config.bos_token_id).any():
            raise ValueError(
                f"`inputs` must have shape (batch, 1 or more) and start with `bos_token_id` ({config.bos_token_id})."
                " For plain token ids, pass `model.prepend_bos(token_ids)`."
            )
        check_range("inputs", inputs[:, 1:], 0, config.codebook_size, "Only the first may be `bos_token_id`.")
    if class_zero_guidance and (config.num_classes is None or config.text_hidden_size is not None):
        raise ValueError(
            "`class_zero_guidance` is for models with classes and without text, the only ones ever sampled with it."
            " Leave it out."
        )
    if guidance_scale == 1.0:
        return
    if text is None and labels is None:
        raise ValueError(f"`guidance_scale` is {guidance_scale}, but this model is unconditional. Use 1.")
    if text is not None:
        rows = 1 if negative[0] is not None and negative[0].shape[0] == 1 else batch_size
        check_text(config, rows, *negative, is_start=True, name="negative_encoder")
        check_condition_values(config, negative[1], None, name="negative_encoder")


def check_condition_values(
    config: FlexTokPriorConfig, attention_mask: Tensor | None, class_labels: Tensor | None, name: str = "encoder"
) -> None:
    """Raise an error unless every row of a text mask (B, M) keeps a token, and every label is -1 or a class."""
    if attention_mask is not None and not attention_mask.bool().any(dim=1).all():
        raise ValueError(
            f"`{name}_attention_mask` masks the whole text of a row. Even the empty prompt has one token: tokenize ''"
            " and pass its mask."
        )
    if class_labels is not None and config.num_classes is not None:
        remedy = f"{UNCONDITIONAL_LABEL} means no class."
        check_range("class_labels", class_labels, UNCONDITIONAL_LABEL, config.num_classes, remedy)


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
        check_range(
            "labels", targets[targets != IGNORED_LABEL], 0, config.codebook_size, f"Use {IGNORED_LABEL} to ignore one."
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
        or (hidden_states.shape[0], hidden_states.shape[2]) != (batch_size, config.text_hidden_size)
    ):
        raise ValueError(
            f"`{states_name}` must have shape ({batch_size}, text length, {config.text_hidden_size}), got"
            f" {tuple(hidden_states.shape)}. Use the text encoder this model was trained with, one text per row."
        )
    if attention_mask is not None and hidden_states is not None and attention_mask.shape != hidden_states.shape[:2]:
        raise ValueError(
            f"`{mask_name}` must have shape {tuple(hidden_states.shape[:2])}, like the text states, got"
            f" {tuple(attention_mask.shape)}."
        )


def check_classes(config: FlexTokPriorConfig, batch_size: int, class_labels: Tensor | None, is_start: bool) -> None:
    """Raise an error unless class labels (B,) fit; required only at the start."""
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


def check_range(name: str, values: Tensor, low: int, high: int, remedy: str) -> None:
    """Raise an error unless all values lie in [low, high)."""
    if values.numel() == 0:
        return
    smallest, largest = (value.item() for value in values.aminmax())
    if smallest < low or largest >= high:
        raise ValueError(
            f"`{name}` must hold values in [{low}, {high}), got values from {smallest} to {largest}. {remedy}"
        )


def is_integer(values: Tensor) -> bool:
    return not (values.is_floating_point() or values.is_complex() or values.dtype == torch.bool)
