"""What travels with the parts of a pipeline, and which files are never opened."""

import pytest
import torch
from tiny_models import make_decoder, make_encoder, make_prior

from flextok_hf import FlexTokPipeline
from flextok_hf.models.modeling_decoder import FlexTokFlowDecoder
from flextok_hf.models.modeling_prior import FlexTokPriorForCausalLM


@pytest.fixture
def saved(tiny_class_pipeline, tmp_path):
    pipe = FlexTokPipeline(
        make_encoder(),
        make_decoder(),
        tiny_class_pipeline.scheduler,
        prior=make_prior(text_hidden_size=None, num_classes=3),
        default_guidance_scale=2.5,
        default_prior_guidance_scale=1.5,
    )
    pipe.save_pretrained(tmp_path / "pipe")
    return tmp_path / "pipe"


def scales(pipe):
    return pipe.config.default_guidance_scale, pipe.config.default_prior_guidance_scale


@pytest.mark.parametrize(
    "rebuild",
    [
        lambda pipe, folder: FlexTokPipeline(**pipe.components),
        lambda pipe, folder: FlexTokPipeline.from_pipe(pipe),
        lambda pipe, folder: FlexTokPipeline(
            pipe.encoder,
            FlexTokFlowDecoder.from_pretrained(folder / "decoder"),
            pipe.scheduler,
            prior=FlexTokPriorForCausalLM.from_pretrained(folder / "prior"),
        ),
    ],
    ids=["components", "from_pipe", "parts loaded one by one"],
)
def test_guidance_defaults_stay_with_the_parts(saved, rebuild):
    pipe = FlexTokPipeline.from_pretrained(saved)
    assert scales(pipe) == scales(rebuild(pipe, saved)) == (2.5, 1.5)


def test_fresh_parts_have_the_published_defaults(tiny_class_pipeline):
    prior = make_prior(text_hidden_size=None, num_classes=3)
    assert scales(FlexTokPipeline(make_encoder(), make_decoder(), tiny_class_pipeline.scheduler, prior=prior)) == (
        7.5,
        3,
    )


@pytest.mark.parametrize(
    "kind, name, part",
    [
        (FlexTokPriorForCausalLM, "pytorch_model.bin", "prior"),
        (FlexTokFlowDecoder, "diffusion_pytorch_model.bin", "decoder"),
    ],
)
def test_pickle_files_are_read_on_request_only(saved, kind, name, part):
    folder = saved / part
    model = kind.from_pretrained(folder)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    torch.save(model.state_dict(), folder / name)
    with pytest.raises(OSError):
        kind.from_pretrained(folder)
    loaded = kind.from_pretrained(folder, use_safetensors=False)
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())


def test_a_pipeline_reads_no_pickle_files_either(saved):
    folder = saved / "decoder"
    model = FlexTokFlowDecoder.from_pretrained(folder)
    next(folder.glob("*.safetensors")).unlink()
    torch.save(model.state_dict(), folder / "diffusion_pytorch_model.bin")
    with pytest.raises(OSError):
        FlexTokPipeline.from_pretrained(saved)


def test_a_variant_is_saved_beside_the_usual_weights(saved):
    usual = {path: path.read_bytes() for path in saved.rglob("*.safetensors")}
    FlexTokPipeline.from_pretrained(saved, dtype=torch.float16).save_pretrained(saved, variant="fp16")
    assert all(path.read_bytes() == content for path, content in usual.items())
    assert len(list(saved.rglob("*.fp16.safetensors"))) == len(usual) == 3
