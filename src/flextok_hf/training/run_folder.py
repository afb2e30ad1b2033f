"""Records of a run for people to read: its options, its log, and the rows it skipped."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..utils.files import read_json, write_text


OPTIONS_FILE, LOG_FILE, REPORT_FILE = "arguments.json", "log.jsonl", "unreadable_rows.json"


class RunFolder:
    """The output folder of a run, as used by one of its processes.

    Args:
        path: the folder, which must exist.
        process_index: index of the process; process 0 writes.
    """

    def __init__(self, path: str | Path, process_index: int):
        self.path = Path(path)
        self.process_index = process_index

    def write_options(self, options: Mapping[str, Any]) -> None:
        """Write the options, replacing those of an earlier start."""
        if self.process_index == 0:
            write_text(self.path / OPTIONS_FILE, json.dumps(options, indent=2) + "\n")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append metrics to the log."""
        if self.process_index == 0:
            with open(self.path / LOG_FILE, "a") as file:
                file.write(json.dumps({"step": step, **metrics}) + "\n")

    def read_log(self) -> list[dict[str, float]]:
        """Return the entries of the log, ignoring a last line cut off by a kill."""
        path = self.path / LOG_FILE
        lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
        return [json.loads(line) for line in lines if line.endswith("}\n")]

    def cut_log(self, step: int) -> None:
        """Drop log entries after `step`, as those steps will be repeated."""
        if self.process_index == 0 and (self.path / LOG_FILE).is_file():
            kept = [entry for entry in self.read_log() if entry["step"] <= step]
            write_text(self.path / LOG_FILE, "".join(json.dumps(entry) + "\n" for entry in kept))

    def report_skipped(self, skipped: Mapping[int | str, str]) -> None:
        """Report the rows that could not be used, including those of earlier starts."""
        if not skipped or self.process_index:
            return
        path = self.path / REPORT_FILE
        known = read_json(path, {})
        write_text(path, json.dumps(known | {str(row): reason for row, reason in skipped.items()}, indent=2) + "\n")
