"""Several processes, kills and full disks: a run gives the same result in spite of them."""

import importlib.util
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import PartialState
from accelerate.utils import DistributedType
from image_rows import write_parquet
from paths import SCRIPTS
from safetensors.torch import load_file
from training_processes import SMALL_DATA, SMALL_TOKENIZER, assert_same_state, die_after, errors, free_port, run, start

from flextok_hf.training.arguments import TokenizerArguments
from flextok_hf.training.checkpoints import list_checkpoints
from flextok_hf.training.stages import train_tokenizer


def arguments_for(folder, **changes):
    schedule = {"max_train_steps": 6, "lr_warmup_steps": 2, "ema_decay": 0.9, "checkpointing_steps": 3}
    schedule |= {"logging_steps": 1, "validation_steps": 0}
    return TokenizerArguments(output_dir=str(folder), **{**SMALL_DATA, **SMALL_TOKENIZER, **schedule, **changes})


def curve(folder):
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def losses(folder):
    return torch.tensor([entry["loss"] for entry in curve(folder) if "loss" in entry])


# Splits of a step


PENALTY = {"unrounded_probability": 0.5, "feature_penalty": 0.1, "max_train_steps": 8, "checkpointing_steps": 8}


@pytest.mark.parametrize("options", [{}, {"joint_lengths": True}, PENALTY], ids=["plain", "joint lengths", "penalty"])
def test_two_processes_have_the_loss_curve_of_one(tmp_path, options):
    one = arguments_for(tmp_path / "one", train_batch_size=8, **options)
    two = replace(one, output_dir=str(tmp_path / "two"), train_batch_size=4)
    assert run(lambda: train_tokenizer(one), tmp_path / "one") == [0]
    assert run(lambda: train_tokenizer(two), tmp_path / "two", num_processes=2) == [0, 0]
    torch.testing.assert_close(losses(tmp_path / "two"), losses(tmp_path / "one"), atol=1e-5, rtol=1e-5)
    assert [entry["lr"] for entry in curve(tmp_path / "two")] == pytest.approx(
        [entry["lr"] for entry in curve(tmp_path / "one")]
    )


def test_accumulated_gradients_have_the_loss_curve_of_a_large_batch(tmp_path):
    large = arguments_for(tmp_path / "large", train_batch_size=8, joint_lengths=True)
    parts = replace(large, output_dir=str(tmp_path / "parts"), train_batch_size=2, gradient_accumulation_steps=4)
    train_tokenizer(large)
    train_tokenizer(parts)
    torch.testing.assert_close(losses(tmp_path / "parts"), losses(tmp_path / "large"), atol=1e-5, rtol=1e-5)


def test_gradient_checkpointing_changes_nothing(tmp_path):
    plain = arguments_for(tmp_path / "plain")
    train_tokenizer(plain)
    train_tokenizer(replace(plain, output_dir=str(tmp_path / "saving"), gradient_checkpointing=True))
    torch.testing.assert_close(losses(tmp_path / "saving"), losses(tmp_path / "plain"), atol=1e-6, rtol=1e-6)


FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}
ZERO2 = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2",
    "ACCELERATE_GRADIENT_CLIPPING": "1.0",
    "DS_ACCELERATOR": "cpu",
}


def sharded(kind, train):
    """Train with shards. Accelerate makes them only on accelerators, so the processes pretend to have some."""
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    del os.environ["ACCELERATE_USE_CPU"]
    os.environ |= kind
    train()


@pytest.mark.parametrize("kind", [FSDP2, ZERO2], ids=["FSDP2", "ZeRO-2"])
def test_sharded_weights_have_the_loss_curve_of_whole_ones_and_are_saved_whole(tmp_path, kind):
    if kind is ZERO2 and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    whole = arguments_for(tmp_path / "whole", train_batch_size=8, feature_penalty=0.1, validation_steps=6)
    parts = replace(whole, output_dir=str(tmp_path / "parts"), train_batch_size=4)
    train_tokenizer(whole)
    assert run(lambda: sharded(kind, lambda: train_tokenizer(parts)), tmp_path / "parts", 2) == [0, 0], errors(
        tmp_path / "parts"
    )
    torch.testing.assert_close(losses(tmp_path / "parts"), losses(tmp_path / "whole"), atol=1e-5, rtol=1e-5)
    for file in ("encoder/model.safetensors", "decoder/diffusion_pytorch_model.safetensors"):
        one, two = (load_file(tmp_path / name / "pipeline" / file) for name in ("whole", "parts"))
        assert one.keys() == two.keys()
        for name, tensor in one.items():
            torch.testing.assert_close(two[name], tensor, atol=1e-5, rtol=1e-4)

    shutil.rmtree(tmp_path / "parts" / "checkpoint-6")
    straight = curve(tmp_path / "parts")
    resumed = replace(parts, resume_from_checkpoint="latest")
    assert run(lambda: sharded(kind, lambda: train_tokenizer(resumed)), tmp_path / "parts", 2) == [0, 0]
    names = ("step", "loss", "grad_norm", "validation_loss")
    again = curve(tmp_path / "parts")
    assert [[entry.get(name) for name in names] for entry in again] == [
        [entry.get(name) for name in names] for entry in straight
    ]


# Unreadable rows


@pytest.mark.parametrize("data", [{}, {"streaming": True, "shuffle_buffer": 5}, {"cache_in_memory": True}], ids=str)
def test_two_processes_over_several_epochs_count_an_unreadable_row_once(tmp_path, data):
    paths = [write_parquet(tmp_path / f"{row}.parquet", 8, damaged=(row,)) for row in range(4)]
    options = {"train_data": [str(path) for path in paths], "max_train_samples": None, "max_train_steps": 12, **data}
    arguments = arguments_for(tmp_path / "run", **options)
    assert run(lambda: train_tokenizer(arguments), tmp_path / "run", 2) == [0, 0], errors(tmp_path / "run")
    assert curve(tmp_path / "run")[-1]["unreadable_rows"] == 4
    report = json.loads((tmp_path / "run" / "unreadable_rows.json").read_text())
    assert len(report) == 4 and all("not an image" in reason for reason in report.values())
    assert not list((tmp_path / "run").glob("unreadable_rows_*"))


# Kills


@pytest.mark.parametrize("num_processes", [1, 2])
@pytest.mark.parametrize(
    "data", [{}, {"streaming": True, "shuffle_buffer": 5, "dataloader_num_workers": 1}], ids=["rows", "stream"]
)
def test_a_killed_run_resumes_to_bitwise_the_same_result(tmp_path, data, num_processes):
    options = {"random_flip": True, "gradient_accumulation_steps": 2, "unrounded_probability": 0.5, **data}
    whole = arguments_for(tmp_path / "whole", **options)
    killed = replace(whole, output_dir=str(tmp_path / "killed"))
    assert run(lambda: train_tokenizer(whole), tmp_path / "whole", num_processes) == [0] * num_processes
    run(lambda: die_after(3, train_tokenizer, killed), tmp_path / "killed", num_processes)
    assert [path.name for path in list_checkpoints(tmp_path / "killed")] == ["checkpoint-3"]
    resumed = replace(killed, resume_from_checkpoint="latest")
    assert run(lambda: train_tokenizer(resumed), tmp_path / "killed", num_processes) == [0] * num_processes
    assert_same_state(tmp_path / "whole" / "checkpoint-6", tmp_path / "killed" / "checkpoint-6")
    names = ("step", "loss", "grad_norm", "lr")
    one, two = ([[entry[name] for name in names] for entry in curve(tmp_path / run)] for run in ("whole", "killed"))
    assert one == two


@pytest.mark.parametrize("parts", [1, 4], ids=["one process", "micro-batches"])
def test_a_run_resumes_with_another_split(tmp_path, parts):
    whole = arguments_for(tmp_path / "whole", train_batch_size=8)
    assert run(lambda: train_tokenizer(whole), tmp_path / "whole") == [0]
    first = replace(whole, output_dir=str(tmp_path / "run"), train_batch_size=4)
    run(lambda: die_after(3, train_tokenizer, first), tmp_path / "run", num_processes=2)
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-3"]

    split = {"train_batch_size": 8 // parts, "gradient_accumulation_steps": parts}
    second = replace(first, resume_from_checkpoint="latest", **split)
    assert run(lambda: train_tokenizer(second), tmp_path / "run") == [0], errors(tmp_path / "run")
    torch.testing.assert_close(losses(tmp_path / "run"), losses(tmp_path / "whole"), atol=1e-5, rtol=1e-5)
    assert [entry["lr"] for entry in curve(tmp_path / "run")] == pytest.approx(
        [entry["lr"] for entry in curve(tmp_path / "whole")]
    )


def unfinished(folder):
    """Return the inodes of folders that are being written."""
    return {path.stat().st_ino for path in folder.glob("checkpoint-*.partial") if path.exists()}


def test_a_run_killed_at_any_moment_of_writing_resumes(tmp_path):
    options = {"max_train_steps": 60, "checkpointing_steps": 1, "checkpoints_total_limit": 1}
    whole = arguments_for(tmp_path / "whole", **options)
    assert run(lambda: train_tokenizer(whole), tmp_path / "whole") == [0]
    weights = load_file(tmp_path / "whole" / "checkpoint-60" / "model.safetensors").keys()

    folder, rng, moments = tmp_path / "killed", random.Random(0), []
    killed = replace(whole, output_dir=str(folder), resume_from_checkpoint="latest")
    while len(moments) < 20:
        left_over = unfinished(folder)
        (process,) = start(lambda: train_tokenizer(killed), folder)
        while process.is_alive() and not unfinished(folder) - left_over:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.1))  # about the length of a step, most of it spent on writing
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL, errors(folder)
        complete = list_checkpoints(folder)
        moments.append((len(complete), sorted(path.name for path in folder.glob("*.partial/*"))))
        for checkpoint in complete:
            assert json.loads((checkpoint / "training_state.json").read_text())["step"] < 60
            assert load_file(checkpoint / "model.safetensors").keys() == weights
    assert len({str(moment) for moment in moments}) >= 3  # the kills hit different states of the folder
    assert run(lambda: train_tokenizer(killed), folder) == [0]
    assert_same_state(tmp_path / "whole" / "checkpoint-60", folder / "checkpoint-60")
    assert not list(folder.glob("*.partial"))


# Full disks


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path):
    first = arguments_for(tmp_path, max_train_steps=4, checkpointing_steps=2)
    whole = replace(first, output_dir=str(tmp_path / "whole"))
    train_tokenizer(whole)
    run(lambda: die_after(2, train_tokenizer, first), tmp_path)
    before = {file: file.read_bytes() for file in (tmp_path / "checkpoint-2").iterdir()}

    def train_with_little_disk():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing raises an error, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
        train_tokenizer(replace(first, resume_from_checkpoint="latest"))

    assert run(train_with_little_disk, tmp_path) == [1]
    message = errors(tmp_path)
    assert "CheckpointNotWritten" in message and "MiB are free on its disk and checkpoint-2 is complete" in message
    assert before == {file: file.read_bytes() for file in (tmp_path / "checkpoint-2").iterdir()}
    assert not list(tmp_path.glob("*.partial"))
    assert run(lambda: train_tokenizer(replace(first, resume_from_checkpoint="latest")), tmp_path) == [0]
    assert_same_state(tmp_path / "whole" / "checkpoint-4", tmp_path / "checkpoint-4")


def test_a_full_disk_at_the_end_leaves_no_half_written_model(tmp_path):
    arguments = arguments_for(tmp_path, max_train_steps=1, resume_from_checkpoint="latest")
    train_tokenizer(arguments)
    shutil.rmtree(tmp_path / "pipeline")

    def export_with_little_disk():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
        train_tokenizer(arguments)

    assert run(export_with_little_disk, tmp_path) == [1]
    assert f"File too large: '{tmp_path / 'pipeline'}'" in errors(tmp_path).splitlines()[-1]
    assert not list(tmp_path.glob("pipeline*"))
    train_tokenizer(arguments)
    assert (tmp_path / "pipeline").is_dir()


# Existing checkpoints


def test_a_run_does_not_overwrite_another(tmp_path):
    arguments = arguments_for(tmp_path, max_train_steps=2, checkpointing_steps=1)
    train_tokenizer(arguments)
    with pytest.raises(FileExistsError, match="holds checkpoint-1, checkpoint-2 .*`resume_from_checkpoint` to latest"):
        train_tokenizer(arguments)
    earlier = replace(arguments, resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    with pytest.raises(FileExistsError, match="holds checkpoint-2 .* starts at step 1"):
        train_tokenizer(earlier)
    shutil.rmtree(tmp_path / "checkpoint-2")
    train_tokenizer(earlier)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-2"]
    assert [entry["step"] for entry in curve(tmp_path)] == [1, 2]


@pytest.mark.parametrize(
    ("change", "name"),
    [({"learning_rate": 0.1}, "learning_rate"), ({"streaming": True, "shuffle_buffer": 3}, "shuffle_buffer")],
)
def test_options_fixed_by_a_checkpoint_cannot_be_changed(tmp_path, change, name):
    train_tokenizer(arguments_for(tmp_path, max_train_steps=2, checkpointing_steps=1))
    other = arguments_for(tmp_path, max_train_steps=4, resume_from_checkpoint="latest", **change)
    with pytest.raises(ValueError, match=f"`{name}` is .* but the checkpoint was made with"):
        train_tokenizer(other)


def test_changed_options_are_logged(tmp_path, caplog):
    train_tokenizer(arguments_for(tmp_path, max_train_steps=2, checkpointing_steps=1))
    train_tokenizer(arguments_for(tmp_path, max_train_steps=3, resume_from_checkpoint="latest", keep_mode="uniform"))
    messages = " ".join(record.getMessage() for record in caplog.records)
    assert "max_train_steps: 2 -> 3" in messages and "keep_mode: powers_of_two -> uniform" in messages


# Commands of the documentation


@pytest.mark.slow
def test_torchrun_and_accelerate_train_alike(tmp_path):
    """Two torchrun processes get the same losses as one accelerate process, from the same options file."""
    options = {"train_data": ["synthetic"], "max_train_steps": 3, "logging_steps": 1, "validation_steps": 0}
    options |= {**SMALL_DATA, **SMALL_TOKENIZER, "feature_penalty": 0.1, "train_batch_size": 4}
    config = tmp_path / "tokenizer.yaml"
    config.write_text(yaml.safe_dump(options))
    script = SCRIPTS / "train.py"
    launchers = {
        "one": ["accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1", "--cpu"],
        "two": ["torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())],
    }
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    for name, launcher in launchers.items():
        flags = ["--config", str(config), "--output_dir", str(tmp_path / name)]
        flags += ["--train_batch_size", "8"] if name == "one" else []
        command = [sys.executable, "-m", *launcher, str(script), "tokenizer", *flags]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=script.parents[1])
        assert done.returncode == 0, done.stderr[-2000:]
        assert f"Saved {tmp_path / name / 'pipeline'}" in done.stdout
    torch.testing.assert_close(losses(tmp_path / "two"), losses(tmp_path / "one"), atol=1e-5, rtol=1e-5)
