"""The same models without any optimization: the baseline for every speedup, and the reference for its results.

The functions do all the work of the official code, step by step, with PyTorch's own kernels: all K registers for any
number of tokens, the modulation in every call, full attention with a mask in the encoder, guidance in two passes, a
prior that processes the whole sequence again for each new token. They take the models of the package, so both paths
share their weights.

Letters: B batch, C latent channels, h w latent grid, N patches, K registers, k codes, L = N + K, D hidden size, Q code
dimensions.
"""

from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from flextok_hf import FlexTokEncoder, FlexTokFlowDecoder, FlexTokPipeline, FlexTokPriorForCausalLM
from flextok_hf.models.layers import Attention, GatedMLP, layer_norm
from flextok_hf.models.patches import unpatchify
from flextok_hf.pipelines.guidance import Guidance
from flextok_hf.utils import tuning


def features(encoder: FlexTokEncoder, latents: Tensor) -> Tensor:
    """Return the features of all registers, (B, K, Q), from latents (B, C, h, w)."""
    patches = encoder.patch_embedding(latents)
    registers = encoder.register_tokens.expand(latents.shape[0], -1, -1)
    hidden_states = torch.cat([patches, registers], dim=1)  # (B, L, D)
    num_patches, length = patches.shape[1], hidden_states.shape[1]
    position = torch.arange(length, device=latents.device)
    mask = (position[None, :] < num_patches) | (position[None, :] <= position[:, None])  # (L, L)
    mask = torch.zeros(mask.shape, dtype=patches.dtype, device=mask.device).masked_fill(~mask, -torch.inf)
    for block in encoder.blocks:
        hidden_states = hidden_states + attend(block.attention, layer_norm(hidden_states), mask)
        hidden_states = hidden_states + feed_forward(block.mlp, layer_norm(hidden_states))
    return encoder.feature_proj(layer_norm(hidden_states)[:, num_patches:])


def velocity(
    decoder: FlexTokFlowDecoder,
    noisy_latents: Tensor,
    sigma: Tensor,
    codes: Tensor,
    num_tokens: Tensor,
    is_unconditional: bool,
) -> Tensor:
    """Return the velocity (B, C, h, w) at noise levels (B,), from the first `num_tokens` (B,) of `codes` (B, k, Q)."""
    num_registers = decoder.config.num_registers
    patches = decoder.patch_embedding(noisy_latents)
    codes = F.pad(codes.to(patches.dtype), (0, 0, 0, num_registers - codes.shape[1]))
    registers = decoder.code_proj(codes) + decoder.register_positions  # (B, K, D)
    is_kept = torch.arange(num_registers, device=codes.device) < num_tokens[:, None]
    registers = torch.where(is_kept[..., None], registers, decoder.mask_token)
    if is_unconditional:
        registers = decoder.null_token.expand_as(registers)
    hidden_states = torch.cat([patches, registers], dim=1)  # (B, L, D)
    temb = F.silu(decoder.time_embedder(sigma))  # (B, D)
    for block in decoder.transformer_blocks:
        # (B, 2, 1, 6 D): patches and registers
        gate_attn, gate_mlp, *to_attention, shift_mlp, scale_mlp = (
            block.modulation(temb).unflatten(-1, (2, 1, -1)).chunk(6, dim=-1)
        )
        update = attend(block.attention, modulate(hidden_states, *to_attention, patches.shape[1]))
        hidden_states = add_gated(hidden_states, update, gate_attn, patches.shape[1])
        update = feed_forward(block.mlp, modulate(hidden_states, shift_mlp, scale_mlp, patches.shape[1]))
        hidden_states = add_gated(hidden_states, update, gate_mlp, patches.shape[1])
    shift, scale = decoder.final_modulation(temb)[:, None].chunk(2, dim=-1)
    patches = layer_norm(hidden_states[:, : patches.shape[1]]) * (1 + scale) + shift
    return unpatchify(decoder.velocity_proj(patches), decoder.config.patch_size, *noisy_latents.shape[-2:])


def modulate(hidden_states: Tensor, shift: Tensor, scale: Tensor, num_patches: int) -> Tensor:
    """Normalize, scale and shift (B, L, D); (B, 2, 1, D) holds vectors for patches and for registers."""
    parts = layer_norm(hidden_states).tensor_split([num_patches], dim=1)
    return torch.cat([part * (1 + scale[:, i]) + shift[:, i] for i, part in enumerate(parts)], dim=1)


def add_gated(hidden_states: Tensor, update: Tensor, gate: Tensor, num_patches: int) -> Tensor:
    """Add an update (B, L, D) times its gate, (B, 2, 1, D)."""
    parts = update.tensor_split([num_patches], dim=1)
    return hidden_states + torch.cat([part * gate[:, i] for i, part in enumerate(parts)], dim=1)


def feed_forward(mlp: GatedMLP, hidden_states: Tensor) -> Tensor:
    """Return the feed-forward layer of (B, L, D), with PyTorch's own products."""
    return mlp.down_proj(F.silu(mlp.gate_proj(hidden_states)) * mlp.up_proj(hidden_states))


def attend(attention: Attention, hidden_states: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the self-attention of (B, L, D) with a mask (L, L) that is added to the logits."""
    projections = (attention.to_q, attention.to_k, attention.to_v)
    query, key, value = (
        projection(hidden_states).unflatten(-1, (-1, attention.head_dim)) for projection in projections
    )
    query, key, value = (states.transpose(1, 2) for states in (layer_norm(query), layer_norm(key), value))
    context = F.scaled_dot_product_attention(query, key, value, mask, scale=attention.scale)
    return attention.to_out(context.transpose(1, 2).flatten(2))


@torch.no_grad()
def tokenize(pipe: FlexTokPipeline, pixel_values: Tensor) -> Tensor:
    """Return the ids (B, K) of images (B, 3, H, W) in [-1, 1]."""
    latents = pixel_values
    if pipe.vae is not None:
        latents = pipe.vae.encode(pixel_values.to(pipe.vae.dtype)).latent_dist.mode() * pipe.vae.config.scaling_factor
    quantizer = pipe.encoder.quantizer
    return quantizer.codes_to_ids(quantizer(features(pipe.encoder, latents.to(pipe.encoder.dtype))))


@torch.no_grad()
def detokenize(
    pipe: FlexTokPipeline, token_ids: Tensor, latents: Tensor, num_inference_steps: int, guidance_scale: float
) -> Tensor:
    """Return images (B, 3, H, W), about [-1, 1], from ids (B, k) and noise (B, C, h, w), with APG in two passes."""
    codes = pipe.encoder.quantizer.ids_to_codes(token_ids)
    num_tokens = torch.full((len(codes),), codes.shape[1], device=codes.device)
    guide = Guidance("apg")
    for step in range(num_inference_steps, 0, -1):
        sigma = torch.full((len(codes),), step / num_inference_steps, device=codes.device)
        inputs = (latents.to(pipe.decoder.dtype), sigma, codes, num_tokens)
        pair = [velocity(pipe.decoder, *inputs, is_unconditional).float() for is_unconditional in (False, True)]
        latents = latents - guide(*pair, guidance_scale) / num_inference_steps
    if pipe.vae is None:
        return latents
    return pipe.vae.decode((latents / pipe.vae.config.scaling_factor).to(pipe.vae.dtype)).sample


@patch.dict(tuning.forced, product=tuning.LIBRARY)
@torch.no_grad()
def generate(
    prior: FlexTokPriorForCausalLM, num_tokens: int, conditions: dict, negative: dict, guidance_scale: float
) -> Tensor:
    """Return greedy ids (B, num_tokens); `conditions` and `negative` are `forward` arguments for the two halves."""
    rows = {name: torch.cat([value, negative[name].expand_as(value)]) for name, value in conditions.items()}
    batch_size = len(next(iter(conditions.values())))
    token_ids = torch.empty(batch_size, 0, dtype=torch.int64, device=prior.device)
    for _ in range(num_tokens):
        input_ids = prior.prepend_bos(token_ids).repeat(2, 1)
        conditional, unconditional = prior(input_ids, **rows, use_cache=False).logits.float().chunk(2)
        logits = unconditional + guidance_scale * (conditional - unconditional)  # of all positions
        token_ids = torch.cat([token_ids, logits[:, -1:].argmax(dim=-1)], dim=1)
    return token_ids
