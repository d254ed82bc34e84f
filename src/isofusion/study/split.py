"""How a machine's cores are shared out: many runs of one thread, or fewer of several threads.

One thread per run wastes nothing while there are runs enough for all cores; more threads shorten the chain of the
longest trunk and its last branch, which is what remains when everything else is done. Which wins depends on how a step
scales with threads, so it is measured: a probe of the study's own models for each split, put through the pool's own
schedule. The lock pins the outcome, because another thread count is another order of sums.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from isofusion.errors import InputError
from isofusion.processors import cores
from isofusion.study.estimate import data_is_here, estimate, installed, nominal_shape, step_flops
from isofusion.study.gpu import gpu_bytes, gpu_split
from isofusion.study.pool import TRAIN
from isofusion.study.progress import duration
from isofusion.study.spec import StudySpec

NARROW_STEP = 1e10
"""FLOPs of a training step below which a second thread is not worth a probe: its products take a few milliseconds."""


@dataclass(frozen=True)
class Split:
    """`jobs` runs at a time of `threads` threads; `tried` holds (jobs, threads, estimated seconds) of each probe."""

    jobs: int
    threads: int
    tried: tuple[tuple[int, int, float], ...] = ()

    @property
    def notes(self) -> list[str]:
        """What the probe found, in a sentence, where there was a choice."""
        if len(self.tried) < 2:
            return []
        listed = "; ".join(f"{jobs} x {threads}: {duration(seconds)}" for jobs, threads, seconds in self.tried)
        return [f"jobs x threads by a probe of this study's models ({listed}): {self.jobs} x {self.threads}"]


def thread_budget(jobs: int | None, threads: int | None) -> tuple[int, int]:
    """(jobs, threads per job) within the cores; default: one thread each, as many jobs as cores. Raises InputError."""
    available = cores()
    threads = 1 if threads is None else threads
    if threads < 1 or (jobs is not None and jobs < 1):
        raise InputError("--jobs and --threads must be at least 1")
    jobs = max(1, available // threads) if jobs is None else jobs
    if jobs * threads > available:
        raise InputError(f"{jobs} jobs x {threads} threads is more than the {available} cores here; lower one of them")
    return jobs, threads


def candidates(available: int) -> list[tuple[int, int]]:
    """(jobs, threads) for threads in powers of two up to all cores."""
    return [(available // threads, threads) for threads in (2**k for k in range(available.bit_length()))]


def choose_split(
    spec: StudySpec,
    out: Path,
    *,
    jobs: int | None = None,
    threads: int | None = None,
    probe: bool = True,
    console: Console | None = None,
    train: str = TRAIN,
) -> Split:
    """What was asked for, or the split with the least estimated wall time. Raises InputError as `thread_budget` does.

    On a GPU its memory decides instead (study/gpu.py).
    Nothing is probed when either number is given, the data or torch is not here, the machine has one core, or every
    step of the study is below NARROW_STEP: then it is one thread for each run.
    """
    if (free := gpu_bytes()) is not None:
        return Split(*gpu_split(spec, free, cores(), jobs, threads))
    runs = spec.runs()
    widest = max(step_flops(run, nominal_shape(spec)) for run in runs)
    idle = jobs is not None or threads is not None or cores() == 1 or widest < NARROW_STEP
    if idle or not probe or not data_is_here(spec) or not installed("torch"):
        return Split(*thread_budget(jobs, threads))
    tried = []
    for some, each in candidates(cores()):
        found = estimate(spec, out=out, jobs=some, threads=each, console=console, train=train)
        if not found.problems:
            tried.append((some, each, float(found.totals["seconds"])))
    if not tried:
        raise InputError(f"{spec.name} does not fit this machine: " + "; ".join(found.problems))
    best = min(tried, key=lambda item: item[2])
    return Split(best[0], best[1], tuple(tried))
