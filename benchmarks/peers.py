"""A text-only training step against nanoGPT, nanochat and OLMo-core, at equal FLOPs per token and in one precision.

    python benchmarks/peers.py --nanogpt DIR --nanochat DIR --olmo-core DIR [--threads 2] [--rounds 9] [--out FILE]

DIR is a check-out beside the project; a peer without one is left out, and said so. Step: forward, backward, clip,
optimizer. isofusion's rows go through its own PackedBatch, Decoder and train_step. Every model has the same width,
depth, head size, context and vocabulary; hidden sizes make FLOPs per token agree within 1 %, and all are judged by
achieved FLOP/s, counted by one rule (adapters.Shape.flops). Everybody runs eager and compiled in one process, with the
allocator of isofusion's workers, in turns: A B C D A B C D ...; ratios are taken inside a turn. isofusion's kernels are
deterministic, as in a study; the peers' need not be. Compiled: each project's own way; isofusion compiles each block.

Bound: bare `torch.mm` at isofusion's own shapes (forward and both gradients, as often as the step runs them).
Target: 1.3 times the best peer, and at least half of the bound. Exit status 1 where a target is missed.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from adapters import PEERS, Peer, Shape
from common import RESULTS, GemmBound, as_worker, interleaved, median, products, ratio, save, text_batch

from isofusion.config import ModelConfig, TrainConfig
from isofusion.data.batch import PackedBatch
from isofusion.model.count import batch_shape, count_parameters, flops
from isofusion.model.decoder import Decoder
from isofusion.model.init import init_weights
from isofusion.train.optimizer import build_optimizer
from isofusion.train.process import reproducible
from isofusion.train.step import choose_precision, train_step

TARGET_RATIO, TARGET_SHARE = 1.3, 0.5
WARMUP = 3  # steps that are not timed; the first compiles


def model_config(shape: Shape) -> ModelConfig:
    return ModelConfig(
        width=shape.width,
        depth=shape.depth,
        head_dim=shape.head_dim,
        ffn_multiple=shape.ffn_multiple,
        vocab_size=shape.vocabulary,
        patch_size=8,
    )


def own(shape: Shape, precision: str, compiled: bool, batch: PackedBatch, threads: int) -> Peer:
    """isofusion's own step on the packed batch (NumPy arrays), with its real settings."""
    config = model_config(shape)
    train = TrainConfig(rows_per_step=shape.rows, lr=1e-3)
    model = Decoder(config)
    init_weights(model, config, seed=0)
    optimizer = build_optimizer(model, config, train)
    if compiled:
        model.compile_blocks()
    packed = batch.torch("cpu")

    def step() -> float:
        with reproducible(threads):
            return train_step(model, optimizer, packed, precision=precision, clip=train.clip).loss

    return Peer(step, flops(config, batch_shape(batch))["total"], count_parameters(config).n_total)


def data_of(batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and next tokens i64 [rows, context] for the peers, which predict at the last slot of a row too."""
    ids = torch.from_numpy(batch.token_ids).long().view(batch.rows, batch.row_len)
    return ids, ids.roll(-1, dims=1)


def measure(
    shape: Shape,
    folders: dict[str, Path],
    modes: Sequence[str],
    precision: str,
    threads: int,
    rounds: int,
    repeats: int,
) -> dict[str, Any]:
    """Rows of the table, one for each (model, mode), and the bound."""
    torch.set_num_threads(threads)
    batch = text_batch(shape.rows, shape.context, shape.vocabulary)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    bound = GemmBound(products(model_config(shape), shape.tokens, batch_shape(batch).targets), dtype)
    entries: dict[str, Peer] = {}
    for mode in modes:
        entries[f"isofusion {mode}"] = own(shape, precision, mode == "compiled", batch, threads)
        for name, folder in folders.items():
            entries[f"{name} {mode}"] = PEERS[name](folder, shape, precision, mode == "compiled", data_of(batch))
    calls: dict[str, Callable[[], object]] = {"gemm": bound, **{name: e.step for name, e in entries.items()}}
    for name, call in calls.items():
        print(f"warming up: {name}", file=sys.stderr, flush=True)
        for _ in range(WARMUP):
            call()
    seconds = interleaved(calls, rounds, repeats)
    gemm = [bound.flops / s for s in seconds["gemm"]]
    rate = {name: [e.flops / s for s in seconds[name]] for name, e in entries.items()}
    first = next(iter(entries.values())).flops
    rows = []
    for name, entry in entries.items():
        model, mode = name.rsplit(" ", 1)
        row: dict[str, Any] = {
            "model": model,
            "mode": mode,
            "parameters": entry.parameters,
            "flops_per_token": entry.flops / shape.tokens,
            "flops_against_isofusion": entry.flops / first,
            "seconds": median(seconds[name]),
            "flops_per_s": median(rate[name]),
            "share_of_gemm": ratio(rate[name], gemm),
        }
        if model != "isofusion":
            row["isofusion_over_this"] = ratio(rate[f"isofusion {mode}"], rate[name])
        rows.append(row)
    return {"gemm_flops_per_s": median(gemm), "rows": rows}


def verdict(result: dict[str, Any]) -> dict[str, Any]:
    """isofusion's best mode against the best peer, and its share of the bound; `met` says whether both targets are.

    `share_needed`: the share of the bound at which isofusion would reach the target ratio; above 1 nothing can.
    """
    mine = max((r for r in result["rows"] if r["model"] == "isofusion"), key=lambda r: r["flops_per_s"])
    peers = [r for r in result["rows"] if r["model"] != "isofusion"]
    share: float = mine["share_of_gemm"]["median"]
    out: dict[str, Any] = {"share_of_gemm": share, "isofusion_mode": mine["mode"]}
    met = share >= TARGET_SHARE
    by_mode = {}
    for mode in dict.fromkeys(r["mode"] for r in peers):
        best = max((r for r in peers if r["mode"] == mode), key=lambda r: r["flops_per_s"])
        by_mode[mode] = {
            "best_peer": best["model"],
            "ratio": best["isofusion_over_this"]["median"],
            "share_needed": TARGET_RATIO * best["share_of_gemm"]["median"],
        }
        met = met and by_mode[mode]["ratio"] >= TARGET_RATIO
    if peers:
        best = max(peers, key=lambda r: r["flops_per_s"])
        out["best_over_best"] = mine["flops_per_s"] / best["flops_per_s"]
    return {**out, "by_mode": by_mode, "met": met}


def show(result: dict[str, Any], judged: dict[str, Any]) -> None:
    print(f"bound: {result['gemm_flops_per_s'] / 1e9:.0f} GFLOP/s of torch.mm at isofusion's own shapes")
    print(f"{'model':10s} {'mode':9s} {'MFLOP/token':>12s} {'GFLOP/s':>8s} {'of bound':>9s} {'isofusion / this':>24s}")
    for r in result["rows"]:
        over = r.get("isofusion_over_this")
        text = f"{over['median']:.2f} ({over['q25']:.2f} to {over['q75']:.2f})" if over else "-"
        print(
            f"{r['model']:10s} {r['mode']:9s} {r['flops_per_token'] / 1e6:12.2f} {r['flops_per_s'] / 1e9:8.1f} "
            f"{r['share_of_gemm']['median']:9.1%} {text:>24s}"
        )
    for mode, best in judged["by_mode"].items():
        needed = f"target {TARGET_RATIO}, which is {best['share_needed']:.0%} of the bound"
        print(f"{mode}: {best['ratio']:.2f} x {best['best_peer']}, the best peer ({needed})")
    if "best_over_best" in judged:
        print(f"best mode over best peer in any mode: {judged['best_over_best']:.2f}")
    print(f"share of the bound: {judged['share_of_gemm']:.1%} (target {TARGET_SHARE:.0%})")


def source_digest(folder: Path) -> str:
    """sha256 over the Python files of a check-out: which version the numbers belong to."""
    files = sorted(folder.rglob("*.py"))
    return hashlib.sha256(b"".join(hashlib.sha256(f.read_bytes()).digest() for f in files)).hexdigest()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in PEERS:
        parser.add_argument(f"--{name}", type=Path, metavar="DIR", help="its check-out")
    parser.add_argument("--modes", default="eager,compiled")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9, help="turns; medians over them")
    parser.add_argument("--repeats", type=int, default=2, help="steps of each model in a turn")
    parser.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16"))
    for name, value in vars(Shape()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--out", type=Path, default=RESULTS / "peers.json")
    args = parser.parse_args(argv)
    shape = Shape(**{name: getattr(args, name) for name in vars(Shape())})
    folders = {name: path for name in PEERS if (path := getattr(args, name.replace("-", "_"))) is not None}
    for name in PEERS:
        if name not in folders:
            print(f"{name}: left out, no --{name} DIR was given")
    logging.disable(logging.INFO)  # the peers report their models on the root logger
    precision = choose_precision(args.precision)
    modes = args.modes.split(",")
    result = measure(shape, folders, modes, precision, args.threads, args.rounds, args.repeats)
    judged = verdict(result)
    show(result, judged)
    settings = {**vars(shape), "precision": precision, "rounds": args.rounds, "repeats": args.repeats}
    sources = {name: source_digest(folder) for name, folder in folders.items()}
    save(args.out, args.threads, settings, sources=sources, **result, verdict=judged)
    return 0 if judged["met"] or not folders else 1


if __name__ == "__main__":
    as_worker()
    sys.exit(main())
