"""What one hostile input may lead to: a valid result, or an error of an allowed type that names its cause."""

import resource
import signal
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image


TIME_LIMIT = 10  # seconds
MEMORY_LIMIT = 2 * 2**30  # bytes that one input may add


class TookTooLong(BaseException):
    """Not an `Exception`, so that no handler takes it for a failure of its own."""


@contextmanager
def time_limit(seconds: int = TIME_LIMIT):
    """Interrupt the block after this time; only in the main thread, where signals arrive."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*args):
        raise TookTooLong

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def judge(
    call: Callable[[], Any], names: Sequence[str], errors: tuple[type[Exception], ...], passes_on: bool = False
) -> str | None:
    """Run a call; returns what is wrong with its outcome, or `None`.

    Args:
        call: the call, with its input.
        names: an error has to mention one of these: arguments or files.
        errors: allowed types of errors; subclasses too.
        passes_on: whether values that are not finite, or the id -1 for them, are no fault.
    """
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        with time_limit(), torch.no_grad():
            result = call()
    except TookTooLong:
        return f"takes over {TIME_LIMIT} s"
    except errors as error:
        is_named = any(name in str(error) for name in names) or getattr(error, "filename", None)
        if not is_named:
            return f"{type(error).__name__} names none of {', '.join(names)}: {shorten(error)}"
    except Exception as error:
        return f"{type(error).__name__} instead of {' or '.join(kind.__name__ for kind in errors)}: {shorten(error)}"
    else:
        problem = next(iter(faults_of(result)), None)
        if problem and not passes_on:
            return f"returns {problem}"
    added = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    return f"takes {added / 2**30:.1f} GiB" if added > MEMORY_LIMIT else None


def shorten(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def faults_of(result: Any) -> Iterable[str]:
    """Yield what no result may contain: values that are not finite, ids below 0, empty images."""
    if isinstance(result, torch.Tensor):
        if result.is_floating_point() and not torch.isfinite(result).all():
            yield f"values that are not finite, {tuple(result.shape)}"
        elif result.dtype == torch.int64 and (result < 0).any():
            yield f"negative ids, {tuple(result.shape)}"
    elif isinstance(result, np.ndarray):
        yield from faults_of(torch.from_numpy(result)) if result.dtype.kind in "fi" else ()
    elif isinstance(result, Image.Image):
        if 0 in result.size:
            yield f"an image of {result.size} pixels"
    elif isinstance(result, dict):
        for value in result.values():
            yield from faults_of(value)
    elif isinstance(result, list | tuple):
        for value in result:
            yield from faults_of(value)
