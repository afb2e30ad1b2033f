"""Packed weights: the same results, only inside a `with` block, and only where they can be used."""

import pytest
import torch
from torch import nn

from flextok_hf.models import packed_linear
from flextok_hf.models.packed_linear import (
    can_pack,
    is_faster_in_onednn,
    is_offloaded,
    linear,
    packable,
    packed_weights,
)
from flextok_hf.utils.flops import FlopCounter


CAN_PACK = can_pack([torch.zeros(1, 1)])
needs_kernels = pytest.mark.skipif(not CAN_PACK, reason="this build or machine has no kernels for packed weights")


class TwoLayers(nn.Sequential):
    def forward(self, inputs):
        return linear(self[1], nn.functional.silu(linear(self[0], inputs)))


def make_model(bias=False, dtype=torch.float32):
    torch.manual_seed(0)
    return TwoLayers(packable(24, 40, bias), packable(40, 17, bias)).to(dtype)


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@needs_kernels
@pytest.mark.parametrize("shape", [(24,), (1, 24), (2, 24), (2, 1, 24), (3, 5, 24), (2, 70, 24)])
@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_results_are_the_same_for_any_number_of_rows(shape, bias):
    model, inputs = make_model(bias), random(*shape)
    expected = model(inputs)
    with packed_weights(model, num_calls=100):
        assert all(layer.packed_weights for layer in model)
        actual = model(inputs)
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


@needs_kernels
def test_results_in_half_precision_are_rounded_once(monkeypatch):
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this machine has no kernels for bfloat16")
    layer, inputs = make_model(dtype=torch.bfloat16)[0], random(3, 24).bfloat16()
    with packed_weights(layer, num_calls=100), torch.no_grad():
        assert layer.packed_weights
        exact = inputs.float() @ layer.weight.float().T
        torch.testing.assert_close(linear(layer, inputs).float(), exact, atol=0, rtol=2**-7)


@needs_kernels
@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_large_matmuls_give_the_same_without_packing(bias):
    layer = packable(512, 300, bias)
    inputs = random(2, 20, 512)
    with torch.profiler.profile() as profile, FlopCounter() as counter:
        linear(layer, inputs)
    assert "mkldnn::_linear_pointwise" in {event.name for event in profile.events()}
    assert counter.total == 2 * 40 * 512 * 300
    torch.testing.assert_close(linear(layer, inputs), nn.functional.linear(inputs, layer.weight, layer.bias))


@torch.no_grad()
def test_onednn_is_not_used_where_it_does_not_apply(monkeypatch):
    layer, inputs = packable(512, 300), random(20, 512)
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_faster_in_onednn(layer, inputs)
        assert linear(layer, inputs).dtype == torch.bfloat16
    assert not is_faster_in_onednn(layer, inputs.double())
    assert not is_faster_in_onednn(packable(24, 40), random(20, 24))  # too small
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not is_faster_in_onednn(layer, inputs)


class OtherWeight(torch.Tensor):
    """A tensor subclass, as quantizers put in the place of weights."""


def with_hook(model):
    model[0].register_forward_hook(lambda module, inputs, output: 2 * output)


def with_other_weight(model):
    model[0].weight = nn.Parameter(model[0].weight.detach().as_subclass(OtherWeight))


def with_other_forward(model):
    model[0].forward = lambda inputs: inputs.sum(-1, keepdim=True).expand(*inputs.shape[:-1], 40)


def with_other_layer(model):
    model[0] = nn.Bilinear(1, 1, 1)
    model[0].forward = lambda inputs: inputs.new_ones(*inputs.shape[:-1], 40)


@pytest.mark.parametrize("change", [with_hook, with_other_weight, with_other_forward, with_other_layer])
@torch.no_grad()
def test_layers_that_others_changed_are_called_as_they_are(change):
    model, inputs = make_model(), random(20, 24)
    change(model)
    expected = model[1](nn.functional.silu(model[0](inputs)))
    with packed_weights(model, num_calls=100):
        assert not getattr(model[0], "packed_weights", None)
        torch.testing.assert_close(model(inputs), expected, atol=1e-5, rtol=1e-5)


def test_quantizers_find_plain_linear_layers(tiny_pipeline):
    parts = (tiny_pipeline.encoder, tiny_pipeline.decoder, tiny_pipeline.prior)
    layers = [module for part in parts for module in part.modules() if isinstance(module, nn.Linear)]
    assert layers and {type(layer) for layer in layers} == {nn.Linear}


def test_group_offloading_is_detected(tiny_decoder):
    assert not is_offloaded(tiny_decoder)
    tiny_decoder.enable_group_offload(torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)
    assert is_offloaded(tiny_decoder)


@needs_kernels
def test_gradients_are_the_same_while_weights_are_packed():
    model, inputs = make_model(), random(3, 24)
    model(inputs).square().sum().backward()
    expected = model[0].weight.grad.clone()
    model.zero_grad()
    with packed_weights(model, num_calls=100):
        model(inputs).square().sum().backward()
    assert model[0].weight.grad.equal(expected)


@needs_kernels
def test_packed_weights_end_with_their_block_even_after_an_error():
    model = make_model()
    names = set(model.state_dict())
    with pytest.raises(KeyError), packed_weights(model, num_calls=100):
        assert set(model.state_dict()) == names
        raise KeyError
    assert not model[0].packed_weights
    with torch.no_grad():
        model[0].weight.zero_()
        assert not linear(model[0], random(2, 24)).any()


@needs_kernels
def test_nothing_is_packed_where_it_is_not_worth_it_or_not_possible(monkeypatch):
    def is_packed(model, num_calls=100):
        with packed_weights(model, num_calls):
            return any(layer.packed_weights for layer in model)

    assert is_packed(make_model())
    assert not is_packed(make_model(), num_calls=packed_linear.MIN_CALLS - 1)
    assert not is_packed(make_model(dtype=torch.float64))
    assert not is_packed(make_model().to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_packed(make_model())
    monkeypatch.setattr(packed_linear, "MAX_SHARE_OF_MEMORY", 1e-9)
    assert not is_packed(make_model())
