"""Training of adapters (LoRA): the base is frozen, and checkpoints hold only what is trained."""

import logging
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from ..models.low_rank import low_rank_layers, need_peft
from ..models.upcast_linear import upcast_frozen
from .arguments import TrainingArguments


logger = logging.getLogger(__name__)

ADAPTER_NAME = "default"
COMPUTE_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
PROCESSES = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.MULTI_XPU)


def add_adapters(arguments: TrainingArguments, accelerator: Accelerator, model: nn.Module) -> None:
    """Freeze a model in training and put new adapters into its parts, if the options say so.

    With `mixed_precision`, the frozen weights of the adapted parts are stored in half precision; a CPU that only
    emulates it computes with them in float32.

    Args:
        arguments: options of the stage; what it can adapt are attributes of `model`.
        accelerator: of the run.
        model: computes the loss.

    Raises:
        ValueError: a target does not exist, PEFT is missing, or weights are sharded.
    """
    if not arguments.lora_rank:
        return
    if accelerator.distributed_type not in PROCESSES:
        raise ValueError(
            f"`lora_rank` does not work with {accelerator.distributed_type.value}, which shards weights: an adapter"
            " needs little memory, so use plain data parallelism."
        )
    model.requires_grad_(False)
    for part in sorted(arguments.adapted_parts):
        base = getattr(model, part)
        if accelerator.mixed_precision in COMPUTE_DTYPES:
            base.to(COMPUTE_DTYPES[accelerator.mixed_precision])
        alpha = arguments.lora_alpha or arguments.lora_rank
        freeze_with_adapter(base, part, arguments.lora_targets or [part], arguments.lora_rank, alpha)
        upcast_frozen(base)
    guidance = getattr(getattr(model, "decoder", None), "guidance_proj", None)
    for new in filter(None, (getattr(model, "alignment", None), guidance)):  # of REPA and distillation, with no base
        new.float().requires_grad_(True)
    save_only_trained(model)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in model.parameters())
    share = f"{trained:,} of {total:,} weights ({trained / total:.1%})"
    logger.info("Adapter of rank %d: %s.", arguments.lora_rank, share)


def freeze_with_adapter(base: nn.Module, part: str, targets: list[str], rank: int, alpha: float) -> None:
    """Freeze a part of a pipeline and put a new adapter into the layers that `targets` stand for."""
    need_peft()
    from peft import LoraConfig, inject_adapter_in_model

    layers = choose_layers(base, part, targets)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=layers)  # type: ignore[arg-type]
    inject_adapter_in_model(config, base, ADAPTER_NAME)
    for layer in low_rank_layers(base).values():  # in full precision whatever that of the base is
        layer.lora_A.float()
        layer.lora_B.float()


def choose_layers(base: nn.Module, part: str, targets: list[str]) -> list[str]:
    """Return the names of the linear layers that the targets of a part stand for.

    Raises:
        ValueError: a target stands for none.
    """
    linear = [name for name, layer in base.named_modules() if hasattr(layer, "in_features")]
    chosen: set[str] = set()
    for target in targets:
        place, _, suffix = target.partition(".")
        if place != part:
            continue
        if suffix:
            found = [name for name in linear if f".{name}".endswith(f".{suffix}")]
        else:
            found = [name for name in linear if "blocks." in name]
        if not found:
            kinds = sorted({name.rpartition(".")[2] for name in linear})
            raise ValueError(f"`lora_targets` {target!r} is no linear layer; the {part} has {', '.join(kinds)}.")
        chosen.update(found)
    return sorted(chosen)


def save_only_trained(model: nn.Module) -> None:
    """Leave frozen weights out of the model's `state_dict`, and do not miss them when one is loaded."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    def drop_frozen(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        for name in [key for key in state if key.removeprefix(prefix) not in trained]:
            del state[name]

    def forgive_frozen(module: nn.Module, incompatible: Any) -> None:
        missing = [key for key in incompatible.missing_keys if key.removeprefix("module.") in trained]
        incompatible.missing_keys[:] = missing

    model._register_state_dict_hook(drop_frozen)
    model.register_load_state_dict_post_hook(forgive_frozen)
