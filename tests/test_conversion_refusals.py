"""Malice and accident: a checkpoint that is not what it should be gives a clear error, runs and leaves nothing."""

import json
import os
import pickle
import shutil
import struct
from pathlib import Path

import pytest
import torch
import yaml
from official_checkpoints import TINY_VAE, write_prior, write_tokenizer
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import BertConfig, T5Config, T5EncoderModel

from flextok_hf import FlexTokPipeline
from flextok_hf.conversion.convert import convert_checkpoint
from flextok_hf.conversion.settings import parse_settings
from flextok_hf.conversion.writing import new_folder


WEIGHTS = "model.safetensors"
NAMES = {"registers": "encoder.module_dict.enc_register_module.registers"}
NAMES |= {"norm": "models.ar_image_model.trunk.blocks.1.norm_2.weight"}
T5_FOLDER = Path(__file__).parent / "fixtures" / "prior" / "t2i" / "text_encoder"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder to work in, which is also where a command that slips through would leave its mark."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def tokenizer(place):
    return write_tokenizer(place / "tokenizer")[0]


@pytest.fixture
def tokenizer_file(place):
    return write_tokenizer(place / "tokenizer", is_single_file=True)[0]


@pytest.fixture
def prior(place):
    return write_prior(place / "prior", classes=5)[0]


@pytest.fixture
def text_prior(place):
    """A prior of texts with the text encoder beside it."""
    folder, _, _ = write_prior(place / "prior", text_dim=48)
    shutil.copytree(T5_FOLDER, folder / "text_encoder")
    return folder


def refuse(place, message, tokenizer=None, prior=None, **options):
    """Conversion fails with this message, which is short, and leaves nothing."""
    sources = [None if one is None else str(one) for one in (tokenizer, prior)]
    before = sorted(place.rglob("*"))
    with pytest.raises((ValueError, OSError), match=message) as caught:
        convert_checkpoint(place / "ours", *sources, **options)
    assert sorted(place.rglob("*")) == before
    assert len(str(caught.value)) < 1200


def edit_json(path, change):
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def edit_yaml(path, change):
    config = yaml.safe_load(path.read_text())
    change(config["model"]["meta_model"]["models"])
    path.write_text(yaml.safe_dump(config))


def read_weights(path):
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def edit_weights(path, change):
    tensors, metadata = read_weights(path)
    change(tensors)
    save_file(tensors, path, metadata)


def write_header(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


# Code in a configuration


EVIL = {"_target_": "os.system", "command": "touch evil"}
PARTS = ["vae", "encoder", "decoder", "regularizer", "flow_matching_noise_module", "pipeline"]


@pytest.mark.parametrize("part", PARTS)
def test_a_class_of_another_name_in_a_configuration_is_never_made(place, tokenizer, part):
    edit_json(tokenizer / "config.json", lambda config: config[part].update(EVIL))
    refuse(place, f"`{part}._target_` of .* is 'os.system', which flextok_hf does not convert", tokenizer)


@pytest.mark.parametrize("part", PARTS)
def test_a_class_of_another_name_in_metadata_is_never_made(place, tokenizer_file, part):
    tensors, metadata = read_weights(tokenizer_file)
    save_file(tensors, tokenizer_file, {**metadata, part: repr(EVIL)})
    refuse(place, f"`{part}._target_` of .* is 'os.system'", tokenizer_file)


def test_another_outer_class_in_metadata_is_never_made(place, tokenizer_file):
    tensors, metadata = read_weights(tokenizer_file)
    save_file(tensors, tokenizer_file, {**metadata, "_target_": "os.system"})
    refuse(place, "`_target_` of .* is 'os.system', which flextok_hf does not support", tokenizer_file)


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_a_class_of_another_name_in_any_module_is_never_made(place, tokenizer, stack):
    modules = json.loads((tokenizer / "config.json").read_text())[stack]["module_dict"]
    original = (tokenizer / "config.json").read_text()
    for name in modules:
        (tokenizer / "config.json").write_text(original)
        edit_json(tokenizer / "config.json", lambda config: config[stack]["module_dict"][name].update(EVIL))
        refuse(place, f"`{stack}.module_dict.{name}._target_` of .* is 'os.system'", tokenizer)


def test_an_operation_of_another_name_is_never_run(place, tokenizer):
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
def test_a_class_of_another_name_in_a_prior_is_never_made(place, text_prior, path):
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
def test_a_literal_that_is_no_data_is_refused(place, tokenizer_file, text):
    tensors, metadata = read_weights(tokenizer_file)
    save_file(tensors, tokenizer_file, {**metadata, "encoder": text})
    refuse(place, "`encoder` in the metadata of .* cannot be read as literal data|must be a group", tokenizer_file)


@pytest.mark.parametrize("text", [
    "model: !!python/object/apply:os.system ['touch evil']",
    "model: !!python/name:os.system",
    "a: &a [x, x]\nmodel: *a",
    "a: &a {x: 1}\nmodel: {<<: *a}",
    "a: &a [x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nmodel: [*c, *c]",
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
def test_yaml_that_is_no_data_is_refused(place, prior, text):
    (prior / "config.yaml").write_text(text)
    refuse(place, "`config.yaml` of .* cannot be read as yaml data", prior=prior)


@pytest.mark.parametrize(
    "text", ['{"vae": NaN}', '{"vae": 1, "vae": 2}', "[" * 90_000, '{"vae": ', "{'vae': 1}", "", "nul"]
)
def test_json_that_is_no_data_is_refused(place, tokenizer, text):
    (tokenizer / "config.json").write_text(text)
    refuse(place, "`config.json` of .* cannot be read as json data", tokenizer)


@pytest.mark.parametrize("text", ["[]", "7", "null", '"text"'])
def test_a_configuration_that_is_no_group_is_refused(place, tokenizer, text):
    (tokenizer / "config.json").write_text(text)
    refuse(place, "the configuration of .* must be a group of settings", tokenizer)


def test_a_configuration_that_is_no_text_is_refused(place, tokenizer):
    (tokenizer / "config.json").write_bytes(b"\xff\xfe\x00")
    refuse(place, "config.json.* is no text file", tokenizer)


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


# Weights


class Bomb:
    def __reduce__(self):
        return os.system, ("touch evil",)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt"])
def test_pickled_weights_are_never_opened(place, tokenizer, name):
    (tokenizer / WEIGHTS).unlink()
    (tokenizer / name).write_bytes(pickle.dumps(Bomb()))
    refuse(place, f"has no `{WEIGHTS}`.* Its {name} stays closed: pickled files can run code", tokenizer)
    refuse(place, f"{name}' stays closed: pickled files can run code", tokenizer / name)


def test_pickled_weights_under_another_name_are_never_opened(place, tokenizer):
    (tokenizer / WEIGHTS).write_bytes(pickle.dumps(Bomb()))
    refuse(place, "is damaged, was cut off, or is no safetensors file", tokenizer)


@pytest.mark.parametrize("share", [0.0, 0.00001, 0.01, 0.1, 0.5, 0.9999])
def test_a_cut_off_file_is_refused(place, tokenizer, prior, share):
    for folder, arguments in ((tokenizer, {"tokenizer": tokenizer}), (prior, {"prior": prior})):
        content = (folder / WEIGHTS).read_bytes()
        (folder / WEIGHTS).write_bytes(content[: int(len(content) * share)])
        refuse(place, "is damaged|was cut off", **arguments)


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize("header, data, length", [
    ({"a": ENTRY}, bytes(8), 2**63 + 5),
    ({"a": ENTRY}, bytes(8), 10**12),
    ({"a": {**ENTRY, "shape": [2**62]}}, bytes(8), None),
    ({"a": {**ENTRY, "shape": [2**40, 2**40]}}, bytes(8), None),
    ({"a": {**ENTRY, "shape": [3]}}, bytes(8), None),
    ({"a": {**ENTRY, "data_offsets": [0, 2**60]}}, bytes(8), None),
    ({"a": {**ENTRY, "data_offsets": [8, 0]}}, bytes(8), None),
    ({"a": {**ENTRY, "data_offsets": [-8, 0]}}, bytes(8), None),
    ({"a": ENTRY, "b": ENTRY}, bytes(8), None),
    ({"a": ENTRY}, bytes(80), None),
    ({"a": {**ENTRY, "dtype": "OBJECT"}}, bytes(8), None),
    (b"{" * 1000, bytes(8), None),
    (b"\xff" * 100, bytes(8), None),
], ids=range(13))  # fmt: skip
def test_an_absurd_header_is_refused(place, tokenizer, header, data, length):
    write_header(tokenizer / WEIGHTS, header, data, length)
    refuse(place, "is damaged", tokenizer)


def test_huge_metadata_is_not_read(place, tokenizer_file):
    write_header(tokenizer_file, {"__metadata__": {"encoder": "x" * 100 * 2**20}, "a": ENTRY}, bytes(8))
    refuse(
        place,
        r"has a header of [\d,]+ bytes, and no checkpoint needs more than 8,388,608. It is not read",
        tokenizer_file,
    )


def test_long_metadata_is_not_parsed(place, tokenizer_file):
    tensors, metadata = read_weights(tokenizer_file)
    save_file(tensors, tokenizer_file, {**metadata, "encoder": repr({"a": "x" * 200_000})})
    refuse(place, "`encoder` in the metadata of .* has 200,009 characters", tokenizer_file)


def test_unknown_metadata_is_refused(place, tokenizer_file):
    tensors, metadata = read_weights(tokenizer_file)
    save_file(tensors, tokenizer_file, {**metadata, "hooks": "run me"})
    refuse(place, r"the metadata of .* has parts that flextok_hf does not know: \['hooks'\]", tokenizer_file)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused_by_name(place, tokenizer, prior, value):
    def change(tensors):
        name = next(name for name in NAMES.values() if name in tensors)
        tensors[name].view(-1)[-1] = value

    for folder, name in ((tokenizer, NAMES["registers"]), (prior, NAMES["norm"])):
        edit_weights(folder / WEIGHTS, change)
        arguments = {"tokenizer": folder} if folder == tokenizer else {"prior": folder}
        refuse(place, f"`{name}` in .* holds values that are not finite", **arguments)


def test_the_last_tensor_spoils_all_that_was_written_before_it(place, tokenizer):
    name = list(read_weights(tokenizer / WEIGHTS)[0])[-1]
    edit_weights(tokenizer / WEIGHTS, lambda tensors: tensors[name].fill_(float("nan")))
    refuse(place, f"`{name}` in .* holds values that are not finite", tokenizer)


def test_values_too_large_for_the_asked_precision_are_refused(place, tokenizer):
    edit_weights(tokenizer / WEIGHTS, lambda tensors: tensors[NAMES["registers"]].view(-1)[:1].fill_(1e6))
    refuse(
        place,
        f"`{NAMES['registers']}` in .* too large for torch.float16. Choose bfloat16",
        tokenizer,
        dtype=torch.float16,
    )


def test_missing_tensors_are_named(place, tokenizer, prior):
    edit_weights(tokenizer / WEIGHTS, lambda tensors: tensors.pop(NAMES["registers"]))
    refuse(place, f"lacks tensors: `{NAMES['registers']}`", tokenizer)
    edit_weights(prior / WEIGHTS, lambda tensors: tensors.pop(NAMES["norm"]))
    refuse(place, f"lacks tensors: `{NAMES['norm']}`", prior=prior)


@pytest.fixture(params=["registers", "grid", "text", "classes"])
def small(request, place):
    """A small checkpoint with every kind of tensor, as arguments, and the names of some tensors, one of each kind."""
    if request.param in ("registers", "grid"):
        changes = {} if request.param == "registers" else {"registers": 0}
        folder, tensors, _ = write_tokenizer(place / "small", encoder_depth=1, decoder_depth=1, **changes)
        return folder, {"tokenizer": str(folder)}, [name for name in tensors if "vae" not in name or "conv_in" in name]
    norm = {"_target_": "torch.nn.LayerNorm", "eps": 1e-5}
    changes = {"qk_norm": norm, "use_bias": True, "qkv_bias": True, "head_norm": True, "norm": "torch.nn.LayerNorm"}
    changes |= {"text_dim": 12} if request.param == "text" else {"classes": 5, "attention": "HFAttention"}
    folder, tensors, _ = write_prior(place / "small", depth=2, **changes)
    return folder, {"prior": str(folder)}, [name for name in tensors if "blocks.0." not in name]


def test_every_single_missing_tensor_is_named(place, small):
    folder, arguments, names = small
    tensors, metadata = read_weights(folder / WEIGHTS)
    for name in names:
        save_file({other: tensors[other] for other in tensors if other != name}, folder / WEIGHTS, metadata)
        # where the only bias of its kind is gone, the configuration is what tells
        with pytest.raises(ValueError, match=f"`{name}`.* is missing|lacks tensors: .*`{name}`|bias` .* says biases"):
            convert_checkpoint(place / "ours", **arguments)


def test_every_single_wrong_shape_is_named(place, small):
    folder, arguments, names = small
    tensors, metadata = read_weights(folder / WEIGHTS)
    for index, name in enumerate(names):
        changed = tensors[name][None] if index % 2 else tensors[name][..., :-1].contiguous()
        save_file({**tensors, name: changed}, folder / WEIGHTS, metadata)
        # the width of the feed-forward layers is read from one of them, and the others then do not fit
        found = "mlp.fc" if name.endswith("mlp.fc1.weight") else name
        with pytest.raises(ValueError, match=f"`.*{found}.*(has the shape|does not give the shape)"):
            convert_checkpoint(place / "ours", **arguments)


def test_extra_tensors_are_named(place, tokenizer, prior):
    for folder, arguments in ((tokenizer, {"tokenizer": tokenizer}), (prior, {"prior": prior})):
        edit_weights(folder / WEIGHTS, lambda tensors: tensors.update(extra=torch.ones(2)))
        refuse(place, "holds tensors that flextok_hf does not know: `extra`", **arguments)


def test_many_extra_tensors_give_a_short_message(place, tokenizer):
    edit_weights(tokenizer / WEIGHTS, lambda tensors: tensors.update({f"t{i}": torch.ones(1) for i in range(1000)}))
    refuse(place, "and 992 more", tokenizer)


def test_leftovers_of_training_are_read_over_and_reported(place, tokenizer):
    leftovers = {"decoder.module_dict.dec_repa_head.weight": torch.ones(2), "vae.logvar": torch.ones(())}
    edit_weights(tokenizer / WEIGHTS, lambda tensors: tensors.update(leftovers))
    notes = convert_checkpoint(place / "ours", str(tokenizer))
    assert len(notes) == 1 and all(name in notes[0] for name in leftovers)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.uint8])
def test_other_kinds_of_values_are_refused(place, tokenizer, dtype):
    def change(tensors):
        tensors[NAMES["registers"]] = tensors[NAMES["registers"]].to(dtype)

    edit_weights(tokenizer / WEIGHTS, change)
    refuse(place, f"holds `{NAMES['registers']}` as .*, but weights are F32, BF16, F16", tokenizer)


# Sizes that only the configuration claims


def test_sizes_beyond_all_memory_are_refused_before_anything_is_built(place, tokenizer, prior):
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
    {"down_block_types": ["DownEncoderBlock2D"] * 10_000},
    {"down_block_types": ["os.system"] * 2},
    {"_class_name": "os.system"},
    {"latent_channels": 5},
    {"norm_num_groups": 3},
    {"act_fn": "system"},
    {"scaling_factor": "large"},
    {"hooks": ["os.system"]},
    {"block_out_channels": "wide"},
])  # fmt: skip
def test_a_vae_that_does_not_fit_is_refused(place, tokenizer, changes):
    (tokenizer / "vae_config.json").write_text(json.dumps({**TINY_VAE, **changes}))
    refuse(place, "VAE|latent_channels|model cannot be built|scaling_factor", tokenizer)


def test_a_vae_without_a_scale_is_refused(place, tokenizer):
    config = {name: value for name, value in TINY_VAE.items() if name != "scaling_factor"}
    (tokenizer / "vae_config.json").write_text(json.dumps(config))
    edit_json(tokenizer / "config.json", lambda config: config["vae"].update(scaling_factor=None))
    refuse(place, "`vae.scaling_factor` of .* is missing", tokenizer)


# Names that lead elsewhere


OUTSIDE = ["../secret", "a/../../secret", "/etc", "~/secret", "..\\secret", "secret\0", "./../secret"]


@pytest.mark.parametrize("reference", OUTSIDE)
def test_a_vae_outside_of_the_checkpoint_is_not_looked_at(place, tokenizer, reference):
    (place / "secret").mkdir()
    (place / "secret" / "config.json").write_text(json.dumps(TINY_VAE))
    edit_json(tokenizer / "config.json", lambda config: config["vae"].update(hf_hub_path=reference))
    refuse(place, "`vae.hf_hub_path` of .* leads out of the checkpoint's own folder", tokenizer)


@pytest.mark.parametrize("reference", OUTSIDE)
def test_a_text_encoder_outside_of_the_checkpoint_is_not_looked_at(place, tokenizer, text_prior, reference):
    shutil.move(text_prior / "text_encoder", place / "secret")
    edit_yaml(
        text_prior / "config.yaml",
        lambda models: models["text_encoder"]["t5_embedder"].update(hf_hub_path=reference),
    )
    refuse(place, "hf_hub_path` of .* leads out of the checkpoint's own folder", tokenizer, text_prior)


def test_a_link_that_leads_out_of_the_checkpoint_is_not_followed(place, tokenizer, text_prior):
    shutil.move(text_prior / "text_encoder", place / "secret")
    (text_prior / "text_encoder").symlink_to(place / "secret")
    refuse(place, "hf_hub_path` of .* leads out of the checkpoint's own folder", tokenizer, text_prior)


@pytest.mark.parametrize("reference", ["somewhere", "a/b/c", "spaces in/name", "-/-", "https://example.org/x"])
def test_a_text_encoder_that_is_neither_a_folder_nor_a_hub_id_is_refused(place, tokenizer, text_prior, reference):
    edit_yaml(
        text_prior / "config.yaml",
        lambda models: models["text_encoder"]["t5_embedder"].update(hf_hub_path=reference),
    )
    refuse(
        place, "neither a folder beside the checkpoint nor a Hub id. Name .* as `text_encoder`", tokenizer, text_prior
    )


@pytest.mark.parametrize("name", ["nowhere", "./nowhere", "a/b/c", "/nowhere", "spaces in/name", "x/../y", ""])
def test_a_source_that_is_nothing_is_refused(place, name):
    refuse(place, "neither a folder or file nor a Hub id|Repo id must|no safetensors file|has no `", name)


def test_files_that_are_no_files_are_refused(place, tokenizer):
    (tokenizer / WEIGHTS).unlink()
    os.mkfifo(tokenizer / WEIGHTS)  # would wait forever for someone to write
    refuse(place, f"has no `{WEIGHTS}`", tokenizer)
    refuse(place, "is no safetensors file", tokenizer / WEIGHTS)
    (tokenizer / WEIGHTS).unlink()
    (tokenizer / WEIGHTS).mkdir()
    refuse(place, f"has no `{WEIGHTS}`", tokenizer)


# Text encoders


def test_a_text_encoder_of_another_kind_or_width_is_refused(place, tokenizer, text_prior):
    BertConfig(hidden_size=48).save_pretrained(place / "bert")
    T5Config(d_model=40).save_pretrained(place / "t5")
    options = {"tokenizer": tokenizer, "prior": text_prior}
    refuse(place, "is of type 'bert'.* needs a T5 encoder of width 48", text_encoder=str(place / "bert"), **options)
    refuse(place, "and width 40; .* needs a T5 encoder of width 48", text_encoder=str(place / "t5"), **options)


def test_a_text_encoder_that_lacks_weights_is_refused(place, tokenizer, text_prior):
    name = "encoder.block.0.layer.0.SelfAttention.q.weight"
    edit_weights(text_prior / "text_encoder" / WEIGHTS, lambda tensors: tensors.pop(name))
    refuse(place, f"the text encoder .* lacks weights: `{name}`", tokenizer, text_prior)


def test_a_text_encoder_that_is_not_finite_is_refused(place, tokenizer, text_prior):
    name = "encoder.block.0.layer.0.SelfAttention.q.weight"
    edit_weights(text_prior / "text_encoder" / WEIGHTS, lambda tensors: tensors[name].fill_(float("nan")))
    refuse(place, f"the text encoder .* holds values that are not finite: `{name}`", tokenizer, text_prior)


def test_pickled_weights_of_a_text_encoder_are_never_opened(place, tokenizer, text_prior):
    (text_prior / "text_encoder" / WEIGHTS).unlink()
    (text_prior / "text_encoder" / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    refuse(place, WEIGHTS, tokenizer, text_prior)


def test_code_beside_a_text_encoder_is_never_run(place, tokenizer, text_prior):
    folder = text_prior / "text_encoder"
    (folder / "evil.py").write_text("import os\nos.system('touch evil')\nclass Evil:\n    pass\n")
    for file, classes in (
        ("config.json", {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}),
    ):
        edit_json(folder / file, lambda config: config.update(auto_map=classes))
    convert_checkpoint(place / "ours", str(tokenizer), str(text_prior))
    assert not (place / "evil").exists()


def test_a_text_encoder_for_a_prior_without_text_is_refused(place, tokenizer, prior):
    refuse(place, "reads no text. Leave `text_encoder` out", tokenizer, prior, text_encoder=str(T5_FOLDER))


# Without a folder in between


@pytest.mark.parametrize("name", ["code", "not finite", "missing"])
def test_loading_without_conversion_refuses_the_same(place, tokenizer, name):
    if name == "code":
        edit_json(tokenizer / "config.json", lambda config: config["vae"].update(EVIL))
        message = "`vae._target_` of .* is 'os.system'"
    elif name == "missing":
        edit_weights(tokenizer / WEIGHTS, lambda tensors: tensors.pop(NAMES["registers"]))
        message = f"lacks tensors: `{NAMES['registers']}`"
    else:
        edit_weights(tokenizer / WEIGHTS, lambda tensors: tensors[NAMES["registers"]].fill_(float("nan")))
        message = f"`{NAMES['registers']}` in .* holds values that are not finite"
    before = sorted(place.rglob("*"))
    with pytest.raises(ValueError, match=message):
        FlexTokPipeline.from_original(str(tokenizer))
    assert sorted(place.rglob("*")) == before


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
    "oblong patches": (set_in("encoder", "enc_patch_emb", patch_sizes=[2, 1]), "patches of 2 x 1"),
    "an oblong grid": (set_in("encoder", "enc_posemb_module", max_sizes=[4, 2]), "a grid of 4 x 2"),
    "a single null token": (
        set_in("decoder", "dec_latent_dropout", replace_with_single_token=True),
        "replace_with_single",
    ),
    "a missing width": (pop_in("encoder", "enc_transformer", "dim"), "dim.* is missing"),
    "a width in words": (set_in("encoder", "enc_transformer", dim="wide"), "dim.* must be a whole number, got 'wide'"),
    "a width of true": (set_in("encoder", "enc_transformer", dim=True), "dim.* must be a whole number, got True"),
    "a negative depth": (set_in("encoder", "enc_transformer", depth=-1), "depth.* must lie between 1"),
    "heads that do not fit": (set_in("encoder", "enc_transformer", head_dim=7), "no multiple of `head_dim` 7"),
    "noise levels in words": (
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


def test_a_grid_with_positions_of_its_tokens_is_refused(place):
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
    "attention to what follows": (self_attention(is_causal=False), "is_causal.* is False"),
    "a scale that is not honored": (
        self_attention(_target_=f"{ATTENTION}.HFAttention", qk_scale=0.1),
        "qk_scale.* is 0.1",
    ),
    "an unclear norm": (self_attention(qk_norm=True), "qk_norm.* must be a group of settings, got True"),
    "heads that do not fit": (self_attention(num_heads=5), "num_heads.* is 5, which does not divide the width 32"),
    "unlike heads": (part("ar_image_model.trunk.cross_attn_target", num_heads=8), "num_heads.* must be 4"),
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
    "biases only said": (trunk(use_bias=True), "use_bias.* says biases, but its tensors have none"),
    "an interpolation": (trunk(embed_dim="${width}"), r"embed_dim.* must be a whole number, got '\${width}'"),
    "another activation": (part("text_encoder.mlp.act_layer", _target_="torch.nn.Tanh"), "is 'torch.nn.Tanh'"),
    "another text encoder": (part("text_encoder.t5_embedder", _target_="x.Clip"), "is 'x.Clip', which"),
    "an unknown part": (lambda models: models.update(extra={"_target_": "x.Y"}), "models.extra`"),
    "a length in words": (part("text_encoder.t5_embedder", encoder_seqlen_max="long"), "must be a whole number"),
}


@pytest.mark.parametrize("name", UNSUPPORTED_PRIORS)
def test_an_unsupported_prior_is_refused_by_name(place, text_prior, name):
    change, message = UNSUPPORTED_PRIORS[name]
    edit_yaml(text_prior / "config.yaml", change)
    refuse(place, message, prior=text_prior)


def test_biases_that_the_configuration_denies_are_refused(place, prior):
    bias = {f"models.ar_image_model.trunk.blocks.{i}.mlp.fc1.bias": torch.ones(48) for i in range(2)}
    edit_weights(prior / WEIGHTS, lambda tensors: tensors.update(bias))
    refuse(place, "use_bias` of .* says no biases, but its tensors have them in mlp.fc1", prior=prior)


def test_a_bias_that_a_single_block_lacks_is_named(place):
    folder, _, _ = write_prior(place / "prior", classes=5, use_bias=True)
    name = "models.ar_image_model.trunk.blocks.1.mlp.fc2.bias"
    edit_weights(folder / WEIGHTS, lambda tensors: tensors.pop(name))
    refuse(place, f"lacks tensors: `{name}`", prior=folder)


def test_settings_that_a_user_vouches_for_are_read_over(place, tokenizer, text_prior):
    edit_json(tokenizer / "config.json", set_in("encoder", "enc_transformer", compile_mode="max"))
    edit_yaml(text_prior / "config.yaml", trunk(drop_path=0.1))
    names = ["encoder.module_dict.enc_transformer.compile_mode"]
    refuse(place, "If you are sure .* name them in `ignore`", tokenizer, text_prior)
    names.append("model.meta_model.models.ar_image_model.trunk.drop_path")
    convert_checkpoint(place / "ours", str(tokenizer), str(text_prior), ignore=names)
    assert (place / "ours" / "model_index.json").is_file()


# Things mixed up


def test_one_kind_of_checkpoint_taken_for_another_is_noticed(place, tokenizer, prior):
    refuse(place, "has no `config.json` .* It looks like a prior: pass it as `prior`", prior)
    refuse(place, "has no `config.yaml`.* It looks like a tokenizer: pass it as `tokenizer`", prior=tokenizer)
    refuse(place, "Name a tokenizer, a prior, or both")


def test_a_converted_checkpoint_is_not_converted_again(place, tokenizer):
    convert_checkpoint(place / "mine", str(tokenizer))
    refuse(place, "is a pipeline of this package already", place / "mine")


def test_a_prior_of_other_tokens_is_refused(place, tokenizer):
    prior, _, _ = write_prior(place / "prior", classes=5, codes=16)
    refuse(place, "writes 6 tokens of 16 codes, but the tokenizer has 6 of 15", tokenizer, prior)


def test_a_revision_of_something_on_this_machine_is_refused(place, tokenizer, prior):
    refuse(place, "is on this machine and has no revisions", tokenizer, revision="main")
    refuse(place, "is on this machine and has no revisions", tokenizer, prior, prior_revision="main")


# The folder that is written


def test_a_folder_that_is_in_use_is_left_alone(place, tokenizer):
    (place / "ours").mkdir()
    (place / "ours" / "precious.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists and is not empty"):
        convert_checkpoint(place / "ours", str(tokenizer))
    (place / "file").write_text("mine")
    with pytest.raises(ValueError, match="is a file"):
        convert_checkpoint(place / "file", str(tokenizer))
    with pytest.raises(ValueError, match="does not exist"):
        convert_checkpoint(place / "missing" / "ours", str(tokenizer))
    assert (place / "ours" / "precious.txt").read_text() == (place / "file").read_text() == "mine"


def test_an_empty_folder_is_filled(place, tokenizer):
    (place / "ours").mkdir()
    convert_checkpoint(place / "ours", str(tokenizer))
    assert (place / "ours" / "model_index.json").is_file()
    assert sorted(path.name for path in place.iterdir()) == ["ours", "tokenizer"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, SystemExit])
def test_an_interrupted_conversion_leaves_nothing(place, error):
    with pytest.raises(error), new_folder(place / "ours") as folder:
        (folder / "half.bin").write_text("half")
        raise error
    assert list(place.iterdir()) == []


def test_a_full_disk_is_noticed_before_anything_is_written(place, tokenizer, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(OSError, match="0.0 GB of free space, and 0.0 GB are needed"):
        convert_checkpoint(place / "ours", str(tokenizer))
    assert sorted(path.name for path in place.iterdir()) == ["tokenizer"]


def test_new_folders_can_be_read_by_whoever_can_read_other_new_folders(place, tokenizer):
    convert_checkpoint(place / "ours", str(tokenizer))
    (place / "other").mkdir()
    assert (place / "ours").stat().st_mode == (place / "other").stat().st_mode


def test_a_text_encoder_is_saved_with_the_pipeline(place, tokenizer, text_prior):
    convert_checkpoint(place / "ours", str(tokenizer), str(text_prior))
    pipe = FlexTokPipeline.from_pretrained(place / "ours")
    expected = T5EncoderModel.from_pretrained(T5_FOLDER)
    assert all(pipe.text_encoder.state_dict()[name].equal(one) for name, one in expected.state_dict().items())
    assert pipe.tokenizer.model_max_length == 16
