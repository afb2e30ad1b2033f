"""Settings of an official tokenizer -> configurations of our encoder and decoder.

The official encoder and decoder are lists of named modules. Their names, order and classes are fixed here, and so is
every setting that would change the result; anything else is refused by name.
"""

import math
from typing import Any

from .settings import MAX_COUNT, Section


MODEL = "flextok.model"
WRAPPER = f"{MODEL}.utils.wrappers.SequentialModuleDictWrapper"
OPERATION = f"{MODEL}.utils.dict_ops.PerSampleOp"
PATCHES = f"{MODEL}.preprocessors.patching.PatchEmbedder"
POSITIONS = f"{MODEL}.utils.posembs.PositionalEmbeddingAdder"
PACKER = f"{MODEL}.preprocessors.flex_seq_packing.BlockWiseSequencePacker"
UNPACKER = f"{MODEL}.postprocessors.seq_unpacking.SequenceUnpacker"
TRANSFORMER = f"{MODEL}.trunks.transformers.FlexTransformer"

ENCODER_CLASSES = {
    "enc_channels_to_last": OPERATION,
    "enc_patch_emb": PATCHES,
    "enc_posemb_module": POSITIONS,
    "enc_register_module": f"{MODEL}.preprocessors.registers.Registers1D",
    "enc_seq_packer": PACKER,
    "enc_transformer": TRANSFORMER,
    "enc_unpacker": UNPACKER,
    "enc_to_latents": f"{MODEL}.postprocessors.heads.LinearHead",
}
DECODER_CLASSES = {
    "dec_from_latents": f"{MODEL}.preprocessors.linear.LinearLayer",
    "dec_registers_posemb_module": POSITIONS,
    "dec_nested_dropout": f"{MODEL}.preprocessors.token_dropout.MaskedNestedDropout",
    "dec_latent_dropout": f"{MODEL}.preprocessors.nullcond.LearnedNullCond",
    "dec_noise_channels_to_last": OPERATION,
    "dec_noise_patch_emb": PATCHES,
    "dec_patches_posemb_module": POSITIONS,
    "dec_seq_packer": PACKER,
    "dec_time_embedder": f"{MODEL}.preprocessors.time_embedding.TimestepEmbedder",
    "dec_transformer": TRANSFORMER,
    "dec_unpacker": UNPACKER,
    "dec_repa_unpacker": UNPACKER,
    "dec_to_patches": f"{MODEL}.postprocessors.heads.ToPatchesLinearHead",
    "dec_channels_to_first": OPERATION,
}
OPERATIONS = {
    "enc_channels_to_last": f"{MODEL}.utils.dict_ops.channels_first_to_last",
    "dec_noise_channels_to_last": f"{MODEL}.utils.dict_ops.channels_first_to_last",
    "dec_channels_to_first": f"{MODEL}.utils.dict_ops.channels_last_to_first",
}
OF_REGISTERS = {"enc_register_module", "dec_registers_posemb_module"}
OF_TRAINING = {"dec_repa_unpacker"}
SUM_OPERATION = f"{MODEL}.utils.dict_ops.sum_tensors"  # in grids: adds the tokens to the noisy patches


def read_tokenizer_settings(settings: Section) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Read all settings except those of the VAE.

    Returns:
        Arguments of `FlexTokEncoderConfig`, arguments of `FlexTokFlowDecoder`, and training-only settings.
    """
    settings.expect("_target_", "flextok.flextok_wrapper.FlexTok", default="flextok.flextok_wrapper.FlexTok")
    levels = read_levels(settings.section("regularizer"))
    encoder, decoder = settings.section("encoder"), settings.section("decoder")
    has_registers = "enc_register_module" in encoder.values.get("module_dict", ())
    encoder_modules = read_modules(encoder, ENCODER_CLASSES, has_registers)
    decoder_modules = read_modules(decoder, DECODER_CLASSES, has_registers)
    encoder_config = read_encoder(encoder_modules, levels)
    decoder_config = read_decoder(decoder_modules, levels, encoder_config["num_registers"])
    pipeline = settings.section("pipeline")
    pipeline.target("flextok.flow_matching.pipelines.MinRFPipeline")
    pipeline.expect("out_channels", decoder_config["in_channels"])
    if decoder_config["in_channels"] != encoder_config["in_channels"]:
        raise ValueError(
            f"{settings.source!r} encodes {encoder_config['in_channels']} channels and decodes"
            f" {decoder_config['in_channels']}; both must be those of its VAE."
        )
    return encoder_config, decoder_config, read_training(settings, decoder_modules)


def read_levels(regularizer: Section) -> list[int]:
    """Read the levels of the quantizer."""
    regularizer.target("flextok.regularizers.quantize_fsq.FSQ")
    regularizer.skip("drop_quant_p", "packed_call")  # training only; how images of several sizes are batched
    levels = regularizer.counts("levels")
    if min(levels) < 2 or math.prod(levels) > MAX_COUNT:
        raise ValueError(
            f"{regularizer.describe('levels')} must be 2 or more each, product {MAX_COUNT} at most, got {levels}."
        )
    return levels


def read_modules(stack: Section, classes: dict[str, str], has_registers: bool) -> dict[str, Section]:
    """Return the modules by name; refuse any other modules, classes or order."""
    stack.target(WRAPPER)
    modules = stack.section("module_dict")
    optional = OF_TRAINING if has_registers else OF_TRAINING | OF_REGISTERS | {"dec_nested_dropout"}
    expected = [name for name in classes if name in modules or name not in optional]
    names = list(modules.values)
    if not has_registers and classes is DECODER_CLASSES:
        names = [name for name in names if not read_sum(modules, name)]
    if names != expected:
        raise ValueError(
            f"{modules.describe()} has the modules {', '.join(names)}; flextok_hf converts {', '.join(expected)}, in"
            " this order."
        )
    parts = {name: modules.section(name) for name in expected}
    for name, part in parts.items():
        part.target(classes[name])
        if name in OPERATIONS:
            part.section("per_sample_op").target(OPERATIONS[name])
    return parts


def read_sum(modules: Section, name: str) -> bool:
    """Return whether a module of a grid decoder is the one that adds tokens to patches; if so, skip its settings."""
    values = modules.values[name]
    if not isinstance(values, dict):
        return False
    targets = [values.get("_target_"), *(one.get("_target_") for one in values.values() if isinstance(one, dict))]
    is_sum = SUM_OPERATION in targets and set(targets) <= {SUM_OPERATION, OPERATION, None}
    if is_sum:
        modules.skip(name)
    return is_sum


def read_patches(patches: Section, positions: Section, hidden_size: int) -> dict[str, int]:
    """Read how latents are cut into patches."""
    patches.expect("dim", hidden_size)
    patches.expect("flatten_patches", False, default=False)
    patch_size, columns = patches.counts("patch_sizes", 2)
    positions.expect("dim", hidden_size)
    positions.expect("posemb_type", "sincos")
    positions.expect("posemb_scaling", "absolute")
    grid_size, grid_columns = positions.counts("max_sizes", 2)
    if (patch_size, grid_size) != (columns, grid_columns):
        raise ValueError(
            f"{patches.describe()} has patches of {patch_size} x {columns} for a grid of {grid_size} x"
            f" {grid_columns}; flextok_hf supports only square ones."
        )
    return {"in_channels": patches.count("channels_in"), "patch_size": patch_size, "grid_size": grid_size}


def read_transformer(transformer: Section) -> tuple[int, int, int]:
    """Return the width, the depth and the width of a head."""
    transformer.skip("use_act_checkpoint", "intermediate_layers")  # training only: activation checkpointing and REPA
    hidden_size, head_dim = transformer.count("dim"), transformer.count("head_dim", 64)
    if hidden_size % head_dim or hidden_size % 4:
        raise ValueError(
            f"{transformer.describe('dim')} is {hidden_size}, not a multiple of `head_dim` {head_dim} and of 4."
        )
    return hidden_size, transformer.count("depth"), head_dim


def read_encoder(modules: dict[str, Section], levels: list[int]) -> dict[str, Any]:
    """Read the encoder: arguments of `FlexTokEncoderConfig`."""
    hidden_size, num_layers, head_dim = read_transformer(modules["enc_transformer"])
    patches = read_patches(modules["enc_patch_emb"], modules["enc_posemb_module"], hidden_size)
    packer, head = modules["enc_seq_packer"], modules["enc_to_latents"]
    packer.skip("pad_to_multiple")
    packer.expect("per_subseq_embs", False, default=False)
    read_head(head, hidden_size)
    head.expect("dim_out", len(levels))
    registers = modules.get("enc_register_module")
    if registers is None:
        packer.expect("mask_mode", "full")
        layout = {"token_layout": "grid", "num_registers": patches["grid_size"] ** 2}
    else:
        packer.expect("mask_mode", "causal_last")
        registers.expect("dim", hidden_size)
        registers.expect("ordering_mode", "nested", default="nested")
        registers.skip("size_sampling_mode")  # training only, and no effect if `n_min` equals `n_max`
        num_registers = registers.count("n_max")
        registers.expect("n_min", num_registers)
        layout = {"token_layout": "registers", "num_registers": num_registers}
    return {
        **patches,
        **layout,
        "hidden_size": hidden_size,
        "num_hidden_layers": num_layers,
        "head_dim": head_dim,
        "fsq_levels": levels,
    }


def read_decoder(modules: dict[str, Section], levels: list[int], num_registers: int) -> dict[str, Any]:
    """Read the decoder: arguments of `FlexTokFlowDecoder`."""
    hidden_size, num_layers, head_dim = read_transformer(modules["dec_transformer"])
    patches = read_patches(modules["dec_noise_patch_emb"], modules["dec_patches_posemb_module"], hidden_size)
    modules["dec_from_latents"].expect("dim_in", len(levels))
    for name in ("dec_from_latents", "dec_nested_dropout", "dec_latent_dropout", "dec_time_embedder"):
        if name in modules:
            modules[name].expect("dim", hidden_size)
    modules["dec_latent_dropout"].expect("replace_with_single_token", False, default=False)

    packer, positions = modules["dec_seq_packer"], modules.get("dec_registers_posemb_module")
    packer.skip("pad_to_multiple")
    packer.expect("mask_mode", "full")
    has_registers = positions is not None
    if positions is not None:
        positions.expect("dim", hidden_size)
        positions.expect("posemb_type", "learnable_sum")
        positions.expect("posemb_scaling", "absolute")
        positions.expect("max_sizes", [num_registers], (num_registers,))
    elif patches["grid_size"] ** 2 != num_registers:
        raise ValueError(f"{packer.source!r} is a grid whose encoder and decoder have different numbers of patches.")
    packer.expect("per_subseq_embs", has_registers, default=False)
    modules["dec_transformer"].expect("adaLN_expansion", 2 if has_registers else 1, default=1)

    head, time_embedder = modules["dec_to_patches"], modules["dec_time_embedder"]
    read_head(head, hidden_size)
    head.expect("channels_out", patches["in_channels"])
    head.expect("patch_sizes", [patches["patch_size"]] * 2, (patches["patch_size"],) * 2)
    return {
        **patches,
        "token_layout": "registers" if has_registers else "grid",
        "num_registers": num_registers,
        "nested_dropout": "dec_nested_dropout" in modules,
        "hidden_size": hidden_size,
        "num_layers": num_layers,
        "head_dim": head_dim,
        "code_dim": len(levels),
        "frequency_embedding_size": time_embedder.count("frequency_embedding_size", 256),
        "max_timestep": time_embedder.number("max_timestep", 1000.0),
    }


def read_head(head: Section, hidden_size: int) -> None:
    """Read the settings that the output layers of encoder and decoder share."""
    head.expect("dim", hidden_size)
    head.expect("use_mup_readout", False, default=False)
    head.expect("dtype_override", None, "fp32", default=None)
    head.skip("weight_init_style")


def read_training(settings: Section, modules: dict[str, Section]) -> dict[str, Any]:
    """Read the training-only settings: noise levels, nested dropout, null condition."""
    noise = settings.section("flow_matching_noise_module")
    noise.target("flextok.flow_matching.noise_modules.MinRFNoiseModule")
    parts: dict[str, tuple[Section, tuple[str, ...]]] = {"noise": (noise, ("ln", "stratisfied", "mode_scale"))}
    if "dec_nested_dropout" in modules:
        parts["nested_dropout"] = (modules["dec_nested_dropout"], ("size_sampling_mode",))
    parts["null_condition"] = (modules["dec_latent_dropout"], ("dropout_prob",))
    training = {}
    for part, (section, names) in parts.items():
        section.skip(*names)
        training[part] = {name: section.values[name] for name in names if name in section}
    return training
