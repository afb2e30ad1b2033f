"""The loop around a training step: schedule, weight average, checkpoints, resume, progress.

A checkpoint gets its name only when it is complete, so a kill at any moment leaves the last one usable.
"""

import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from .arguments import TrainingArguments
from .batches import draw_seed


logger = logging.getLogger(__name__)

CHECKPOINT_PREFIX = "checkpoint-"


class Trainer:
    """Runs one stage.

    Args:
        arguments: options of the stage.
        model: computes the loss in its `forward(batch, step, generator)`; returns (loss, metrics).
        parameter_groups: for the optimizer, as `torch.optim.AdamW` takes them.
    """

    def __init__(
        self, arguments: TrainingArguments, accelerator: Accelerator, model: nn.Module, parameter_groups: list
    ):
        self.arguments = arguments
        self.accelerator = accelerator
        optimizer = torch.optim.AdamW(
            parameter_groups,
            lr=arguments.learning_rate,
            betas=(arguments.adam_beta1, arguments.adam_beta2),
            weight_decay=arguments.weight_decay,
            fused=accelerator.device.type == "cuda",
        )
        # the prepared scheduler steps once per process, so its lengths are counted in process steps
        lr_scheduler = get_scheduler(
            arguments.lr_scheduler,
            optimizer,
            num_warmup_steps=arguments.lr_warmup_steps * accelerator.num_processes,
            num_training_steps=arguments.max_train_steps * accelerator.num_processes,
        )
        self.raw_model = model
        self.model, self.optimizer, self.lr_scheduler = accelerator.prepare(model, optimizer, lr_scheduler)
        self.ema = None
        if arguments.ema_decay:
            self.ema = EMAModel(model.parameters(), decay=arguments.ema_decay, foreach=True)
        self.step = 0

    def train(
        self,
        batches: Callable[[int], Iterator[dict[str, Any]]],
        validate: Callable[[int], dict[str, float]] | None = None,
    ) -> None:
        """Train to the end.

        Args:
            batches: gives micro-batches without end, from this number on.
            validate: draws validation pictures with the averaged weights and returns figures to log.
        """
        arguments, accelerator = self.arguments, self.accelerator
        micro_batches = batches(self.step * arguments.gradient_accumulation_steps)
        progress = tqdm(
            total=arguments.max_train_steps,
            initial=self.step,
            desc="Training",
            disable=not accelerator.is_local_main_process,
            mininterval=2,
        )
        images_per_step = (
            arguments.train_batch_size * arguments.gradient_accumulation_steps * accelerator.num_processes
        )
        last_time, last_step = time.perf_counter(), self.step
        while self.step < arguments.max_train_steps:
            metrics = self.train_step(micro_batches)
            progress.update()
            if self.step % 20 == 0 or self.step == arguments.max_train_steps:
                now = time.perf_counter()
                figures = {name: value.item() for name, value in metrics.items()}
                figures["lr"] = self.lr_scheduler.get_last_lr()[0]
                figures["images_per_s"] = images_per_step * (self.step - last_step) / (now - last_time)
                last_time, last_step = now, self.step
                progress.set_postfix({name: f"{value:.4g}" for name, value in figures.items()}, refresh=False)
                accelerator.log(figures, step=self.step)
                self.write_log(figures)
            is_last = self.step == arguments.max_train_steps
            if self.step % arguments.checkpointing_steps == 0 or is_last:
                self.save_checkpoint()
            if validate is not None and arguments.validation_steps:
                if self.step % arguments.validation_steps == 0 or is_last:
                    self.run_validation(validate)
                    last_time, last_step = time.perf_counter(), self.step
        progress.close()
        accelerator.end_training()

    def train_step(self, micro_batches: Iterator[dict[str, Any]]) -> dict[str, Tensor]:
        """Run one optimizer step over its micro-batches; chance depends on (seed, step, part, process) only."""
        arguments, accelerator = self.arguments, self.accelerator
        self.model.train()
        for part in range(arguments.gradient_accumulation_steps):
            batch = next(micro_batches)
            seed = draw_seed(arguments.seed, self.step, part, accelerator.process_index)
            generator = torch.Generator(accelerator.device).manual_seed(seed)
            torch.manual_seed(seed)  # for dropout inside the model
            with accelerator.accumulate(self.model):
                loss, metrics = self.model(batch, self.step, generator)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(self.model.parameters(), arguments.max_grad_norm)
                    metrics = {"loss": loss.detach(), "grad_norm": norm, **metrics}
                self.optimizer.step()
                self.lr_scheduler.step()
                self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        if self.ema is not None:
            self.ema.step(self.raw_model.parameters())
        return metrics

    def run_validation(self, validate: Callable[[int], dict[str, float]]) -> None:
        """Validate on the main process, without touching the weights in training."""
        if self.accelerator.is_main_process:
            # eager: compiling for the shapes of validation takes longer than validating
            with torch.no_grad(), AveragedWeights(self), torch.compiler.set_stance("force_eager"):
                figures = validate(self.step)
            self.accelerator.log(figures, step=self.step)
            self.write_log(figures)
            logger.info("Step %d: %s", self.step, figures)
        self.accelerator.wait_for_everyone()

    def write_log(self, figures: dict[str, float]) -> None:
        """Append figures to `log.jsonl` in the output folder."""
        if self.accelerator.is_main_process:
            with open(Path(self.arguments.output_dir) / "log.jsonl", "a") as file:
                file.write(json.dumps({"step": self.step, **figures}) + "\n")

    def save_checkpoint(self) -> None:
        """Save everything a resumed run needs; older checkpoints beyond the limit are removed afterwards."""
        folder = Path(self.arguments.output_dir) / f"{CHECKPOINT_PREFIX}{self.step}"
        unfinished = folder.with_suffix(".partial")
        if self.accelerator.is_main_process:
            shutil.rmtree(unfinished, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(unfinished))
        if self.accelerator.is_main_process:
            if self.ema is not None:
                shadow = {str(index): tensor.contiguous() for index, tensor in enumerate(self.ema.shadow_params)}
                save_file(shadow, unfinished / "ema.safetensors")
            state = {"step": self.step, "arguments": asdict(self.arguments)}
            (unfinished / "training_state.json").write_text(json.dumps(state, indent=2))
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(unfinished, folder)
            for old in list_checkpoints(self.arguments.output_dir)[: -self.arguments.checkpoints_total_limit]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def resume(self) -> None:
        """Continue from the checkpoint that the options name, if any."""
        choice = self.arguments.resume_from_checkpoint
        if choice is None:
            return
        checkpoints = list_checkpoints(self.arguments.output_dir)
        if choice == "latest" and not checkpoints:
            logger.warning("No checkpoint in %s yet: starting from the beginning.", self.arguments.output_dir)
            return
        folder = checkpoints[-1] if choice == "latest" else Path(choice)
        if not (folder / "training_state.json").is_file():
            raise FileNotFoundError(
                f"`resume_from_checkpoint` {choice!r} is no complete checkpoint: {folder} has no training_state.json."
                " Name a folder `checkpoint-<step>`, or `latest`."
            )
        self.accelerator.load_state(str(folder))
        if self.ema is not None:
            shadow = load_file(folder / "ema.safetensors")
            self.ema.shadow_params = [shadow[str(index)] for index in range(len(shadow))]
        self.step = json.loads((folder / "training_state.json").read_text())["step"]
        if self.ema is not None:
            self.ema.to(self.accelerator.device)
            self.ema.optimization_step = self.step
        logger.info("Resumed from %s at step %d.", folder, self.step)


class AveragedWeights:
    """Context in which the model has its averaged weights, in evaluation mode; its own come back at the end."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def __enter__(self) -> None:
        self.trainer.raw_model.eval()
        if self.trainer.ema is not None:
            self.trainer.ema.store(self.trainer.raw_model.parameters())
            self.trainer.ema.copy_to(self.trainer.raw_model.parameters())

    def __exit__(self, *_) -> None:
        if self.trainer.ema is not None:
            self.trainer.ema.restore(self.trainer.raw_model.parameters())
        self.trainer.raw_model.train()


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    folders = [path for path in Path(output_dir).glob(f"{CHECKPOINT_PREFIX}*") if path.suffix != ".partial"]
    return sorted(folders, key=lambda path: int(path.name.removeprefix(CHECKPOINT_PREFIX)))


def build_accelerator(arguments: TrainingArguments) -> Accelerator:
    """Set up devices, precision and tracker; the options are written beside the checkpoints."""
    output_dir = Path(arguments.output_dir)
    accelerator = Accelerator(
        mixed_precision=arguments.mixed_precision,
        gradient_accumulation_steps=arguments.gradient_accumulation_steps,
        log_with=arguments.report_to,
        project_config=ProjectConfiguration(project_dir=str(output_dir), logging_dir=str(output_dir / "logs")),
    )
    torch.backends.cudnn.benchmark = True  # all batches have one shape: the search for the best kernels pays
    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / "arguments.json").write_text(json.dumps(asdict(arguments), indent=2) + "\n")
        if arguments.report_to is not None:
            plain = {
                name: value if isinstance(value, int | float) else str(value)
                for name, value in asdict(arguments).items()
            }
            accelerator.init_trackers("flextok_hf", config=plain)
    accelerator.wait_for_everyone()
    return accelerator


def split_by_decay(modules: list[nn.Module], learning_rate: float) -> list[dict[str, Any]]:
    """Make optimizer groups of one learning rate: weight decay for matrices and tables, not for vectors."""
    parameters = [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in parameters if parameter.ndim >= 2]
    vectors = [parameter for parameter in parameters if parameter.ndim < 2]
    return [
        {"params": matrices, "lr": learning_rate},
        {"params": vectors, "lr": learning_rate, "weight_decay": 0.0},
    ]
