"""The loss of stage 1: what it learns from, and what decides its randomness."""

import pytest
import torch
from conftest import NUM_REGISTERS, make_decoder, make_encoder

from flextok_hf.length_groups import LengthGroups
from flextok_hf.training.arguments import TokenizerArguments
from flextok_hf.training.tokenizer import TokenizerForTraining, count_distinct, spread_penalty


BATCH_SIZE = 16


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def make_model(**options):
    """Make a model in training of which no layer is left at zero, so that gradients pass everywhere."""
    arguments = TokenizerArguments(output_dir="unused", null_condition_probability=0.3, **options)
    return TokenizerForTraining(make_encoder(), make_decoder(), arguments).train()


def batch(size=BATCH_SIZE):
    return {"pixel_values": torch.rand(size, 3, 16, 16, generator=seeded(1)) * 2 - 1}


@pytest.mark.parametrize("options", [{}, {"unrounded_probability": 0.5, "feature_penalty": 0.1}])
def test_every_parameter_receives_a_gradient(options):
    model = make_model(full_length_probability=0.3, **options)
    loss, _ = model(batch(), 0, seeded())
    loss.backward()
    without = [name for name, tensor in model.named_parameters() if tensor.grad is None or not tensor.grad.any()]
    assert without == []
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_the_same_generator_gives_the_same_loss():
    model = make_model()
    before = torch.get_rng_state()
    losses = [model(batch(), 0, seeded(seed))[0].item() for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]
    assert torch.get_rng_state().equal(before)


def test_dropped_tokens_teach_the_encoder_nothing():
    model = make_model(keep_mode="uniform")
    draws = model.draw(BATCH_SIZE, 0, seeded())
    model.draw = lambda *_: (draws[0], torch.full((BATCH_SIZE,), 2), torch.zeros_like(draws[2]), draws[3])
    model(batch(), 0, seeded())[0].backward()
    gradient = model.encoder.register_tokens.grad
    assert gradient[:2].any(dim=1).all() and not gradient[2:].any()


def test_the_draws_follow_the_options():
    model = make_model(keep_mode="powers_of_two", full_length_probability=1.0)
    sigma, num_tokens, is_unconditional, is_rounded = model.draw(4000, 0, seeded())
    assert num_tokens.eq(NUM_REGISTERS).all() and is_rounded.all()
    assert abs(is_unconditional.float().mean() - 0.3) < 0.03
    assert sigma.min() > 0 and sigma.max() < 1


def test_the_aids_against_collapse_fade_out():
    model = make_model(unrounded_probability=1.0, max_train_steps=100)
    shares = [model.draw(4000, step, seeded())[3].float().mean().item() for step in (0, 20, 40, 99)]
    assert shares == pytest.approx([0, 0.5, 1, 1], abs=0.03)


def test_a_perfect_velocity_has_no_loss(monkeypatch):
    model = make_model()
    pixel_values = batch()["pixel_values"]
    noise = torch.randn(pixel_values.shape, generator=seeded())
    monkeypatch.setattr(LengthGroups, "predict_velocity", lambda *_: noise - pixel_values)
    assert model(batch(), 0, seeded())[0] == 0


def test_the_spread_penalty_grows_when_features_collapse_or_drift():
    spread = torch.randn(1000, 2, 3, generator=seeded())
    spread = (spread - spread.mean(0)) / spread.std(0, unbiased=False)
    collapsed, drifted = torch.zeros_like(spread), spread + 2
    assert spread_penalty(spread) < 1e-6
    assert spread_penalty(collapsed) == 1 and spread_penalty(drifted) == pytest.approx(4, abs=1e-3)


def test_distinct_ids_are_counted_per_position():
    assert count_distinct(torch.tensor([[1, 5], [1, 6], [1, 7], [1, 5]])) == 2
