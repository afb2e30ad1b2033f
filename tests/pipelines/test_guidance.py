import pytest
import torch

from flextok_hf.pipelines.guidance import Guidance, clip_norm, remove_projection


@pytest.mark.parametrize("method", ["cfg", "apg"])
def test_a_scale_of_one_is_the_conditional_velocity(method):
    conditional, unconditional = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)

    torch.testing.assert_close(Guidance(method)(conditional, unconditional, 1.0), conditional)


def test_classifier_free_guidance_extrapolates():
    conditional, unconditional = torch.full((1, 1, 2, 2), 3.0), torch.full((1, 1, 2, 2), 1.0)

    assert (Guidance("cfg")(conditional, unconditional, 2.5) == 1 + 2.5 * 2).all()


def test_the_projected_update_is_orthogonal_to_the_conditional_velocity():
    update, direction = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)

    product = (remove_projection(update, direction) * direction).sum(dim=(1, 2, 3))

    torch.testing.assert_close(product, torch.zeros(3), atol=1e-4, rtol=0)


def test_long_updates_are_clipped_and_short_ones_kept():
    long, short = torch.full((1, 1, 10, 10), 1.0), torch.full((1, 1, 10, 10), 0.01)

    clipped = clip_norm(torch.cat([long, short]), 2.5)

    assert clipped[0].norm().item() == pytest.approx(2.5, rel=1e-5)
    assert torch.equal(clipped[1:], short)


def test_equal_velocities_give_no_update_and_no_nan():
    velocity = torch.randn(1, 2, 4, 4)

    torch.testing.assert_close(Guidance("apg")(velocity, velocity.clone(), 7.5), velocity)


def test_momentum_makes_the_second_step_differ_from_the_first():
    conditional = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    unconditional = conditional + torch.linspace(-0.1, 0.1, 32).view(1, 2, 4, 4)  # too short to be clipped
    guide = Guidance("apg")

    first, second = (guide(conditional, unconditional, 3.0) for _ in range(2))

    torch.testing.assert_close(second - conditional, (first - conditional) / 2, atol=1e-6, rtol=0)


def test_samples_of_a_batch_do_not_mix():
    conditional, unconditional = torch.randn(4, 2, 4, 4), torch.randn(4, 2, 4, 4)

    together = Guidance("apg")(conditional, unconditional, 7.5)
    alone = Guidance("apg")(conditional[2:3], unconditional[2:3], 7.5)

    torch.testing.assert_close(together[2:3], alone)


def test_an_unknown_method_is_named_in_the_error():
    with pytest.raises(ValueError, match="`guidance`.*'cgf'"):
        Guidance("cgf")
