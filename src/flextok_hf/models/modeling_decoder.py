"""Flow decoder: noisy latents + codes + noise level -> velocity.

Letters: B batch, C latent channels, h w latent grid, N patches, K registers, k codes given, S slots for registers, D
hidden size, Q code dimensions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from ..utils.numbers import is_finite_number
from .argument_checks import check_sizes, check_tensor
from .configuration_encoder import check_token_layout
from .decoder_condition import DecoderConditionMixin, check_prediction
from .decoder_tools import DecoderToolsMixin
from .default_steps import check_default_steps
from .layers import Attention, GatedMLP, TimestepEmbedder, add_gated, layer_norm, norm_and_modulate
from .nested_dropout import count_kept, mask_tail, merged_tail_bias
from .packed_linear import linear
from .patches import PatchEmbedding, check_positions, unpatchify
from .whole_weights import WholeWeightsMixin


@dataclass
class FlexTokFlowDecoderOutput(BaseOutput):
    """velocity (`torch.Tensor` of shape `(B, C, h, w)`): noise - latents, from data to noise; or its mean."""

    velocity: Tensor


class DecoderBlock(nn.Module):
    """Transformer block modulated by the noise level: adaLN-Zero (Peebles and Xie, 2023, https://arxiv.org/abs/2212.09748).

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
            temb: embedding of the noise level, (B or 1, D); unused if `modulation` is given.
            num_patches: N, where the registers begin.
            key_bias: added to the attention logits of each key, (B, N + S).
            modulation: (B or 1, 12 D), without registers (B or 1, 6 D); `None` computes it from `temb`.

        Returns:
            New hidden states, (B, N + S, D).
        """
        if modulation is None:
            modulation = linear(self.modulation, F.silu(temb))
        modulation = modulation.unflatten(-1, (-1, 6, hidden_states.shape[-1]))  # (B, 2, 6, D): patches and registers
        gate_attn, gate_mlp, shift_attn, scale_attn, shift_mlp, scale_mlp = modulation.unbind(2)  # (B, 2, D)
        attention_input = norm_and_modulate(hidden_states, shift_attn, scale_attn, num_patches)
        update = self.attention(attention_input, key_bias=key_bias)
        hidden_states = add_gated(hidden_states, update, gate_attn, num_patches)
        update = self.mlp(norm_and_modulate(hidden_states, shift_mlp, scale_mlp, num_patches))
        return add_gated(hidden_states, update, gate_mlp, num_patches)


class FlexTokFlowDecoder(WholeWeightsMixin, DecoderConditionMixin, DecoderToolsMixin, ModelMixin, ConfigMixin):
    """Rectified-flow decoder for any prefix of a token sequence (Bachmann et al., 2025, arXiv 2502.13967).

    Args:
        in_channels: channels C of the latents; 3 for a pixel-space model.
        patch_size: side of a square patch, in latent cells.
        grid_size: side of the position grid, in patches.
        hidden_size: width D; a multiple of `head_dim` and of 4.
        num_layers: number of blocks.
        head_dim: width of each attention head.
        token_layout: "registers", tokens appended to the patches; or "grid", one added to each patch in raster order.
        num_registers: maximum number of tokens K; `grid_size ** 2` for a grid.
        nested_dropout: replace missing tokens with a learned mask token; False, for a grid only, uses id 0 instead.
        code_dim: number of code dimensions Q.
        frequency_embedding_size: number of sinusoidal features of the noise level.
        max_timestep: scale of these features; read it from the checkpoint, never assume it.
        remove_dropped: remove dropped registers; published models replace each with a mask token instead.
        default_guidance_scale: used by pipelines for calls that do not pass one.
        positions: of other shapes than the trained square, "crop" or "stretch", as in the encoder.
        shape_conditioning: whether the noise level comes with size and proportions of the image; with "stretch".
        predicts: "velocity"; or "mean_velocity" between two noise levels, of a decoder distilled to few steps.
        interval_blocks: number of last blocks that read the lower noise level, with "mean_velocity".
        guidance_range: lowest and highest guidance scale that are part of the weights, with "mean_velocity".
        default_num_inference_steps: used by pipelines for calls that do not pass one: a number, or a table {tokens:
            steps} whose entries hold from that many tokens on; `None` is 20.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["DecoderBlock"]
    _repeated_blocks = ["DecoderBlock"]
    _skip_layerwise_casting_patterns = [
        "patch_embedding",
        "time_embedder",
        "modulation",
        "(code|shape|guidance|velocity)_proj",
    ]

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
        default_guidance_scale: float | None = None,
        positions: str = "crop",
        shape_conditioning: bool = False,
        predicts: str = "velocity",
        interval_blocks: int | None = None,
        guidance_range: Sequence | None = None,
        default_num_inference_steps: int | dict | None = None,
    ):
        super().__init__()
        check_sizes(in_channels=in_channels, patch_size=patch_size, grid_size=grid_size, hidden_size=hidden_size)
        check_sizes(num_layers=num_layers, head_dim=head_dim, num_registers=num_registers, code_dim=code_dim)
        check_sizes(frequency_embedding_size=frequency_embedding_size)
        if not is_finite_number(max_timestep) or max_timestep <= 0:
            raise ValueError(f"`max_timestep` must be a finite number above 0, got {max_timestep!r}.")
        if hidden_size % head_dim or hidden_size % 4:
            raise ValueError(f"`hidden_size` ({hidden_size}) must be a multiple of `head_dim` ({head_dim}) and of 4.")
        check_token_layout(token_layout, num_registers, grid_size)
        check_positions(positions, shape_conditioning, token_layout)
        check_prediction(predicts, interval_blocks, num_layers, guidance_range)
        check_default_steps(default_num_inference_steps)
        has_registers = token_layout == "registers"
        if has_registers and not nested_dropout:
            raise ValueError("`nested_dropout` must be True for registers; only a grid can do without it.")
        self.code_proj = nn.Linear(code_dim, hidden_size)
        if has_registers:
            self.register_positions = nn.Parameter(torch.empty(num_registers, hidden_size))  # (K, D)
        if nested_dropout:
            self.mask_token = nn.Parameter(torch.empty(hidden_size))  # (D,)
        self.null_token = nn.Parameter(torch.empty(hidden_size))  # (D,)
        self.patch_embedding = PatchEmbedding(in_channels, patch_size, grid_size, hidden_size, positions)
        self.time_embedder = TimestepEmbedder(hidden_size, frequency_embedding_size, max_timestep)
        if shape_conditioning:
            self.shape_proj = nn.Linear(2, hidden_size, bias=False)
        if predicts == "mean_velocity":
            self.guidance_proj = nn.Linear(1, hidden_size, bias=False)
        self.transformer_blocks = nn.ModuleList(
            DecoderBlock(hidden_size, head_dim, has_registers) for _ in range(num_layers)
        )
        self.final_modulation = nn.Linear(hidden_size, 2 * hidden_size)
        self.velocity_proj = nn.Linear(hidden_size, in_channels * patch_size**2)
        self.gradient_checkpointing = False
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """Use Xavier, but zero modulations and output layer: blocks start as the identity, the prediction as zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for vector in self.parameters(recurse=False):  # register positions, mask token, null token
            nn.init.trunc_normal_(vector, std=0.02)
        for layer in self.modulation_layers():
            nn.init.zeros_(layer.weight)
        nn.init.zeros_(self.velocity_proj.weight)
        if self.config.shape_conditioning:
            nn.init.zeros_(self.shape_proj.weight)
        if self.predicts_mean:
            nn.init.zeros_(self.guidance_proj.weight)

    def embed_codes(self, codes: Tensor, num_tokens: Tensor | None, is_unconditional: Tensor | None) -> Tensor:
        """Embed codes as registers: one slot per code and one for all dropped registers, at most K.

        Args:
            codes: (B, k, Q) with k <= K.
            num_tokens: tokens to keep per sample, (B,) in [0, k]; `None` keeps all k.
            is_unconditional: (B,) boolean; where true, the codes of the sample are ignored.

        Returns:
            Registers, (B, S, D).
        """
        num_codes, num_registers = codes.shape[1], self.register_positions.shape[0]
        if num_codes > num_registers:
            raise ValueError(
                f"`codes` has {num_codes} tokens per image, but this decoder reads at most {num_registers}"
                " (`num_registers`). Truncate them with `codes[:, :n]`."
            )
        num_slots = min(num_codes + 1, num_registers)
        registers = self.code_proj(F.pad(codes.to(self.dtype), (0, 0, 0, num_slots - num_codes)))
        registers = registers + self.register_positions[:num_slots]  # (B, S, D)
        # The mask token replaces a dropped register including its position, the null token all registers of a sample.
        registers = mask_tail(registers, count_kept(codes, num_tokens), self.mask_token)
        if is_unconditional is not None:
            registers = torch.where(is_unconditional.view(-1, 1, 1), self.null_token, registers)
        return registers

    def bias_of_merged(
        self, codes: Tensor, num_tokens: Tensor | None, is_unconditional: Tensor | None, num_patches: int
    ) -> Tensor | None:
        """Return the bias per key, (B, N + S), of slots for dropped registers; `None` if each counts once."""
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
        """Embed the codes of a grid as tokens to add to its patches.

        Args:
            codes: (B, k, Q) in raster order, with k <= N.
            num_patches: N.
            num_tokens: tokens to keep per sample, (B,) in [0, k]; `None` keeps all k.
            is_unconditional: (B,) boolean; where true, the codes of the sample are ignored.

        Returns:
            Tokens, (B, N, D).
        """
        num_codes = codes.shape[1]
        if num_codes > num_patches:
            raise ValueError(
                f"`codes` has {num_codes} tokens per image, but these latents have {num_patches} patches, one"
                " token each. Truncate them with `codes[:, :n]`, or pass larger latents."
            )
        kept = count_kept(codes, num_tokens)  # (B,)
        codes = F.pad(codes.to(self.dtype), (0, 0, 0, num_patches - num_codes))
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
        next_sigma: Tensor | None = None,
        guidance_scale: Tensor | None = None,
    ) -> FlexTokFlowDecoderOutput | tuple[Tensor]:
        """Predict the velocity, noise - latents, or its mean over an interval of noise levels.

        Args:
            noisy_latents: (1 - sigma) * latents + sigma * noise, (B, C, h, w).
            sigma: noise level per sample, (B,) in [0, 1], or (1,) for all; 0 is data, 1 is noise. Unused, and may be
                `None`, if `modulation` is given.
            codes: quantized features, (B, k, Q) in [-1, 1], k <= K; missing ones count as dropped. The cost grows with
                k, so omit codes that no sample keeps.
            num_tokens: how many codes to use per sample, (B,) in [0, k]; `None` uses all.
            is_unconditional: (B,) boolean, true where the codes are ignored (for guidance).
            return_dict: return a `FlexTokFlowDecoderOutput` rather than a tuple.
            modulation: `compute_modulation(sigma, noisy_latents.shape)`, (B or 1, M), if already computed.
            next_sigma: for "mean_velocity", the noise level at the end of the interval that begins at `sigma`, (B,) or
                (1,) in [0, sigma]; `None` is `sigma` itself. In one step, `noisy_latents` become `noisy_latents -
                (sigma - next_sigma) * velocity`.
            guidance_scale: for "mean_velocity", the guidance scale, (B,) or (1,) within `guidance_range`.

        Returns:
            The velocity, (B, C, h, w).

        Raises:
            TypeError: if an argument is not a tensor of the right kind.
            ValueError: if a shape does not fit, or there are more codes than registers or patches of a grid.
        """
        check_tensor("noisy_latents", noisy_latents, "floats", "B", self.config.in_channels, "h", "w")
        batch_size = noisy_latents.shape[0]
        check_tensor("codes", codes, "floats", batch_size, "k", self.config.code_dim)
        if modulation is None:
            self.check_levels(batch_size, sigma, next_sigma, guidance_scale)
        if num_tokens is not None:
            check_tensor("num_tokens", num_tokens, "integers", batch_size)
        if is_unconditional is not None:
            check_tensor("is_unconditional", is_unconditional, "booleans", batch_size)
        patches = self.patch_embedding(noisy_latents)  # (B, N, D)
        num_patches, key_bias = patches.shape[1], None
        if self.config.token_layout == "grid":
            hidden_states = patches + self.embed_grid(codes, num_patches, num_tokens, is_unconditional)  # (B, N, D)
        else:
            registers = self.embed_codes(codes, num_tokens, is_unconditional)  # (B, S, D)
            hidden_states = torch.cat([patches, registers.to(patches.dtype)], dim=1)  # (B, N + S, D)
            key_bias = self.bias_of_merged(codes, num_tokens, is_unconditional, num_patches)

        pair: tuple[Tensor | None, Tensor | None] = (None, None)
        if modulation is None:
            pair = self.embed_condition(sigma, noisy_latents.shape, next_sigma, guidance_scale)  # 2 x (B, D)
        *block_modulations, head_modulation = self.split_modulation(modulation)
        for block, block_modulation, is_late in zip(self.transformer_blocks, block_modulations, self.lateness()):
            arguments = (hidden_states, pair[is_late], num_patches, key_bias, block_modulation)
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, *arguments)
            else:
                hidden_states = block(*arguments)

        if head_modulation is None:
            head_modulation = linear(self.final_modulation, F.silu(pair[1]))
        shift, scale = head_modulation.unsqueeze(1).chunk(2, dim=-1)  # (B, 1, D)
        patches = layer_norm(hidden_states[:, :num_patches]) * (1 + scale) + shift  # (B, N, D)
        velocity = unpatchify(self.velocity_proj(patches), self.config.patch_size, *noisy_latents.shape[-2:])
        return FlexTokFlowDecoderOutput(velocity=velocity) if return_dict else (velocity,)
