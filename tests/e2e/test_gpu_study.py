"""studies/world-gpu.toml in miniature on a CPU: every arm trains, is evaluated, fitted and reported."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="training needs the [train] extra")

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_gpu_study_runs_in_miniature(tmp_path: Path) -> None:
    text = (ROOT / "studies" / "world-gpu.toml").read_text()
    text = re.sub(r"^s(192|256|384) = .*\n", "", text, flags=re.M)
    for key, value in (
        ("budgets", "[8192, 16384]"), ("depth = 6", None), ("rows_per_step", "2"), ("warmup_steps", "1"),
        ("precision", '"fp32"'), ("val_rows", "4"),
    ):  # fmt: skip
        if value is None:
            text = text.replace(key, "depth = 2")
        else:
            text, found = re.subn(rf"^{key} = .*$", f"{key} = {value}", text, flags=re.M)
            assert found == 1, key
    (tmp_path / "small.toml").write_text(text)
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT / "src"), "ISOFUSION_CACHE": str(tmp_path / "cache"),
        "ISOFUSION_DEVICE": "cpu", "ISOFUSION_INPUT_WORKERS": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "isofusion", "study", "run", str(tmp_path / "small.toml")]
    command += ["--out", str(tmp_path / "out"), "--jobs", "2", "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert Path(done.stdout.splitlines()[-1]).name == "report.html"
    summaries = [json.loads(path.read_text()) for path in (tmp_path / "out" / "runs").glob("*/flops.json")]
    assert len(summaries) == 3 * 2 * 3
    for summary in summaries:
        assert 0 < summary["own_flops"] <= summary["flops"]["total"]
        assert summary["input_wait_s"] <= summary["wall_s"]
        assert summary["peak_flops_measured"] > 0
