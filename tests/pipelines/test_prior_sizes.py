"""Pipelines whose prior is told the size of the image: every call that generates tokens passes it on."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from tiny_models import NUM_REGISTERS, make_decoder, make_encoder, make_prior

from flextok_hf import FlexTokPipeline
from flextok_hf.models.patches import features_of_sizes


SIZES = [(16, 16), (8, 32), (32, 8), (12, 20)]
LIKELIEST = {"class_labels": [0, 1, 2], "top_k": 1, "prior_guidance_scale": 2.0}  # the tokens do not depend on draws
FAST = {"num_inference_steps": 1, "guidance_scale": 1.0}


def make_sized_pipeline(**settings):
    prior = make_prior(text_hidden_size=None, num_classes=3, **settings)
    if settings:
        torch.nn.init.normal_(prior.shape_proj.weight, generator=torch.Generator().manual_seed(0))
    parts = make_encoder(positions="stretch"), make_decoder(positions="stretch"), FlowMatchEulerDiscreteScheduler()
    pipe = FlexTokPipeline(*parts, prior=prior)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe():
    return make_sized_pipeline(shape_conditioning=True)


def expected_ids(pipe, height, width):
    features = features_of_sizes(torch.tensor([[height, width]] * 3), 16)
    options = {"class_labels": torch.tensor([0, 1, 2]), "guidance_scale": 2.0, "shape_features": features}
    return pipe.prior.generate(**options)[:, 1:]


@pytest.mark.parametrize("height, width", SIZES)
def test_every_call_tells_the_prior_the_size(pipe, height, width):
    size, ids = {"height": height, "width": width}, expected_ids(pipe, height, width)
    assert pipe.generate_tokens(**LIKELIEST, **size).equal(ids)
    output = pipe(**LIKELIEST, **size, **FAST)
    assert output.token_ids.equal(ids) and output.images[0].size == (width, height)
    one = {**LIKELIEST, "class_labels": 1}
    *_, (count, image) = pipe.stream(**one, **size, **FAST, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    decoded = pipe.detokenize(ids[1:2], **size, **FAST, generator=generator).images[0]
    assert count == NUM_REGISTERS and np.array_equal(image, decoded)


def test_sizes_change_the_tokens_and_no_size_is_the_square(pipe):
    ids = [expected_ids(pipe, *size) for size in SIZES]
    assert not any(ids[0].equal(other) for other in ids[1:])
    assert pipe.generate_tokens(**LIKELIEST).equal(ids[0])


def test_variations_continue_at_the_size_of_the_image(pipe):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 32, 3), dtype=np.uint8))
    output = pipe(**LIKELIEST, image=image, keep_tokens=2, height=8, width=32, **FAST)
    kept = pipe.tokenize(image, 2, (8, 32)).expand(3, -1)
    features = features_of_sizes(torch.tensor([[8, 32]] * 3), 16)
    options = {"class_labels": torch.tensor([0, 1, 2]), "guidance_scale": 2.0, "shape_features": features}
    assert output.token_ids.equal(pipe.prior.generate(pipe.prior.prepend_bos(kept), **options)[:, 1:])


def test_a_prior_that_is_not_told_the_size_writes_the_same_tokens_for_all():
    pipe = make_sized_pipeline()
    ids = pipe.generate_tokens(**LIKELIEST)
    assert all(pipe.generate_tokens(**LIKELIEST, height=height, width=width).equal(ids) for height, width in SIZES)


def test_the_setting_survives_saving_a_pipeline(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    again = FlexTokPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    size = {"height": 8, "width": 32}
    assert again.generate_tokens(**LIKELIEST, **size).equal(pipe.generate_tokens(**LIKELIEST, **size))


def test_compiled_priors_are_told_the_size():
    plain, pipe = (make_sized_pipeline(shape_conditioning=True) for _ in range(2))
    pipe.prior_options = {"cache_implementation": "static"}  # what `enable_compile` sets
    for height, width in SIZES:
        size = {"height": height, "width": width}
        assert pipe.generate_tokens(**LIKELIEST, **size).equal(plain.generate_tokens(**LIKELIEST, **size))
