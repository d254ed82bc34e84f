"""Several runs of a study on one GPU: a small model leaves most of it idle, so the pool runs as many as fit.

How many is chosen from the predicted peak of the study's largest runs (model/memory.py), plus what a process with a GPU
context takes, within the memory that is free, and from the cores: each run has a thread that trains and one that reads.
"""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

from isofusion.errors import InputError
from isofusion.study.spec import StudySpec

CONTEXT_BYTES = 1.0e9
"""Of one process on the GPU beside its tensors: the driver's context, kernels, workspaces of matrix products."""
HOST_BYTES = 4.0e9
"""Of one process in the host's memory: torch with its GPU libraries, the compiler, an input worker."""
SHARE = 0.9  # of the free memory
THREADS = 2  # of each run: one that trains, one input worker
MOST_JOBS = 8
"""More runs at once are not taken without being asked for: they take turns on one device, and each costs a start."""


@cache
def gpu_bytes() -> float | None:
    """Free bytes of the GPU that runs would use here; None where they train on the CPU. Imports no torch."""
    if os.environ.get("ISOFUSION_DEVICE", "auto") == "cpu" or not Path("/dev/nvidiactl").exists():
        return None
    command = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0]
    for asked, unit in (
        ([*command, *(["--id", visible] if visible else [])], 2**20),
        # no nvidia-smi, or no answer (a part of a GPU): then by torch, which takes seconds and memory
        ([sys.executable, "-c", "import torch; print(torch.cuda.mem_get_info()[0])"], 1),
    ):
        try:
            return float(subprocess.run(asked, capture_output=True, text=True, check=False).stdout.split()[0]) * unit
        except (OSError, IndexError, ValueError):
            continue
    return None


def run_bytes(spec: StudySpec) -> list[float]:
    """Predicted peak of each run on a GPU, with its context, largest first."""
    from isofusion.model.memory import memory_bytes

    sizes = [
        memory_bytes(
            run.model,
            run.train.rows_per_step * run.data.row_len,
            "fp32" if run.train.precision == "fp32" else "bf16",
            device="cuda",
        )["total"]
        for run in spec.runs()
    ]
    return sorted((size + CONTEXT_BYTES for size in sizes), reverse=True)


def gpu_split(spec: StudySpec, free: float, available: int, jobs: int | None, threads: int | None) -> tuple[int, int]:
    """(jobs, threads) for `free` bytes and `available` cores; what was asked for is kept. Raises InputError.

    Also divides the memory and the compiler's processes, by environment variables that the workers inherit; what is
    set already is left alone.
    """
    budget, needs = SHARE * free, run_bytes(spec)
    threads = min(THREADS, available) if threads is None else threads
    if jobs is None:
        most = max(1, min(MOST_JOBS, available // threads, len(needs)))
        jobs = next((n for n in range(most, 1, -1) if sum(needs[:n]) <= budget), 1)
    if min(jobs, threads) < 1 or jobs * threads > available:
        raise InputError(
            f"{jobs} jobs x {threads} threads must be at least 1 x 1 and at most the {available} cores here; "
            f"lower one of them"
        )
    os.environ.setdefault("ISOFUSION_MEMORY_GB", f"{max(0.1, budget / jobs - CONTEXT_BYTES) / 1e9:.2f}")
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # its older name
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # the number of targets varies
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(max(1, available // jobs)))
    return jobs, threads


def measure_peak() -> None:
    """Let a process of its own measure the card's products while nothing else runs: beside the study's runs the rate
    would be too low, and every MFU too high. It stays in the cache (train/speed.py); a failure is left to the runs.
    """
    code = "from isofusion.train.speed import measured_peak; [measured_peak('cuda', p, 1) for p in ('bf16', 'fp32')]"
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
