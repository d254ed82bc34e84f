"""metrics.jsonl: one JSON object per update, flushed as it is written, tolerant of a torn last line.

A line's `step` is the number of updates done after it (1 for the first), so a checkpoint `step_N` and the line with
step N describe the same moment. After a resume the file is cut back to the checkpoint's step: no line appears twice.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from isofusion.errors import RunFailure


def _lines(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """(record, byte offset after its newline) for each whole line, stopping at the first torn one."""
    end = 0
    with open(path, "rb") as file:
        for raw in file:
            end += len(raw)
            try:
                record = json.loads(raw)
            except ValueError:
                return
            if not raw.endswith(b"\n") or not isinstance(record, dict):
                return
            yield record, end


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every whole line of a metrics file; [] if there is none. A torn end (a killed run) is left out."""
    return [record for record, _ in _lines(path)] if path.exists() else []


def truncate_metrics(path: Path, step: int) -> int:
    """Cut the file after the line of `step` (and any torn end); returns how many whole lines were cut off."""
    if not path.exists():
        return 0
    keep = cut = 0
    for record, end in _lines(path):
        if int(record["step"]) <= step:
            keep = end
        else:
            cut += 1
    os.truncate(path, keep)
    return cut


class MetricsLog:
    """Appends records; every line reaches the operating system at once, so only a power cut can lose one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[str] = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)

    def append(self, record: dict[str, Any]) -> None:
        """Raises RunFailure when the disk is full; ValueError for a NaN (metrics hold numbers or null)."""
        line = json.dumps(record, allow_nan=False, separators=(",", ":"))
        try:
            self._file.write(line + "\n")
            self._file.flush()
        except OSError as error:
            raise RunFailure(
                f"{self.path}: cannot write metrics ({error.strerror}); free some space and resume"
            ) from error

    def sync(self) -> None:
        """Force the lines to the disk: called before a checkpoint, so that no checkpoint is ahead of its metrics."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what could not be written was reported when it was written
            self._file.close()
