"""Opt-in approximations change results slightly, do less work and leave no state behind."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    MagCacheConfig,
    UniPCMultistepScheduler,
)
from tiny_models import CODEBOOK_SIZE, NUM_REGISTERS, make_pipeline

from flextok_hf.models.modeling_decoder import DecoderBlock
from flextok_hf.pipelines.guidance import guidance_interval


FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 1.0}
TOKEN_IDS = torch.randint(0, CODEBOOK_SIZE, (2, NUM_REGISTERS), generator=torch.Generator().manual_seed(0))
STEPS = 8


@pytest.fixture
def pipe():
    """A pipeline with a smooth velocity; untrained time embeddings would make it jump between noise levels."""
    pipe = make_pipeline()
    with torch.no_grad():
        pipe.decoder.velocity_proj.weight.mul_(0.3)
        pipe.decoder.time_embedder.linear_1.weight.mul_(0.002)
    return pipe


@pytest.fixture
def block_calls(monkeypatch):
    """Number of rows in every decoder block call that is not skipped."""
    calls = []
    forward = DecoderBlock.forward

    def counted_forward(self, hidden_states, *args):
        calls.append(len(hidden_states))
        return forward(self, hidden_states, *args)

    monkeypatch.setattr(DecoderBlock, "forward", counted_forward)
    return calls


def sample(pipe, num_inference_steps=STEPS, guidance_scale=3.0, count=NUM_REGISTERS):
    noise = pipe.prepare_latents(2, torch.Generator().manual_seed(1))
    options = {"guidance": "cfg", "latents": noise, "output_type": "latent"}
    return pipe.detokenize(TOKEN_IDS[:, :count], num_inference_steps, guidance_scale, **options).images


NEVER = [
    FirstBlockCacheConfig(threshold=0.0),
    MagCacheConfig(threshold=0.0, num_inference_steps=STEPS, mag_ratios=[1.1] * STEPS),
]
OFTEN = [
    FirstBlockCacheConfig(threshold=100.0),
    MagCacheConfig(threshold=100.0, retention_ratio=0.1, num_inference_steps=STEPS, mag_ratios=[1.0] * STEPS),
]


@pytest.mark.parametrize("config", NEVER, ids=lambda config: type(config).__name__)
def test_a_cache_that_never_skips_changes_nothing(pipe, config):
    expected = sample(pipe)
    pipe.decoder.enable_cache(config)
    torch.testing.assert_close(sample(pipe), expected)


@pytest.mark.parametrize("config", OFTEN, ids=lambda config: type(config).__name__)
def test_a_cache_skips_blocks_and_starts_fresh_in_every_run(pipe, config, block_calls):
    expected = sample(pipe)
    num_calls = len(block_calls)
    pipe.decoder.enable_cache(config)
    first = sample(pipe)
    assert len(block_calls) - num_calls < 0.8 * num_calls
    assert not torch.allclose(first, expected, atol=1e-3)
    sample(pipe, count=2)
    torch.testing.assert_close(sample(pipe), first)
    pipe.decoder.disable_cache()
    torch.testing.assert_close(sample(pipe), expected)


def test_a_cache_forgets_an_interrupted_run(pipe):
    pipe.decoder.enable_cache(OFTEN[0])
    expected = sample(pipe)

    def interrupt(pipe, step, timestep, tensors):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipe.detokenize(TOKEN_IDS[:1], 2, 3.0, callback_on_step_end=interrupt)
    torch.testing.assert_close(sample(pipe), expected)


def test_guidance_in_an_interval_skips_the_unconditional_rows_elsewhere(pipe, block_calls):
    sample(pipe, 4)
    always = sum(block_calls)
    block_calls.clear()
    inside = sample(pipe, 4, guidance_interval(3.0, 0.4, 0.8))  # levels 1, 0.75, 0.5, 0.25: two of four
    assert sum(block_calls) == 0.75 * always
    torch.testing.assert_close(inside, sample(pipe, 4, lambda sigma: 3.0 if sigma in (0.75, 0.5) else 1.0))


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(shift=2.0),
        FlowMatchHeunDiscreteScheduler(),
        DPMSolverMultistepScheduler(**FLOW),
        UniPCMultistepScheduler(**FLOW),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_other_solvers_and_grids_follow_the_same_path(pipe, scheduler):
    expected = sample(pipe, 200)
    pipe.scheduler = scheduler
    distances = [(sample(pipe, steps) - expected).square().mean().sqrt() / expected.std() for steps in (2, 40)]
    assert distances[1] < 0.01
    assert distances[1] < distances[0] / 4


def test_a_solver_of_second_order_needs_a_quarter_of_the_steps(pipe):
    expected = sample(pipe, 400)
    euler = (sample(pipe, 40) - expected).square().mean()
    pipe.scheduler = UniPCMultistepScheduler(**FLOW)
    assert (sample(pipe, 10) - expected).square().mean() < euler


def test_a_scheduler_for_other_models_is_refused(pipe):
    for scheduler in (DDIMScheduler(), DPMSolverMultistepScheduler()):
        pipe.scheduler = scheduler
        with pytest.raises(ValueError, match=f"`scheduler` is a {type(scheduler).__name__}.*use_flow_sigmas"):
            sample(pipe)
