"""Saved folders of strangers: incomplete, inconsistent and hostile files are refused by name, at once."""

import json
import os
import resource
import shutil
import time

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from official_checkpoints import TINY_VAE
from safetensors.torch import load_file, save_file
from tiny_models import make_decoder, make_encoder, make_prior

from flextok_hf import FlexTokPipeline
from flextok_hf.models.modeling_decoder import FlexTokFlowDecoder
from flextok_hf.models.modeling_encoder import FlexTokEncoder


# Of each component: a weight to take away
WEIGHTS = {
    "encoder": "register_tokens",
    "decoder": "mask_token",
    "prior": "norm.weight",
    "text_encoder": "encoder.block.0.layer.0.SelfAttention.q.weight",
    "vae": "decoder.conv_in.bias",
}
FILES = {part: f"{'diffusion_pytorch_' * (part in ('decoder', 'vae'))}model.safetensors" for part in WEIGHTS}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_pipeline):
    """A saved pipeline with all components."""
    changes = {"in_channels": 4, "patch_size": 2}
    pipe = FlexTokPipeline(
        make_encoder(**changes),
        make_decoder(**changes),
        FlowMatchEulerDiscreteScheduler(),
        AutoencoderKL(**TINY_VAE),
        make_prior(text_hidden_size=32),
        tiny_pipeline.text_encoder,
        tiny_pipeline.tokenizer,
    )
    folder = tmp_path_factory.mktemp("saved") / "pipe"
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "pipe")
    return tmp_path / "pipe"


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(path, change):
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def refuse(folder, *words, **options):
    """Check that loading fails within seconds, without much memory, and with a message that has these words."""
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises((ValueError, OSError)) as caught:
        FlexTokPipeline.from_pretrained(folder, **options)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert time.monotonic() - start < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500 * 1024
    return caught.value


def shard(path, num_shards=2):
    """Split a weight file into shards with an index; returns the index and the names of the shards."""
    weights, stem = load_file(path), path.name.removesuffix(".safetensors")
    names, places = sorted(weights), {}
    for number in range(num_shards):
        part = {name: weights[name] for name in names[number::num_shards]}
        shard_name = f"{stem}-{number + 1:05d}-of-{num_shards:05d}.safetensors"
        save_file(part, path.with_name(shard_name), metadata={"format": "pt"})
        places.update(dict.fromkeys(part, shard_name))
    path.unlink()
    index = path.with_name(f"{path.name}.index.json")
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return index, places


# Incomplete components


@pytest.mark.parametrize("part", FILES)
def test_a_missing_weight_of_any_component_is_named(folder, part):
    edit_weights(folder / part / FILES[part], lambda weights: weights.pop(WEIGHTS[part]))
    refuse(folder, part, WEIGHTS[part], "lacks weights")


OPTIONS = [{"dtype": torch.bfloat16}, {"low_cpu_mem_usage": False}, {"prior": None}, {"variant": "fp16"}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_a_missing_weight_is_named_whatever_the_options(folder, part, options):
    path = folder / part / FILES[part]
    edit_weights(path, lambda weights: weights.pop(WEIGHTS[part]))
    if "variant" in options:
        path.rename(path.with_name(path.name.replace(".safetensors", ".fp16.safetensors")))
    refuse(folder, part, WEIGHTS[part], "lacks weights", **options)


def test_a_missing_weight_is_named_beside_components_that_were_passed(folder):
    edit_weights(folder / "vae" / FILES["vae"], lambda weights: weights.pop(WEIGHTS["vae"]))
    pipe_parts = {"decoder": make_decoder(in_channels=4, patch_size=2), "prior": make_prior(text_hidden_size=32)}
    refuse(folder, "vae", WEIGHTS["vae"], **pipe_parts)
    loaded = FlexTokPipeline.from_pretrained(folder, vae=AutoencoderKL(**TINY_VAE), **pipe_parts)
    assert loaded.decoder is pipe_parts["decoder"]


def test_a_passed_component_without_values_is_refused(folder):
    with torch.device("meta"):
        vae = AutoencoderKL(**TINY_VAE)
    refuse(folder, "vae", "has no values", vae=vae)


@pytest.mark.parametrize("part", FILES)
def test_a_weight_that_its_shard_lacks_is_named(folder, part):
    _, places = shard(folder / part / FILES[part])
    FlexTokPipeline.from_pretrained(folder)
    shard_name = places[WEIGHTS[part]]
    edit_weights(folder / part / shard_name, lambda weights: weights.pop(WEIGHTS[part]))
    refuse(folder, part, shard_name, WEIGHTS[part])


def test_tied_weights_and_other_names_are_no_false_alarm(folder, tmp_path):
    path = folder / "text_encoder" / FILES["text_encoder"]
    assert "encoder.embed_tokens.weight" not in load_file(path) and "shared.weight" in load_file(path)
    # A name of an old release, which Diffusers renames; and an unrelated tensor
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(weights):
        for name in [name for name in weights if ".attentions." in name]:
            for new, old in names.items():
                if f".{new}." in name:
                    weights[name.replace(new, old)] = weights.pop(name)

    edit_weights(folder / "vae" / FILES["vae"], rename)
    edit_weights(path, lambda weights: weights.update(unrelated=torch.zeros(3)))
    assert FlexTokPipeline.from_pretrained(folder).vae.encoder.mid_block.attentions[0].to_q.weight.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8])
@pytest.mark.parametrize("part", ["encoder", "decoder", "vae", "text_encoder"])
def test_weights_that_are_no_floating_point_numbers_are_refused(folder, part, dtype):
    name = WEIGHTS[part]
    edit_weights(folder / part / FILES[part], lambda weights: weights.update({name: weights[name].to(dtype)}))
    refuse(folder, part, name, "floating point")


# Files of strangers


@pytest.mark.parametrize("part", FILES)
def test_pickle_files_of_any_component_are_read_on_request_only(folder, part):
    for name, file_name in FILES.items():
        path = folder / name / file_name
        weights = load_file(path)
        stem = file_name.removesuffix(".safetensors").replace("model", "pytorch_model", not file_name.startswith("d"))
        torch.save(weights, path.with_name(f"{stem}.bin"))
        if name == part:
            path.unlink()
    for choice in ({}, {"use_safetensors": True}, {"use_safetensors": None}):
        refuse(folder, part, "use_safetensors=False", **choice)
    assert FlexTokPipeline.from_pretrained(folder, use_safetensors=False).decoder.mask_token.isfinite().all()


@pytest.mark.parametrize("part", FILES)
@pytest.mark.parametrize("name", ["../{}", "/etc/{}", "sub/{}", "..\\{}", "..", "weights.bin", 7])
def test_an_index_may_only_name_weight_files_in_its_folder(folder, part, name):
    index, places = shard(folder / part / FILES[part], num_shards=1)
    shard_name = next(iter(places.values()))
    shutil.copyfile(folder / part / shard_name, folder / shard_name)
    wrong = name.format(shard_name) if isinstance(name, str) else name
    edit_json(index, weight_map=dict.fromkeys(places, wrong))
    refuse(folder, part, index.name, str(wrong).replace("\\", "\\\\"))


@pytest.mark.parametrize("content", ["{}", "[]", '{"weight_map": {}}', '{"metadata": {}, "weight_map": [1]}', "{", ""])
def test_a_broken_index_is_named(folder, content):
    index, _ = shard(folder / "decoder" / FILES["decoder"])
    index.write_text(content)
    refuse(folder, "decoder", index.name)


@pytest.mark.parametrize("part, name", [*FILES.items(), ("encoder", "config.json"), ("tokenizer", "tokenizer.json")])
@pytest.mark.parametrize("kind", ["pipe", "/dev/zero", "/proc/self/mem"])
def test_only_regular_files_are_opened(folder, part, name, kind):
    path = folder / part / name
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(kind)
    refuse(folder, part)


def test_links_to_regular_files_are_followed(folder, tmp_path):
    for number, path in enumerate([*folder.rglob("*.safetensors"), *folder.rglob("*.json")]):
        blob = tmp_path / f"blob-{number}"
        shutil.move(path, blob)
        path.symlink_to(blob)
    assert FlexTokPipeline.from_pretrained(folder).vae is not None


@pytest.mark.parametrize("part", FILES)
def test_a_huge_sparse_file_is_not_read(folder, part):
    path = folder / part / FILES[part]
    os.truncate(path, 20 * 2**30)
    refuse(folder, str(path), "21,474,836,480 bytes")


@pytest.mark.parametrize("name", ["config.json", "../model_index.json", "../tokenizer/tokenizer.json"])
def test_a_huge_text_file_is_not_read(folder, name):
    os.truncate(folder / "encoder" / name, 20 * 2**30)
    refuse(folder, name.rpartition("/")[2])


@pytest.mark.parametrize("part, name, value", [
    ("encoder", "num_registers", 2 * 10**7),
    ("encoder", "num_hidden_layers", 10**9),
    ("encoder", "hidden_size", 2**20),
    ("decoder", "num_registers", 2 * 10**7),
    ("decoder", "num_layers", 10**9),
    ("decoder", "grid_size", 10**6),
    ("prior", "hidden_size", 10**6),
    ("prior", "codebook_size", 10**30),
    ("prior", "num_hidden_layers", 10**6),
    ("text_encoder", "d_ff", 10**7),
    ("text_encoder", "vocab_size", 10**7),
    ("text_encoder", "num_layers", 10**8),
    ("vae", "layers_per_block", 10**8),
    ("vae", "block_out_channels", [2**23, 2**23]),
    ("vae", "latent_channels", 10**7),
])  # fmt: skip
def test_sizes_that_the_weights_do_not_have_cost_no_memory(folder, part, name, value):
    edit_json(folder / part / "config.json", **{name: value})
    refuse(folder, part)


@pytest.mark.parametrize("value", [10**9, 10**30])
def test_sizes_of_the_scheduler_cost_no_memory(folder, value):
    edit_json(folder / "scheduler" / "scheduler_config.json", num_train_timesteps=value)
    refuse(folder, "scheduler_config.json", "num_train_timesteps")


# Errors in words


@pytest.mark.parametrize("part, name, value", [
    ("vae", "norm_num_groups", 0.5),
    ("vae", "norm_num_groups", 3),
    ("vae", "block_out_channels", [4, 4, 4]),
    ("vae", "up_block_types", []),
    ("vae", "act_fn", ["silu"]),
    ("vae", "scaling_factor", "1"),
    ("vae", "use_quant_conv", 1),
    ("decoder", "head_dim", {}),
    ("decoder", "num_registers", None),
    ("decoder", "token_layout", [None]),
    ("encoder", "hidden_size", "x"),
    ("encoder", "dtype", "os"),
    ("prior", "projector_activation", ["gelu"]),
    ("prior", "norm_type", {}),
    ("text_encoder", "num_heads", 0.5),
    ("text_encoder", "d_kv", None),
    ("text_encoder", "model_type", []),
])  # fmt: skip
def test_a_setting_that_is_not_valid_is_named_with_its_component(folder, part, name, value):
    edit_json(folder / part / "config.json", **{name: value})
    refuse(folder, part, name)


@pytest.mark.parametrize("name, value", [
    ("decoder", "text"),
    ("decoder", [["a"], "b"]),
    ("decoder", ["os", "system"]),
    ("decoder", ["transformers", "T5EncoderModel"]),
    ("vae", ["antigravity", "AutoencoderKL"]),
    ("text_encoder", ["diffusers", "AutoencoderKL"]),
    ("tokenizer", ["transformers", "pipeline"]),
    ("scheduler", ["diffusers", "FlexTokFlowDecoder"]),
    ("default_guidance_scale", "7"),
    ("default_prior_guidance_scale", []),
])  # fmt: skip
def test_an_entry_of_the_index_that_is_not_valid_is_named(folder, name, value):
    edit_json(folder / "model_index.json", **{name: value})
    refuse(folder, "model_index.json", name)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"7", b"\xff\xfe", b'{"a": NaN}', b'{"a":' * 60_000])
@pytest.mark.parametrize(
    "name", ["model_index.json", "prior/config.json", "vae/config.json", "tokenizer/tokenizer_config.json"]
)
def test_settings_that_cannot_be_read_are_named(folder, name, content):
    (folder / name).write_bytes(content)
    refuse(folder, name, "JSON" if content not in (b"[]", b"7") else "group of settings")


@pytest.mark.parametrize("content", [b"{}", b"", b'{"model": 1}', b"\xff"])
def test_a_broken_text_tokenizer_is_named(folder, content):
    (folder / "tokenizer" / "tokenizer.json").write_bytes(content)
    refuse(folder, "tokenizer")


@pytest.mark.parametrize("value", ["nothing", "", "os.system"])
def test_an_unknown_activation_of_a_text_encoder_is_refused_with_its_file(folder, value):
    edit_json(folder / "text_encoder" / "config.json", dense_act_fn=value)
    refuse(folder, "text_encoder", "config.json")


def test_a_library_error_keeps_its_cause(folder):
    (folder / "tokenizer" / "tokenizer.json").write_bytes(b"{}")
    assert refuse(folder, "`tokenizer` of the pipeline").__cause__ is not None


# Models on their own


@pytest.mark.parametrize("kind, part", [(FlexTokEncoder, "encoder"), (FlexTokFlowDecoder, "decoder")])
def test_a_model_checks_its_own_folder(folder, kind, part):
    assert isinstance(kind.from_pretrained(folder, subfolder=part), kind)
    edit_json(folder / part / "config.json", num_registers=2 * 10**7)
    for source, options in ((folder / part, {}), (folder, {"subfolder": part})):
        with pytest.raises(ValueError, match="num_registers.*config.json"):
            kind.from_pretrained(source, **options)


@pytest.mark.parametrize("name", ["nowhere/at/all", "./nowhere", "/nowhere"])
def test_a_model_that_does_not_exist_is_named(name):
    for kind in (FlexTokEncoder, FlexTokFlowDecoder):
        with pytest.raises(OSError, match=f"{name}.*neither a folder nor a Hub id"):
            kind.from_pretrained(name)


@pytest.mark.parametrize("name", [None, 5, b"x"])
def test_a_pipeline_needs_a_name(name):
    with pytest.raises(TypeError, match="pretrained_model_name_or_path"):
        FlexTokPipeline.from_pretrained(name)
