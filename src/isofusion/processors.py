"""How many processors there are to use, and processes that do not outlive the one that started them."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import threading


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def end_with_parent() -> None:
    """Called in a child of multiprocessing: it ends when its parent does, however that ends (a pool's would wait)."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
