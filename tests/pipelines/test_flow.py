import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from flextok_hf.pipelines.flow import add_noise, euler_sigmas, sample_sigma, set_noise_levels, velocity_target


def test_the_path_starts_at_the_data_and_ends_in_noise():
    latents, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)

    assert torch.equal(add_noise(latents, noise, torch.zeros(2)), latents)
    assert torch.equal(add_noise(latents, noise, torch.ones(2)), noise)


def test_following_the_true_velocity_backwards_recovers_the_data():
    latents, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    state = noise.clone()
    for _ in euler_sigmas(7):
        state = state - velocity_target(latents, noise) / 7

    torch.testing.assert_close(state, latents)


def test_euler_levels_are_uniform_from_one_and_never_zero():
    assert euler_sigmas(4) == [1.0, 0.75, 0.5, 0.25]


@pytest.mark.parametrize("distribution", ["logit_normal", "mode", "uniform"])
@pytest.mark.parametrize("is_stratified", [False, True])
def test_noise_levels_lie_between_data_and_noise(distribution, is_stratified):
    sigma = sample_sigma(1000, distribution, is_stratified=is_stratified, generator=torch.Generator().manual_seed(0))

    assert sigma.shape == (1000,) and sigma.min() >= 0 and sigma.max() <= 1
    assert sigma.mean() == pytest.approx(0.5, abs=0.05)


def test_a_positive_logit_mean_is_noisier():
    noisy = sample_sigma(1000, logit_mean=2.0, generator=torch.Generator().manual_seed(0))

    assert noisy.median() == pytest.approx(torch.sigmoid(torch.tensor(2.0)).item(), abs=0.03)


def test_stratified_draws_fill_every_part_of_the_range_once():
    sigma = sample_sigma(10, "uniform", is_stratified=True, generator=torch.Generator().manual_seed(0))

    assert (sigma * 10).long().sort().values.tolist() == list(range(10))


def test_an_unknown_distribution_is_named_in_the_error():
    with pytest.raises(ValueError, match="`distribution`.*'normal'"):
        sample_sigma(4, "normal")


@pytest.mark.parametrize("settings", [{"shift_terminal": 3.0}, {"shift": -3.0}, {"shift": float("nan")}])
def test_a_scheduler_whose_noise_levels_do_not_fall_is_refused(settings):
    scheduler = FlowMatchEulerDiscreteScheduler(**settings)
    with pytest.raises(ValueError, match="noise levels of the `scheduler` must fall"):
        set_noise_levels(scheduler, 4, torch.device("cpu"))
