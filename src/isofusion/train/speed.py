"""How fast a run was and what it could have been: memory, the device's measured and printed peak, for flops.json.

MFU is own_flops (the exact ledger) over wall_s over one of the peaks. The measured peak is one large product
in the run's own precision and threads, so that MFU against it says what the step leaves beside its products.
"""

from __future__ import annotations

import contextlib
import json
import platform
import time
from typing import Any

import torch

from isofusion.data import cache

REPEATS = 5


class Speed:
    """Begun when the model is on its device; `report` at the end of the run."""

    def __init__(self, device: str, precision: str, threads: int) -> None:
        self.device, self.precision, self.threads = device, precision, threads
        if device != "cpu":
            torch.cuda.reset_peak_memory_stats()

    def report(self) -> dict[str, Any]:
        """Fields of flops.json. peak_memory: bytes of the allocator (null on a CPU, where a process keeps what earlier
        runs freed); peak_flops_*: FLOP/s, null where unknown; device: its name.
        """
        gpu = self.device != "cpu"
        name = torch.cuda.get_device_name() if gpu else platform.processor() or platform.machine()
        return {
            "device": name,
            "peak_memory": int(torch.cuda.max_memory_allocated()) if gpu else None,
            "peak_flops_measured": measured_peak(self.device, self.precision, self.threads),
            "peak_flops_datasheet": datasheet_peak(name) if gpu else None,
        }


def datasheet_peak(name: str) -> float | None:
    """Dense bf16 FLOP/s that the maker prints for a device of this name ("NVIDIA H100 80GB HBM3"); None: unknown."""
    from isofusion.laws.hardware import ACCELERATORS

    words = set(name.lower().replace("-", " ").split())
    fitting = [key for key in ACCELERATORS if set(key.split("-")) <= words]
    return ACCELERATORS[max(fitting, key=len)].peak if fitting else None


def gemm_rate(device: str, precision: str, m: int, k: int, n: int, repeats: int = REPEATS) -> float:
    """FLOP/s of [m, k] x [k, n], the best of `repeats` timings."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(shape, device=device, dtype=dtype) for shape in ((m, k), (k, n)))
    best, gpu = float("inf"), device != "cpu"
    for _ in range(repeats + 1):  # the first one warms up
        if gpu:
            torch.cuda.synchronize()
        began = time.perf_counter()
        torch.mm(a, b)
        if gpu:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return 2.0 * m * k * n / best


def measured_peak(device: str, precision: str, threads: int) -> float:
    """The rate of one large product here, measured once per machine and kept in the cache.

    Measured beside other work it is what that work leaves; delete `peaks.json` in the cache to measure again.
    """
    name = torch.cuda.get_device_name() if device != "cpu" else f"{platform.node()} {threads} threads"
    key = json.dumps([name, precision, torch.__version__])
    path = cache.root() / "peaks.json"
    try:
        known: dict[str, float] = json.loads(path.read_text())
    except (OSError, ValueError):
        known = {}
    if key not in known:
        size = 8192 if device != "cpu" else 768
        rate = gemm_rate(device, precision, 256, 256, 256, 1)
        if device != "cpu" or rate > 5e9:  # a CPU without products in this precision would take minutes
            rate = max(rate, gemm_rate(device, precision, size, size, size))
        known[key] = rate
        with contextlib.suppress(Exception):  # a peak that cannot be kept is measured again
            cache.write_bytes(path, json.dumps(known, indent=1).encode())
    return known[key]
