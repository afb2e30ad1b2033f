"""The tokenizer as one Transformers model: the same ids as the pipeline, saved and loaded as one."""

import copy
import json

import pytest
import torch
from diffusers import AutoencoderKL
from image_rows import write_parquet
from safetensors.torch import load_file, save_file
from tiny_models import NUM_REGISTERS, make_pipeline
from transformers import AutoConfig, AutoModel, Trainer, TrainingArguments, pipeline
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from flextok_hf import FlexTokConfig, FlexTokEncoder, FlexTokImageProcessor, FlexTokModel
from flextok_hf.data.latent_cache import cache_latents
from flextok_hf.data.samples import ImageTransform
from flextok_hf.data.training_dataset import load_training_dataset
from flextok_hf.pipelines.bulk_tokenization import tokenize_batches
from flextok_hf.pipelines.images import to_output


def make_vae():
    torch.manual_seed(4)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    sizes = {"block_out_channels": (8, 16), "norm_num_groups": 4, "latent_channels": 3, "scaling_factor": 0.7}
    return AutoencoderKL(**blocks, **sizes).eval()


@pytest.fixture(params=["pixels", "VAE"])
def pipe(request):
    return make_pipeline(vae=make_vae() if request.param == "VAE" else None)


@pytest.fixture
def pixel_values(pipe):
    shape = (2, 3, pipe.resolution, pipe.resolution)
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


@torch.no_grad()
def test_processor_and_model_give_the_ids_of_the_pipeline(pipe, pixel_values, tmp_path):
    images = list(pixel_values / 2 + 0.5)
    model, processor = FlexTokModel.from_pipeline(pipe), FlexTokImageProcessor(size=pipe.resolution)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, loaded_processor = AutoModel.from_pretrained(tmp_path), AutoImageProcessor.from_pretrained(tmp_path)
    assert type(loaded) is FlexTokModel and not loaded.training and type(loaded_processor) is FlexTokImageProcessor
    output = loaded(**loaded_processor(images, return_tensors="pt"))
    assert output.token_ids.equal(pipe.tokenize(images)) and output.token_ids.unique().numel() > 2
    assert pipe.encoder.quantizer.ids_to_codes(output.token_ids).equal(output.codes)
    assert loaded(pixel_values, num_tokens=2).token_ids.equal(pipe.tokenize(images, 2))


def test_a_saved_model_keeps_every_weight_and_setting(pipe, tmp_path):
    model = FlexTokModel.from_pipeline(pipe)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    assert type(AutoConfig.from_pretrained(tmp_path)) is FlexTokConfig
    assert loaded.config.vae_config == model.config.vae_config
    assert loaded.config.encoder_config is loaded.encoder.config
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(loaded.state_dict()[name].equal(tensor) for name, tensor in model.state_dict().items())


def test_the_model_shares_the_components_of_the_pipeline_and_leaves_their_weights(pipe):
    before = copy.deepcopy({"encoder": pipe.encoder, "vae": pipe.vae})
    model = FlexTokModel.from_pipeline(pipe)
    for name, component in before.items():
        for key, tensor in (component.state_dict() if component else {}).items():
            assert tensor.equal(pipe.components[name].state_dict()[key]), key
    assert model.encoder is pipe.encoder and model.vae is pipe.vae
    assert model.get_input_embeddings() is pipe.encoder.patch_embedding


def test_a_model_without_a_tensor_is_refused(pipe, tmp_path):
    FlexTokModel.from_pipeline(pipe).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in ("encoder.feature_proj.bias", *filter(lambda name: name == "vae.encoder.conv_in.bias", tensors)):
        save_file({key: value for key, value in tensors.items() if key != name}, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=f"lacks weights: {name}"):
            AutoModel.from_pretrained(tmp_path)


def test_latents_that_do_not_fit_the_encoder_are_refused():
    vae_config = {"latent_channels": 8}
    with pytest.raises(Exception, match="needs latents of 3 channels, but `vae_config` has 8"):
        FlexTokConfig(encoder_config={"in_channels": 3}, vae_config=vae_config)


@torch.no_grad()
def test_states_weights_and_tuples_come_from_the_encoder(pipe, pixel_values, tmp_path):
    FlexTokModel.from_pipeline(pipe).save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path, attn_implementation="eager", output_hidden_states=True)
    output = model(pixel_values, output_attentions=True)
    assert len(output.hidden_states) == 3 and len(output.attentions) == 2
    assert model.encoder.feature_proj(output.hidden_states[-1]).equal(output.features)
    assert len(model(pixel_values, return_dict=False)) == 4
    model.set_attn_implementation("sdpa")
    assert len(model(pixel_values, output_attentions=True).attentions) == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_a_model_loaded_in_half_precision_computes_in_it(pipe, pixel_values, tmp_path, dtype):
    FlexTokModel.from_pipeline(pipe).save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path, dtype=dtype)
    assert model(pixel_values).features.dtype == dtype


def test_the_librarys_pipeline_extracts_features(pipe, pixel_values):
    images = to_output(pixel_values)
    model, processor = FlexTokModel.from_pipeline(pipe), FlexTokImageProcessor(size=pipe.resolution)
    extract = pipeline("image-feature-extraction", model=model, image_processor=processor)
    features = torch.tensor(extract(images))[:, 0]
    expected = model(**processor(images, return_tensors="pt")).features
    torch.testing.assert_close(features, expected, atol=1e-6, rtol=0)


class Regression(FlexTokModel):
    """A head of the kind that users put on the features."""

    def forward(self, pixel_values, labels):
        features = super().forward(pixel_values).features
        return {"loss": (features.mean(dim=(1, 2)) - labels).square().mean(), "features": features}


def test_trainer_trains_the_encoder_through_the_model(pipe, pixel_values, tmp_path):
    model = Regression(FlexTokModel.from_pipeline(pipe).config, pipe.encoder, pipe.vae)
    rows = [{"pixel_values": image, "labels": torch.tensor(0.5)} for image in pixel_values]
    options = {"max_steps": 2, "report_to": "none", "use_cpu": True, "save_strategy": "no", "disable_tqdm": True}
    before = pipe.encoder.feature_proj.weight.clone()
    result = Trainer(model, TrainingArguments(str(tmp_path), **options), train_dataset=rows).train()
    assert result.training_loss > 0 and not pipe.encoder.feature_proj.weight.equal(before)


def break_weight(module, name, value):
    with torch.no_grad():
        module.get_parameter(name).flatten()[0] = value


FAULTS = {
    "NaN in the encoder": ("encoder", "feature_proj.bias", torch.nan),
    "infinity in the encoder": ("encoder", "feature_proj.weight", torch.inf),
    "NaN in a block": ("encoder", "blocks.0.mlp.down_proj.weight", torch.nan),
    "NaN in the VAE": ("vae", "encoder.conv_in.bias", torch.nan),
    "infinity in the VAE": ("vae", "quant_conv.weight", -torch.inf),
}


@pytest.mark.parametrize("way", ["model", "tokenize", "bulk, bytes", "bulk, floats"])
@pytest.mark.parametrize("fault", FAULTS)
@torch.no_grad()
def test_features_that_are_not_finite_are_refused_by_the_name_of_the_component(way, fault):
    pipe = make_pipeline(vae=make_vae())
    component, name, value = FAULTS[fault]
    break_weight(pipe.components[component], name, value)
    pixel_values = torch.rand(2, 3, pipe.resolution, pipe.resolution) * 2 - 1
    pixels = (pixel_values * 127.5 + 127.5).byte()
    run = {
        "model": lambda: FlexTokModel.from_pipeline(pipe)(pixel_values),
        "tokenize": lambda: pipe.tokenize(pixels),
        "bulk, bytes": lambda: list(tokenize_batches(pipe, [pixels] * 3)),
        "bulk, floats": lambda: list(tokenize_batches(pipe, [pixel_values])),
    }[way]
    title = {"encoder": "encoder", "vae": "VAE"}[component]
    with pytest.raises(ValueError, match=f"computed by the {title}, contain NaN or infinity. Its weights do, too"):
        run()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@torch.no_grad()
def test_pixels_that_are_not_finite_are_named(pipe, pixel_values, value):
    pixel_values[1, 2, 3, 4] = value
    for run in (FlexTokModel.from_pipeline(pipe), lambda pixels: list(tokenize_batches(pipe, [pixels]))):
        with pytest.raises(ValueError, match="`pixel_values` contain NaN or infinity"):
            run(pixel_values)


@torch.no_grad()
def test_a_precision_that_is_too_low_is_told_from_damaged_weights(pixel_values):
    pipe = make_pipeline(vae=make_vae())
    pipe.vae.register_to_config(scaling_factor=1e39)
    with pytest.raises(ValueError, match="computed by the VAE, contain NaN or infinity. If it runs in float16"):
        FlexTokModel.from_pipeline(pipe)(torch.rand(1, 3, 32, 32))


def test_training_does_not_stop_for_features_that_are_not_finite(pipe, pixel_values):
    model = FlexTokModel.from_pipeline(pipe).train()
    break_weight(model.encoder, "feature_proj.bias", torch.nan)
    assert model(pixel_values).token_ids.eq(-1).all()


def test_latents_that_are_not_finite_are_not_cached(tmp_path):
    vae = make_vae()
    break_weight(vae, "quant_conv.bias", torch.nan)
    dataset = load_training_dataset(str(write_parquet(tmp_path / "a.parquet")), transform=ImageTransform(32))
    with pytest.raises(ValueError, match="computed by the VAE, contain NaN"):
        cache_latents(dataset, vae)


def test_the_configuration_holds_no_path(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "pipe")
    loaded = type(pipe).from_pretrained(tmp_path / "pipe")
    FlexTokModel.from_pipeline(loaded).save_pretrained(tmp_path / "model")
    text = (tmp_path / "model" / "config.json").read_text()
    assert str(tmp_path) not in text and json.loads(text)["encoder_config"]["num_registers"] == NUM_REGISTERS


def test_an_encoder_alone_still_loads_as_one(pipe, tmp_path):
    pipe.encoder.save_pretrained(tmp_path)
    FlexTokImageProcessor(size=pipe.resolution).save_pretrained(tmp_path)
    assert type(AutoModel.from_pretrained(tmp_path)) is FlexTokEncoder
    assert AutoImageProcessor.from_pretrained(tmp_path).size["height"] == pipe.resolution
