"""Adapters (LoRA) of a pipeline: loaded, weighted, fused and saved as in Diffusers, and refused if they do not fit."""

import functools
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import make_decoder, make_prior, make_text_pipeline

from flextok_hf import FlexTokPipeline


peft = pytest.importorskip("peft")
TARGETS = {
    "encoder": ["to_q", "down_proj"],
    "decoder": ["to_v", "gate_proj", "modulation"],
    "prior": ["qkv_proj", "gate_up_proj"],
}
FILE = "pytorch_lora_weights.safetensors"
IMAGES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def adapted(seed=0, rank=2, alpha=3, parts=tuple(TARGETS)):
    """Return a pipeline with a random adapter that PEFT put in."""
    pipe = make_text_pipeline()
    torch.manual_seed(seed)
    for part in parts:
        config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=TARGETS[part], init_lora_weights=False)
        peft.inject_adapter_in_model(config, getattr(pipe, part), "default")
    return pipe


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    adapted(0).save_lora_weights(folder / "a")
    adapted(1, rank=1).save_lora_weights(folder / "b")
    return folder


@pytest.fixture
def saved(originals, tmp_path):
    shutil.copytree(originals, tmp_path / "saved")
    return tmp_path / "saved"


@functools.cache
def plain():
    return outputs(make_text_pipeline())


def outputs(pipe):
    """Return features, token ids of a prompt, log-probabilities and an image."""
    features = pipe.encoder(IMAGES * 2 - 1).features
    ids = pipe.tokenize(IMAGES)
    states, mask = pipe.encode_prompt(["a red circle"] * 2)
    logits = pipe.prior(pipe.prior.prepend_bos(torch.tensor([[1, 2, 3], [4, 5, 6]])), states, mask).logits
    codes = pipe.encoder.quantizer.ids_to_codes(torch.tensor([[1, 2, 3]]))
    velocity = pipe.decoder(IMAGES[:1], torch.tensor([0.5]), codes).velocity
    drawn = pipe("a red circle", generator=torch.Generator().manual_seed(0), num_inference_steps=2, output_type="pt")
    return [each.detach() for each in (features, ids, logits, velocity, drawn.images, drawn.token_ids)]


def assert_equal(pipe, other=None):
    """Compare two pipelines, or one with that without adapters, bit for bit."""
    expected = plain() if other is None else outputs(other)
    assert all(one.equal(two) for one, two in zip(outputs(pipe), expected, strict=True))


def assert_close(pipe, other, tolerance=1e-5):
    for index in (0, 2, 3):  # those that are continuous
        torch.testing.assert_close(outputs(pipe)[index], outputs(other)[index], atol=tolerance, rtol=tolerance)


def loaded(folder, *names):
    pipe = make_text_pipeline()
    for name in names:
        pipe.load_lora_weights(folder / name, adapter_name=name)
    return pipe


def test_an_adapter_is_saved_and_loaded_with_the_same_results(saved):
    pipe = loaded(saved, "a")
    assert_equal(pipe, adapted(0))
    assert not outputs(pipe)[0].equal(plain()[0])
    pipe.save_lora_weights(saved / "again")
    before, after = (load_file(saved / name / FILE) for name in ("a", "again"))
    assert before.keys() == after.keys() and all(before[name].equal(after[name]) for name in before)


TURN_OFF = {
    "weight 0": lambda pipe: pipe.set_adapters("a", 0.0),
    "disabled": lambda pipe: pipe.disable_lora(),
    "deleted": lambda pipe: pipe.delete_adapters("a"),
    "unloaded": lambda pipe: pipe.unload_lora_weights(),
    "fused and unfused": lambda pipe: (pipe.fuse_lora(), pipe.unfuse_lora(), pipe.disable_lora()),
}


@pytest.mark.parametrize("turn_off", TURN_OFF.values(), ids=TURN_OFF)
def test_an_adapter_that_is_off_leaves_the_same_layers_and_outputs_bit_for_bit(saved, turn_off):
    pipe = make_text_pipeline()
    layers = {name: id(layer) for name, layer in pipe.decoder.named_modules()}
    trainable = [name for name, parameter in pipe.decoder.named_parameters() if parameter.requires_grad]
    pipe.load_lora_weights(saved / "a", adapter_name="a")
    turn_off(pipe)
    assert_equal(pipe)
    assert {name: id(layer) for name, layer in pipe.decoder.named_modules()} == layers
    assert [name for name, parameter in pipe.decoder.named_parameters() if parameter.requires_grad] == trainable


def test_an_adapter_is_turned_off_and_on_again(saved):
    pipe = loaded(saved, "a")
    pipe.disable_lora()
    assert pipe.get_active_adapters() == []
    pipe.enable_lora()
    assert pipe.get_active_adapters() == ["a"]
    assert_equal(pipe, loaded(saved, "a"))


@torch.no_grad()
def test_weights_of_several_adapters_add_up(saved):
    pipe = loaded(saved, "a", "b")
    assert pipe.get_active_adapters() == ["b"]  # the newest, as in Diffusers
    assert pipe.get_list_adapters() == dict.fromkeys(TARGETS, ["a", "b"])
    pipe.set_adapters(["a", "b"], [0.5, 2.0])
    layer, x = pipe.prior.blocks[0].self_attention.qkv_proj, torch.randn(3, 32)
    expected = layer.base_layer(x)
    for name, scale in [("a", 0.5 * 3 / 2), ("b", 2.0 * 3 / 1)]:
        tensors = load_file(saved / name / FILE)
        down, up = (tensors[f"prior.blocks.0.self_attention.qkv_proj.lora_{m}.weight"] for m in "AB")
        expected = expected + scale * x @ down.T @ up.T
    torch.testing.assert_close(layer(x), expected)
    pipe.set_adapters(["a", "b"], [1.0, 0.0])
    assert_equal(pipe, loaded(saved, "a"))


def test_fused_adapters_give_the_same_and_leave_plain_layers(saved):
    pipe = loaded(saved, "a", "b")
    pipe.set_adapters(["a", "b"], [0.7, -0.4])
    unfused = loaded(saved, "a", "b")
    unfused.set_adapters(["a", "b"], [0.7, -0.4])
    pipe.fuse_lora()
    assert type(pipe.decoder.transformer_blocks[0].modulation) is torch.nn.Linear
    assert_close(pipe, unfused)
    pipe.unfuse_lora()
    assert_equal(pipe, unfused)


def test_fused_weights_stay_when_adapters_are_unloaded(saved, tmp_path):
    pipe = loaded(saved, "a")
    pipe.fuse_lora(lora_scale=0.5)
    expected = loaded(saved, "a")
    expected.set_adapters("a", 0.5)
    pipe.unload_lora_weights()
    assert_close(pipe, expected)
    pipe.save_pretrained(tmp_path / "whole")
    assert_equal(FlexTokPipeline.from_pretrained(tmp_path / "whole"), pipe)


def test_an_adapter_of_the_decoder_keeps_token_ids_and_says_so(saved):
    pipe = adapted(2, parts=["decoder"])
    assert pipe.tokenize(IMAGES).equal(make_text_pipeline().tokenize(IMAGES))
    pipe.save_lora_weights(saved / "decoder")
    assert "Token ids stay the same" in (saved / "decoder" / "README.md").read_text()
    assert "Token ids change" in (saved / "a" / "README.md").read_text()


@pytest.mark.parametrize("is_on", [True, False])
def test_a_pipeline_with_adapters_is_saved_and_loaded_whole(saved, tmp_path, is_on):
    pipe = loaded(saved, "a", "b")
    pipe.set_adapters(["a", "b"], [0.5, 0.25])
    if not is_on:
        pipe.disable_lora()
    pipe.save_pretrained(tmp_path / "whole")
    again = FlexTokPipeline.from_pretrained(tmp_path / "whole")
    again.set_progress_bar_config(disable=True)
    assert again.get_active_adapters() == pipe.get_active_adapters() == (["a", "b"] if is_on else [])
    assert_equal(again, pipe)
    again.unload_lora_weights()
    assert_equal(again)
    again.save_pretrained(tmp_path / "whole")  # in place of the one with adapters
    assert FlexTokPipeline.from_pretrained(tmp_path / "whole").get_list_adapters() == {}


def test_adapters_of_peft_are_saved_with_the_pipeline_during_training(tmp_path):
    pipe = adapted(0)
    layer = pipe.prior.blocks[0].mlp.gate_up_proj
    pipe.save_pretrained(tmp_path / "whole")
    assert pipe.prior.blocks[0].mlp.gate_up_proj is layer  # an optimizer may hold its weights
    assert_equal(FlexTokPipeline.from_pretrained(tmp_path / "whole"), adapted(0))


def test_diffusers_reads_the_part_of_the_decoder(saved):
    decoder = make_decoder()
    decoder.load_lora_adapter(saved / "a", prefix="decoder")
    codes = torch.zeros(1, 3, 2)
    arguments = (IMAGES[:1], torch.tensor([0.5]), codes)
    torch.testing.assert_close(decoder(*arguments).velocity, loaded(saved, "a").decoder(*arguments).velocity)


def test_adapters_move_with_the_models(saved):
    pipe = loaded(saved, "a").to(torch.bfloat16)
    for _ in range(2):
        assert pipe.detokenize(torch.tensor([[1, 2]]), 2, output_type="pt").images.isfinite().all()
        pipe.disable_lora()
        pipe.enable_lora()


# Bad input


def edit(folder, change_tensors=None, change_settings=None, change_facts=None):
    from safetensors import safe_open

    with safe_open(folder / FILE, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for key, change in [("lora_adapter_metadata", change_settings), ("flextok_adapter", change_facts)]:
        if change:
            group = json.loads(metadata[key])
            change(group)
            metadata[key] = json.dumps(group)
    if change_tensors:
        change_tensors(tensors)
    save_file(tensors, folder / FILE, metadata)


Q = "encoder.blocks.0.attention.to_q.lora_A.weight"
DAMAGES = {
    "other codebook": ({"change_facts": lambda f: f.update(codebook_size=64000)}, "`codebook_size` is 64000"),
    "other registers": ({"change_facts": lambda f: f.update(num_registers=256)}, "`num_registers` is 256"),
    "other width": (
        {"change_tensors": lambda t: t.update({Q: torch.zeros(2, 48)})},
        r"`encoder.blocks.0.attention.to_q` with matrices \(32, 2\) and \(2, 48\)",
    ),
    "other rank": ({"change_tensors": lambda t: t.update({Q: torch.zeros(3, 32)})}, "matrices"),
    "other layer": (
        {"change_tensors": lambda t: [t.update({k.replace("s.0.", "s.9."): t.pop(k)}) for k in list(t)]},
        "no such linear layer",
    ),
    "half a layer": ({"change_tensors": lambda t: t.pop(Q)}, "has only lora_B"),
    "not finite": ({"change_tensors": lambda t: t[Q].fill_(float("nan"))}, "finite"),
    "other part": ({"change_tensors": lambda t: t.update({"unet" + Q[7:]: t.pop(Q)})}, "adapts 'unet'"),
    "other tensor": ({"change_tensors": lambda t: t.update({"encoder.x.weight": t.pop(Q)})}, "not a LoRA weight"),
    "alpha": ({"change_settings": lambda s: s.update({"decoder.lora_alpha": float("inf")})}, "`lora_alpha`"),
    "kind": ({"change_settings": lambda s: s.update({"prior.peft_type": "LOHA"})}, "LOHA"),
    "more": ({"change_settings": lambda s: s.update({"prior.modules_to_save": ["head"]})}, "`modules_to_save`"),
    "no settings": ({"change_settings": lambda s: s.clear()}, "no settings of LoRA"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_file_that_does_not_fit_is_refused_and_changes_nothing(saved, damage):
    changes, message = damage
    edit(saved / "a", **changes)
    pipe = make_text_pipeline()
    with pytest.raises(ValueError, match=message):
        pipe.load_lora_weights(saved / "a")
    assert pipe.get_list_adapters() == {}
    assert not any(isinstance(layer, peft.tuners.lora.LoraLayer) for layer in pipe.decoder.modules())


def test_a_file_with_an_adapter_of_a_missing_part_is_refused(saved):
    pipe = FlexTokPipeline.from_pipe(make_text_pipeline(), prior=None)
    with pytest.raises(ValueError, match="adapts the `prior`, but this pipeline has none"):
        pipe.load_lora_weights(saved / "a")


def test_pickle_files_and_damaged_files_are_refused(saved):
    pipe = make_text_pipeline()
    torch.save({}, saved / "adapter.bin")
    with pytest.raises(ValueError, match="`weight_name` 'adapter.bin' is not a safetensors file"):
        pipe.load_lora_weights(saved, weight_name="adapter.bin")
    with pytest.raises(FileNotFoundError, match="Pickle files"):
        pipe.load_lora_weights(saved)
    (saved / "a" / FILE).write_bytes((saved / "a" / FILE).read_bytes()[:500])
    with pytest.raises(OSError, match="cannot be read"):
        pipe.load_lora_weights(saved / "a")


CALLS = {
    "unknown name": (lambda pipe: pipe.set_adapters("c"), r"`adapter_names` .*\['a'\]"),
    "no name": (lambda pipe: pipe.set_adapters([]), "`adapter_names`"),
    "too few weights": (lambda pipe: pipe.set_adapters(["a"], [1.0, 2.0]), "`adapter_weights`"),
    "no number": (lambda pipe: pipe.set_adapters("a", float("nan")), "`adapter_weights`"),
    "taken name": (lambda pipe: pipe.load_lora_weights("x", adapter_name="a"), "`adapter_name` 'a' is taken"),
    "bad name": (lambda pipe: pipe.load_lora_weights("x", adapter_name="../a"), "`adapter_name` must be"),
    "save unknown": (lambda pipe: pipe.save_lora_weights("x", adapter_name="c"), "`adapter_name`"),
    "scale": (lambda pipe: pipe.fuse_lora(float("inf")), "`lora_scale`"),
    "nothing active": (lambda pipe: (pipe.disable_lora(), pipe.fuse_lora()), "no active adapter"),
    "not fused": (lambda pipe: pipe.unfuse_lora(), "no adapter is fused"),
    "fused twice": (lambda pipe: (pipe.fuse_lora(), pipe.fuse_lora()), "`unfuse_lora` before `fuse_lora`"),
    "set when fused": (lambda pipe: (pipe.fuse_lora(), pipe.set_adapters("a")), "`unfuse_lora` before `set_adapters`"),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_bad_calls_are_refused_by_name(saved, call):
    run, message = call
    with pytest.raises(ValueError, match=message):
        run(loaded(saved, "a"))


def test_layers_that_are_offloaded_are_not_replaced(saved):
    pipe = make_text_pipeline()
    pipe.decoder.enable_group_offload(torch.device("cpu"), num_blocks_per_group=1)
    with pytest.raises(ValueError, match="before you enable offloading"):
        pipe.load_lora_weights(saved / "a")


def test_a_prior_of_other_sizes_is_refused(saved):
    pipe = make_text_pipeline()
    pipe.register_modules(prior=make_prior(num_classes=3))
    pipe.prior.blocks = pipe.prior.blocks[:1]
    with pytest.raises(ValueError, match="`prior.blocks.1"):
        pipe.load_lora_weights(saved / "a")
