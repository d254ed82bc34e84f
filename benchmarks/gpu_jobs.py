"""Several small training runs on one device at once, each in a process of its own."""

from __future__ import annotations

import functools
import multiprocessing
import queue
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from gpu_models import Setting, Trainer, wait

from isofusion.config import ModelConfig
from isofusion.processors import end_with_parent

Run = Callable[[Callable[[], object]], float]
"""A run in a process: it calls its argument when it is ready to begin, which returns when all are, and measures."""
BEGIN_WITHIN = 120.0  # seconds that a run waits for the others
END_WITHIN = 240.0  # seconds for all of them, start and compilation included


def together(run: Run, count: int, limit: float = END_WITHIN) -> list[float]:
    """What `run` returns in each of `count` processes that begin together.

    Raises RuntimeError with the words of the first that fails or dies; the others are ended, whatever they wait for.
    """
    context = multiprocessing.get_context("spawn")
    barrier, answers = context.Barrier(count), context.Queue()
    processes = [context.Process(target=_child, args=(run, i, barrier, answers), daemon=True) for i in range(count)]
    for process in processes:
        process.start()
    rates: dict[int, float] = {}
    began, waited = time.monotonic(), 0
    try:
        while len(rates) + waited < count:
            if time.monotonic() - began > limit:
                raise RuntimeError(f"{count - len(rates)} of {count} runs did not end within {limit:.0f} seconds")
            try:
                number, rate, error = answers.get(timeout=0.2)
            except queue.Empty:
                for i, process in enumerate(processes):
                    if process.exitcode and i not in rates:  # one that could not even say why
                        raise RuntimeError(f"run {i + 1} of {count} ended with status {process.exitcode}") from None
                continue
            if rate is not None:
                rates[number] = rate
            elif error is None:  # only waited for the others: theirs is the error
                waited += 1
            else:
                raise RuntimeError(f"run {number + 1} of {count}: {error}")
    finally:
        for process in processes:
            if len(rates) < count:
                process.terminate()
            process.join(5)
            process.kill()
    if waited:
        raise RuntimeError(f"not all of {count} runs were ready {BEGIN_WITHIN:.0f} seconds after the first")
    return list(rates.values())


def _child(run: Run, number: int, barrier: Any, answers: Any) -> None:
    """Puts (number, rate, None), or (number, None, error); without an error where it was let down by the others."""
    end_with_parent()  # a killed one must not leave runs on the card
    try:
        answers.put((number, run(functools.partial(barrier.wait, timeout=BEGIN_WITHIN)), None))
    except threading.BrokenBarrierError:
        answers.put((number, None, None))
    except Exception:
        answers.put((number, None, traceback.format_exc()[-1500:]))
        barrier.abort()


def small_training(s: Setting, ready: Callable[[], object]) -> float:
    """Tokens/s of a model of 6 blocks of width 192 over 10 seconds, read one step late as the training loop does."""
    torch.set_num_threads(1)
    small = replace(s, row_len=256, patches=16 if s.smoke else 36)
    cfg = ModelConfig(
        width=32 if s.smoke else 192, depth=2 if s.smoke else 6, head_dim=32, ffn_multiple=32, vocab_size=512,
        patch_size=2 if s.smoke else 8,
    )  # fmt: skip
    trainer = Trainer(small, cfg, 4 if s.smoke else 32)
    for i in range(s.warmup):
        trainer.step(i)
    wait(s)
    ready()
    began, steps = time.perf_counter(), 0
    previous: Any = None
    while time.perf_counter() - began < (0.3 if s.smoke else 10.0):
        result = trainer.step(steps)
        if previous is not None:
            _ = previous.loss
        previous, steps = result, steps + 1
    wait(s)
    tokens = statistics.mean(float((batch.doc_id >= 0).sum()) for batch in trainer.host)
    return tokens * steps / (time.perf_counter() - began)


def jobs(s: Setting, count: int) -> dict[str, Any]:
    """Tokens/s of `count` equal small runs at once."""
    rates = together(functools.partial(small_training, s), count)
    return {"jobs": count, "tokens_per_s": sum(rates), "of_each": rates}
