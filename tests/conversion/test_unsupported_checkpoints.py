"""Checkpoints that our models do not support, or that do not match, are refused by name."""

import pytest
import torch
from official_checkpoints import write_prior, write_tokenizer
from refusals import WEIGHTS, edit_json, edit_weights, edit_yaml, refuse

from flextok_hf.conversion.convert import convert_checkpoint


# Settings that are not supported


def set_in(stack, module, **values):
    return lambda config: config[stack]["module_dict"][module].update(values)


def drop(stack, module):
    return lambda config: config[stack]["module_dict"].pop(module)


def pop_in(stack, module, name):
    return lambda config: config[stack]["module_dict"][module].pop(name)


def reverse(config):
    modules = config["decoder"]["module_dict"]
    config["decoder"]["module_dict"] = dict(reversed(list(modules.items())))


UNSUPPORTED = {
    "muP readout": (
        set_in("encoder", "enc_to_latents", use_mup_readout=True),
        "enc_to_latents.use_mup_readout.* is True",
    ),
    "muP readout of patches": (set_in("decoder", "dec_to_patches", use_mup_readout=True), "use_mup_readout.* is True"),
    "another mask": (
        set_in("encoder", "enc_seq_packer", mask_mode="causal"),
        "mask_mode.* is 'causal'.*'causal_last'",
    ),
    "a masked decoder": (set_in("decoder", "dec_seq_packer", mask_mode="causal_last"), "mask_mode.*must be 'full'"),
    "registers of varying number": (set_in("encoder", "enc_register_module", n_min=1), "n_min.* is 1.* must be 6"),
    "registers in another order": (set_in("encoder", "enc_register_module", ordering_mode="grid"), "ordering_mode"),
    "shared modulation": (set_in("decoder", "dec_transformer", adaLN_expansion=1), "adaLN_expansion.* must be 2"),
    "learned patch positions": (
        set_in("encoder", "enc_posemb_module", posemb_type="learnable_sum"),
        "must be 'sincos'",
    ),
    "stretched positions": (set_in("encoder", "enc_posemb_module", posemb_scaling="relative"), "must be 'absolute'"),
    "fixed register positions": (
        set_in("decoder", "dec_registers_posemb_module", posemb_type="sincos"),
        "learnable_sum",
    ),
    "patches that are not square": (set_in("encoder", "enc_patch_emb", patch_sizes=[2, 1]), "patches of 2 x 1"),
    "a grid that is not square": (set_in("encoder", "enc_posemb_module", max_sizes=[4, 2]), "a grid of 4 x 2"),
    "a single null token": (
        set_in("decoder", "dec_latent_dropout", replace_with_single_token=True),
        "replace_with_single",
    ),
    "a missing width": (pop_in("encoder", "enc_transformer", "dim"), "dim.* is missing"),
    "a width as text": (set_in("encoder", "enc_transformer", dim="wide"), "dim.* must be a whole number, got 'wide'"),
    "a boolean width": (set_in("encoder", "enc_transformer", dim=True), "dim.* must be a whole number, got True"),
    "a negative depth": (set_in("encoder", "enc_transformer", depth=-1), "depth.* must be between 1"),
    "heads that do not fit": (set_in("encoder", "enc_transformer", head_dim=7), "not a multiple of `head_dim` 7"),
    "noise levels as text": (
        set_in("decoder", "dec_time_embedder", max_timestep="1"),
        "max_timestep.* must be a number",
    ),
    "one level": (lambda config: config["regularizer"].update(levels=[5, 1]), "levels.* must be 2 or more"),
    "absurd levels": (lambda config: config["regularizer"].update(levels=[10**6] * 6), "levels"),
    "a missing module": (drop("decoder", "dec_latent_dropout"), "has the modules .* in this order"),
    "an unknown module": (
        lambda config: config["encoder"]["module_dict"].update(enc_extra={"_target_": "x.Y"}),
        "enc_extra",
    ),
    "modules in another order": (reverse, "in this order"),
    "an unknown setting": (
        set_in("encoder", "enc_transformer", rope=True),
        "`encoder.module_dict.enc_transformer.rope`",
    ),
    "an unknown part": (lambda config: config.update(hooks={}), "settings that flextok_hf does not know: `hooks`"),
    "a missing part": (lambda config: config.pop("regularizer"), "`regularizer` of .* is missing"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_an_unsupported_tokenizer_is_refused_by_name(place, tokenizer, name):
    change, message = UNSUPPORTED[name]
    edit_json(tokenizer / "config.json", change)
    refuse(place, message, tokenizer)


@pytest.mark.parametrize("module, setting", [("enc_seq_packer", "causal_last"), ("enc_seq_packer", "causal")])
def test_a_grid_with_another_mask_is_refused(place, module, setting):
    path, _, _ = write_tokenizer(place / "grid", registers=0)
    edit_json(path / "config.json", set_in("encoder", module, mask_mode=setting))
    refuse(place, "mask_mode.* must be 'full'", path)


def test_a_grid_with_token_positions_is_refused(place):
    path, _, _ = write_tokenizer(place / "grid", registers=0)
    positions = {"_target_": "flextok.model.utils.posembs.PositionalEmbeddingAdder", "dim": 48}

    def change(config):
        modules = list(config["decoder"]["module_dict"].items())
        modules.insert(1, ("dec_tokens_posemb_module", positions))
        config["decoder"]["module_dict"] = dict(modules)

    edit_json(path / "config.json", change)
    refuse(place, "has the modules .*dec_tokens_posemb_module", path)


def trunk(**values):
    return lambda models: models["ar_image_model"]["trunk"].update(values)


def part(path, **values):
    def change(models):
        for name in path.split("."):
            models = models[name]
        models.update(values)

    return change


def self_attention(**values):
    return part("ar_image_model.trunk.self_attn_target", **values)


ATTENTION = "l3m.model.layers.attention"
UNSUPPORTED_PRIORS = {
    "rotary positions": (self_attention(use_rope=True), "self_attn_target.use_rope`"),
    "norms over the full width": (
        self_attention(_target_=f"{ATTENTION}.DCLMAttention"),
        "is '.*DCLMAttention', which",
    ),
    "grouped keys": (self_attention(num_kv_heads=2), "self_attn_target.num_kv_heads`"),
    "attention to later tokens": (self_attention(is_causal=False), "is_causal.* is False"),
    "a scale that the class ignores": (
        self_attention(_target_=f"{ATTENTION}.HFAttention", qk_scale=0.1),
        "qk_scale.* is 0.1",
    ),
    "a norm without a class": (self_attention(qk_norm=True), "qk_norm.* must be a group of settings, got True"),
    "heads that do not fit": (self_attention(num_heads=5), "num_heads.* is 5, which does not divide the width 32"),
    "unequal heads": (part("ar_image_model.trunk.cross_attn_target", num_heads=8), "num_heads.* must be 4"),
    "an unknown norm": (trunk(norm_layer={"_target_": "x.DyT"}), "norm_layer._target_.* is 'x.DyT'"),
    "a norm without epsilon": (
        trunk(norm_layer={"_target_": "l3m.model.layers.normalization.LayerNorm"}),
        "norm_layer.eps.* is missing",
    ),
    "another feed-forward": (
        trunk(ffn_target={"_target_": "l3m.model.layers.ffn.MLP"}),
        "ffn_target._target_.* is '.*MLP'",
    ),
    "a readout that scales": (
        part("ar_image_model.head", _target_="mup.MuReadout"),
        "head._target_.* is 'mup.MuReadout'",
    ),
    "no positions": (part("ar_image_model.preprocessor", pos_embed_type=None), "pos_embed_type.* is None"),
    "biases only in the configuration": (trunk(use_bias=True), "use_bias.* says biases, but its tensors have none"),
    "an interpolation": (trunk(embed_dim="${width}"), r"embed_dim.* must be a whole number, got '\${width}'"),
    "another activation": (part("text_encoder.mlp.act_layer", _target_="torch.nn.Tanh"), "is 'torch.nn.Tanh'"),
    "another text encoder": (part("text_encoder.t5_embedder", _target_="x.Clip"), "is 'x.Clip', which"),
    "an unknown part": (lambda models: models.update(extra={"_target_": "x.Y"}), "models.extra`"),
    "a length as text": (part("text_encoder.t5_embedder", encoder_seqlen_max="long"), "must be a whole number"),
}


@pytest.mark.parametrize("name", UNSUPPORTED_PRIORS)
def test_an_unsupported_prior_is_refused_by_name(place, text_prior, name):
    change, message = UNSUPPORTED_PRIORS[name]
    edit_yaml(text_prior / "config.yaml", change)
    refuse(place, message, prior=text_prior)


def test_biases_that_contradict_the_configuration_are_refused(place, prior):
    bias = {f"models.ar_image_model.trunk.blocks.{i}.mlp.fc1.bias": torch.ones(48) for i in range(2)}
    edit_weights(prior / WEIGHTS, lambda tensors: tensors.update(bias))
    refuse(place, "use_bias` of .* says no biases, but its tensors have them in mlp.fc1", prior=prior)


def test_a_bias_missing_in_a_single_block_is_named(place):
    folder, _, _ = write_prior(place / "prior", classes=5, use_bias=True)
    name = "models.ar_image_model.trunk.blocks.1.mlp.fc2.bias"
    edit_weights(folder / WEIGHTS, lambda tensors: tensors.pop(name))
    refuse(place, f"lacks tensors: `{name}`", prior=folder)


def test_settings_that_the_user_lists_are_ignored(place, tokenizer, text_prior):
    edit_json(tokenizer / "config.json", set_in("encoder", "enc_transformer", compile_mode="max"))
    edit_yaml(text_prior / "config.yaml", trunk(drop_path=0.1))
    names = ["encoder.module_dict.enc_transformer.compile_mode"]
    refuse(place, "If you are sure .* pass them in `ignore`", tokenizer, text_prior)
    names.append("model.meta_model.models.ar_image_model.trunk.drop_path")
    convert_checkpoint(place / "ours", str(tokenizer), str(text_prior), ignore=names)
    assert (place / "ours" / "model_index.json").is_file()


def test_a_single_setting_can_be_ignored(place, tokenizer):
    edit_json(tokenizer / "config.json", set_in("encoder", "enc_transformer", compile_mode="max"))
    convert_checkpoint(place / "ours", tokenizer, ignore="encoder.module_dict.enc_transformer.compile_mode")
    assert (place / "ours" / "model_index.json").is_file()


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float64, torch.int8])
def test_an_unsupported_precision_is_refused(place, tokenizer, dtype):
    refuse(place, "`dtype` must be torch.float32, torch.bfloat16, torch.float16 or None", tokenizer, dtype=dtype)


# Mixed-up arguments


def test_a_tokenizer_passed_as_a_prior_is_detected_and_vice_versa(place, tokenizer, prior):
    refuse(place, "has no `config.json` .* It looks like a prior: pass it as `prior`", prior)
    refuse(place, "has no `config.yaml`.* It looks like a tokenizer: pass it as `tokenizer`", prior=tokenizer)
    refuse(place, "Pass `tokenizer`, `prior`, or both")


def test_a_converted_checkpoint_is_not_converted_again(place, tokenizer):
    convert_checkpoint(place / "mine", str(tokenizer))
    refuse(place, "is already a pipeline of this package", place / "mine")


def test_a_prior_that_does_not_match_the_tokenizer_is_refused(place, tokenizer):
    prior, _, _ = write_prior(place / "prior", classes=5, codes=16)
    refuse(place, "generates 6 tokens of 16 codes, but the tokenizer has 6 tokens of 15 codes", tokenizer, prior)


def test_a_revision_of_a_local_checkpoint_is_refused(place, tokenizer, prior):
    refuse(place, "is a local path, which has no revisions", tokenizer, revision="main")
    refuse(place, "is a local path, which has no revisions", tokenizer, prior, prior_revision="main")
