"""The pipeline's public calls: prompt or image -> token ids -> image."""

import copy
import json

import accelerate
import numpy as np
import pytest
import torch
from PIL import Image

from flextok_hf.models.packed_linear import PACKED
from flextok_hf.pipelines.pipeline_flextok import FlexTokPipeline, FlexTokPipelineOutput


K, V, R = 6, 15, 16
FAST = {"num_inference_steps": 2, "output_type": "latent"}


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def images(count, seed=0):
    return torch.rand(count, 3, R, R, generator=seeded(seed))


def ids(*rows):
    return torch.tensor(rows)


def weights(pipe):
    names = ("encoder", "decoder", "prior", "text_encoder")
    return [tensor for name in names if getattr(pipe, name) for tensor in getattr(pipe, name).state_dict().values()]


# Randomness


def test_the_same_seed_gives_the_same_result(tiny_pipeline):
    first, second = (tiny_pipeline("a red circle", generator=seeded(5), **FAST) for _ in range(2))
    assert torch.equal(first.token_ids, second.token_ids) and torch.equal(first.images, second.images)


def test_another_seed_gives_another_result(tiny_pipeline):
    first, second = (tiny_pipeline("a red circle", generator=seeded(seed), **FAST) for seed in (5, 6))
    assert not torch.equal(first.token_ids, second.token_ids)
    assert not torch.allclose(first.images, second.images)


@pytest.mark.parametrize("max_tokens", [None, 3, [2, 6, 4]])
def test_a_batch_with_a_list_of_generators_equals_single_calls(tiny_pipeline, max_tokens):
    prompts = ["a red circle", "", "two crosses, one above the other"]
    batch = tiny_pipeline(prompts, max_tokens, generator=[seeded(i) for i in range(3)], **FAST)
    for index, prompt in enumerate(prompts):
        count = max_tokens[index] if isinstance(max_tokens, list) else max_tokens
        single = tiny_pipeline(prompt, count, generator=seeded(index), **FAST)
        assert torch.equal(single.token_ids[0], batch.token_ids[index])
        torch.testing.assert_close(single.images[0], batch.images[index], atol=1e-4, rtol=1e-4)


def test_detokenizing_a_batch_with_a_list_of_generators_equals_single_calls(tiny_tokenizer_pipeline):
    sequences = [torch.tensor([1, 2]), torch.tensor([14, 0, 7, 3, 3, 9])]
    batch = tiny_tokenizer_pipeline.detokenize(sequences, generator=[seeded(0), seeded(1)], **FAST)
    for index, sequence in enumerate(sequences):
        single = tiny_tokenizer_pipeline.detokenize(sequence[None], generator=seeded(index), **FAST)
        torch.testing.assert_close(single.images[0], batch.images[index], atol=1e-4, rtol=1e-4)


def test_fewer_tokens_with_the_same_seed_are_the_start_of_more(tiny_pipeline):
    few, many = (tiny_pipeline("a red circle", count, generator=seeded(0), **FAST).token_ids for count in (2, 6))
    assert torch.equal(few, many[:, :2])


@pytest.mark.parametrize("as_list", [False, True])
def test_the_global_generator_is_untouched_when_generators_are_passed(tiny_pipeline, as_list):
    before = torch.get_rng_state()
    generator = [seeded(0), seeded(1)] if as_list else seeded(0)
    tiny_pipeline(["a red circle", "a star"], generator=generator, **FAST)
    tiny_pipeline.reconstruct(images(2), [1, 3], num_inference_steps=1, generator=generator)
    assert torch.equal(before, torch.get_rng_state())


# Lengths and batches


def test_more_tokens_than_registers_means_all(tiny_pipeline):
    output = tiny_pipeline("a red circle", max_tokens=100, generator=seeded(0), **FAST)
    assert output.token_ids.shape == (1, K)
    assert torch.equal(output.images, tiny_pipeline("a red circle", generator=seeded(0), **FAST).images)


def test_a_length_per_prompt_gives_ragged_token_ids(tiny_pipeline):
    output = tiny_pipeline(["a star", "a circle", "a cross"], max_tokens=[1, 5, 99], **FAST)
    assert [sequence.shape for sequence in output.token_ids] == [(1,), (5,), (K,)]
    assert output.images.shape == (3, 3, R, R)


def test_token_ids_are_whole_numbers_of_the_codebook(tiny_pipeline):
    token_ids = tiny_pipeline(["a star"] * 4, **FAST).token_ids
    assert token_ids.dtype == torch.int64 and token_ids.shape == (4, K)
    assert token_ids.min() >= 0 and token_ids.max() < V


def test_images_of_one_prompt_are_adjacent(tiny_pipeline):
    generators = [[seeded(i) for i in range(4)] for _ in range(2)]
    several = tiny_pipeline(["a star", "a circle"], [2, 5], num_images_per_prompt=2, generator=generators[0], **FAST)
    spelled_out = tiny_pipeline(
        ["a star", "a star", "a circle", "a circle"], [2, 2, 5, 5], generator=generators[1], **FAST
    )
    assert [len(sequence) for sequence in several.token_ids] == [2, 2, 5, 5]
    assert torch.equal(several.images, spelled_out.images)


def test_every_prefix_gives_a_different_finite_image(tiny_tokenizer_pipeline):
    pipe, token_ids = tiny_tokenizer_pipeline, ids([3, 14, 0, 7, 9, 1])
    noise = pipe.prepare_latents(1, seeded(0))
    outputs = [pipe.detokenize(token_ids[:, :count], latents=noise, **FAST).images for count in range(1, K + 1)]
    assert all(torch.isfinite(latents).all() for latents in outputs)
    assert all(not torch.allclose(one, other) for one, other in zip(outputs[:-1], outputs[1:], strict=True))


# Output types


def test_each_output_type_has_its_format(tiny_tokenizer_pipeline):
    def decode(output_type):
        options = {"num_inference_steps": 1, "generator": seeded(0), "output_type": output_type}
        return tiny_tokenizer_pipeline.detokenize(ids([1, 2], [3, 4]), **options).images

    pil, array, tensor, latents = decode("pil"), decode("np"), decode("pt"), decode("latent")
    assert [(image.mode, image.size) for image in pil] == [("RGB", (R, R))] * 2
    assert array.shape == (2, R, R, 3) and array.dtype == np.float32 and 0 <= array.min() and array.max() <= 1
    assert np.array_equal(array, tensor.permute(0, 2, 3, 1).numpy())
    assert torch.equal(tensor, (latents / 2 + 0.5).clamp(0, 1))
    assert np.array_equal(np.array(pil[0]), (array[0] * 255).round().astype(np.uint8))


def test_output_is_an_object_or_a_tuple(tiny_pipeline):
    output = tiny_pipeline("a star", generator=seeded(0), **FAST)
    images, token_ids = tiny_pipeline("a star", generator=seeded(0), return_dict=False, **FAST)
    assert isinstance(output, FlexTokPipelineOutput)
    assert torch.equal(output.images, images) and torch.equal(output.token_ids, token_ids)


# Sampling


def test_noise_can_be_passed(tiny_tokenizer_pipeline):
    noise = torch.randn(1, 3, R, R, generator=seeded(3))
    given = tiny_tokenizer_pipeline.detokenize(ids([1, 2]), latents=noise, generator=seeded(9), **FAST).images
    drawn = tiny_tokenizer_pipeline.detokenize(ids([1, 2]), generator=seeded(3), **FAST).images
    assert torch.equal(given, drawn)


def test_noise_that_is_passed_is_not_changed(tiny_tokenizer_pipeline):
    noise = torch.randn(1, 3, R, R, generator=seeded(3))
    before = noise.clone()
    tiny_tokenizer_pipeline.detokenize(ids([1, 2]), latents=noise, **FAST)
    assert torch.equal(noise, before)


def test_a_callback_sees_every_step(tiny_tokenizer_pipeline):
    seen = []

    def watch(pipe, step, timestep, tensors):
        assert pipe.decoder is tiny_tokenizer_pipeline.decoder and pipe.num_timesteps == len(pipe.scheduler.timesteps)
        seen.append((step, float(timestep), tuple(tensors["latents"].shape)))

    tiny_tokenizer_pipeline.detokenize(ids([1, 2]), callback_on_step_end=watch, **FAST)
    assert seen == [(0, 1000.0, (1, 3, R, R)), (1, 500.0, (1, 3, R, R))]


def test_a_callback_can_replace_the_latents(tiny_tokenizer_pipeline):
    def blank(pipe, step, timestep, tensors):
        return {"latents": torch.full_like(tensors["latents"], 0.5)} if step == 1 else None

    output = tiny_tokenizer_pipeline.detokenize(ids([1, 2]), callback_on_step_end=blank, **FAST).images
    assert torch.equal(output, torch.full_like(output, 0.5))


def test_guidance_can_be_a_function_of_the_noise_level(tiny_tokenizer_pipeline):
    seen = []

    def scale(sigma):
        seen.append(sigma)
        return 3.0

    by_function, by_number = (
        tiny_tokenizer_pipeline.detokenize(ids([1, 2]), guidance_scale=given, generator=seeded(0), **FAST).images
        for given in (scale, 3.0)
    )
    assert torch.equal(by_function, by_number)
    assert seen == [1.0, 0.5]


@pytest.mark.parametrize("guidance", ["apg", "cfg"])
def test_guidance_changes_the_image(tiny_tokenizer_pipeline, guidance):
    plain, guided = (
        tiny_tokenizer_pipeline.detokenize(
            ids([1, 2]), guidance_scale=scale, guidance=guidance, generator=seeded(0), **FAST
        ).images
        for scale in (1.0, 5.0)
    )
    assert not torch.allclose(plain, guided)


# Images -> token ids -> images


def test_tokenizing_to_fewer_tokens_gives_the_start_of_all(tiny_tokenizer_pipeline):
    token_ids = tiny_tokenizer_pipeline.tokenize(images(3))
    assert token_ids.shape == (3, K) and token_ids.dtype == torch.int64
    assert len(token_ids.unique(dim=0)) > 1
    for count in range(1, K + 1):
        assert torch.equal(tiny_tokenizer_pipeline.tokenize(images(3), max_tokens=count), token_ids[:, :count])


def test_reconstruct_gives_a_batch_per_length_from_the_same_noise(tiny_tokenizer_pipeline):
    pipe, originals = tiny_tokenizer_pipeline, images(2)
    batches = pipe.reconstruct(originals, [1, 4, 50], num_inference_steps=2, generator=seeded(0), output_type="pt")
    assert [batch.shape for batch in batches] == [(2, 3, R, R)] * 3
    token_ids, noise = pipe.tokenize(originals), pipe.prepare_latents(2, seeded(0))
    for count, batch in zip((1, 4, K), batches, strict=True):
        expected = pipe.detokenize(token_ids[:, :count], num_inference_steps=2, latents=noise, output_type="pt")
        assert torch.equal(batch, expected.images)


def test_reconstruct_uses_powers_of_two_by_default(tiny_tokenizer_pipeline):
    batches = tiny_tokenizer_pipeline.reconstruct(images(1), num_inference_steps=1)
    assert [len(batch) for batch in batches] == [1, 1, 1, 1]  # 1, 2, 4 and all 6 tokens


# Classes


def test_a_class_pipeline_generates_from_labels(tiny_class_pipeline):
    output = tiny_class_pipeline(class_labels=[0, 2], max_tokens=[3, 6], generator=[seeded(0), seeded(1)], **FAST)
    assert [len(sequence) for sequence in output.token_ids] == [3, 6]
    single = tiny_class_pipeline(class_labels=2, generator=seeded(1), **FAST)
    assert torch.equal(single.token_ids[0], output.token_ids[1])
    torch.testing.assert_close(single.images[0], output.images[1], atol=1e-4, rtol=1e-4)


def test_the_class_determines_the_tokens(tiny_class_pipeline):
    labels = torch.tensor([0, 1, 2])
    token_ids = tiny_class_pipeline(class_labels=labels, generator=[seeded(0) for _ in labels], **FAST).token_ids
    assert len(token_ids.unique(dim=0)) > 1


# Folders


@pytest.mark.parametrize("fixture", ["tiny_pipeline", "tiny_class_pipeline", "tiny_tokenizer_pipeline"])
def test_saving_and_loading_is_bit_exact(fixture, request, tmp_path):
    pipe = request.getfixturevalue(fixture)
    pipe.save_pretrained(tmp_path)
    loaded = FlexTokPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    for one, other in zip(weights(pipe), weights(loaded), strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)
    outputs = [p.detokenize(p.tokenize(images(2)), generator=seeded(0), **FAST).images for p in (pipe, loaded)]
    assert torch.equal(*outputs)
    condition = {"tiny_pipeline": {"prompt": "a star"}, "tiny_class_pipeline": {"class_labels": 1}}.get(fixture)
    if condition is not None:
        first, second = (p(**condition, generator=seeded(0), **FAST) for p in (pipe, loaded))
        assert torch.equal(first.token_ids, second.token_ids) and torch.equal(first.images, second.images)


def test_the_model_index_refers_to_the_package(tiny_pipeline, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    classes = {"encoder": "FlexTokEncoder", "decoder": "FlexTokFlowDecoder", "prior": "FlexTokPriorForCausalLM"}
    assert {name: index[name] for name in classes} == {name: ["flextok_hf", kind] for name, kind in classes.items()}
    assert index["vae"] == [None, None]


def test_offloaded_weights_give_the_same_result(tiny_pipeline, take):
    """Like `enable_sequential_cpu_offload`, which requires an accelerator."""
    take("product", PACKED)
    options = {"num_inference_steps": 2, "output_type": "pt"}
    expected = tiny_pipeline("a star", generator=seeded(0), **options)
    offloaded = FlexTokPipeline(**{name: copy.deepcopy(part) for name, part in tiny_pipeline.components.items()})
    for module in offloaded.components.values():
        if isinstance(module, torch.nn.Module):
            accelerate.cpu_offload(module, execution_device=torch.device("cpu"), offload_buffers=True)
    output = offloaded("a star", generator=seeded(0), **options)
    assert output.token_ids.equal(expected.token_ids)
    torch.testing.assert_close(output.images, expected.images, atol=1e-5, rtol=0)
    assert offloaded.tokenize(expected.images).equal(tiny_pipeline.tokenize(expected.images))


def test_weights_stored_in_half_precision_load_as_float32(tiny_pipeline, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path / "full")
    half = FlexTokPipeline.from_pretrained(tmp_path / "full", dtype=torch.float16)
    assert half.decoder.dtype == half.encoder.dtype == half.prior.dtype == torch.float16
    assert half.tokenize(torch.rand(1, 3, 16, 16)).shape == (1, half.num_registers)
    half.save_pretrained(tmp_path / "half")
    loaded = FlexTokPipeline.from_pretrained(tmp_path / "half")
    assert {tensor.dtype for tensor in weights(loaded)} == {torch.float32}


# Errors


def test_a_prompt_without_a_prior_is_refused(tiny_tokenizer_pipeline):
    with pytest.raises(ValueError, match="no prior"):
        tiny_tokenizer_pipeline("a star")


def test_a_prompt_for_a_class_prior_is_refused(tiny_class_pipeline):
    with pytest.raises(ValueError, match="`prompt`"):
        tiny_class_pipeline("a star")


def test_prompt_and_class_together_are_refused(tiny_pipeline):
    with pytest.raises(ValueError, match="`prompt` or `class_labels`"):
        tiny_pipeline("a star", class_labels=1)


def test_a_prompt_that_is_too_long_is_truncated_with_a_warning(tiny_pipeline, caplog):
    tiny_pipeline("a red circle", 1, **FAST)
    assert not caplog.records
    tiny_pipeline(["a cross", "very " * 500 + "red"], 1, **FAST)
    limit = tiny_pipeline.tokenizer.model_max_length
    assert [f"only the first {limit} are used" in record.getMessage() for record in caplog.records] == [True]


def test_neither_prompt_nor_class_is_refused(tiny_pipeline):
    with pytest.raises(ValueError, match="`prompt` or `class_labels`"):
        tiny_pipeline()


@pytest.mark.parametrize(
    ("arguments", "error", "names"),
    [
        ({"prompt": []}, ValueError, "`prompt`"),
        ({"prompt": ["a", 3]}, TypeError, "`prompt`"),
        ({"prompt": 3}, TypeError, "`prompt`"),
        ({"max_tokens": 0}, ValueError, "`max_tokens`"),
        ({"max_tokens": 2.0}, ValueError, "`max_tokens`"),
        ({"max_tokens": True}, ValueError, "`max_tokens`"),
        ({"max_tokens": [1, 2]}, ValueError, "`max_tokens`"),
        ({"num_images_per_prompt": 0}, ValueError, "`num_images_per_prompt`"),
        ({"num_inference_steps": 0}, ValueError, "`num_inference_steps`"),
        ({"guidance": "agp"}, ValueError, "`guidance` .*'agp'"),
        ({"guidance_scale": "7"}, TypeError, "`guidance_scale`"),
        ({"guidance_scale": True}, TypeError, "`guidance_scale`"),
        ({"guidance_scale": float("nan")}, TypeError, "`guidance_scale`"),
        ({"output_type": "jpg"}, ValueError, "`output_type`"),
        ({"generator": [seeded(0), seeded(1)]}, ValueError, "`generator`"),
        ({"latents": torch.zeros(2, 3, R, R)}, ValueError, "`latents`"),
        ({"class_labels": 1, "prompt": None}, ValueError, "`class_labels`"),
    ],
)
def test_the_error_names_a_wrong_argument(tiny_pipeline, arguments, error, names):
    with pytest.raises(error, match=names):
        tiny_pipeline(**{"prompt": "a star", "num_inference_steps": 1, **arguments})


@pytest.mark.parametrize(
    ("labels", "error"), [(3, ValueError), (-1, ValueError), ([], ValueError), (1.0, TypeError), (True, TypeError)]
)
def test_the_error_names_wrong_class_labels(tiny_class_pipeline, labels, error):
    with pytest.raises(error, match="`class_labels`"):
        tiny_class_pipeline(class_labels=labels)


def test_a_class_can_be_passed_by_name(named_class_pipeline):
    by_name = named_class_pipeline(class_labels=["dog", "red panda"], generator=[seeded(0), seeded(1)], **FAST)
    by_number = named_class_pipeline(class_labels=[1, 2], generator=[seeded(0), seeded(1)], **FAST)
    assert torch.equal(torch.stack([*by_name.token_ids]), torch.stack([*by_number.token_ids]))


def test_an_unknown_class_is_refused_with_similar_names(named_class_pipeline):
    with pytest.raises(ValueError, match="'cats', not one of the 3 classes, such as cat"):
        named_class_pipeline(class_labels="cats")


def test_a_class_name_is_refused_if_classes_have_no_names(tiny_class_pipeline):
    with pytest.raises(ValueError, match="have no names"):
        tiny_class_pipeline(class_labels="cat")


@pytest.mark.parametrize(
    ("token_ids", "error"),
    [
        (ids([1, V]), ValueError),
        (ids([-1, 2]), ValueError),
        (torch.tensor([[1.0, 2.0]]), TypeError),
        (torch.tensor([[True, False]]), TypeError),
        (torch.zeros(1, K + 1, dtype=torch.long), ValueError),
        (torch.zeros(1, 0, dtype=torch.long), ValueError),
        (torch.zeros(0, 3, dtype=torch.long), ValueError),
        (torch.tensor([1, 2]), ValueError),
        ([], ValueError),
        ([1, 2], ValueError),
        ([[]], ValueError),
        ([[1, V]], ValueError),
        ([[1, 10**40]], ValueError),
        ([[1, None]], TypeError),
        ([[1, True]], TypeError),
        ([[1, 2.0]], TypeError),
        ([["1", "2"]], TypeError),
        ([[[1, 2]]], TypeError),
        (["12"], TypeError),
        ("12", TypeError),
        ({"token_ids": [1]}, TypeError),
        (np.array([1, 2]), ValueError),
        (np.array([[1, -1]]), ValueError),
        (np.array([[2**64 - 1]], dtype=np.uint64), ValueError),
        (np.array([[1.0, 2.0]]), TypeError),
        (7, TypeError),
    ],
)
def test_the_error_names_wrong_token_ids(tiny_tokenizer_pipeline, token_ids, error):
    with pytest.raises(error, match="`token_ids"):
        tiny_tokenizer_pipeline.detokenize(token_ids, num_inference_steps=1)


@pytest.mark.parametrize("rows", [[[1, 2], [3, 4]], [[1, 2], [3]]], ids=["equal", "ragged"])
@pytest.mark.parametrize("form", [list, lambda rows: [np.array(row) for row in rows]], ids=["lists", "arrays"])
def test_lists_and_arrays_of_ids_decode_like_tensors(tiny_tokenizer_pipeline, rows, form):
    tensors = [torch.tensor(row) for row in rows]
    expected = tiny_tokenizer_pipeline.detokenize(tensors, generator=seeded(0), **FAST)
    output = tiny_tokenizer_pipeline.detokenize(form(rows), generator=seeded(0), **FAST)
    assert torch.equal(output.images, expected.images)
    assert [row.tolist() for row in output.token_ids] == rows
    assert isinstance(output.token_ids, torch.Tensor) == (len(rows[0]) == len(rows[1]))


@pytest.mark.parametrize("max_tokens", [0, -1, 1.5, [1, 2]])
def test_tokenizing_to_a_wrong_length_is_refused(tiny_tokenizer_pipeline, max_tokens):
    with pytest.raises(ValueError, match="`max_tokens`"):
        tiny_tokenizer_pipeline.tokenize(images(1), max_tokens=max_tokens)


@pytest.mark.parametrize("max_tokens", [0, [], [1, 0]])
def test_reconstructing_from_a_wrong_length_is_refused(tiny_tokenizer_pipeline, max_tokens):
    with pytest.raises(ValueError, match="`max_tokens`"):
        tiny_tokenizer_pipeline.reconstruct(images(1), max_tokens=max_tokens)


def test_pixels_that_are_not_a_number_are_refused(tiny_tokenizer_pipeline):
    image = images(1)[0]
    image[0, 3, 3] = float("nan")
    with pytest.raises(ValueError, match="`images`.*NaN"):
        tiny_tokenizer_pipeline.tokenize(image)


def test_a_text_file_with_the_name_of_an_image_is_refused(tiny_tokenizer_pipeline, tmp_path):
    (tmp_path / "note.png").write_text("not an image")
    with pytest.raises(ValueError, match="note.png"):
        tiny_tokenizer_pipeline.tokenize(str(tmp_path / "note.png"))


def test_an_image_file_of_any_size_is_read(tiny_tokenizer_pipeline, tmp_path):
    Image.new("RGB", (40, 23), (200, 30, 30)).save(tmp_path / "red.png")
    plain = torch.tensor([200, 30, 30], dtype=torch.uint8).view(3, 1, 1).expand(3, R, R)
    from_file, from_tensor = (tiny_tokenizer_pipeline.tokenize(image) for image in (tmp_path / "red.png", plain))
    assert torch.equal(from_file, from_tensor)
