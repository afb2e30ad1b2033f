"""Prior: text or class -> token ids, one at a time.

A decoder-only transformer over image tokens (the autoregressive models of Bachmann et al., 2025, arXiv 2502.13967)
with the API of a Transformers causal LM: `input_ids` are `[BOS, t0, t1, ...]`, logits at position j predict token j.

Letters: B batch, L tokens of this call, M text length, S keys (cached and new), D hidden size, V codebook size.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from ..utils.numbers import is_whole_number
from .configuration_prior import FlexTokPriorConfig
from .generation_prior import PriorGenerationMixin
from .packed_linear import linear
from .prior_cache import CACHE_NAME, prepare_cache
from .prior_inputs import UNCONDITIONAL_LABEL, PriorInputs, check_forward_inputs, check_targets
from .prior_layers import PriorBlock, TextProjector, make_norm
from .whole_weights import WholeWeightsMixin


HEAD_NORM_EPS = 1e-6  # of the norm that published models may have before the output layer


class ForwardOfTrainer:
    """Descriptor of a `forward` whose parameters `class_labels` and `shift_labels` are not what `Trainer` looks for.

    `Trainer` takes every parameter of the class's `forward` with "label" in its name for a target. It finds only
    `labels` there, and the whole signature on instances, which says which columns to keep.
    """

    def __init__(self, function: Callable):
        functools.update_wrapper(self, function)
        signature = inspect.signature(function)
        targets = [item for name, item in signature.parameters.items() if name == "labels" or "label" not in name]
        self.__signature__ = signature.replace(parameters=targets)
        self.function = function

    def __get__(self, instance: Any, owner: type) -> Any:
        return self if instance is None else functools.partial(self.function, instance)

    def __call__(self, *args, **kwargs):
        return self.function(*args, **kwargs)


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
        config.validate_sizes()  # again: they may have been set since
        super().__init__(config)
        # not derived from `config`, as Transformers does: that would lose options that only our `generate` knows
        self.generation_config = GenerationConfig(
            bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
        )
        self.token_embedding = nn.Embedding(config.codebook_size + 1, config.hidden_size)  # last row: start vector
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        if config.num_classes is not None:
            self.class_embedding = nn.Embedding(config.num_classes, config.hidden_size)
        if config.shape_conditioning:
            self.shape_proj = nn.Linear(2, config.hidden_size, bias=False)  # without a bias: squares stay as they are
        if config.text_hidden_size is not None:
            self.text_projector = TextProjector(config)
        self.blocks = nn.ModuleList(PriorBlock(config, layer_idx) for layer_idx in range(config.num_hidden_layers))
        self.norm = make_norm(config) if config.use_final_norm else nn.Identity()
        self.head_norm = nn.LayerNorm(config.hidden_size, HEAD_NORM_EPS) if config.use_head_norm else nn.Identity()
        self.head = nn.Linear(config.hidden_size, config.codebook_size, config.use_bias)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if self.config.shape_conditioning and module is self.shape_proj:
            init.zeros_(self.shape_proj.weight)  # a new model does not depend on the shape before it is trained
        elif getattr(module, "is_residual", False):
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

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args, **kwargs) -> nn.Embedding:
        """Refuse any other size than the present one: ids are those of the tokenizer's codebook."""
        if new_num_tokens in (None, self.token_embedding.num_embeddings):
            return self.token_embedding
        raise ValueError(
            f"`resize_token_embeddings` to {new_num_tokens} is not possible: the {self.config.codebook_size} ids are"
            " the tokenizer's codes, and the last row is the start vector. Make a model of another `codebook_size`."
        )

    def _apply(self, *args, **kwargs):
        self.keep_cache(None)  # of the old device and precision
        return super()._apply(*args, **kwargs)

    def prepend_bos(self, token_ids: Tensor) -> Tensor:
        """Turn token ids (B, k), k >= 0, into `input_ids` (B, k + 1), a prefix to continue or a training row."""
        return F.pad(token_ids, (1, 0), value=self.config.bos_token_id)

    def project_text(self, encoder_hidden_states: Tensor) -> Tensor:
        """Project the text encoder's states (B, M, text_hidden_size) to (B, M, D)."""
        return self.text_projector(encoder_hidden_states)

    def embed(
        self,
        token_states: Tensor,
        positions: Tensor,
        class_labels: Tensor | None,
        shape_features: Tensor | None = None,
    ) -> Tensor:
        """Add positions (1 or B, L) to embedded tokens (B, L, D), and class and shape to the start vector."""
        hidden_states = token_states + self.position_embedding(positions)  # (B, L, D)
        is_start = (positions == 0)[..., None]  # (1 or B, L, 1)
        if class_labels is not None:
            has_class = class_labels != UNCONDITIONAL_LABEL  # (B,)
            class_states = self.class_embedding(torch.where(has_class, class_labels, 0))  # (B, D)
            gets_class = is_start & has_class[:, None, None]  # (B, L, 1)
            hidden_states = hidden_states + torch.where(gets_class, class_states[:, None], 0.0)
        if shape_features is not None:
            shape_states = self.shape_proj(shape_features.to(self.shape_proj.weight.dtype))  # (B, D)
            hidden_states = hidden_states + torch.where(is_start, shape_states[:, None], 0.0)
        return hidden_states

    @ForwardOfTrainer
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        class_labels: Tensor | None = None,
        cache: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        shift_labels: Tensor | None = None,
        shape_features: Tensor | None = None,
    ) -> CausalLMOutputWithPast:
        """Predict the next token at every position.

        Args:
            input_ids: (B, L), `[BOS, t0, t1, ...]`, or the tokens that follow those in `cache`. The last of
                `[BOS, all tokens]` has no position and predicts nothing: it is not run, and its logits are zeros.
            encoder_hidden_states, encoder_attention_mask: states of the text encoder, (B, M, text_hidden_size),
                required by models with text; (B, M), 1 for text and 0 for padding, `None` means no padding.
            class_labels: (B,) in [0, num_classes), or -1 for unconditional; required by models with classes.
            cache: keys and values of the positions so far; `past_key_values` in Transformers before 5.24.
            labels: (B, L), usually `input_ids`; shifted internally, -100 is ignored. The last input, which has no
                target, is then not run: logits are (B, L - 1, V).
            use_cache: return a cache; `None` is the configuration's default, and no new cache in training.
            logits_to_keep: number of last positions to compute logits for, 0 for all; or positions as a 1-D tensor.
            num_items_in_batch: divide the summed loss by this instead of the number of labels.
            attention_mask: (B, S), 1 for tokens so far and 0 for padding on the left.
            position_ids: (1 or B, L); by default what follows the cache, not counting padding.
            inputs_embeds: (B, L, D), embedded tokens instead of `input_ids`.
            output_hidden_states, output_attentions: return them; attention is then computed in plain PyTorch.
            shift_labels: (B, L), the target of each input instead of `labels`, -100 is ignored.
            shape_features: (B, 2) floats for models with `shape_conditioning`: log(H W / R^2) and log(H / W) of the
                images, whose trained square has the side R; `None` means that square, for which both are 0.
        """
        labels = labels if shift_labels is None else None
        inputs = PriorInputs(input_ids, inputs_embeds, labels, attention_mask, position_ids)
        text, cache = (encoder_hidden_states, encoder_attention_mask), past_key_values if cache is None else cache
        check_forward_inputs(self.config, inputs, *text, class_labels, cache, shape_features)
        check_targets(shift_labels, logits_to_keep, inputs)
        is_full = cache is None and inputs.length > self.config.max_position_embeddings
        inputs = inputs.without_last() if is_full or labels is not None else inputs
        use_cache = (self.config.use_cache and not self.training) if use_cache is None else use_cache
        cache = prepare_cache(self.config, cache, use_cache and labels is None)
        hidden_states, all_states, all_weights = self.run_blocks(
            inputs, *text, class_labels, shape_features, cache, output_hidden_states, output_attentions
        )
        kept = slice(-logits_to_keep, None) if is_whole_number(logits_to_keep) else logits_to_keep
        if is_full and labels is None:
            hidden_states = F.pad(hidden_states, (0, 0, 0, 1))
        logits = linear(self.head, self.head_norm(hidden_states[:, kept]))  # (B, L, V)
        loss, targets = None, labels[:, 1:].contiguous() if labels is not None else shift_labels
        if targets is not None:
            loss = self.loss_function(
                logits, None, self.config.codebook_size, num_items_in_batch, shift_labels=targets
            )
        states = {"hidden_states": all_states, "attentions": all_weights}
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE_NAME: cache if use_cache else None}, **states)

    def run_blocks(
        self,
        inputs: PriorInputs,
        encoder_hidden_states: Tensor | None,
        encoder_attention_mask: Tensor | None,
        class_labels: Tensor | None,
        shape_features: Tensor | None,
        cache: Cache | None,
        output_hidden_states: bool | None,
        output_attentions: bool | None,
    ) -> tuple[Tensor, tuple[Tensor, ...] | None, tuple[Tensor, ...] | None]:
        """Return normalized hidden states (B, L, D), those of all blocks and all attentions if asked for."""
        keeps_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        keeps_weights = self.config.output_attentions if output_attentions is None else output_attentions
        positions, attention_mask, is_causal = plan_attention(inputs, cache)
        token_states = self.token_embedding(inputs.ids) if inputs.embeds is None else inputs.embeds
        hidden_states = self.embed(token_states, positions, class_labels, shape_features)  # (B, L, D)
        text_states = None
        if self.config.text_hidden_size is not None and not has_cached_text(cache):
            text_states = self.project_text(encoder_hidden_states)  # (B, M, D)
        text_mask = None if encoder_attention_mask is None else encoder_attention_mask[:, None, None].bool()
        common = {"attention_mask": attention_mask, "is_causal": is_causal, "text_mask": text_mask}
        common |= {"cache": cache, "needs_weights": keeps_weights}
        states, attentions = [], []
        for block in self.blocks:
            if keeps_states:  # otherwise each is freed when the next block is done
                states.append(hidden_states)
            hidden_states, weights = block(hidden_states, text_states, **common)
            if keeps_weights:
                attentions.append(weights)
        hidden_states = self.norm(hidden_states)
        states.append(hidden_states)
        return (
            hidden_states,
            tuple(states) if keeps_states else None,
            tuple(attentions) if keeps_weights else None,
        )


def has_cached_text(cache: Cache | None) -> bool:
    """Whether the text's keys and values are cached, so that its states are no longer needed."""
    return cache is not None and bool(cache.is_updated.get(0))


def plan_attention(inputs: PriorInputs, cache: Cache | None) -> tuple[Tensor, Tensor | None, bool]:
    """Return the positions of the inputs and what each may attend to.

    The length of a dynamic cache is a number, so the two common cases need no mask. In a static cache it is a tensor,
    which must not be read on the host, so a mask is always used.

    Returns:
        positions (1 or B, L), attention mask (1 or B, 1, L, S) or `None`, and whether the kernel's own causal mask
        applies.
    """
    num_inputs, device = inputs.length, inputs.device
    past_length = 0 if cache is None else cache.get_seq_length()
    places = torch.arange(num_inputs, device=device) + past_length  # (L,) in the sequence with its padding
    positions = places[None] if inputs.position_ids is None else inputs.position_ids
    padding = inputs.attention_mask
    if padding is None:
        is_growing = cache is None or not cache.is_compileable
        if is_growing and (cache is None or past_length == 0):
            return positions, None, True
        if is_growing and num_inputs == 1:
            return positions, None, False
    elif inputs.position_ids is None:
        positions = (padding.long().cumsum(dim=1) - 1).clamp(min=0)[:, -num_inputs:]  # (B, L)
    num_keys = num_inputs if cache is None else cache.get_mask_sizes(num_inputs, 0)[0]
    keys = torch.arange(num_keys, device=device)
    is_visible = (keys <= places[:, None])[None, None]  # (1, 1, L, S)
    if padding is not None:
        is_token = F.pad(padding.bool(), (0, num_keys - padding.shape[1]), value=True)[:, None, None]  # (B, 1, 1, S)
        is_visible = is_visible & (is_token | (keys == places[:, None]))  # padding sees itself: no empty rows
    return positions, is_visible, False
