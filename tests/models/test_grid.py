"""The 2D control: one token per patch, in raster order, added to the patches in the decoder."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tiny_models import CODEBOOK_SIZE, FSQ_LEVELS, SHAPES, make_decoder, make_encoder

from flextok_hf import FlexTokEncoder, FlexTokFlowDecoder, FlexTokPipeline
from flextok_hf.pipelines.length_groups import LengthGroups
from flextok_hf.training.arguments import TokenizerArguments
from flextok_hf.training.step_rng import StepRng
from flextok_hf.training.tokenizer import TokenizerForTraining, build_tokenizer


NUM_TOKENS = SHAPES["grid_size"] ** 2
GRID = {"token_layout": "grid", "num_registers": NUM_TOKENS}
SIGMA = torch.tensor([0.1, 0.5, 1.0])
LENGTHS = torch.tensor([0, 5, NUM_TOKENS])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


LATENTS = torch.randn(3, 3, 16, 16, generator=seeded(7))
CODES, OTHER_CODES = (torch.rand(3, NUM_TOKENS, len(FSQ_LEVELS), generator=seeded(seed)) * 2 - 1 for seed in (0, 1))


@pytest.fixture
def encoder():
    return make_encoder(**GRID)


@pytest.fixture(params=[True, False], ids=["nested dropout", "no mask token"])
def decoder(request):
    return make_decoder(**GRID, nested_dropout=request.param)


def velocity(decoder, latents, *args):
    with torch.no_grad():
        return decoder(latents, SIGMA, *args).velocity


@torch.no_grad()
def test_an_image_has_a_token_per_patch_and_can_stop_after_any_of_them(encoder):
    output = encoder(LATENTS)
    assert output.token_ids.shape == (3, NUM_TOKENS) and len(output.token_ids.unique()) > 1
    for length in (1, 7, NUM_TOKENS, NUM_TOKENS + 1):
        assert encoder(LATENTS, length).token_ids.equal(output.token_ids[:, :length])


@torch.no_grad()
def test_tokens_are_in_raster_order(encoder):
    """With the blocks removed, a token sees only its own patch."""
    encoder.blocks = torch.nn.ModuleList()
    changed = LATENTS.clone()
    changed[:, :, 4:8, 8:12] += 1  # second row, third column of 4 x 4 patches
    differs = (encoder(changed).features != encoder(LATENTS).features).any(dim=-1)
    assert differs.nonzero()[:, 1].tolist() == [6, 6, 6]


@torch.no_grad()
def test_every_token_sees_every_patch(encoder):
    changed = LATENTS.clone()
    changed[:, :, -1, -1] += 1
    differs = (encoder(changed).features - encoder(LATENTS).features).abs().amax(dim=-1)
    assert differs.gt(1e-6).all()


def test_a_grid_encoder_has_no_registers(encoder):
    assert not hasattr(encoder, "register_tokens")


def test_dropped_codes_do_not_matter_and_kept_ones_do(decoder):
    is_kept = (torch.arange(NUM_TOKENS) < LENGTHS[:, None])[..., None]
    expected = velocity(decoder, LATENTS, CODES, LENGTHS)
    assert velocity(decoder, LATENTS, torch.where(is_kept, CODES, OTHER_CODES), LENGTHS).equal(expected)
    changed = velocity(decoder, LATENTS, torch.where(is_kept, OTHER_CODES, CODES), LENGTHS)
    assert (changed - expected).abs().amax(dim=(1, 2, 3)).gt(1e-6).tolist() == [False, True, True]


@pytest.mark.parametrize("length", [1, 7, NUM_TOKENS])
def test_a_short_sequence_is_a_full_one_with_its_tail_dropped(decoder, length):
    short = velocity(decoder, LATENTS, CODES[:, :length])
    assert short.equal(velocity(decoder, LATENTS, CODES, torch.full((3,), length)))


def test_without_a_mask_token_missing_tokens_are_those_of_id_0(encoder):
    decoder = make_decoder(**GRID, nested_dropout=False)
    token_ids = torch.arange(NUM_TOKENS).expand(3, -1) % CODEBOOK_SIZE
    padded = torch.where(torch.arange(NUM_TOKENS) < LENGTHS[:, None], token_ids, 0)
    codes, padded_codes = encoder.quantizer.ids_to_codes(token_ids), encoder.quantizer.ids_to_codes(padded)
    assert velocity(decoder, LATENTS, codes, LENGTHS).equal(velocity(decoder, LATENTS, padded_codes))


def test_with_a_mask_token_missing_tokens_are_not_those_of_id_0(encoder):
    decoder = make_decoder(**GRID)
    padding = encoder.quantizer.ids_to_codes(torch.zeros(3, NUM_TOKENS, dtype=torch.int64))
    nothing = velocity(decoder, LATENTS, CODES, torch.zeros(3, dtype=torch.int64))
    assert not torch.allclose(nothing, velocity(decoder, LATENTS, padding))


def test_a_token_acts_at_its_own_patch(decoder):
    """With the blocks removed, changing a token changes only the velocity of its patch."""
    decoder.transformer_blocks = torch.nn.ModuleList()
    changed = CODES.clone()
    changed[:, 6] = OTHER_CODES[:, 6]
    differs = (velocity(decoder, LATENTS, changed) != velocity(decoder, LATENTS, CODES)).any(dim=1)
    inside = torch.zeros(16, 16, dtype=torch.bool)
    inside[4:8, 8:12] = True
    assert differs[:, ~inside].sum() == 0 and differs[:, inside].any(dim=1).all()


def test_the_unconditional_velocity_ignores_codes_and_their_number(decoder):
    all_rows = torch.ones(3, dtype=torch.bool)
    expected = velocity(decoder, LATENTS, CODES, None, all_rows)
    assert velocity(decoder, LATENTS, OTHER_CODES[:, :2], LENGTHS.clamp(max=2), all_rows).equal(expected)
    assert not torch.allclose(expected, velocity(decoder, LATENTS, CODES))


def test_a_batch_of_mixed_conditions_matches_single_images(decoder):
    ignored = torch.tensor([False, False, True])
    together = velocity(decoder, LATENTS, CODES, LENGTHS, ignored)
    for i in range(3):
        with torch.no_grad():
            row = [tensor[i : i + 1] for tensor in (LATENTS, SIGMA, CODES, LENGTHS, ignored)]
            torch.testing.assert_close(together[i : i + 1], decoder(*row).velocity, atol=1e-5, rtol=0)


@torch.no_grad()
def test_smaller_and_rectangular_images_have_fewer_tokens(encoder, decoder):
    latents = LATENTS[..., :8, :12]  # 2 x 3 patches
    codes = encoder(latents).codes
    assert codes.shape[1] == 6
    assert velocity(decoder, latents, codes).shape == latents.shape
    with pytest.raises(ValueError, match=r"`codes` has 7 tokens per image, but these latents have 6 patches"):
        velocity(decoder, latents, CODES[:, :7])


def test_saving_and_loading_changes_no_bit(encoder, decoder, tmp_path):
    encoder.save_pretrained(tmp_path / "encoder")
    decoder.save_pretrained(tmp_path / "decoder")
    loaded_encoder = FlexTokEncoder.from_pretrained(tmp_path / "encoder")
    loaded_decoder = FlexTokFlowDecoder.from_pretrained(tmp_path / "decoder")
    with torch.no_grad():
        assert loaded_encoder(LATENTS).features.equal(encoder(LATENTS).features)
    assert velocity(loaded_decoder, LATENTS, CODES, LENGTHS).equal(velocity(decoder, LATENTS, CODES, LENGTHS))


def test_gradient_checkpointing_changes_nothing():
    gradients = []
    for is_checkpointed in (False, True):
        decoder = make_decoder(**GRID).train()
        if is_checkpointed:
            decoder.enable_gradient_checkpointing()
        decoder(LATENTS, SIGMA, CODES, LENGTHS, torch.tensor([False, False, True])).velocity.square().sum().backward()
        gradients.append([parameter.grad for parameter in decoder.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain)


def test_a_training_step_reaches_every_weight(encoder):
    arguments = TokenizerArguments(output_dir="unused", null_condition_probability=0.5)
    model = TokenizerForTraining(encoder.train(), make_decoder(**GRID).train(), arguments)
    pixel_values = torch.rand(16, 3, 16, 16, generator=seeded()) * 2 - 1
    loss, _ = model({"pixel_values": pixel_values}, 0, StepRng(0))
    loss.backward()
    assert loss.isfinite()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


def test_a_pipeline_decodes_any_prefix_of_the_raster(encoder, decoder):
    pipe = FlexTokPipeline(encoder, decoder, FlowMatchEulerDiscreteScheduler())
    pipe.set_progress_bar_config(disable=True)
    image = torch.rand(3, 16, 16, generator=seeded())
    token_ids = pipe.tokenize(image)
    options = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "pt"}
    rows = pipe.reconstruct(image, [1, 6, NUM_TOKENS], generator=seeded(), **options)
    ragged = pipe.detokenize([token_ids[0, :6], token_ids[0]], generator=[seeded(), seeded()], **options).images
    assert token_ids.shape == (1, NUM_TOKENS)
    torch.testing.assert_close(torch.cat(rows[1:]), ragged, atol=1e-5, rtol=0)
    assert not torch.allclose(rows[0], rows[1])


def test_rows_of_all_lengths_share_a_call(decoder):
    everything = LengthGroups(decoder, CODES, LENGTHS, torch.tensor([False, False, True]))
    assert [group.rows.tolist() for group in everything.groups] == [[0, 2, 1]]


@pytest.mark.parametrize("make", [make_encoder, make_decoder])
@pytest.mark.parametrize(
    "values, message",
    [
        ({"token_layout": "circle"}, "`token_layout` must be one of registers, grid, got 'circle'"),
        ({"token_layout": "grid", "num_registers": 6}, "`num_registers` is 6, but a grid .* set it to 16"),
    ],
)
def test_an_invalid_layout_is_refused(make, values, message):
    with pytest.raises(Exception, match=message):
        make(**values)


def test_registers_without_nested_dropout_are_refused():
    with pytest.raises(ValueError, match="`nested_dropout` must be True for registers"):
        make_decoder(nested_dropout=False)


def test_a_grid_is_trained_by_specifying_its_layout():
    sizes = {"resolution": 16, "encoder_patch_size": 4, "decoder_patch_size": 4, "head_dim": 16}
    widths = {"encoder_hidden_size": 32, "decoder_hidden_size": 32, "encoder_num_layers": 1, "decoder_num_layers": 1}
    layout = {"token_layout": "grid", "num_registers": NUM_TOKENS, "fsq_levels": FSQ_LEVELS}
    arguments = TokenizerArguments(output_dir="unused", **sizes, **widths, **layout)
    trained_encoder, trained_decoder = build_tokenizer(arguments, None)
    assert trained_encoder.config.token_layout == trained_decoder.config.token_layout == "grid"
    assert trained_encoder(LATENTS).token_ids.shape == (3, NUM_TOKENS)
    with pytest.raises(ValueError, match="`token_layout` must be one of registers, grid, got 'circle'"):
        TokenizerArguments(output_dir="unused", token_layout="circle")
