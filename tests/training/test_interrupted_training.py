"""Signals during training, and a second run in the same folder."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import psutil
import pytest
import yaml
from filelock import SoftFileLease
from paths import SCRIPTS
from training_processes import SMALL_DATA, SMALL_TOKENIZER, assert_same_state, errors, free_port, run, start

from flextok_hf.training import run_lock
from flextok_hf.training.arguments import TokenizerArguments
from flextok_hf.training.checkpoints import list_checkpoints
from flextok_hf.training.loop import Trainer
from flextok_hf.training.stages import train_tokenizer


def arguments_for(folder, **changes):
    schedule = {"max_train_steps": 8, "lr_warmup_steps": 2, "ema_decay": 0.9, "checkpointing_steps": 8}
    schedule |= {"logging_steps": 3, "validation_steps": 0}
    return TokenizerArguments(output_dir=str(folder), **{**SMALL_DATA, **SMALL_TOKENIZER, **schedule, **changes})


def read_log(folder):
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def signalled(arguments, step, number, only=None):
    """Train, with a signal to this process, or to process `only`, in the middle of the step after `step`."""
    train_step = Trainer.train_step

    def step_with_signal(trainer, micro_batches):
        if trainer.step == step and trainer.accelerator.process_index == (only or 0):
            signal.raise_signal(number)
        train_step(trainer, micro_batches)

    Trainer.train_step = step_with_signal  # runs in a separate process
    train_tokenizer(arguments)


# Signals


STREAM = {"streaming": True, "shuffle_buffer": 5, "dataloader_num_workers": 1}


@pytest.mark.parametrize("data", [{}, {"dataloader_num_workers": 1}, STREAM], ids=["rows", "workers", "stream"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_after_a_step_with_a_checkpoint_that_goes_on_bitwise_alike(tmp_path, data, number):
    whole = arguments_for(tmp_path / "whole", **data)
    assert run(lambda: train_tokenizer(whole), tmp_path / "whole") == [0]
    stopped = replace(whole, output_dir=str(tmp_path / "stopped"))
    assert run(lambda: signalled(stopped, 4, number), tmp_path / "stopped") == [128 + number]
    assert [path.name for path in list_checkpoints(tmp_path / "stopped")] == ["checkpoint-5"]
    assert not (tmp_path / "stopped" / "run.lock").exists()
    assert [entry["step"] for entry in read_log(tmp_path / "stopped")] == [3, 5]  # nothing measured is lost
    resumed = replace(stopped, resume_from_checkpoint="latest")
    assert run(lambda: train_tokenizer(resumed), tmp_path / "stopped") == [0]
    assert_same_state(tmp_path / "whole" / "checkpoint-8", tmp_path / "stopped" / "checkpoint-8")


@pytest.mark.parametrize("only", [0, 1])
def test_a_signal_to_one_of_two_processes_ends_both_at_the_same_step(tmp_path, only):
    whole = arguments_for(tmp_path / "whole")
    assert run(lambda: train_tokenizer(whole), tmp_path / "whole", 2) == [0, 0]
    stopped = replace(whole, output_dir=str(tmp_path / "stopped"))
    codes = run(lambda: signalled(stopped, 3, signal.SIGTERM, only), tmp_path / "stopped", 2)
    assert codes == [143, 143], errors(tmp_path / "stopped")
    assert [path.name for path in list_checkpoints(tmp_path / "stopped")] == ["checkpoint-5"]  # agreed a step later
    resumed = replace(stopped, resume_from_checkpoint="latest")
    assert run(lambda: train_tokenizer(resumed), tmp_path / "stopped", 2) == [0, 0]
    assert_same_state(tmp_path / "whole" / "checkpoint-8", tmp_path / "stopped" / "checkpoint-8")


def test_a_second_signal_ends_a_run_at_once_and_it_can_be_resumed(tmp_path):
    arguments = arguments_for(tmp_path, resume_from_checkpoint="latest")

    def train_slowly():
        Trainer.train_step = lambda *_: time.sleep(60)
        train_tokenizer(arguments)

    (process,) = start(train_slowly, tmp_path)
    wait_for((tmp_path / "arguments.json").exists)
    time.sleep(1)  # the step has begun
    os.kill(process.pid, signal.SIGINT)
    time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)  # passed on by a launcher: the same wish
    time.sleep(1.2)
    assert process.is_alive()
    os.kill(process.pid, signal.SIGINT)
    process.join(5)
    assert process.exitcode == -signal.SIGINT
    assert run(lambda: train_tokenizer(arguments), tmp_path) == [0]


def test_a_signal_in_the_last_step_leaves_only_the_export_to_do(tmp_path):
    arguments = arguments_for(tmp_path, max_train_steps=2)
    assert run(lambda: signalled(arguments, 1, signal.SIGTERM), tmp_path) == [143]
    assert not (tmp_path / "pipeline").exists()
    assert run(lambda: train_tokenizer(replace(arguments, resume_from_checkpoint="latest")), tmp_path) == [0]
    assert (tmp_path / "pipeline").is_dir()


def test_handlers_of_the_caller_are_back_after_training(tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    train_tokenizer(arguments_for(tmp_path, max_train_steps=1))
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def write_config(folder):
    options = {"train_data": ["synthetic"], "validation_steps": 0, "logging_steps": 1, **SMALL_DATA, **SMALL_TOKENIZER}
    options |= {"output_dir": str(folder / "run"), "max_train_steps": 10**6, "checkpointing_steps": 10**6}
    (folder / "tokenizer.yaml").write_text(yaml.safe_dump({**options, "dataloader_num_workers": 1}))
    return [str(SCRIPTS / "train.py"), "tokenizer", "--config", str(folder / "tokenizer.yaml")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "number"), [("python", signal.SIGINT), ("python", signal.SIGTERM), ("torchrun", signal.SIGTERM)]
)
def test_a_signal_to_everything_leaves_a_checkpoint(tmp_path, launcher, number):
    """A terminal or a scheduler signals all processes: those of training, their workers, and the launcher."""
    command = write_config(tmp_path)
    if launcher == "torchrun":
        flags = ["--nproc_per_node", "2", "--master_port", str(free_port())]
        command = ["-m", "torch.distributed.run", *flags, *command]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, *command], env=environment, **streams)
    log = tmp_path / "run" / "log.jsonl"
    wait_for(lambda: log.exists() and log.read_text().count("\n") > 2, seconds=120)
    family = psutil.Process(process.pid)
    for member in [*family.children(recursive=True), family]:
        member.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert len(list_checkpoints(tmp_path / "run")) == 1, stderr
    assert "To go on, start again with `--resume_from_checkpoint latest`" in stderr
    if launcher == "python":
        assert process.returncode == 128 + number and "Traceback" not in stderr


# Two runs in one folder


@pytest.fixture
def hasty(monkeypatch):
    """Locks with shorter times."""
    monkeypatch.setattr(run_lock, "HEARTBEAT_S", 0.2)
    monkeypatch.setattr(run_lock, "LEASE_S", 2.0)
    monkeypatch.setattr(run_lock, "POLL_S", 0.1)


def hold(folder, path):
    lock = run_lock.acquire(Path(folder))
    Path(path).touch()
    time.sleep(60)
    lock.release()


@pytest.fixture
def holder(hasty, tmp_path):
    """A process that holds the lock of the folder."""
    process = get_context("fork").Process(target=hold, args=(tmp_path, tmp_path / "held"))
    process.start()
    wait_for((tmp_path / "held").exists)
    yield process
    process.kill()
    process.join()


def test_a_second_run_in_a_folder_is_refused_by_name(holder, tmp_path):
    message = f"`output_dir` .* is in use: a run writes to it, process {holder.pid} on .*, last seen . s ago"
    with pytest.raises(FileExistsError, match=message):
        train_tokenizer(arguments_for(tmp_path, max_train_steps=1))
    assert not list_checkpoints(tmp_path) and not (tmp_path / "arguments.json").exists()


def test_all_processes_of_a_second_run_are_refused(holder, tmp_path):
    arguments = arguments_for(tmp_path, max_train_steps=1)
    assert run(lambda: train_tokenizer(arguments), tmp_path / "errors", 2) == [1, 1]
    assert errors(tmp_path / "errors").count("FileExistsError: `output_dir`") == 2


def test_the_lock_of_a_killed_run_is_taken_over_at_once(holder, tmp_path):
    holder.kill()
    holder.join()
    assert (tmp_path / "run.lock").exists()
    begin = time.monotonic()
    lock = run_lock.acquire(tmp_path)
    assert time.monotonic() - begin < 1 and lock.is_lock_held_by_us
    lock.release()


def test_another_process_with_the_number_of_a_dead_owner_does_not_keep_its_lock(hasty, tmp_path):
    lock = run_lock.acquire(tmp_path)
    host = lock.owner.hostname
    lock.release()
    write_foreign_lock(tmp_path, host=host, pid=os.getppid(), start=1)
    begin = time.monotonic()
    run_lock.acquire(tmp_path).release()
    assert time.monotonic() - begin < 1


def write_foreign_lock(folder, host="another-machine", pid=123, start=1):
    """Write the lock of a run on another machine."""
    lines = ["filelock/2", f"pid={pid}", f"host={host}", "mode=lease", "token=" + "0" * 32]
    lines += [f"duration={run_lock.LEASE_S!r}", f"start={start}"]
    (folder / "run.lock").write_text("\n".join(lines) + "\n")


def test_the_lock_of_another_machine_is_taken_over_when_it_is_old(hasty, tmp_path):
    write_foreign_lock(tmp_path)
    begin = time.monotonic()
    run_lock.acquire(tmp_path).release()
    assert 1 < time.monotonic() - begin < 4


def test_the_lock_of_another_machine_that_shows_life_is_respected(hasty, tmp_path):
    write_foreign_lock(tmp_path)

    def touch():
        for _ in range(100):
            os.utime(tmp_path / "run.lock")
            time.sleep(0.2)

    process = get_context("fork").Process(target=touch)
    process.start()
    try:
        with pytest.raises(FileExistsError, match="process 123 on another-machine, last seen 0 s ago"):
            run_lock.acquire(tmp_path)
    finally:
        process.kill()
        process.join()


@pytest.mark.parametrize("content", ["", "garbage", "123\n"])
def test_a_lock_file_without_an_owner_does_not_keep_a_run_from_its_folder_for_good(hasty, tmp_path, content):
    (tmp_path / "run.lock").write_text(content)
    try:
        run_lock.acquire(tmp_path).release()
    except FileExistsError as error:
        assert "delete it if no run writes there" in str(error)


def test_the_lock_is_released_after_an_error(tmp_path):
    arguments = arguments_for(tmp_path, max_train_steps=1, train_data=[str(tmp_path / "nowhere.parquet")])
    with pytest.raises(FileNotFoundError):
        train_tokenizer(arguments)
    assert not (tmp_path / "run.lock").exists()
    train_tokenizer(replace(arguments, train_data=["synthetic"]))


def test_a_run_whose_lock_was_taken_over_writes_no_checkpoint(tmp_path, monkeypatch):
    arguments = arguments_for(tmp_path, max_train_steps=2)
    train_step = Trainer.train_step

    def lose_the_lock(trainer, micro_batches):
        (tmp_path / "run.lock").unlink()
        write_foreign_lock(tmp_path)
        train_step(trainer, micro_batches)

    monkeypatch.setattr(Trainer, "train_step", lose_the_lock)
    with pytest.raises(FileExistsError, match="`output_dir` .* was taken over: .* process 123 on another-machine"):
        train_tokenizer(arguments)
    assert not list_checkpoints(tmp_path)
    assert SoftFileLease(tmp_path / "run.lock", lease_duration=120.0).owner.hostname == "another-machine"


def test_the_owner_on_this_machine_is_named(hasty, tmp_path):
    lock = run_lock.acquire(tmp_path)
    assert f"process {os.getpid()} on {socket.gethostname()}" in run_lock.describe(tmp_path)
    lock.release()
