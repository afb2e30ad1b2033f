"""Flow decoder: noisy latents + codes + noise level -> velocity.

Letters: B batch, C latent channels, h w latent grid, N patches, K registers, k codes given, S slots for registers, D
hidden size, Q code dimensions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from .layers import Attention, GatedMLP, PatchEmbedding, TimestepEmbedder, layer_norm, unpatchify
from .loading import WholeWeightsMixin
from .nested_dropout import count_kept, mask_tail, merged_tail_bias


@dataclass
class FlexTokFlowDecoderOutput(BaseOutput):
    """velocity (`torch.Tensor` of shape `(B, C, h, w)`): noise - latents, the direction from data to noise."""

    velocity: Tensor


class DecoderBlock(nn.Module):
    """Transformer block steered by the noise level: adaLN-Zero (Peebles and Xie, 2023, https://arxiv.org/abs/2212.09748).

    Patches and registers share all weights except the modulation, which has one half for each.
    """

    def __init__(self, hidden_size: int, head_dim: int):
        super().__init__()
        self.modulation = nn.Linear(hidden_size, 12 * hidden_size)
        self.attention = Attention(hidden_size, head_dim)
        self.mlp = GatedMLP(hidden_size)

    def forward(
        self,
        hidden_states: Tensor,
        temb: Tensor | None,
        num_patches: int,
        key_bias: Tensor | None = None,
        modulation: Tensor | None = None,
    ) -> Tensor:
        """Refine the sequence.

        Args:
            hidden_states: patches, then registers, (B, N + S, D).
            temb: embedding of the noise level, (B or 1, D); not read if its `modulation` is given.
            num_patches: N, where the registers begin.
            key_bias: added to the attention logits of each key, (B, N + S).
            modulation: (B or 1, 12 D); `None` computes it.

        Returns:
            New hidden states, (B, N + S, D).
        """
        if modulation is None:
            modulation = self.modulation(F.silu(temb))
        modulation = modulation.unflatten(-1, (2, 6, -1))  # (B, 2, 6, D), for patches and for registers
        gate_attn, gate_mlp, shift_attn, scale_attn, shift_mlp, scale_mlp = modulation.unbind(2)  # (B, 2, D)
        attention_input = norm_and_modulate(hidden_states, shift_attn, scale_attn, num_patches)
        update = self.attention(attention_input, key_bias=key_bias)
        hidden_states = add_gated(hidden_states, update, gate_attn, num_patches)
        update = self.mlp(norm_and_modulate(hidden_states, shift_mlp, scale_mlp, num_patches))
        return add_gated(hidden_states, update, gate_mlp, num_patches)


# The next two work on patches and registers in turn: a modulation vector per position would be larger than the states.


def norm_and_modulate(hidden_states: Tensor, shift: Tensor, scale: Tensor, num_patches: int) -> Tensor:
    """Normalize (B, N + S, D), then scale and shift; (B or 1, 2, D) holds the vectors of patches and of registers."""
    parts = hidden_states[:, :num_patches], hidden_states[:, num_patches:]
    if scale.shape[0] == 1:  # one noise level for the batch: the kernel of the normalization scales on the way
        outputs = [layer_norm(part, 1 + scale[0, kind], shift[0, kind]) for kind, part in enumerate(parts)]
    else:
        outputs = [
            layer_norm(part) * (1 + scale[:, kind, None]) + shift[:, kind, None] for kind, part in enumerate(parts)
        ]
    return torch.cat(outputs, dim=1)


def add_gated(hidden_states: Tensor, update: Tensor, gate: Tensor, num_patches: int) -> Tensor:
    """Add an update (B, N + S, D) times its gate; (B or 1, 2, D) holds those of patches and of registers."""
    parts = slice(num_patches), slice(num_patches, None)
    outputs = [
        torch.addcmul(hidden_states[:, part], gate[:, kind, None], update[:, part]) for kind, part in enumerate(parts)
    ]
    return torch.cat(outputs, dim=1)


class FlexTokFlowDecoder(WholeWeightsMixin, ModelMixin, AttentionMixin, ConfigMixin, CacheMixin, PeftAdapterMixin):
    """Rectified-flow decoder of any prefix of a token sequence (Bachmann et al., 2025, arXiv 2502.13967).

    Args:
        in_channels: channels C of the latents; 3 for a model that draws pixels.
        patch_size: side of a square patch, in latent cells.
        grid_size: side of the position grid, in patches.
        hidden_size: width D; a multiple of `head_dim` and of 4.
        num_layers: number of blocks.
        head_dim: width of an attention head.
        num_registers: longest token sequence K.
        code_dim: dimensions Q of a code.
        frequency_embedding_size: sinusoidal features of the noise level.
        max_timestep: scale of these features; read it from a checkpoint, never assume it.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["DecoderBlock"]
    _repeated_blocks = ["DecoderBlock"]
    _skip_layerwise_casting_patterns = ["patch_embedding", "time_embedder", "modulation", "velocity_proj"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 16,
        patch_size: int = 2,
        grid_size: int = 16,
        hidden_size: int = 768,
        num_layers: int = 12,
        head_dim: int = 64,
        num_registers: int = 256,
        code_dim: int = 6,
        frequency_embedding_size: int = 256,
        max_timestep: float = 1.0,
    ):
        super().__init__()
        if hidden_size % head_dim or hidden_size % 4:
            raise ValueError(f"`hidden_size` ({hidden_size}) must be a multiple of `head_dim` ({head_dim}) and of 4.")
        self.code_proj = nn.Linear(code_dim, hidden_size)
        self.register_positions = nn.Parameter(torch.empty(num_registers, hidden_size))  # (K, D)
        self.mask_token = nn.Parameter(torch.empty(hidden_size))  # (D,)
        self.null_token = nn.Parameter(torch.empty(hidden_size))  # (D,)
        self.patch_embedding = PatchEmbedding(in_channels, patch_size, grid_size, hidden_size)
        self.time_embedder = TimestepEmbedder(hidden_size, frequency_embedding_size, max_timestep)
        self.transformer_blocks = nn.ModuleList(DecoderBlock(hidden_size, head_dim) for _ in range(num_layers))
        self.final_modulation = nn.Linear(hidden_size, 2 * hidden_size)
        self.velocity_proj = nn.Linear(hidden_size, in_channels * patch_size**2)
        self.gradient_checkpointing = False
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """Xavier everywhere; zero modulations and head: a new model starts as the identity and predicts zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for vector in (self.register_positions, self.mask_token, self.null_token):
            nn.init.trunc_normal_(vector, std=0.02)
        for layer in self.modulation_layers():
            nn.init.zeros_(layer.weight)
        nn.init.zeros_(self.velocity_proj.weight)

    def enable_cache(self, config) -> None:
        """Skip work that changes little from step to step, by one of Diffusers' caches of whole blocks.

        Args:
            config: for instance a `FirstBlockCacheConfig` or a `MagCacheConfig`. What to skip is decided for a whole
                batch, so pictures then depend on the others in it.
        """
        TransformerBlockRegistry.register(DecoderBlock, TransformerBlockMetadata())
        super().enable_cache(config)

    def compute_modulation(self, sigma: Tensor) -> Tensor:
        """Compute all that the noise levels (B,) decide, (B, M), which takes half of the weights.

        A sampler knows its noise levels in advance: it computes them at once and hands one row to each call.
        """
        temb = F.silu(self.time_embedder(sigma))  # (B, D)
        return torch.cat([layer(temb) for layer in self.modulation_layers()], dim=-1)

    def modulation_layers(self) -> list[nn.Module]:
        """Return the layers that read the noise level: one per block and the one of the head."""
        return [*(block.modulation for block in self.transformer_blocks), self.final_modulation]

    def split_modulation(self, modulation: Tensor | None) -> Sequence[Tensor | None]:
        """Cut the result of `compute_modulation` into the parts of the blocks and of the head; `None` stays `None`."""
        if modulation is None:
            return [None] * (len(self.transformer_blocks) + 1)
        return modulation.split([layer.out_features for layer in self.modulation_layers()], dim=-1)

    def embed_codes(self, codes: Tensor, num_tokens: Tensor | None, is_unconditional: Tensor | None) -> Tensor:
        """Turn codes into the decoder's registers: one slot per code and one for all dropped registers, at most K.

        Args:
            codes: (B, k, Q) with k <= K.
            num_tokens: tokens to keep per sample, (B,) in [0, k]; `None` keeps all k.
            is_unconditional: (B,) boolean; samples where it is true forget their codes altogether.

        Returns:
            Registers, (B, S, D).
        """
        num_codes, num_registers = codes.shape[1], self.register_positions.shape[0]
        if num_codes > num_registers:
            raise ValueError(
                f"`codes` has {num_codes} tokens per picture, but this decoder reads at most {num_registers}"
                " (`num_registers`). Cut them with `codes[:, :n]`."
            )
        num_slots = min(num_codes + 1, num_registers)
        registers = self.code_proj(F.pad(codes.to(self.code_proj.weight.dtype), (0, 0, 0, num_slots - num_codes)))
        registers = registers + self.register_positions[:num_slots]  # (B, S, D)
        # The mask token replaces value and position of a dropped register, and the null token those of all registers.
        registers = mask_tail(registers, count_kept(codes, num_tokens), self.mask_token)
        if is_unconditional is not None:
            registers = torch.where(is_unconditional.view(-1, 1, 1), self.null_token, registers)
        return registers

    def forward(
        self,
        noisy_latents: Tensor,
        sigma: Tensor | None,
        codes: Tensor,
        num_tokens: Tensor | None = None,
        is_unconditional: Tensor | None = None,
        return_dict: bool = True,
        modulation: Tensor | None = None,
    ) -> FlexTokFlowDecoderOutput | tuple[Tensor]:
        """Predict the velocity, noise - latents.

        Args:
            noisy_latents: (1 - sigma) * latents + sigma * noise, (B, C, h, w).
            sigma: noise level per sample, (B,) in [0, 1], or (1,) for all; 0 is data, 1 is noise.
            codes: quantized features, (B, k, Q) in [-1, 1], k <= K; missing ones count as dropped. The work grows with
                k, so leave out the codes that no sample keeps.
            num_tokens: how many codes to use per sample, (B,) in [0, k]; `None` uses all.
            is_unconditional: (B,) boolean, true where the codes are to be ignored (for guidance).
            return_dict: return a `FlexTokFlowDecoderOutput` rather than a tuple.
            modulation: what `compute_modulation` makes of `sigma`, (B or 1, M), if it is known already.

        Returns:
            The velocity, (B, C, h, w).
        """
        patches = self.patch_embedding(noisy_latents)  # (B, N, D)
        registers = self.embed_codes(codes, num_tokens, is_unconditional)  # (B, S, D)
        num_patches, num_slots = patches.shape[1], registers.shape[1]
        hidden_states = torch.cat([patches, registers.to(patches.dtype)], dim=1)  # (B, N + S, D)
        key_bias = None
        if num_slots < self.register_positions.shape[0]:
            kept = count_kept(codes, num_tokens, is_unconditional)
            tail_bias = merged_tail_bias(kept, num_slots, self.register_positions.shape[0])
            key_bias = F.pad(tail_bias, (num_patches, 0))  # (B, N + S)

        temb = self.time_embedder(sigma) if modulation is None else None  # (B, D)
        *for_blocks, for_head = self.split_modulation(modulation)
        for block, for_block in zip(self.transformer_blocks, for_blocks, strict=True):
            arguments = (hidden_states, temb, num_patches, key_bias, for_block)
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, *arguments)
            else:
                hidden_states = block(*arguments)

        for_head = self.final_modulation(F.silu(temb)) if for_head is None else for_head
        shift, scale = for_head.unsqueeze(1).chunk(2, dim=-1)  # (B, 1, D)
        patches = layer_norm(hidden_states[:, :num_patches]) * (1 + scale) + shift  # (B, N, D)
        velocity = unpatchify(self.velocity_proj(patches), self.config.patch_size, *noisy_latents.shape[-2:])
        return FlexTokFlowDecoderOutput(velocity=velocity) if return_dict else (velocity,)
