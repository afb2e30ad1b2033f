"""One sampling run of the prior: its options, the unconditional rows for guidance, and token selection.

Letters: B batch, M text length, k new tokens, V codebook size.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.utils import GenerateDecoderOnlyOutput

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
        self.scores: list[Tensor] | None = [] if generation_config.output_scores else None
        self.logits: list[Tensor] | None = [] if generation_config.output_logits else None
        self.log_probs: list[Tensor] | None = [] if return_log_probs else None

    def add(self, logits: Tensor, scores: Tensor, next_ids: Tensor) -> None:
        """Store what was requested of logits and processed scores, (B, V), and chosen ids, (B, 1)."""
        if self.scores is not None:
            self.scores.append(scores)
        if self.logits is not None:
            self.logits.append(logits)
        if self.log_probs is not None:
            self.log_probs.append(scores.log_softmax(dim=-1).gather(1, next_ids))

    def outputs(self) -> dict[str, tuple[Tensor, ...] | Tensor | None]:
        """Return the fields of `PriorGenerateOutput`."""
        log_probs = torch.cat(self.log_probs, dim=1) if self.log_probs else None
        return {
            "scores": tuple(self.scores or ()) or None,
            "logits": tuple(self.logits or ()) or None,
            "log_probs": log_probs,
        }


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
    if generator is None:
        return torch.multinomial(probs, 1)
    return torch.multinomial(probs.to(generator.device), 1, generator=generator).to(probs.device)


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
    labels = model_kwargs.get("class_labels")
    if labels is not None:
        unconditional = 0 if sampling.class_zero_guidance else UNCONDITIONAL_LABEL
        model_kwargs["class_labels"] = torch.cat([labels, torch.full_like(labels, unconditional)])
