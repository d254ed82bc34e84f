"""The process a run trains in: threads and kernels, SIGTERM, one process per folder, and its description."""

from __future__ import annotations

import os
import platform
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from isofusion.errors import RunFailure
from isofusion.model import native

LOCK_WAIT_S = 10.0
"""How long to wait for a killed predecessor to be gone."""


def environment(threads: int, device: str = "cpu") -> dict[str, Any]:
    """env.json: what the numbers were made with."""
    from isofusion import __version__

    found = {
        "isofusion": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": threads,
    }
    if device == "cpu":  # to ask compiles the kernels where that has not happened yet
        found |= {"kernels": native.describe(), "float32_products": "onednn" if onednn_is_exact() else "torch"}
    return found


@lru_cache(maxsize=1)
def onednn_is_exact() -> bool:
    """Whether oneDNN's products of float32 matrices are float32 here and worth having: on AMD processors with AVX-512.

    There PyTorch's own go through MKL's AVX2 kernels (Zen 5, 2 cores: 215 GFLOP/s, oneDNN 490). They are asked for by
    allowing bf16 inside, which oneDNN does on AMX alone; a product whose factors bf16 cannot hold tells.
    """
    if not _vendor().startswith("AuthenticAMD") or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    if not native.available():  # inside PyTorch's attention the products are so small that a call costs more
        return False
    fine, one = torch.full((64, 64), 1.0 + 2.0**-12), torch.eye(64)
    with _products("bf16"):
        return bool((fine @ one == fine).all() and (one @ fine == fine).all())


def _vendor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("vendor_id")), "")


@contextmanager
def _products(precision: str) -> Iterator[None]:
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = precision
    try:
        yield
    finally:
        matmul.fp32_precision = before


@contextmanager
def reproducible(threads: int, deterministic: bool = True) -> Iterator[None]:
    """Fixed threads and deterministic kernels while a run trains; the process's settings come back afterwards.

    Not `deterministic` on a GPU: its deterministic kernels are slower, and its library of products refuses without an
    environment variable that only the process's parent can set. cuDNN's attention is not asked there: it plans anew for
    every number of images.
    """
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    cudnn = torch.backends.cuda.cudnn_sdp_enabled()
    switches: Any = torch.utils.deterministic
    fill = switches.fill_uninitialized_memory
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cuda.enable_cudnn_sdp(cudnn and deterministic)
    switches.fill_uninitialized_memory = False  # filling costs time and changes no result here
    try:
        with _products("bf16") if deterministic and onednn_is_exact() else nullcontext():
            yield
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1])
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
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
