"""One pipeline used by several threads: every call gives bit for bit what it gives on its own."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers import UniPCMultistepScheduler

from flextok_hf.models.packed_linear import PACKED
from flextok_hf.pipelines.bulk_tokenization import tokenize_batches


NUM_THREADS = 4
PIXELS = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(5))
IDS = [torch.tensor([3, 14]), torch.tensor([0, 7, 9, 1, 4])]
LONG = "two crosses, one above the other"


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def call(pipe, seed):
    prompts = ["a star", LONG] if seed % 2 else "a red circle"
    options = {"num_inference_steps": 2 + seed % 9, "prior_guidance_scale": 1 + seed % 3, "output_type": "pt"}
    output = pipe(prompts, [2, 6][: 1 + seed % 2], generator=seeded(seed), **options)
    return [*output.images, *output.token_ids]


def detokenize(pipe, seed):
    options = {"num_inference_steps": 1 + seed % 12, "guidance": ("apg", "cfg")[seed % 2], "output_type": "pt"}
    return [*pipe.detokenize(IDS, generator=seeded(seed), **options).images]


def reconstruct(pipe, seed):
    options = {"num_inference_steps": 1 + seed % 5, "output_type": "pt"}
    return pipe.reconstruct(PIXELS, torch.tensor([1, 1 + seed % 6]), generator=seeded(seed), **options)


def stream(pipe, seed):
    shown = pipe.stream(LONG, generator=seeded(seed), num_inference_steps=1 + seed % 4, output_type="pt")
    return [image for _, image in shown]


def tokenize(pipe, seed):
    return [pipe.tokenize(PIXELS[: 1 + seed % 3], max_tokens=1 + seed % 6)]


def generate_tokens(pipe, seed):
    return [pipe.generate_tokens(["a star", LONG], num_images_per_prompt=1 + seed % 2, generator=seeded(seed))]


def tokenize_in_bulk(pipe, seed):
    return list(tokenize_batches(pipe, [PIXELS, PIXELS[: 1 + seed % 2]]))


def stop_early(pipe, seed):
    def watch(run, step, timestep, tensors):
        run._interrupt = step == seed % 3
        return {"latents": tensors["latents"] * 0.9}

    options = {"num_inference_steps": 4, "callback_on_step_end": watch, "output_type": "latent"}
    return [pipe.detokenize(IDS, generator=seeded(seed), **options).images]


CALLS = (call, detokenize, reconstruct, stream, tokenize, generate_tokens, tokenize_in_bulk, stop_early)


def assert_threads_do_not_meet(pipe, num_draws, calls=CALLS):
    draws = [(calls[number % len(calls)], number) for number in range(num_draws)]
    alone = [function(pipe, seed) for function, seed in draws]
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        together = list(pool.map(lambda draw: draw[0](pipe, draw[1]), draws))
    for (function, seed), expected, results in zip(draws, alone, together, strict=True):
        assert len(expected) == len(results)
        same = all(torch.equal(one, other) for one, other in zip(expected, results, strict=True))
        assert same, f"{function.__name__}({seed}) gave other results than on its own"


@pytest.fixture
def packing(take):
    """Packed weights, which the small models of the tests are not worth otherwise."""
    take("product", PACKED)


@pytest.mark.slow
def test_calls_in_four_threads_are_bit_identical_to_single_ones(tiny_pipeline, packing):
    assert_threads_do_not_meet(tiny_pipeline, 80)


def test_threads_share_a_scheduler_that_keeps_what_it_predicted(tiny_pipeline):
    pipe = copy.copy(tiny_pipeline)
    pipe.scheduler = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    assert_threads_do_not_meet(pipe, 24)


@pytest.mark.slow
def test_threads_share_a_compiled_pipeline(tiny_pipeline):
    torch._dynamo.reset()
    pipe = type(tiny_pipeline)(**{name: copy.deepcopy(part) for name, part in tiny_pipeline.components.items()})
    pipe.set_progress_bar_config(disable=True)
    pipe.enable_compile(backend="eager")
    try:
        assert_threads_do_not_meet(pipe, 24, (detokenize, tokenize_in_bulk, generate_tokens, stop_early))
    finally:
        torch._dynamo.reset()


def test_a_call_leaves_the_scheduler_of_the_pipeline_as_it_was(tiny_tokenizer_pipeline):
    before = {name: str(value) for name, value in vars(tiny_tokenizer_pipeline.scheduler).items()}
    detokenize(tiny_tokenizer_pipeline, 3)
    assert {name: str(value) for name, value in vars(tiny_tokenizer_pipeline.scheduler).items()} == before


def test_a_callback_may_call_the_pipeline(tiny_tokenizer_pipeline):
    pipe, inner = tiny_tokenizer_pipeline, []

    def nested(run, step, timestep, tensors):
        inner.append(pipe.detokenize(IDS, 3, generator=seeded(1), output_type="pt").images)

    options = {"generator": seeded(0), "output_type": "pt"}
    outer = pipe.detokenize(IDS, 2, callback_on_step_end=nested, **options).images
    assert torch.equal(outer, pipe.detokenize(IDS, 2, generator=seeded(0), output_type="pt").images)
    assert torch.equal(inner[0], inner[1]) and len(inner) == 2
