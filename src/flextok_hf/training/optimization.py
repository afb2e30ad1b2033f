"""Parameter groups of the optimizer, and the learning rate schedule."""

import warnings
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from .arguments import TrainingArguments


# Layers whose input size does not grow with the width: patches, codes, frequencies of the noise level.
FIXED_INPUTS = ("patch_embedding.proj", "code_proj", "time_embedder.linear_1")


def split_by_decay(modules: list[nn.Module], learning_rate: float, width_ratio: float = 1.0) -> list[dict[str, Any]]:
    """Build optimizer groups: weight decay for matrices and embeddings, but not for vectors.

    Args:
        modules: modules to train.
        learning_rate: for vectors, embeddings, and matrices with inputs of a fixed size.
        width_ratio: base width over width. Matrices that read the width use `width_ratio * learning_rate`, as in
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
    """Build the learning rate schedule; after warm-up, it decays to `lr_end_ratio` instead of 0.

    It counts training steps. If accelerate prepared it, it would count the steps of all processes together, and a run
    resumed with another number of processes would be at another point of its schedule.
    """
    # a false alarm if the first steps overflow in half precision
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
    base = scheduler.lr_lambdas[0]

    def factor(step: int) -> float:
        return base(step) if step < num_warmup_steps else 1 - (1 - arguments.lr_end_ratio) * (1 - base(step))

    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"]
    return LambdaLR(optimizer, factor)
