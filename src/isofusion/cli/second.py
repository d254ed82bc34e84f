"""A second process for what a command computes beside its main work."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from multiprocessing import get_context


@contextmanager
def second_process(module: str) -> Iterator[Executor | None]:
    """A process that imports `module` at once, where there is a second processor; else None."""
    if len(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)) < 2:
        yield None
        return
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=partial(import_module, module)) as pool:
        pool.submit(int)  # the first task starts the process
        yield pool
