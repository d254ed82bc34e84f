"""A second process for what a command computes beside its main work."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from multiprocessing import get_context

from isofusion.processors import cores


@contextmanager
def second_process(module: str) -> Iterator[Executor | None]:
    """A process that imports `module` at once, where there is a second processor; else None."""
    if cores() < 2:
        yield None
        return
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=partial(import_module, module)) as pool:
        pool.submit(int)  # the first task starts the process
        yield pool
