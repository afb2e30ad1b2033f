"""Nested dropout: draw how many tokens each image keeps, and mask the tail.

Training keeps a random prefix of each token sequence, so that every prefix describes the whole image
(Rippel et al., 2014, https://arxiv.org/abs/1402.0915).
"""

import torch
from torch import Tensor


INVISIBLE = -1e4  # added to a logit, it hides the key; finite in every dtype
KEEP_MODES = ("uniform", "powers_of_two", "uniform_rounded_up")


def token_ladder(num_registers: int) -> list[int]:
    """Return the token counts 1, 2, 4, ... and `num_registers` itself, in increasing order without duplicates."""
    return [2**power for power in range(num_registers.bit_length()) if 2**power < num_registers] + [num_registers]


def sample_num_tokens(
    batch_size: int, num_registers: int, mode: str = "powers_of_two", generator: torch.Generator | None = None
) -> Tensor:
    """Draw how many tokens each sample keeps.

    Args:
        batch_size: number of samples B.
        num_registers: longest sequence K.
        mode: "uniform" over 1..K, "powers_of_two" over 1, 2, 4, ... and K, or "uniform_rounded_up" to one of these.
        generator: random generator; the result is on its device.

    Returns:
        Counts, (B,) int64 in [1, K].
    """
    device = generator.device if generator is not None else None
    if mode not in KEEP_MODES:
        raise ValueError(f"`mode` must be one of {', '.join(KEEP_MODES)}, got {mode!r}.")
    if mode == "powers_of_two":
        ladder_length = len(token_ladder(num_registers))
        powers = 2 ** torch.randint(ladder_length, (batch_size,), generator=generator, device=device)
        return powers.clamp(max=num_registers)
    num_tokens = torch.randint(1, num_registers + 1, (batch_size,), generator=generator, device=device)
    if mode == "uniform":
        return num_tokens
    _, num_bits = torch.frexp((num_tokens - 1).float())  # of num_tokens - 1, so that powers of two are unchanged
    return (2 ** num_bits.long()).clamp(max=num_registers)


def mask_tail(registers: Tensor, num_tokens: Tensor, mask_token: Tensor) -> Tensor:
    """Keep the first `num_tokens[b]` registers of sample b and replace the others.

    Args:
        registers: (B, K, D), left unchanged.
        num_tokens: registers to keep per sample, (B,), each in [0, K].
        mask_token: learned replacement for a dropped register, including its position, (D,).

    Returns:
        New registers, (B, K, D).
    """
    position = torch.arange(registers.shape[1], device=registers.device)  # (K,)
    is_kept = position < num_tokens.unsqueeze(1)  # (B, K)
    return torch.where(is_kept.unsqueeze(-1), registers, mask_token)


def count_kept(codes: Tensor, num_tokens: Tensor | None, is_unconditional: Tensor | None = None) -> Tensor:
    """Count the codes (B, k, Q) that each sample keeps, (B,): `num_tokens` or all k, but none where unconditional."""
    num_codes = codes.shape[1]
    if num_tokens is None:
        kept = torch.full((codes.shape[0],), num_codes, device=codes.device)
    else:
        kept = num_tokens.clamp(max=num_codes)
    return kept if is_unconditional is None else torch.where(is_unconditional, 0, kept)


def merged_tail_bias(kept: Tensor, num_slots: int, length: Tensor) -> Tensor:
    """Compute the attention bias with which the slots after the kept registers stand for all dropped registers.

    Dropped registers are identical: they hold the same token without a position. As keys, m slots weigh as much as n
    registers if `log(n / m)` is added to each slot's logit; as queries, they stay identical from layer to layer.

    Args:
        kept: number of registers that each sample keeps, (B,).
        num_slots: length S of the register sequence; at least as many as any sample keeps.
        length: number of registers that the slots stand for, (B,); at least as many as the sample keeps.

    Returns:
        Bias per slot, (B, S) float32; zero for kept registers.
    """
    kept, length = kept.unsqueeze(1), length.unsqueeze(1)
    is_tail = torch.arange(num_slots, device=kept.device) >= kept  # (B, S)
    ratio = (length - kept).float() / (num_slots - kept)  # (B, 1)
    bias = torch.where(ratio > 0, ratio.log(), INVISIBLE)
    return torch.where(is_tail, bias, 0.0)
