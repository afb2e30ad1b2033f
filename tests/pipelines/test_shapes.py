"""Images of any shape through the public calls: the same tokens, the right size, helpful errors."""

import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from diffusers import AutoencoderKL, FirstBlockCacheConfig, FlowMatchEulerDiscreteScheduler
from PIL import Image
from tiny_models import NUM_REGISTERS, make_decoder, make_encoder, make_prior

from flextok_hf import FlexTokPipeline, embedded_model
from flextok_hf.cli.token_files import parse_token_file, write_token_file
from flextok_hf.pipelines.images import prepare_images, resize_and_crop
from flextok_hf.pipelines.sizes import SizeRules
from flextok_hf.utils.files import read_json


R, STEP = 16, 4  # side of the trained square, and of a patch
GRIDS = [(rows, columns) for rows in range(1, 9) for columns in range(1, 9) if rows <= 4 * columns <= 16 * rows]
MIXED = [(8, 32), (16, 16), (32, 8), (12, 20), (8, 32)]
FAST = {"num_inference_steps": 2, "guidance_scale": 2.0}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def photo(height, width, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def make_free_pipeline(positions="stretch", shape_conditioning=False, patch_sizes=(4, 4), **components):
    settings = {"positions": positions, "shape_conditioning": shape_conditioning}
    sizes = [{"patch_size": size, "grid_size": R // size} for size in patch_sizes]
    encoder, decoder = make_encoder(**settings, **sizes[0]), make_decoder(**settings, **sizes[1])
    if shape_conditioning:
        torch.nn.init.normal_(encoder.shape_proj.weight, generator=seeded())
    pipe = FlexTokPipeline(encoder, decoder, FlowMatchEulerDiscreteScheduler(), **components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe():
    return make_free_pipeline(shape_conditioning=True, prior=make_prior(text_hidden_size=None, num_classes=3))


@pytest.fixture(scope="module")
def crop_pipe():
    return make_free_pipeline("crop")


def make_vae():
    torch.manual_seed(5)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return AutoencoderKL(**blocks, block_out_channels=(8, 8), norm_num_groups=4, latent_channels=3, sample_size=16)


@pytest.mark.parametrize("rows, columns", GRIDS)
def test_every_shape_goes_to_tokens_to_a_file_and_back(pipe, rows, columns, tmp_path):
    size = (STEP * rows, STEP * columns)
    read = pipe.tokenize([photo(37, 53)], size=size, return_dict=True)
    assert read.sizes == [size] and read.token_ids.shape == (1, NUM_REGISTERS)
    entry = {"file": "a.png", "token_ids": read.token_ids[0].tolist(), "height": size[0], "width": size[1]}
    write_token_file(tmp_path / "ids.json", [entry], pipe.codebook_size, pipe.num_registers)
    content = read_json(tmp_path / "ids.json")
    sequences, sizes = parse_token_file(content, "ids.json", pipe.codebook_size, pipe.num_registers)
    assert sequences == read.token_ids.tolist() and sizes == [size]
    for count in (1, 3, NUM_REGISTERS):
        assert pipe.tokenize([photo(37, 53)], count, size).equal(read.token_ids[:, :count])
    image = pipe.detokenize(torch.tensor(sequences), height=size[0], width=size[1], **FAST).images[0]
    assert image.size == size[::-1]


def test_squares_of_the_trained_side_are_what_they_were(pipe, crop_pipe):
    free = make_free_pipeline()
    images = [photo(37, 53), photo(16, 16, 1)]
    token_ids = crop_pipe.tokenize(images)
    assert free.tokenize(images).equal(token_ids) and free.tokenize(images, size=(R, R)).equal(token_ids)
    options = {"output_type": "pt", **FAST}
    expected = crop_pipe.detokenize(token_ids, generator=seeded(), **options).images
    assert free.detokenize(token_ids, generator=seeded(), **options).images.equal(expected)
    sized = free.detokenize(token_ids, generator=seeded(), height=R, width=R, **options).images
    assert sized.equal(expected)


@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
@pytest.mark.parametrize("is_conditioned", [False, True])
def test_a_batch_of_mixed_shapes_equals_single_calls(output_type, is_conditioned):
    pipe = make_free_pipeline(shape_conditioning=is_conditioned)
    ids = torch.randint(0, pipe.codebook_size, (len(MIXED), NUM_REGISTERS), generator=seeded())
    sequences = [row[: 1 + index] for index, row in enumerate(ids)]
    heights, widths = zip(*MIXED, strict=True)
    generators = [seeded(index) for index in range(len(MIXED))]
    options = {"output_type": output_type, **FAST}
    images = pipe.detokenize(sequences, height=heights, width=list(widths), generator=generators, **options).images
    for index, (height, width) in enumerate(MIXED):
        alone = pipe.detokenize(
            [sequences[index]], height=height, width=width, generator=seeded(index), **options
        ).images[0]
        as_tensor = [torch.as_tensor(np.array(image), dtype=torch.float32) for image in (images[index], alone)]
        torch.testing.assert_close(*as_tensor, atol=1.0 if output_type == "pil" else 1e-5, rtol=0)
        if output_type in ("pt", "latent"):
            assert images[index].shape == (3, height, width)


def test_mixed_photos_keep_their_proportions_and_their_order(pipe):
    photos = [photo(30, 120, 1), photo(50, 50, 2), photo(120, 30, 3), photo(40, 64, 4), photo(60, 240, 5)]
    read = pipe.tokenize(photos, size="keep", return_dict=True)
    assert read.sizes == [(8, 32), (16, 16), (32, 8), (12, 20), (8, 32)]
    for index, image in enumerate(photos):
        assert pipe.tokenize(image, size="keep")[0].equal(read.token_ids[index])
        assert pipe.tokenize(image, size=read.sizes[index])[0].equal(read.token_ids[index])


def test_reconstructions_have_the_shapes_of_the_photos(pipe):
    photos = [photo(30, 120, 1), photo(50, 50, 2), photo(120, 30, 3)]
    generators = [seeded(index) for index in range(3)]
    columns = pipe.reconstruct(photos, [1, 4], size="keep", generator=generators, **FAST)
    assert [[image.size for image in column] for column in columns] == [[(32, 8), (16, 16), (8, 32)]] * 2
    alone = pipe.reconstruct(photos[2], [1, 4], size="keep", generator=seeded(2), **FAST)
    assert [np.abs(np.int16(a[0]) - np.int16(b[2])).max() <= 1 for a, b in zip(alone, columns)] == [True, True]


def test_one_generator_draws_noise_in_the_order_of_the_images(pipe):
    generator = seeded()
    mixed = pipe.prepare_latents(3, seeded(), sizes=[(8, 32), (16, 16), (32, 8)])
    for noise in mixed:
        assert noise.equal(torch.randn(noise.shape, generator=generator))


def test_the_same_tokens_are_drawn_in_any_shape(pipe):
    ids = pipe.tokenize(photo(40, 40))
    for height, width in MIXED:
        for count in (1, NUM_REGISTERS):
            images = pipe.detokenize(ids[:, :count], height=height, width=width, output_type="pt", **FAST).images
            assert images.shape == (1, 3, height, width)


def test_height_or_width_alone_keeps_the_side_of_the_square(pipe):
    ids = torch.zeros(1, 2, dtype=torch.long)
    assert pipe.detokenize(ids, height=8, **FAST).images[0].size == (R, 8)
    assert pipe.detokenize(ids, width=8, **FAST).images[0].size == (8, R)


def test_generated_images_streams_and_variations_have_the_size_asked_for(pipe):
    size = {"height": 8, "width": 24}
    options = {"class_labels": 1, "generator": seeded(3), **size}
    output = pipe(**options, **FAST)
    assert output.images[0].size == (24, 8)
    *_, (count, last) = pipe.stream(**{**options, "generator": seeded(3)}, token_counts=[1, 4, NUM_REGISTERS], **FAST)
    assert count == NUM_REGISTERS and np.array_equal(last, output.images[0])
    assert pipe.generate_tokens(**{**options, "generator": seeded(3)}).equal(output.token_ids)
    wide = photo(20, 60)
    varied = pipe(class_labels=[0, 2], image=wide, keep_tokens=2, generator=seeded(), **size, **FAST)
    assert varied.images[1].size == (24, 8)
    assert varied.token_ids[:, :2].equal(pipe.tokenize(wide, 2, (8, 24)).expand(2, -1))


def test_a_callback_may_change_the_latents_of_every_size(pipe):
    shapes = []

    def callback(run, step, timestep, tensors):
        shapes.append(tuple(tensors["latents"].shape))
        return {"latents": torch.zeros_like(tensors["latents"])}

    ids = torch.zeros(3, 2, dtype=torch.long)
    sizes = {"height": [8, 16, 8], "width": [32, 16, 32]}
    images = pipe.detokenize(ids, callback_on_step_end=callback, output_type="latent", **sizes, **FAST).images
    assert shapes == [(2, 3, 8, 32)] * 2 + [(1, 3, 16, 16)] * 2
    assert not any(image.any() for image in images)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_works_for_every_shape(dtype):
    pipe = make_free_pipeline(shape_conditioning=True).to(dtype)
    for size in MIXED:
        ids = pipe.tokenize(photo(40, 40), size=size)
        assert pipe.tokenize(photo(40, 40), 3, size).equal(ids[:, :3])
        images = pipe.detokenize(ids, height=size[0], width=size[1], output_type="pt", **FAST).images
        assert images.shape == (1, 3, *size) and images.isfinite().all()


def test_compiled_pipelines_give_the_same_images_of_every_shape():
    plain, pipe = (make_free_pipeline(shape_conditioning=True) for _ in range(2))
    torch._dynamo.reset()
    pipe.enable_compile(backend="eager", fullgraph=True)
    ids = torch.randint(0, pipe.codebook_size, (2, 5), generator=seeded())
    for height, width in MIXED:
        options = {"height": height, "width": width, "output_type": "pt", **FAST}
        images = pipe.detokenize(ids, generator=seeded(), **options).images
        expected = plain.detokenize(ids, generator=seeded(), **options).images
        torch.testing.assert_close(images, expected, atol=1e-5, rtol=0)
        assert pipe.tokenize(images, 4, (height, width)).equal(plain.tokenize(images, 4, (height, width)))


@pytest.mark.parametrize("way", ["group offloading", "model offloading by blocks", "cache"])
def test_offloaded_and_cached_decoders_give_the_same_images_of_every_shape(way):
    plain, pipe = (make_free_pipeline(shape_conditioning=True) for _ in range(2))
    if way == "cache":
        pipe.decoder.enable_cache(FirstBlockCacheConfig(threshold=0.0))  # nothing is skipped
    else:
        kind = "leaf_level" if way == "group offloading" else "block_level"
        options = {} if kind == "leaf_level" else {"num_blocks_per_group": 1}
        pipe.decoder.enable_group_offload(torch.device("cpu"), offload_type=kind, **options)
    heights, widths = zip(*MIXED, strict=True)
    ids = torch.randint(0, pipe.codebook_size, (len(MIXED), 4), generator=seeded())
    options = {"height": heights, "width": widths, "output_type": "pt", **FAST}
    images, expected = (one.detokenize(ids, generator=seeded(), **options).images for one in (pipe, plain))
    for image, same in zip(images, expected, strict=True):
        torch.testing.assert_close(image, same, atol=1e-5, rtol=0)


@pytest.mark.parametrize("patch_sizes", [(4, 2), (2, 4), (8, 1)])
def test_a_whole_patch_is_one_of_encoder_and_decoder(patch_sizes):
    pipe = make_free_pipeline(patch_sizes=patch_sizes)
    step = max(patch_sizes)
    assert pipe.size_rules == SizeRules(step, R, True)
    read = pipe.tokenize(photo(20, 40), size="keep", return_dict=True)
    (height, width) = read.sizes[0]
    assert height % step == width % step == 0
    assert pipe.detokenize(read.token_ids, height=height, width=width, **FAST).images[0].size == (width, height)


@pytest.mark.parametrize("way", ["slicing", "tiling"])
def test_a_vae_in_slices_or_tiles_works_through_every_call(way):
    components = {"vae": make_vae(), "prior": make_prior(text_hidden_size=None, num_classes=3)}
    pipe = make_free_pipeline(**components)
    ids = pipe.tokenize([photo(80, 80), photo(80, 80, 1)], size=(64, 64))
    decoding = {"height": 64, "width": 64, "output_type": "pt", "generator": seeded(), **FAST}
    expected = pipe.detokenize(ids, **decoding).images
    getattr(pipe.vae, f"enable_{way}")()
    again = pipe.tokenize([photo(80, 80), photo(80, 80, 1)], size=(64, 64))
    images = pipe.detokenize(ids, **{**decoding, "generator": seeded()}).images
    if way == "slicing":
        assert again.equal(ids)
        torch.testing.assert_close(images, expected, atol=1e-5, rtol=0)
    else:  # tiles see less of the image, so values differ; the seams are blended
        assert not images.equal(expected) and (images - expected).abs().mean() < 0.1
    columns = pipe.reconstruct([photo(80, 80), photo(30, 90)], [1, 4], size="keep", **FAST)
    assert [image.size for image in columns[0]] == [(32, 32), (56, 16)]
    assert pipe(class_labels=1, height=48, width=96, **FAST).images[0].size == (96, 48)
    *_, (_, last) = pipe.stream(class_labels=1, height=96, width=48, token_counts=[2], **FAST)
    assert last.size == (48, 96)


@pytest.mark.parametrize(
    "height, width, rows, columns",
    [(9, 16, 3, 5), (16, 9, 5, 3), (1, 4, 2, 8), (1, 1000, 1, 4), (1000, 1, 4, 1), (3, 2, 5, 3), (100, 101, 4, 4)],
)
def test_proportions_are_kept_in_whole_patches(height, width, rows, columns):
    rules = SizeRules(STEP, R, True)
    if max(height, width) > 4 * min(height, width):
        kept = rules.keep(height, width)
        assert max(kept) == 4 * min(kept)
    else:
        assert rules.keep(height, width) == (STEP * rows, STEP * columns)


@pytest.mark.parametrize("side", [1, 2, 3, 4, 7, 8, 14, 16, 32])
def test_kept_sizes_are_allowed_and_about_as_large_as_the_square(side):
    rules = SizeRules(2, 2 * side, True)
    for height in range(1, 60, 3):
        for width in range(1, 60, 3):
            kept = rules.keep(height, width)
            assert rules.accepts(*kept) and rules.keep(width, height) == kept[::-1]
            if side >= 8:
                assert abs(math.log(math.prod(kept) / (2 * side) ** 2)) < 0.26
    assert rules.keep(5, 5) == (2 * side, 2 * side)


@pytest.mark.parametrize("size", [(0, 16), (16, 0), (-4, 16), (15, 16), (4, 20), (68, 64), (16.0, 16), (True, 16)])
def test_sizes_that_the_model_does_not_accept_are_refused(pipe, size):
    allowed = "multiples of 4, neither more than 4 times the other, their product at most 4096; got "
    ids = torch.zeros(1, 2, dtype=torch.long)
    height, width = size
    for call in (
        lambda: pipe.tokenize(photo(9, 9), size=size),
        lambda: pipe.reconstruct(photo(9, 9), 1, size=size),
        lambda: pipe.detokenize(ids, height=height, width=width),
        lambda: pipe(class_labels=1, height=height, width=width),
        lambda: pipe.stream(class_labels=1, height=height, width=width),
        lambda: pipe.generate_tokens(class_labels=1, height=height, width=width),
    ):
        with pytest.raises(ValueError, match=f"(`height` and `width`|`size`, height and width,) must be {allowed}"):
            call()


@pytest.mark.parametrize("size", ["square", 16, (16,), (16, 16, 16), {"height": 16}])
def test_sizes_of_another_kind_are_refused(pipe, size):
    with pytest.raises(ValueError, match=r'`size` must be `None`, "keep" or \(height, width\), got'):
        pipe.tokenize(photo(9, 9), size=size)


def test_models_that_know_their_square_only_say_so(crop_pipe):
    ids = torch.zeros(1, 2, dtype=torch.long)
    allowed = r'multiples of 4 up to 16: this model \(`positions` "crop"\) knows its square only'
    for call in (
        lambda: crop_pipe.tokenize(photo(9, 9), size="keep"),
        lambda: crop_pipe.tokenize(photo(9, 9), size=(8, 20)),
        lambda: crop_pipe.detokenize(ids, height=20),
        lambda: crop_pipe.detokenize(ids, latents=torch.zeros(1, 3, 20, 16)),
    ):
        with pytest.raises(ValueError, match=allowed):
            call()
    assert crop_pipe.detokenize(ids, height=8, width=12, **FAST).images[0].size == (12, 8)
    assert crop_pipe.tokenize(photo(9, 9), size=(8, 12)).shape == (1, NUM_REGISTERS)


def test_noise_has_to_match_the_size_that_is_asked_for(pipe):
    ids = torch.zeros(2, 2, dtype=torch.long)
    wide = torch.zeros(2, 3, 8, 32)
    assert pipe.detokenize(ids, latents=wide, **FAST).images[0].size == (32, 8)
    assert pipe.detokenize(ids, latents=list(wide), height=8, width=32, **FAST).images[1].size == (32, 8)
    with pytest.raises(ValueError, match="`latents` are noise of .* but `height` and `width` need"):
        pipe.detokenize(ids, latents=wide, height=8, width=16)
    with pytest.raises(ValueError, match="`latents` is a list of 1 tensors, but there are 2 images"):
        pipe.detokenize(ids, latents=[wide[0]])
    with pytest.raises(ValueError, match=r"`latents` must be noise of the shape \(3, height, width\)"):
        pipe.detokenize(ids, latents=[wide[0], wide[0, :2]])
    with pytest.raises(TypeError, match="`latents` must be noise"):
        pipe.detokenize(ids, latents=[wide[0], None])


@pytest.mark.parametrize(
    "kind", [list, tuple, np.array, torch.tensor, lambda values: Dataset.from_dict({"a": values})["a"]]
)
def test_heights_may_be_lists_arrays_tensors_and_columns(pipe, kind):
    ids = torch.zeros(2, 2, dtype=torch.long)
    images = pipe.detokenize(ids, height=kind([8, 16]), width=np.int64(16), **FAST).images
    assert [image.size for image in images] == [(16, 8), (16, 16)]


def test_as_many_heights_as_images_are_needed(pipe):
    with pytest.raises(ValueError, match="`height` has 2 values, but there are 3 images"):
        pipe.detokenize(torch.zeros(3, 2, dtype=torch.long), height=[8, 16])


@pytest.mark.parametrize("kind", ["PIL", "uint8 tensor", "float array"])
@pytest.mark.parametrize("shape", [(40, 40), (1, 300), (300, 1), (8, 24), (1, 1)])
def test_images_cover_the_size_and_lose_their_edges(kind, shape):
    image = photo(*shape)
    given = {"PIL": image, "uint8 tensor": torch.from_numpy(np.array(image)).permute(2, 0, 1)}
    given["float array"] = np.array(image) / 255
    values = prepare_images(given[kind], (8, 24))
    assert values.shape == (1, 3, 8, 24)
    height, width = shape
    box_width, box_height = min(width, height * 3), min(height, width / 3)
    left, top = (width - box_width) / 2, (height - box_height) / 2
    expected = image.resize((24, 8), Image.Resampling.LANCZOS, box=(left, top, left + box_width, top + box_height))
    expected = torch.from_numpy(np.array(expected)).permute(2, 0, 1)[None] / 255 * 2 - 1
    # bytes are rounded between the two passes of resampling, floats are not
    torch.testing.assert_close(values, expected, atol=0.1 if kind == "float array" else 1e-6, rtol=0)


@pytest.mark.parametrize("height, width", [(37, 53), (53, 37), (16, 16), (400, 333), (5, 1)])
def test_squares_are_cropped_as_before(height, width):
    image = photo(height, width)
    side = min(height, width)
    left, top = (width - side) / 2, (height - side) / 2
    expected = image.resize((R, R), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))
    for size in (R, (R, R)):
        assert np.array_equal(resize_and_crop(image, size), expected)


def test_the_embedded_model_accepts_every_shape():
    pipe = FlexTokPipeline.from_pretrained(embedded_model(), prior=None, text_encoder=None, tokenizer=None)
    pipe.set_progress_bar_config(disable=True)
    read = pipe.tokenize([photo(90, 160), photo(50, 50)], size="keep", return_dict=True)
    assert read.sizes == [(96, 176), (128, 128)]
    assert read.token_ids[1].equal(pipe.tokenize(photo(50, 50))[0])
    assert pipe.detokenize(read.token_ids[:1], height=96, width=176, num_inference_steps=1).images[0].size == (176, 96)
