"""Who holds a study folder: one pool at a time, by a lock of the operating system; `study.pid` says which process."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from isofusion.errors import InputError


@contextlib.contextmanager
def only_one(out: Path, wait: float = 60.0) -> Iterator[int]:
    """Hold the study folder. The lock belongs to the pool *and* its workers and ends with the last of them, so a pool
    that was killed cannot be followed by another while its workers still write. Raises InputError if it is in use.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / "study.pid"
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        end = time.monotonic() + wait
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                holder, _, started = path.read_text().strip().partition(" ")
                if holder.isdecimal() and alive(int(holder), started):
                    raise InputError(
                        f"{out}: process {holder} is running this study; wait for it, or stop it"
                    ) from None
                if time.monotonic() > end:
                    raise InputError(f"{out}: workers of an earlier run still write here; stop them first") from None
                time.sleep(0.1)  # orphans notice within a step, checkpoint and leave
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()} {start_time(os.getpid())}".strip().encode(), 0)
        yield fd
    finally:
        os.close(fd)


def alive(pid: int, started: str) -> bool:
    """Whether this very process lives: `started` tells it from a later one with its number (empty: unknown)."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    now = start_time(pid)
    return not started or not now or now == started


def start_time(pid: int) -> str:
    """When a process started, in clock ticks since the machine did; empty where the system does not tell."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (OSError, UnicodeDecodeError):
        return ""
    return stat.rpartition(")")[2].split()[19]  # field 22; the name before it, in brackets, may hold anything
