"""Compiled blocks under FSDP2, as on GPUs: whole blocks, gathers around them, and the losses of one process."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="training needs the [train] extra")

from isofusion.model import native  # noqa: E402
from isofusion.train.loop import train_run  # noqa: E402
from isofusion.train.metrics import read_metrics  # noqa: E402

_spec = importlib.util.spec_from_file_location("dist_conftest", Path(__file__).with_name("conftest.py"))
assert _spec is not None
assert _spec.loader is not None
_shared = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_shared)


@pytest.mark.slow
@pytest.mark.skipif(not native.available(), reason=f"no C++ compiler for torch.compile: {native.describe()}")
def test_two_ranks_with_compiled_blocks_are_one_process_without(
    tmp_path: Path, cache: Path, on_ranks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ISOFUSION_CACHE", str(cache))
    runs = [_shared.run_config(arm, 3) for arm in ("early", "late")]
    compiled = {"ISOFUSION_COMPILE": "1"}
    jobs = [_shared.job(run, tmp_path / "two", env=compiled) for run in runs]
    said = on_ranks(2, jobs, warnings="ignore")  # torch's compiler asks FSDP's parameters for their gradient, and warns
    assert said == [["done", "done"]] * len(runs)
    for run in runs:
        train_run(run, tmp_path / "one" / run.name, tmp_path / "one", threads=1)
        one, two = (read_metrics(tmp_path / name / run.name / "metrics.jsonl") for name in ("one", "two"))
        for a, b in zip(one, two, strict=True):
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
            assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-5)
