"""The process a run trains in: threads and kernels, SIGTERM, one process per folder, and its description."""

from __future__ import annotations

import os
import platform
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from isofusion.errors import RunFailure

LOCK_WAIT_S = 10.0
"""How long to wait for a killed predecessor to be gone."""


def environment(threads: int) -> dict[str, Any]:
    """env.json: what the numbers were made with."""
    from isofusion import __version__

    return {
        "isofusion": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": threads,
    }


@contextmanager
def reproducible(threads: int, deterministic: bool = True) -> Iterator[None]:
    """Fixed threads and deterministic kernels while a run trains; the process's settings come back afterwards.

    Not `deterministic` on a GPU: its deterministic kernels are slower, and its library of products refuses without an
    environment variable that only the process's parent can set.
    """
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    switches: Any = torch.utils.deterministic
    fill = switches.fill_uninitialized_memory
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)
    switches.fill_uninitialized_memory = False  # filling costs time and changes no result here
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1])
        switches.fill_uninitialized_memory = fill


@contextmanager
def sigterm() -> Iterator[threading.Event]:
    """An event that SIGTERM sets (in the main thread; elsewhere only stop() works), so that a run ends resumable."""
    flag = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return

    def on_sigterm(signum: int, frame: Any) -> None:
        flag.set()
        if callable(before):
            before(signum, frame)  # whoever runs us wants to know too

    before = signal.signal(signal.SIGTERM, on_sigterm)
    try:
        yield flag
    finally:
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)


@contextmanager
def only_process(folder: Path) -> Iterator[None]:
    """One process per run folder. A lock of the operating system, so it dies with its process, however that dies."""
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        yield
        return
    with open(folder / ".lock", "w") as file:
        until = time.monotonic() + LOCK_WAIT_S
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise RunFailure(f"{folder}: another process trains this run; wait for it, or end it") from None
                time.sleep(0.1)
        yield
