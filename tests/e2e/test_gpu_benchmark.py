"""benchmarks/gpu.py from end to end: tiny models, every section in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="training needs the [train] extra")

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_smoke_run_fills_every_section(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--smoke", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert not found["failed"]
    assert not found["left_out"]
    assert len(found["rows"]) == 12 + 1 + 2  # two towers of six sizes, experts, text alone, the plain step
    assert all(0 < row["mfu"] < 1 and row["tokens_per_s"] > 0 for row in found["rows"])
    assert all(check["largest_difference"] == 0 for check in found["check"].values())  # the same device twice
    assert len(found["late_over_early"]) == 6
    assert [row["jobs"] for row in found["jobs"]] == [1, 2]
    (step,) = found["graphs"]
    assert "CUDA" in step["reason"]  # there is none here
    assert step["stacked_at_most"] > 0
