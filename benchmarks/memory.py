"""Peak memory of a training step: what isofusion.model.memory predicts against what the allocator saw.

    python benchmarks/memory.py [--device cpu|cuda] [--all] [--out FILE.json]

The bound is 10 % on every row of the built-in world. On a CPU the profiler records every allocation (fp32, and bf16
where the CPU has it). On a GPU, in bf16 and with compiled blocks, it is the bytes of weights, moments and batch and
what torch's allocator saw a later step add: workspaces of matrix products, which are there before, are not in it. There
four models are measured, all of them with `--all`, each with eight times the rows. Nothing here is a timing, so other
work does not disturb it. The JSON is written after every model; exit status 1 where one failed, which is listed.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import platform
import sys
import traceback
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from isofusion.config import DataConfig, ModelConfig, SourceConfig, TrainConfig
from isofusion.data.batch import PackedBatch
from isofusion.data.stream import Stream
from isofusion.model import native
from isofusion.model.count import batch_shape, count_parameters
from isofusion.model.decoder import Decoder
from isofusion.model.init import init_weights
from isofusion.model.memory import memory_bytes
from isofusion.train.memory import peak_bytes, resident_bytes
from isofusion.train.optimizer import build_optimizer
from isofusion.train.step import choose_precision, train_step

RESULTS = Path(__file__).parent / "results"
LIMIT = 0.10
COMMON = {"depth": 4, "head_dim": 32, "ffn_multiple": 32, "vocab_size": 512, "patch_size": 8}
Case = tuple[str, int, dict[str, Any]]  # name, rows of a step, what differs from COMMON
CASES: tuple[Case, ...] = (
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
ON_A_GPU = ((CASES[2], 0), (CASES[7], 0), (CASES[9], 0), (CASES[2], 2))
"""Cases and blocks computed twice: the widest of each kind, where what libraries keep for themselves counts least."""


def batch_bytes(batch: PackedBatch) -> int:
    """Of a torch batch."""
    held = [value for item in fields(batch) if isinstance(value := getattr(batch, item.name), torch.Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in held)


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
    resident = resident_bytes(model, optimizer) + (batch_bytes(tensors) if device != "cpu" else 0)
    measured = float(resident + peak_bytes(step, device))
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


def release() -> None:
    """Nothing of one model stays for the next; compiled blocks and their models refer to each other."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--all", action="store_true", help="on a GPU, all models")
    parser.add_argument("--out", type=Path, help="default: results/memory.json, on a GPU results/memory-cuda.json")
    args = parser.parse_args(argv)
    gpu = args.device == "cuda"
    path: Path = args.out or RESULTS / ("memory-cuda.json" if gpu else "memory.json")
    if gpu and not torch.cuda.is_available():
        raise SystemExit("benchmarks/memory.py: torch finds no GPU here; without --device it measures on the CPU")
    torch.set_num_threads(1)
    weights = {"caption": 45, "interleaved": 45, "text": 10}
    sources = tuple(SourceConfig(name=d, domain=d, format="world", weight=w) for d, w in weights.items())
    data = DataConfig(sources=sources, row_len=256, image_size=48, patch_size=8)
    precisions = [] if gpu else ["fp32"]
    if choose_precision("auto", args.device) == "bf16":
        precisions.append("bf16")
    cases = list(ON_A_GPU) if gpu and not args.all else [(case, 0) for case in CASES] + [(CASES[1], 2)]
    out: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if gpu else platform.machine(),
        "torch": torch.__version__,
        "bound": LIMIT,
        "largest_deviation": None,
        "rows": [],
        "failed": {},
    }
    for precision, ((name, per_step, changes), blocks) in itertools.product(precisions, cases):
        row = None
        try:
            row = measure(name, 8 * per_step if gpu else per_step, changes, args.device, data, blocks, precision)
        except Exception as error:  # one model that does not run must not cost the others
            label = f"{name}, {changes}, {blocks} blocks twice, {precision}"
            out["failed"][label] = f"{type(error).__name__}: {error}"[:2000]
            traceback.print_exc()
            print(f"{label}: failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}", flush=True)
        release()  # not above, where the error still holds the model
        if row is not None:
            out["rows"].append(row)
            out["largest_deviation"] = max(abs(row["ratio"] - 1) for row in out["rows"])
            print(
                f"{row['model']:36s} {row['rows']:3d} rows {precision} {row['parameters'] / 1e6:7.2f}M parameters  "
                f"measured {row['measured'] / 1e6:8.1f} MB, predicted / measured {row['ratio']:.3f}",
                flush=True,
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(out, indent=1) + "\n")
    worst = out["largest_deviation"]
    if worst is not None:
        verdict = "met" if worst <= LIMIT else "MISSED"
        print(f"largest deviation {worst:.1%} (bound {LIMIT:.0%}): {verdict}", flush=True)
    print(path, flush=True)
    return 1 if out["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
