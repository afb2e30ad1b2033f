"""Test helper: training in separate processes, several at a time, killed, or with little disk space."""

import gc
import multiprocessing
import os
import signal
import socket
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file

from flextok_hf.training.arguments import TrainingArguments
from flextok_hf.training.loop import Trainer


STUCK_AFTER = 600  # seconds
SMALL_DATA = {"resolution": 16, "max_train_samples": 24, "train_batch_size": 4, "num_validation_images": 2}
SMALL_TOKENIZER = {
    "num_registers": 4,
    "fsq_levels": [5, 3],
    "head_dim": 16,
    "encoder_hidden_size": 32,
    "encoder_num_layers": 1,
    "encoder_patch_size": 4,
    "decoder_hidden_size": 32,
    "decoder_num_layers": 1,
    "decoder_patch_size": 4,
}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run_rank(train: Callable[[], object], environment: dict[str, str], error_file: Path) -> None:
    os.environ.update(environment)
    AcceleratorState._reset_state(reset_partial_state=True)  # drop the state of the parent process
    GradientState._reset_state()
    torch.set_num_threads(1)
    try:
        train()
    except BaseException as error:
        error_file.write_text(traceback.format_exc())
        traceback.clear_frames(error.__traceback__)
        raise
    finally:
        # what holds the process group goes first: freed after the group, it can wait for the group's threads forever
        gc.collect()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def start(train: Callable[[], object], folder: Path, num_processes: int = 1) -> list:
    """Run `train` in forked processes, with the environment that torchrun would set."""
    folder.mkdir(parents=True, exist_ok=True)
    context, port, processes = multiprocessing.get_context("fork"), str(free_port()), []
    for rank in range(num_processes):
        environment = {"ACCELERATE_USE_CPU": "true"}
        if num_processes > 1:
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_processes)}
            environment |= {"LOCAL_WORLD_SIZE": str(num_processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        error_file = folder / f"error-{rank}.txt"
        error_file.unlink(missing_ok=True)
        processes.append(context.Process(target=run_rank, args=(train, environment, error_file)))
        processes[-1].start()
    return processes


def run(train: Callable[[], object], folder: Path, num_processes: int = 1) -> list[int]:
    """Run `train` to the end and return the exit codes; a process that never ends is killed, which gives -9."""
    processes = start(train, folder, num_processes)
    for process in processes:
        process.join(STUCK_AFTER)
        process.kill()  # does nothing to one that has ended
        process.join()
    return [process.exitcode for process in processes]


def die_after(step: int, train: Callable, arguments: TrainingArguments) -> None:
    """Train until one step after `step`, then die as if killed by the system; only in a separate process."""
    train_step = Trainer.train_step

    def fatal_step(trainer, micro_batches):
        train_step(trainer, micro_batches)
        if trainer.step == step + 1:
            os.kill(os.getpid(), signal.SIGKILL)

    Trainer.train_step = fatal_step
    train(arguments)


def errors(folder: Path) -> str:
    return "".join(file.read_text() for file in sorted(folder.glob("error-*.txt")))


def assert_same_state(folder: Path, other: Path) -> None:
    """Compare two checkpoints bit by bit: weights, average, optimizer, schedule, position in a stream."""
    own = {"training_state.json", "checksums.json"}  # with the options
    names = {path.name for path in folder.iterdir()} - own
    assert names == {path.name for path in other.iterdir()} - own
    for name in sorted(names):
        if name.endswith(".safetensors"):
            one, two = load_file(folder / name), load_file(other / name)
        elif name.endswith(".json"):
            one, two = (folder / name).read_text(), (other / name).read_text()
        elif name.startswith("random_states"):
            continue  # states of global generators, unused in training
        else:
            one, two = (torch.load(path / name, weights_only=True) for path in (folder, other))
        assert_same(one, two, name)


def assert_same(one: object, two: object, where: str) -> None:
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, two), where
    elif isinstance(one, dict):
        assert one.keys() == two.keys(), where
        for key, value in one.items():
            assert_same(value, two[key], f"{where}: {key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(two), where
        for number, (first, second) in enumerate(zip(one, two, strict=True)):
            assert_same(first, second, f"{where}: {number}")
    else:
        assert one == two, where
