"""Models of the published sizes with random weights, and their FLOPs.

Speed does not depend on the values, so nothing has to be downloaded.

Letters: N patches, K registers, L = N + K, D hidden size.
"""

import functools

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from torch import nn

from flextok_hf import (
    FlexTokEncoder,
    FlexTokEncoderConfig,
    FlexTokFlowDecoder,
    FlexTokPipeline,
    FlexTokPriorConfig,
    FlexTokPriorForCausalLM,
)
from flextok_hf.utils.flops import FlopCounter


# Depth of encoder and decoder; the width is 64 times the depth in all of them (Bachmann et al., arXiv 2502.13967).
TOKENIZERS = {"d12-d12": (12, 12), "d18-d18": (18, 18), "d18-d28": (18, 28), "tiny": (2, 2)}
# Depth, and width of the feed-forward layers.
PRIORS = {"113M": (12, 2048), "382M": (18, 3072), "3B": (36, 6144), "tiny": (2, 256)}
NUM_PATCHES, NUM_REGISTERS = 256, 256


def build_tokenizer(
    size: str,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    with_vae: bool = True,
    resolution: int = 256,
) -> FlexTokPipeline:
    """Return a pipeline without a prior, of one of the `TOKENIZERS` sizes, for square images of any resolution."""
    encoder_depth, decoder_depth = TOKENIZERS[size]
    grid = {"grid_size": resolution // 16}  # patches of 2 x 2 latents, each of 8 x 8 pixels
    encoder_shape = {"hidden_size": 64 * encoder_depth, "num_hidden_layers": encoder_depth}
    torch.manual_seed(0)
    with torch.device(device):
        encoder = FlexTokEncoder(FlexTokEncoderConfig(**encoder_shape, **grid))
        decoder = FlexTokFlowDecoder(hidden_size=64 * decoder_depth, num_layers=decoder_depth, **grid)
        vae = build_vae(32 if size == "tiny" else 128) if with_vae else None
    fill_zeros(decoder)
    pipe = FlexTokPipeline(encoder.eval(), decoder.eval(), FlowMatchEulerDiscreteScheduler(), vae=vae)
    for module in (encoder, decoder, vae):
        if module is not None:
            nn.Module.to(module, device=device, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def build_vae(width: int = 128) -> AutoencoderKL:
    """Return the published VAE: 16 latent channels, 8x downsampling; `width` is that of its first layers."""
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    channels = {"block_out_channels": [width, 2 * width, 4 * width, 4 * width], "latent_channels": 16}
    return AutoencoderKL(**blocks, **channels, layers_per_block=2, sample_size=256).eval()


def build_prior(size: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> FlexTokPriorForCausalLM:
    """Return a text-conditional prior of one of the `PRIORS` sizes."""
    depth, intermediate_size = PRIORS[size]
    shapes = {"hidden_size": 64 * depth, "num_hidden_layers": depth, "num_attention_heads": depth}
    torch.manual_seed(0)
    with torch.device(device):
        prior = FlexTokPriorForCausalLM(FlexTokPriorConfig(**shapes, intermediate_size=intermediate_size))
    return nn.Module.to(prior.eval(), dtype=dtype)


def text_conditions(prior: FlexTokPriorForCausalLM, batch_size: int, text_length: int = 12) -> tuple[dict, dict]:
    """Return random hidden states of prompts and of the empty prompt, as arguments of `generate`."""
    width, place = prior.config.text_hidden_size, {"device": prior.device, "dtype": prior.dtype}
    conditions = {"encoder_hidden_states": torch.randn(batch_size, text_length, width, **place)}
    negative = {"encoder_hidden_states": torch.randn(1, text_length, width, **place)}
    return conditions, negative


@torch.no_grad()
def fill_zeros(model: nn.Module) -> None:
    """Give zero-initialized layers small random weights, so that every part of the model affects the output."""
    for parameter in model.parameters():
        if not parameter.any():
            parameter.normal_(std=0.02)


def block_flops(num_tokens: int, num_pairs: int, hidden_size: int) -> int:
    """Return the FLOPs of a transformer block, given the number of tokens and of query-key pairs."""
    mlp_size = 2 * (4 * hidden_size) // 3
    return 2 * num_tokens * (4 * hidden_size**2 + 3 * hidden_size * mlp_size) + 4 * num_pairs * hidden_size


def encoder_flops(config: FlexTokEncoderConfig, num_tokens: int = NUM_REGISTERS) -> int:
    """Return the FLOPs of the package's encoder per image; the last block computes registers only."""
    width, length = config.hidden_size, NUM_PATCHES + num_tokens
    pairs_of_registers = num_tokens * length
    whole = block_flops(length, NUM_PATCHES**2 + pairs_of_registers, width)
    last = block_flops(num_tokens, pairs_of_registers, width) + 4 * NUM_PATCHES * width**2  # keys, values of patches
    return (config.num_hidden_layers - 1) * whole + last


def decoder_flops(decoder: FlexTokFlowDecoder, num_slots: int = NUM_REGISTERS) -> int:
    """Return the FLOPs of one velocity per image, with `num_slots` registers in the sequence."""
    length = NUM_PATCHES + num_slots
    return decoder.config.num_layers * block_flops(length, length**2, decoder.config.hidden_size)


@functools.cache
def vae_flops() -> dict[str, int]:
    """Return the FLOPs of the VAE per image, counted on the meta device."""
    with torch.device("meta"):
        vae, pixel_values, latents = build_vae(), torch.empty(1, 3, 256, 256), torch.empty(1, 16, 32, 32)
    counts = {}
    for name, call in (("encode", lambda: vae.encode(pixel_values)), ("decode", lambda: vae.decode(latents))):
        with torch.no_grad(), FlopCounter() as counter:
            call()
        counts[name] = counter.total
    return counts


def step_bytes(prior: FlexTokPriorForCausalLM) -> int:
    """Return the weight bytes that a step of the prior reads: no embeddings, nothing that runs once per text."""
    layers = [prior.head]
    for block in prior.blocks:
        cross = block.cross_attention
        layers += [block.self_attention, cross.query_proj, cross.out_proj, block.mlp]
    return sum(p.numel() * p.element_size() for layer in layers for p in layer.parameters())
