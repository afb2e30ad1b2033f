"""A lock on the output folder of a run: two runs in one folder would mix their checkpoints."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from filelock import SoftFileLease, Timeout


logger = logging.getLogger(__name__)

LOCK_FILE = "run.lock"
HEARTBEAT_S = 5.0  # how often the owner touches the file
LEASE_S = 120.0  # an owner on another machine is given up after so long without a heartbeat
POLL_S = 0.5


@contextmanager
def locked(folder: Path, accelerator: Accelerator) -> Iterator[None]:
    """Create `folder` and hold its lock; only the main process acts, and all learn of an error.

    Raises:
        FileExistsError: another run holds the lock.
        OSError: the folder cannot be created or written to.
    """
    lock: SoftFileLease | None = None
    problems: list[OSError | None] = [None]
    if accelerator.is_main_process:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = acquire(folder)
        except OSError as error:
            problems = [error]
    (problem,) = broadcast_object_list(problems)
    if problem is not None:
        raise problem
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


def acquire(folder: Path) -> SoftFileLease:
    """Acquire the lock of `folder`, from a dead owner too: at once on the same machine, else after `LEASE_S`."""
    path = folder / LOCK_FILE
    lock = new_lock(folder)
    beats: set[float] = set()

    def shows_life() -> bool:
        if not beats:
            logger.info("Waiting up to %.0f s to see whether the owner of %s is alive.", LEASE_S, path)
        with suppress(FileNotFoundError):  # it may just have been taken over
            beats.add(path.stat().st_mtime)
        return len(beats) > 1

    try:
        lock.acquire(timeout=LEASE_S + 2 * HEARTBEAT_S, poll_interval=POLL_S, cancel_check=shows_life)
    except Timeout as error:
        raise FileExistsError(f"`output_dir` {str(folder)!r} is in use: {describe(folder)}") from error
    return lock


def check_owner(folder: Path) -> None:
    """Raise a FileExistsError if another run has taken over the lock, as when this one was suspended for long."""
    lock = new_lock(folder)
    if lock.owner is not None and not lock.is_lock_held_by_us:
        raise FileExistsError(f"`output_dir` {str(folder)!r} was taken over: {describe(folder)}")


def new_lock(folder: Path) -> SoftFileLease:
    return SoftFileLease(folder / LOCK_FILE, lease_duration=LEASE_S, heartbeat_interval=HEARTBEAT_S)


def describe(folder: Path) -> str:
    """Return the sentence about the owner of a lock."""
    owner, path = new_lock(folder).owner, folder / LOCK_FILE
    if owner is None or not path.exists():
        return f"{path} is held. Try again, or delete it if no run writes there."
    age = max(0.0, time.time() - path.stat().st_mtime)
    return (
        f"a run writes to it, process {owner.pid} on {owner.hostname}, last seen {age:.0f} s ago. Choose another"
        " `output_dir`, or stop that run first."
    )
