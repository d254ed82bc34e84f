"""Generate the built-in world's blocks ahead of training, on many cores at once.

A run generates the blocks it reads as it goes, one at a time; a GPU reads them faster than that. Blocks are files in
the cache that depend on settings, seed and number alone, so whoever writes them, a run finds the same bits.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor

from isofusion.config import DataConfig
from isofusion.data.endless import BLOCK, WorldSource
from isofusion.data.stream import Stream
from isofusion.processors import end_with_parent

_stream: Stream | None = None


def missing_blocks(stream: Stream, steps: int) -> list[tuple[int, int]]:
    """(source, block) of every world block of the first `steps` steps that is not in the cache, in reading order."""
    rows = stream.quota.before(steps * stream.rows_per_step)
    out = []
    for i, (source, count) in enumerate(zip(stream.sources, rows.tolist(), strict=True)):
        if isinstance(source, WorldSource):
            blocks = range(-(-count // BLOCK))
            out += [((b + 1) / max(1, len(blocks)), i, b) for b in blocks if not source._path(b).exists()]
    return [(i, b) for _, i, b in sorted(out)]


def generate(data: DataConfig, seeds: Iterable[int], rows_per_step: int, steps: int, processes: int) -> int:
    """Write the training blocks of the first `steps` steps for each seed; returns how many were missing."""
    total = 0
    for seed in seeds:
        todo = missing_blocks(Stream(data, seed, "train", rows_per_step), steps)
        total += len(todo)
        if todo:
            context = multiprocessing.get_context("spawn")
            settings = (data, seed, rows_per_step)
            with ProcessPoolExecutor(min(processes, len(todo)), context, _open, settings) as pool:
                for _ in pool.map(_write, todo, chunksize=max(1, min(8, len(todo) // (4 * processes)))):
                    pass
    return total


def _open(data: DataConfig, seed: int, rows_per_step: int) -> None:
    global _stream
    end_with_parent()
    _stream = Stream(data, seed, "train", rows_per_step)


def _write(place: tuple[int, int]) -> None:
    assert _stream is not None
    source = _stream.sources[place[0]]
    assert isinstance(source, WorldSource)
    source.block(place[1])
