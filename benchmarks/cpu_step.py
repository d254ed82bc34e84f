"""Training-step speed on the CPU, against the GEMM rate this machine reaches at the model's own shapes.

    python benchmarks/cpu_step.py [--widths 32,64,128] [--threads 1] [--rows 8] [--out FILE.json]

Bound: the same number of FLOPs done by bare `torch.mm` of [slots, width] x [width, hidden] in the same precision.
The share of that bound is what the rest of the step (norms, attention, optimizer, Python) leaves. The process is set up
as the study's workers are: threads, allocator, deterministic kernels.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from isofusion.config import DataConfig, ModelConfig, SourceConfig, TrainConfig
from isofusion.data.stream import Stream
from isofusion.model.count import batch_shape, flops
from isofusion.model.decoder import Decoder
from isofusion.model.init import init_weights
from isofusion.study.pool import MALLOC
from isofusion.train.optimizer import build_optimizer
from isofusion.train.process import environment, reproducible
from isofusion.train.step import choose_precision, train_step

RESULTS = Path(__file__).parent / "results" / "cpu_step.json"
WARMUP = 2  # steps that are not timed
DEPTH, HEAD, SEED = 4, 8, 0
ARMS: dict[str, dict[str, Any]] = {
    "early": {},
    "late": {"fusion": "late"},
    "early-moe": {"n_experts": 8},
    "early-moe-routed": {"n_experts": 2, "routing": "modality-routed"},
}


def median_seconds(work: Callable[[Any], object], inputs: list[Any], warmup: int = WARMUP) -> float:
    """Median time of `work` over the inputs after the first `warmup`."""
    times = []
    for item in inputs:
        begin = time.perf_counter()
        work(item)
        times.append(time.perf_counter() - begin)
    return statistics.median(times[warmup:])


def gemm_rate(slots: int, width: int, hidden: int, dtype: torch.dtype) -> float:
    """FLOP/s of one [slots, width] x [width, hidden] product."""
    x, w = torch.randn(slots, width, dtype=dtype), torch.randn(width, hidden, dtype=dtype)
    return 2.0 * slots * width * hidden / median_seconds(lambda _: torch.mm(x, w), [None] * 35, 5)


def measure(arm: str, width: int, batches: list[Any], data: DataConfig) -> dict[str, Any]:
    """One row: median step over the batches, and the bound at its shapes."""
    extra = {"encoder_width": max(HEAD, width // 2)} if arm == "late" else {}
    config = ModelConfig(
        width=width, depth=DEPTH, head_dim=HEAD, ffn_multiple=16, vocab_size=512, patch_size=data.patch_size,
        **ARMS[arm], **extra,
    )  # fmt: skip
    train = TrainConfig(rows_per_step=batches[0].rows, lr=1e-3)
    model = Decoder(config)
    init_weights(model, config, SEED)
    optimizer = build_optimizer(model, config, train)
    precision = choose_precision(train.precision, "cpu")
    balance = config.balance_weight if config.n_experts else 0.0
    step = partial(train_step, model, optimizer, precision=precision, clip=train.clip, balance_weight=balance)
    seconds = median_seconds(step, [batch.torch("cpu") for batch in batches])
    slots = batches[0].n_slots
    timed = batches[WARMUP:]
    work = sum(flops(config, batch_shape(batch))["total"] for batch in timed) / len(timed)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    bound = gemm_rate(slots, width, config.hidden(), dtype)
    return {
        "arm": arm,
        "width": width,
        "precision": precision,
        "slots_per_s": round(slots / seconds),
        "flops_per_s": work / seconds,
        "gemm_flops_per_s": bound,
        "share_of_bound": work / seconds / bound,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", default="16,32,64,128")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=int, default=8, help="rows of 256 slots a step")
    parser.add_argument("--repeats", type=int, default=7, help="timed steps; their median is reported")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if missing := {name: value for name, value in MALLOC.items() if name not in os.environ}:
        # the allocator reads its settings when a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **missing})
    weights = {"caption": 45, "interleaved": 45, "text": 10}
    sources = tuple(SourceConfig(name=d, domain=d, format="world", weight=w) for d, w in weights.items())
    data = DataConfig(sources=sources, row_len=256, image_size=48, patch_size=8)
    stream = Stream(data, seed=SEED, split="train", rows_per_step=args.rows)
    batches = [stream.batch(step) for step in range(WARMUP + args.repeats)]
    rows = []
    with reproducible(args.threads):
        for width in (int(text) for text in args.widths.split(",")):
            for arm in ARMS:
                row = measure(arm, width, batches, data)
                rows.append(row)
                print(
                    f"{arm:18s} width {width:4d} {row['precision']}  {row['slots_per_s']:8d} slots/s  "
                    f"{row['flops_per_s'] / 1e9:7.1f} GFLOP/s  {row['share_of_bound']:6.1%} of the GEMM rate",
                    flush=True,
                )
    machine = {**environment(args.threads), "processor": platform.processor() or platform.machine()}
    settings = {"rows": args.rows, "repeats": args.repeats, "row_len": data.row_len, "depth": DEPTH, "head_dim": HEAD}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"machine": machine, "settings": settings, "rows": rows}, indent=1) + "\n")
    print(args.out)


if __name__ == "__main__":
    main()
