"""A condition and a prefix -> token ids, in one go or in parts; the pipeline's only way to generate tokens.

Letters: B images, p tokens given, k tokens requested.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm
from transformers import LogitsProcessor, LogitsProcessorList

from ..models.modeling_prior import FlexTokPriorForCausalLM
from ..models.packed_linear import PackedWeights
from ..models.prior_cache import CACHE_NAME


class StepCounter(LogitsProcessor):
    """Advances a progress bar at every step of `generate`, and leaves the scores as they are."""

    def __init__(self, bar: tqdm):
        self.bar = bar

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.bar.update()
        return scores


class TokenWriter:
    """Generates sequences with the prior in parts. Each part continues from the last one with its cache, generator and
    packed weights, so that parts cost the same as generating in one go and give the same tokens.

    Args:
        prior: the model.
        prefix: given tokens, (B, p); p may be 0.
        counts: final length of each sequence, B numbers of at least p.
        conditions: text or class inputs of `prior.generate`, one row per image.
        progress_bar: returns a bar over `total` steps, as `DiffusionPipeline.progress_bar` does.
        options: other arguments of `prior.generate`: generator, guidance, temperature, filters, cache type.
    """

    def __init__(
        self,
        prior: FlexTokPriorForCausalLM,
        prefix: Tensor,
        counts: Sequence[int],
        conditions: dict[str, Tensor],
        progress_bar: Callable[..., tqdm],
        **options: Any,
    ):
        self.prior = prior
        self.token_ids = prefix
        self.counts = list(counts)
        self.progress_bar = progress_bar
        self.packed: PackedWeights | None = None  # kept for all parts
        # Log-probabilities force the prior's own sampling loop; Transformers' loop cannot continue from a cache.
        self.arguments = {**conditions, **options, "do_sample": True, "return_log_probs": True}

    def write(self, num_tokens: int) -> Tensor:
        """Return the first tokens of every sequence, (B, num_tokens); the prior generates the missing ones."""
        missing = num_tokens - self.token_ids.shape[1]
        if missing > 0:
            if self.packed is None:
                self.packed = PackedWeights(self.prior, max(self.counts) - self.token_ids.shape[1])
            start = self.prior.prepend_bos(self.token_ids)
            with self.packed.in_use(), self.progress_bar(total=missing) as bar:
                counter = {} if bar.disable else {"logits_processor": LogitsProcessorList([StepCounter(bar)])}
                output = self.prior.generate(start, max_new_tokens=missing, **counter, **self.arguments)
            self.token_ids = output.sequences[:, 1:]
            self.arguments[CACHE_NAME] = getattr(output, CACHE_NAME)
            self.arguments.pop("cache_implementation", None)  # only for a new cache
            if num_tokens >= max(self.counts):
                self.packed.free()
                self.prior.keep_cache(self.arguments.pop(CACHE_NAME))
        return self.token_ids[:, :num_tokens]

    def write_all(self) -> Tensor | list[Tensor]:
        """Return every sequence at its full length: (B, k), or a list of (k,) tensors if the lengths differ."""
        token_ids = self.write(max(self.counts))  # (B, longest)
        if len(set(self.counts)) == 1:
            return token_ids
        return [ids[:count] for ids, count in zip(token_ids, self.counts, strict=True)]
