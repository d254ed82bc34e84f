"""Peak memory of a training step: what isofusion.model.memory predicts against what the allocator saw.

    python benchmarks/memory.py [--device cpu|cuda] [--out FILE.json]

The bound is 10 % on every row. On a CPU the profiler records every allocation (the built-in world; fp32, and bf16
where the CPU has it); on a GPU it is torch's own peak, in bf16, blocks compiled. Nothing here is a timing, so other
work does not disturb it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
from pathlib import Path
from typing import Any

import torch

from isofusion.config import DataConfig, ModelConfig, SourceConfig, TrainConfig
from isofusion.data.stream import Stream
from isofusion.model import native
from isofusion.model.count import batch_shape, count_parameters
from isofusion.model.decoder import Decoder
from isofusion.model.init import init_weights
from isofusion.model.memory import memory_bytes
from isofusion.train.memory import peak_bytes, resident_bytes
from isofusion.train.optimizer import build_optimizer
from isofusion.train.step import choose_precision, train_step

RESULTS = Path(__file__).parent / "results" / "memory.json"
LIMIT = 0.10
COMMON = {"depth": 4, "head_dim": 32, "ffn_multiple": 32, "vocab_size": 512, "patch_size": 8}
CASES: tuple[tuple[str, int, dict[str, Any]], ...] = (
    ("early", 8, {"width": 64}),
    ("early", 8, {"width": 128}),
    ("early", 2, {"width": 512}),
    ("early, 12 blocks", 4, {"width": 64, "depth": 12}),
    ("early, vocabulary 4,096", 8, {"width": 64, "vocab_size": 4096}),
    ("early, vocabulary 50,432", 8, {"width": 64, "vocab_size": 50432}),
    ("late", 8, {"width": 64, "fusion": "late", "encoder_width": 32}),
    ("late", 4, {"width": 256, "fusion": "late", "encoder_width": 128}),
    ("8 experts, top-1", 8, {"width": 64, "n_experts": 8}),
    ("8 experts, top-1", 2, {"width": 256, "n_experts": 8}),
    ("4 experts, top-2", 8, {"width": 64, "n_experts": 4, "top_k": 2}),
    ("2 experts by modality", 8, {"width": 64, "n_experts": 2, "routing": "modality-routed"}),
)


def measure(
    name: str, rows: int, changes: dict[str, Any], device: str, data: DataConfig, blocks: int, precision: str
) -> dict[str, Any]:
    """One row; `blocks`: blocks that are computed twice."""
    cfg = ModelConfig(**(COMMON | changes))
    batch = Stream(data, 0, "train", rows).batch(0)
    model = Decoder(cfg)
    init_weights(model, cfg, 0)
    model = model.to(device)
    model.recompute = blocks
    if device != "cpu":
        model.compile_blocks()
    optimizer, tensors = build_optimizer(model, cfg, TrainConfig()), batch.torch(device)
    balance = cfg.balance_weight if cfg.n_experts else 0.0

    def step() -> None:
        train_step(
            model, optimizer, tensors, precision=precision, clip=1.0, balance_weight=balance, device=device
        )  # fmt: skip

    step()
    optimizer.zero_grad()
    shape, kernels = batch_shape(batch), native.available()
    predicted = memory_bytes(cfg, batch.n_slots, precision, shape, device, blocks, native=kernels)["total"]
    if device == "cpu":
        measured = float(resident_bytes(model, optimizer) + peak_bytes(step))
    else:
        torch.cuda.reset_peak_memory_stats()
        step()
        measured = float(torch.cuda.max_memory_allocated())
        torch._dynamo.reset()
    return {
        "model": name + (f", {blocks} blocks twice" if blocks else ""),
        "rows": rows,
        "precision": precision,
        "parameters": count_parameters(cfg).n_total,
        "measured": measured,
        "predicted": predicted,
        "ratio": predicted / measured,
        **changes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    weights = {"caption": 45, "interleaved": 45, "text": 10}
    sources = tuple(SourceConfig(name=d, domain=d, format="world", weight=w) for d, w in weights.items())
    data = DataConfig(sources=sources, row_len=256, image_size=48, patch_size=8)
    precisions = ["fp32"] if args.device == "cpu" else []
    if choose_precision("auto", args.device) == "bf16":
        precisions.append("bf16")
    cases = [(case, 0) for case in CASES] + [(CASES[1], 2)]
    rows = []
    for precision, ((name, per_step, changes), blocks) in itertools.product(precisions, cases):
        # on a GPU eight times the rows: what libraries keep for themselves must not be half of it
        per_step = per_step if args.device == "cpu" else 8 * per_step
        row = measure(name, per_step, changes, args.device, data, blocks, precision)
        rows.append(row)
        print(
            f"{row['model']:36s} {row['rows']:3d} rows {precision} {row['parameters'] / 1e6:7.2f}M parameters  "
            f"measured {row['measured'] / 1e6:8.1f} MB, predicted / measured {row['ratio']:.3f}",
            flush=True,
        )
    worst = max(abs(row["ratio"] - 1) for row in rows)
    name = torch.cuda.get_device_name() if args.device == "cuda" else platform.machine()
    print(f"largest deviation {worst:.1%} (bound {LIMIT:.0%}): {'met' if worst <= LIMIT else 'MISSED'}")
    out = {"device": name, "torch": torch.__version__, "bound": LIMIT, "largest_deviation": worst, "rows": rows}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(out, indent=1) + "\n")
    print(args.out)


if __name__ == "__main__":
    main()
