"""Atomic writing of checkpoints and other folders, and which checkpoint a run resumes from.

A folder is filled under a temporary name and renamed once all its content is on disk. Under its final name it is never
modified or deleted file by file, so a run killed at any moment leaves only complete folders.
"""

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError

from ..utils.files import read_json
from .arguments import TrainingArguments
from .checksums import CHECKSUM_FILE, find_damage, find_unreadable


logger = logging.getLogger(__name__)

CHECKPOINT_PREFIX = "checkpoint-"
UNFINISHED = ".partial"
DAMAGED = ".damaged"
STATE_FILE = "training_state.json"
# Raised when writing to a full or broken disk, by the system, `torch.save` and safetensors.
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)
# Restored with the optimizer state, so new values would silently have no effect.
OPTIMIZER_OPTIONS = ("learning_rate", "adam_beta1", "adam_beta2", "weight_decay", "encoder_learning_rate_scale")
# The saved state of a stream is valid only for the same readers.
STREAM_OPTIONS = ("train_batch_size", "dataloader_num_workers", "shuffle_buffer", "seed")


class CheckpointNotWritten(OSError):
    """A checkpoint could not be written; earlier ones are untouched."""


class CheckpointDamaged(OSError, ValueError):
    """A checkpoint cannot be resumed from: its files are damaged, or of another model."""


def unfinished_name(folder: Path) -> Path:
    """Return the temporary name under which `folder` is filled."""
    return folder.with_name(folder.name + UNFINISHED)


def finish_folder(folder: Path) -> None:
    """Rename the unfinished form of `folder` to its final name, replacing an older one if there is one."""
    unfinished = unfinished_name(folder)
    for path in [*unfinished.rglob("*"), unfinished]:
        sync(path)
    if folder.exists():
        remove_folder(folder)
    os.replace(unfinished, folder)
    sync(folder.parent)


def remove_folder(folder: Path) -> None:
    """Delete a folder, renaming it first so that it is never seen half deleted."""
    doomed = folder.with_name(folder.name + ".removed" + UNFINISHED)
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(folder, doomed)
    shutil.rmtree(doomed)


def clear_unfinished(output_dir: Path) -> None:
    """Delete unfinished folders left by killed runs."""
    for folder in output_dir.glob(f"*{UNFINISHED}"):
        shutil.rmtree(folder)


def sync(path: Path) -> None:
    """Flush a file or a folder's entries to disk, so that no name appears there before its content."""
    if os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """Return complete checkpoints, oldest first."""
    folders = [path for path in Path(output_dir).glob(f"{CHECKPOINT_PREFIX}*") if step_of(path) is not None]
    return sorted(folders, key=lambda folder: step_of(folder) or 0)


def step_of(folder: Path) -> int | None:
    """Return the step in the name of a complete checkpoint, `None` for other folders."""
    number = folder.name.removeprefix(CHECKPOINT_PREFIX)
    return int(number) if number.isdigit() else None


def find_checkpoint(arguments: TrainingArguments) -> Path | None:
    """Return the checkpoint to resume from, or `None` to start from the beginning.

    Raises:
        FileNotFoundError: `resume_from_checkpoint` is not a complete checkpoint.
        FileExistsError: `output_dir` holds checkpoints of steps that this run would repeat.
    """
    choice = arguments.resume_from_checkpoint
    checkpoints = list_checkpoints(arguments.output_dir)
    if choice == "latest":
        return checkpoints[-1] if checkpoints else None
    if choice is not None and not (Path(choice) / STATE_FILE).is_file():
        raise FileNotFoundError(
            f"`resume_from_checkpoint` {choice!r} is not a complete checkpoint: it has no {STATE_FILE}. Pass a"
            " `checkpoint-<step>` folder or `latest`."
        )
    step = 0 if choice is None else read_state(Path(choice))["step"]
    later = [path.name for path in checkpoints if (step_of(path) or 0) > step]
    if later:
        raise FileExistsError(
            f"`output_dir` {arguments.output_dir!r} holds {', '.join(later)} of an earlier run, which this one would"
            f" overwrite: it starts at step {step}. Set `resume_from_checkpoint` to latest to resume, choose another"
            " `output_dir`, or delete them."
        )
    return None if choice is None else Path(choice)


def agree_on_checkpoint(arguments: TrainingArguments, accelerator: Accelerator) -> Path | None:
    """Let the main process clear what killed runs left and find a whole checkpoint; all get it, or its error."""
    found: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            clear_unfinished(Path(arguments.output_dir))
            found = [find_whole_checkpoint(arguments)]
        except (OSError, ValueError) as error:
            found = [error]
    (folder,) = broadcast_object_list(found)
    if isinstance(folder, Exception):
        raise folder
    return folder


def find_whole_checkpoint(arguments: TrainingArguments) -> Path | None:
    """Return what `find_checkpoint` does, after reading all its files; `latest` renames and passes over damaged ones.

    Raises:
        CheckpointDamaged: the checkpoint that the options name is damaged, or all of them are.
    """
    named = find_checkpoint(arguments)
    if named is None:
        return None
    is_latest = arguments.resume_from_checkpoint == "latest"
    damages: dict[Path, str] = {}
    for folder in reversed(list_checkpoints(arguments.output_dir)) if is_latest else [named]:
        damage = describe_damage(folder)
        if damage is None:
            break
        damages[folder] = damage
    else:
        raise CheckpointDamaged(
            f"`resume_from_checkpoint` {arguments.resume_from_checkpoint!r} finds no whole checkpoint: "
            + "; ".join(f"in {folder}, {damage}" for folder, damage in damages.items())
            + ". Restore the file, pass another checkpoint, or start a new run in another `output_dir`."
        )
    for damaged, damage in damages.items():  # so that it does not count as a newer checkpoint of this run
        kept = damaged.with_name(damaged.name + DAMAGED)
        shutil.rmtree(kept, ignore_errors=True)
        os.replace(damaged, kept)
        logger.warning("%s is skipped, and is now %s: %s.", damaged, kept.name, damage)
    return folder


def describe_damage(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint, or `None` if it is whole, as far as its version lets one tell."""
    try:
        state = read_state(folder)
    except (OSError, ValueError) as error:
        return f"{STATE_FILE} cannot be read: {error}"
    if "checksums" in state or (folder / CHECKSUM_FILE).exists():
        return find_damage(folder)
    logger.warning("%s is of a version without checksums: only the format of its files is checked.", folder)
    return find_unreadable(folder)


def read_state(folder: Path) -> dict[str, Any]:
    """Read the step, options and number of processes of a checkpoint.

    Raises:
        CheckpointDamaged: the file is.
    """
    try:
        state = read_json(folder / STATE_FILE)
    except ValueError as error:
        raise CheckpointDamaged(str(error)) from error
    kinds = {"step": int, "num_processes": int, "arguments": dict}
    for name, kind in kinds.items():
        if not isinstance(state, dict) or not isinstance(state.get(name), kind):
            raise CheckpointDamaged(f"{folder / STATE_FILE} is damaged: it has no valid `{name}`.")
    if step_of(folder) not in (None, state["step"]):
        raise CheckpointDamaged(f"{folder / STATE_FILE} is of step {state['step']}, unlike its folder.")
    return state


def compare_options(saved: dict[str, Any], arguments: dict[str, Any], num_processes: int) -> list[str]:
    """List the options that differ from those of a checkpoint.

    Args:
        saved: result of `read_state`.
        arguments: options of this run.
        num_processes: number of processes of this run.

    Returns:
        Lines "name: before -> now".

    Raises:
        ValueError: one of them cannot change when a run is resumed.
    """
    before = {**saved["arguments"], "num_processes": saved["num_processes"]}
    now = {**arguments, "num_processes": num_processes}
    fixed = (*OPTIMIZER_OPTIONS, *((*STREAM_OPTIONS, "num_processes") if now["streaming"] else ()))
    changed = [name for name in now if name in before and now[name] != before[name]]
    for name in fixed:
        if name in changed:
            raise ValueError(
                f"`{name}` is {now[name]}, but the checkpoint was made with {before[name]}, and a resumed run"
                " cannot change it. Set it back, or start a new run from the exported model."
            )
    if before["ema_decay"] == 0 < now["ema_decay"]:
        raise ValueError(
            f"`ema_decay` is {now['ema_decay']}, but the checkpoint was made without averaged weights, and averaging"
            " has to begin at the start. Set it to 0, or start a new run from the exported model."
        )
    silent = ("output_dir", "resume_from_checkpoint", "report_to", "push_to_hub", "hub_model_id")
    return [f"{name}: {before[name]} -> {now[name]}" for name in changed if name not in silent]


@contextmanager
def writing(folder: Path) -> Iterator[Path]:
    """Yield the temporary name under which a part of `folder` is written; `finish_folder` renames it.

    Raises:
        CheckpointNotWritten: the disk is full or not writable.
    """
    unfinished = unfinished_name(folder)
    try:
        unfinished.mkdir(parents=True, exist_ok=True)
        yield unfinished
    except WRITE_ERRORS as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        free = shutil.disk_usage(folder.parent).free
        complete = list_checkpoints(folder.parent)
        last = f"{complete[-1].name} is complete" if complete else "there is no earlier one"
        raise CheckpointNotWritten(
            f"{folder} could not be written ({error}); {free / 2**20:.0f} MiB are free on its disk and {last}. Free"
            " some space or lower `checkpoints_total_limit`, then resume with `resume_from_checkpoint` latest."
        ) from error
