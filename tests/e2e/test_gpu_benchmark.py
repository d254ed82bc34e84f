"""benchmarks/gpu.py runs on any machine with tiny models, and says when it cannot measure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="training needs the [train] extra")

MAIN = ["early-932m", "late-1b", "moe-932m", "early-932m", "plain"]
ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_the_smoke_run_measures_the_main_models_and_leaves_out_what_time_does_not_allow(tmp_path: Path) -> None:
    done = run("--smoke", "--sections", "main", "--out", str(tmp_path / "gpu.json"))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert [row["model"].split(" ")[0] for row in found["rows"]] == MAIN
    assert all(0 < row["mfu"] < 1 and row["tokens_per_s"] > 0 for row in found["rows"])
    assert len(found["ratios"]) == 2
    assert not found["failed"]
    assert not found["left_out"]


@pytest.mark.slow
def test_the_smoke_run_fills_every_section(tmp_path: Path) -> None:
    done = run("--smoke", "--out", str(tmp_path / "gpu.json"))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert not found["failed"]
    assert not found["left_out"]
    assert len(found["rows"]) == 12 + 1 + 2  # two towers of six sizes, experts, text alone, the plain step
    assert all(0 < row["mfu"] < 1 and row["tokens_per_s"] > 0 for row in found["rows"])
    assert all(check["largest_difference"] == 0 for check in found["check"].values())  # the same device twice
    assert len(found["late_over_early"]) == 6
    assert [row["jobs"] for row in found["jobs"]] == [1, 2]
    left = run("--smoke", "--seconds", "0", "--sections", "main", "--out", str(tmp_path / "none.json"))
    assert left.returncode == 0, left.stderr
    assert "early-932m" in json.loads((tmp_path / "none.json").read_text())["left_out"]


def test_without_a_gpu_it_says_so() -> None:
    done = run("--sections", "main")
    assert done.returncode != 0
    assert "no GPU here; --smoke" in done.stderr
