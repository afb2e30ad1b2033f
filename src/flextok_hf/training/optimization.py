"""What the optimizer does to which weights, and the course of the learning rate."""

import warnings
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from .arguments import TrainingArguments


# Layers that read something whose size does not grow with the width: patches, codes, frequencies of the noise level.
FIXED_INPUTS = ("patch_embedding.proj", "code_proj", "time_embedder.linear_1")


def split_by_decay(modules: list[nn.Module], learning_rate: float, width_ratio: float = 1.0) -> list[dict[str, Any]]:
    """Make optimizer groups: weight decay for matrices and tables, not for vectors.

    Args:
        modules: whose weights.
        learning_rate: of vectors, tables, and matrices with inputs of a fixed size.
        width_ratio: base width over width. Matrices that read the width learn at `width_ratio * learning_rate`, as in
            maximal update parametrization for Adam (Yang et al., 2022, https://arxiv.org/abs/2203.03466, table 3).
    """
    groups: dict[tuple[bool, bool], list[Tensor]] = {}
    for module in modules:
        reads_width = {
            f"{name}.weight" if name else "weight"
            for name, layer in module.named_modules()
            if isinstance(layer, nn.Linear) and not name.endswith(FIXED_INPUTS) and width_ratio != 1
        }
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                groups.setdefault((parameter.ndim >= 2, name in reads_width), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": learning_rate * (width_ratio if is_scaled else 1.0),
            **({} if is_decayed else {"weight_decay": 0.0}),
        }
        for (is_decayed, is_scaled), parameters in sorted(groups.items(), key=lambda item: item[0], reverse=True)
    ]


def build_lr_scheduler(arguments: TrainingArguments, optimizer: torch.optim.Optimizer) -> LambdaLR:
    """Make the schedule of the learning rate: after the warm-up, `lr_end_ratio` takes the place of 0.

    It counts steps of training. Prepared by accelerate it would count those of all processes together, and a run that
    goes on with another number of processes would be elsewhere in its course.
    """
    # where the first steps overflow in half precision, PyTorch suspects a mistake
    warnings.filterwarnings("ignore", "Detected call of .lr_scheduler.step", UserWarning)
    num_warmup_steps = arguments.lr_warmup_steps
    scheduler = get_scheduler(
        arguments.lr_scheduler,
        optimizer,
        num_warmup_steps=num_warmup_steps,
        num_training_steps=arguments.max_train_steps,
    )
    if arguments.lr_end_ratio == 0:
        return scheduler
    fall = scheduler.lr_lambdas[0]

    def factor(step: int) -> float:
        return fall(step) if step < num_warmup_steps else 1 - (1 - arguments.lr_end_ratio) * (1 - fall(step))

    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"]
    return LambdaLR(optimizer, factor)
