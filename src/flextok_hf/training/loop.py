"""The training loop: schedule, weight averaging, logging, validation, checkpoints and resuming."""

import itertools
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from pickle import UnpicklingError
from signal import Signals
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..data.batches import TrainingBatches
from ..data.seeds import draw_seed
from ..utils.files import read_json, save_image
from . import checkpoints
from .arguments import TrainingArguments
from .checksums import CHECKSUM_FILE, write_checksums
from .optimization import build_lr_scheduler
from .run_folder import RunFolder
from .run_lock import check_owner
from .setup import log_image
from .signs import BAR_METRICS, learning_rates, schedule_notes, validation_notes, warn
from .step_rng import StepRng
from .stopping import StopRequest, TrainingStopped
from .throughput import Meter, count_training_flops, measure_matmul_rate
from .weights import AveragedWeights, whole


logger = logging.getLogger(__name__)

COUNTED_IMAGES = 4  # of the first batch, used to count the FLOPs of a step
HELD_OUT_BATCHES = 8  # of the validation data, used to measure the loss
# What `load_state` raises for files that are damaged or of another model
LOAD_ERRORS = (OSError, ValueError, RuntimeError, LookupError, EOFError, SafetensorError, UnpicklingError)
COMPUTE_DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}

# Returns validation metrics and a sheet of images
Preview = Callable[[], tuple[dict[str, float], Image.Image | None]]


class Trainer:
    """Runs one stage.

    Args:
        arguments: options of the stage.
        accelerator: handles devices, precision and processes.
        model: its `forward(batch, step, rng)` returns (loss, metrics).
        parameter_groups: optimizer groups, as for `torch.optim.AdamW`.
        vocabulary: meaning of the rows of the model's embeddings, if the data decide it: class names, text tokens.
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
        self.num_shared = 0

    @property
    def images_per_step(self) -> int:
        """Images per optimizer step, over all micro-batches and processes."""
        arguments = self.arguments
        return arguments.train_batch_size * arguments.gradient_accumulation_steps * self.accelerator.num_processes

    def train(
        self, batches: TrainingBatches, preview: Preview | None = None, held_out: DataLoader | None = None
    ) -> None:
        """Train up to `max_train_steps`.

        Args:
            batches: the training data.
            preview: returns metrics and images, called with the averaged weights.
            held_out: batches for the validation loss, measured at the same steps.
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
        with progress, StopRequest(accelerator) as request:
            while self.step < arguments.max_train_steps:
                self.train_step(micro_batches)
                meter.steps += 1
                progress.update()
                stop = request.agreed()
                is_last = self.step == arguments.max_train_steps
                if self.step % arguments.logging_steps == 0 or is_last or stop:
                    metrics = {**self.mean_metrics(), **meter.read()}
                    progress.set_postfix({name: f"{metrics[name]:.4g}" for name in BAR_METRICS}, refresh=False)
                    self.log(metrics)
                if self.step % arguments.checkpointing_steps == 0 or is_last or stop:
                    self.save_checkpoint()
                    meter.restart()
                if stop:
                    self.stop(stop)
                is_due = self.step == 1 or is_last  # after the first step, what is wrong with it shows at once
                if arguments.validation_steps and (is_due or self.step % arguments.validation_steps == 0):
                    self.validate(preview, held_out)
                    meter.restart()

    def stop(self, number: int) -> None:
        """End a run that was stopped by a signal, after its checkpoint."""
        self.accelerator.end_training()
        if self.accelerator.is_main_process:
            logger.warning(
                "Stopped by %s at step %d, with a checkpoint. To go on, start again with"
                " `--resume_from_checkpoint latest`.",
                Signals(number).name,
                self.step,
            )
        raise TrainingStopped(128 + number)

    def train_step(self, micro_batches: Iterator[dict[str, Any]]) -> None:
        """Run one optimizer step over its micro-batches; draws depend on seed, step and position in the step."""
        arguments, accelerator = self.arguments, self.accelerator
        self.model.train()
        num_parts = arguments.gradient_accumulation_steps
        for part in range(num_parts):
            batch = next(micro_batches)
            # for dropout inside the model, which also depends on the process
            torch.manual_seed(draw_seed(arguments.seed, self.step, part, accelerator.process_index))
            with accelerator.accumulate(self.model):
                loss, metrics = self.model(batch, self.step, self.rng(part))
                accelerator.backward(loss)
                self.add_metrics({"loss": loss.detach(), **metrics}, 1 / num_parts)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(self.model.parameters(), arguments.max_grad_norm)
                    if norm is not None:  # from DeepSpeed, None before its first step, then a plain number
                        self.add_metrics({"grad_norm": torch.as_tensor(whole(norm), device=accelerator.device)}, 1.0)
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.lr_scheduler.step()
        self.average.step()

    def rng(self, part: int) -> StepRng:
        """Return the random draws of micro-batch `part` of the current step."""
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
        """Count the FLOPs of a step on a first batch, and measure the machine's matmul rate."""
        arguments, accelerator = self.arguments, self.accelerator
        count = arguments.train_batch_size
        if accelerator.device.type != "cpu":  # a few suffice, and uncompiled code needs more memory per image
            count = min(count, COUNTED_IMAGES)
        part = {name: values[:count] for name, values in batch.items()}
        flops = count_training_flops(lambda: self.raw_model(part, self.step, self.rng(0))) / count
        rate = measure_matmul_rate(accelerator.device, COMPUTE_DTYPES[accelerator.mixed_precision])
        logger.info(
            "%.3g GFLOP per image, forward and backward; large matmuls on this machine reach %.3g TFLOP/s.",
            flops / 1e9,
            rate / 1e12,
        )
        images_per_process = arguments.train_batch_size * arguments.gradient_accumulation_steps
        return Meter(self.images_per_step, flops * images_per_process, rate)

    # Logging and validation

    def add_metrics(self, metrics: dict[str, Tensor], weight: float) -> None:
        """Add metrics of a micro-batch to the sums since the last log entry, without waiting for the device."""
        for name, value in metrics.items():
            entry = torch.stack([value.float() * weight, torch.full_like(value, weight, dtype=torch.float32)])
            self.sums[name] = self.sums.get(name, 0) + entry

    def mean_metrics(self) -> dict[str, float]:
        """Return the means since the last call, over all processes."""
        names = list(self.sums)
        totals = self.accelerator.reduce(torch.stack([self.sums[name] for name in names]))
        self.sums = {}
        means = dict(zip(names, (totals[:, 0] / totals[:, 1]).tolist(), strict=True))
        means |= learning_rates(self.arguments, self.lr_scheduler.get_last_lr()[0] / self.lr_scheduler.base_lrs[0])
        means["unreadable_rows"] = self.share_skipped()
        return means

    def share_skipped(self) -> int:
        """Tell all processes of the rows that any of them skipped since the last call; return how many there are."""
        if self.batches is None:
            return 0
        skipped = self.batches.skipped
        for fresh in gather_object([dict(itertools.islice(skipped.items(), self.num_shared, None))]):
            skipped.update(fresh)
        self.num_shared = len(skipped)
        return self.num_shared

    def log(self, metrics: dict[str, float]) -> None:
        """Append metrics to the log and send them to the tracker."""
        self.accelerator.log(metrics, step=self.step)
        self.folder.log(self.step, metrics)

    def validate(self, preview: Preview | None, held_out: DataLoader | None) -> None:
        """Validate with the averaged weights, in all processes: with sharded weights, none can compute alone."""
        metrics, sheet = {}, None
        # eager: compiling for the shapes of validation takes longer than validation itself
        with torch.no_grad(), self.average.applied(), torch.compiler.set_stance("force_eager"):
            if held_out is not None:
                metrics["validation_loss"] = self.measure_loss(held_out)
            if preview is not None and not isinstance(self.raw_model, FSDPModule):  # it calls submodules
                more, sheet = preview()
                metrics |= more
        if metrics:
            self.log(metrics)
            logger.info("Step %d: %s", self.step, metrics)
        if self.accelerator.is_main_process:
            warn(validation_notes(metrics))
        if sheet is not None and self.accelerator.is_main_process:
            save_image(sheet, self.folder.path / f"validation-{self.step}.png")
            log_image(self.accelerator, sheet, self.step)
        self.accelerator.wait_for_everyone()

    def measure_loss(self, held_out: DataLoader) -> float:
        """Return the mean loss of the first batches, with the same draws each time and no early-training aids."""
        losses = []
        for number, batch in enumerate(itertools.islice(held_out, HELD_OUT_BATCHES)):
            batch.pop("unreadable", None)
            rng = StepRng(draw_seed(number, self.accelerator.process_index), self.accelerator.device)
            losses.append(self.raw_model(batch, self.arguments.max_train_steps, rng)[0].float())
        return self.accelerator.reduce(torch.stack(losses).mean(), reduction="mean").item()

    # Checkpoints

    def save_checkpoint(self) -> None:
        """Save everything needed to resume, then delete the oldest checkpoints beyond the limit."""
        output_dir = self.folder.path
        folder = output_dir / f"{checkpoints.CHECKPOINT_PREFIX}{self.step}"
        self.share_skipped()
        self.folder.report_skipped({} if self.batches is None else self.batches.skipped)
        if self.accelerator.is_main_process:
            check_owner(output_dir)
        with checkpoints.writing(folder) as unfinished:
            self.fill_checkpoint(unfinished)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            with checkpoints.writing(folder) as unfinished:
                write_checksums(unfinished)
            checkpoints.finish_folder(folder)
            for old in checkpoints.list_checkpoints(output_dir)[: -self.arguments.checkpoints_total_limit]:
                checkpoints.remove_folder(old)
        self.accelerator.wait_for_everyone()

    def fill_checkpoint(self, folder: Path) -> None:
        """Write this process's part of a checkpoint."""
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
                "checksums": CHECKSUM_FILE,
                "arguments": asdict(self.arguments),
            }
            (folder / checkpoints.STATE_FILE).write_text(json.dumps(state, indent=2))

    def resume(self) -> None:
        """Resume from the checkpoint that the options specify, if any."""
        folder = checkpoints.agree_on_checkpoint(self.arguments, self.accelerator)
        if folder is None:
            if self.arguments.resume_from_checkpoint == "latest":
                logger.warning("No checkpoint in %s yet: starting from the beginning.", self.folder.path)
            self.begin_record()
            return
        state = checkpoints.read_state(folder)
        options = asdict(self.arguments)
        if state.get("vocabulary", self.vocabulary) != self.vocabulary:
            raise ValueError(
                f"The classes, or the text tokens, of the training data differ from those that {folder} was trained"
                " with, so its embeddings would change their meaning. Resume with the same data, or start a new run."
            )
        for line in checkpoints.compare_options(state, options, self.accelerator.num_processes):
            logger.warning("Option changed since the checkpoint: %s", line)
        try:
            self.accelerator.load_state(str(folder))
            self.average.load(folder, state["step"])
        except LOAD_ERRORS as error:
            raise checkpoints.CheckpointDamaged(
                f"{folder} cannot be loaded: it is of a model with other sizes or parts, or damaged ({error})"
            ) from error
        self.accelerator.step = 0  # its micro-batch counter, which follows the previous split of a step
        self.step = state["step"]
        self.lr_scheduler.last_epoch = self.step
        stream_file = folder / f"stream_{self.accelerator.process_index}.json"
        if stream_file.is_file():
            self.stream_state = read_json(stream_file)
        self.begin_record()
        logger.info("Resuming from %s at step %d.", folder, self.step)

    def begin_record(self) -> None:
        """Save the options, and truncate the log to where this run begins."""
        self.folder.write_options(asdict(self.arguments))
        self.folder.cut_log(self.step)
        if self.accelerator.is_main_process:
            logger.info("Options: %s", asdict(self.arguments))
            warn(schedule_notes(self.arguments))
        self.accelerator.wait_for_everyone()
