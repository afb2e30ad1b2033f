"""Floating-point operations of PyTorch code, counted while it runs."""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class FlopCounter(TorchDispatchMode):
    """Context that counts the operations of products, convolutions and attention, with and without a gradient.

    Attributes:
        trained: operations that a backward pass will go through.
        frozen: operations under `torch.no_grad`.
    """

    def __init__(self):
        super().__init__()
        self.trained = 0
        self.frozen = 0
        aten = torch.ops.aten
        # PyTorch's own table lacks the attention kernel of the CPU, whose arguments are those of the others, and the
        # products that oneDNN computes.
        attention = flop_registry[aten._scaled_dot_product_flash_attention]
        self.formulas = flop_registry | {aten._scaled_dot_product_flash_attention_for_cpu: attention}
        if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
            self.formulas[torch.ops.mkldnn._linear_pointwise] = count_product

    @property
    def total(self) -> int:
        """All operations so far."""
        return self.trained + self.frozen

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        formula = self.formulas.get(func.overloadpacket)
        if formula is not None:
            flops = formula(*args, **(kwargs or {}), out_val=outputs)
            if torch.is_grad_enabled():
                self.trained += flops
            else:
                self.frozen += flops
        return outputs


def count_product(rows: Tensor, *args, out_val: Tensor, **kwargs) -> int:
    """Operations of a linear layer on rows (..., in_features)."""
    return 2 * rows.numel() * out_val.shape[-1]
