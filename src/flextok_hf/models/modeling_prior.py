"""Prior: text or class -> token ids, one after the other.

A decoder-only transformer over picture tokens (the autoregressive models of Bachmann et al., 2025, arXiv 2502.13967)
with the calls of a Transformers causal LM: `input_ids` are `[BOS, t0, t1, ...]`, logits at position j predict token j.

Letters: B batch, L tokens of this call, M text length, S keys (cached and new), D hidden size, V codebook size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .configuration_prior import FlexTokPriorConfig
from .generation_prior import CACHE_NAME, PriorGenerationMixin
from .layers import attend
from .packed_linear import PackableLinear
from .prior_cache import with_text_cache
from .prior_inputs import UNCONDITIONAL_LABEL, check_forward_inputs
from .whole_weights import WholeWeightsMixin


HEAD_NORM_EPS = 1e-6  # of the norm in front of the output layer, which the published models may have


def make_norm(config: FlexTokPriorConfig) -> nn.Module:
    """Return a normalization of the width of the model."""
    norm_class = nn.LayerNorm if config.norm_type == "layer_norm" else nn.RMSNorm
    return norm_class(config.hidden_size, config.norm_eps)


def make_qk_norm(config: FlexTokPriorConfig, is_used: bool) -> nn.Module:
    """Return a normalization of queries or keys over the width of a head, or the identity."""
    if not is_used:
        return nn.Identity()
    norm_class = nn.LayerNorm if (config.qk_norm_type or config.norm_type) == "layer_norm" else nn.RMSNorm
    eps = config.norm_eps if config.qk_norm_eps is None else config.qk_norm_eps
    return norm_class(config.hidden_size // config.num_attention_heads, eps)


class ResidualProjection(PackableLinear):
    """Last layer of a residual update; a class of its own because it starts smaller than other layers."""


class CausalSelfAttention(nn.Module):
    """Multi-head self-attention over the tokens so far."""

    def __init__(self, config: FlexTokPriorConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scale = config.attention_scale
        # rows: query, key, value
        self.qkv_proj = PackableLinear(config.hidden_size, 3 * config.hidden_size, bias=config.use_bias)
        self.out_proj = ResidualProjection(config.hidden_size, config.hidden_size, bias=config.use_bias)
        self.query_norm = make_qk_norm(config, config.qk_norm)
        self.key_norm = make_qk_norm(config, config.qk_norm)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None, is_causal: bool, cache: Cache | None):
        """Mix (B, L, D) with the cached positions; `attention_mask` (1, 1, L, S): who may look where."""
        query, key, value = self.qkv_proj(hidden_states).unflatten(-1, (3, -1, self.head_dim)).unbind(2)
        query, key = self.query_norm(query), self.key_norm(key)  # (B, L, heads, head_dim)
        if cache is not None:
            key, value = update_cache(cache, key, value, self.layer_idx)  # (B, S, heads, head_dim)
        context = attend(query, key, value, attention_mask, self.scale, is_causal)  # (B, L, heads, head_dim)
        return self.out_proj(context.flatten(-2))  # (B, L, D)


class CrossAttention(nn.Module):
    """Multi-head attention of the tokens to the projected text, whose keys and values are made once."""

    def __init__(self, config: FlexTokPriorConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.query_proj = PackableLinear(config.hidden_size, config.hidden_size, bias=config.use_bias)
        # rows: key, value
        self.key_value_proj = nn.Linear(config.hidden_size, 2 * config.hidden_size, bias=config.use_bias)
        self.out_proj = ResidualProjection(config.hidden_size, config.hidden_size, bias=config.use_bias)
        self.query_norm = make_qk_norm(config, config.cross_qk_norm)
        self.key_norm = make_qk_norm(config, config.cross_qk_norm)

    def forward(
        self, hidden_states: Tensor, text_states: Tensor | None, text_mask: Tensor | None, cache: Cache | None
    ) -> Tensor:
        """Let (B, L, D) read the text (B, M, D), or its cached keys and values; `text_mask` is (B, 1, 1, M)."""
        query = self.query_norm(self.query_proj(hidden_states).unflatten(-1, (-1, self.head_dim)))
        if cache is not None and cache.is_updated.get(self.layer_idx):
            layer = cache.cross_attention_cache.layers[self.layer_idx]
            key, value = layer.keys.transpose(1, 2), layer.values.transpose(1, 2)
        else:
            key, value = self.key_value_proj(text_states).unflatten(-1, (2, -1, self.head_dim)).unbind(2)
            key = self.key_norm(key)  # (B, M, heads, head_dim)
            if cache is not None:
                key, value = update_cache(cache.cross_attention_cache, key, value, self.layer_idx)
                cache.is_updated[self.layer_idx] = True
        return self.out_proj(attend(query, key, value, text_mask).flatten(-2))  # (B, L, D)


class GatedMLP(nn.Module):
    """SwiGLU feed-forward layer (Shazeer, 2020, https://arxiv.org/abs/2002.05202)."""

    def __init__(self, config: FlexTokPriorConfig):
        super().__init__()
        # rows: gate, up
        self.gate_up_proj = PackableLinear(config.hidden_size, 2 * config.intermediate_size, bias=config.use_bias)
        self.down_proj = ResidualProjection(config.intermediate_size, config.hidden_size, bias=config.use_bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Transform every position of (B, L, D) by itself."""
        gate, up = self.gate_up_proj(hidden_states).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class TextProjector(nn.Module):
    """Two layers that fit the text encoder's states to the width of the prior."""

    def __init__(self, config: FlexTokPriorConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.text_hidden_size, config.text_hidden_size, bias=config.use_bias)
        self.activation = ACT2FN[config.projector_activation]
        self.fc2 = nn.Linear(config.text_hidden_size, config.hidden_size, bias=config.use_bias)

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
        self.mlp = GatedMLP(config)

    def forward(
        self,
        hidden_states: Tensor,
        text_states: Tensor | None,
        attention_mask: Tensor | None = None,
        is_causal: bool = False,
        text_mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Refine the sequence.

        Args:
            hidden_states: (B, L, D).
            text_states: projected text, (B, M, D); `None` without text, or where its keys and values are cached.
            attention_mask: (1, 1, L, S) boolean, true where a token may look.
            is_causal: use the kernel's own causal mask instead.
            text_mask: (B, 1, 1, M) boolean, true where there is text.
            cache: keys and values so far, which the blocks extend.

        Returns:
            New hidden states, (B, L, D).
        """
        normed = self.self_attention_norm(hidden_states)
        update = self.self_attention(normed, attention_mask, is_causal, cache)
        hidden_states = hidden_states + F.dropout(update, self.dropout, self.training)
        if self.reads_text:
            normed = self.cross_attention_norm(hidden_states)
            update = self.cross_attention(normed, text_states, text_mask, cache)
            hidden_states = hidden_states + F.dropout(update, self.dropout, self.training)
        update = self.mlp(self.mlp_norm(hidden_states))
        return hidden_states + F.dropout(update, self.dropout, self.training)


class FlexTokPriorForCausalLM(WholeWeightsMixin, PreTrainedModel, PriorGenerationMixin):
    """Writes the token ids of a picture from a text or a class, coarsest first.

    The start vector is row V of the embedding, so `[BOS, t0, ...]` is an ordinary `input_ids` and `generate()` starts
    from `bos_token_id` as for any causal LM. The head writes codes only.
    """

    config_class = FlexTokPriorConfig
    base_model_prefix = ""  # one class, no headless base model
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True  # `Trainer` may pass `num_items_in_batch`
    _no_split_modules = ["PriorBlock"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_sdpa = True
    _can_compile_fullgraph = True

    def __init__(self, config: FlexTokPriorConfig):
        super().__init__(config)
        self.token_embedding = nn.Embedding(config.codebook_size + 1, config.hidden_size)  # last row: start vector
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        if config.num_classes is not None:
            self.class_embedding = nn.Embedding(config.num_classes, config.hidden_size)
        if config.text_hidden_size is not None:
            self.text_projector = TextProjector(config)
        self.blocks = nn.ModuleList(PriorBlock(config, layer_idx) for layer_idx in range(config.num_hidden_layers))
        self.norm = make_norm(config) if config.use_final_norm else nn.Identity()
        self.head_norm = nn.LayerNorm(config.hidden_size, HEAD_NORM_EPS) if config.use_head_norm else nn.Identity()
        self.head = PackableLinear(config.hidden_size, config.codebook_size, bias=config.use_bias)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, ResidualProjection):
            # GPT-2's rule (Radford et al., 2019): the sum of all residual updates starts at the scale of one of them
            init.normal_(module.weight, std=std / (2 * self.config.num_hidden_layers) ** 0.5)
        elif isinstance(module, (nn.Linear, nn.Embedding)):
            init.normal_(module.weight, std=std)
        elif isinstance(module, (nn.RMSNorm, nn.LayerNorm)):
            init.ones_(module.weight)
        if getattr(module, "bias", None) is not None:
            init.zeros_(module.bias)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.token_embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.token_embedding = value

    def get_output_embeddings(self) -> nn.Linear:
        return self.head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.head = new_embeddings

    def prepend_bos(self, token_ids: Tensor) -> Tensor:
        """Turn token ids (B, k), k >= 0, into `input_ids` (B, k + 1), a start of a sequence or a training row."""
        return F.pad(token_ids, (1, 0), value=self.config.bos_token_id)

    def project_text(self, encoder_hidden_states: Tensor) -> Tensor:
        """Fit the text encoder's states (B, M, text_hidden_size) to the prior, (B, M, D)."""
        return self.text_projector(encoder_hidden_states)

    def embed(self, input_ids: Tensor, positions: Tensor, class_labels: Tensor | None) -> Tensor:
        """Embed ids (B, L) at `positions` (L,) as (B, L, D); a class is added to the start vector, -1 adds nothing."""
        hidden_states = self.token_embedding(input_ids) + self.position_embedding(positions)  # (B, L, D)
        if class_labels is None:
            return hidden_states
        has_class = class_labels != UNCONDITIONAL_LABEL  # (B,)
        class_states = self.class_embedding(torch.where(has_class, class_labels, 0))  # (B, D)
        is_start = (positions == 0)[None, :, None] & has_class[:, None, None]  # (B, L, 1)
        return hidden_states + torch.where(is_start, class_states[:, None], 0.0)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        class_labels: Tensor | None = None,
        cache: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        past_key_values: Cache | None = None,
    ) -> CausalLMOutputWithPast:
        """Predict the next token at every position.

        Args:
            input_ids: (B, L), `[BOS, t0, t1, ...]`, or what follows the positions in `cache`.
            encoder_hidden_states: states of the text encoder, (B, M, text_hidden_size); needed by models with text.
            encoder_attention_mask: (B, M), 1 for text and 0 for padding; `None` means no padding.
            class_labels: (B,) in [0, num_classes), or -1 for unconditional; needed by models with classes.
            cache: keys and values of the positions so far; a `DynamicCache` or `StaticCache`, wrapped in an
                `EncoderDecoderCache` with the text's keys and values for models with text.
            labels: (B, L), usually `input_ids` itself; shifted inside, -100 is ignored. The last input has nothing to
                predict and is then not run: logits are (B, L - 1, V), and `[BOS, all tokens]` fits the positions.
            use_cache: return a cache; `None` means only if one was given.
            logits_to_keep: compute the logits of the last positions only; 0 means all; or positions as a 1-D tensor.
            num_items_in_batch: divide the summed loss by this rather than by the number of labels.
            past_key_values: the name of `cache` in Transformers before 5.24.

        Returns:
            `loss` if `labels` were given, `logits` (B, L, V) over the codes, the cache if asked for.
        """
        cache = past_key_values if cache is None else cache
        text = (encoder_hidden_states, encoder_attention_mask)
        check_forward_inputs(self.config, input_ids, *text, class_labels, cache, labels)
        if labels is not None:
            input_ids = input_ids[:, :-1]
        if cache is None and use_cache:
            cache = DynamicCache(config=self.config)
        if cache is not None:
            cache = with_text_cache(self.config, cache)

        positions, attention_mask, is_causal = plan_attention(input_ids, cache)
        hidden_states = self.embed(input_ids, positions, class_labels)  # (B, L, D)
        text_states = None
        if self.config.text_hidden_size is not None and not has_cached_text(cache):
            text_states = self.project_text(encoder_hidden_states)  # (B, M, D)
        text_mask = None if encoder_attention_mask is None else encoder_attention_mask[:, None, None].bool()
        masks = {"attention_mask": attention_mask, "is_causal": is_causal, "text_mask": text_mask}
        for block in self.blocks:
            hidden_states = block(hidden_states, text_states, **masks, cache=cache)

        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.head(self.head_norm(self.norm(hidden_states[:, kept])))  # (B, L, V)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits, None, self.config.codebook_size, num_items_in_batch, shift_labels=labels[:, 1:].contiguous()
            )
        returned_cache = {CACHE_NAME: cache if use_cache is not False else None}
        return CausalLMOutputWithPast(loss=loss, logits=logits, **returned_cache)


def update_cache(cache: Cache, key: Tensor, value: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
    """Append keys and values (B, L, heads, head_dim) to a layer of the cache; returns all of them, (B, S, ...)."""
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    # the cache keeps (B, heads, S, head_dim)
    key, value = cache.update(key.transpose(1, 2), value.transpose(1, 2), layer_idx)
    return key.transpose(1, 2), value.transpose(1, 2)


def has_cached_text(cache: Cache | None) -> bool:
    """Whether the text's keys and values are in the cache, so that its states are not needed again."""
    return cache is not None and bool(cache.is_updated.get(0))


def plan_attention(input_ids: Tensor, cache: Cache | None) -> tuple[Tensor, Tensor | None, bool]:
    """Where the inputs stand, and what each may look at.

    A dynamic cache knows its length as a number, so the two usual cases need no mask; a static cache keeps it in a
    tensor, which must not be read on the host, and always gets one.

    Returns:
        positions (L,), attention mask (1, 1, L, S) or `None`, and whether the kernel's own causal mask applies.
    """
    num_inputs, device = input_ids.shape[1], input_ids.device
    if cache is None:
        return torch.arange(num_inputs, device=device), None, True
    past_length = cache.get_seq_length()
    positions = torch.arange(num_inputs, device=device) + past_length
    if not cache.is_compileable and past_length == 0:
        return positions, None, True
    if not cache.is_compileable and num_inputs == 1:
        return positions, None, False
    num_keys, _ = cache.get_mask_sizes(num_inputs, 0)
    is_visible = torch.arange(num_keys, device=device) <= positions[:, None]  # (L, S)
    return positions, is_visible[None, None], False
