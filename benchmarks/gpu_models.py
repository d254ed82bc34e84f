"""Training steps of the paper's models on one device: batches, time, memory, and waits for the device inside a step."""

from __future__ import annotations

import contextlib
import gc
import math
import os
import statistics
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from isofusion.config import ModelConfig, TrainConfig
from isofusion.data.batch import PackedBatch
from isofusion.data.pack import Piece, build, take
from isofusion.data.sample import DOMAINS
from isofusion.model.count import BatchShape, batch_shape, count_parameters, flops
from isofusion.model.decoder import Decoder
from isofusion.model.init import init_weights
from isofusion.model.memory import memory_bytes
from isofusion.model.paper import PAPER_MODELS
from isofusion.train.optimizer import build_optimizer
from isofusion.train.process import reproducible
from isofusion.train.speed import datasheet_peak, gemm_rate
from isofusion.train.step import StepResult, train_step

Row = dict[str, Any]
Peak = dict[str, float | None]

MIXTURE = {"caption": 45, "interleaved": 45, "text": 10}  # the paper's, in percent of the rows
FEW_IMAGES = {"caption": 20, "interleaved": 10, "text": 70}
TEXT = {"text": 100}
KINDS: dict[str, dict[str, Any]] = {
    "early": {},
    "late": {"fusion": "late", "encoder_width": 64},
    "moe": {"n_experts": 8},
}
SYNCHRONIZES = "called a synchronizing CUDA operation"  # what torch says of one in its "warn" mode


@dataclass(frozen=True)
class Setting:
    """What the size of the benchmark is made of."""

    device: str
    precision: str
    row_len: int
    patches: int  # per image
    rows: tuple[int, ...]  # per step, the largest that fits is taken
    warmup: int
    steps: int  # of one stretch, at most
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
    """Raises SystemExit where there is no GPU to measure."""
    if smoke:
        return Setting("cpu", "fp32", 64, 16, (4, 2), 1, 3, True)
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/gpu.py: torch finds no GPU here; --smoke runs it with tiny models on a CPU")
    return Setting("cuda", "bf16", 1024, 256, (64, 48, 32, 24, 16, 12, 8, 4), 4, 10, False)


def card(s: Setting) -> str:
    return torch.cuda.get_device_name() if s.device != "cpu" else "CPU (smoke test: numbers mean nothing)"


def peaks(s: Setting) -> Peak:
    """FLOP/s of the best of a few large products, and the printed peak."""
    shapes = [(8192, 8192, 8192), (16384, 4096, 4096)] if not s.smoke else [(256, 256, 256)]
    best = max(gemm_rate(s.device, s.precision, *shape, repeats=10) for shape in shapes)
    return {"measured": best, "datasheet": datasheet_peak(card(s))}


def synthetic(s: Setting, cfg: ModelConfig, rows: int, seed: int, mixture: Mapping[str, int] = MIXTURE) -> PackedBatch:
    """`rows` packed rows of random contents; `mixture`: percent of the rows by kind."""
    rng = np.random.default_rng(seed)
    kinds, bounds = list(mixture), np.cumsum(list(mixture.values())) / 100
    parts = []
    for r in range(rows):
        # by quota, so that two batches differ in contents and hardly in shape
        kind = kinds[int(np.searchsorted(bounds, (r + 0.5) / rows))]
        pieces, left = [], s.row_len
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
        parts.append((build([pieces], s.row_len, s.patches, cfg.patch_dim, DOMAINS.index(kind), 0), 0))
    return take(parts)


def as_a_run(s: Setting) -> AbstractContextManager[None]:
    """The switches of torch that a run sets."""
    return reproducible(torch.get_num_threads(), deterministic=s.device == "cpu")


class Trainer:
    """A model with its optimizer on the device, and two batches there, each in micro-batches of `micro_rows` rows."""

    def __init__(
        self,
        s: Setting,
        cfg: ModelConfig,
        rows: int,
        micro_rows: int | None = None,
        mixture: Mapping[str, int] = MIXTURE,
    ) -> None:
        self.s, self.cfg = s, cfg
        self.host = [synthetic(s, cfg, rows, seed, mixture) for seed in range(2)]
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
        self.batches = [[part.torch(s.device) for part in batch.split(micro_rows or rows)] for batch in self.host]

    def step(self, i: int) -> StepResult:
        with as_a_run(self.s):
            return train_step(
                self.model,
                self.optimizer,
                self.batches[i % len(self.batches)],
                precision=self.s.precision,
                clip=1.0,
                balance_weight=self.cfg.balance_weight if self.cfg.n_experts else 0.0,
                device=self.s.device,
            )


# ---- time -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timing:
    """Seconds of one step, the median of three stretches of `steps` steps."""

    seconds: float
    spread: float  # slowest less fastest stretch, over the median
    steps: int
    warmup_seconds: float  # of the first steps, in which everything is compiled


def wait(s: Setting) -> None:
    if s.device != "cpu":
        torch.cuda.synchronize()


def stretch(seconds: float, most: int) -> int:
    """Steps of one stretch: a second and a half of them, at least 3."""
    return min(most, max(3, math.ceil(1.5 / seconds)))


def time_steps(s: Setting, step: Callable[[int], object]) -> Timing:
    def seconds_of(first: int, count: int) -> float:
        wait(s)
        began = time.perf_counter()
        for i in range(first, first + count):
            step(i)
        wait(s)
        return time.perf_counter() - began

    warmup = seconds_of(0, s.warmup)
    steps = stretch(seconds_of(s.warmup, 1), s.steps)
    times = [seconds_of(0, steps) / steps for _ in range(3)]
    middle = statistics.median(times)
    return Timing(middle, (max(times) - min(times)) / middle, steps, warmup)


def speed(timing: Timing, tokens: float, work: float, peak: Peak) -> Row:
    """What every row of the table says; `tokens` and `work` (FLOPs) of one step."""
    assert peak["measured"] is not None
    return {
        "seconds": timing.seconds,
        "spread": round(timing.spread, 4),
        "steps": timing.steps,
        "warmup_seconds": round(timing.warmup_seconds, 2),
        "tokens_per_s": tokens / timing.seconds,
        "flops_per_s": work / timing.seconds,
        "mfu": work / timing.seconds / peak["measured"],
        "mfu_datasheet": work / timing.seconds / peak["datasheet"] if peak["datasheet"] else None,
        "floor_seconds": work / peak["measured"],
    }


# ---- waits for the device -------------------------------------------------------------------------------------------


def count_waits(s: Setting, step: Callable[[int], object], steps: int, first: int = 0) -> dict[str, Any] | None:
    """Waits for the device that torch notices inside `steps` steps, which must have run before; None on a CPU.

    {"count", "steps", "where": the first three different places, each innermost frame first, torch's own left out}.
    A wait inside the backward pass has the place of the call to `backward`.
    """
    if s.device == "cpu":
        return None
    places: list[str] = []
    wait(s)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        others = warnings.showwarning

        def keep(message: Any, *where: Any, **more: Any) -> None:
            if SYNCHRONIZES not in str(message):
                others(message, *where, **more)
                return
            frames = traceback.extract_stack()[:-2]  # less this function and the one that calls it
            outside = [f for f in frames if f"{os.sep}torch{os.sep}" not in f.filename]
            places.append(" < ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in outside[:-5:-1]))

        warnings.showwarning = keep
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for i in range(first, first + steps):
                step(i)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return {"count": len(places), "steps": steps, "where": list(dict.fromkeys(places))[:3]}


def small_run(s: Setting, cfg: ModelConfig, host: Sequence[PackedBatch]) -> tuple[list[float], dict[str, Any] | None]:
    """Losses of 8 steps that take the batches in turns, from one initial model, and the waits of the last 4."""
    model = Decoder(cfg)
    init_weights(model, cfg, 0)
    model = model.to(s.device)
    if s.device != "cpu":
        model.compile_blocks()
    optimizer = build_optimizer(model, cfg, TrainConfig(lr=1e-3))
    batches = [batch.torch(s.device) for batch in host]
    results: list[StepResult] = []

    def step(i: int) -> None:
        balance = 0.01 if cfg.n_experts else 0.0
        batch = batches[i % len(batches)]
        with as_a_run(s):
            results.append(
                train_step(
                    model, optimizer, batch, precision=s.precision, clip=1.0, balance_weight=balance, device=s.device
                )
            )  # fmt: skip

    for i in range(8 if s.device == "cpu" else 4):
        step(i)
    waits = count_waits(s, step, 4, first=4)
    return [result.loss for result in results], waits


def check(s: Setting, kind: str) -> dict[str, Any]:
    """A small model's losses on this device beside the CPU's in fp32, and the waits inside its last steps.

    Two batches with different numbers of images, so that the compiled blocks meet shapes that change.
    """
    cfg = ModelConfig(
        width=128, depth=2, head_dim=32, ffn_multiple=32, vocab_size=512, patch_size=2, encoder_head_dim=32,
        **KINDS[kind],
    )  # fmt: skip
    small = replace(s, row_len=256, patches=16)
    host = [synthetic(small, cfg, 4, 0), synthetic(small, cfg, 4, 1, FEW_IMAGES)]
    cpu, _ = small_run(replace(small, device="cpu", precision="fp32"), cfg, host)
    here, waits = small_run(small, cfg, host)
    return {
        "losses": {"cpu fp32": cpu, f"{s.device} {s.precision}": here},
        "largest_difference": float(np.abs(np.subtract(cpu, here)).max()),  # nan where one is
        "images": [batch.patches.shape[0] // small.patches for batch in host],
        "waits": waits,
    }


# ---- memory ---------------------------------------------------------------------------------------------------------


def release() -> None:
    """Give back what nothing refers to. Not inside an `except`: the exception's frames still hold the model."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        with contextlib.suppress(RuntimeError):  # after an error that leaves the device unusable
            torch.cuda.empty_cache()


def usable(s: Setting) -> bool:
    """False after an error of a kernel: then the device answers nothing more to this process."""
    try:
        wait(s)
    except RuntimeError:
        return False
    return True


def free_bytes(s: Setting) -> float:
    """What a model may use: nine tenths of what is free or kept by torch's allocator for nothing."""
    if s.device == "cpu":
        return 1e12
    kept = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return 0.9 * (torch.cuda.mem_get_info()[0] + kept)


def predicted_bytes(
    s: Setting, cfg: ModelConfig, rows: int, shape: BatchShape | None = None, accumulates: bool = False
) -> float:
    """Peak of a step of `rows` rows; with `accumulates` of one of several micro-batches, beside all gradients."""
    parts = memory_bytes(cfg, rows * s.row_len, s.precision, shape, s.device)
    return parts["total"] + (4.0 * count_parameters(cfg).n_total - parts["gradients"] if accumulates else 0.0)


def rows_that_fit(s: Setting, cfg: ModelConfig, most: int | None = None) -> list[int]:
    """Numbers of rows, at most `most`, that are predicted to fit as one micro-batch; the smallest where none is."""
    allowed = [rows for rows in s.rows if most is None or rows <= most] or [s.rows[-1]]
    budget = free_bytes(s)
    return [rows for rows in allowed if predicted_bytes(s, cfg, rows) <= budget] or allowed[-1:]


def micro_rows_that_fit(s: Setting, cfg: ModelConfig, rows: int, most: int) -> list[int]:
    """The same for micro-batches of a step of `rows` rows: divisors of it."""
    allowed = [micro for micro in s.rows if micro <= most and micro < rows and rows % micro == 0] or [1]
    budget = free_bytes(s)
    return [m for m in allowed if predicted_bytes(s, cfg, m, accumulates=True) <= budget] or allowed[-1:]


def first_that_runs(candidates: Sequence[int], work: Callable[[int], Row]) -> Row:
    """`work(rows)` of the first that memory suffices for; the row names those before it as `out_of_memory_at`."""
    failed: list[int] = []
    for rows in candidates:
        row = None
        with contextlib.suppress(torch.OutOfMemoryError):
            row = work(rows)
        if row is not None:
            return {**row, "out_of_memory_at": failed} if failed else row
        failed.append(rows)
        release()
    raise RuntimeError(f"out of memory at {', '.join(map(str, failed))} rows, and nothing smaller is tried")


# ---- one model ------------------------------------------------------------------------------------------------------


def measure(
    s: Setting,
    name: str,
    peak: Peak,
    rows: int,
    micro_rows: int | None = None,
    mixture: Mapping[str, int] = MIXTURE,
) -> Row:
    """Speed, MFU, memory and waits of one model's training step of `rows` rows, in micro-batches if `micro_rows`."""
    cfg, gpu = s.model(name), s.device != "cpu"
    before = torch.cuda.memory_allocated() if gpu else 0
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    trainer = Trainer(s, cfg, rows, micro_rows, mixture)
    timing = time_steps(s, trainer.step)
    measured = torch.cuda.max_memory_allocated() - before if gpu else None
    waits = count_waits(s, trainer.step, 1)
    loss = trainer.step(0).loss
    shapes = [batch_shape(batch) for batch in trainer.host]
    work = statistics.mean(flops(cfg, shape)["total"] for shape in shapes)
    tokens = statistics.mean(shape.text_tokens + shape.image_tokens for shape in shapes)
    part = batch_shape(trainer.host[0].split(micro_rows or rows)[0])
    predicted = predicted_bytes(s, cfg, micro_rows or rows, part, accumulates=micro_rows is not None)
    n = count_parameters(cfg)
    return {
        "name": name,
        "text": mixture is TEXT,
        "rows": rows,
        "micro_rows": micro_rows,
        "n_active": n.n_active,
        "n_total": n.n_total,
        **speed(timing, tokens, work, peak),
        "memory_measured": measured,
        "memory_predicted": predicted,
        "memory_ratio": predicted / measured if measured else None,
        "waits": waits,
        "loss": loss,
    }
