"""Experts against dense at equal active parameters, and a packed multimodal batch against text alone.

    python benchmarks/experts.py [--threads 2] [--width 256] [--depth 6] [--rounds 7] [--out FILE]

Three training steps of isofusion (forward, backward, clip, optimizer) in turns, A B C A B C ..., ratios inside a turn:
  text      dense, rows that are one text document each
  dense     the same model on packed rows of the built-in world: captions, interleaved documents and text, 45-45-10
  experts   8 experts, top-1, each as large as the dense feed-forward, on the same rows: equal active parameters but
            for the router
Targets: experts at 0.8 times the tokens/s of dense; dense on images and text at 0.9 times the FLOP/s of text. FLOPs are
those of the exact ledger; tokens are text and image tokens, never padding.

Bound: bare `torch.mm` at the shapes of the text step. Each row states its share of it. Exit status 1 where a target is
missed.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from common import RESULTS, GemmBound, as_worker, interleaved, median, products, ratio, save, text_batch

from isofusion.config import DataConfig, ModelConfig, SourceConfig, TrainConfig
from isofusion.data.batch import PackedBatch
from isofusion.data.stream import Stream
from isofusion.model.count import batch_shape, count_parameters, flops
from isofusion.model.decoder import Decoder
from isofusion.model.init import init_weights
from isofusion.train.optimizer import build_optimizer
from isofusion.train.process import reproducible
from isofusion.train.step import choose_precision, train_step

TARGET_EXPERTS, TARGET_MULTIMODAL = 0.8, 0.9
WARMUP = 4  # turns that are not timed: a heap grows in the first dozen of steps, once
EXPERTS = 8


class Work:
    """A model and the batches it trains on, one after another. `step()` makes one update."""

    def __init__(self, config: ModelConfig, batches: Sequence[PackedBatch], precision: str, threads: int) -> None:
        train = TrainConfig(rows_per_step=batches[0].rows, lr=1e-3)
        self.config, self.threads, self.precision, self.clip = config, threads, precision, train.clip
        self.model = Decoder(config)
        init_weights(self.model, config, seed=0)
        self.optimizer = build_optimizer(self.model, config, train)
        self.batches = itertools.cycle([batch.torch("cpu") for batch in batches])
        shapes = [batch_shape(batch) for batch in batches]
        self.flops = sum(flops(config, s)["total"] for s in shapes) / len(shapes)  # mean of a step
        self.tokens = sum(s.text_tokens + s.image_tokens for s in shapes) / len(shapes)
        self.image_share = sum(s.image_tokens for s in shapes) / len(shapes) / self.tokens

    def step(self) -> float:
        with reproducible(self.threads):
            balance = self.config.balance_weight if self.config.n_experts else 0.0
            result = train_step(
                self.model, self.optimizer, next(self.batches), precision=self.precision, clip=self.clip,
                balance_weight=balance,
            )  # fmt: skip
            return result.loss


def world_batches(row_len: int, rows: int, count: int) -> list[PackedBatch]:
    weights = {"caption": 45, "interleaved": 45, "text": 10}
    sources = tuple(SourceConfig(name=d, domain=d, format="world", weight=w) for d, w in weights.items())
    data = DataConfig(sources=sources, row_len=row_len, image_size=48, patch_size=8)
    stream = Stream(data, seed=0, split="train", rows_per_step=rows)
    return [stream.batch(step) for step in range(count)]


def measure(args: argparse.Namespace, precision: str) -> dict[str, Any]:
    torch.set_num_threads(args.threads)
    common: dict[str, Any] = {
        "width": args.width, "depth": args.depth, "head_dim": args.head_dim, "ffn_multiple": 16,
        "vocab_size": args.vocabulary, "patch_size": 8,
    }  # fmt: skip
    dense, experts = ModelConfig(**common), ModelConfig(**common, n_experts=EXPERTS, top_k=1)
    text = text_batch(args.rows, args.context, args.vocabulary)
    mixed = world_batches(args.context, args.rows, args.batches)
    work = {
        "text": Work(dense, [text], precision, args.threads),
        "dense": Work(dense, mixed, precision, args.threads),
        "experts": Work(experts, mixed, precision, args.threads),
    }
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    bound = GemmBound(products(dense, text.n_slots, batch_shape(text).targets), dtype)
    calls: dict[str, Callable[[], object]] = {"gemm": bound, **{name: w.step for name, w in work.items()}}
    # one turn passes over all batches, so every turn holds the same work
    seconds = interleaved(calls, WARMUP + args.rounds, args.batches)
    seconds = {name: values[WARMUP:] for name, values in seconds.items()}
    gemm = [bound.flops / s for s in seconds["gemm"]]
    tokens = {name: [w.tokens / s for s in seconds[name]] for name, w in work.items()}
    rate = {name: [w.flops / s for s in seconds[name]] for name, w in work.items()}
    rows = [
        {
            "step": name,
            "n_active": count_parameters(w.config).n_active,
            "n_total": count_parameters(w.config).n_total,
            "image_share": w.image_share,
            "tokens_per_s": median(tokens[name]),
            "flops_per_s": median(rate[name]),
            "share_of_gemm": ratio(rate[name], gemm),
        }
        for name, w in work.items()
    ]
    over_dense, over_text = ratio(tokens["experts"], tokens["dense"]), ratio(rate["dense"], rate["text"])
    return {
        "gemm_flops_per_s": median(gemm),
        "rows": rows,
        "experts_over_dense_tokens": over_dense,
        "multimodal_over_text_flops": over_text,
        "met": over_dense["median"] >= TARGET_EXPERTS and over_text["median"] >= TARGET_MULTIMODAL,
    }


def show(result: dict[str, Any]) -> None:
    print(f"bound: {result['gemm_flops_per_s'] / 1e9:.0f} GFLOP/s of torch.mm at the shapes of the text step")
    print(
        f"{'step':8s} {'active':>10s} {'total':>10s} {'images':>7s} {'tokens/s':>9s} {'GFLOP/s':>8s} {'of bound':>9s}"
    )
    for r in result["rows"]:
        print(
            f"{r['step']:8s} {r['n_active']:10,d} {r['n_total']:10,d} {r['image_share']:7.0%} {r['tokens_per_s']:9.0f} "
            f"{r['flops_per_s'] / 1e9:8.1f} {r['share_of_gemm']['median']:9.1%}"
        )
    for text, key, target in (
        ("experts / dense, tokens/s", "experts_over_dense_tokens", TARGET_EXPERTS),
        ("multimodal / text, FLOP/s", "multimodal_over_text_flops", TARGET_MULTIMODAL),
    ):
        r = result[key]
        print(f"{text}: {r['median']:.2f} ({r['q25']:.2f} to {r['q75']:.2f}), target {target}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value, text in (
        ("threads", 2, ""),
        ("width", 256, ""),
        ("depth", 6, ""),
        ("head-dim", 64, ""),
        ("context", 256, "slots of a row"),
        ("rows", 8, "rows of a step"),
        ("vocabulary", 4096, ""),
        ("batches", 4, "different batches, all used in each turn"),
        ("rounds", 7, "turns; medians over them"),
    ):
        parser.add_argument(f"--{name}", type=int, default=value, help=text)
    parser.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16"))
    parser.add_argument("--out", type=Path, default=RESULTS / "experts.json")
    args = parser.parse_args(argv)
    precision = choose_precision(args.precision)
    result = measure(args, precision)
    show(result)
    settings = {key: value for key, value in vars(args).items() if key not in ("out", "threads")}
    save(args.out, args.threads, {**settings, "precision": precision, "experts": EXPERTS}, **result)
    return 0 if result["met"] else 1


if __name__ == "__main__":
    as_worker()
    sys.exit(main())
