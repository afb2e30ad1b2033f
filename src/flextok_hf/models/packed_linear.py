"""Faster linear layers on CPUs: oneDNN kernels, and in loops, weights packed in the layout that these kernels read.

PyTorch runs float32 matmuls with another library, which takes a fifth longer for hundreds of rows. A step of the prior
multiplies a few rows by every weight, so it is bound by reading the weights; the default matmul reaches half of the
memory bandwidth or less. Results are the same up to summation order.
"""

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from threading import get_ident

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn


MIN_SIZE, MIN_ROWS_UNPACKED = 2**17, 16  # of weight and input; below, calling oneDNN costs more than it saves
MIN_CALLS = 8  # packing a weight takes as long as a few matmuls
MIN_ROWS = 4  # the kernels for 1 to 3 rows are slower than the one for 4
USUAL_ROWS = 64  # a hint to oneDNN that matters little
IS_X86 = platform.machine() in ("x86_64", "AMD64")
MAX_SHARE_OF_MEMORY = 0.25  # of total RAM; packed weights are held in addition to the model's own


def packable(in_features: int, out_features: int, bias: bool = False) -> nn.Linear:
    """Make a plain `nn.Linear` that `linear` calls, so that its weight may be packed."""
    layer = nn.Linear(in_features, out_features, bias=bias)
    layer.packed_weights = {}  # type: ignore[assignment]  # thread -> weight; not a buffer: lasts only for a loop
    return layer


def linear(layer: nn.Module, hidden_states: Tensor) -> Tensor:
    """Call a layer on (..., in_features), by a faster kernel where that is the same; all large layers are called here.

    Only a plain `nn.Linear` on a CPU takes another way. What gradients, compilers, hooks, quantizers and adapters need
    is their own: quantizers look for exactly this class, and whatever they put in its place is called as it is.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or not is_plain(layer):
        return layer(hidden_states)
    rows = hidden_states.reshape(-1, hidden_states.shape[-1])
    num_rows, packed = rows.shape[0], getattr(layer, "packed_weights", None)  # a layer put in place of ours has none
    weight = packed.get(get_ident()) if packed else None
    if weight is None:
        if not (num_rows >= MIN_ROWS_UNPACKED and is_faster_in_onednn(layer, hidden_states)):
            return layer(hidden_states)
        weight = layer.weight
    elif num_rows < MIN_ROWS:
        rows = F.pad(rows, (0, 0, 0, MIN_ROWS - num_rows))
    product = torch.ops.mkldnn._linear_pointwise(rows, weight, layer.bias, "none", [], "")
    return product[:num_rows].view(*hidden_states.shape[:-1], -1)


def is_plain(layer: nn.Linear) -> bool:
    """Whether a layer multiplies by a plain weight and nothing else happens: no hooks, no tensor subclass."""
    if type(layer) is not nn.Linear or type(layer.weight) is not nn.Parameter or "forward" in layer.__dict__:
        return False
    return not (layer._forward_hooks or layer._forward_pre_hooks or hasattr(layer, "_diffusers_hook"))


def is_faster_in_onednn(layer: nn.Linear, hidden_states: Tensor) -> bool:
    """Whether oneDNN supports the unpacked weight and is faster; PyTorch uses it for half precision anyway."""
    if layer.weight.numel() < MIN_SIZE or hidden_states.device.type != "cpu":
        return False
    is_float32 = layer.weight.dtype == hidden_states.dtype == torch.float32
    return is_float32 and has_kernels() and not torch.is_autocast_enabled("cpu")


@contextmanager
def packed_weights(model: nn.Module, num_calls: int) -> Iterator[None]:
    """Pack the weights of `model` for a `with` block, if it is worth it and the machine has the kernels.

    Args:
        model: its plain `packable` layers are packed; a no-op unless they are on the CPU.
        num_calls: how many times the block will call the model.
    """
    weights = PackedWeights(model, num_calls)
    try:
        with weights.in_use():
            yield
    finally:
        weights.free()


class PackedWeights:
    """Packed copies of weights for a loop that may pause: the model uses them only inside `in_use`.

    Empty if packing is not worth it or not possible, or if an enclosing block has already packed the model. Loops of
    other threads do not change a thread's results, but those that run at the same time share copies.

    Args:
        model, num_calls: as for `packed_weights`.
    """

    def __init__(self, model: nn.Module, num_calls: int):
        layers = [
            module
            for name, module in model.named_modules()  # adapters call the layers that they wrap themselves
            if hasattr(module, "packed_weights") and is_plain(module) and not name.endswith("base_layer")
        ]
        is_compiled = any(module._compiled_call_impl is not None for module in model.modules())
        is_packed = any(get_ident() in layer.packed_weights for layer in layers)
        is_worth_it = num_calls >= MIN_CALLS and not (is_compiled or is_packed or is_offloaded(model))
        self.weights: dict[nn.Linear, Tensor] = {}
        if is_worth_it and can_pack([layer.weight for layer in layers]):
            reorder = torch.ops.mkldnn._reorder_linear_weight
            for layer in layers:
                shared = list(layer.packed_weights.values())[:1]  # of another thread
                self.weights[layer] = shared[0] if shared else reorder(layer.weight.detach(), USUAL_ROWS)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Make the model use the packed weights within a `with` block, in this thread."""
        thread = get_ident()
        try:
            for layer, weight in self.weights.items():
                layer.packed_weights[thread] = weight
            yield
        finally:
            for layer in self.weights:
                layer.packed_weights.pop(thread, None)

    def free(self) -> None:
        """Free the memory; from now on the model uses its own weights."""
        if self.weights:
            self.weights.clear()
            return_freed_memory()


def is_offloaded(model: nn.Module) -> bool:
    """Whether hooks of Accelerate or Diffusers load the weights only for the duration of a call."""
    registries = [module._diffusers_hook for module in model.modules() if hasattr(module, "_diffusers_hook")]
    return hasattr(model, "_hf_hook") or any(hooks.get_hook("group_offloading") for hooks in registries)


def return_freed_memory() -> None:
    """Make the C library on Linux return freed memory to the system; otherwise it may keep all of it."""
    if platform.system() == "Linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, other libraries may not
        if trim is not None:
            trim(0)


def has_kernels() -> bool:
    """Whether this PyTorch build has the oneDNN kernels and the CPU is x86, where they were measured."""
    is_built = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    return is_built and torch.backends.mkldnn.enabled and IS_X86


def can_pack(weights: list[Tensor]) -> bool:
    """Whether this build of PyTorch and this machine can pack weights of these dtypes and sizes."""
    if not has_kernels():
        return False
    dtypes = {torch.float32}
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        dtypes.add(torch.bfloat16)
    if not all(weight.device.type == "cpu" and weight.dtype in dtypes for weight in weights):
        return False
    num_bytes = sum(weight.numel() * weight.element_size() for weight in weights)
    is_small = num_bytes <= MAX_SHARE_OF_MEMORY * psutil.virtual_memory().total
    return is_small and not torch.is_autocast_enabled("cpu")  # it picks the dtype of each matmul
