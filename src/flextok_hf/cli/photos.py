"""Photos named on the command line, or found in folders that are."""

import argparse
from collections.abc import Iterable, Mapping, Sequence

from PIL import Image

from ..pipelines.images import load_image
from .opening import report


MAX_SHOWN = 5  # unreadable files


class PhotoReader:
    """Reads photos in batches. Files found in a folder that cannot be read are skipped; one named itself is an error.

    Args:
        found: the folder in which each file was found; files that were named themselves are not in it.

    Attributes:
        used: the files that were read, in order.
        skipped: why others could not be read.
    """

    def __init__(self, found: Mapping[str, str]):
        self.found = found
        self.used: list[str] = []
        self.skipped: dict[str, str] = {}

    def read(self, paths: Iterable[str]) -> list[Image.Image]:
        """Return the photos that can be read; `used` has their paths."""
        photos = []
        for path in paths:
            try:
                photos.append(load_image(path))
                self.used.append(path)
            except (ValueError, OSError) as error:
                if path not in self.found:
                    raise
                self.skipped[path] = " ".join(str(error).split())
        return photos

    def check_any(self) -> None:
        """Raise a ValueError if no photo could be read."""
        if not self.used:
            raise ValueError(f"none of {len(self.skipped)} files can be read: {self.describe(list(self.skipped))}")

    def report(self, options: argparse.Namespace) -> None:
        """Print how many files were skipped, and why."""
        if self.skipped:
            report(options, f"skipped {len(self.skipped)} unreadable: {self.describe(list(self.skipped))}")

    def describe(self, paths: Sequence[str]) -> str:
        """Return the reasons of the first files; they name the files."""
        more = f"; and {len(paths) - MAX_SHOWN} more" if len(paths) > MAX_SHOWN else ""
        return "; ".join(self.skipped[path] for path in paths[:MAX_SHOWN]) + more
