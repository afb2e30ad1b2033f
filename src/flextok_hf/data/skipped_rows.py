"""Rows that cannot be used: counted, named in a warning, and never trained on."""

import logging

from .columns import Columns


logger = logging.getLogger(__name__)

MAX_UNREADABLE_ROWS = 100  # one after the other; more than that is not a damaged file but a wrong data set
MAX_WARNINGS = 20  # of unreadable rows, from each reading process; the report has them all


class UnreadableRow(ValueError):
    """A row that cannot be trained on: its image is damaged or its caption is missing."""


class SkippedRows(dict):
    """Reasons by row, for the rows that could not be used. The first ones are warned of.

    Args:
        fail: raise an error at the first one instead.
    """

    def __init__(self, fail: bool):
        super().__init__()
        self.fail = fail

    def add(self, row: int | str, reason: Exception) -> None:
        """Note a row, once.

        Raises:
            ValueError: if unreadable rows are to stop the training.
        """
        if row in self:
            return
        if self.fail:
            raise ValueError(f"Row {row} cannot be used: {reason}, and `fail_on_unreadable` is set.") from reason
        self[row] = str(reason)
        if len(self) <= MAX_WARNINGS:
            last = " Further ones are not named here." if len(self) == MAX_WARNINGS else ""
            logger.warning("Row %s is skipped: %s Rows skipped so far: %d.%s", row, reason, len(self), last)


def no_image_error(where: str, columns: Columns) -> ValueError:
    """Say that nothing usable was found in `where`."""
    return ValueError(
        f"No usable image in {where}; the warnings above say why. Check `image_column` ('{columns.image}') and"
        f" `caption_column` ('{columns.caption}')."
    )
