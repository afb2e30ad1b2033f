"""Linear layers on CPUs: each product is computed in the fastest of several ways, found by timing (`utils.tuning`).

Ways differ in the order of summation only. In loops, weights may be packed in the layout that oneDNN's kernels read:
a step of the prior multiplies a few rows by every weight, so it is bound by reading weights. Where a CPU has no half
precision, PyTorch emulates it, several times slower than float32; products are then computed in float32 and rounded
once, as the emulation does.
"""

import ctypes
import platform
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from weakref import WeakValueDictionary

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..utils import tuning


LIBRARY, ONEDNN, UPCAST, PACKED, PADDED = tuning.LIBRARY, "onednn", "float32", "packed", "packed, 4 rows"
IN_LOOPS = (PACKED, PADDED)
PADDED_ROWS = 4  # some kernels are slower for 1 to 3 rows than for 4
LAYERS_PER_BLOCK = 8  # at most
FEW_ROWS = 8  # converting a weight takes longer than an emulated product with fewer rows
MAX_SHARE_OF_MEMORY = 0.25  # of total RAM; packed weights are held in addition to the model's own
PACKED_TYPES = (torch.float32, torch.bfloat16, torch.float16)

active = threading.local()  # `loops`: layer -> the loop of this thread that calls it
packed_elsewhere: WeakValueDictionary[tuple, Tensor] = WeakValueDictionary()  # state of a weight -> packed weight


def linear(layer: nn.Module, hidden_states: Tensor) -> Tensor:
    """Call a layer on (..., in_features), in a faster way where that is the same; all large layers are called here.

    Only a plain `nn.Linear` on a CPU takes another way. What gradients, compilers, hooks, quantizers and adapters need
    is their own: quantizers look for exactly this class, and whatever they put in its place is called as it is.
    """
    if hidden_states.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return layer(hidden_states)
    if not is_plain(layer) or layer.weight.dtype != hidden_states.dtype or torch.is_autocast_enabled("cpu"):
        return layer(hidden_states)
    rows, loop = hidden_states.reshape(-1, hidden_states.shape[-1]), getattr(active, "loops", {}).get(layer)
    way = single_way(layer, rows) if loop is None else loop.way(layer, rows)
    if way == LIBRARY:
        return layer(hidden_states)
    weight = loop.packed_weight(layer) if loop is not None and way in IN_LOOPS else layer.weight
    return multiply(way, rows, weight, layer.bias).view(*hidden_states.shape[:-1], layer.out_features)


def multiply(way: str, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply rows (R, in_features) by a weight, packed or not as the way needs it; returns (R, out_features)."""
    if way == LIBRARY:
        return F.linear(rows, weight, bias)
    if way == UPCAST:
        return F.linear(rows.float(), weight.float(), None if bias is None else bias.float()).to(rows.dtype)
    states = F.pad(rows, (0, 0, 0, PADDED_ROWS - rows.shape[0])) if way == PADDED else rows
    states, bias = states.to(weight.dtype), None if bias is None else bias.to(weight.dtype)
    product = torch.ops.mkldnn._linear_pointwise(states, weight, bias, "none", [], "")
    return product[: rows.shape[0]].to(rows.dtype)


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer multiplies by a plain weight and nothing else happens: no hooks, no tensor subclass."""
    if type(layer) is not nn.Linear or type(layer.weight) is not nn.Parameter or "forward" in layer.__dict__:
        return False
    return not (layer._forward_hooks or layer._forward_pre_hooks or hasattr(layer, "_diffusers_hook"))


def possible_ways(rows: Tensor, is_loop: bool) -> list[str]:
    """Return the ways to multiply rows (R, in_features)."""
    ways = [LIBRARY]
    if not has_kernels():
        return ways
    if rows.dtype == torch.float32:
        ways.append(ONEDNN)
    elif is_emulated(rows.dtype):
        ways.append(UPCAST)
    if is_loop:
        ways += IN_LOOPS if rows.shape[0] < PADDED_ROWS else [PACKED]
    return ways


def single_way(layer: nn.Linear, rows: Tensor) -> str:
    """Return the way of a call outside loops: the fastest one if an earlier process timed them."""
    ways = possible_ways(rows, is_loop=False)
    default = UPCAST if UPCAST in ways and rows.shape[0] >= FEW_ROWS else LIBRARY
    return tuning.fastest("product", ways, tuning.stored_times(product_name(layer, rows)), default)


def product_name(layer: nn.Linear, rows: Tensor) -> str:
    """Name a product by precision, sizes and number of rows, rounded up to a power of two."""
    sizes = f"{layer.in_features} to {layer.out_features}, up to {tuning.power_of_two(rows.shape[0])} rows"
    return f"product, {rows.dtype}, {sizes}"


class PackedWeights:
    """Products of a loop that may pause: inside `in_use`, layers take the fastest way, with packed weights if need be.

    Without effect if packing is not possible, or if an enclosing block does the same for the model. Loops of other
    threads do not change a thread's results, but those that run at the same time share copies.

    Args:
        model: its plain linear layers are meant; those that adapters wrap are called by these.
        num_calls: how many times the loop will call the model.
    """

    def __init__(self, model: nn.Module, num_calls: int):
        is_compiled = any(module._compiled_call_impl is not None for module in model.modules())
        modules = [module for name, module in model.named_modules() if not name.endswith("base_layer")]
        layers = dict.fromkeys(filter(is_plain, modules))
        is_nested = any(layer in getattr(active, "loops", {}) for layer in layers)
        is_possible = not (is_compiled or is_nested or is_offloaded(model))
        self.layers = layers if is_possible and can_pack([layer.weight for layer in layers]) else {}
        self.num_calls = num_calls
        self.ways: dict[str, str] = {}  # product -> way, the same throughout the loop
        self.weights: dict[nn.Linear, tuple[tuple, Tensor]] = {}  # state of the weight when it was packed, and packed

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Make the model take the fastest ways within a `with` block, in this thread."""
        loops = active.__dict__.setdefault("loops", {})  # kept here: another thread may close a suspended generator
        try:
            loops.update(dict.fromkeys(self.layers, self))
            yield
        finally:
            for layer in self.layers:
                loops.pop(layer, None)

    def free(self) -> None:
        """Free the memory; from now on the model uses its own weights."""
        if self.weights:
            self.weights.clear()
            return_freed_memory()

    def packed_weight(self, layer: nn.Linear) -> Tensor:
        """Return the packed weight of a layer, perhaps of another thread's loop; packed again if it has changed."""
        weight = layer.weight
        state = (id(layer), weight.data_ptr(), None if weight.is_inference() else weight._version)
        if layer not in self.weights or self.weights[layer][0] != state:
            packed = packed_elsewhere.get(state)
            self.weights[layer] = state, pack(layer) if packed is None else packed
            packed_elsewhere[state] = self.weights[layer][1]
        return self.weights[layer][1]

    def way(self, layer: nn.Linear, rows: Tensor) -> str:
        """Return the way that takes the least time for all calls of the loop; times those that are not known."""
        product = product_name(layer, rows)
        if product not in self.ways:
            ways = possible_ways(rows, is_loop=True)
            alike = [other for other in self.layers if other.weight.shape == layer.weight.shape]
            num_products = self.num_calls * len(alike)
            times = tuning.loop_times(product, len(ways), num_products, lambda: time_ways(alike, rows, ways))
            if times is not None:
                packing = times.get(tuning.PACKING, 0.0) / self.num_calls  # the share of one call
                times = {way: seconds + packing * (way in IN_LOOPS) for way, seconds in times.items()}
            self.ways[product] = tuning.fastest("product", ways, times, single_way(layer, rows))
        return self.ways[product]


def num_calls_in_loop() -> int:
    """Return how often the loop of this thread, if there is one, calls each kind of layer once per block."""
    loops = getattr(active, "loops", {})
    return max((loop.num_calls * len(loop.layers) // LAYERS_PER_BLOCK for loop in loops.values()), default=0)


def time_ways(layers: list[nn.Linear], rows: Tensor, ways: list[str]) -> tuning.Times:
    """Return the seconds of each way and of packing; few rows are timed with weights from memory, as in a model."""
    layers, packed = layers[: tuning.NUM_TIMINGS], {}
    packing = tuning.time_calls((tuning.PACKING, lambda: packed.update({layer: pack(layer)})) for layer in layers)
    calls = [
        (way, partial(multiply, way, rows, packed[layer] if way in IN_LOOPS else layer.weight, layer.bias))
        for layer in layers
        for way in ways
    ]
    return packing | tuning.time_calls(calls, is_from_memory=rows.shape[0] < FEW_ROWS)


def pack(layer: nn.Linear) -> Tensor:
    """Return the weight in the layout of oneDNN's kernels, in float32 where half precision would be emulated."""
    weight = layer.weight.detach()
    return torch.ops.mkldnn._reorder_linear_weight(weight.float() if is_emulated(weight.dtype) else weight)


@contextmanager
def packed_weights(model: nn.Module, num_calls: int) -> Iterator[None]:
    """Use `PackedWeights` for a `with` block that calls `model` so many times."""
    weights = PackedWeights(model, num_calls)
    try:
        with weights.in_use():
            yield
    finally:
        weights.free()


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
    """Whether this build of PyTorch has oneDNN's kernels, and they are not switched off."""
    is_built = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    return is_built and torch.backends.mkldnn.enabled and tuning.mode() != "off"


def is_emulated(dtype: torch.dtype) -> bool:
    """Whether PyTorch computes products of this dtype on this CPU without hardware for it."""
    if dtype not in (torch.bfloat16, torch.float16):
        return False
    if not torch.backends.mkldnn.is_available():  # this build of PyTorch lacks even the functions below
        return True
    kernels = torch.ops.mkldnn
    return not (kernels._is_mkldnn_bf16_supported if dtype == torch.bfloat16 else kernels._is_mkldnn_fp16_supported)()


def can_pack(weights: list[Tensor]) -> bool:
    """Whether this build of PyTorch and this machine can pack weights of these dtypes and sizes."""
    if not (has_kernels() and all(weight.device.type == "cpu" and weight.dtype in PACKED_TYPES for weight in weights)):
        return False
    num_bytes = sum(4 * weight.numel() for weight in weights)  # at most
    return num_bytes <= MAX_SHARE_OF_MEMORY * psutil.virtual_memory().total and not torch.is_autocast_enabled("cpu")
