"""Rows of a decoder batch in groups of similar length, because a call costs as much as its longest row makes it.

Guidance adds rows without any tokens to rows with many, and nested dropout draws very different counts.

Letters: B batch, C latent channels, h w latent grid, N patches, K registers, k codes, Q code dimensions.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.modeling_decoder import FlexTokFlowDecoder


# What one more call costs, in sequence positions. Cores are busy with a single row; an accelerator is not.
CALL_COST = {"cpu": 16}
CALL_COST_OF_ACCELERATORS = 2048


@dataclass
class LengthGroup:
    """Rows that go through the decoder together, and what does not change from step to step: all on its device."""

    rows: Tensor  # (G,), places in the batch
    codes: Tensor  # (G, k, Q), as long as the longest row needs
    num_tokens: Tensor  # (G,)
    is_unconditional: Tensor  # (G,)


class LengthGroups:
    """Computes velocities of a batch in as many decoder calls as pay off; the result is that of a single call.

    Args:
        decoder: the model.
        codes: (B, k, Q) in [-1, 1].
        num_tokens: codes to use per row, (B,) in [0, k]. Read here, so better not on an accelerator.
        is_unconditional: (B,) boolean, true where the codes are to be ignored. Read here as well.
    """

    def __init__(self, decoder: FlexTokFlowDecoder, codes: Tensor, num_tokens: Tensor, is_unconditional: Tensor):
        self.decoder = decoder
        lengths = torch.where(is_unconditional.cpu(), 0, num_tokens.cpu())
        config, device = decoder.config, codes.device
        call_cost = CALL_COST.get(device.type, CALL_COST_OF_ACCELERATORS)
        num_registers = config.num_registers if config.token_layout == "registers" else 0
        groups = group_by_length(lengths.tolist(), config.grid_size**2, num_registers, call_cost)
        self.groups = []
        for rows in map(torch.tensor, groups):
            kept_codes = codes[rows.to(device), : max(1, int(lengths[rows].max()))]
            flags = (num_tokens.cpu()[rows].to(device), is_unconditional.cpu()[rows].to(device))
            self.groups.append(LengthGroup(rows.to(device), kept_codes, *flags))
        self.places = torch.cat([group.rows for group in self.groups]).argsort()  # (B,), where each row ends up

    def predict_velocity(
        self, noisy_latents: Tensor, sigma: Tensor | None = None, modulation: Tensor | None = None
    ) -> Tensor:
        """Return the velocity (B, C, h, w); arguments as in the decoder's `forward`."""
        velocities = []
        for index, group in enumerate(self.groups):
            own_sigma = sigma if sigma is None or sigma.shape[0] == 1 else sigma[group.rows]
            inputs = (noisy_latents[group.rows], own_sigma, group.codes, group.num_tokens, group.is_unconditional)
            # a cache of the decoder keeps what it knows of each call apart
            is_cached = self.decoder.is_cache_enabled
            context = self.decoder.cache_context(f"{len(self.places)} rows, {index}") if is_cached else nullcontext()
            with context:
                velocities.append(self.decoder(*inputs, return_dict=False, modulation=modulation)[0])
        return torch.cat(velocities)[self.places]


def group_by_length(lengths: Sequence[int], num_patches: int, num_registers: int, call_cost: int) -> list[list[int]]:
    """Divide rows among calls at the least cost, by dynamic programming over the lengths that occur.

    Args:
        lengths: registers that each row keeps.
        num_patches: N, which every row has besides.
        num_registers: K; a call has one slot more than its longest row keeps, at most K. 0 if all rows cost the same.
        call_cost: cost of a call of its own, in positions.

    Returns:
        Rows of each call, the shortest first.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    ends = [i + 1 for i, row in enumerate(order) if i + 1 == len(order) or lengths[order[i + 1]] != lengths[row]]
    best = {0: (0, 0)}  # rows served -> (cost so far, where the last call began)
    for end in ends:
        row_cost = num_patches + min(lengths[order[end - 1]] + 1, num_registers)
        best[end] = min((cost + call_cost + (end - start) * row_cost, start) for start, (cost, _) in best.items())
    groups = []
    end = len(order)
    while end > 0:
        start = best[end][1]
        groups.append(order[start:end])
        end = start
    return groups[::-1]
