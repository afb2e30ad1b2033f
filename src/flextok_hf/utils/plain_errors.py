"""What scripts do not say, and how they end on what is no fault of the program: wrong input, a full disk, Ctrl-C."""

import errno
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module


DEBUG = "--debug"  # option of every script: errors keep their traceback
ADVICE = {
    errno.ENOSPC: "Free some space, or choose another folder.",
    errno.EDQUOT: "Free some space, or choose another folder.",
    errno.EFBIG: "Raise the limit on file sizes (`ulimit -f`), or choose another folder.",
    errno.EROFS: "Choose a folder that can be written to.",
    errno.EACCES: "Change the permissions, or choose another folder.",
    errno.EPERM: "Change the permissions, or choose another folder.",
    errno.EMFILE: "Raise the limit on open files (`ulimit -n`), or use fewer worker processes.",
}


@contextmanager
def plain_errors() -> Iterator[None]:
    """Run the main function of a script: errors that a user can fix are one line on stderr, without a traceback.

    `--debug` among the arguments of the script, from which it is removed, keeps the traceback. What
    libraries say and nobody can act on is hidden from then on; see `quiet_libraries`.

    Raises:
        SystemExit: with code 1 for such an error, 130 for Ctrl-C.
    """
    is_debugging = DEBUG in sys.argv[1:]
    sys.argv[1:] = [word for word in sys.argv[1:] if word != DEBUG]
    quiet_libraries()
    try:
        yield
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        raise SystemExit(130) from None
    except (OSError, ValueError, TypeError) as error:
        if is_debugging:
            raise
        text = describe(error) if isinstance(error, OSError) else " ".join(str(error).split()) or type(error).__name__
        print(f"error: {text} (`{DEBUG}` shows where)", file=sys.stderr)
        raise SystemExit(1) from None


def quiet_libraries() -> None:
    """Hide the bars for loading and saving models, and accelerate's note that tied weights are saved once."""
    for name in ("transformers", "diffusers"):
        if name in sys.modules:  # the script uses it; importing it takes seconds
            import_module(f"{name}.utils.logging").disable_progress_bar()
    note = "Removed shared tensor"
    logging.getLogger("accelerate.utils.other").addFilter(lambda record: note not in record.getMessage())


def describe(error: OSError) -> str:
    """Return one sentence about an error of files or disks, and what to do."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    text = lines[-1] if lines[0].startswith("Caught ") else " ".join(" ".join(lines).split())  # from a worker process
    if error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return f"{text.rstrip('.')}. {ADVICE.get(error.errno or 0, '')}".strip()
