"""Finite scalar quantization: features <-> codes <-> token ids.

Letters: B batch, K registers, Q code dimensions, V codebook size.
"""

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..utils.numbers import is_whole_number
from .argument_checks import MAX_SIZE, check_tensor


BOUND_MARGIN = 1e-3  # widens tanh slightly, so that finite features reach the outermost levels


class FiniteScalarQuantizer(nn.Module):
    """Finite scalar quantization (Mentzer et al., 2023, https://arxiv.org/abs/2309.15505, appendix A.1).

    It holds no tensors: levels are a list, so loading a checkpoint cannot lose them or leave them uninitialized.
    """

    def __init__(self, levels: Sequence[int]):
        super().__init__()
        is_list = isinstance(levels, list | tuple) and len(levels) > 0
        if not is_list or not all(is_whole_number(level) and 2 <= level <= MAX_SIZE for level in levels):
            raise ValueError(f"`levels` must be a list of whole numbers of 2 or more, got {str(levels)[:80]}.")
        self.levels = list(levels)
        self.half_widths = [level // 2 for level in levels]
        self.place_values = [math.prod(levels[:i]) for i in range(len(levels))]
        self.codebook_size = math.prod(levels)

    def bound(self, features: Tensor) -> Tensor:
        """Squash features (B, K, Q) into the range of the levels, in float32: dimension q spans its L_q integers."""
        features = features.float()
        features = torch.where(features.isfinite(), features, torch.nan)  # or infinity would look like an edge level
        levels = constant(tuple(self.levels), features.dtype, features.device)  # (Q,)
        half_range = (levels - 1) * (1 + BOUND_MARGIN) / 2
        offset = torch.where(levels % 2 == 0, 0.5, 0.0)  # an even number of levels has no middle one
        shift = torch.atanh(offset / half_range)
        return torch.tanh(features + shift) * half_range - offset

    def forward(self, features: Tensor, is_rounded: Tensor | None = None) -> Tensor:
        """Round features to codes; gradients pass straight through.

        Args:
            features: (B, K, Q), any range; NaN and infinity become NaN.
            is_rounded: (B,) boolean; samples where it is false keep their bounded, unrounded values (a training aid).

        Returns:
            Codes, (B, K, Q) float32 in [-1, 1].
        """
        leading = ["any"] * (features.ndim - 1) if isinstance(features, Tensor) else []
        check_tensor("features", features, "floats", *leading, len(self.levels))
        bounded = self.bound(features)
        rounded = bounded + (bounded.round() - bounded).detach()  # straight-through estimator
        if is_rounded is not None:
            rounded = torch.where(is_rounded.view(-1, 1, 1), rounded, bounded)
        return rounded / constant(tuple(self.half_widths), rounded.dtype, rounded.device)

    def codes_to_ids(self, codes: Tensor) -> Tensor:
        """Convert codes (B, K, Q) in [-1, 1] to token ids (B, K) in [0, V), int64; -1 if a code is not finite."""
        half_widths = constant(tuple(self.half_widths), codes.dtype, codes.device)
        # round, not truncate: a code is stored as k / 13 for 27 levels, and k / 13 * 13 can land just below k
        digits = (codes * half_widths + half_widths).round().long()  # (B, K, Q)
        token_ids = (digits * constant(tuple(self.place_values), digits.dtype, digits.device)).sum(dim=-1)
        # as integers, they would be any id; raising an error here would stall an accelerator
        return torch.where(codes.isfinite().all(dim=-1), token_ids, -1)

    def ids_to_codes(self, token_ids: Tensor) -> Tensor:
        """Convert token ids (B, K) to codes (B, K, Q), float32; the inverse of `codes_to_ids`."""
        place_values = constant(tuple(self.place_values), token_ids.dtype, token_ids.device)
        levels = constant(tuple(self.levels), token_ids.dtype, token_ids.device)
        digits = token_ids.unsqueeze(-1) // place_values % levels  # (B, K, Q)
        half_widths = levels // 2
        return (digits - half_widths).float() / half_widths

    def extra_repr(self) -> str:
        return f"levels={self.levels}, codebook_size={self.codebook_size}"


@functools.lru_cache(maxsize=64)
def constant(values: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return integers as a cached tensor (Q,): copying them at each call would stall an accelerator."""
    with torch.inference_mode(False):  # a tensor made in inference mode could not be used in training later
        return torch.tensor(values, dtype=dtype, device=device)
