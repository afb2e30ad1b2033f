"""Packed weights: the same results, only inside a `with` block, and only where they can be used."""

import threading

import pytest
import torch
from torch import nn

from flextok_hf.models import packed_linear
from flextok_hf.models.packed_linear import (
    ONEDNN,
    PACKED,
    PADDED,
    UPCAST,
    PackedWeights,
    is_emulated,
    is_offloaded,
    linear,
    packed_weights,
)
from flextok_hf.utils import tuning
from flextok_hf.utils.flops import FlopCounter


HAS_KERNELS = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
needs_kernels = pytest.mark.skipif(not HAS_KERNELS, reason="this build has no kernels for packed weights")
WAYS = (tuning.LIBRARY, ONEDNN, UPCAST, PACKED, PADDED)


@pytest.fixture(autouse=True)
def packing(take):
    take("product", PACKED)


class TwoLayers(nn.Sequential):
    def forward(self, inputs):
        return linear(self[1], nn.functional.silu(linear(self[0], inputs)))


def make_model(bias=False, dtype=torch.float32):
    torch.manual_seed(0)
    return TwoLayers(nn.Linear(24, 40, bias), nn.Linear(40, 17, bias)).to(dtype)


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def is_packed(layer, inputs):
    with packed_weights(layer, num_calls=100), torch.no_grad(), torch.profiler.profile() as profile:
        linear(layer, inputs)
    return "mkldnn::_reorder_linear_weight" in {event.name for event in profile.events()}


@needs_kernels
@pytest.mark.parametrize("shape", [(24,), (1, 24), (2, 24), (2, 1, 24), (3, 5, 24), (2, 70, 24), (0, 24)])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_every_way_gives_the_same_for_any_number_of_rows(shape, way, bias, take):
    model, inputs = make_model(bias), random(*shape)
    expected = model(inputs)
    take("product", way)
    with packed_weights(model, num_calls=100):
        actual = model(inputs)
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(model(inputs), expected, atol=1e-5, rtol=0)  # outside the loop


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("num_rows", [1, 3, 40])
@torch.no_grad()
def test_half_precision_is_rounded_once(dtype, way, num_rows, take):
    layer, inputs = make_model(bias=True, dtype=dtype)[0], random(num_rows, 24).to(dtype)
    exact = nn.functional.linear(*(tensor.float() for tensor in (inputs, layer.weight, layer.bias)))
    take("product", way)
    with packed_weights(layer, num_calls=100):
        actual = linear(layer, inputs)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.float(), exact, atol=1e-3, rtol=2**-7)


@needs_kernels
@torch.no_grad()
def test_operations_are_counted_whatever_the_way(take):
    layer = nn.Linear(512, 300)
    for way in WAYS:
        take("product", way)
        with FlopCounter() as counter, packed_weights(layer, num_calls=100):
            linear(layer, random(2, 20, 512))
        assert counter.total == 2 * 40 * 512 * 300


@needs_kernels
def test_weights_are_packed_only_where_that_is_possible(monkeypatch):
    layer, inputs = make_model()[0], random(3, 24)
    assert is_packed(layer, inputs)
    assert not is_packed(layer.double(), inputs.double())
    layer.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_packed(layer, inputs)
    monkeypatch.setattr(packed_linear, "MAX_SHARE_OF_MEMORY", 1e-9)
    assert not is_packed(layer, inputs)


@torch.no_grad()
def test_nothing_else_is_done_than_the_library_does_with_tuning_off(monkeypatch):
    monkeypatch.setenv("FLEXTOK_TUNING", "off")
    layer, inputs = make_model()[0], random(20, 24)
    assert not is_packed(layer, inputs)
    assert linear(layer, inputs).equal(layer(inputs))


@torch.no_grad()
def test_emulated_precision_is_avoided_without_a_loop(take):
    if not is_emulated(torch.float16):
        pytest.skip("this machine computes float16 in hardware")
    take("product", None)
    layer, inputs = make_model(dtype=torch.float16)[0], random(20, 24).half()
    exact = inputs.float() @ layer.weight.float().T
    assert linear(layer, inputs).equal(exact.half())


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
    weights = PackedWeights(model, num_calls=100)
    with weights.in_use():
        torch.testing.assert_close(model(inputs), expected, atol=1e-5, rtol=1e-5)
    assert model[0] not in weights.weights


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
@torch.no_grad()
def test_packed_weights_end_with_their_block_even_after_an_error():
    model, inputs = make_model(), random(2, 24)
    with pytest.raises(KeyError), packed_weights(model, num_calls=100):
        model(inputs)
        raise KeyError
    model[0].weight.zero_()
    with packed_weights(model, num_calls=100):
        assert not linear(model[0], inputs).any()
    assert not linear(model[0], inputs).any()
    assert not packed_linear.packed_elsewhere


@needs_kernels
@torch.no_grad()
def test_weights_that_change_within_a_loop_are_packed_again():
    model, inputs = make_model(), random(2, 24)
    with packed_weights(model, num_calls=100):
        before = linear(model[0], inputs)
        model[0].weight.mul_(2)
        torch.testing.assert_close(linear(model[0], inputs), 2 * before, atol=1e-5, rtol=0)
        model[0].weight = nn.Parameter(torch.zeros(40, 24))
        assert not linear(model[0], inputs).any()


@needs_kernels
def test_weights_made_in_inference_mode_are_packed():
    with torch.inference_mode():
        model, inputs = make_model(), random(2, 24)
        expected = model(inputs)
        with packed_weights(model, num_calls=100):
            torch.testing.assert_close(model(inputs), expected, atol=1e-5, rtol=0)


@needs_kernels
@torch.no_grad()
def test_a_loop_that_another_thread_closes_ends_where_it_began():
    model, inputs = make_model(), random(2, 24)

    def loop():
        with packed_weights(model, num_calls=100):
            yield model(inputs)

    suspended = loop()
    next(suspended)
    thread = threading.Thread(target=suspended.close)
    thread.start()
    thread.join()
    model[0].weight.zero_()
    assert not linear(model[0], inputs).any()


@needs_kernels
@torch.no_grad()
def test_long_loops_time_what_is_not_known_and_short_ones_do_not(take, monkeypatch):
    take("product", None)
    model, inputs = make_model(), random(2, 24)
    with packed_weights(model, num_calls=100):
        model(inputs)
    assert not tuning.measured
    with packed_weights(model, num_calls=1000):
        model(inputs)
    (times,) = tuning.measured.values()
    assert len(times) == 2  # one for each shape
    assert all({tuning.LIBRARY, ONEDNN, PACKED, PADDED, tuning.PACKING} == ways.keys() for ways in times.values())
    monkeypatch.setattr(packed_linear, "time_ways", lambda *_: pytest.fail("timed again"))
    with packed_weights(model, num_calls=1000):
        model(inputs)


@needs_kernels
@pytest.mark.parametrize(("num_calls", "way"), [(10, tuning.LIBRARY), (1000, PACKED)])
@torch.no_grad()
def test_packing_must_pay_off_within_the_loop(num_calls, way, take):
    take("product", None)
    layer, inputs = make_model()[0], random(5, 24)
    times = {tuning.LIBRARY: 1.0, ONEDNN: 1.5, PACKED: 0.8, tuning.PACKING: 10.0}
    tuning.measured[tuning.machine()] = {packed_linear.product_name(layer, inputs): times}
    loop = PackedWeights(layer, num_calls)
    assert loop.way(layer, inputs) == way
