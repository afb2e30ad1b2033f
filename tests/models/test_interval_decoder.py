"""A decoder of mean velocities: the same as the velocity decoder where the interval is empty, saved and checked."""

import pytest
import torch
from tiny_models import make_decoder

from flextok_hf.models.default_steps import check_default_steps, steps_for
from flextok_hf.models.modeling_decoder import FlexTokFlowDecoder


SIGMA, NEXT, SCALE = torch.tensor([0.9, 0.5]), torch.tensor([0.4, 0.0]), torch.tensor([1.5, 3.0])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def inputs():
    return torch.randn(2, 3, 16, 16, generator=seeded()), torch.rand(2, 4, 2, generator=seeded()) * 2 - 1


def settings_of(decoder):
    return {name: value for name, value in decoder.config.items() if not name.startswith("_")}


def make_interval_decoder(**changes):
    return make_decoder(**{"predicts": "mean_velocity", "interval_blocks": 1, "guidance_range": [1.0, 4.0], **changes})


@torch.no_grad()
@pytest.mark.parametrize(
    "settings", [{}, {"positions": "stretch", "shape_conditioning": True}], ids=["plain", "shape"]
)
def test_an_untrained_one_with_an_empty_interval_has_the_velocity_of_its_teacher_bit_for_bit(settings):
    teacher = make_decoder(**settings)
    changes = {"predicts": "mean_velocity", "interval_blocks": 1, "guidance_range": [1.0, 4.0]}
    student = FlexTokFlowDecoder(**{**settings_of(teacher), **changes}).eval()
    assert student.load_state_dict(teacher.state_dict(), strict=False).missing_keys == ["guidance_proj.weight"]
    noisy, codes = inputs()
    expected = teacher(noisy, SIGMA, codes).velocity
    for next_sigma in (SIGMA, None):
        velocity = student(noisy, SIGMA, codes, next_sigma=next_sigma, guidance_scale=SCALE).velocity
        assert velocity.equal(expected)
    assert not student(noisy, SIGMA, codes, next_sigma=NEXT, guidance_scale=SCALE).velocity.equal(expected)


@torch.no_grad()
def test_only_the_last_blocks_and_the_head_read_the_lower_noise_level():
    decoder = make_interval_decoder()
    both = [decoder.compute_modulation(SIGMA, None, lower, SCALE) for lower in (NEXT, NEXT / 2)]
    (first, *last), (other_first, *other_last) = map(decoder.split_modulation, both)
    assert first.equal(other_first)
    assert not any(one.equal(other) for one, other in zip(last, other_last, strict=True))


@torch.no_grad()
def test_modulation_computed_ahead_gives_the_same_mean_velocity():
    decoder = make_interval_decoder()
    noisy, codes = inputs()
    ahead = decoder.compute_modulation(SIGMA, noisy.shape, NEXT, SCALE)
    direct = decoder(noisy, SIGMA, codes, next_sigma=NEXT, guidance_scale=SCALE).velocity
    torch.testing.assert_close(decoder(noisy, None, codes, modulation=ahead).velocity, direct)
    shared = decoder.compute_modulation(SIGMA, None, NEXT, SCALE[:1])
    torch.testing.assert_close(shared[0], ahead[0])


@torch.no_grad()
def test_the_guidance_scale_matters():
    decoder = make_interval_decoder()
    noisy, codes = inputs()
    low, high = (decoder(noisy, SIGMA, codes, guidance_scale=torch.tensor([scale])).velocity for scale in (1.0, 4.0))
    assert (low - high).abs().max() > 1e-3


def test_settings_and_weights_survive_saving(tmp_path):
    decoder = make_interval_decoder(default_num_inference_steps={1: 4, 4: 2})
    decoder.save_pretrained(tmp_path)
    loaded = FlexTokFlowDecoder.from_pretrained(tmp_path)
    assert loaded.predicts_mean and loaded.config.interval_blocks == 1 and loaded.config.guidance_range == [1.0, 4.0]
    assert [steps_for(loaded.config.default_num_inference_steps, count) for count in (1, 3, 4, 6)] == [4, 4, 2, 2]
    noisy, codes = inputs()
    arguments = {"next_sigma": NEXT, "guidance_scale": SCALE}
    assert loaded(noisy, SIGMA, codes, **arguments).velocity.equal(decoder(noisy, SIGMA, codes, **arguments).velocity)


@pytest.mark.parametrize(
    "changes, name",
    [
        ({"predicts": "noise"}, "`predicts`"),
        ({"predicts": None}, "`predicts`"),
        ({"interval_blocks": 3}, "`interval_blocks`"),
        ({"interval_blocks": None}, "`interval_blocks`"),
        ({"interval_blocks": -1}, "`interval_blocks`"),
        ({"guidance_range": None}, "`guidance_range`"),
        ({"guidance_range": [4.0]}, "`guidance_range`"),
        ({"guidance_range": [4.0, 1.0]}, "`guidance_range`"),
        ({"guidance_range": [-1.0, 1.0]}, "`guidance_range`"),
        ({"predicts": "velocity"}, "`interval_blocks` and `guidance_range`"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(changes, name):
    with pytest.raises(ValueError, match=name):
        make_interval_decoder(**changes)


def test_each_kind_of_decoder_refuses_the_levels_of_the_other():
    noisy, codes = inputs()
    with pytest.raises(ValueError, match="`next_sigma` is for decoders that predict the mean velocity"):
        make_decoder()(noisy, SIGMA, codes, next_sigma=NEXT)
    with pytest.raises(ValueError, match="`guidance_scale` is for decoders that predict the mean velocity"):
        make_decoder().compute_modulation(SIGMA, guidance_scale=SCALE)
    with pytest.raises(TypeError, match="`guidance_scale` is missing"):
        make_interval_decoder()(noisy, SIGMA, codes)
    with pytest.raises(ValueError, match="`next_sigma` must have the shape"):
        make_interval_decoder()(noisy, SIGMA, codes, next_sigma=torch.zeros(3), guidance_scale=SCALE)


# Default numbers of steps


def test_an_entry_of_a_table_of_steps_holds_up_to_the_next():
    table = {2: 30, 8: 10}
    assert [steps_for(table, count) for count in (1, 2, 7, 8, 64)] == [30, 30, 30, 10, 10]
    assert steps_for(None, 5) == 20 and steps_for(4, 5) == 4


@pytest.mark.parametrize(
    "steps", [0, 1.5, "4", True, {}, {0: 4}, {"x": 4}, {1: 0}, {1: None}, [4], {1: 2, "1": 3}, 1001]
)
def test_default_steps_that_are_no_numbers_are_refused(steps):
    with pytest.raises(ValueError, match="`default_num_inference_steps` must be"):
        check_default_steps(steps)
    with pytest.raises(ValueError, match="`default_num_inference_steps` must be"):
        make_decoder(default_num_inference_steps=steps)
