"""Streamed images, and variations that keep the first tokens of an image."""

import threading

import numpy as np
import pytest
import torch
from PIL import Image

from flextok_hf.models import packed_linear
from flextok_hf.models.packed_linear import PACKED
from flextok_hf.pipelines.pipeline_flextok import FlexTokPipeline


FEW_STEPS = {"num_inference_steps": 2, "output_type": "pt"}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def image(shade=40):
    return Image.linear_gradient("L").resize((16, 16)).point(lambda value: min(255, value + shade)).convert("RGB")


class Work:
    """Counts the work of prior and decoder."""

    def __init__(self, pipe):
        self.prior_positions, self.prior_rows, self.decoder_calls = 0, 0, 0
        self.handles = [
            pipe.prior.register_forward_pre_hook(self.count_prior, with_kwargs=True),
            pipe.decoder.register_forward_pre_hook(self.count_decoder, with_kwargs=True),
        ]

    def count_prior(self, module, arguments, keywords):
        input_ids = keywords["input_ids"] if "input_ids" in keywords else arguments[0]
        self.prior_rows = max(self.prior_rows, input_ids.shape[0])
        self.prior_positions += input_ids.shape[1]

    def count_decoder(self, module, arguments, keywords):
        self.decoder_calls += 1

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for handle in self.handles:
            handle.remove()


@pytest.mark.parametrize("prior_guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("has_generator", [True, False])
@pytest.mark.parametrize("counts", [None, [6], [1, 2, 3, 4, 5, 6], [5, 256]])
def test_the_last_image_is_bit_identical_to_the_full_one(tiny_pipeline, counts, has_generator, prior_guidance_scale):
    options = {**FEW_STEPS, "prior_guidance_scale": prior_guidance_scale}

    def generate(call):
        torch.manual_seed(7)
        return call(generator=seeded() if has_generator else None, **options)

    whole = generate(lambda **given: tiny_pipeline("a red circle", **given)).images[0]
    shown = generate(lambda **given: list(tiny_pipeline.stream("a red circle", counts, **given)))
    assert torch.equal(shown[-1][1], whole)
    assert [count for count, _ in shown] == {None: [1, 2, 4, 6], 5: [5, 6]}.get(counts and counts[0], counts)


def test_every_image_is_a_prefix_of_the_same_tokens_from_the_same_noise(tiny_pipeline):
    whole = tiny_pipeline("a red circle", generator=seeded(), **FEW_STEPS)
    noise = tiny_pipeline.prepare_latents(1, seeded())
    for count, image in tiny_pipeline.stream("a red circle", generator=seeded(), **FEW_STEPS):
        prefix = tiny_pipeline.detokenize(whole.token_ids[:, :count], latents=noise, **FEW_STEPS).images[0]
        assert torch.equal(image, prefix)


def test_streaming_costs_one_decode_per_image_and_one_pass_of_the_prior(tiny_pipeline):
    counts = [1, 3, 4, 6]
    with Work(tiny_pipeline) as whole:
        tiny_pipeline("a red circle", generator=seeded(), **FEW_STEPS)
    with Work(tiny_pipeline) as streamed:
        list(tiny_pipeline.stream("a red circle", counts, generator=seeded(), **FEW_STEPS))
    assert (streamed.prior_positions, streamed.prior_rows) == (whole.prior_positions, whole.prior_rows) == (6, 2)
    assert streamed.decoder_calls == len(counts) * whole.decoder_calls


def test_an_image_is_shown_before_the_next_tokens_are_generated(tiny_pipeline):
    with Work(tiny_pipeline) as work:
        images = tiny_pipeline.stream("a red circle", [2, 6], generator=seeded(), **FEW_STEPS)
        assert (work.prior_positions, work.decoder_calls) == (0, 0)
        next(images)
        assert work.prior_positions == 2
        images.close()
    assert work.prior_positions == 2


def test_two_interleaved_streams_do_not_affect_each_other(tiny_pipeline):
    prompts = ("a red circle", "a blue square on white")
    alone = [list(tiny_pipeline.stream(prompt, generator=seeded(), **FEW_STEPS)) for prompt in prompts]
    streams = [tiny_pipeline.stream(prompt, generator=seeded(), **FEW_STEPS) for prompt in prompts]
    for in_turn in zip(*streams, zip(*alone), strict=True):
        *shown, expected = in_turn
        for (count, image), (expected_count, expected_image) in zip(shown, expected, strict=True):
            assert count == expected_count and torch.equal(image, expected_image)


def test_all_parts_belong_to_one_loop_which_is_left_between_them(tiny_pipeline, take):
    head, loops = tiny_pipeline.prior.head, []
    take("product", PACKED)

    def loop_of_head():
        return getattr(packed_linear.active, "loops", {}).get(head)

    handle = tiny_pipeline.prior.norm.register_forward_pre_hook(lambda *_: loops.append(loop_of_head()))
    streams = [tiny_pipeline.stream("a red circle", [1, 2, 6], generator=seeded(), **FEW_STEPS) for _ in range(2)]
    for _ in zip(*streams, strict=True):
        assert loop_of_head() is None
    handle.remove()
    assert len(loops) == 2 * tiny_pipeline.num_registers and None not in loops
    assert len(set(loops)) == 2 and {loop.num_calls for loop in loops} == {tiny_pipeline.num_registers}


def test_a_stream_with_a_static_cache_ends_with_the_full_image(tiny_pipeline, monkeypatch):
    monkeypatch.setattr(tiny_pipeline, "prior_options", {"cache_implementation": "static"})
    whole = tiny_pipeline("a red circle", generator=seeded(), **FEW_STEPS).images[0]
    streams = [tiny_pipeline.stream("a red circle", [1, 3, 6], generator=seeded(), **FEW_STEPS) for _ in range(2)]
    *_, last = zip(*streams, strict=True)
    assert all(torch.equal(image, whole) for _, image in last)


def test_a_stream_can_be_read_in_another_thread_without_gradients(tiny_pipeline):
    stream = tiny_pipeline.stream("a red circle", generator=seeded(), **FEW_STEPS)
    shown = []
    thread = threading.Thread(target=lambda: shown.extend(stream))
    thread.start()
    thread.join()
    assert len(shown) == 4 and not any(image.requires_grad for _, image in shown)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("class_zero_guidance", [False, True])
def test_classes_stream_too(tiny_class_pipeline, class_zero_guidance, monkeypatch):
    monkeypatch.setattr(
        tiny_class_pipeline.prior.generation_config, "class_zero_guidance", class_zero_guidance, raising=False
    )
    options = {"class_labels": 2, **FEW_STEPS}
    *_, (count, image) = tiny_class_pipeline.stream(generator=seeded(), **options)
    whole = tiny_class_pipeline(generator=seeded(), **options).images[0]
    assert count == 6 and torch.equal(image, whole)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"token_counts": []}, "token_counts"),
        ({"token_counts": [2, 1]}, "growing"),
        ({"token_counts": [1, 1]}, "growing"),
        ({"token_counts": [0, 1]}, "1 or more"),
        ({"token_counts": [1.5]}, "1 or more"),
        ({"prompt": ["a red circle", "a star"]}, "one image"),
        ({"prompt": None}, "either `prompt`"),
        ({"output_type": "jpg"}, "output_type"),
        ({"token_ids": torch.zeros(1, 4, dtype=torch.long), "token_counts": [1, 2]}, "4 tokens are kept"),
    ],
)
def test_wrong_arguments_are_refused_at_the_call(tiny_pipeline, arguments, words):
    with pytest.raises(ValueError, match=words):
        tiny_pipeline.stream(**{"prompt": "a red circle", **arguments})


# Variations


def test_variations_keep_the_first_tokens_of_an_image_and_differ_afterwards(tiny_pipeline):
    varied = {"image": image(), "keep_tokens": 3, **FEW_STEPS}
    output = tiny_pipeline("", num_images_per_prompt=8, generator=seeded(), **varied)
    kept = tiny_pipeline.tokenize(image(), 3)
    assert torch.equal(output.token_ids[:, :3], kept.expand(8, -1))
    assert len(output.token_ids[:, 3:].unique(dim=0)) > 1
    assert output.images.shape == (8, 3, 16, 16)


def test_a_variation_continues_as_the_prior_would_from_these_tokens(tiny_pipeline):
    whole = tiny_pipeline("a red circle", prior_guidance_scale=1.0, top_k=1, generator=seeded(), **FEW_STEPS)
    for kept in (1, 5):
        varied = tiny_pipeline(
            "a red circle",
            token_ids=whole.token_ids,
            keep_tokens=kept,
            prior_guidance_scale=1.0,
            top_k=1,  # always the most likely token, so nothing is random
            generator=seeded(),
            **FEW_STEPS,
        )
        assert torch.equal(varied.token_ids, whole.token_ids)
        torch.testing.assert_close(varied.images, whole.images)


def test_keeping_all_tokens_does_not_run_the_prior(tiny_pipeline):
    with Work(tiny_pipeline) as work:
        output = tiny_pipeline("", image=image(), keep_tokens=6, generator=seeded(), **FEW_STEPS)
    assert work.prior_positions == 0
    again = tiny_pipeline.reconstruct(image(), [6], generator=seeded(), **FEW_STEPS)[0]
    assert torch.equal(output.images, again)


def test_images_are_matched_to_their_prompts(tiny_pipeline):
    prompts, images = ["a red circle", "a blue square on white"], [image(), image(200)]
    output = tiny_pipeline(prompts, image=images, keep_tokens=2, num_images_per_prompt=2, **FEW_STEPS)
    kept = tiny_pipeline.tokenize(images, 2)
    assert torch.equal(output.token_ids[:, :2], kept.repeat_interleave(2, dim=0))
    assert not torch.equal(kept[0], kept[1])


def test_a_variation_does_not_depend_on_its_batch(tiny_pipeline):
    varied = {"image": image(), "keep_tokens": 2, **FEW_STEPS}
    generators = [seeded(number) for number in range(3)]
    batch = tiny_pipeline("", num_images_per_prompt=3, generator=generators, **varied)
    for number in range(3):
        single = tiny_pipeline("", generator=seeded(number), **varied)
        assert torch.equal(single.token_ids[0], batch.token_ids[number])


def test_a_stream_starts_with_the_kept_tokens(tiny_pipeline):
    varied = {"image": image(), "keep_tokens": 4, **FEW_STEPS}
    shown = list(tiny_pipeline.stream("", [2, 4, 6], generator=seeded(), **varied))
    whole = tiny_pipeline("", generator=seeded(), **varied).images[0]
    first = tiny_pipeline.reconstruct(image(), [2], generator=seeded(), **FEW_STEPS)[0][0]
    assert torch.equal(shown[-1][1], whole) and torch.equal(shown[0][1], first)


RAGGED = [torch.tensor([1]), torch.tensor([2, 3, 4])]


def test_rows_of_different_lengths_continue_from_their_common_length(tiny_pipeline):
    output = tiny_pipeline(["a red circle"] * 2, token_ids=RAGGED, keep_tokens=1, **FEW_STEPS)
    assert output.token_ids[:, 0].tolist() == [1, 2]


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"image": image()}, "`keep_tokens` must be a whole number from 1 to 6"),
        ({"image": image(), "keep_tokens": 0}, "from 1 to 6"),
        ({"image": image(), "keep_tokens": 7}, "from 1 to 6"),
        ({"image": image(), "keep_tokens": True}, "from 1 to 6"),
        ({"keep_tokens": 2}, "nothing to keep"),
        ({"image": image(), "token_ids": torch.zeros(1, 2, dtype=torch.long), "keep_tokens": 2}, "not both"),
        ({"image": image(), "keep_tokens": 4, "max_tokens": 3}, "4 tokens are kept"),
        ({"image": [image()] * 3, "keep_tokens": 2}, "3 images"),
        ({"token_ids": torch.zeros(1, 2, dtype=torch.long), "keep_tokens": 3}, "from 1 to 2"),
        ({"token_ids": torch.full((1, 2), 15)}, "codebook"),
        ({"token_ids": RAGGED}, "rows of 1 to 3 ids"),
        ({"token_ids": RAGGED, "keep_tokens": 2}, "from 1 to 1 \\(the length of the shortest row"),
        ({"token_ids": torch.zeros(1, 7, dtype=torch.long)}, "1 to 6 ids"),
    ],
)
def test_wrong_variations_are_refused(tiny_pipeline, arguments, words):
    with pytest.raises(ValueError, match=words):
        tiny_pipeline(["a red circle", "a small green star"], **arguments, **FEW_STEPS)


def test_numpy_numbers_are_accepted(tiny_pipeline):
    options = {"num_inference_steps": np.int64(1), "guidance_scale": np.float32(2), "output_type": "pt"}
    output = tiny_pipeline("a red circle", max_tokens=np.int64(3), **options)
    assert output.token_ids.shape == (1, 3)
    assert len(tiny_pipeline.reconstruct(image(), np.array([1, 4]), **options)) == 2
    assert [count for count, _ in tiny_pipeline.stream("a star", np.array([1, 3]), **options)] == [1, 3]
    with pytest.raises(TypeError, match="manual_seed"):
        tiny_pipeline.stream("a star", generator=0)


def test_a_loaded_pipeline_can_stream(tiny_pipeline, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path)
    pipe = FlexTokPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    *_, (_, image) = pipe.stream("a red circle", generator=seeded(), **FEW_STEPS)
    assert torch.equal(image, tiny_pipeline("a red circle", generator=seeded(), **FEW_STEPS).images[0])
