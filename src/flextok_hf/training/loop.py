"""The loop around a training step: schedule, weight average, log, validation, checkpoints, going on from them."""

import itertools
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..data.batches import TrainingBatches
from ..data.seeds import draw_seed
from ..utils.files import read_json, save_image
from . import checkpoints
from .arguments import TrainingArguments
from .optimization import build_lr_scheduler
from .run_folder import RunFolder
from .setup import log_image
from .step_rng import StepRng
from .throughput import Meter, count_training_flops, measure_matmul_rate
from .weights import AveragedWeights, whole


logger = logging.getLogger(__name__)

COUNTED_IMAGES = 4  # of the first batch, from which the operations of a step are counted
HELD_OUT_BATCHES = 8  # of the validation data, from which the loss is measured
COMPUTE_DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}

# Draws what has been learned so far: figures, and a sheet of images
Draw = Callable[[], tuple[dict[str, float], Image.Image | None]]


class Trainer:
    """Runs one stage.

    Args:
        arguments: options of the stage.
        accelerator: devices, precision and processes.
        model: computes the loss in its `forward(batch, step, rng)`; returns (loss, metrics).
        parameter_groups: for the optimizer, as `torch.optim.AdamW` takes them.
        vocabulary: what the rows of the model's tables stand for, where the data decide it: classes, pieces of text.
    """

    def __init__(
        self,
        arguments: TrainingArguments,
        accelerator: Accelerator,
        model: nn.Module,
        parameter_groups: list,
        vocabulary: Sequence[str] = (),
    ):
        self.arguments = arguments
        self.vocabulary = sha256("\n".join(vocabulary).encode()).hexdigest()
        self.accelerator = accelerator
        optimizer = torch.optim.AdamW(
            parameter_groups,
            lr=arguments.learning_rate,
            betas=(arguments.adam_beta1, arguments.adam_beta2),
            weight_decay=arguments.weight_decay,
            fused=accelerator.device.type == "cuda",
        )
        self.lr_scheduler = build_lr_scheduler(arguments, optimizer)
        self.raw_model = model
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.average = AveragedWeights(model, arguments.ema_decay)
        self.folder = RunFolder(arguments.output_dir, accelerator.process_index)
        self.step = 0
        self.stream_state: dict[str, Any] | None = None
        self.batches: TrainingBatches | None = None
        self.sums: dict[str, Tensor] = {}

    @property
    def images_per_step(self) -> int:
        """Images of an optimizer step, in all its micro-batches and processes."""
        arguments = self.arguments
        return arguments.train_batch_size * arguments.gradient_accumulation_steps * self.accelerator.num_processes

    def train(self, batches: TrainingBatches, draw: Draw | None = None, held_out: DataLoader | None = None) -> None:
        """Train to the end.

        Args:
            batches: the training data.
            draw: makes the validation images, with the averaged weights.
            held_out: batches whose loss is measured when images are drawn.
        """
        arguments, accelerator = self.arguments, self.accelerator
        if self.step == arguments.max_train_steps:
            return
        self.batches = batches
        micro_batches = batches.start(self.step * arguments.gradient_accumulation_steps, self.stream_state)
        first = next(micro_batches)
        meter = self.build_meter(first)
        micro_batches = meter.waiting(itertools.chain([first], micro_batches))
        progress = tqdm(
            total=arguments.max_train_steps,
            initial=self.step,
            desc="Training",
            disable=not accelerator.is_local_main_process,
            mininterval=2,
        )
        while self.step < arguments.max_train_steps:
            self.train_step(micro_batches)
            meter.steps += 1
            progress.update()
            is_last = self.step == arguments.max_train_steps
            if self.step % arguments.logging_steps == 0 or is_last:
                figures = {**self.mean_metrics(), **meter.read()}
                progress.set_postfix({name: f"{value:.4g}" for name, value in figures.items()}, refresh=False)
                self.log(figures)
            if self.step % arguments.checkpointing_steps == 0 or is_last:
                self.save_checkpoint()
                meter.restart()
            if arguments.validation_steps and (self.step % arguments.validation_steps == 0 or is_last):
                self.validate(draw, held_out)
                meter.restart()
        progress.close()

    def train_step(self, micro_batches: Iterator[dict[str, Any]]) -> None:
        """Run one optimizer step over its micro-batches; draws depend on (seed, step) and the place in the step."""
        arguments, accelerator = self.arguments, self.accelerator
        self.model.train()
        num_parts = arguments.gradient_accumulation_steps
        for part in range(num_parts):
            batch = next(micro_batches)
            # for dropout inside the model, which depends on the process as well
            torch.manual_seed(draw_seed(arguments.seed, self.step, part, accelerator.process_index))
            with accelerator.accumulate(self.model):
                loss, metrics = self.model(batch, self.step, self.rng(part))
                accelerator.backward(loss)
                self.add_metrics({"loss": loss.detach(), **metrics}, 1 / num_parts)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(self.model.parameters(), arguments.max_grad_norm)
                    if norm is not None:  # DeepSpeed has none before its first step, and then a plain number
                        self.add_metrics({"grad_norm": torch.as_tensor(whole(norm), device=accelerator.device)}, 1.0)
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.lr_scheduler.step()
        self.average.step()

    def rng(self, part: int) -> StepRng:
        """Make the draws of micro-batch `part` of the current step."""
        arguments, accelerator = self.arguments, self.accelerator
        share = arguments.train_batch_size
        stride = share * accelerator.num_processes
        return StepRng(
            draw_seed(arguments.seed, self.step),
            accelerator.device,
            first=part * stride + accelerator.process_index * share,
            total=arguments.gradient_accumulation_steps * stride,
        )

    def build_meter(self, batch: dict[str, Any]) -> Meter:
        """Count the work of a step on a first batch, and measure what the machine could do."""
        arguments, accelerator = self.arguments, self.accelerator
        count = arguments.train_batch_size
        if accelerator.device.type != "cpu":  # few tell enough, and uncompiled code needs more memory for each
            count = min(count, COUNTED_IMAGES)
        part = {name: values[:count] for name, values in batch.items()}
        flops = count_training_flops(lambda: self.raw_model(part, self.step, self.rng(0))) / count
        rate = measure_matmul_rate(accelerator.device, COMPUTE_DTYPES[accelerator.mixed_precision])
        logger.info(
            "%.3g GFLOP per image, forward and backward; this machine multiplies matrices at %.3g TFLOP/s.",
            flops / 1e9,
            rate / 1e12,
        )
        images_per_process = arguments.train_batch_size * arguments.gradient_accumulation_steps
        return Meter(self.images_per_step, flops * images_per_process, rate)

    # Log and validation

    def add_metrics(self, metrics: dict[str, Tensor], weight: float) -> None:
        """Add figures of a micro-batch to those since the last entry of the log, without waiting for them."""
        for name, value in metrics.items():
            entry = torch.stack([value.float() * weight, torch.full_like(value, weight, dtype=torch.float32)])
            self.sums[name] = self.sums.get(name, 0) + entry

    def mean_metrics(self) -> dict[str, float]:
        """Means since the last call, over all processes."""
        names = list(self.sums)
        totals = self.accelerator.reduce(torch.stack([self.sums[name] for name in names]))
        self.sums = {}
        figures = {name: (total / count).item() for name, (total, count) in zip(names, totals, strict=True)}
        figures["lr"] = self.lr_scheduler.get_last_lr()[0]
        assert self.batches is not None
        skipped = torch.tensor(len(self.batches.skipped), device=self.accelerator.device)
        figures["unreadable_rows"] = self.accelerator.reduce(skipped).item()
        return figures

    def log(self, figures: dict[str, float]) -> None:
        """Append figures to the log and send them to the tracker."""
        self.accelerator.log(figures, step=self.step)
        self.folder.log(self.step, figures)

    def validate(self, draw: Draw | None, held_out: DataLoader | None) -> None:
        """Measure and draw with the averaged weights, without touching those in training.

        All processes do the same: with sharded weights, none can compute alone, and no images are drawn.
        """
        figures, sheet = {}, None
        # eager: compiling for the shapes of validation takes longer than validating
        with torch.no_grad(), self.average.applied(), torch.compiler.set_stance("force_eager"):
            if held_out is not None:
                figures["validation_loss"] = self.measure_loss(held_out)
            if draw is not None and not isinstance(self.raw_model, FSDPModule):  # it calls parts of the model
                drawn, sheet = draw()
                figures |= drawn
        if figures:
            self.log(figures)
            logger.info("Step %d: %s", self.step, figures)
        if sheet is not None and self.accelerator.is_main_process:
            save_image(sheet, self.folder.path / f"validation-{self.step}.png")
            log_image(self.accelerator, sheet, self.step)
        self.accelerator.wait_for_everyone()

    def measure_loss(self, held_out: DataLoader) -> float:
        """Mean loss of the first batches, with the same draws each time and without the aids of early training."""
        losses = []
        for number, batch in enumerate(itertools.islice(held_out, HELD_OUT_BATCHES)):
            batch.pop("unreadable", None)
            rng = StepRng(draw_seed(number, self.accelerator.process_index), self.accelerator.device)
            losses.append(self.raw_model(batch, self.arguments.max_train_steps, rng)[0].float())
        return self.accelerator.reduce(torch.stack(losses).mean(), reduction="mean").item()

    # Checkpoints

    def save_checkpoint(self) -> None:
        """Save everything a run needs to go on; older checkpoints beyond the limit are removed afterwards."""
        output_dir = self.folder.path
        folder = output_dir / f"{checkpoints.CHECKPOINT_PREFIX}{self.step}"
        self.folder.report_skipped({} if self.batches is None else self.batches.skipped)
        checkpoints.write_checkpoint(folder, self.fill_checkpoint)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            checkpoints.finish_folder(folder)
            for old in checkpoints.list_checkpoints(output_dir)[: -self.arguments.checkpoints_total_limit]:
                checkpoints.remove_folder(old)
        self.accelerator.wait_for_everyone()

    def fill_checkpoint(self, folder: Path) -> None:
        """Write what this process has to keep."""
        accelerator = self.accelerator
        accelerator.save_state(str(folder))
        self.average.save(folder, accelerator.is_main_process)
        stream_state = None if self.batches is None else self.batches.state()
        if stream_state is not None:
            (folder / f"stream_{accelerator.process_index}.json").write_text(json.dumps(stream_state))
        if accelerator.is_main_process:
            state = {
                "step": self.step,
                "num_processes": accelerator.num_processes,
                "vocabulary": self.vocabulary,
                "arguments": asdict(self.arguments),
            }
            (folder / checkpoints.STATE_FILE).write_text(json.dumps(state, indent=2))

    def resume(self) -> None:
        """Go on from the checkpoint that the options name, if any."""
        folder = checkpoints.find_checkpoint(self.arguments)
        if self.accelerator.is_main_process:
            checkpoints.clear_unfinished(self.folder.path)
        self.accelerator.wait_for_everyone()
        if folder is None:
            if self.arguments.resume_from_checkpoint == "latest":
                logger.warning("No checkpoint in %s yet: starting from the beginning.", self.folder.path)
            self.begin_record()
            return
        state = checkpoints.read_state(folder)
        options = asdict(self.arguments)
        if state.get("vocabulary", self.vocabulary) != self.vocabulary:
            raise ValueError(
                f"The classes, or the pieces of text, of the training data are others than those that {folder} was"
                " trained with, so its tables would mean something else. Go on with the same data, or start anew."
            )
        for line in checkpoints.compare_options(state, options, self.accelerator.num_processes):
            logger.warning("Going on with other options than before: %s", line)
        self.accelerator.load_state(str(folder))
        self.accelerator.step = 0  # its count of micro-batches, in the division of a step that was
        self.step = state["step"]
        self.lr_scheduler.last_epoch = self.step
        self.average.load(folder, self.step)
        stream_file = folder / f"stream_{self.accelerator.process_index}.json"
        if stream_file.is_file():
            self.stream_state = read_json(stream_file)
        self.begin_record()
        logger.info("Going on from %s at step %d.", folder, self.step)

    def begin_record(self) -> None:
        """Write the options down, and let the log end where this run begins."""
        self.folder.write_options(asdict(self.arguments))
        self.folder.cut_log(self.step)
        if self.accelerator.is_main_process:
            logger.info("Options: %s", asdict(self.arguments))
        self.accelerator.wait_for_everyone()
