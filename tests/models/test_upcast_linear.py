"""Frozen weights in half precision on CPUs that emulate it: what is computed in float32, and that the rest stays."""

import pytest
import torch
from torch import nn

from flextok_hf.models import upcast_linear
from flextok_hf.models.upcast_linear import UpcastLinear, upcast_frozen


def frozen_layer(monkeypatch, emulated, dtype=torch.bfloat16):
    monkeypatch.setattr(upcast_linear, "is_emulated", lambda dtype: emulated and dtype == torch.bfloat16)
    torch.manual_seed(0)
    layer = nn.Linear(32, 24).to(dtype).requires_grad_(False)
    upcast_frozen(layer)
    return layer


@pytest.mark.parametrize("rows", [1, 40])
def test_products_and_gradients_are_those_of_float32_rounded_once(monkeypatch, rows):
    layer = frozen_layer(monkeypatch, emulated=True)
    assert type(layer) is UpcastLinear
    states = torch.randn(2, rows, 32).bfloat16().requires_grad_()
    grad = torch.randn(2, rows, 24).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(states)
    output.backward(grad)
    exact = states.detach().float() @ layer.weight.float().mT + layer.bias.float()
    assert output.dtype == states.grad.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), exact, rtol=2**-8, atol=1e-3)
    torch.testing.assert_close(states.grad.float(), grad.float() @ layer.weight.float(), rtol=2**-8, atol=1e-2)


def test_no_float32_copy_of_the_weight_is_kept_for_the_backward_pass(monkeypatch):
    layer, kept = frozen_layer(monkeypatch, emulated=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(torch.randn(40, 32, requires_grad=True))
    assert [tensor.data_ptr() for tensor in kept] == [layer.weight.data_ptr()]


def test_layers_stay_where_half_precision_is_fast_or_weights_are_trained(monkeypatch):
    assert type(frozen_layer(monkeypatch, emulated=False)) is nn.Linear
    assert type(frozen_layer(monkeypatch, emulated=True, dtype=torch.float32)) is nn.Linear
    trained = frozen_layer(monkeypatch, emulated=False).requires_grad_(True)
    monkeypatch.setattr(upcast_linear, "is_emulated", lambda dtype: True)
    upcast_frozen(trained)
    assert type(trained) is nn.Linear
