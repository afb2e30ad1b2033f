"""Damaged and incomplete weights are refused and never filled with random values."""

import pytest
import torch
from paths import FIXTURES
from safetensors.torch import load_file, save_file
from tiny_models import make_decoder, make_encoder, make_prior

from flextok_hf import FlexTokPipeline


MODELS = {
    "encoder": (make_encoder, "model.safetensors", "register_tokens"),
    "decoder": (make_decoder, "diffusion_pytorch_model.safetensors", "mask_token"),
    "prior": (lambda: make_prior(num_classes=3, text_hidden_size=None), "model.safetensors", "norm.weight"),
}


@pytest.fixture(params=MODELS)
def saved(request, tmp_path):
    """Class, folder, weight file and the name of one weight of a saved model."""
    make, file_name, weight = MODELS[request.param]
    model = make()
    model.save_pretrained(tmp_path)
    return type(model), tmp_path, tmp_path / file_name, weight


def drop_weight(path, name):
    weights = load_file(path)
    del weights[name]
    save_file(weights, path, metadata={"format": "pt"})


def test_a_missing_weight_is_named(saved):
    kind, folder, path, weight = saved
    drop_weight(path, weight)
    with pytest.raises(ValueError, match=f"{kind.__name__} in .*lacks weights: {weight}. Fetch or save it again"):
        kind.from_pretrained(folder)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_weight_file_is_refused(saved, share):
    kind, folder, path, _ = saved
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(OSError, match="(?i)checkpoint file"):
        kind.from_pretrained(folder)


def test_a_missing_weight_file_is_named(saved):
    kind, folder, path, _ = saved
    path.unlink()
    with pytest.raises(OSError, match=path.name.removesuffix(".safetensors")):
        kind.from_pretrained(folder)


def test_loading_info_is_available(saved):
    kind, folder, _, _ = saved
    model, report = kind.from_pretrained(folder, output_loading_info=True)
    assert isinstance(model, kind) and not report["missing_keys"]


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_a_pipeline_with_a_missing_weight_is_refused(tiny_tokenizer_pipeline, tmp_path, part):
    tiny_tokenizer_pipeline.save_pretrained(tmp_path)
    _, file_name, weight = MODELS[part]
    drop_weight(tmp_path / part / file_name, weight)
    with pytest.raises(ValueError, match=f"lacks weights: {weight}"):
        FlexTokPipeline.from_pretrained(tmp_path)


def test_a_pipeline_with_a_vae_is_restored_bit_for_bit(tmp_path):
    pipe = FlexTokPipeline.from_original(str(FIXTURES / "tokenizer" / "pub_a_base"))
    pipe.save_pretrained(tmp_path)
    loaded = FlexTokPipeline.from_pretrained(tmp_path)

    image = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    images = []
    for each in (pipe, loaded):
        each.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(1)
        images += each.reconstruct(image, 5, num_inference_steps=2, generator=generator, output_type="pt")

    assert loaded.vae.config.scaling_factor == 0.6 and loaded.resolution == 64
    assert images[0].equal(images[1])
