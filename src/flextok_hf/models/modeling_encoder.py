"""Encoder: latents -> registers -> features -> codes -> token ids.

Letters: B batch, C latent channels, h w latent grid, N patches, K registers, D hidden size, Q code dimensions.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput, can_return_tuple

from ..utils.numbers import is_whole_number
from .argument_checks import check_tensor
from .chosen_attention import FUSED, attend_as_chosen
from .configuration_encoder import FlexTokEncoderConfig
from .layers import Attention, GatedMLP, layer_norm
from .patches import PatchEmbedding, shape_features, sincos_position_table
from .quantizer import FiniteScalarQuantizer
from .whole_weights import WholeWeightsMixin


@dataclass
class FlexTokEncoderOutput(ModelOutput):
    """Output of `FlexTokEncoder`.

    Attributes:
        features (`torch.FloatTensor` of shape `(B, K, Q)`): register features before quantization, coarsest first.
        codes (`torch.FloatTensor` of shape `(B, K, Q)`): quantized features in [-1, 1].
        token_ids (`torch.LongTensor` of shape `(B, K)`): ids of the codes, in [0, codebook size); -1 where features
            are not finite.
        hidden_states (`tuple` of `torch.FloatTensor`, if asked for): the input of each block, `(B, N + K, D)`, and
            the normalized output of the last, `(B, K, D)`, of which the features are a projection.
        attentions (`tuple` of `torch.FloatTensor`, if asked for): weights of each block,
            `(B, heads, N + K, N + K)`; of the last, which computes registers only, `(B, heads, K, N + K)`.
    """

    features: Tensor | None = None
    codes: Tensor | None = None
    token_ids: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class EncoderAttention(Attention):
    """Self-attention: patches attend to all patches, registers to all patches and the registers up to their own."""

    def __init__(self, config: FlexTokEncoderConfig):
        super().__init__(config.hidden_size, config.head_dim)
        self.config = config

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        register_mask: Tensor | None,
        num_patches: int,
        is_last: bool = False,
        needs_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend over patches and registers, (B, N + K, D); if `is_last`, only the registers are queries.

        `register_mask` (K, N + K) is true where a register may attend; `None` if there are only patches.

        Returns:
            New states of the queries, (B, N + K or K, D), and their weights if they are needed or there anyway.
        """
        if needs_weights or self.config._attn_implementation not in FUSED:
            return self.attend_in_one_call(hidden_states, register_mask, num_patches, is_last)
        if register_mask is None:
            return super().forward(hidden_states), None
        if is_last:
            context = self.processor(self, *self.project(hidden_states, num_patches), register_mask)
            return self.to_out(context.flatten(-2)), None
        query, key, value = self.project(hidden_states)  # (B, N + K, heads, head_dim)
        # two calls: the larger one needs no mask, and patches compute no logits for registers, which they must not see
        of_patches = self.processor(self, *(states[:, :num_patches] for states in (query, key, value)))
        of_registers = self.processor(self, query[:, num_patches:], key, value, register_mask)
        return self.to_out(torch.cat([of_patches, of_registers], dim=1).flatten(-2)), None

    def attend_in_one_call(
        self, hidden_states: Tensor, register_mask: Tensor | None, num_patches: int, is_last: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Run what `set_attn_implementation` chose, in one call with a mask over all queries and keys."""
        query, key, value = self.project(hidden_states, num_patches if is_last else 0)
        mask = register_mask
        if register_mask is not None and not is_last:
            is_patch = torch.arange(key.shape[1], device=key.device) < num_patches
            mask = torch.cat([is_patch.expand(num_patches, -1), register_mask])  # (N + K, N + K)
        mask = None if mask is None else mask[None, None]
        context, weights = attend_as_chosen(self, query, key, value, mask)
        return self.to_out(context.flatten(-2)), weights


class EncoderBlock(GradientCheckpointingLayer):
    """Pre-norm transformer block."""

    def __init__(self, config: FlexTokEncoderConfig):
        super().__init__()
        self.attention = EncoderAttention(config)
        self.mlp = GatedMLP(config.hidden_size)

    def forward(
        self,
        hidden_states: Tensor,
        register_mask: Tensor | None,
        num_patches: int,
        is_last: bool,
        needs_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Refine patches and registers, (B, N + K, D); the last block drops the patches, which are then unused."""
        update, weights = self.attention(layer_norm(hidden_states), register_mask, num_patches, is_last, needs_weights)
        hidden_states = (hidden_states[:, num_patches:] if is_last else hidden_states) + update
        return hidden_states + self.mlp(layer_norm(hidden_states)), weights


class FlexTokEncoder(WholeWeightsMixin, PreTrainedModel):
    """Resamples an image into an ordered sequence of discrete tokens (Bachmann et al., 2025, arXiv 2502.13967)."""

    config_class = FlexTokEncoderConfig
    base_model_prefix = "encoder"
    main_input_name = "latents"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["EncoderBlock"]
    _supports_sdpa = True
    _input_embed_layer = "patch_embedding"

    def __init__(self, config: FlexTokEncoderConfig):
        super().__init__(config)
        self.patch_embedding = PatchEmbedding(
            config.in_channels, config.patch_size, config.grid_size, config.hidden_size, config.positions
        )
        if config.token_layout == "registers":
            self.register_tokens = nn.Parameter(torch.empty(config.num_registers, config.hidden_size))  # (K, D)
        if config.shape_conditioning:
            self.shape_proj = nn.Linear(2, config.hidden_size, bias=False)
        self.blocks = nn.ModuleList(EncoderBlock(config) for _ in range(config.num_hidden_layers))
        self.feature_proj = nn.Linear(config.hidden_size, len(config.fsq_levels))
        self.quantizer = FiniteScalarQuantizer(config.fsq_levels)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, PatchEmbedding):
            table = sincos_position_table(self.config.hidden_size, self.config.grid_size)
            init.copy_(module.positions, table)
        elif module is self and self.config.token_layout == "registers":
            # std 1, not the usual 0.02: registers that start nearly identical give every image the same few codes
            init.normal_(self.register_tokens, std=1.0)
            if self.config.shape_conditioning:
                init.zeros_(self.shape_proj.weight)

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        if requested_attention is not None and requested_attention.startswith("paged|"):
            raise ValueError(
                f"`attn_implementation` {requested_attention!r} is not supported: paged attention is causal, and the"
                ' encoder is not. Use "sdpa", "eager" or one registered with `AttentionInterface`.'
            )
        return super().get_correct_attn_implementation(requested_attention, is_init_check)

    def compute_features(self, latents: Tensor, num_tokens: int | None = None) -> Tensor:
        """Compute the features of images, as registers or as a grid of tokens.

        Args:
            latents: (B, C, h, w), about unit variance.
            num_tokens: stop after this many tokens; they equal those of the full sequence, and with registers this
                saves computation.

        Returns:
            Features before quantization, (B, K, Q): coarsest first, or in raster order.
        """
        return self.feature_proj(self.run_blocks(latents, num_tokens)[0])

    def run_blocks(
        self, latents: Tensor, num_tokens: int | None, keeps_states: bool = False, keeps_weights: bool = False
    ) -> tuple[Tensor, tuple[Tensor, ...] | None, tuple[Tensor, ...] | None]:
        """Return normalized states (B, K, D); all hidden states and attention weights if they are to be kept."""
        check_tensor("latents", latents, "floats", "B", self.config.in_channels, "h", "w")
        num_tokens = self.check_num_tokens(num_tokens)
        hidden_states = patches = self.patch_embedding(latents)  # (B, N, D)
        num_patches = patches.shape[1]
        register_mask = None
        if self.config.token_layout == "registers":
            registers = self.register_tokens[:num_tokens]  # (K, D)
            if self.config.shape_conditioning:
                registers = registers + self.shape_proj(shape_features(latents.shape, self.config, registers))
            registers = registers.expand(latents.shape[0], -1, -1)  # (B, K, D)
            hidden_states = torch.cat([patches, registers.to(patches.dtype)], dim=1)  # (B, N + K, D)
            register_mask = prefix_causal_mask(num_patches, num_tokens, latents.device)  # (K, N + K)
        states, attentions = [], []
        for block in self.blocks:
            if keeps_states:  # otherwise each is freed when the next block is done
                states.append(hidden_states)
            is_last = register_mask is not None and block is self.blocks[-1]
            hidden_states, weights = block(hidden_states, register_mask, num_patches, is_last, keeps_weights)
            if keeps_weights:
                attentions.append(weights)
        hidden_states = layer_norm(hidden_states[:, :num_tokens])  # (B, K, D); a grid is cut here
        states.append(hidden_states)
        return hidden_states, tuple(states) if keeps_states else None, tuple(attentions) if keeps_weights else None

    @can_return_tuple
    def forward(
        self,
        latents: Tensor,
        num_tokens: int | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> FlexTokEncoderOutput:
        """Tokenize latents.

        Args:
            latents: (B, C, h, w), about unit variance.
            num_tokens: maximum number of tokens per image; `None`, or more than there are, means all.
            output_hidden_states, output_attentions: return them.

        Returns:
            Features, codes and token ids; with `return_dict=False`, a tuple of what there is.

        Raises:
            TypeError: if `latents` is not a tensor of floats.
            ValueError: if their shape does not fit, or `num_tokens` is not a whole number of 1 or more.
        """
        keeps_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        keeps_weights = self.config.output_attentions if output_attentions is None else output_attentions
        last, states, attentions = self.run_blocks(latents, num_tokens, keeps_states, keeps_weights)
        features = self.feature_proj(last)  # (B, K, Q)
        codes = self.quantizer(features)  # (B, K, Q)
        token_ids = self.quantizer.codes_to_ids(codes)  # (B, K)
        return FlexTokEncoderOutput(features, codes, token_ids, states, attentions)

    def check_num_tokens(self, num_tokens: int | None) -> int:
        """Resolve `num_tokens`, an upper bound: more than there are registers means all of them."""
        if num_tokens is None:
            return self.config.num_registers
        if not is_whole_number(num_tokens) or num_tokens < 1:
            raise ValueError(
                f"`num_tokens` must be a whole number of 1 or more, got {num_tokens!r}. Leave it out to get all"
                f" {self.config.num_registers}."
            )
        return min(int(num_tokens), self.config.num_registers)


def prefix_causal_mask(num_patches: int, num_registers: int, device: torch.device) -> Tensor:
    """Return the mask of the registers, (K, N + K): register r attends to all patches and registers 0..r.

    No earlier position depends on a register, so the first k registers are the same whatever follows.
    """
    position = torch.arange(num_patches + num_registers, device=device)
    return position[None, :] <= position[num_patches:, None]
