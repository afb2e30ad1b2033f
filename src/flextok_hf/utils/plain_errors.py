"""How the scripts end on what is not a fault of the program: a full disk, a missing file, Ctrl-C."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


TRACEBACK = "FLEXTOK_TRACEBACK"  # environment variable; if set, errors keep their traceback
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
    """Run the main function of a script: errors of files and disks are one line on stderr, without a traceback.

    Raises:
        SystemExit: with code 1 for such an error, 130 for Ctrl-C.
    """
    try:
        yield
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        raise SystemExit(130) from None
    except OSError as error:
        if os.environ.get(TRACEBACK):
            raise
        print(f"error: {describe(error)}", file=sys.stderr)
        raise SystemExit(1) from None


def describe(error: OSError) -> str:
    """Return one sentence about an error of files or disks, and what to do."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    text = lines[-1] if lines[0].startswith("Caught ") else " ".join(" ".join(lines).split())  # from a worker process
    if error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return f"{text.rstrip('.')}. {ADVICE.get(error.errno or 0, '')}".strip()
