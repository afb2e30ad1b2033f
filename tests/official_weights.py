"""Test helper: read a small checkpoint in the official tokenizer format into our classes."""

import ast
import json
from pathlib import Path

from diffusers import AutoencoderKL
from safetensors import safe_open
from safetensors.torch import load_file

from flextok_hf import FlexTokEncoder, FlexTokEncoderConfig, FlexTokFlowDecoder


BLOCK_RENAMES = {
    "attn.wq": "attention.to_q",
    "attn.wk": "attention.to_k",
    "attn.wv": "attention.to_v",
    "attn.proj": "attention.to_out",
    "mlp.fc1": "mlp.gate_proj",
    "mlp.fc3": "mlp.up_proj",
    "mlp.fc2": "mlp.down_proj",
    "adaLN_modulation.1": "modulation",
}
ENCODER_RENAMES = {
    "enc_patch_emb.patch_proj": "patch_embedding.proj",
    "enc_posemb_module.posembs": "patch_embedding.positions",
    "enc_register_module.registers": "register_tokens",
    "enc_transformer.blocks": "blocks",
    "enc_to_latents.proj": "feature_proj",
    **BLOCK_RENAMES,
}
DECODER_RENAMES = {
    "dec_from_latents.proj": "code_proj",
    "dec_registers_posemb_module.posembs": "register_positions",
    "dec_nested_dropout.dropout_mask_token": "mask_token",
    "dec_latent_dropout.nullcond": "null_token",
    "dec_noise_patch_emb.patch_proj": "patch_embedding.proj",
    "dec_patches_posemb_module.posembs": "patch_embedding.positions",
    "dec_time_embedder.mlp.0": "time_embedder.linear_1",
    "dec_time_embedder.mlp.2": "time_embedder.linear_2",
    "dec_to_patches.adaLN_modulation.1": "final_modulation",
    "dec_to_patches.proj": "velocity_proj",
    "dec_transformer.blocks": "transformer_blocks",
    **BLOCK_RENAMES,
}


def load_official_tokenizer(folder: Path):
    """Read encoder, decoder and VAE; the VAE's scaling factor ends up in its config."""
    path = folder / "model.safetensors"
    with safe_open(path, "pt") as file:
        settings = {key: ast.literal_eval(value) for key, value in file.metadata().items() if value.startswith("{")}
    tensors = load_file(path)
    encoder_modules, decoder_modules = settings["encoder"]["module_dict"], settings["decoder"]["module_dict"]
    shared = {
        "in_channels": encoder_modules["enc_patch_emb"]["channels_in"],
        "patch_size": encoder_modules["enc_patch_emb"]["patch_sizes"][0],
        "grid_size": encoder_modules["enc_posemb_module"]["max_sizes"][0],
        "num_registers": encoder_modules["enc_register_module"]["n_max"],
    }
    encoder = FlexTokEncoder(
        FlexTokEncoderConfig(
            **shared,
            hidden_size=encoder_modules["enc_transformer"]["dim"],
            num_hidden_layers=encoder_modules["enc_transformer"]["depth"],
            head_dim=encoder_modules["enc_transformer"]["head_dim"],
            fsq_levels=settings["regularizer"]["levels"],
        )
    )
    decoder = FlexTokFlowDecoder(
        **shared,
        hidden_size=decoder_modules["dec_transformer"]["dim"],
        num_layers=decoder_modules["dec_transformer"]["depth"],
        head_dim=decoder_modules["dec_transformer"]["head_dim"],
        code_dim=len(settings["regularizer"]["levels"]),
        max_timestep=decoder_modules["dec_time_embedder"]["max_timestep"],
    )
    encoder.load_state_dict(rename(tensors, "encoder.module_dict.", ENCODER_RENAMES))
    decoder.load_state_dict(rename(tensors, "decoder.module_dict.", DECODER_RENAMES))
    vae_config = json.loads((folder / "vae_config.json").read_text())
    vae = AutoencoderKL.from_config({**vae_config, "scaling_factor": settings["vae"]["scaling_factor"]})
    vae.load_state_dict(rename(tensors, "vae.vae.", {}))
    return encoder.eval(), decoder.eval(), vae.eval()


def rename(tensors, prefix, renames):
    renamed = {}
    for key, tensor in tensors.items():
        if not key.startswith(prefix):
            continue
        key = key.removeprefix(prefix)
        for old, new in renames.items():
            key = key.replace(old, new)
        if key == "patch_embedding.positions":
            tensor = tensor[0].permute(1, 2, 0)
        elif key == "register_positions":
            tensor = tensor[0, 0].T
        renamed[key] = tensor.contiguous()
    return renamed
