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

from .configuration_encoder import check_token_layout
from .layers import Attention, GatedMLP, PatchEmbedding, TimestepEmbedder, layer_norm, unpatchify
from .nested_dropout import count_kept, mask_tail, merged_tail_bias
from .whole_weights import WholeWeightsMixin


@dataclass
class FlexTokFlowDecoderOutput(BaseOutput):
    """velocity (`torch.Tensor` of shape `(B, C, h, w)`): noise - latents, the direction from data to noise."""

    velocity: Tensor


class DecoderBlock(nn.Module):
    """Transformer block steered by the noise level: adaLN-Zero (Peebles and Xie, 2023, https://arxiv.org/abs/2212.09748).

    Patches and registers share all weights except the modulation, which has one half for each.
    """

    def __init__(self, hidden_size: int, head_dim: int, has_registers: bool = True):
        super().__init__()
        self.modulation = nn.Linear(hidden_size, (12 if has_registers else 6) * hidden_size)
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
            hidden_states: patches, then registers if there are any, (B, N + S, D).
            temb: embedding of the noise level, (B or 1, D); not read if its `modulation` is given.
            num_patches: N, where the registers begin.
            key_bias: added to the attention logits of each key, (B, N + S).
            modulation: (B or 1, 12 D), without registers (B or 1, 6 D); `None` computes it.

        Returns:
            New hidden states, (B, N + S, D).
        """
        if modulation is None:
            modulation = self.modulation(F.silu(temb))
        modulation = modulation.unflatten(-1, (-1, 6, hidden_states.shape[-1]))  # (B, 2, 6, D): patches and registers
        gate_attn, gate_mlp, shift_attn, scale_attn, shift_mlp, scale_mlp = modulation.unbind(2)  # (B, 2, D)
        attention_input = norm_and_modulate(hidden_states, shift_attn, scale_attn, num_patches)
        update = self.attention(attention_input, key_bias=key_bias)
        hidden_states = add_gated(hidden_states, update, gate_attn, num_patches)
        update = self.mlp(norm_and_modulate(hidden_states, shift_mlp, scale_mlp, num_patches))
        return add_gated(hidden_states, update, gate_mlp, num_patches)


# The next two work on patches and registers in turn: a modulation vector per position would be larger than the states.
# Where the vectors are of one kind, there are no registers.


def norm_and_modulate(hidden_states: Tensor, shift: Tensor, scale: Tensor, num_patches: int) -> Tensor:
    """Normalize (B, N + S, D), then scale and shift; (B or 1, 2, D) holds the vectors of patches and of registers."""
    parts = (hidden_states[:, :num_patches], hidden_states[:, num_patches:])[: scale.shape[1]]
    if scale.shape[0] == 1:  # one noise level for the batch: the kernel of the normalization scales on the way
        outputs = [layer_norm(part, 1 + scale[0, kind], shift[0, kind]) for kind, part in enumerate(parts)]
    else:
        outputs = [
            layer_norm(part) * (1 + scale[:, kind, None]) + shift[:, kind, None] for kind, part in enumerate(parts)
        ]
    return torch.cat(outputs, dim=1)


def add_gated(hidden_states: Tensor, update: Tensor, gate: Tensor, num_patches: int) -> Tensor:
    """Add an update (B, N + S, D) times its gate; (B or 1, 2, D) holds those of patches and of registers."""
    parts = (slice(num_patches), slice(num_patches, None))[: gate.shape[1]]
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
        token_layout: "registers", tokens beside the patches; or "grid", one per patch in raster order, added to it.
        num_registers: longest token sequence K; `grid_size ** 2` for a grid.
        nested_dropout: a learned mask token stands in for missing tokens; a grid may go without and takes id 0.
        code_dim: dimensions Q of a code.
        frequency_embedding_size: sinusoidal features of the noise level.
        max_timestep: scale of these features; read it from a checkpoint, never assume it.
        remove_dropped: dropped registers leave the sequence, instead of a mask token for each as published.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["DecoderBlock"]
    _repeated_blocks = ["DecoderBlock"]
    _skip_layerwise_casting_patterns = ["patch_embedding", "code_proj", "time_embedder", "modulation", "velocity_proj"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 16,
        patch_size: int = 2,
        grid_size: int = 16,
        hidden_size: int = 768,
        num_layers: int = 12,
        head_dim: int = 64,
        token_layout: str = "registers",
        num_registers: int = 256,
        nested_dropout: bool = True,
        code_dim: int = 6,
        frequency_embedding_size: int = 256,
        max_timestep: float = 1.0,
        remove_dropped: bool = False,
    ):
        super().__init__()
        if hidden_size % head_dim or hidden_size % 4:
            raise ValueError(f"`hidden_size` ({hidden_size}) must be a multiple of `head_dim` ({head_dim}) and of 4.")
        check_token_layout(token_layout, num_registers, grid_size)
        has_registers = token_layout == "registers"
        if has_registers and not nested_dropout:
            raise ValueError("`nested_dropout` must be True for registers; only a grid can go without.")
        self.code_proj = nn.Linear(code_dim, hidden_size)
        if has_registers:
            self.register_positions = nn.Parameter(torch.empty(num_registers, hidden_size))  # (K, D)
        if nested_dropout:
            self.mask_token = nn.Parameter(torch.empty(hidden_size))  # (D,)
        self.null_token = nn.Parameter(torch.empty(hidden_size))  # (D,)
        self.patch_embedding = PatchEmbedding(in_channels, patch_size, grid_size, hidden_size)
        self.time_embedder = TimestepEmbedder(hidden_size, frequency_embedding_size, max_timestep)
        self.transformer_blocks = nn.ModuleList(
            DecoderBlock(hidden_size, head_dim, has_registers) for _ in range(num_layers)
        )
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
        for vector in self.parameters(recurse=False):  # positions of registers, mask token, null token
            nn.init.trunc_normal_(vector, std=0.02)
        for layer in self.modulation_layers():
            nn.init.zeros_(layer.weight)
        nn.init.zeros_(self.velocity_proj.weight)

    def enable_cache(self, config) -> None:
        """Skip work that changes little from step to step, by one of Diffusers' caches of whole blocks.

        Args:
            config: for instance a `FirstBlockCacheConfig` or a `MagCacheConfig`. What to skip is decided for a whole
                batch, so images then depend on the others in it.
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
                f"`codes` has {num_codes} tokens per image, but this decoder reads at most {num_registers}"
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

    def bias_of_merged(
        self, codes: Tensor, num_tokens: Tensor | None, is_unconditional: Tensor | None, num_patches: int
    ) -> Tensor | None:
        """Return the bias per key, (B, N + S), of slots that stand for dropped registers; `None` if all count once."""
        num_registers = self.register_positions.shape[0]
        num_slots = min(codes.shape[1] + 1, num_registers)
        if num_slots == num_registers and not self.config.remove_dropped:
            return None
        kept = count_kept(codes, num_tokens, is_unconditional)  # (B,)
        length = torch.full_like(kept, num_registers)
        if self.config.remove_dropped:  # without any code, one mask or null token remains
            length = kept.clamp(min=1)
        return F.pad(merged_tail_bias(kept, num_slots, length), (num_patches, 0))

    def embed_grid(
        self, codes: Tensor, num_patches: int, num_tokens: Tensor | None, is_unconditional: Tensor | None
    ) -> Tensor:
        """Turn codes of a grid into what is added to its patches.

        Args:
            codes: (B, k, Q) in raster order, with k <= N.
            num_patches: N.
            num_tokens: tokens to keep per sample, (B,) in [0, k]; `None` keeps all k.
            is_unconditional: (B,) boolean; samples where it is true forget their codes altogether.

        Returns:
            Tokens, (B, N, D).
        """
        num_codes = codes.shape[1]
        if num_codes > num_patches:
            raise ValueError(
                f"`codes` has {num_codes} tokens per image, but these latents have {num_patches} patches, a token"
                " each. Cut them with `codes[:, :n]`, or give larger latents."
            )
        kept = count_kept(codes, num_tokens)  # (B,)
        codes = F.pad(codes.to(self.code_proj.weight.dtype), (0, 0, 0, num_patches - num_codes))
        if self.config.nested_dropout:
            tokens = mask_tail(self.code_proj(codes), kept, self.mask_token)  # (B, N, D)
        else:  # the code of id 0 is -1 in every dimension
            tokens = self.code_proj(mask_tail(codes, kept, codes.new_tensor(-1.0)))
        if is_unconditional is not None:
            tokens = torch.where(is_unconditional.view(-1, 1, 1), self.null_token, tokens)
        return tokens

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
            sigma: noise level per sample, (B,) in [0, 1], or (1,) for all; 0 is data, 1 is noise. Not read, and may be
                `None`, if `modulation` is given.
            codes: quantized features, (B, k, Q) in [-1, 1], k <= K; missing ones count as dropped. The work grows with
                k, so leave out the codes that no sample keeps.
            num_tokens: how many codes to use per sample, (B,) in [0, k]; `None` uses all.
            is_unconditional: (B,) boolean, true where the codes are to be ignored (for guidance).
            return_dict: return a `FlexTokFlowDecoderOutput` rather than a tuple.
            modulation: what `compute_modulation` makes of `sigma`, (B or 1, M), if it is known already.

        Returns:
            The velocity, (B, C, h, w).

        Raises:
            ValueError: if there are more codes than registers, or than patches of a grid.
        """
        patches = self.patch_embedding(noisy_latents)  # (B, N, D)
        num_patches, key_bias = patches.shape[1], None
        if self.config.token_layout == "grid":
            hidden_states = patches + self.embed_grid(codes, num_patches, num_tokens, is_unconditional)  # (B, N, D)
        else:
            registers = self.embed_codes(codes, num_tokens, is_unconditional)  # (B, S, D)
            hidden_states = torch.cat([patches, registers.to(patches.dtype)], dim=1)  # (B, N + S, D)
            key_bias = self.bias_of_merged(codes, num_tokens, is_unconditional, num_patches)

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
