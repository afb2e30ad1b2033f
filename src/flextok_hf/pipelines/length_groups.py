"""Groups rows of a decoder batch by length, because the longest row of a call sets its cost.

Guidance adds rows without tokens to rows with many, and nested dropout draws very different counts.

Letters: B batch, C latent channels, h w latent grid, N patches, K registers, k codes, Q code dimensions.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.modeling_decoder import FlexTokFlowDecoder


# Cost of one more call, in sequence positions. A single row keeps CPU cores busy, but not an accelerator.
CALL_COST = {"cpu": 16}
CALL_COST_OF_ACCELERATORS = 2048


@dataclass
class LengthGroup:
    """Rows of one decoder call and the inputs that stay the same in all steps, on the decoder's device."""

    rows: Tensor  # (G,), indices in the batch
    codes: Tensor  # (G, k, Q), as long as the longest row needs
    num_tokens: Tensor  # (G,)
    is_unconditional: Tensor  # (G,)


class LengthGroups:
    """Computes the velocities of a batch in as many decoder calls as are worth it; the result is that of one call.

    Args:
        decoder: the flow decoder.
        codes: (B, k, Q) in [-1, 1].
        num_tokens: number of codes to use per row, (B,) in [0, k]; preferably on the CPU, where it is read.
        is_unconditional: (B,) boolean, true where the codes are ignored; preferably on the CPU too.
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
        self.places = torch.cat([group.rows for group in self.groups]).argsort()  # (B,), restores the batch order

    def predict_velocity(
        self,
        noisy_latents: Tensor,
        sigma: Tensor | None = None,
        modulation: Tensor | None = None,
        next_sigma: Tensor | None = None,
        guidance_scale: Tensor | None = None,
    ) -> Tensor:
        """Return the velocity (B, C, h, w); arguments as in the decoder's `forward`."""
        velocities = []
        for index, group in enumerate(self.groups):
            levels = {"sigma": sigma, "next_sigma": next_sigma, "guidance_scale": guidance_scale}
            for name, value in levels.items():
                levels[name] = value if value is None or value.shape[0] == 1 else value[group.rows]
            own_sigma = levels.pop("sigma")
            inputs = (noisy_latents[group.rows], own_sigma, group.codes, group.num_tokens, group.is_unconditional)
            # each call has its own state in the decoder's cache
            is_cached = self.decoder.is_cache_enabled
            context = self.decoder.cache_context(f"{len(self.places)} rows, {index}") if is_cached else nullcontext()
            with context:
                velocities.append(self.decoder(*inputs, return_dict=False, modulation=modulation, **levels)[0])
        return torch.cat(velocities)[self.places]


def group_by_length(lengths: Sequence[int], num_patches: int, num_registers: int, call_cost: int) -> list[list[int]]:
    """Split rows into calls at minimum total cost, by dynamic programming over the distinct lengths.

    Args:
        lengths: number of registers that each row keeps.
        num_patches: N, in addition to the registers of every row.
        num_registers: K; a call has one slot more than its longest row keeps, at most K. 0 if all rows cost the same.
        call_cost: fixed cost of a call, in positions.

    Returns:
        Rows of each call, shortest first.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    ends = [i + 1 for i, row in enumerate(order) if i + 1 == len(order) or lengths[order[i + 1]] != lengths[row]]
    best = {0: (0, 0)}  # rows covered -> (cost so far, start of the last call)
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
