"""Sampling in few steps: a distilled decoder takes one pass per step, and a model names its own number of steps."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    MagCacheConfig,
    UniPCMultistepScheduler,
)
from peft import LoraConfig, inject_adapter_in_model
from tiny_models import make_decoder, make_pipeline, make_prior

from flextok_hf.pipelines.pipeline_flextok import FlexTokPipeline


IDS = torch.tensor([[3, 4, 5, 1], [7, 0, 2, 9]])
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def make_student_pipeline(prior=None, **changes):
    settings = {"predicts": "mean_velocity", "interval_blocks": 1, "guidance_range": [1.0, 4.0]}
    decoder = make_decoder(**settings, default_guidance_scale=2.0, **changes)
    return make_pipeline(decoder=decoder, prior=prior)


def decode(pipe, token_ids=IDS, **options):
    noise = torch.randn(len(token_ids), 3, 16, 16, generator=seeded())
    return pipe.detokenize(token_ids, latents=noise, output_type="latent", **options).images


def count_passes(pipe, call):
    passes = []
    handle = pipe.decoder.register_forward_pre_hook(lambda module, inputs: passes.append(len(inputs[0])))
    try:
        call()
    finally:
        handle.remove()
    return passes


# A distilled decoder


@torch.no_grad()
@pytest.mark.parametrize("num_steps", [1, 2, 4, 3])
def test_each_step_goes_to_the_next_level_by_the_mean_velocity(num_steps):
    pipe = make_student_pipeline()
    decoder, codes = pipe.decoder, pipe.encoder.quantizer.ids_to_codes(IDS)
    latents = torch.randn(2, 3, 16, 16, generator=seeded())
    levels = [1 - step / num_steps for step in range(num_steps + 1)]
    for level, lower in pairwise(levels):
        sigma, next_sigma = torch.tensor([level]), torch.tensor([lower])
        scale = torch.tensor([3.0])
        mean = decoder(latents, sigma, codes, next_sigma=next_sigma, guidance_scale=scale).velocity
        latents = latents - (level - lower) * mean
    result = decode(pipe, num_inference_steps=num_steps, guidance_scale=3.0)
    torch.testing.assert_close(result, latents, atol=1e-4, rtol=1e-4)


def test_guidance_costs_no_second_pass():
    student, teacher = make_student_pipeline(), make_pipeline()
    rows = [sum(count_passes(pipe, lambda: decode(pipe, num_inference_steps=4))) for pipe in (student, teacher)]
    assert rows == [4 * 2, 4 * 2 * 2]


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchHeunDiscreteScheduler(),
        UniPCMultistepScheduler(**FLOW),
        DPMSolverMultistepScheduler(**FLOW),
        FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_solvers_that_assume_the_velocity_at_one_level_are_refused_by_name(scheduler):
    pipe = make_student_pipeline()
    pipe.scheduler = scheduler
    name = "stochastic_sampling" if scheduler.config.get("stochastic_sampling") else type(scheduler).__name__
    with pytest.raises(ValueError, match=f"`scheduler` .*{name}"):
        decode(pipe, num_inference_steps=4)


def test_a_shifted_grid_is_followed_to_its_end():
    pipe = make_student_pipeline()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    assert decode(pipe, num_inference_steps=1).equal(decode(make_student_pipeline(), num_inference_steps=1))
    assert not decode(pipe, num_inference_steps=2).equal(decode(make_student_pipeline(), num_inference_steps=2))


@pytest.mark.parametrize(
    "options, name",
    [
        ({"guidance_scale": 5.0}, "`guidance_scale` must be from 1 to 4"),
        ({"guidance_scale": lambda sigma: 5.0 * sigma}, "`guidance_scale` must be from 1 to 4"),
        ({"guidance": "cfg"}, "`guidance` must be"),
    ],
)
def test_guidance_that_is_not_in_the_weights_is_refused(options, name):
    with pytest.raises(ValueError, match=name):
        decode(make_student_pipeline(), **options)


def test_a_guidance_scale_may_depend_on_the_noise_level():
    pipe = make_student_pipeline()
    varied = decode(pipe, num_inference_steps=2, guidance_scale=lambda sigma: 1.0 if sigma > 0.6 else 4.0)
    assert not any(varied.equal(decode(pipe, num_inference_steps=2, guidance_scale=scale)) for scale in (1.0, 4.0))


def test_rows_of_different_lengths_equal_those_decoded_alone():
    pipe = make_student_pipeline()
    rows = [IDS[0, :1], IDS[1]]
    noise = torch.randn(2, 3, 16, 16, generator=seeded())
    options = {"num_inference_steps": 2, "output_type": "latent"}
    together = pipe.detokenize(rows, latents=noise, **options).images
    for index, row in enumerate(rows):
        alone = pipe.detokenize(row[None], latents=noise[index : index + 1], **options).images
        torch.testing.assert_close(together[index : index + 1], alone, atol=1e-4, rtol=1e-4)


def test_a_distilled_pipeline_survives_saving_and_offloading(tmp_path):
    pipe = make_student_pipeline(default_num_inference_steps=4)
    expected = decode(pipe)
    pipe.save_pretrained(tmp_path)
    loaded = FlexTokPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert decode(loaded).equal(expected)
    loaded.decoder.enable_group_offload(torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)
    torch.testing.assert_close(decode(loaded), expected)


@pytest.mark.parametrize(
    "cache",
    [
        FirstBlockCacheConfig(threshold=1e-9),
        MagCacheConfig(threshold=0.0, num_inference_steps=4, mag_ratios=[1.1] * 4),
    ],
    ids=lambda cache: type(cache).__name__,
)
def test_block_caches_work_with_a_distilled_decoder(cache):
    pipe = make_student_pipeline()
    expected = decode(pipe, num_inference_steps=4)
    pipe.decoder.enable_cache(cache)
    torch.testing.assert_close(decode(pipe, num_inference_steps=4), expected)


def test_the_last_streamed_image_is_that_of_a_call():
    pipe = make_student_pipeline(make_prior(text_hidden_size=None, num_classes=3))
    options = {"class_labels": 1, "num_inference_steps": 2, "output_type": "pt"}
    streamed = [image for _, image in pipe.stream(token_counts=[1, 4], generator=seeded(), **options)]
    torch.testing.assert_close(streamed[-1], pipe(max_tokens=4, generator=seeded(), **options).images[0])


def test_an_adapter_of_the_flow_decoder_works_in_the_distilled_one(tmp_path):
    flow, student = make_pipeline(), make_student_pipeline()
    inject_adapter_in_model(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q"]), flow.decoder, "own")
    flow.save_lora_weights(tmp_path)
    before = decode(student, num_inference_steps=1)
    student.load_lora_weights(tmp_path)
    assert not decode(student, num_inference_steps=1).equal(before)
    student.unload_lora_weights()
    assert decode(student, num_inference_steps=1).equal(before)


# The model's own number of steps


@pytest.fixture
def counting_pipe():
    return make_pipeline()


def passes_of(pipe, call):
    return len(count_passes(pipe, call))


@pytest.mark.parametrize("default, expected", [(None, 20), (5, 5), ({1: 6, 4: 3}, 3)])
def test_no_number_of_steps_means_that_of_the_model(counting_pipe, default, expected):
    counting_pipe.decoder.register_to_config(default_num_inference_steps=default)
    options = {"guidance_scale": 1.0}
    assert passes_of(counting_pipe, lambda: decode(counting_pipe, **options)) == expected
    assert passes_of(counting_pipe, lambda: decode(counting_pipe, num_inference_steps=2, **options)) == 2


def test_a_ragged_batch_takes_the_most_steps_that_any_of_its_rows_needs(counting_pipe):
    counting_pipe.decoder.register_to_config(default_num_inference_steps={1: 6, 4: 3})
    rows = [IDS[0, :1], IDS[1]]
    by_steps = {}
    for num_steps in (None, 6, 3):
        by_steps[num_steps] = decode(counting_pipe, rows, num_inference_steps=num_steps)
    assert by_steps[None].equal(by_steps[6]) and not by_steps[None].equal(by_steps[3])


def test_reconstruct_takes_the_steps_of_each_prefix(counting_pipe):
    counting_pipe.decoder.register_to_config(default_num_inference_steps={1: 6, 4: 3})
    image = np.full((16, 16, 3), 90, np.uint8)
    call = lambda: counting_pipe.reconstruct(image, [1, 2, 4], guidance_scale=1.0)  # noqa: E731
    assert passes_of(counting_pipe, call) == 6 + 6 + 3


def test_the_default_steps_are_saved_with_the_pipeline(counting_pipe, tmp_path):
    counting_pipe.decoder.register_to_config(default_num_inference_steps={1: 6, 4: 3})
    counting_pipe.save_pretrained(tmp_path)
    assert FlexTokPipeline.from_pretrained(tmp_path).choose_steps(None, [2, 6]) == 6
