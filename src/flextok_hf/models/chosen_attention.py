"""Attention by the implementation that Transformers' `set_attn_implementation` chose; of encoder and prior.

Letters: B batch, L sequence, S keys.
"""

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


FUSED = (None, "sdpa")  # implementations that keep no weights; `layers.attend` runs them


def attend_as_chosen(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attend for a module of a Transformers model by the implementation that `set_attn_implementation` chose.

    Fused kernels keep no weights, so plain PyTorch takes their place: call `attend` where none are needed.

    Args:
        module: has `config` and `scale`.
        query, key, value: (B, L, heads, head_dim).
        attention_mask: broadcastable to (B, heads, Lq, Lk), as in `attend`.
        is_causal: mask later keys.

    Returns:
        Context (B, Lq, heads, head_dim), and weights (B, heads, Lq, Lk) if the implementation returns them.
    """
    implementation = module.config._attn_implementation
    if implementation in (*FUSED, "eager"):
        return attend_eagerly(query, key, value, attention_mask, module.scale, is_causal)
    states = (states.transpose(1, 2) for states in (query, key, value))
    interface = ALL_ATTENTION_FUNCTIONS[implementation]  # registered by the user
    return interface(module, *states, attention_mask, scaling=module.scale, dropout=0.0, is_causal=is_causal)


def attend_eagerly(
    query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scale: float, is_causal: bool
) -> tuple[Tensor, Tensor]:
    """Compute `attend` in plain PyTorch; returns context (B, L, heads, head_dim) and weights (B, heads, L, S)."""
    logits = torch.einsum("bqhd,bkhd->bhqk", query, key) * scale
    if is_causal:
        attention_mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        logits = logits.masked_fill(~attention_mask, torch.finfo(logits.dtype).min)
    elif attention_mask is not None:
        logits = logits + attention_mask
    weights = logits.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return torch.einsum("bhqk,bkhd->bqhd", weights, value), weights
