"""Test helper: random checkpoints in the official layouts, of any shape.

Tensors are made from the tables of the published format alone and share no code with the converter.
"""

import copy
import json

import torch
import yaml
from diffusers import AutoencoderKL
from paths import FIXTURES
from safetensors.torch import save_file


TOKENIZER_CONFIG = json.loads((FIXTURES / "tokenizer" / "pub_a_base" / "config.json").read_text())
TINY_VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "block_out_channels": [4, 4],
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "latent_channels": 4,
    "scaling_factor": 0.5,
}
TOKENIZER = {
    "channels": 4,
    "patch": 2,
    "grid": 4,
    "encoder_width": 32,
    "encoder_depth": 2,
    "encoder_head_dim": 16,
    "decoder_width": 48,
    "decoder_depth": 1,
    "decoder_head_dim": 12,
    "registers": 6,
    "levels": [5, 3],
    "frequencies": 16,
    "max_timestep": 1.0,
    "nested_dropout": True,
}
PRIOR = {
    "codes": 15,
    "length": 6,
    "width": 32,
    "heads": 4,
    "depth": 2,
    "hidden": 48,
    "text_dim": None,
    "classes": None,
    "attention": "EfficientAttention",
    "norm": "l3m.model.layers.normalization.RMSNorm",
    "eps": 1e-6,
    "qk_norm": None,
    "cross_qk_norm": None,
    "qk_scale": None,
    "use_bias": False,
    "qkv_bias": False,
    "head_bias": False,
    "projector_bias": False,
    "final_norm": True,
    "head_norm": False,
    "activation": {"_target_": "torch.nn.GELU", "_partial_": True, "approximate": "tanh"},
    "max_text_length": 16,
    "positions": "absolute",
}


def randn(generator, *shape, scale=1.0):
    """Return random values; without a generator, a tensor on the meta device."""
    if generator is None:
        return torch.empty(*shape, device="meta")
    return torch.randn(*shape, generator=generator) * scale


def linear(tensors, name, rows, columns, generator, has_bias=False):
    tensors[f"{name}.weight"] = randn(generator, rows, columns, scale=columns**-0.5)
    if has_bias:
        tensors[f"{name}.bias"] = randn(generator, rows, scale=0.3)


def tokenizer_config(shape):
    """Return the configuration of a tokenizer; without registers it is a grid."""
    config = copy.deepcopy(TOKENIZER_CONFIG)
    encoder, decoder = config["encoder"]["module_dict"], config["decoder"]["module_dict"]
    config["vae"].update(latent_channels=shape["channels"], scaling_factor=0.5, sample_posterior=False)
    config["regularizer"]["levels"] = shape["levels"]
    config["pipeline"]["out_channels"] = shape["channels"]
    for stack, width in ((encoder, shape["encoder_width"]), (decoder, shape["decoder_width"])):
        for module in stack.values():
            if "dim" in module:
                module["dim"] = width
            if "patch_sizes" in module:
                module["patch_sizes"] = [shape["patch"]] * 2
            if "max_sizes" in module:
                module["max_sizes"] = [shape["grid"]] * 2
            if "channels_in" in module:
                module["channels_in"] = shape["channels"]
    encoder["enc_transformer"].update(depth=shape["encoder_depth"], head_dim=shape["encoder_head_dim"])
    encoder["enc_to_latents"]["dim_out"] = len(shape["levels"])
    decoder["dec_transformer"].update(depth=shape["decoder_depth"], head_dim=shape["decoder_head_dim"])
    decoder["dec_from_latents"]["dim_in"] = len(shape["levels"])
    decoder["dec_to_patches"]["channels_out"] = shape["channels"]
    decoder["dec_time_embedder"].update(
        max_timestep=shape["max_timestep"], frequency_embedding_size=shape["frequencies"]
    )
    if shape["registers"]:
        encoder["enc_register_module"].update(n_min=shape["registers"], n_max=shape["registers"])
        decoder["dec_registers_posemb_module"]["max_sizes"] = [shape["registers"]]
        return config
    del encoder["enc_register_module"], decoder["dec_registers_posemb_module"], decoder["dec_repa_unpacker"]
    encoder["enc_seq_packer"]["mask_mode"] = "full"
    decoder["dec_seq_packer"]["per_subseq_embs"] = False
    decoder["dec_transformer"]["adaLN_expansion"] = 1
    if not shape["nested_dropout"]:
        del decoder["dec_nested_dropout"]
    modules = list(decoder.items())
    place = next(index for index, (name, _) in enumerate(modules) if name == "dec_seq_packer")
    dict_ops = "flextok.model.utils.dict_ops"
    summed = {
        "_target_": f"{dict_ops}.sum_tensors",
        "read_keys": ["dec_patches", "dec_tokens"],
        "write_key": "dec_patches",
    }
    modules.insert(place, ("dec_token_sum", summed))
    config["decoder"]["module_dict"] = dict(modules)
    return config


def transformer(tensors, prefix, width, depth, generator, adaln=0):
    hidden = 2 * (4 * width) // 3
    for index in range(depth):
        block = f"{prefix}blocks.{index}."
        for name in ("wq", "wk", "wv", "proj"):
            linear(tensors, f"{block}attn.{name}", width, width, generator)
        for name in ("fc1", "fc3"):
            linear(tensors, f"{block}mlp.{name}", hidden, width, generator)
        linear(tensors, f"{block}mlp.fc2", width, hidden, generator)
        if adaln:
            linear(tensors, f"{block}adaLN_modulation.1", adaln * width, width, generator, has_bias=True)


def tokenizer_tensors(shape, vae_config=TINY_VAE, seed=0):
    """Return random tensors of a tokenizer under their official names; without a seed, only their shapes."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    tensors, cells = {}, shape["channels"] * shape["patch"] ** 2
    width, q = shape["encoder_width"], len(shape["levels"])
    encoder, decoder = "encoder.module_dict.", "decoder.module_dict."
    linear(tensors, f"{encoder}enc_patch_emb.patch_proj", width, cells, generator, has_bias=True)
    tensors[f"{encoder}enc_posemb_module.posembs"] = randn(generator, 1, width, shape["grid"], shape["grid"])
    if shape["registers"]:
        tensors[f"{encoder}enc_register_module.registers"] = randn(generator, shape["registers"], width)
    transformer(tensors, f"{encoder}enc_transformer.", width, shape["encoder_depth"], generator)
    linear(tensors, f"{encoder}enc_to_latents.proj", q, width, generator, has_bias=True)

    width = shape["decoder_width"]
    linear(tensors, f"{decoder}dec_from_latents.proj", width, q, generator, has_bias=True)
    if shape["registers"]:
        tensors[f"{decoder}dec_registers_posemb_module.posembs"] = randn(generator, 1, 1, width, shape["registers"])
    if shape["nested_dropout"]:
        tensors[f"{decoder}dec_nested_dropout.dropout_mask_token"] = randn(generator, width)
    tensors[f"{decoder}dec_latent_dropout.nullcond"] = randn(generator, width)
    linear(tensors, f"{decoder}dec_noise_patch_emb.patch_proj", width, cells, generator, has_bias=True)
    tensors[f"{decoder}dec_patches_posemb_module.posembs"] = randn(generator, 1, width, shape["grid"], shape["grid"])
    linear(tensors, f"{decoder}dec_time_embedder.mlp.0", width, shape["frequencies"], generator, has_bias=True)
    linear(tensors, f"{decoder}dec_time_embedder.mlp.2", width, width, generator, has_bias=True)
    adaln = 12 if shape["registers"] else 6
    transformer(tensors, f"{decoder}dec_transformer.", width, shape["decoder_depth"], generator, adaln)
    linear(tensors, f"{decoder}dec_to_patches.adaLN_modulation.1", 2 * width, width, generator, has_bias=True)
    linear(tensors, f"{decoder}dec_to_patches.proj", cells, width, generator, has_bias=True)

    with torch.random.fork_rng(), torch.device("meta" if seed is None else "cpu"):
        torch.manual_seed(seed or 0)
        vae = AutoencoderKL(**{**vae_config, "latent_channels": shape["channels"]})
    tensors.update({f"vae.vae.{name}": tensor for name, tensor in vae.state_dict().items()})
    return tensors


def write_tokenizer(folder, dtype=torch.float32, is_single_file=False, seed=0, **changes):
    """Write a random tokenizer; returns its path, its tensors in float32 and its shape."""
    shape = {**TOKENIZER, **changes}
    config = tokenizer_config(shape)
    tensors = {name: tensor.to(dtype) for name, tensor in tokenizer_tensors(shape, seed=seed).items()}
    folder.mkdir(parents=True)
    (folder / "vae_config.json").write_text(json.dumps({**TINY_VAE, "latent_channels": shape["channels"]}))
    metadata = None
    if is_single_file:
        metadata = {"_target_": "flextok.flextok_wrapper.FlexTok", **{key: repr(part) for key, part in config.items()}}
    else:
        (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata)
    path = folder / "model.safetensors" if is_single_file else folder
    return path, {name: tensor.float() for name, tensor in tensors.items()}, shape


def prior_config(shape):
    """Return the configuration of a prior."""
    kind = "t2i" if shape["text_dim"] else "c2i"
    config = yaml.safe_load((FIXTURES / "prior" / kind / "config.yaml").read_text())
    models = config["model"]["meta_model"]["models"]
    image_model = models["ar_image_model"]
    image_model["preprocessor"].update(
        token_grid_size=[shape["length"], 1],
        codebook_size=shape["codes"],
        embed_dim=shape["width"],
        pos_embed_type=shape["positions"],
    )
    if shape["classes"]:
        image_model["preprocessor"]["num_classes"] = shape["classes"]
    trunk = image_model["trunk"]
    norm = {"_target_": shape["norm"], "_partial_": True, "eps": shape["eps"]}
    trunk.update(
        embed_dim=shape["width"],
        num_blocks=shape["depth"],
        norm_layer=norm,
        use_bias=shape["use_bias"],
        post_trunk_norm=shape["final_norm"],
    )
    del trunk["mlp_ratio"]
    trunk["mlp_hidden_dim"] = shape["hidden"]
    attention = trunk["self_attn_target" if shape["text_dim"] else "attn_target"]
    attention.update(_target_=f"l3m.model.layers.attention.{shape['attention']}", qk_norm=shape["qk_norm"])
    if shape["qk_scale"] is not None:
        attention["qk_scale"] = shape["qk_scale"]
    attentions = [attention]
    if shape["text_dim"]:
        cross = trunk["cross_attn_target"]
        cross.update(encoder_dim=shape["width"], qk_norm=shape["cross_qk_norm"])
        attentions.append(cross)
        models["text_encoder"]["mlp"].update(
            text_dim=shape["text_dim"],
            embed_dim=shape["width"],
            use_bias=shape["projector_bias"],
            act_layer=shape["activation"],
        )
        models["text_encoder"]["t5_embedder"]["encoder_seqlen_max"] = shape["max_text_length"]
    for attention in attentions:
        attention.update(dim=shape["width"], num_heads=shape["heads"], qkv_bias=shape["qkv_bias"])
    image_model["head"].update(
        in_features=shape["width"],
        out_features=shape["codes"],
        use_bias=shape["head_bias"],
        use_layernorm=shape["head_norm"],
    )
    return config


def norm(tensors, name, width, generator, kind):
    tensors[f"{name}.weight"] = 1 + randn(generator, width, scale=0.2)
    if kind.endswith("LayerNorm"):
        tensors[f"{name}.bias"] = randn(generator, width, scale=0.2)


def prior_tensors(shape, seed=0):
    """Return random tensors of a prior under their official names; without a seed, only their shapes."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    tensors, width = {}, shape["width"]
    image_model = "models.ar_image_model."
    tensors[f"{image_model}preprocessor.embedding.weight"] = randn(generator, shape["codes"], width)
    tensors[f"{image_model}preprocessor.sos_token_embed"] = randn(generator, 1, 1, width)
    tensors[f"{image_model}preprocessor.positional_embedding"] = randn(generator, shape["length"], width)
    if shape["classes"]:
        tensors[f"{image_model}preprocessor.cls_embedding.weight"] = randn(generator, shape["classes"], width)
    has_text, head_dim = bool(shape["text_dim"]), width // shape["heads"]
    for index in range(shape["depth"]):
        block = f"{image_model}trunk.blocks.{index}."
        attention = f"{block}{'self_attn' if has_text else 'attn'}."
        if shape["attention"] == "EfficientAttention":
            linear(tensors, f"{attention}qkv", 3 * width, width, generator, shape["qkv_bias"])
        else:
            for name in "qkv":
                linear(tensors, f"{attention}{name}_proj", width, width, generator, shape["qkv_bias"])
        out = "o_proj" if shape["attention"] == "HFAttention" else "proj"
        linear(tensors, f"{attention}{out}", width, width, generator, shape["use_bias"])
        if shape["qk_norm"]:
            for name in ("q_norm", "k_norm"):
                norm(tensors, attention + name, head_dim, generator, shape["qk_norm"]["_target_"])
        if has_text:
            for name in ("Wq", "Wk", "Wv"):
                linear(tensors, f"{block}cross_attn.{name}", width, width, generator, shape["qkv_bias"])
            linear(tensors, f"{block}cross_attn.proj", width, width, generator, shape["use_bias"])
            if shape["cross_qk_norm"]:
                for name in ("q_norm", "k_norm"):
                    kind = shape["cross_qk_norm"]["_target_"]
                    norm(tensors, f"{block}cross_attn.{name}", head_dim, generator, kind)
        for name in ("fc1", "fc3"):
            linear(tensors, f"{block}mlp.{name}", shape["hidden"], width, generator, shape["use_bias"])
        linear(tensors, f"{block}mlp.fc2", width, shape["hidden"], generator, shape["use_bias"])
        for number in range(1, 4 if has_text else 3):
            norm(tensors, f"{block}norm_{number}", width, generator, shape["norm"])
    if shape["final_norm"]:
        norm(tensors, f"{image_model}trunk.post_trunk_norm", width, generator, shape["norm"])
    if shape["head_norm"]:
        norm(tensors, f"{image_model}head.norm", width, generator, "LayerNorm")
    linear(tensors, f"{image_model}head.linear", shape["codes"], width, generator, shape["head_bias"])
    if has_text:
        text_dim, has_bias = shape["text_dim"], shape["projector_bias"]
        linear(tensors, "models.text_encoder.mlp.fc1", text_dim, text_dim, generator, has_bias)
        linear(tensors, "models.text_encoder.mlp.fc2", width, text_dim, generator, has_bias)
    return tensors


def write_prior(folder, dtype=torch.float32, seed=0, **changes):
    """Write a random prior; returns its folder, its tensors in float32 and its shape."""
    shape = {**PRIOR, **changes}
    tensors = {name: tensor.to(dtype) for name, tensor in prior_tensors(shape, seed).items()}
    folder.mkdir(parents=True)
    config = json.loads(json.dumps(prior_config(shape)))  # no shared parts, which YAML would write as anchors
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    save_file(tensors, folder / "model.safetensors")
    return folder, {name: tensor.float() for name, tensor in tensors.items()}, shape
