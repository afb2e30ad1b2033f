"""Low-rank adapters (LoRA, Hu et al., 2021, arXiv 2106.09685) of one model: put in, read and taken out with PEFT.

An adapter adds to the output of a linear layer that of two small matrices, A (r, in_features) and B (out_features, r),
times alpha / r. Layers are replaced while an adapter is in use. Taking it out puts the very same layers back, so the
model then computes what it did before, bit for bit and as fast.
"""

import math
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..utils.numbers import is_finite_number


if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

TENSOR_NAME = re.compile(r"(?P<layer>.+)\.(?P<matrix>lora_A|lora_B)\.weight")
ADAPTER_NAME = re.compile(r"[A-Za-z0-9_ -]{1,100}")
NOT_LORA = ("use_dora", "modules_to_save", "trainable_token_indices", "lora_bias", "target_parameters")


@dataclass(frozen=True)
class LowRankAdapter:
    """An adapter of one model.

    Attributes:
        alphas: the alpha of each adapted layer, by name.
        tensors: A and B of each layer, named as in PEFT: "blocks.0.mlp.down_proj.lora_A.weight".
        uses_rslora: scale by alpha / sqrt(r) instead of alpha / r.
    """

    alphas: dict[str, float]
    tensors: dict[str, Tensor] = field(repr=False)
    uses_rslora: bool = False

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of each adapted layer."""
        return {layer: self.tensors[f"{layer}.lora_A.weight"].shape[0] for layer in self.alphas}

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of PEFT's `LoraConfig`, of which patterns list what differs from layer to layer."""
        r, alpha = max(self.ranks.values()), max(self.alphas.values())
        return {
            "peft_type": "LORA",
            "r": r,
            "lora_alpha": alpha,
            "target_modules": sorted(self.alphas),
            "rank_pattern": {layer: rank for layer, rank in self.ranks.items() if rank != r},
            "alpha_pattern": {layer: own for layer, own in self.alphas.items() if own != alpha},
            "use_rslora": self.uses_rslora,
        }


def need_peft() -> None:
    """Raise a ValueError that says how to install PEFT if it is missing."""
    try:
        import peft  # noqa: F401
    except ModuleNotFoundError as error:
        raise ValueError('adapters need PEFT; install it: pip install "flextok_hf[adapters]"') from error


def parse_adapter(settings: dict[str, Any], tensors: dict[str, Tensor], source: str) -> LowRankAdapter:
    """Make an adapter of what a file holds.

    Args:
        settings: of PEFT's `LoraConfig`; only those of plain LoRA are read.
        tensors: by name.
        source: what is read, in words.

    Raises:
        ValueError: if they are not a plain LoRA, incomplete, or not finite.
    """
    for name in NOT_LORA:
        if settings.get(name):
            raise ValueError(f"{source} has the setting `{name}`, but only plain LoRA is supported. Train it without.")
    if settings.get("peft_type") != "LORA" or settings.get("bias", "none") != "none":
        raise ValueError(f"{source} must be a LoRA without biases, got {settings.get('peft_type')!r}.")
    found: dict[str, set[str]] = {}
    for name, tensor in tensors.items():
        match = TENSOR_NAME.fullmatch(name)
        if match is None:
            raise ValueError(f"{source} holds {name!r}, which is not a LoRA weight (`<layer>.lora_A.weight`).")
        if tensor.ndim != 2 or not tensor.is_floating_point() or not tensor.isfinite().all():
            raise ValueError(f"{source}: {name!r} must be a matrix of finite floats. Fetch or save it again.")
        found.setdefault(match["layer"], set()).add(match["matrix"])
    for layer, matrices in found.items():
        if len(matrices) != 2:
            raise ValueError(f"{source} has only {matrices.pop()} of {layer!r}. Fetch or save it again.")
    alphas: dict[str, float] = {}
    pattern = settings.get("alpha_pattern") or {}
    for layer in found:
        alpha: Any = pattern.get(layer, settings.get("lora_alpha")) if isinstance(pattern, dict) else None
        if not is_finite_number(alpha) or alpha <= 0:
            raise ValueError(f"{source}: `lora_alpha` of {layer!r} must be a number above 0, got {alpha!r}.")
        alphas[layer] = alpha
    if not alphas:
        raise ValueError(f"{source} holds no LoRA weights.")
    return LowRankAdapter(alphas, tensors, bool(settings.get("use_rslora")))


def check_fits(adapter: LowRankAdapter, model: nn.Module, part: str, source: str) -> None:
    """Raise a ValueError if an adapter is of a model with other layers or sizes."""
    layers = dict(model.named_modules())
    for name in adapter.alphas:
        layer = layers.get(name)
        if not hasattr(layer, "in_features"):
            raise ValueError(
                f"{source} adapts `{part}.{name}`, but this model has no such linear layer: it was trained for another"
                " model. Load that one."
            )
        down, up = (adapter.tensors[f"{name}.{matrix}.weight"].shape for matrix in ("lora_A", "lora_B"))
        stored, expected = (up[0], down[1]), (layer.out_features, layer.in_features)  # type: ignore[union-attr]
        if stored != expected or down[0] != up[1] or down[0] < 1:
            raise ValueError(
                f"{source} adapts `{part}.{name}` with matrices {tuple(up)} and {tuple(down)}, but in this model the"
                f" layer maps {expected[1]} values to {expected[0]}: it was trained for another model. Load that one."
            )


def low_rank_layers(model: nn.Module) -> dict[str, "LoraLayer"]:
    """Return the layers that have adapters in use, by name."""
    if not hasattr(model, "peft_config"):
        return {}
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def check_quiet(model: nn.Module) -> None:
    """Raise a ValueError if layers cannot be replaced now: their weights come and go with hooks of offloading."""
    for name, module in model.named_modules():
        hooks = getattr(module, "_diffusers_hook", None)
        if (name and hasattr(module, "_hf_hook")) or (hooks is not None and hooks.get_hook("group_offloading")):
            raise ValueError(
                f"The layers of this {type(model).__name__} are offloaded, so adapters cannot be put in or taken out."
                " Load them before you enable offloading."
            )


def put_in(model: nn.Module, adapters: dict[str, LowRankAdapter], weights: dict[str, float]) -> None:
    """Put adapters, by name, into a model without any; their weights are multiplied by `weights`."""
    need_peft()
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    check_quiet(model)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for name, adapter in adapters.items():
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are meant
            inject_adapter_in_model(LoraConfig(**adapter.settings), model, name)
        set_peft_model_state_dict(model, adapter.tensors, name)
    for layer in low_rank_layers(model).values():
        layer.set_adapter([name for name in adapters if name in layer.scaling])
        for name in adapters:
            layer.set_scale(name, weights[name])
    model._hf_peft_config_loaded = True  # type: ignore[assignment]  # what the libraries' own adapter methods look at
    model.__dict__["trainable_without_adapters"] = trainable  # PEFT freezes the rest


def replace_layer(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put another layer in the place of that name."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


def take_out(model: nn.Module) -> None:
    """Put the layers back that `put_in`, or a library, replaced; those that are merged keep merged weights."""
    layers = low_rank_layers(model)
    if layers:
        check_quiet(model)
    for name, layer in layers.items():
        replace_layer(model, name, layer.get_base_layer())
    if "peft_config" in model.__dict__:
        del model.peft_config
        model._hf_peft_config_loaded = False  # type: ignore[assignment]
    for parameter in model.__dict__.pop("trainable_without_adapters", []):
        parameter.requires_grad_(True)


def read_adapters(model: nn.Module) -> tuple[dict[str, LowRankAdapter], dict[str, float]]:
    """Return the adapters in a model, with tensors that share their memory, and the weights of those in use.

    Raises:
        ValueError: if there is another kind of adapter, or one that is merged.
    """
    configs = getattr(model, "peft_config", {})
    adapters, weights = {}, {}
    for name, config in configs.items():
        settings = {**config.to_dict(), "peft_type": getattr(config.peft_type, "value", config.peft_type)}
        source, tensors, alphas, own = f"The adapter {name!r} of {type(model).__name__}", {}, {}, []
        for place, layer in low_rank_layers(model).items():
            if layer.merged:
                raise ValueError(f"{source} is merged into the weights. Call `unfuse_lora` of the model first.")
            if name not in layer.lora_A:
                continue
            for matrix in ("lora_A", "lora_B"):
                tensors[f"{place}.{matrix}.weight"] = getattr(layer, matrix)[name].weight.detach()
            alphas[place] = layer.lora_alpha[name]
            unit = alphas[place] / (math.sqrt(layer.r[name]) if layer.use_rslora[name] else layer.r[name])
            if name in layer.active_adapters and not layer.disable_adapters:
                own.append(layer.scaling[name] / unit)
        adapters[name] = parse_adapter({**settings, "lora_alpha": 1, "alpha_pattern": alphas}, tensors, source)
        if own:
            weights[name] = round(own[0], 12)  # what was set, without the rounding of products
    return adapters, weights


def merge(model: nn.Module, scale: float) -> dict[str, Tensor]:
    """Add the adapters in use, times `scale`, to the weights of a model and take them out.

    Returns:
        Copies of the weights before, by layer, on the CPU.
    """
    originals = {}
    layers = low_rank_layers(model)
    for name, layer in layers.items():
        weight = layer.get_base_layer().weight
        if type(weight) is not nn.Parameter or not weight.is_floating_point():
            raise ValueError(
                f"`{name}` of {type(model).__name__} is quantized, so adapters cannot be merged into it. Use them"
                " without `fuse_lora`, or load the model in full precision."
            )
        originals[name] = weight.detach().cpu().clone()
    for layer in layers.values():
        for name in layer.active_adapters:
            layer.scaling[name] *= scale
        layer.merge()
    take_out(model)
    return originals


@torch.no_grad()
def restore(model: nn.Module, originals: dict[str, Tensor]) -> None:
    """Undo `merge`, bit for bit."""
    for name, weight in originals.items():
        model.get_submodule(name).weight.copy_(weight)


@contextmanager
def taken_out(models: Iterable[nn.Module]) -> Iterator[None]:
    """Take the adapters out of some models for a `with` block; the same layers are put back, also in training."""
    held = []
    for model in models:
        if "peft_config" in model.__dict__:
            state = {"peft_config": model.peft_config, "_hf_peft_config_loaded": True}
            state["trainable_without_adapters"] = model.__dict__.pop("trainable_without_adapters", [])
            held.append((model, low_rank_layers(model), state))
            take_out(model)
    try:
        yield
    finally:
        for model, layers, state in held:
            for name, layer in layers.items():
                replace_layer(model, name, layer)
            model.__dict__.update(state)


def check_adapter_name(name: Any, argument: str = "adapter_name") -> str:
    """Return the name of an adapter, which is also the name of its file."""
    if not isinstance(name, str) or ADAPTER_NAME.fullmatch(name) is None:
        raise ValueError(f"`{argument}` must be 1 to 100 letters, digits, spaces, - or _, got {str(name)[:80]!r}.")
    return name
