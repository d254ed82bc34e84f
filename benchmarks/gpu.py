"""One GPU: tokens/s, MFU by the exact ledger, memory against its prediction, and several small runs at once.

    python benchmarks/gpu.py [--sections check,main,sizes,jobs] [--seconds 480] [--out FILE.json] [--smoke]

check  the step on the GPU: its loss beside the CPU's, and no wait for the device inside a step
main   early 932M, late 1B, 8 experts (top-1) at 932M active; a plain Llama step of the same width, on text
sizes  all six sizes of early and late fusion: tokens/s, MFU, memory; late over early at equal FLOPs (the paper's Fig 4)
jobs   1, 4 and 8 small runs sharing the card: tokens/s of all of them together

Rows are 1,024 slots, 45-45-10 captions, interleaved, text, bf16. The floor of every step is its FLOPs over the GEMM
rate measured here; `mfu` is against that, `mfu_datasheet` against the printed peak. What does not fit in `--seconds` is
listed as left out. `--smoke`: tiny models, to test this file on any machine; its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isofusion.config import ModelConfig, TrainConfig
from isofusion.data.batch import PackedBatch
from isofusion.data.pack import Piece, build, take
from isofusion.model.count import batch_shape, count_parameters, flops
from isofusion.model.decoder import Decoder
from isofusion.model.init import init_weights
from isofusion.model.memory import memory_bytes
from isofusion.model.paper import PAPER_MODELS
from isofusion.train.optimizer import build_optimizer
from isofusion.train.speed import datasheet_peak, gemm_rate
from isofusion.train.step import precision_context, train_step

RESULTS = Path(__file__).parent / "results" / "gpu.json"
SECTIONS = ("check", "main", "sizes", "jobs")
MAIN = ("early-932m", "late-1b", "moe-932m")
PAIRS = (
    *(("early-275m", "late-289m"), ("early-468m", "late-494m"), ("early-932m", "late-1b")),
    *(("early-1.63b", "late-1.75b"), ("early-2.28b", "late-2.43b"), ("early-3.35b", "late-3.7b")),
)
MIXTURE = (("caption", 45), ("interleaved", 45), ("text", 10))


@dataclass(frozen=True)
class Setting:
    """What the size of the benchmark is made of."""

    device: str
    precision: str
    row_len: int
    patches: int  # per image
    rows: tuple[int, ...]  # per step, the largest that fits is taken
    warmup: int
    steps: int
    smoke: bool

    def model(self, name: str) -> ModelConfig:
        cfg = PAPER_MODELS[name]
        if not self.smoke:
            return cfg
        tiny: dict[str, Any] = {"width": 32, "head_dim": 16, "depth": 2, "vocab_size": 512, "ffn_multiple": 16}
        tiny |= {"patch_size": 2}
        if cfg.fusion == "late":
            tiny |= {"encoder_width": 16, "encoder_head_dim": 16}
        return cfg.model_copy(update=tiny)


def setting(smoke: bool) -> Setting:
    if smoke:
        return Setting("cpu", "fp32", 64, 16, (4,), 1, 2, True)
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/gpu.py: torch finds no GPU here; --smoke runs it with tiny models on a CPU")
    return Setting("cuda", "bf16", 1024, 256, (64, 32, 16, 8, 4), 4, 10, False)


def synthetic(s: Setting, cfg: ModelConfig, rows: int, seed: int, text_only: bool = False) -> PackedBatch:
    """`rows` packed rows with the paper's mixture of row kinds and random contents."""
    rng = np.random.default_rng(seed)
    kinds = [name for name, _ in MIXTURE]
    shares = np.array([share for _, share in MIXTURE], float)
    parts = []
    for r in range(rows):
        # by quota, so that two batches differ in contents and hardly in shape
        kind = "text" if text_only else kinds[int(np.searchsorted(np.cumsum(shares) / 100, (r + 0.5) / rows))]
        domain, pieces, left = kinds.index(kind), [], s.row_len
        while left > 2:
            images = {"caption": 1, "interleaved": 2, "text": 0}[kind]
            if s.patches * images + 3 > left:
                images = 0
            words = {"caption": s.row_len // 12, "interleaved": s.row_len // 3, "text": s.row_len}[kind]
            size = min(left, 2 + images * s.patches + int(words * rng.uniform(0.7, 1.3)))
            ids = rng.integers(4, cfg.vocab_size, size).astype(np.int32)
            image = np.full(size, -1, np.int32)
            for i in range(images):
                at = 1 + i * (s.patches + (size - 2 - images * s.patches) // max(1, images))
                image[at : at + s.patches] = i
            patches = rng.integers(0, 256, (images * s.patches, cfg.patch_dim), dtype=np.uint8)
            pieces.append(Piece(f"{kind}:0:{seed}-{r}-{len(pieces)}", ids, image, patches))
            left -= size
        parts.append((build([pieces], s.row_len, s.patches, cfg.patch_dim, domain, 0), 0))
    return take(parts)


class Trainer:
    """A model with its optimizer on the device, and a few batches there."""

    def __init__(self, s: Setting, cfg: ModelConfig, rows: int, text_only: bool = False) -> None:
        self.s, self.cfg, self.rows = s, cfg, rows
        self.host = [synthetic(s, cfg, rows, seed, text_only) for seed in range(2)]
        with torch.device(s.device):
            self.model = Decoder(cfg)
        if s.smoke:
            init_weights(self.model, cfg, 0)
        else:  # a normal init on the host would take longer than the steps; the speed does not see the difference
            for name, p in self.model.named_parameters():
                with torch.no_grad():
                    p.fill_(1.0) if p.dim() == 1 else p.normal_(0.0, 0.5 if "embed" in name else p.shape[-1] ** -0.5)
            self.model.compile_blocks()
        self.optimizer = build_optimizer(self.model, cfg, TrainConfig(lr=1e-4))
        self.batches = [batch.torch(s.device) for batch in self.host]

    def step(self, i: int) -> Any:
        return train_step(
            self.model,
            self.optimizer,
            self.batches[i % len(self.batches)],
            precision=self.s.precision,
            clip=1.0,
            balance_weight=self.cfg.balance_weight if self.cfg.n_experts else 0.0,
            device=self.s.device,
        )


def wait(s: Setting) -> None:
    if s.device != "cpu":
        torch.cuda.synchronize()


def seconds_per_step(s: Setting, step: Any) -> tuple[float, float]:
    """(median of three stretches, seconds of the warm-up, in which everything is compiled)."""
    began = time.perf_counter()
    for i in range(s.warmup):
        step(i)
    wait(s)
    compiling = time.perf_counter() - began
    times = []
    for _ in range(3):
        wait(s)
        began = time.perf_counter()
        for i in range(s.steps):
            step(i)
        wait(s)
        times.append((time.perf_counter() - began) / s.steps)
    return statistics.median(times), compiling


def peaks(s: Setting) -> dict[str, float | None]:
    """FLOP/s of the best of a few large products, and the printed peak."""
    shapes = [(8192, 8192, 8192), (16384, 4096, 4096)] if not s.smoke else [(256, 256, 256)]
    name = torch.cuda.get_device_name() if s.device != "cpu" else "cpu"
    best = max(gemm_rate(s.device, s.precision, *shape, repeats=10) for shape in shapes)
    return {"measured": best, "datasheet": datasheet_peak(name)}


def measure(s: Setting, name: str, peak: dict[str, float | None], text_only: bool = False) -> dict[str, Any]:
    """One model: speed, MFU and memory of its training step, at the largest number of rows that fits."""
    cfg = s.model(name)
    compiled = s.device != "cpu"
    free = 0.9 * torch.cuda.mem_get_info()[0] if compiled else 1e12
    rows = next((r for r in s.rows if fits(s, cfg, r, free)), s.rows[-1])
    if compiled:
        torch.cuda.reset_peak_memory_stats()
    trainer = Trainer(s, cfg, rows, text_only)
    seconds, compiling = seconds_per_step(s, trainer.step)
    loss = trainer.step(0).loss
    shapes = [batch_shape(batch) for batch in trainer.host]
    work = statistics.mean(flops(cfg, shape)["total"] for shape in shapes)
    tokens = statistics.mean(shape.text_tokens + shape.image_tokens for shape in shapes)
    n = count_parameters(cfg)
    predicted = memory_bytes(cfg, rows * s.row_len, s.precision, shapes[0], s.device)["total"]
    measured = torch.cuda.max_memory_allocated() if compiled else None
    return {
        "model": name + (" (text only)" if text_only else ""),
        "n_active": n.n_active,
        "n_total": n.n_total,
        "rows": rows,
        "seconds": seconds,
        "warmup_seconds": round(compiling, 2),
        "tokens_per_s": tokens / seconds,
        "flops_per_s": work / seconds,
        "mfu": work / seconds / peak["measured"],  # type: ignore[operator]
        "mfu_datasheet": work / seconds / peak["datasheet"] if peak["datasheet"] else None,
        "floor_seconds": work / peak["measured"],  # type: ignore[operator]
        "memory_measured": measured,
        "memory_predicted": predicted,
        "memory_ratio": predicted / measured if measured else None,
        "loss": loss,
    }


def fits(s: Setting, cfg: ModelConfig, rows: int, budget: float) -> bool:
    """Whether a step of `rows` rows is predicted to fit as one micro-batch that recomputes nothing."""
    return memory_bytes(cfg, rows * s.row_len, s.precision, device=s.device)["total"] <= budget


# ---- a plain step to compare with -----------------------------------------------------------------------------------


class PlainBlock(nn.Module):
    """Llama's block as it is commonly written: RMSNorm, causal SDPA with rotary embedding, SwiGLU."""

    def __init__(self, width: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)

        def turn(y: Tensor) -> Tensor:
            a, b = y.chunk(2, -1)
            return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(v.dtype)

        y = F.scaled_dot_product_attention(turn(q), turn(k), v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(batch, length, width))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class PlainLlama(nn.Module):
    """A text decoder with a whole-batch cross-entropy, compiled as one: what a user would write first."""

    def __init__(self, cfg: ModelConfig, length: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(cfg.vocab_size, cfg.width)
        self.blocks = nn.ModuleList(PlainBlock(cfg.width, cfg.hidden(), cfg.n_heads) for _ in range(cfg.depth))
        self.norm = nn.RMSNorm(cfg.width)
        self.head = nn.Linear(cfg.width, cfg.vocab_size, bias=False)
        angle = torch.arange(length)[:, None] * 10000.0 ** -(torch.arange(0, cfg.head_dim, 2) / cfg.head_dim)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return F.cross_entropy(self.head(self.norm(x)).float().flatten(0, 1), targets.flatten())


def plain(s: Setting, name: str, rows: int, peak: dict[str, float | None], compiled: bool) -> dict[str, Any]:
    """Tokens/s of the plain step with the shape of `name`, full rows of text."""
    cfg = s.model(name)
    with torch.device(s.device):
        model = PlainLlama(cfg, s.row_len)
        ids = torch.randint(4, cfg.vocab_size, (2, rows, s.row_len + 1))
    forward: Any = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(i: int) -> None:
        optimizer.zero_grad(set_to_none=True)
        with precision_context(s.precision, s.device):
            loss = forward(ids[i % 2, :, :-1], ids[i % 2, :, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    seconds, compiling = seconds_per_step(s, step)
    tokens = rows * s.row_len
    d, hidden = cfg.width, cfg.hidden()
    products = cfg.depth * (4 * d * d + 3 * d * hidden) + d * cfg.vocab_size
    work = 6.0 * tokens * products + 12.0 * d * cfg.depth * rows * s.row_len * (s.row_len + 1) / 2
    return {
        "model": f"plain torch Llama, {'compiled' if compiled else 'eager'} (text only, width {d})",
        "rows": rows,
        "seconds": seconds,
        "warmup_seconds": round(compiling, 2),
        "tokens_per_s": tokens / seconds,
        "flops_per_s": work / seconds,
        "mfu": work / seconds / peak["measured"],  # type: ignore[operator]
        "mfu_datasheet": work / seconds / peak["datasheet"] if peak["datasheet"] else None,
    }


# ---- sections -------------------------------------------------------------------------------------------------------


def check(s: Setting, peak: dict[str, float | None]) -> dict[str, Any]:
    """The step on this device against the same step on the CPU in fp32, and no wait for the device inside it."""
    out: dict[str, Any] = {}
    for kind, extra in (("early", {}), ("late", {"fusion": "late", "encoder_width": 64}), ("moe", {"n_experts": 8})):
        cfg = ModelConfig(
            width=128, depth=2, head_dim=32, ffn_multiple=32, vocab_size=512, patch_size=2, encoder_head_dim=32, **extra
        )  # fmt: skip
        small = replace(s, row_len=256, patches=16)
        host = synthetic(small, cfg, 4, 0)
        losses: dict[str, list[float]] = {}
        for device, precision in (("cpu", "fp32"), (s.device, s.precision)):
            model = Decoder(cfg)
            init_weights(model, cfg, 0)
            model = model.to(device)
            if device != "cpu":
                model.compile_blocks()
            optimizer = build_optimizer(model, cfg, TrainConfig(lr=1e-3))
            batch, results = host.torch(device), []
            for i in range(6):
                if device != "cpu" and i == 3:  # everything is compiled: from here on a wait is an error
                    torch.cuda.set_sync_debug_mode("error")
                results.append(
                    train_step(
                        model, optimizer, batch, precision=precision, clip=1.0, device=device,
                        balance_weight=0.01 if cfg.n_experts else 0.0,
                    )
                )  # fmt: skip
            if device != "cpu":
                torch.cuda.set_sync_debug_mode("default")
            losses[f"{device} {precision}"] = [result.loss for result in results]
        cpu, here = losses["cpu fp32"], losses[f"{s.device} {s.precision}"]
        out[kind] = {"losses": losses, "largest_difference": max(abs(a - b) for a, b in zip(cpu, here, strict=True))}
        torch._dynamo.reset()
    return out


def jobs(s: Setting, peak: dict[str, float | None]) -> list[dict[str, Any]]:
    """Tokens/s of 1, 4, 8 equal small runs at once, each in a process of its own."""
    context = multiprocessing.get_context("spawn")
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "2")  # each of them compiles
    rows: list[dict[str, Any]] = []
    for count in (1, 2) if s.smoke else (1, 4, 8):
        barrier, queue = context.Barrier(count), context.Queue()
        duration = 0.3 if s.smoke else 10.0
        processes = [
            context.Process(target=_job, args=(s, barrier, queue, duration), daemon=True) for _ in range(count)
        ]
        for process in processes:
            process.start()
        rates = [queue.get(timeout=300) for _ in processes]
        for process in processes:
            process.join()
        rows.append(
            {"jobs": count, "tokens_per_s": sum(rates), "of_one": sum(rates) / rows[0]["tokens_per_s"] if rows else 1.0}
        )
    return rows


def _job(s: Setting, barrier: Any, queue: Any, duration: float) -> None:
    torch.set_num_threads(1)
    small = replace(s, row_len=256, patches=36 if not s.smoke else 16)
    cfg = ModelConfig(
        width=32 if s.smoke else 192, depth=2 if s.smoke else 6, head_dim=32, ffn_multiple=32, vocab_size=512,
        patch_size=2 if s.smoke else 8,
    )  # fmt: skip
    trainer = Trainer(small, cfg, 4 if s.smoke else 32)
    for i in range(s.warmup):
        trainer.step(i)
    wait(s)
    barrier.wait()
    began, steps = time.perf_counter(), 0
    previous: Any = None
    while time.perf_counter() - began < duration:
        result = trainer.step(steps)
        if previous is not None:
            _ = previous.loss  # one step late, as the training loop reads it
        previous, steps = result, steps + 1
    wait(s)
    tokens = statistics.mean(float((batch.doc_id >= 0).sum()) for batch in trainer.host)
    queue.put(tokens * steps / (time.perf_counter() - began))


@contextlib.contextmanager
def fresh() -> Iterator[None]:
    """Nothing of one model stays for the next."""
    try:
        yield
    finally:
        torch._dynamo.reset()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def report(row: dict[str, Any]) -> None:
    percent = lambda value: f"{value:6.1%}" if value is not None else "     –"  # noqa: E731
    memory = row.get("memory_measured")
    print(
        f"{row['model']:44s} {row['rows']:2d} rows {1e3 * row['seconds']:9.1f} ms {row['tokens_per_s']:11,.0f} tok/s  "
        f"MFU {percent(row['mfu'])} measured {percent(row['mfu_datasheet'])} datasheet"
        + (f"  {memory / 1e9:6.1f} GB, predicted / measured {row['memory_ratio']:.3f}" if memory else ""),
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", default=",".join(SECTIONS))
    parser.add_argument("--seconds", type=float, default=480.0, help="no new model is begun after this")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    wanted = args.sections.split(",")
    if unknown := set(wanted) - set(SECTIONS):
        parser.error(f"no section {', '.join(sorted(unknown))}; choose from {', '.join(SECTIONS)}")
    s, began = setting(args.smoke), time.monotonic()
    peak = peaks(s)
    card = torch.cuda.get_device_name() if s.device != "cpu" else "CPU (smoke test: numbers mean nothing)"
    print(f"{card}, torch {torch.__version__}: GEMM {peak['measured'] / 1e12:.1f} TFLOP/s", flush=True)  # type: ignore[operator]
    results: dict[str, Any] = {"device": card, "torch": torch.__version__, "smoke": s.smoke, "peak_flops": peak}
    results |= {"rows": [], "left_out": [], "failed": {}}
    by_name: dict[str, dict[str, Any]] = {}

    def attempt(name: str, work: Any) -> Any:
        """`work()`, unless time is up; a failure is kept and the rest goes on."""
        if time.monotonic() - began > args.seconds:
            results["left_out"].append(name)
            return None
        try:
            with fresh():
                return work()
        except Exception as error:  # one model that does not run must not cost the others
            results["failed"][name] = f"{type(error).__name__}: {error}"[:2000]
            print(f"{name}: failed: {str(error).splitlines()[0] if str(error) else type(error).__name__}", flush=True)
            return None
        finally:
            save()

    def save() -> None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(results, indent=1) + "\n")

    def one(name: str, work: Any) -> None:
        if name not in by_name and (row := attempt(name, work)) is not None:
            by_name[name] = row
            results["rows"].append(row)
            report(row)

    if "check" in wanted:
        results["check"] = attempt("check", lambda: check(s, peak))
        for kind, found in (results["check"] or {}).items():
            print(f"check, {kind}: largest difference of a loss {found['largest_difference']:.2e} nats", flush=True)
    if "main" in wanted:
        for name in MAIN:
            one(name, lambda name=name: measure(s, name, peak))
        one("text", lambda: measure(s, MAIN[0], peak, text_only=True))
        rows = by_name["text"]["rows"] if "text" in by_name else s.rows[-1]
        for compiled in (True, False):
            if not (s.smoke and compiled):  # a compiler is not always there
                one(f"plain {compiled}", lambda c=compiled: plain(s, MAIN[0], min(rows, 32), peak, c))
        results["ratios"] = ratios(by_name)
        for name, value in results["ratios"].items():
            print(f"{name}: {value:.3f}", flush=True)
    if "sizes" in wanted:
        for pair in PAIRS:
            for name in pair:
                one(name, lambda name=name: measure(s, name, peak))
        results["late_over_early"] = figure_4(by_name)
        for row in results["late_over_early"]:
            print(f"{row['late']} / {row['early']} at equal FLOPs: time {row['time']:.3f}, memory {row['memory']}")
    if "jobs" in wanted:
        results["jobs"] = attempt("jobs", lambda: jobs(s, peak))
        for row in results["jobs"] or []:
            print(f"{row['jobs']} runs at once: {row['tokens_per_s']:,.0f} tokens/s, {row['of_one']:.2f} of one run")
    results["seconds"] = round(time.monotonic() - began, 1)
    save()
    print(args.out)


def ratios(rows: dict[str, dict[str, Any]]) -> dict[str, float]:
    """What the targets ask for, of the rows that were measured."""
    out = {}
    if {"moe-932m", "early-932m"} <= rows.keys():
        out["experts over dense, tokens/s (target 0.75)"] = (
            rows["moe-932m"]["tokens_per_s"] / rows["early-932m"]["tokens_per_s"]
        )
    reference = [rows[name]["flops_per_s"] for name in ("plain True", "plain False") if name in rows]
    if reference and "text" in rows:
        out["early, text only, over the best plain step, FLOP/s (target 1.1)"] = rows["text"]["flops_per_s"] / max(
            reference
        )
    return out


def figure_4(rows: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Late over early fusion of like size: seconds per FLOP, and bytes per row of a step, where both were measured."""
    out = []
    for early, late in PAIRS:
        if early in rows and late in rows:
            a, b = rows[early], rows[late]
            time_ratio = a["flops_per_s"] / b["flops_per_s"]
            memory = None
            if a["memory_measured"] and b["memory_measured"] and a["rows"] == b["rows"]:
                memory = b["memory_measured"] / a["memory_measured"]
            out.append({"early": early, "late": late, "time": time_ratio, "memory": memory})
    return out


if __name__ == "__main__":
    main()
