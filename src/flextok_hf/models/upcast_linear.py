"""Training with frozen weights in half precision on CPUs without hardware for it.

PyTorch emulates such products several times slower than it computes in float32. Here a frozen weight is converted for
the duration of one product, forward and backward, so memory is that of half precision and time almost that of float32.
"""

from typing import Any

import torch
from torch import Tensor, nn

from .packed_linear import FEW_ROWS, UPCAST, is_emulated, multiply


def upcast_frozen(model: nn.Module) -> None:
    """Make the frozen linear layers of a model compute in float32 and round once, if half precision is emulated."""
    for layer in model.modules():
        if type(layer) is nn.Linear and layer.weight.device.type == "cpu" and not layer.weight.requires_grad:
            if is_emulated(layer.weight.dtype):
                layer.__class__ = UpcastLinear  # the same layer: hooks, names and what refers to it stay


class UpcastLinear(nn.Linear):
    """Linear layer with a frozen weight in half precision; products are computed in float32."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features), in the precision of the weight."""
        if hidden_states.numel() < FEW_ROWS * self.in_features:  # converting the weight would take longer
            return super().forward(hidden_states)
        return UpcastProduct.apply(hidden_states, self.weight, self.bias)


class UpcastProduct(torch.autograd.Function):
    """Product of states (..., D) with a frozen weight (E, D) in half precision; keeps no float32 copy of it."""

    @staticmethod
    def forward(ctx: Any, hidden_states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return (..., E) in the precision of the weight."""
        ctx.save_for_backward(weight)
        ctx.dtype = hidden_states.dtype
        with torch.autocast("cpu", enabled=False):
            return multiply(UPCAST, hidden_states, weight, bias).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        """Return the gradient of the states."""
        (weight,) = ctx.saved_tensors
        with torch.autocast("cpu", enabled=False):
            return (grad.float() @ weight.float()).to(ctx.dtype), None, None
