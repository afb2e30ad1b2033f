"""FLOPs of PyTorch code, counted while it runs."""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class FlopCounter(TorchDispatchMode):
    """Context manager that counts the FLOPs of matmuls, convolutions and attention, with and without gradients.

    Attributes:
        trained: FLOPs of operations with gradients enabled.
        frozen: FLOPs of operations under `torch.no_grad`.
    """

    def __init__(self):
        super().__init__()
        self.trained = 0
        self.frozen = 0
        aten = torch.ops.aten
        # PyTorch's registry lacks the CPU attention kernel, which takes the same arguments as the others, and the
        # linear layers that oneDNN computes.
        attention = flop_registry[aten._scaled_dot_product_flash_attention]
        self.formulas = flop_registry | {aten._scaled_dot_product_flash_attention_for_cpu: attention}
        if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
            self.formulas[torch.ops.mkldnn._linear_pointwise] = linear_flops

    @property
    def total(self) -> int:
        """All FLOPs so far."""
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


def linear_flops(rows: Tensor, *args, out_val: Tensor, **kwargs) -> int:
    """Return the FLOPs of a linear layer on rows (..., in_features)."""
    return 2 * rows.numel() * out_val.shape[-1]
