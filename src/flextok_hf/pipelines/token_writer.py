"""A condition and a prefix -> token ids, at once or in parts: the one way from a prompt to tokens.

Letters: B images, p tokens given, k tokens wanted.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..models.modeling_prior import FlexTokPriorForCausalLM
from ..models.packed_linear import PackedWeights
from ..models.prior_cache import CACHE_NAME


class TokenWriter:
    """Lets the prior write sequences in parts. Each part goes on where the last one ended, with its cache, its
    generator and its packed weights, so that parts cost what writing at once costs and give the same tokens.

    Args:
        prior: the model.
        prefix: tokens that are given, (B, p); p may be 0.
        counts: length of each sequence in the end, B numbers of p or more.
        conditions: texts or classes, as `prior.generate` takes them, one row per image.
        options: of `prior.generate`: generator, guidance, temperature, filters, kind of cache.
    """

    def __init__(
        self,
        prior: FlexTokPriorForCausalLM,
        prefix: Tensor,
        counts: Sequence[int],
        conditions: dict[str, Tensor],
        **options: Any,
    ):
        self.prior = prior
        self.token_ids = prefix
        self.counts = list(counts)
        self.packed: PackedWeights | None = None  # from the first part to the last
        # Log-probabilities bring the prior's own sampling loop in any case; Transformers' cannot go on from a cache.
        self.arguments = {**conditions, **options, "do_sample": True, "return_log_probs": True}

    def write(self, num_tokens: int) -> Tensor:
        """Return the first tokens of every sequence, (B, num_tokens); the prior writes those that are missing."""
        missing = num_tokens - self.token_ids.shape[1]
        if missing > 0:
            if self.packed is None:
                self.packed = PackedWeights(self.prior, max(self.counts) - self.token_ids.shape[1])
            start = self.prior.prepend_bos(self.token_ids)
            with self.packed.in_use():
                output = self.prior.generate(start, max_new_tokens=missing, **self.arguments)
            self.token_ids = output.sequences[:, 1:]
            self.arguments[CACHE_NAME] = getattr(output, CACHE_NAME)
            self.arguments.pop("cache_implementation", None)  # which is for a new cache
            if num_tokens >= max(self.counts):
                self.packed.free()
                self.prior.keep_cache(self.arguments.pop(CACHE_NAME))
        return self.token_ids[:, :num_tokens]

    def write_all(self) -> Tensor | list[Tensor]:
        """Return every sequence at its length: (B, k), or a list of (k,) tensors where the lengths differ."""
        token_ids = self.write(max(self.counts))  # (B, longest)
        if len(set(self.counts)) == 1:
            return token_ids
        return [ids[:count] for ids, count in zip(token_ids, self.counts, strict=True)]
