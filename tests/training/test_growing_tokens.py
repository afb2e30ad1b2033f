"""A tokenizer that starts from one with fewer tokens: what stays the same, what is new, and what is refused."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tiny_models import NUM_REGISTERS, make_decoder, make_encoder
from training_processes import SMALL_DATA

from flextok_hf.pipelines.pipeline_flextok import FlexTokPipeline
from flextok_hf.training.arguments import TokenizerArguments
from flextok_hf.training.stages import train_tokenizer
from flextok_hf.training.starting_points import load_tokenizer


GROWN = 16
SIGMA = torch.tensor([0.5, 0.9])


@pytest.fixture(params=["masked", "removed"])
def short(request, tmp_path):
    """Save a tokenizer that replaces dropped tokens or removes them, and return it with its folder."""
    decoder = make_decoder(remove_dropped=request.param == "removed")
    FlexTokPipeline(make_encoder(), decoder, FlowMatchEulerDiscreteScheduler()).save_pretrained(tmp_path / "short")
    return FlexTokPipeline.from_pretrained(tmp_path / "short"), str(tmp_path / "short")


def arguments_for(source, **options):
    options = {**SMALL_DATA, "num_registers": GROWN, "validation_steps": 0, "max_train_steps": 2, **options}
    return TokenizerArguments(pretrained_tokenizer=source, **{"output_dir": "x", "lr_warmup_steps": 1} | options)


def grow(source, **options):
    torch.manual_seed(0)
    return load_tokenizer(arguments_for(source, **options), None)


def images():
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


@torch.no_grad()
def test_the_first_tokens_of_an_image_stay_the_same(short):
    before, (pipe, arguments) = short[0], grow(short[1])
    assert pipe.num_registers == arguments.num_registers == GROWN
    expected, found = before.encoder(images()), pipe.encoder.eval()(images())
    assert found.token_ids.shape == (2, GROWN)
    assert found.token_ids[:, :NUM_REGISTERS].equal(expected.token_ids)
    torch.testing.assert_close(found.features[:, :NUM_REGISTERS], expected.features)
    assert pipe.encoder(images(), num_tokens=NUM_REGISTERS).features.equal(expected.features)


@torch.no_grad()
@pytest.mark.parametrize("kept", [0, 1, NUM_REGISTERS])
def test_a_decoder_that_removes_dropped_tokens_starts_with_the_same_images(short, kept):
    before, (pipe, _) = short[0], grow(short[1])
    codes = before.encoder(images()).codes[:, : max(kept, 1)]
    conditions = {"codes": codes, "num_tokens": torch.full((2,), kept)}
    velocities = [model.eval()(images(), SIGMA, **conditions).velocity for model in (before.decoder, pipe.decoder)]
    is_equal = torch.allclose(*velocities, atol=1e-5, rtol=1e-5)
    assert is_equal == before.decoder.config.remove_dropped  # otherwise there are more mask tokens to attend to


def test_new_tokens_begin_near_the_last_one_and_differ_from_each_other(short):
    before, (pipe, _) = short[0], grow(short[1])
    pairs = [
        (before.encoder.register_tokens, pipe.encoder.register_tokens),
        (before.decoder.register_positions, pipe.decoder.register_positions),
    ]
    for old, new in pairs:
        assert new[:NUM_REGISTERS].equal(old)
        nearest = torch.cdist(new[NUM_REGISTERS:], old).argmin(dim=1)
        assert (nearest == NUM_REGISTERS - 1).all()
        assert len(new.unique(dim=0)) == GROWN
    assert all(
        pipe.decoder.state_dict()[name].equal(old)
        for name, old in before.decoder.named_parameters()
        if name != "register_positions"
    )


@pytest.mark.parametrize("short", ["masked"], indirect=True)
def test_a_longer_tokenizer_trains_and_is_saved_with_its_length(short, tmp_path):
    folder = train_tokenizer(arguments_for(short[1], output_dir=str(tmp_path / "long")))
    pipe = FlexTokPipeline.from_pretrained(folder)
    assert pipe.tokenize(torch.rand(1, 3, 16, 16)).shape == (1, GROWN)


def test_without_a_number_the_length_of_the_model_stays(short):
    pipe, arguments = grow(short[1], num_registers=None)
    assert pipe.num_registers == arguments.num_registers == NUM_REGISTERS


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_registers": 4}, "`num_registers` is 4, but `pretrained_tokenizer` .* has 6: a tokenizer can only grow"),
        ({"freeze_encoder": True}, "`num_registers` is 16.* new registers have to be learned.*`freeze_encoder`"),
        ({"lora_rank": 2, "lora_targets": ["encoder"]}, "`num_registers` is 16.*`lora_rank`"),
    ],
)
@pytest.mark.parametrize("short", ["masked"], indirect=True)
def test_what_cannot_grow_is_refused(short, options, message):
    with pytest.raises(ValueError, match=message):
        grow(short[1], **options)


def test_a_grid_cannot_grow(tmp_path):
    grid = {"token_layout": "grid", "num_registers": 16}
    parts = make_encoder(**grid), make_decoder(**grid), FlowMatchEulerDiscreteScheduler()
    FlexTokPipeline(*parts).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`num_registers` is 25, .* one for each patch of its grid"):
        grow(str(tmp_path), num_registers=25)
