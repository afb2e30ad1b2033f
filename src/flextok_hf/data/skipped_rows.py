"""Rows that cannot be used: counted, reported in a warning and never trained on."""

import logging

from .columns import Columns


logger = logging.getLogger(__name__)

MAX_UNREADABLE_ROWS = 100  # consecutive; more than that points to a wrong dataset, not to damaged files
MAX_WARNINGS = 20  # about unreadable rows, per process that reads; the report has them all


class UnreadableRow(ValueError):
    """A row that cannot be trained on: its image is damaged or its caption is missing."""


class SkippedRows(dict):
    """{row: reason} for the rows that could not be used. The first ones are logged as warnings.

    Args:
        fail: raise an error at the first one instead.
    """

    def __init__(self, fail: bool):
        super().__init__()
        self.fail = fail

    def add(self, row: int | str, reason: Exception) -> None:
        """Record a row, once.

        Raises:
            ValueError: if `fail` is set.
        """
        if row in self:
            return
        if self.fail:
            raise ValueError(f"Row {row} cannot be used: {reason}, and `fail_on_unreadable` is set.") from reason
        self[row] = str(reason)
        if len(self) <= MAX_WARNINGS:
            last = "; further ones are not logged" if len(self) == MAX_WARNINGS else ""
            logger.warning("Row %s is skipped (%d so far%s): %s", row, len(self), last, reason)


def no_image_error(where: str, columns: Columns) -> ValueError:
    """Return the error to raise when `where` has no usable image."""
    return ValueError(
        f"No usable image in {where}; the warnings above say why. Check `image_column` ('{columns.image}') and"
        f" `caption_column` ('{columns.caption}')."
    )
