"""Encoder: latents -> registers -> features -> codes -> token ids.

Letters: B batch, C latent channels, h w latent grid, N patches, K registers, D hidden size, Q code dimensions.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

from ..utils.numbers import is_whole_number
from .configuration_encoder import FlexTokEncoderConfig
from .layers import Attention, GatedMLP, PatchEmbedding, layer_norm, sincos_position_table
from .quantizer import FiniteScalarQuantizer
from .whole_weights import WholeWeightsMixin


@dataclass
class FlexTokEncoderOutput(ModelOutput):
    """Output of `FlexTokEncoder`.

    Attributes:
        features (`torch.FloatTensor` of shape `(B, K, Q)`): register features before quantization, coarsest first.
        codes (`torch.FloatTensor` of shape `(B, K, Q)`): quantized features in [-1, 1].
        token_ids (`torch.LongTensor` of shape `(B, K)`): ids of the codes, in [0, codebook size).
    """

    features: Tensor | None = None
    codes: Tensor | None = None
    token_ids: Tensor | None = None


class EncoderAttention(Attention):
    """Self-attention: patches attend to all patches, registers to all patches and the registers up to their own."""

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, register_mask: Tensor | None, num_patches: int, is_last: bool = False
    ) -> Tensor:
        """Attend over patches and registers, (B, N + K, D); if `is_last`, returns only the registers, (B, K, D).

        `register_mask` (K, N + K) is true where a register may attend; `None` if there are only patches.
        """
        if register_mask is None:
            return super().forward(hidden_states)
        if is_last:
            context = self.processor(self, *self.project(hidden_states, num_patches), register_mask)
            return self.to_out(context.flatten(-2))
        query, key, value = self.project(hidden_states)  # (B, N + K, heads, head_dim)
        # two calls: the larger one needs no mask, and patches compute no logits for registers, which they must not see
        of_patches = self.processor(self, *(states[:, :num_patches] for states in (query, key, value)))
        of_registers = self.processor(self, query[:, num_patches:], key, value, register_mask)
        return self.to_out(torch.cat([of_patches, of_registers], dim=1).flatten(-2))


class EncoderBlock(GradientCheckpointingLayer):
    """Pre-norm transformer block."""

    def __init__(self, config: FlexTokEncoderConfig):
        super().__init__()
        self.attention = EncoderAttention(config.hidden_size, config.head_dim)
        self.mlp = GatedMLP(config.hidden_size)

    def forward(self, hidden_states: Tensor, register_mask: Tensor | None, num_patches: int, is_last: bool) -> Tensor:
        """Refine patches and registers, (B, N + K, D); the last block drops the patches, which are then unused."""
        update = self.attention(layer_norm(hidden_states), register_mask, num_patches, is_last)
        hidden_states = (hidden_states[:, num_patches:] if is_last else hidden_states) + update
        return hidden_states + self.mlp(layer_norm(hidden_states))


class FlexTokEncoder(WholeWeightsMixin, PreTrainedModel):
    """Resamples an image into an ordered sequence of discrete tokens (Bachmann et al., 2025, arXiv 2502.13967)."""

    config_class = FlexTokEncoderConfig
    base_model_prefix = "encoder"
    main_input_name = "latents"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["EncoderBlock"]
    _supports_sdpa = True

    def __init__(self, config: FlexTokEncoderConfig):
        super().__init__(config)
        self.patch_embedding = PatchEmbedding(
            config.in_channels, config.patch_size, config.grid_size, config.hidden_size
        )
        if config.token_layout == "registers":
            self.register_tokens = nn.Parameter(torch.empty(config.num_registers, config.hidden_size))  # (K, D)
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

    def compute_features(self, latents: Tensor, num_tokens: int | None = None) -> Tensor:
        """Compute the features of images, as registers or as a grid of tokens.

        Args:
            latents: (B, C, h, w), about unit variance.
            num_tokens: stop after this many tokens; they equal those of the full sequence, and with registers this
                saves computation.

        Returns:
            Features before quantization, (B, K, Q): coarsest first, or in raster order.
        """
        num_tokens = self.check_num_tokens(num_tokens)
        patches = self.patch_embedding(latents)  # (B, N, D)
        if self.config.token_layout == "grid":
            hidden_states = patches
            for block in self.blocks:
                hidden_states = block(hidden_states, None, patches.shape[1], is_last=False)
            return self.feature_proj(layer_norm(hidden_states[:, :num_tokens]))  # (B, K, Q)

        registers = self.register_tokens[:num_tokens].expand(latents.shape[0], -1, -1)  # (B, K, D)
        hidden_states = torch.cat([patches, registers.to(patches.dtype)], dim=1)  # (B, N + K, D)

        num_patches = patches.shape[1]
        register_mask = prefix_causal_mask(num_patches, num_tokens, latents.device)  # (K, N + K)
        for block in self.blocks:
            hidden_states = block(hidden_states, register_mask, num_patches, is_last=block is self.blocks[-1])

        return self.feature_proj(layer_norm(hidden_states))  # (B, K, Q)

    def forward(
        self, latents: Tensor, num_tokens: int | None = None, return_dict: bool = True
    ) -> FlexTokEncoderOutput | tuple[Tensor, Tensor, Tensor]:
        """Tokenize latents.

        Args:
            latents: (B, C, h, w), about unit variance.
            num_tokens: maximum number of tokens per image; `None`, or more than there are, means all.
            return_dict: return a `FlexTokEncoderOutput` rather than a tuple.

        Returns:
            Features, codes and token ids.

        Raises:
            ValueError: if `num_tokens` is not a whole number of 1 or more.
        """
        features = self.compute_features(latents, num_tokens)  # (B, K, Q)
        codes = self.quantizer(features)  # (B, K, Q)
        token_ids = self.quantizer.codes_to_ids(codes)  # (B, K)
        output = FlexTokEncoderOutput(features=features, codes=codes, token_ids=token_ids)
        return output if return_dict else output.to_tuple()

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
