"""Training-step speed on the CPU, against the GEMM rate this machine reaches at the model's own shapes.

    python benchmarks/cpu_step.py [--widths 32,64,128] [--threads 1] [--rows 8]

Bound: the same number of FLOPs done by bare `torch.mm` of [slots, width] x [width, hidden] in the same precision.
The share of that bound is what the rest of the step (norms, attention, optimizer, Python) leaves.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from isofusion.config import DataConfig, ModelConfig, SourceConfig, TrainConfig
from isofusion.data.stream import Stream
from isofusion.model.count import batch_shape, flops
from isofusion.model.decoder import Decoder
from isofusion.model.init import init_weights
from isofusion.train.optimizer import build_optimizer
from isofusion.train.step import choose_precision, train_step

ARMS: dict[str, dict] = {
    "early": {},
    "late": {"fusion": "late"},
    "early-moe": {"n_experts": 8},
    "early-moe-routed": {"n_experts": 2, "routing": "modality-routed"},
}


def median_seconds(work: Callable[[int], object], repeats: int, warmup: int = 2) -> float:
    times = []
    for index in range(warmup + repeats):
        begin = time.perf_counter()
        work(index)
        times.append(time.perf_counter() - begin)
    return statistics.median(times[warmup:])


def gemm_rate(slots: int, width: int, hidden: int, dtype: torch.dtype) -> float:
    """FLOP/s of one [slots, width] x [width, hidden] product."""
    x, w = torch.randn(slots, width, dtype=dtype), torch.randn(width, hidden, dtype=dtype)
    return 2.0 * slots * width * hidden / median_seconds(lambda _: torch.mm(x, w), 30, 5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", default="16,32,64,128")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    weights = {"caption": 45, "interleaved": 45, "text": 10}
    sources = tuple(SourceConfig(name=d, domain=d, format="world", weight=w) for d, w in weights.items())
    data = DataConfig(sources=sources, row_len=256, image_size=48, patch_size=8)
    stream = Stream(data, seed=0, split="train", rows_per_step=args.rows)
    batches = [stream.batch(step).torch() for step in range(args.repeats + 2)]
    rows = []
    for width in (int(w) for w in args.widths.split(",")):
        for arm, settings in ARMS.items():
            extra = {"encoder_width": max(8, width // 2)} if arm == "late" else {}
            config = ModelConfig(
                width=width, depth=4, head_dim=8, ffn_multiple=16, vocab_size=512, patch_size=8, **settings, **extra
            )
            train = TrainConfig(rows_per_step=args.rows, lr=1e-3)
            model = Decoder(config)
            init_weights(model, config, 0)
            optimizer = build_optimizer(model, config, train)
            precision = choose_precision("auto", config, "cpu")
            seconds = median_seconds(lambda i: train_step(model, optimizer, batches[i], train, precision), args.repeats)  # noqa: B023
            work = flops(config, batch_shape(batches[0]))["total"]
            bound = gemm_rate(batches[0].n_slots, width, config.hidden(), torch.bfloat16 if precision == "bf16" else torch.float32)
            rows.append(
                {
                    "arm": arm, "width": width, "precision": precision, "tokens_per_s": round(batches[0].n_slots / seconds),
                    "flops_per_s": work / seconds, "gemm_flops_per_s": bound, "share_of_bound": work / seconds / bound,
                }
            )
            print(
                f"{arm:18s} width {width:4d} {precision}  {rows[-1]['tokens_per_s']:8d} slots/s  "
                f"{work / seconds / 1e9:7.1f} GFLOP/s  {100 * rows[-1]['share_of_bound']:5.1f} % of the GEMM rate", flush=True,
            )
    out = Path(__file__).parent / "results" / "cpu_step.json"
    out.parent.mkdir(exist_ok=True)
    machine = {"processor": platform.processor() or platform.machine(), "torch": torch.__version__, "threads": args.threads}
    out.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    print(out)


if __name__ == "__main__":
    main()
