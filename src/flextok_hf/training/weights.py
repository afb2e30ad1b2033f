"""Averaging of weights over training (EMA), and gathering of weights sharded across processes."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel


AVERAGE_FILE = "ema.safetensors"


class AveragedWeights:
    """Exponential moving average of a model's trained weights over its training steps; frozen ones stay as they are.

    Args:
        model: the model in training.
        decay: fraction of the average that a step keeps; 0 turns averaging off.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model = model
        self.ema = EMAModel(self.shards(), decay=decay, foreach=True) if decay else None

    def shards(self) -> list[Tensor]:
        """Return the weights of the model, or this process's shards of them: averaging is elementwise."""
        return [local(parameter.detach()).requires_grad_() for _, parameter in self.trained()]

    def trained(self) -> list[tuple[str, nn.Parameter]]:
        """Return the weights that are not frozen, by name."""
        return [(name, parameter) for name, parameter in self.model.named_parameters() if parameter.requires_grad]

    def step(self) -> None:
        """Update the average after an optimizer step."""
        if self.ema is not None:
            self.ema.step(self.shards())

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Give the model its averaged weights, in evaluation mode, and restore its own at the end."""
        self.model.eval()
        if self.ema is not None:
            self.ema.store(self.shards())
            self.ema.copy_to(self.shards())
        try:
            yield
        finally:
            if isinstance(self.model, FSDPModule):
                self.model.reshard()  # a forward pass leaves some weights gathered for a backward pass
            if self.ema is not None:
                self.ema.restore(self.shards())
            self.model.train()

    def save(self, folder: Path, is_main_process: bool) -> None:
        """Write the average into a checkpoint, under the names of the weights; all processes must call this."""
        if self.ema is None:
            return
        average = {}
        for (name, parameter), shard in zip(self.trained(), self.ema.shadow_params, strict=True):
            if isinstance(parameter, DTensor):
                mesh, shape, stride = parameter.device_mesh, parameter.shape, parameter.stride()
                shard = DTensor.from_local(shard, mesh, parameter.placements, shape=shape, stride=stride)
            average[name] = whole(shard).contiguous()
        if is_main_process:
            save_file(average, folder / AVERAGE_FILE)

    def load(self, folder: Path, step: int) -> None:
        """Load the average from a checkpoint of `step`."""
        if self.ema is None:
            return
        average = load_file(folder / AVERAGE_FILE)
        for (name, parameter), shard in zip(self.trained(), self.ema.shadow_params, strict=True):
            value = average[name].to(shard.device)
            if isinstance(parameter, DTensor):
                value = local(distribute_tensor(value, parameter.device_mesh, parameter.placements))
            shard.copy_(value)
        self.ema.optimization_step = step


def local(tensor: Tensor) -> Tensor:
    """Return this process's shard of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor in full; if it is sharded, all processes must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def unsharded(model: nn.Module, *parts: Any) -> list[Any]:
    """Return parts of a model in a form that can be saved: CPU copies if the model is sharded, else unchanged.

    Args:
        model: model whose weights may be sharded; all processes must call this.
        parts: modules of the model; anything else is returned unchanged.
    """
    if not isinstance(model, FSDPModule):
        return list(parts)
    names = {id(module): name for name, module in model.named_modules()}
    state = {name: whole(tensor.detach()).cpu() for name, tensor in model.state_dict().items()}
    copies = []
    for part in parts:
        if id(part) not in names:
            copies.append(part)
            continue
        copy = type(part)(part.config) if isinstance(part, PreTrainedModel) else type(part).from_config(part.config)
        prefix = names[id(part)] + "."
        own = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        copy.load_state_dict(own)
        copies.append(copy.eval())
    return copies
