"""The training loop on a GPU that is none: every way that only a GPU takes, on tensors that stay in the host's memory.

Input worker and pinning thread, numbers that are read a step late, refusal inside the fused optimizer, checkpoints,
evaluation, speed. Not in it: compiled blocks, streams, bf16.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="training needs the [train] extra")

from isofusion.config import RunConfig  # noqa: E402
from isofusion.errors import RunFailure  # noqa: E402
from isofusion.model import native  # noqa: E402
from isofusion.train import checkpoint, speed, step  # noqa: E402
from isofusion.train.loop import build_decoder, train_run  # noqa: E402
from isofusion.train.machine import Machine  # noqa: E402
from isofusion.train.metrics import read_metrics  # noqa: E402

SOURCES = [{"name": d, "domain": d, "format": "world", "weight": w} for d, w in (("caption", 2), ("text", 1))]


def config(**changes: Any) -> RunConfig:
    model = {"width": 16, "depth": 2, "head_dim": 8, "ffn_multiple": 16, "vocab_size": 512, "patch_size": 8}
    return RunConfig.model_validate(
        {
            "study": "t", "arm": "moe", "size": "s", "seed": 0, "kind": "trunk", "end_step": 6, "forks": [4],
            "model": model | {"n_experts": 4},
            "data": {"sources": SOURCES, "row_len": 256, "image_size": 48, "patch_size": 8, "val_rows": 6},
            "train": {"lr": 0.01, "warmup_steps": 2, "rows_per_step": 3, "precision": "fp32"},
            **changes,
        }
    )  # fmt: skip


def branch_of(trunk: RunConfig) -> RunConfig:
    return config(kind="branch", parent=trunk.name, start_step=4, end_step=7, forks=[])


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    native.available()  # kernels from the usual one
    monkeypatch.setenv("ISOFUSION_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is sent to "cuda" stays; what is asked of it has an answer."""
    real = torch.Tensor.to

    def to(self: Any, *args: Any, **named: Any) -> Any:
        where = [torch.device("cpu") if isinstance(a, (str, torch.device)) else a for a in args]
        return real(self, *where, **{key: value for key, value in named.items() if key != "non_blocking"})

    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self.clone())
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 123)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(speed, "measured_peak", lambda *_: 1e12)
    monkeypatch.setattr(Machine, "resolve", lambda self: "cuda")
    monkeypatch.setenv("ISOFUSION_MEMORY_GB", "50")
    monkeypatch.setenv("ISOFUSION_COMPILE", "0")


def both_runs(root: Path, threads: int) -> list[dict[str, Any]]:
    """A trunk and its branch; the metrics of both."""
    trunk = config()
    for run in (trunk, branch_of(trunk)):
        assert train_run(run, root / run.name, root, threads=threads) == "done"
    return [r for run in (trunk, branch_of(trunk)) for r in read_metrics(root / run.name / "metrics.jsonl")]


def test_a_run_is_that_of_the_cpu_within_rounding(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    cpu = both_runs(tmp_path / "cpu", 1)
    request.getfixturevalue("gpu")
    pretended = both_runs(tmp_path / "gpu", 2)  # the second thread is the input worker's
    assert [r["step"] for r in pretended] == [1, 2, 3, 4, 5, 6, 5, 6, 7]
    for one, other in zip(cpu, pretended, strict=True):
        assert one["keys_digest"] == other["keys_digest"]
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
        assert other["balance_loss"] == pytest.approx(one["balance_loss"], rel=1e-3)
    branch = branch_of(config()).name
    here, there = (json.loads((tmp_path / d / branch / "eval.json").read_text()) for d in ("gpu", "cpu"))
    assert here["mean"] == pytest.approx(there["mean"], rel=1e-4)
    assert (here["device"], here["peak_memory"], here["peak_flops_measured"]) == ("NVIDIA H200", 123, 1e12)
    assert here["peak_flops_datasheet"] > 1e14
    assert json.loads((tmp_path / "gpu" / branch / "env.json").read_text())["device"] == "NVIDIA H200"
    assert here["own_tokens"] == there["own_tokens"]


def test_numbers_are_read_one_step_late_but_for_checkpoints(
    gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, int]] = []

    class Watched(step.StepResult):
        def __init__(self, numbers: Any) -> None:
            super().__init__(numbers)
            self.number = 1 + sum(what == "launched" for what, _ in told)
            told.append(("launched", self.number))

        @property
        def values(self) -> list[float]:
            if ("read", self.number) not in told:
                told.append(("read", self.number))
            return super().values

    monkeypatch.setattr(step, "StepResult", Watched)
    trunk = config()
    assert train_run(trunk, tmp_path / trunk.name, tmp_path, threads=2) == "done"
    order = [f"{what[0]}{number}" for what, number in told]
    # step 4 is a fork and 6 the last: both are checkpoints
    assert order == ["l1", "l2", "r1", "l3", "r2", "l4", "r3", "r4", "l5", "l6", "r5", "r6"]


def test_a_step_that_is_not_finite_moves_no_weight_and_is_named(gpu: None, tmp_path: Path) -> None:
    """Step 3 is read when step 4 was launched: neither may move a weight."""
    kept: dict[str, Any] = {}

    def factory(run: RunConfig) -> Any:
        model = build_decoder(run)
        losses, calls = model.token_losses, iter(range(1, 100))

        def token_losses(batch: Any) -> Any:
            nll_T, output = losses(batch)
            if (call := next(calls)) == 3:
                kept.update({name: p.detach().clone() for name, p in model.named_parameters()})
            return (nll_T * math.nan if call == 3 else nll_T), output

        model.token_losses = token_losses
        kept["model"] = model
        return model

    trunk = config(train={"lr": 0.01, "rows_per_step": 3, "precision": "fp32", "checkpoint_every": 2})
    with pytest.raises(RunFailure, match="update 3 of 6: the loss is not finite"):
        train_run(trunk, tmp_path / trunk.name, tmp_path, threads=2, model_factory=factory)
    assert [r["step"] for r in read_metrics(tmp_path / trunk.name / "metrics.jsonl")] == [1, 2]
    assert checkpoint.steps(tmp_path / trunk.name / "checkpoints") == [2]
    model = kept.pop("model")
    assert all(torch.equal(p, kept[name]) for name, p in model.named_parameters())


def test_a_stop_keeps_every_step_that_was_launched(gpu: None, tmp_path: Path) -> None:
    trunk, calls = config(), iter(range(1, 100))
    stop = lambda: next(calls) >= 3  # noqa: E731
    assert train_run(trunk, tmp_path / trunk.name, tmp_path, threads=2, stop=stop) == "interrupted"
    assert [r["step"] for r in read_metrics(tmp_path / trunk.name / "metrics.jsonl")] == [1, 2, 3]
    assert train_run(trunk, tmp_path / trunk.name, tmp_path, threads=2) == "done"
    assert [r["step"] for r in read_metrics(tmp_path / trunk.name / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
