import pytest
import torch

from flextok_hf.models.quantizer import FiniteScalarQuantizer


@pytest.mark.parametrize("levels", [(8, 8, 8, 5, 5, 5), (8, 5, 5, 5), (7, 5), (2, 2), (27, 3), (26, 31)])
def test_every_token_id_survives_a_round_trip(levels):
    quantizer = FiniteScalarQuantizer(levels)
    token_ids = torch.arange(quantizer.codebook_size)

    codes = quantizer.ids_to_codes(token_ids)

    assert codes.abs().max() <= 1
    assert torch.equal(quantizer.codes_to_ids(codes), token_ids)


@pytest.mark.parametrize("levels", [(8, 5), (27, 3), (2, 2)])
def test_every_level_is_reached_by_finite_features(levels):
    quantizer = FiniteScalarQuantizer(levels)
    features = torch.linspace(-12, 12, 4001)[:, None].expand(-1, len(levels))

    codes = quantizer(features)

    assert [len(codes[:, dim].unique()) for dim in range(len(levels))] == list(levels)


def test_gradients_pass_straight_through_rounding():
    quantizer = FiniteScalarQuantizer((8, 5))
    features = torch.randn(3, 4, 2, requires_grad=True)
    expected = torch.autograd.grad((quantizer.bound(features) / torch.tensor([4, 2])).sum(), features)[0]

    actual = torch.autograd.grad(quantizer(features).sum(), features)[0]

    torch.testing.assert_close(actual, expected)


def test_only_samples_marked_as_rounded_are_rounded():
    quantizer = FiniteScalarQuantizer((8, 5))
    features = torch.randn(2, 4, 2)

    codes = quantizer(features, is_rounded=torch.tensor([True, False]))

    assert torch.equal(codes[0], quantizer(features)[0])
    torch.testing.assert_close(codes[1], quantizer.bound(features)[1] / torch.tensor([4.0, 2.0]))


def test_half_precision_features_are_quantized_in_float32():
    quantizer = FiniteScalarQuantizer((8, 5))
    features = torch.randn(2, 4, 2).bfloat16()

    assert torch.equal(quantizer(features), quantizer(features.float()))


def test_it_holds_no_tensors_that_a_checkpoint_could_lose():
    assert not FiniteScalarQuantizer((8, 5)).state_dict() and not list(FiniteScalarQuantizer((8, 5)).buffers())


@pytest.mark.parametrize("levels", [(), (8, 1)])
def test_invalid_levels_are_refused(levels):
    with pytest.raises(ValueError, match="`levels`"):
        FiniteScalarQuantizer(levels)
