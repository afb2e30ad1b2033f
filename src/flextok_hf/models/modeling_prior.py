"""Prior: text or class -> token ids, one at a time.

A decoder-only transformer over image tokens (the autoregressive models of Bachmann et al., 2025, arXiv 2502.13967)
with the API of a Transformers causal LM: `input_ids` are `[BOS, t0, t1, ...]`, logits at position j predict token j.

Letters: B batch, L tokens of this call, M text length, S keys (cached and new), D hidden size, V codebook size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .configuration_prior import FlexTokPriorConfig
from .generation_prior import PriorGenerationMixin
from .packed_linear import PackableLinear
from .prior_cache import CACHE_NAME, prepare_cache
from .prior_inputs import UNCONDITIONAL_LABEL, check_forward_inputs
from .prior_layers import PriorBlock, ResidualProjection, TextProjector, make_norm
from .whole_weights import WholeWeightsMixin


HEAD_NORM_EPS = 1e-6  # of the norm that published models may have before the output layer


class FlexTokPriorForCausalLM(WholeWeightsMixin, PreTrainedModel, PriorGenerationMixin):
    """Generates the token ids of an image from a text or a class, coarsest first.

    The start vector is row V of the embedding, so `[BOS, t0, ...]` are regular `input_ids` and `generate()` starts
    from `bos_token_id` as for any causal LM. The head predicts codes only.
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
        # not derived from `config`, as Transformers does: that would lose options that only our `generate` knows
        self.generation_config = GenerationConfig(bos_token_id=config.bos_token_id)
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
            # GPT-2's rule (Radford et al., 2019): the sum of all residual updates starts at the scale of a single one
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
        """Turn token ids (B, k), k >= 0, into `input_ids` (B, k + 1), a prefix to continue or a training row."""
        return F.pad(token_ids, (1, 0), value=self.config.bos_token_id)

    def project_text(self, encoder_hidden_states: Tensor) -> Tensor:
        """Project the text encoder's states (B, M, text_hidden_size) to (B, M, D)."""
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
            input_ids: (B, L), `[BOS, t0, t1, ...]`, or the tokens that follow those in `cache`.
            encoder_hidden_states: states of the text encoder, (B, M, text_hidden_size); required by models with text.
            encoder_attention_mask: (B, M), 1 for text and 0 for padding; `None` means no padding.
            class_labels: (B,) in [0, num_classes), or -1 for unconditional; required by models with classes.
            cache: keys and values of the positions so far; a `DynamicCache` or `StaticCache`, wrapped in an
                `EncoderDecoderCache` with the text's keys and values for models with text.
            labels: (B, L), usually `input_ids`; shifted internally, -100 is ignored. The last input, which has no
                target, is then not run: logits are (B, L - 1, V), and `[BOS, all tokens]` fits the positions.
            use_cache: return a cache; `None` means only if one was given.
            logits_to_keep: number of last positions to compute logits for, 0 for all; or positions as a 1-D tensor.
            num_items_in_batch: divide the summed loss by this instead of the number of labels.
            past_key_values: the name of `cache` in Transformers before 5.24.

        Returns:
            `loss` if `labels` were given, `logits` (B, L, V) over the codes, and the cache if requested.
        """
        cache = past_key_values if cache is None else cache
        text = (encoder_hidden_states, encoder_attention_mask)
        check_forward_inputs(self.config, input_ids, *text, class_labels, cache, labels)
        if labels is not None:
            input_ids = input_ids[:, :-1]
        cache = prepare_cache(self.config, cache, use_cache)

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


def has_cached_text(cache: Cache | None) -> bool:
    """Whether the text's keys and values are cached, so that its states are no longer needed."""
    return cache is not None and bool(cache.is_updated.get(0))


def plan_attention(input_ids: Tensor, cache: Cache | None) -> tuple[Tensor, Tensor | None, bool]:
    """Return the positions of the inputs and what each may attend to.

    The length of a dynamic cache is a number, so the two common cases need no mask. In a static cache it is a tensor,
    which must not be read on the host, so a mask is always used.

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
