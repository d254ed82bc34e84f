"""What CUDA graphs and stacked seeds could give the small steps of studies/world-gpu.toml at most.

A small step is some hundred launches, which may take the host longer than the device. One captured step, replayed, is
the same kernels without them. A step of STACKED times the rows bounds what STACKED seeds in one model could give: as
few launches, but each seed would have weights and moments of its own, and smaller products.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from gpu_models import Setting, Trainer, time_steps

from isofusion.study.spec import StudySpec
from isofusion.train.step import StepResult

STUDY = Path(__file__).parents[1] / "studies" / "world-gpu.toml"
SMALL = (("early", "s192"), ("early", "s96"), ("early", "s384"), ("early-moe", "s192"), ("late", "s192"))
STACKED = 8
STEPS = 100  # of one stretch, at most
WARMUP = 3  # steps on the stream of the capture


class OnDevice(StepResult):
    """Numbers that stay where they are until they are read: a graph cannot hold a copy that somebody waits for."""

    def __init__(self, numbers: Tensor) -> None:
        self._numbers, self._event, self._read = numbers, None, None


def graphs(s: Setting, arm: str, size: str) -> dict[str, Any]:
    """Seconds of one training step on one batch: launched, with STACKED times the rows, and replayed as a graph.

    `graph_at_most`, `stacked_at_most`: how many times the tokens/s of the launched step. Where the step cannot be
    captured `replayed` and `graph_at_most` are null and `reason` says why.
    """
    spec = StudySpec.from_toml(STUDY)
    model = spec.arm(arm).size(size)
    cfg, rows = model.model, model.train.rows_per_step
    small = replace(s, row_len=spec.data.row_len, patches=spec.data.patches_per_image, steps=STEPS)
    if s.smoke:
        cfg, rows, small = cfg.model_copy(update={"width": 32, "depth": 1}), 2, replace(small, steps=s.steps)

    def seconds(trainer: Trainer) -> float:
        return time_steps(small, lambda _: trainer.step(0)).seconds

    found: dict[str, Any] = {"arm": arm, "size": size, "rows": rows, "replayed": None, "graph_at_most": None}
    with mock.patch("isofusion.train.step.StepResult", OnDevice):
        trainer = Trainer(small, cfg, rows)
        found["launched"] = seconds(trainer)
        found |= {"stacked": STACKED, "stacked_seconds": seconds(Trainer(small, cfg, STACKED * rows))}
        found["stacked_at_most"] = STACKED * found["launched"] / found["stacked_seconds"]
        try:
            graph, result = captured(trainer)
            found["replayed"] = time_steps(small, lambda _: graph.replay()).seconds
            found |= {"graph_at_most": found["launched"] / found["replayed"], "loss": result.loss}
        except Exception as error:  # that it cannot be captured is a result
            found["reason"] = "; then ".join(reversed([*chain(error)]))[:2000]
    return found


def chain(error: BaseException | None) -> Iterator[str]:
    """An error in words and what it came after: where a capture fails, its end fails too, and says less."""
    while error is not None:
        yield f"{type(error).__name__}: {error}"
        error = error.__cause__ or error.__context__


def captured(trainer: Trainer) -> tuple[Any, StepResult]:
    """One step as a CUDA graph, and its result, whose numbers every replay writes anew."""
    for group in trainer.optimizer.param_groups:
        group["capturable"] = True  # so is the fused update; the learning rate is that of the capture
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # a capture that fails does not come back from it
        for _ in range(WARMUP):
            trainer.step(0)
        trainer.optimizer.found_inf = None  # of the step before, which will not be there
        gc.collect()
        with torch.cuda.graph(graph, stream=stream):
            result = trainer.step(0)
    torch.cuda.current_stream().wait_stream(stream)
    return graph, result
