"""Malicious or damaged weights of checkpoints: a clear error, no code is run, no file is left behind."""

import os
import pickle

import pytest
import torch
from official_checkpoints import write_prior, write_tokenizer
from refusals import (
    EVIL,
    NORM,
    REGISTERS,
    T5_FOLDER,
    WEIGHTS,
    edit_json,
    edit_weights,
    read_weights,
    refuse,
    write_header,
)
from safetensors.torch import save_file
from transformers import BertConfig, T5Config

from flextok_hf import FlexTokPipeline
from flextok_hf.conversion.convert import convert_checkpoint


# Weights


class Bomb:
    def __reduce__(self):
        return os.system, ("touch evil",)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt"])
def test_pickled_weights_are_never_opened(place, tokenizer, name):
    (tokenizer / WEIGHTS).unlink()
    (tokenizer / name).write_bytes(pickle.dumps(Bomb()))
    refuse(place, f"has no `{WEIGHTS}`.* Pickle files can run code and are not read: {name}", tokenizer)
    refuse(place, f"{name}' is a pickle file, which can run code", tokenizer / name)


def test_pickled_weights_under_another_name_are_never_opened(place, tokenizer):
    (tokenizer / WEIGHTS).write_bytes(pickle.dumps(Bomb()))
    refuse(place, "is damaged, truncated or not a safetensors file", tokenizer)


@pytest.mark.parametrize("share", [0.0, 0.00001, 0.01, 0.1, 0.5, 0.9999])
def test_a_truncated_file_is_refused(place, tokenizer, prior, share):
    for folder, arguments in ((tokenizer, {"tokenizer": tokenizer}), (prior, {"prior": prior})):
        content = (folder / WEIGHTS).read_bytes()
        (folder / WEIGHTS).write_bytes(content[: int(len(content) * share)])
        refuse(place, "is damaged", **arguments)


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
def test_an_invalid_header_is_refused(place, tokenizer, header, data, length):
    write_header(tokenizer / WEIGHTS, header, data, length)
    refuse(place, "is damaged", tokenizer)


def test_huge_metadata_is_not_read(place, tokenizer_file):
    write_header(tokenizer_file, {"__metadata__": {"encoder": "x" * 100 * 2**20}, "a": ENTRY}, bytes(8))
    refuse(
        place,
        r"has a header of [\d,]+ bytes, but no checkpoint needs more than 8,388,608. It was not read",
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
        name = REGISTERS if REGISTERS in tensors else NORM
        tensors[name].view(-1)[-1] = value

    for folder, name in ((tokenizer, REGISTERS), (prior, NORM)):
        edit_weights(folder / WEIGHTS, change)
        arguments = {"tokenizer": folder} if folder == tokenizer else {"prior": folder}
        refuse(place, f"`{name}` in .* holds values that are not finite", **arguments)


def test_an_invalid_last_tensor_discards_everything_written_before_it(place, tokenizer):
    name = list(read_weights(tokenizer / WEIGHTS)[0])[-1]
    edit_weights(tokenizer / WEIGHTS, lambda tensors: tensors[name].fill_(float("nan")))
    refuse(place, f"`{name}` in .* holds values that are not finite", tokenizer)


def test_values_too_large_for_the_requested_precision_are_refused(place, tokenizer):
    edit_weights(tokenizer / WEIGHTS, lambda tensors: tensors[REGISTERS].view(-1)[:1].fill_(1e6))
    refuse(
        place,
        f"`{REGISTERS}` in .* too large for torch.float16. Choose bfloat16",
        tokenizer,
        dtype=torch.float16,
    )


def test_missing_tensors_are_named(place, tokenizer, prior):
    edit_weights(tokenizer / WEIGHTS, lambda tensors: tensors.pop(REGISTERS))
    refuse(place, f"lacks tensors: `{REGISTERS}`", tokenizer)
    edit_weights(prior / WEIGHTS, lambda tensors: tensors.pop(NORM))
    refuse(place, f"lacks tensors: `{NORM}`", prior=prior)


@pytest.fixture(params=["registers", "grid", "text", "classes"])
def small(request, place):
    """A small checkpoint: its folder, the arguments to convert it, and the names of tensors of every kind."""
    if request.param in ("registers", "grid"):
        changes = {} if request.param == "registers" else {"registers": 0}
        folder, tensors, _ = write_tokenizer(place / "small", encoder_depth=1, decoder_depth=1, **changes)
        return folder, {"tokenizer": str(folder)}, [name for name in tensors if "vae" not in name or "conv_in" in name]
    norm = {"_target_": "torch.nn.LayerNorm", "eps": 1e-5}
    changes = {"qk_norm": norm, "use_bias": True, "qkv_bias": True, "head_norm": True, "norm": "torch.nn.LayerNorm"}
    changes |= {"text_dim": 12} if request.param == "text" else {"classes": 5, "attention": "HFAttention"}
    folder, tensors, _ = write_prior(place / "small", depth=2, **changes)
    return folder, {"prior": str(folder)}, [name for name in tensors if "blocks.0." not in name]


def test_each_missing_tensor_is_named(place, small):
    folder, arguments, names = small
    tensors, metadata = read_weights(folder / WEIGHTS)
    for name in names:
        save_file({other: tensors[other] for other in tensors if other != name}, folder / WEIGHTS, metadata)
        # without the only bias of its kind, the error is about the configuration
        with pytest.raises(ValueError, match=f"`{name}`.* is missing|lacks tensors: .*`{name}`|bias` .* says biases"):
            convert_checkpoint(place / "ours", **arguments)


def test_each_wrong_shape_is_named(place, small):
    folder, arguments, names = small
    tensors, metadata = read_weights(folder / WEIGHTS)
    for index, name in enumerate(names):
        changed = tensors[name][None] if index % 2 else tensors[name][..., :-1].contiguous()
        save_file({**tensors, name: changed}, folder / WEIGHTS, metadata)
        # the width of the feed-forward layers is read from one of them, so the others do not match
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


def test_training_only_tensors_are_ignored_and_reported(place, tokenizer):
    training_only = {"decoder.module_dict.dec_repa_head.weight": torch.ones(2), "vae.logvar": torch.ones(())}
    edit_weights(tokenizer / WEIGHTS, lambda tensors: tensors.update(training_only))
    notes = convert_checkpoint(place / "ours", str(tokenizer))
    assert len(notes) == 1 and all(name in notes[0] for name in training_only)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.uint8])
def test_other_data_types_are_refused(place, tokenizer, dtype):
    def change(tensors):
        tensors[REGISTERS] = tensors[REGISTERS].to(dtype)

    edit_weights(tokenizer / WEIGHTS, change)
    refuse(place, f"holds `{REGISTERS}` as .*, but weights must be F32, BF16, F16", tokenizer)


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
    refuse(place, f"T5EncoderModel in .*text_encoder' lacks weights: {name}", tokenizer, text_prior)


def test_a_text_encoder_with_values_that_are_not_finite_is_refused(place, tokenizer, text_prior):
    name = "encoder.block.0.layer.0.SelfAttention.q.weight"
    edit_weights(text_prior / "text_encoder" / WEIGHTS, lambda tensors: tensors[name].fill_(float("nan")))
    refuse(place, f"the text encoder .* holds values that are not finite: `{name}`", tokenizer, text_prior)


def test_pickled_weights_of_a_text_encoder_are_never_opened(place, tokenizer, text_prior):
    (text_prior / "text_encoder" / WEIGHTS).unlink()
    (text_prior / "text_encoder" / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    refuse(place, WEIGHTS, tokenizer, text_prior)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.9999])
def test_a_truncated_text_encoder_is_refused(place, tokenizer, text_prior, share):
    path = text_prior / "text_encoder" / WEIGHTS
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    refuse(place, f"The checkpoint file .*text_encoder/{WEIGHTS}", tokenizer, text_prior)


@pytest.mark.parametrize("name", ["shared.weight", "encoder.block.0.layer.1.layer_norm.weight"])
def test_a_text_encoder_with_a_wrong_shape_is_refused(place, tokenizer, text_prior, name):
    edit_weights(text_prior / "text_encoder" / WEIGHTS, lambda tensors: tensors.update({name: tensors[name][1:]}))
    refuse(place, f"text_encoder' hold `{name}` of shape .* but its config.json asks for", tokenizer, text_prior)


@pytest.mark.parametrize("changes", [
    {"num_layers": 10**9},
    {"vocab_size": 10**9},
    {"d_ff": 2**23},
    {"num_heads": 0},
    {"d_kv": "x"},
    {"dense_act_fn": "nothing"},
    {"dense_act_fn": []},
    {"layer_norm_epsilon": []},
    {"model_type": 5},
    {"dtype": "os"},
], ids=str)  # fmt: skip
def test_a_text_encoder_with_invalid_settings_is_refused(place, tokenizer, text_prior, changes):
    edit_json(text_prior / "text_encoder" / "config.json", lambda config: config.update(changes))
    refuse(place, "text_encoder.*config.json|the text encoder .* is of type", tokenizer, text_prior)


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"\xff\xfe", b'{"model": 1}', b"[" * 90_000])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json"])
def test_a_text_encoder_with_a_broken_file_is_refused(place, tokenizer, text_prior, name, content):
    if name == "tokenizer_config.json" and content in (b"{}", b'{"model": 1}'):
        content = b'{"model_max_length": "x", "extra_special_tokens": 7}'
    (text_prior / "text_encoder" / name).write_bytes(content)
    refuse(place, "text_encoder", tokenizer, text_prior)


@pytest.mark.parametrize("name", [WEIGHTS, "config.json", "tokenizer.json"])
def test_a_text_encoder_is_never_read_from_a_pipe(place, tokenizer, text_prior, name):
    (text_prior / "text_encoder" / name).unlink()
    os.mkfifo(text_prior / "text_encoder" / name)
    refuse(place, f"text_encoder/{name}' is a device, pipe or socket", tokenizer, text_prior)


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
    refuse(place, "does not take text. Leave out `text_encoder`", tokenizer, prior, text_encoder=str(T5_FOLDER))


# Loading without conversion


@pytest.mark.parametrize("name", ["code", "not finite", "missing"])
def test_loading_without_conversion_refuses_the_same(place, tokenizer, name):
    if name == "code":
        edit_json(tokenizer / "config.json", lambda config: config["vae"].update(EVIL))
        message = "`vae._target_` of .* is 'os.system'"
    elif name == "missing":
        edit_weights(tokenizer / WEIGHTS, lambda tensors: tensors.pop(REGISTERS))
        message = f"lacks tensors: `{REGISTERS}`"
    else:
        edit_weights(tokenizer / WEIGHTS, lambda tensors: tensors[REGISTERS].fill_(float("nan")))
        message = f"`{REGISTERS}` in .* holds values that are not finite"
    before = sorted(place.rglob("*"))
    with pytest.raises(ValueError, match=message):
        FlexTokPipeline.from_original(str(tokenizer))
    assert sorted(place.rglob("*")) == before
