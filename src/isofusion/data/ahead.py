"""Index many files at once, ahead of a study: one process opens them one after the other, and a corpus has thousands.

Indices and patches are files in the cache that depend on the data alone, so whoever writes them, a run finds the same.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from pathlib import Path
from typing import Any

from isofusion.config import DataConfig
from isofusion.data import patches
from isofusion.data.index import index_file, is_indexed, source_files
from isofusion.data.slow import Slow, log
from isofusion.data.stream import data_folder, finite_sources
from isofusion.errors import InputError
from isofusion.processors import end_with_parent

LEAST = 64 << 20  # bytes of files: 5 s for one core (Zen 5, small JPEGs and PNGs); processes take about half a second

_left: list[Any] = []  # Arrays: bytes of patches that may still be stored, by source and split


def index(data: DataConfig, splits: Iterable[str], processes: int, least: int = LEAST) -> int:
    """Index the files of every finite source that are not indexed; returns how many were done at once.

    0 where they hold fewer than `least` bytes or are one file: whoever opens the data indexes them. What is wrong with
    a file is left to be said there too. The caller is a program that its children may import (`spawn`). Raises
    InputError where files are missing, RunFailure where the cache cannot be written.
    """
    shape, folder = patches.Shape(data.image_size, data.patch_size), data_folder(data)
    parts = [(source, split) for split in splits for source in finite_sources(data, split)]
    files = [[(path, s.format) for path in source_files(s, folder, split)] for s, split in parts]
    todo = [(*file, number) for number, some in enumerate(files) for file in some if not is_indexed(*file)]
    whole = sum(path.stat().st_size for path, *_ in todo)
    if len(todo) < 2 or processes < 2 or whole < least:
        return 0
    processes, slow = min(processes, len(todo)), Slow("reading the data")
    log.info("reading the data: %d files, %s MB, %d at a time", len(todo), f"{whole / 1e6:,.0f}", processes)
    context = multiprocessing.get_context("spawn")
    left = [context.Array("q", [patches.STORE_BYTES]) for _ in parts]
    for number, some in enumerate(files):  # what is there counts first
        for file in some:
            if is_indexed(*file):
                index_file(*file, shape, patches.Budget(shared=left[number]))
    with (
        suppress(BrokenProcessPool),  # killed, for its memory perhaps: one by one it may go
        ProcessPoolExecutor(processes, context, _start, (left,)) as pool,
    ):
        for done, _ in enumerate(pool.map(_index, *zip(*todo, strict=True), [shape] * len(todo)), 1):
            slow.at("{} of {} files", done, len(todo))
    return sum(is_indexed(path, format) for path, format, _ in todo)


def _start(left: list[Any]) -> None:
    end_with_parent()
    _left[:] = left


def _index(path: Path, format: str, number: int, shape: patches.Shape) -> None:
    with suppress(InputError):
        index_file(path, format, shape, patches.Budget(shared=_left[number]))
