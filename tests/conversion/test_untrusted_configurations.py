"""Malicious or damaged configurations of checkpoints: a clear error, no code is run, no file is left behind."""

import json
import os
import shutil

import pytest
import yaml
from official_checkpoints import TINY_VAE
from refusals import EVIL, WEIGHTS, edit_json, edit_yaml, read_weights, refuse
from safetensors.torch import save_file

from flextok_hf.conversion.convert import convert_checkpoint
from flextok_hf.conversion.settings import parse_settings


# Code in a configuration


PARTS = ["vae", "encoder", "decoder", "regularizer", "flow_matching_noise_module", "pipeline"]


@pytest.mark.parametrize("part", PARTS)
def test_an_unknown_class_in_a_configuration_is_never_created(place, tokenizer, part):
    edit_json(tokenizer / "config.json", lambda config: config[part].update(EVIL))
    refuse(place, f"`{part}._target_` of .* is 'os.system', which flextok_hf does not convert", tokenizer)


@pytest.mark.parametrize("part", PARTS)
def test_an_unknown_class_in_metadata_is_never_created(place, tokenizer_file, part):
    tensors, metadata = read_weights(tokenizer_file)
    save_file(tensors, tokenizer_file, {**metadata, part: repr(EVIL)})
    refuse(place, f"`{part}._target_` of .* is 'os.system'", tokenizer_file)


def test_an_unknown_top_level_class_in_metadata_is_never_created(place, tokenizer_file):
    tensors, metadata = read_weights(tokenizer_file)
    save_file(tensors, tokenizer_file, {**metadata, "_target_": "os.system"})
    refuse(place, "`_target_` of .* is 'os.system', which flextok_hf does not support", tokenizer_file)


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_an_unknown_class_in_any_module_is_never_created(place, tokenizer, stack):
    modules = json.loads((tokenizer / "config.json").read_text())[stack]["module_dict"]
    original = (tokenizer / "config.json").read_text()
    for name in modules:
        (tokenizer / "config.json").write_text(original)
        edit_json(tokenizer / "config.json", lambda config: config[stack]["module_dict"][name].update(EVIL))
        refuse(place, f"`{stack}.module_dict.{name}._target_` of .* is 'os.system'", tokenizer)


def test_an_unknown_operation_is_never_run(place, tokenizer):
    def change(config):
        config["encoder"]["module_dict"]["enc_channels_to_last"]["per_sample_op"] = EVIL

    edit_json(tokenizer / "config.json", change)
    refuse(place, r"enc_channels_to_last.per_sample_op._target_` of .* is 'os.system'", tokenizer)


@pytest.mark.parametrize("path", [
    "text_encoder", "text_encoder.t5_embedder", "text_encoder.mlp", "text_encoder.mlp.act_layer", "ar_image_model",
    "ar_image_model.preprocessor", "ar_image_model.postprocessor", "ar_image_model.head", "ar_image_model.trunk",
    "ar_image_model.trunk.self_attn_target", "ar_image_model.trunk.cross_attn_target",
    "ar_image_model.trunk.ffn_target", "ar_image_model.trunk.norm_layer",
])  # fmt: skip
def test_an_unknown_class_in_a_prior_is_never_created(place, text_prior, path):
    def change(models):
        for name in path.split("."):
            models = models[name]
        models.update(EVIL)

    edit_yaml(text_prior / "config.yaml", change)
    refuse(place, rf"{path}._target_` of .* is 'os.system', which flextok_hf does not convert", prior=text_prior)


@pytest.mark.parametrize("text", [
    "__import__('os').system('touch evil')",
    "{'_target_': __import__('os').system('touch evil')}",
    "[x for x in [1]]",
    "{'a': b'bytes'}",
    "{'a': {1, 2}}",
    "{1: 2}",
    "{'a': 1e999}",
    "{'a': 1",
    "(" * 90_000,
    "-" * 90_000 + "1",
    "1+" * 45_000 + "1",
    "not " * 20_000 + "1",
    "{'a':" * 15_000 + "1" + "}" * 15_000,
    "{'a': [" + "[" * 60 + "]" * 60 + "]}",
    "9" * 90_000,
    "{'a': '\x00'}\x00",
    "",
], ids=lambda text: text[:12])  # fmt: skip
def test_a_literal_that_is_not_plain_data_is_refused(place, tokenizer_file, text):
    tensors, metadata = read_weights(tokenizer_file)
    save_file(tensors, tokenizer_file, {**metadata, "encoder": text})
    refuse(place, "`encoder` in the metadata of .* cannot be read as literal data|must be a group", tokenizer_file)


@pytest.mark.parametrize("text", [
    "model: !!python/object/apply:os.system ['touch evil']",
    "model: !!python/name:os.system",
    "a: &a [*a]",
    "a: &a {b: *a}\nmodel: {<<: *a}",
    "a: &a [1]\nmodel: *b",
    "a0: &a0 [x, x]\n" + "".join(f"a{i + 1}: &a{i + 1} [*a{i}, *a{i}]\n" for i in range(100)),
    "a0: &a0 {x: 1}\n" + "".join(f"a{i + 1}: &a{i + 1} {{p: *a{i}, q: *a{i}}}\n" for i in range(100)),
    "a0: &a0 {x: 1}\n" + "".join(f"a{i + 1}: &a{i + 1} {{<<: [*a{i}, *a{i}]}}\n" for i in range(100)),
    "a: &a " + "x" * 5000 + "\nb: [" + "*a, " * 1000 + "]",
    "model: 1\nmodel: 2",
    "model: 2020-01-01",
    "model: .nan",
    "model: !!binary aGVsbG8=",
    "1: 2",
    "[" * 50_000,
    "? " * 20_000,
    "model: [",
    "model:\n\t- tab",
    "model: " + "9" * 90_000,
], ids=lambda text: text[:24])  # fmt: skip
def test_yaml_that_is_not_plain_data_is_refused(place, prior, text):
    (prior / "config.yaml").write_text(text)
    refuse(place, "`config.yaml` of .* cannot be read as yaml data", prior=prior)


def test_aliases_of_a_configuration_are_written_out(place, prior):
    config = yaml.safe_load((prior / "config.yaml").read_text())
    trunk = config["model"]["meta_model"]["models"]["ar_image_model"]["trunk"]
    text = yaml.safe_dump({**config, "generation": trunk["norm_layer"]})
    assert "&id001" in text and "*id001" in text
    before = parse_settings((prior / "config.yaml").read_text(), "yaml", "test")
    (prior / "config.yaml").write_text(text)
    after = parse_settings(text, "yaml", "test")
    assert after["model"] == before["model"] and after["generation"] == trunk["norm_layer"]
    convert_checkpoint(place / "ours", prior=str(prior))


@pytest.mark.parametrize("text, value", [
    ("a: &a [x, x]\nb: *a", {"a": ["x", "x"], "b": ["x", "x"]}),
    ("a: &a {x: 1}\nb: {<<: *a, y: 2}", {"a": {"x": 1}, "b": {"x": 1, "y": 2}}),
    ("a: &a 7\nb: [*a, *a]\nc: &c {d: *a}\ne: *c", {"a": 7, "b": [7, 7], "c": {"d": 7}, "e": {"d": 7}}),
])  # fmt: skip
def test_yaml_aliases_stand_for_their_values(text, value):
    assert parse_settings(text, "yaml", "test") == value


@pytest.mark.parametrize(
    "text", ['{"vae": NaN}', '{"vae": 1, "vae": 2}', "[" * 90_000, '{"vae": ', "{'vae': 1}", "", "nul"]
)
def test_json_that_is_not_plain_data_is_refused(place, tokenizer, text):
    (tokenizer / "config.json").write_text(text)
    refuse(place, "`config.json` of .* cannot be read as json data", tokenizer)


@pytest.mark.parametrize("text", ["[]", "7", "null", '"text"'])
def test_a_configuration_that_is_not_a_group_is_refused(place, tokenizer, text):
    (tokenizer / "config.json").write_text(text)
    refuse(place, "the configuration of .* must be a group of settings", tokenizer)


def test_a_configuration_that_is_not_text_is_refused(place, tokenizer):
    (tokenizer / "config.json").write_bytes(b"\xff\xfe\x00")
    refuse(place, "config.json.* is not a text file", tokenizer)


@pytest.mark.parametrize("size", [150_000, 5_000_000])
def test_a_huge_configuration_is_not_parsed(place, tokenizer, prior, size):
    (tokenizer / "config.json").write_text('{"a": "' + "x" * size + '"}')
    refuse(place, "no configuration needs more than 100,000", tokenizer)
    (prior / "config.yaml").write_text("a: " + "x" * size)
    refuse(place, "no configuration needs more than 100,000", prior=prior)


def test_numbers_are_read_as_the_official_loader_reads_them():
    assert parse_settings("eps: 1e-05", "yaml", "test") == {"eps": 1e-5}
    assert parse_settings("{'eps': 1e-05, 'a': (1, None, True)}", "literal", "test") == {
        "eps": 1e-5,
        "a": (1, None, True),
    }
    assert parse_settings('{"a": null}', "literal", "test") == {"a": None}


# Sizes claimed by the configuration only


def test_excessive_sizes_are_refused_before_anything_is_built(place, tokenizer, prior):
    original = (tokenizer / "config.json").read_text()
    for stack, module, changes in (
        ("encoder", "enc_transformer", {"depth": 10**9}),
        ("decoder", "dec_transformer", {"depth": 10**9}),
        ("encoder", "enc_posemb_module", {"max_sizes": [2**20, 2**20]}),
        ("decoder", "dec_patches_posemb_module", {"max_sizes": [2**20, 2**20]}),
    ):
        (tokenizer / "config.json").write_text(original)
        edit_json(tokenizer / "config.json", lambda config: config[stack]["module_dict"][module].update(changes))
        refuse(place, "the configuration asks for", tokenizer)
    edit_yaml(prior / "config.yaml", lambda models: models["ar_image_model"]["trunk"].update(num_blocks=10**9))
    refuse(place, "the configuration asks for 1000000000", prior=prior)


@pytest.mark.parametrize("changes", [
    {"layers_per_block": 10**9},
    {"block_out_channels": [8] * 1000},
    {"down_block_types": ["DownEncoderBlock2D"] * 1000},
    {"down_block_types": ["os.system"] * 2},
    {"_class_name": "os.system"},
    {"latent_channels": 5},
    {"norm_num_groups": 3},
    {"act_fn": "system"},
    {"scaling_factor": "large"},
    {"hooks": ["os.system"]},
    {"block_out_channels": "wide"},
    {"norm_num_groups": 0.5},
    {"norm_num_groups": 0},
    {"block_out_channels": [4]},
    {"block_out_channels": [4, 4, 4]},
    {"up_block_types": []},
    {"up_block_types": ["UpDecoderBlock2D"]},
    {"layers_per_block": [1]},
    {"in_channels": 4},
    {"out_channels": 1},
    {"act_fn": []},
    {"shift_factor": "0"},
    {"use_quant_conv": 1},
    {"mid_block_add_attention": None},
])  # fmt: skip
def test_a_vae_with_invalid_settings_is_refused_by_name(place, tokenizer, changes):
    (tokenizer / "vae_config.json").write_text(json.dumps({**TINY_VAE, **changes}))
    name = next(iter(changes))
    # channels and groups are compared with each other
    refuse(place, f"`(vae_config[.])?{name}`|`norm_num_groups`" if name != "latent_channels" else name, tokenizer)


@pytest.mark.parametrize("value", [-1, -0.5, "1", True])
def test_a_vae_with_an_invalid_scaling_factor_is_refused(place, tokenizer, value):
    (tokenizer / "vae_config.json").write_text(json.dumps({**TINY_VAE, "scaling_factor": value}))
    edit_json(tokenizer / "config.json", lambda config: config["vae"].update(scaling_factor=None))
    refuse(place, "`vae_config.scaling_factor` of .* must be", tokenizer)


def test_a_vae_without_a_scaling_factor_is_refused(place, tokenizer):
    config = {name: value for name, value in TINY_VAE.items() if name != "scaling_factor"}
    (tokenizer / "vae_config.json").write_text(json.dumps(config))
    edit_json(tokenizer / "config.json", lambda config: config["vae"].update(scaling_factor=None))
    refuse(place, "`vae.scaling_factor` of .* is missing", tokenizer)


# References that point elsewhere


OUTSIDE = ["../secret", "a/../../secret", "/etc", "~/secret", "..\\secret", "secret\0", "./../secret"]


@pytest.mark.parametrize("reference", OUTSIDE)
def test_a_vae_outside_the_checkpoint_is_not_read(place, tokenizer, reference):
    (place / "secret").mkdir()
    (place / "secret" / "config.json").write_text(json.dumps(TINY_VAE))
    edit_json(tokenizer / "config.json", lambda config: config["vae"].update(hf_hub_path=reference))
    refuse(place, "`vae.hf_hub_path` of .* points outside the checkpoint's folder", tokenizer)


@pytest.mark.parametrize("reference", OUTSIDE)
def test_a_text_encoder_outside_the_checkpoint_is_not_read(place, tokenizer, text_prior, reference):
    shutil.move(text_prior / "text_encoder", place / "secret")
    edit_yaml(
        text_prior / "config.yaml",
        lambda models: models["text_encoder"]["t5_embedder"].update(hf_hub_path=reference),
    )
    refuse(place, "hf_hub_path` of .* points outside the checkpoint's folder", tokenizer, text_prior)


def test_a_link_that_points_outside_the_checkpoint_is_not_followed(place, tokenizer, text_prior):
    shutil.move(text_prior / "text_encoder", place / "secret")
    (text_prior / "text_encoder").symlink_to(place / "secret")
    refuse(place, "hf_hub_path` of .* points outside the checkpoint's folder", tokenizer, text_prior)


@pytest.mark.parametrize("reference", ["somewhere", "a/b/c", "spaces in/name", "-/-", "https://example.org/x"])
def test_a_text_encoder_that_is_neither_a_folder_nor_a_hub_id_is_refused(place, tokenizer, text_prior, reference):
    edit_yaml(
        text_prior / "config.yaml",
        lambda models: models["text_encoder"]["t5_embedder"].update(hf_hub_path=reference),
    )
    refuse(
        place, "neither a folder beside the checkpoint nor a Hub id. Pass .* as `text_encoder`", tokenizer, text_prior
    )


@pytest.mark.parametrize("name", ["nowhere", "./nowhere", "a/b/c", "/nowhere", "spaces in/name", "x/../y", ""])
def test_a_source_that_does_not_exist_is_refused(place, name):
    refuse(place, "neither a folder or file nor a Hub id|Repo id must use|name of the tokenizer is empty", name)


def test_pipes_and_folders_in_place_of_files_are_refused(place, tokenizer):
    (tokenizer / WEIGHTS).unlink()
    os.mkfifo(tokenizer / WEIGHTS)  # reading it would block forever
    refuse(place, f"has no `{WEIGHTS}`", tokenizer)
    refuse(place, "is not a safetensors file", tokenizer / WEIGHTS)
    (tokenizer / WEIGHTS).unlink()
    (tokenizer / WEIGHTS).mkdir()
    refuse(place, f"has no `{WEIGHTS}`", tokenizer)
