"""benchmarks/gpu_offline.py: a word where torch is not built for CUDA; elsewhere the smallest model, compiled whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_offline.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ}, check=False)


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is built for CUDA")
def test_a_torch_for_the_cpu_is_told_what_is_missing(tmp_path: Path) -> None:
    done = run("--out", str(tmp_path / "out.json"))
    assert done.returncode == 1
    assert "is not built for CUDA" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out.json").exists()


@pytest.mark.slow
@pytest.mark.skipif(torch.version.cuda is None, reason="torch is not built for CUDA: it has no kernels to compile")
def test_the_smallest_model_compiles_and_holds_what_was_predicted(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    done = run("--models", "early-275m", "--rows", "2", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = json.loads(out.read_text())["rows"]
    assert row["compiled_for_other_batches"] == 0
    assert row["shared_memory"] <= row["shared_memory_limit"]
    assert row["memory_ratio"] == pytest.approx(1, abs=0.1)
