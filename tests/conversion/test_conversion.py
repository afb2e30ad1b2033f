"""Official checkpoints of many shapes, compared after conversion with an independent version of the formulas."""

import json

import official_reference as reference
import pytest
import torch
import torch.nn.functional as F
import yaml
from diffusers import AutoencoderKL
from official_checkpoints import write_prior, write_tokenizer
from safetensors.torch import load_file, save_file

from flextok_hf import (
    FlexTokEncoder,
    FlexTokEncoderConfig,
    FlexTokFlowDecoder,
    FlexTokPipeline,
    FlexTokPriorConfig,
    FlexTokPriorForCausalLM,
)
from flextok_hf.conversion.convert import convert_checkpoint
from flextok_hf.conversion.vae import PUBLISHED_ARCHITECTURE


ATOL = 5e-5
TOKENIZERS = {
    "default": {},
    "wider encoder": {"encoder_width": 64, "encoder_head_dim": 8, "decoder_width": 24, "decoder_head_dim": 24},
    "deeper": {"encoder_depth": 4, "decoder_depth": 3},
    "one block, one register": {"encoder_depth": 1, "registers": 1},
    "more registers than patches": {"registers": 40},
    "other levels": {"levels": [27, 2, 3, 4, 7]},
    "other patches": {"patch": 1, "grid": 6, "channels": 2},
    "patches of three": {"patch": 3, "grid": 2},
    "odd hidden size of the mlp": {"encoder_width": 20, "encoder_head_dim": 10},
    "other noise levels": {"max_timestep": 1000.0, "frequencies": 6},
    "grid": {"registers": 0},
    "grid without nested dropout": {"registers": 0, "nested_dropout": False},
}
RMS_NORM = {"_target_": "l3m.model.layers.normalization.RMSNorm", "_partial_": True, "eps": 1e-3}
LAYER_NORM = {"_target_": "torch.nn.LayerNorm", "_partial_": True, "eps": 1e-2}
TEXT, CLASSES = {"text_dim": 12}, {"classes": 5}
PRIORS = {
    "text": TEXT,
    "classes": CLASSES,
    "split, other names": {**TEXT, "attention": "HFAttention"},
    "split": {**CLASSES, "attention": "GenericAttention"},
    "few wide heads": {**TEXT, "heads": 1, "depth": 3},
    "narrow feed-forward": {**CLASSES, "hidden": 20},
    "other epsilon": {**TEXT, "eps": 0.1},
    "layer norms": {**TEXT, "norm": "torch.nn.LayerNorm", "eps": 1e-2},
    "no final norm": {**CLASSES, "final_norm": False},
    "a norm in the head": {**TEXT, "head_norm": True},
    "biases everywhere": {**TEXT, "use_bias": True, "qkv_bias": True, "head_bias": True, "projector_bias": True},
    "biases of blocks only": {**TEXT, "use_bias": True},
    "biases of queries only": {**CLASSES, "qkv_bias": True, "attention": "GenericAttention"},
    "bias of the head only": {**CLASSES, "head_bias": True},
    "normalized queries": {**CLASSES, "qk_norm": RMS_NORM},
    "normalized queries of another kind": {**TEXT, "qk_norm": LAYER_NORM},
    "normalized queries of the text": {**TEXT, "cross_qk_norm": RMS_NORM},
    "both": {**TEXT, "qk_norm": RMS_NORM, "cross_qk_norm": RMS_NORM},
    "scaled logits": {**TEXT, "qk_scale": 0.05},
    "fixed positions": {**CLASSES, "positions": "sincos1d"},
}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request, tmp_path):
    return write_tokenizer(tmp_path / "official", **TOKENIZERS[request.param])


def load(*args, **options):
    pipe = FlexTokPipeline.from_original(*args, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def compare_tokenizer(pipe, tensors, shape, height, width):
    """Compare encoder and decoder with the formulas on latents of the given size."""
    channels, length = shape["channels"], shape["registers"] or (height // shape["patch"]) * (width // shape["patch"])
    latents = torch.randn(3, channels, height, width, generator=seeded(1))
    output = pipe.encoder(latents)
    for image, features, ids in zip(latents, output.features, output.token_ids, strict=True):
        expected = reference.features(tensors, shape, image)
        torch.testing.assert_close(features, expected, atol=ATOL, rtol=0)
        assert ids.equal(reference.token_ids(shape, expected))
        torch.testing.assert_close(pipe.encoder.quantizer.ids_to_codes(ids[None])[0], reference.codes(shape, ids))

    counts = torch.tensor([1, max(1, length // 2), length])
    sigma, is_last = torch.tensor([1.0, 0.35, 0.05]), torch.tensor([False, False, True])
    for is_unconditional in (torch.zeros(3, dtype=torch.bool), is_last):
        velocity = pipe.decoder(latents, sigma, output.codes, counts, is_unconditional).velocity
        for index in range(3):
            ids = output.token_ids[index, : counts[index]]
            expected = reference.velocity(
                tensors, shape, latents[index], sigma[index], ids, bool(is_unconditional[index])
            )
            torch.testing.assert_close(velocity[index], expected, atol=ATOL, rtol=0)


@pytest.mark.parametrize("shrink", [(0, 0), (1, 0), (0, 1)], ids=["full", "wide", "tall"])
def test_a_converted_tokenizer_matches_the_published_formulas(tokenizer, shrink):
    path, tensors, shape = tokenizer
    side = shape["grid"] * shape["patch"]
    compare_tokenizer(load(path), tensors, shape, side - shrink[0] * shape["patch"], side - shrink[1] * shape["patch"])


@pytest.mark.parametrize("is_single_file", [True, False], ids=["file", "folder"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_checkpoint_stored_in_half_precision_runs_in_float32(tmp_path, dtype, is_single_file):
    path, tensors, shape = write_tokenizer(tmp_path / "official", dtype, is_single_file)
    pipe = load(path)
    assert pipe.encoder.dtype == pipe.decoder.dtype == pipe.vae.dtype == torch.float32
    compare_tokenizer(pipe, tensors, shape, 8, 8)


def test_images_in_a_batch_can_have_different_numbers_of_tokens(tmp_path):
    path, tensors, shape = write_tokenizer(tmp_path / "official")
    pipe = load(path)
    noise = torch.randn(3, shape["channels"], 6, 4, generator=seeded(2))  # neither square nor of maximum size
    sequences = [torch.tensor([3]), torch.tensor([7, 0, 14]), torch.tensor([1, 2, 3, 4, 5, 6])]
    latents = pipe.detokenize(sequences, 2, 3.0, "cfg", latents=noise, output_type="latent").images
    for index, ids in enumerate(sequences):
        x = noise[index]
        for t in (1.0, 0.5):
            on, off = (reference.velocity(tensors, shape, x, t, ids, is_off) for is_off in (False, True))
            x = x - (off + 3.0 * (on - off)) / 2
        torch.testing.assert_close(latents[index], x, atol=ATOL, rtol=0)


@pytest.mark.parametrize("name", PRIORS)
@torch.no_grad()
def test_a_converted_prior_matches_the_published_formulas(tmp_path, name):
    folder, tensors, shape = write_prior(tmp_path / "official", **PRIORS[name])
    convert_checkpoint(tmp_path / "ours", prior=str(folder))
    prior = FlexTokPriorForCausalLM.from_pretrained(tmp_path / "ours")
    ids = torch.randint(shape["codes"], (2, shape["length"] - 1), generator=seeded())
    text = torch.randn(2, 4, 12, generator=seeded(1))
    if shape["text_dim"]:
        condition = {
            "encoder_hidden_states": text,
            "encoder_attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
        }
        expected = [
            reference.prior_logits(tensors, shape, row, text[index, :length])
            for index, (row, length) in enumerate(zip(ids, (4, 2), strict=True))
        ]
    else:
        condition = {"class_labels": torch.tensor([4, -1])}
        expected = [
            reference.prior_logits(tensors, shape, row, label=label) for row, label in zip(ids, (4, -1), strict=True)
        ]
    logits = prior(prior.prepend_bos(ids), **condition).logits
    torch.testing.assert_close(logits, torch.stack(expected), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "target, options, function",
    [
        ("torch.nn.GELU", {}, F.gelu),
        ("torch.nn.GELU", {"approximate": "none"}, F.gelu),
        ("torch.nn.GELU", {"approximate": "tanh"}, lambda x: F.gelu(x, approximate="tanh")),
        ("torch.nn.SiLU", {}, F.silu),
        ("torch.nn.ReLU", {"inplace": True}, F.relu),
    ],
)
@torch.no_grad()
def test_the_projector_uses_the_activation_of_the_checkpoint(tmp_path, target, options, function):
    activation = {"_target_": target, "_partial_": True, **options}
    folder, tensors, shape = write_prior(tmp_path / "official", **TEXT, activation=activation)
    convert_checkpoint(tmp_path / "ours", prior=str(folder))
    prior = FlexTokPriorForCausalLM.from_pretrained(tmp_path / "ours")
    text = torch.randn(1, 4, 12, generator=seeded(1))
    logits = prior(prior.prepend_bos(torch.tensor([[3, 1]])), text).logits[0]
    expected = reference.prior_logits(tensors, shape, torch.tensor([3, 1]), text[0], activation=function)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_tensors_of_parts_that_have_their_own_repositories_are_ignored(tmp_path):
    folder, tensors, _ = write_prior(tmp_path / "official", **TEXT)
    tensors["models.text_encoder.t5_embedder.encoder.weight"] = torch.zeros(3)
    tensors["models.image_tokenizer.model.encoder.weight"] = torch.zeros(3)
    save_file(tensors, folder / "model.safetensors")
    convert_checkpoint(tmp_path / "ours", prior=str(folder))
    assert FlexTokPriorForCausalLM.from_pretrained(tmp_path / "ours").config.text_hidden_size == 12


# Output


def read_folder(folder):
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def same_weights(one, other):
    assert one.state_dict().keys() == other.state_dict().keys()
    return all(other.state_dict()[name].equal(tensor) for name, tensor in one.state_dict().items())


@pytest.mark.parametrize("is_single_file", [True, False], ids=["file", "folder"])
def test_converting_and_saving_a_loaded_pipeline_write_the_same(tmp_path, is_single_file):
    path, _, _ = write_tokenizer(tmp_path / "official", is_single_file=is_single_file)
    prior, _, _ = write_prior(tmp_path / "prior", **CLASSES)
    convert_checkpoint(tmp_path / "converted", str(path), str(prior))
    load(path, prior).save_pretrained(tmp_path / "saved")
    converted, saved = read_folder(tmp_path / "converted"), read_folder(tmp_path / "saved")
    assert converted.keys() - saved.keys() == {"original.json"} and saved.keys() <= converted.keys()
    for name, content in saved.items():
        assert name.endswith((".safetensors", "README.md")) or converted[name] == content, name
    assert "Converted from" in (tmp_path / "converted" / "README.md").read_text()
    pipes = [FlexTokPipeline.from_pretrained(tmp_path / name) for name in ("converted", "saved")]
    for name in ("encoder", "decoder", "vae", "prior"):
        assert same_weights(*(getattr(pipe, name) for pipe in pipes)), name
    assert (pipes[0].config.default_guidance_scale, pipes[0].config.default_prior_guidance_scale) == (7.5, 1.5)


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_weights_are_stored_in_the_requested_precision(tmp_path, dtype):
    path, tensors, _ = write_tokenizer(tmp_path / "official", torch.float16)
    convert_checkpoint(tmp_path / "ours", str(path), dtype=dtype)
    expected = torch.float16 if dtype is None else dtype
    for part, name in (
        ("encoder", "model"),
        ("decoder", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
    ):
        stored = load_file(tmp_path / "ours" / part / f"{name}.safetensors")
        assert {tensor.dtype for tensor in stored.values()} == {expected}
        config = json.loads((tmp_path / "ours" / part / "config.json").read_text())
        assert part != "encoder" or config["dtype"] == str(expected).removeprefix("torch.")
    registers = load_file(tmp_path / "ours" / "encoder" / "model.safetensors")["register_tokens"]
    assert registers.equal(tensors["encoder.module_dict.enc_register_module.registers"].to(expected))


def test_mixed_precision_is_kept(tmp_path):
    path, tensors, _ = write_tokenizer(tmp_path / "official")
    name = "encoder.module_dict.enc_register_module.registers"
    save_file({**tensors, name: tensors[name].bfloat16()}, path / "model.safetensors")
    convert_checkpoint(tmp_path / "ours", str(path))
    stored = load_file(tmp_path / "ours" / "encoder" / "model.safetensors")
    assert stored["register_tokens"].dtype == torch.bfloat16
    assert stored["feature_proj.weight"].dtype == torch.float32
    assert load(path, dtype=None).encoder.register_tokens.dtype == torch.bfloat16


def test_large_models_are_split_into_shards_with_an_index(tmp_path):
    path, _, _ = write_tokenizer(tmp_path / "official")
    prior, _, _ = write_prior(tmp_path / "prior", **CLASSES)
    whole = load(path, prior)
    convert_checkpoint(tmp_path / "ours", str(path), str(prior), max_shard_bytes=10_000)
    pipe = FlexTokPipeline.from_pretrained(tmp_path / "ours")
    for name in ("encoder", "decoder", "vae", "prior"):
        shards = sorted((tmp_path / "ours" / name).glob("*-of-*.safetensors"))
        contents = [load_file(shard) for shard in shards]
        sizes = [sum(tensor.nbytes for tensor in one.values()) for one in contents if len(one) > 1]
        assert len(shards) > 1 and max(sizes) <= 10_000, name
        index = json.loads(next((tmp_path / "ours" / name).glob("*.index.json")).read_text())
        assert index["weight_map"].keys() == getattr(whole, name).state_dict().keys()
        assert same_weights(getattr(pipe, name), getattr(whole, name)), name


def test_a_loaded_model_is_independent_of_the_file(tmp_path):
    path, tensors, _ = write_tokenizer(tmp_path / "official", is_single_file=True)
    pipe = load(path)
    path.write_bytes(bytes(path.stat().st_size))
    registers = tensors["encoder.module_dict.enc_register_module.registers"]
    assert pipe.encoder.register_tokens.equal(registers)
    assert pipe.encoder.register_tokens.requires_grad and not pipe.encoder.training
    assert not any(
        tensor.is_meta for model in (pipe.encoder, pipe.decoder, pipe.vae) for tensor in model.state_dict().values()
    )


def test_settings_without_a_field_in_our_configurations_are_saved_beside_them(tmp_path):
    path, _, _ = write_tokenizer(tmp_path / "official")
    prior, _, _ = write_prior(tmp_path / "prior", **CLASSES)
    convert_checkpoint(tmp_path / "ours", str(path), str(prior))
    record = json.loads((tmp_path / "ours" / "original.json").read_text())
    assert record["tokenizer"]["source"] == "official" and str(tmp_path) not in str(record)
    assert record["tokenizer"]["training"]["nested_dropout"] == {"size_sampling_mode": "uniform_pow2"}
    assert record["prior"]["generation"]["timesteps"] == 25


def test_a_sampled_posterior_is_reported(tmp_path):
    path, _, _ = write_tokenizer(tmp_path / "official")
    edit_json(path / "config.json", lambda config: config["vae"].update(sample_posterior=True))
    notes = convert_checkpoint(tmp_path / "ours", str(path))
    assert len(notes) == 1 and "`sample_posterior` is true" in notes[0]


def test_a_prior_trained_with_another_tokenizer_is_reported(tmp_path):
    path, _, _ = write_tokenizer(tmp_path / "official")
    prior, _, _ = write_prior(tmp_path / "prior", **CLASSES)
    config = yaml.safe_load((prior / "config.yaml").read_text())
    config["model"]["meta_model"]["models"]["image_tokenizer"] = {"_target_": "x.Y", "model_id": "owner/other"}
    (prior / "config.yaml").write_text(yaml.safe_dump(config))
    notes = convert_checkpoint(tmp_path / "ours", str(path), str(prior))
    assert len(notes) == 1 and "trained with the tokenizer 'owner/other'" in notes[0]


def test_other_sampling_defaults_are_reported(tmp_path):
    path, _, _ = write_tokenizer(tmp_path / "official")
    prior, _, _ = write_prior(tmp_path / "prior", **CLASSES)
    config = yaml.safe_load((prior / "config.yaml").read_text())
    config["generation"].update(temperature=0.8, cfg_factor=2.5, tokenizer_cfg_factor=5.0)
    (prior / "config.yaml").write_text(yaml.safe_dump(config))
    notes = convert_checkpoint(tmp_path / "ours", str(path), str(prior))
    assert len(notes) == 1 and "samples with {'temperature': 0.8} by default" in notes[0]
    pipe = FlexTokPipeline.from_pretrained(tmp_path / "ours")
    assert (pipe.config.default_guidance_scale, pipe.config.default_prior_guidance_scale) == (5.0, 2.5)


def edit_json(path, change):
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


PUBLISHED = {
    "d12_d12": (12, 12, 85_382_406, 172_448_320, 341_651_737),
    "d18_d18": (18, 18, 287_326_086, 578_587_456, 949_734_553),
    "d18_d28": (18, 28, 287_326_086, 2_169_735_744, 2_540_882_841),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_models_of_published_sizes_have_the_published_number_of_parameters(name):
    """Fixed positions are parameters in the official code and buffers here; both are counted."""
    encoder_depth, decoder_depth, *expected = PUBLISHED[name]
    with torch.device("meta"):
        encoder = FlexTokEncoder(FlexTokEncoderConfig(hidden_size=64 * encoder_depth, num_hidden_layers=encoder_depth))
        decoder = FlexTokFlowDecoder(hidden_size=64 * decoder_depth, num_layers=decoder_depth)
        vae = AutoencoderKL(**PUBLISHED_ARCHITECTURE, latent_channels=16)
    counts = [sum(tensor.numel() for tensor in model.state_dict().values()) for model in (encoder, decoder, vae)]
    assert [*counts[:2], sum(counts)] == expected
    assert len(vae.state_dict()) == 248


def test_a_prior_of_published_size_has_the_published_number_of_parameters():
    with torch.device("meta"):
        prior = FlexTokPriorForCausalLM(FlexTokPriorConfig())  # FlexAR-113M-T2I
    in_blocks = sum(parameter.numel() for parameter in prior.blocks.parameters())
    total = sum(parameter.numel() for parameter in prior.parameters())
    assert round(in_blocks / 1e6, 1) == 113.3 and total // 10**6 == 217
