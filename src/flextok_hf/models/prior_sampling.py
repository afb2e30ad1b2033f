"""One sampling run of the prior: its options, the unconditional rows for guidance, and token selection.

Letters: B batch, M text length, k new tokens, V codebook size.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import MaxLengthCriteria, StoppingCriteriaList
from transformers.generation.utils import GenerateDecoderOnlyOutput
from transformers.modeling_outputs import CausalLMOutputWithPast

from .prior_inputs import UNCONDITIONAL_LABEL


@dataclass
class PriorGenerateOutput(GenerateDecoderOnlyOutput):
    """Output of Transformers' `generate`, plus the log-probabilities of the chosen tokens.

    Attributes:
        log_probs (`torch.FloatTensor` of shape `(B, k)`): log-probability of each new token under the distribution it
            was drawn from, after guidance, temperature and filters; their sum scores the row.
    """

    log_probs: Tensor | None = None


@dataclass
class GuidedSampling:
    """Options of the sampling loop beyond Transformers' own (see `PriorGenerationMixin.generate`)."""

    guidance_scale: float
    generator: torch.Generator | list[torch.Generator] | None
    return_log_probs: bool
    class_zero_guidance: bool
    owns_cache: bool  # the caller passed none
    negative: tuple[Tensor | None, Tensor | None] = (None, None)  # text states and mask of the unconditional rows

    @property
    def is_guided(self) -> bool:
        """Whether a step computes unconditional rows too."""
        return self.guidance_scale != 1.0


class KeptSteps:
    """Outputs of each step that `generate` was asked to return."""

    def __init__(self, generation_config: GenerationConfig, return_log_probs: bool):
        asked = {
            "scores": generation_config.output_scores,
            "logits": generation_config.output_logits,
            "hidden_states": generation_config.output_hidden_states,
            "attentions": generation_config.output_attentions,
            "log_probs": return_log_probs,
        }
        self.steps: dict[str, list] = {name: [] for name, is_asked in asked.items() if is_asked}

    def add(
        self, output: CausalLMOutputWithPast, logits: Tensor, scores: Tensor, next_ids: Tensor, is_open: Tensor
    ) -> None:
        """Store what was requested of the output, logits and scores (B, V), and new ids (B, 1) of open rows (B,)."""
        for name, values in self.steps.items():
            if name == "log_probs":
                values.append(scores.log_softmax(dim=-1).gather(1, next_ids) * is_open[:, None])
            else:
                values.append({"scores": scores, "logits": logits}.get(name, getattr(output, name, None)))

    def outputs(self) -> dict[str, tuple | Tensor]:
        """Return the fields of `PriorGenerateOutput`."""
        fields: dict[str, Any] = {name: tuple(values) for name, values in self.steps.items() if values}
        if "log_probs" in fields:
            fields["log_probs"] = torch.cat(fields["log_probs"], dim=1)
        return fields


class UnfinishedRows:
    """Which rows of a batch still grow; after its end, a row is filled with the padding id.

    Args:
        rules: of Transformers; each says of (B, L) ids which rows are done.
        pad_token_id: a scalar tensor; `None` if no rule ends a single row.
    """

    def __init__(self, rules: StoppingCriteriaList, pad_token_id: Tensor | None, num_rows: int, device: torch.device):
        self.rules = [rule for rule in rules if not isinstance(rule, MaxLengthCriteria)]
        has_end = any(hasattr(rule, "eos_token_id") for rule in self.rules)
        self.pad_token_id = pad_token_id.to(device) if has_end and pad_token_id is not None else None
        self.is_open = torch.ones(num_rows, dtype=torch.bool, device=device)  # (B,)

    def fill(self, next_ids: Tensor) -> Tensor:
        """Replace the new ids (B, 1) of finished rows by padding."""
        return (
            next_ids if self.pad_token_id is None else torch.where(self.is_open[:, None], next_ids, self.pad_token_id)
        )

    def all_done(self, input_ids: Tensor, scores: Tensor) -> bool:
        """Apply the rules to ids (B, L); returns whether every row has ended."""
        for rule in self.rules:
            self.is_open = self.is_open & ~rule(input_ids, scores)
        return bool(self.rules) and not self.is_open.any()


def choose(scores: Tensor, do_sample: bool, generator: torch.Generator | list[torch.Generator] | None) -> Tensor:
    """Pick a token per row of scores (B, V): the best, or a sample from the softmax; returns ids (B, 1)."""
    if not do_sample:
        return scores.argmax(dim=-1, keepdim=True)
    probs = scores.softmax(dim=-1)
    if isinstance(generator, list):
        return torch.cat([draw(row[None], own) for row, own in zip(probs, generator, strict=True)])
    return draw(probs, generator)


def draw(probs: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw one id per row of probabilities (B, V), on the generator's device: CPU seeds draw the same anywhere."""
    device = probs.device if generator is None else generator.device
    try:
        return torch.multinomial(probs.to(device), 1, generator=generator).to(probs.device)
    except RuntimeError as error:
        if probs.isfinite().all():
            raise
        raise ValueError(
            "The prior computes NaN or infinity. If its weights contain none, use a `dtype` with a wider range,"
            " bfloat16 or float32, or a smaller guidance scale."
        ) from error


def pad_texts(
    conditions: dict, hidden_states: Tensor | None, attention_mask: Tensor | None, multiple: int = 1
) -> tuple:
    """Pad the texts in `conditions` and the negative ones to one length, a multiple; returns the negative ones."""
    if hidden_states is None:
        return None, None
    text, text_mask = conditions["encoder_hidden_states"], conditions.get("encoder_attention_mask")
    length = -(-max(text.shape[1], hidden_states.shape[1]) // multiple) * multiple
    conditions["encoder_hidden_states"], conditions["encoder_attention_mask"] = pad_text(text, text_mask, length)
    return pad_text(hidden_states, attention_mask, length)


def pad_text(hidden_states: Tensor, attention_mask: Tensor | None, length: int) -> tuple[Tensor, Tensor]:
    """Pad text states (B, M, C) and their mask, (B, M) or `None` for no padding, to `length`, masking the padding."""
    if attention_mask is None:
        attention_mask = torch.ones(hidden_states.shape[:2], dtype=torch.long, device=hidden_states.device)
    missing = length - hidden_states.shape[1]
    return F.pad(hidden_states, (0, 0, 0, missing)), F.pad(attention_mask, (0, missing))


def double_batch(model_kwargs: dict, sampling: GuidedSampling, batch_size: int) -> None:
    """Append the unconditional rows to the conditions, in place: (B, ...) becomes (2 B, ...)."""
    for name, negative in zip(("encoder_hidden_states", "encoder_attention_mask"), sampling.negative, strict=True):
        if negative is not None:
            rows = negative.repeat_interleave(batch_size // negative.shape[0], dim=0)
            model_kwargs[name] = torch.cat([model_kwargs[name], rows.to(model_kwargs[name])])
    for name in ("attention_mask", "shape_features"):  # the same for both: guidance is about text and class
        if model_kwargs.get(name) is not None:
            model_kwargs[name] = model_kwargs[name].repeat(2, 1)
    labels = model_kwargs.get("class_labels")
    if labels is not None:
        unconditional = 0 if sampling.class_zero_guidance else UNCONDITIONAL_LABEL
        model_kwargs["class_labels"] = torch.cat([labels, torch.full_like(labels, unconditional)])
