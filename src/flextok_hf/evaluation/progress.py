"""Run a measurement over samples: in batches, split over processes, saved regularly and resumable.

Process p of n measures the samples p, p + n, p + 2n, ... Each saves its sums to its own file; at the end the main
process merges the files. Nothing is gathered while measuring, and a killed evaluation resumes from its last save.
"""

import json
import shutil
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm.auto import tqdm

from ..utils.files import write_atomically
from .accumulators import CONCATENATED_STATES, Accumulator


SAVE_SECONDS = 30.0
SAVE_SHARE = 0.02  # of the time; sums of feature products take gigabytes


class Evaluation:
    """Samples 0 to N - 1 measured into accumulators.

    Args:
        name: name of this pass over the samples, and of its files.
        accumulators: running sums; nested `ModuleDict`s of metrics.
        num_samples: N.
        batch_size: samples measured at a time; results do not depend on it.
        protocol: everything that results depend on; saved sums of another protocol are refused.
        folder: where sums are saved; deleted by `discard`.
        state: process index and number of processes.

    Attributes:
        skipped: reason by sample, for samples that could not be measured.
        seconds: time spent measuring, over all runs and summed over processes.
    """

    def __init__(
        self,
        name: str,
        accumulators: nn.ModuleDict,
        num_samples: int,
        batch_size: int,
        protocol: dict,
        folder: Path,
        state: PartialState,
    ):
        self.name, self.accumulators, self.batch_size, self.folder, self.state = (
            name,
            accumulators,
            batch_size,
            folder,
            state,
        )
        self.samples = list(range(num_samples))[state.process_index :: state.num_processes]
        self.protocol_hash = sha256(json.dumps([protocol, num_samples], sort_keys=True).encode()).hexdigest()
        self.position = 0
        self.skipped: dict[int, str] = {}
        self.seconds = 0.0
        self.resume()

    def path(self, process_index: int) -> Path:
        """Return the file of one process."""
        return self.folder / f"{self.name}-{process_index + 1}-of-{self.state.num_processes}.safetensors"

    def run(self, measure: Callable[[list[int]], dict[int, str]]) -> None:
        """Measure the remaining samples, and merge the sums of all processes.

        Args:
            measure: adds a batch of samples to the accumulators and returns the skipped ones with reasons.
        """
        next_save = time.monotonic() + SAVE_SECONDS
        is_main = self.state.is_main_process
        bar = tqdm(total=len(self.samples), initial=self.position, desc=self.name, unit="sample", disable=not is_main)
        while self.position < len(self.samples):
            start = time.perf_counter()
            batch = self.samples[self.position : self.position + self.batch_size]
            self.skipped |= measure(batch)
            self.position += len(batch)
            self.seconds += time.perf_counter() - start
            bar.update(len(batch))
            now = time.monotonic()
            if now > next_save:
                self.save()
                saved = time.monotonic()
                next_save = saved + max(SAVE_SECONDS, (saved - now) / SAVE_SHARE)
        bar.close()
        self.save()
        self.state.wait_for_everyone()
        if is_main and self.state.num_processes > 1:
            self.merge()
        self.state.wait_for_everyone()

    def save(self) -> None:
        """Write the sums and the position of this process atomically."""
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = dict(self.accumulators.state_dict())
        metadata = {
            "protocol": self.protocol_hash,
            "position": str(self.position),
            "skipped": json.dumps(self.skipped),
            "seconds": str(self.seconds),
        }
        write_atomically(self.path(self.state.process_index), lambda path: save_file(tensors, path, metadata))

    def load(self, process_index: int) -> dict[str, str]:
        """Load the sums of one process and return the metadata saved with them."""
        path = self.path(process_index)
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        if metadata["protocol"] != self.protocol_hash:
            raise ValueError(
                f"{path} holds an unfinished evaluation of another model, dataset or protocol. Resume it with its own"
                " options, or delete the folder to start over."
            )
        self.accumulators.load_state_dict(load_file(path))
        for module in self.accumulators.modules():
            if isinstance(module, Accumulator):
                module.mark_as_used()
        return metadata

    def resume(self) -> None:
        """Resume from the file of this process, if there is one."""
        files = sorted(self.folder.glob(f"{self.name}-*-of-*.safetensors"))
        mismatched = [path for path in files if not path.stem.endswith(f"-of-{self.state.num_processes}")]
        if mismatched:
            raise ValueError(
                f"{mismatched[0]} was not written by {self.state.num_processes} process(es). Use the same number of"
                " processes as before, or delete the folder to start over."
            )
        if self.path(self.state.process_index).is_file():
            metadata = self.load(self.state.process_index)
            self.position = int(metadata["position"])
            self.skipped = {int(sample): reason for sample, reason in json.loads(metadata["skipped"]).items()}
            self.seconds = float(metadata["seconds"])

    def merge(self) -> None:
        """Add up the sums of all processes in the accumulators of this process."""
        total: dict[str, torch.Tensor] = {}
        skipped: dict[int, str] = {}
        seconds = 0.0
        for process_index in range(self.state.num_processes):
            metadata = self.load(process_index)
            skipped |= {int(sample): reason for sample, reason in json.loads(metadata["skipped"]).items()}
            seconds += float(metadata["seconds"])
            for name, tensor in self.accumulators.state_dict().items():
                if name not in total:
                    total[name] = tensor.clone()
                elif name.rpartition(".")[2] in CONCATENATED_STATES:
                    total[name] = torch.cat([total[name], tensor])
                else:
                    total[name] += tensor
        self.accumulators.load_state_dict(total)
        self.skipped, self.seconds = dict(sorted(skipped.items())), seconds

    def discard(self) -> None:
        """Delete the saved sums; called once the results are written."""
        self.state.wait_for_everyone()
        if self.state.is_main_process:
            shutil.rmtree(self.folder, ignore_errors=True)
