"""What the benchmarks share: a process like a study's workers, interleaved timing, the GEMM bound, JSON results."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from isofusion.config import ModelConfig
from isofusion.data.batch import PackedBatch
from isofusion.data.pack import finish
from isofusion.data.sample import DOMAINS
from isofusion.study.pool import MALLOC
from isofusion.train.process import environment

RESULTS = Path(__file__).parent / "results"


def as_worker() -> None:
    """Start this process again with the allocator's settings of the study's workers, unless it has them."""
    if missing := {name: value for name, value in MALLOC.items() if name not in os.environ}:
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **missing})


def interleaved(work: Mapping[str, Callable[[], object]], rounds: int, repeats: int = 1) -> dict[str, list[float]]:
    """Seconds of one call of each, by round: A B C A B C ..., `repeats` calls a turn, so that drift hits all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, call in work.items():
            begin = time.perf_counter()
            for _ in range(repeats):
                call()
            seconds[name].append((time.perf_counter() - begin) / repeats)
    return seconds


def ratio(above: Iterable[float], below: Iterable[float]) -> dict[str, float]:
    """Median and quartiles of above / below, round by round."""
    values = [a / b for a, b in zip(above, below, strict=True)]
    low, middle, high = (float(np.quantile(values, q)) for q in (0.25, 0.5, 0.75))
    return {"median": middle, "q25": low, "q75": high}


def text_batch(rows: int, row_len: int, vocabulary: int, seed: int = 0) -> PackedBatch:
    """Text only: each row one document of random tokens that fills it, so its last slot has no target. NumPy arrays."""
    total = rows * row_len
    ids = np.random.default_rng(seed).integers(0, vocabulary, total).astype(np.int32)
    return finish(
        rows=rows,
        row_len=row_len,
        n=1,
        token_ids=ids,
        doc_id=np.repeat(np.arange(rows, dtype=np.int32), row_len),
        image_id=np.full(total, -1, np.int32),
        token_class=np.zeros(total, np.uint8),
        oracle=np.full(total, np.nan, np.float32),
        domain=np.full(total, DOMAINS.index("text"), np.uint8),
        patches=np.zeros((0, 192), np.uint8),
        keys=tuple(f"random:{r}" for r in range(rows)),
    )


def products(cfg: ModelConfig, slots: int, targets: int) -> list[tuple[int, int, int, int]]:
    """(rows, inputs, outputs, how many) of the linear layers of a dense early-fusion decoder on text."""
    d, h = cfg.width, cfg.hidden()
    return [
        (slots, d, 3 * d, cfg.depth),
        (slots, d, d, cfg.depth),
        (slots, d, 2 * h, cfg.depth),
        (slots, h, d, cfg.depth),
        (targets, d, cfg.vocab_size, 1),
    ]


class GemmBound:
    """Bare `torch.mm` at a model's own shapes: forward, gradient of the input, gradient of the weight.

    Every product runs as often as the step runs it, so each shape has the weight of its FLOPs. Attention's scores are
    not in it.
    """

    def __init__(self, shapes: list[tuple[int, int, int, int]], dtype: torch.dtype) -> None:
        self.work = []
        self.flops = 0.0
        for rows, inputs, outputs, count in shapes:
            x, w = torch.randn(rows, inputs, dtype=dtype), torch.randn(outputs, inputs, dtype=dtype)
            g = torch.randn(rows, outputs, dtype=dtype)
            to = [torch.empty(s, dtype=dtype) for s in ((rows, outputs), (rows, inputs), (outputs, inputs))]
            self.work.append((x, w, g, to, count))
            self.flops += 3 * 2.0 * rows * inputs * outputs * count

    def __call__(self) -> None:
        for x, w, g, (forward, of_input, of_weight), count in self.work:
            for _ in range(count):
                torch.mm(x, w.t(), out=forward)
                torch.mm(g, w, out=of_input)
                torch.mm(g.t(), x, out=of_weight)


def median(values: Iterable[float]) -> float:
    return statistics.median(values)


def save(path: Path, threads: int, settings: dict[str, Any], **content: Any) -> None:
    """Write the machine, the settings and the content as JSON, and say where."""
    machine = {**environment(threads), "processor": _processor()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine, "settings": settings, **content}, indent=1) + "\n")
    print(path)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
