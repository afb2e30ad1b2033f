"""Layers of the prior: self-attention with a cache, cross-attention to the text, and the block that combines them.

Letters: B batch, L tokens of this call, M text length, S keys (cached and new), D hidden size.
"""

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.modeling_layers import GradientCheckpointingLayer

from .chosen_attention import FUSED, attend_as_chosen
from .configuration_prior import FlexTokPriorConfig
from .layers import GatedMLP, attend
from .packed_linear import linear


def make_norm(config: FlexTokPriorConfig) -> nn.Module:
    """Return a normalization over the width of the model."""
    norm_class = nn.LayerNorm if config.norm_type == "layer_norm" else nn.RMSNorm
    return norm_class(config.hidden_size, config.norm_eps)


def make_qk_norm(config: FlexTokPriorConfig, is_used: bool) -> nn.Module:
    """Return a normalization of queries or keys over the width of a head, or the identity."""
    if not is_used:
        return nn.Identity()
    norm_class = nn.LayerNorm if (config.qk_norm_type or config.norm_type) == "layer_norm" else nn.RMSNorm
    eps = config.norm_eps if config.qk_norm_eps is None else config.qk_norm_eps
    return norm_class(config.hidden_size // config.num_attention_heads, eps)


def residual_projection(in_features: int, out_features: int, bias: bool) -> nn.Linear:
    """Make the last layer of a residual update, marked because it starts smaller than other layers."""
    return mark_residual(nn.Linear(in_features, out_features, bias))


def mark_residual(layer: nn.Linear) -> nn.Linear:
    """Mark the last layer of a residual update for `_init_weights`."""
    layer.is_residual = True  # type: ignore[assignment]
    return layer


class CausalSelfAttention(nn.Module):
    """Multi-head self-attention over the tokens so far."""

    def __init__(self, config: FlexTokPriorConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scale = self.head_dim**-0.5 if config.attention_scale is None else config.attention_scale
        # rows: query, key, value
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size, config.use_bias)
        self.out_proj = residual_projection(config.hidden_size, config.hidden_size, config.use_bias)
        self.query_norm = make_qk_norm(config, config.qk_norm)
        self.key_norm = make_qk_norm(config, config.qk_norm)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        is_causal: bool,
        cache: Cache | None,
        needs_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Mix (B, L, D) with the cached positions; `attention_mask` (B or 1, 1, L, S) is true where attention goes.

        Returns:
            New states (B, L, D), and the attention weights (B, heads, L, S) if they are needed or there anyway.
        """
        query, key, value = linear(self.qkv_proj, hidden_states).unflatten(-1, (3, -1, self.head_dim)).unbind(2)
        query, key = self.query_norm(query), self.key_norm(key)  # (B, L, heads, head_dim)
        if cache is not None:
            key, value = update_cache(cache, key, value, self.layer_idx)  # (B, S, heads, head_dim)
        mask = (attention_mask, is_causal, needs_weights)
        context, weights = self.attend(query, key, value, *mask)  # (B, L, heads, head_dim)
        return linear(self.out_proj, context.flatten(-2)), weights  # (B, L, D)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        is_causal: bool,
        needs_weights: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Run the implementation that `set_attn_implementation` chose; returns context and weights, if it has them."""
        if self.config._attn_implementation in FUSED and not needs_weights:
            return attend(query, key, value, attention_mask, self.scale, is_causal), None
        return attend_as_chosen(self, query, key, value, attention_mask, is_causal)


class CrossAttention(nn.Module):
    """Multi-head attention of the tokens to the projected text, whose keys and values are computed once."""

    def __init__(self, config: FlexTokPriorConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.query_proj = nn.Linear(config.hidden_size, config.hidden_size, config.use_bias)
        # rows: key, value
        self.key_value_proj = nn.Linear(config.hidden_size, 2 * config.hidden_size, bias=config.use_bias)
        self.out_proj = residual_projection(config.hidden_size, config.hidden_size, config.use_bias)
        self.query_norm = make_qk_norm(config, config.cross_qk_norm)
        self.key_norm = make_qk_norm(config, config.cross_qk_norm)

    def forward(
        self, hidden_states: Tensor, text_states: Tensor | None, text_mask: Tensor | None, cache: Cache | None
    ) -> Tensor:
        """Attend from (B, L, D) to the text (B, M, D), or its cached keys and values; `text_mask` is (B, 1, 1, M)."""
        query = self.query_norm(linear(self.query_proj, hidden_states).unflatten(-1, (-1, self.head_dim)))
        if cache is not None and cache.is_updated.get(self.layer_idx):
            layer = cache.cross_attention_cache.layers[self.layer_idx]
            key, value = layer.keys.transpose(1, 2), layer.values.transpose(1, 2)
        else:
            key, value = self.key_value_proj(text_states).unflatten(-1, (2, -1, self.head_dim)).unbind(2)
            key = self.key_norm(key)  # (B, M, heads, head_dim)
            if cache is not None:
                key, value = update_cache(cache.cross_attention_cache, key, value, self.layer_idx)
                cache.is_updated[self.layer_idx] = True
        return linear(self.out_proj, attend(query, key, value, text_mask).flatten(-2))  # (B, L, D)


class TextProjector(nn.Module):
    """Two-layer MLP that projects the text encoder's states to the width of the prior."""

    def __init__(self, config: FlexTokPriorConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.text_hidden_size, config.text_hidden_size, config.use_bias)
        self.activation = ACT2FN[config.projector_activation]
        self.fc2 = nn.Linear(config.text_hidden_size, config.hidden_size, config.use_bias)

    def forward(self, encoder_hidden_states: Tensor) -> Tensor:
        """Project (B, M, text_hidden_size) to (B, M, D)."""
        return self.fc2(self.activation(self.fc1(encoder_hidden_states)))


class PriorBlock(GradientCheckpointingLayer):
    """Pre-norm transformer block: self-attention, cross-attention to the text if there is any, feed-forward."""

    def __init__(self, config: FlexTokPriorConfig, layer_idx: int):
        super().__init__()
        self.dropout = config.dropout
        self.self_attention_norm = make_norm(config)
        self.self_attention = CausalSelfAttention(config, layer_idx)
        self.reads_text = config.text_hidden_size is not None
        if self.reads_text:
            self.cross_attention_norm = make_norm(config)
            self.cross_attention = CrossAttention(config, layer_idx)
        self.mlp_norm = make_norm(config)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, config.use_bias, is_fused=True)
        mark_residual(self.mlp.down_proj)

    def forward(
        self,
        hidden_states: Tensor,
        text_states: Tensor | None,
        attention_mask: Tensor | None = None,
        is_causal: bool = False,
        text_mask: Tensor | None = None,
        cache: Cache | None = None,
        needs_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Refine the sequence.

        Args:
            hidden_states: (B, L, D).
            text_states: projected text, (B, M, D); `None` without text, or where its keys and values are cached.
            attention_mask: (B or 1, 1, L, S) boolean, true where a token may attend.
            is_causal: use the kernel's own causal mask instead.
            text_mask: (B, 1, 1, M) boolean, true where there is text.
            cache: keys and values so far, extended in place.
            needs_weights: compute the weights of self-attention, which the default kernels do not keep.

        Returns:
            New hidden states, (B, L, D), and the weights of self-attention, (B, heads, L, S), if there are any.
        """
        normed = self.self_attention_norm(hidden_states)
        update, weights = self.self_attention(normed, attention_mask, is_causal, cache, needs_weights)
        hidden_states = hidden_states + F.dropout(update, self.dropout, self.training)
        if self.reads_text:
            normed = self.cross_attention_norm(hidden_states)
            update = self.cross_attention(normed, text_states, text_mask, cache)
            hidden_states = hidden_states + F.dropout(update, self.dropout, self.training)
        update = self.mlp(self.mlp_norm(hidden_states))
        return hidden_states + F.dropout(update, self.dropout, self.training), weights


def update_cache(cache: Cache, key: Tensor, value: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
    """Append keys and values (B, L, heads, head_dim) to a layer of the cache; returns all of them, (B, S, ...)."""
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    # the cache stores (B, heads, S, head_dim)
    key, value = cache.update(key.transpose(1, 2), value.transpose(1, 2), layer_idx)
    return key.transpose(1, 2), value.transpose(1, 2)
