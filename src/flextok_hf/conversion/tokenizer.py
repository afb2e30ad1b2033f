"""Official tokenizer -> encoder, decoder and VAE, with the names of their tensors in official checkpoints."""

import re
from dataclasses import dataclass
from functools import partial
from typing import Any

from einops import rearrange
from torch import nn

from ..models.configuration_encoder import FlexTokEncoderConfig
from ..models.modeling_decoder import FlexTokFlowDecoder
from ..models.modeling_encoder import FlexTokEncoder
from .components import Component, Recipe, build, check_nothing_left, check_num_blocks, check_shape, same
from .settings import shorten_list
from .source import Checkpoint
from .tokenizer_settings import read_tokenizer_settings
from .vae import read_vae


ENCODER_PREFIX, DECODER_PREFIX = "encoder.module_dict.", "decoder.module_dict."

# Ours -> official, without `.weight` and `.bias`
ENCODER_NAMES = {
    "patch_embedding.proj": "enc_patch_emb.patch_proj",
    "patch_embedding.positions": "enc_posemb_module.posembs",
    "register_tokens": "enc_register_module.registers",
    "blocks": "enc_transformer.blocks",
    "feature_proj": "enc_to_latents.proj",
}
DECODER_NAMES = {
    "code_proj": "dec_from_latents.proj",
    "register_positions": "dec_registers_posemb_module.posembs",
    "mask_token": "dec_nested_dropout.dropout_mask_token",
    "null_token": "dec_latent_dropout.nullcond",
    "patch_embedding.proj": "dec_noise_patch_emb.patch_proj",
    "patch_embedding.positions": "dec_patches_posemb_module.posembs",
    "time_embedder.linear_1": "dec_time_embedder.mlp.0",
    "time_embedder.linear_2": "dec_time_embedder.mlp.2",
    "transformer_blocks": "dec_transformer.blocks",
    "final_modulation": "dec_to_patches.adaLN_modulation.1",
    "velocity_proj": "dec_to_patches.proj",
}
BLOCK_NAMES = {
    "attention.to_q": "attn.wq",
    "attention.to_k": "attn.wk",
    "attention.to_v": "attn.wv",
    "attention.to_out": "attn.proj",
    "mlp.gate_proj": "mlp.fc1",
    "mlp.up_proj": "mlp.fc3",
    "mlp.down_proj": "mlp.fc2",
    "modulation": "adaLN_modulation.1",
}
# Tensors that are stored in another shape; all others are used as they are
RESHAPES = {
    "patch_embedding.positions": partial(rearrange, pattern="1 d rows columns -> rows columns d"),
    "register_positions": partial(rearrange, pattern="1 1 d k -> k d"),
}


@dataclass(frozen=True)
class Tokenizer:
    """An official tokenizer, with its configuration read.

    components: encoder, decoder and VAE.
    training: settings that matter for training only.
    notes: what differs from the official code or was not converted, for the user.
    """

    components: dict[str, Component]
    training: dict[str, Any]
    notes: list[str]


def read_tokenizer(checkpoint: Checkpoint, **hub_options: Any) -> Tokenizer:
    """Read the configuration of an official tokenizer and the names and shapes of its tensors, but no values.

    Args:
        checkpoint: the opened checkpoint.
        hub_options: for downloading the VAE configuration that the checkpoint refers to.

    Raises:
        ValueError: if anything is missing, unknown or not supported; the message names it.
    """
    settings, weights = checkpoint.settings, checkpoint.weights
    notes: list[str] = []
    if "model" in settings and "encoder" not in settings:
        raise ValueError(f"{checkpoint.name!r} is a prior, not a tokenizer. Pass it as `prior` (`--prior`).")
    encoder_config, decoder_config, training = read_tokenizer_settings(settings)
    vae = read_vae(settings.section("vae"), checkpoint, notes, **hub_options)
    settings.close()
    if vae.model.config.latent_channels != encoder_config["in_channels"]:
        raise ValueError(
            f"{checkpoint.name!r} takes {encoder_config['in_channels']} channels, but its VAE has"
            f" {vae.model.config.latent_channels}."
        )

    # Checked before the models are built: the configuration could claim sizes beyond any memory
    check_num_blocks(weights, f"{ENCODER_PREFIX}enc_transformer.blocks.", encoder_config["num_hidden_layers"])
    check_num_blocks(weights, f"{DECODER_PREFIX}dec_transformer.blocks.", decoder_config["num_layers"])
    for prefix, names, config in (
        (ENCODER_PREFIX, ENCODER_NAMES, encoder_config),
        (DECODER_PREFIX, DECODER_NAMES, decoder_config),
    ):
        shape = (1, config["hidden_size"], config["grid_size"], config["grid_size"])
        check_shape(weights, prefix + names["patch_embedding.positions"], shape)
    encoder = build(lambda: FlexTokEncoder(FlexTokEncoderConfig(**encoder_config)), checkpoint.name)
    decoder = build(lambda: FlexTokFlowDecoder(**decoder_config), checkpoint.name)
    components = {
        "encoder": Component(encoder, make_recipes(encoder, ENCODER_PREFIX, ENCODER_NAMES), weights),
        "decoder": Component(decoder, make_recipes(decoder, DECODER_PREFIX, DECODER_NAMES), weights),
        "vae": vae,
    }
    for component in components.values():
        component.check()
    check_nothing_left(weights, components.values(), is_of_training)
    left = [name for name in weights.shapes if is_of_training(name)]
    if left:
        notes.append(f"Not converted, because only training uses them: {shorten_list(left)}.")
    return Tokenizer(components, training, notes)


def make_recipes(model: nn.Module, prefix: str, names: dict[str, str]) -> dict[str, Recipe]:
    """Map each tensor of the encoder or decoder to the official one."""
    return {
        name: Recipe((prefix + official_name(name, names),), RESHAPES.get(name, same)) for name in model.state_dict()
    }


def official_name(name: str, names: dict[str, str]) -> str:
    """Return the official name of a tensor; `names` is the table of its model."""
    block = re.fullmatch(r"(\w*blocks)\.(\d+)\.(.+)\.(weight|bias)", name)
    if block:
        blocks, index, layer, kind = block.groups()
        return f"{names[blocks]}.{index}.{BLOCK_NAMES[layer]}.{kind}"
    if name in names:
        return names[name]
    layer, _, kind = name.rpartition(".")
    return f"{names[layer]}.{kind}"


def is_of_training(name: str) -> bool:
    """Return whether only training uses an official tensor: those of REPA, and the log-variance of the VAE loss."""
    return name == "vae.logvar" or (name.startswith(DECODER_PREFIX) and "repa" in name)
