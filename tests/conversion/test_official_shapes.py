"""Official tokenizers at other shapes than their square: what they do, what they refuse, and what makes them free."""

import paths
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from flextok_hf import FlexTokPipeline
from flextok_hf.training.arguments import TokenizerArguments
from flextok_hf.training.starting_points import load_tokenizer


FIXTURES = paths.FIXTURES / "tokenizer"
VARIANTS = ("pub_a_base", "pub_b_wide", "pub_c_fsq")
PHOTO = paths.ROOT / "docs" / "assets" / "parrots.jpg"
FAST = {"num_inference_steps": 1, "guidance_scale": 1.0}


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request):
    return FIXTURES / request.param


@pytest.fixture(scope="module")
def pipe(variant):
    pipe = FlexTokPipeline.from_original(str(variant))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def patches_at(pipe, rows, columns):
    """Return height and width in pixels of a grid of patches."""
    step = pipe.size_rules.step
    return step * rows, step * columns


@pytest.mark.parametrize("rows, columns", [(4, 4), (2, 4), (4, 1), (3, 2)])
def test_rectangles_inside_the_square_go_to_tokens_and_back(pipe, rows, columns):
    height, width = patches_at(pipe, rows, columns)
    read = pipe.tokenize([PHOTO], size=(height, width), return_dict=True)
    assert read.sizes == [(height, width)]
    for count in (1, 3):
        assert pipe.tokenize([PHOTO], count, (height, width)).equal(read.token_ids[:, :count])
    image = pipe.detokenize(read.token_ids, height=height, width=width, **FAST).images[0]
    assert image.size == (width, height)


@torch.no_grad()
@pytest.mark.parametrize("rows, columns", [(2, 4), (4, 1), (3, 2)])
def test_a_rectangle_is_the_upper_left_corner_of_a_larger_image(pipe, rows, columns):
    config = pipe.encoder.config
    side, height, width = (config.patch_size * count for count in (config.grid_size, rows, columns))
    whole = torch.randn(1, config.in_channels, side, side, generator=torch.Generator().manual_seed(0))
    for model in (pipe.encoder, pipe.decoder):
        patches = model.patch_embedding(whole).unflatten(1, (config.grid_size, config.grid_size))
        corner = model.patch_embedding(whole[:, :, :height, :width]).unflatten(1, (rows, columns))
        torch.testing.assert_close(corner, patches[:, :rows, :columns], atol=1e-6, rtol=0)


def test_what_they_were_not_trained_for_is_refused_with_what_is_allowed(pipe):
    rules = pipe.size_rules
    allowed = rf'multiples of {rules.step} up to {rules.side}: this model \(`positions` "crop"\) knows its square only'
    ids = torch.zeros(1, 2, dtype=torch.long)
    for call in (
        lambda: pipe.tokenize([PHOTO], size="keep"),
        lambda: pipe.tokenize([PHOTO], size=patches_at(pipe, 4, 5)),
        lambda: pipe.reconstruct([PHOTO], 1, size=patches_at(pipe, 8, 8)),
        lambda: pipe.detokenize(ids, width=rules.side + rules.step),
        lambda: pipe.detokenize(ids, height=rules.step + 1),
    ):
        with pytest.raises(ValueError, match=allowed):
            call()


@torch.no_grad()
def test_made_free_for_fine_tuning_they_give_the_same_squares_bit_for_bit(variant, pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    options = {"positions": "stretch", "shape_conditioning": True, "resolution": pipe.resolution}
    arguments = TokenizerArguments(output_dir="x", pretrained_tokenizer=str(tmp_path), **options)
    loaded, _ = load_tokenizer(arguments, None)
    encoder, decoder, vae = loaded.encoder, loaded.decoder, loaded.vae
    free = FlexTokPipeline(encoder.eval(), decoder.eval(), pipe.scheduler, vae=vae.eval())
    free.set_progress_bar_config(disable=True)
    recorded = load_file(variant / "goldens.safetensors")
    for name in ("token_ids", "codes"):  # of the official code, as before
        assert getattr(free.encoder(recorded["latents"]), name).equal(recorded[name])
    inputs = recorded["vel.t0.3.x"], torch.full((len(recorded["codes"]),), 0.3), recorded["codes"]
    assert free.decoder(*inputs).velocity.equal(pipe.decoder(*inputs).velocity)
    photo = Image.open(PHOTO).crop((0, 40, 256, 184))
    read = free.tokenize([photo], size="keep", return_dict=True)
    height, width = read.sizes[0]
    assert width > height
    assert free.detokenize(read.token_ids, height=height, width=width, **FAST).images[0].size == (width, height)
