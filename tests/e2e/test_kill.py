"""kill -9 at the worst moments, then `study run --resume`: the study ends with the same bits (DESIGN.md sections 6-7)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="training needs the [train] extra")

STUDY = """
[study]
name = "tiny"
title = "a tiny study"
seeds = [0]
budgets = [20480, 40960]
holdout = "none"

[data]
row_len = 256
image_size = 48
patch_size = 8
tokenizer = "world"
val_rows = 2
sources = [
  { name = "captions", domain = "caption", format = "world", weight = 45 },
  { name = "interleaved", domain = "interleaved", format = "world", weight = 45 },
  { name = "text", domain = "text", format = "world", weight = 10 },
]

[model]
depth = 2
head_dim = 8
ffn_multiple = 16
patch_size = 8
base_width = 16

[train]
lr = 5e-3
warmup_steps = 4
rows_per_step = 2
checkpoint_every = 4

[[arms]]
name = "early"
[arms.sizes]
s16 = { width = 16 }

[[arms]]
name = "early-moe"
n_experts = 4
[arms.sizes]
s16 = { width = 16 }
"""
COMPARED = ("step", "loss", "grad_norm", "lr", "keys_digest", "tokens")


def start(toml: Path, out: Path, cache: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "isofusion.cli.main", "study", "run", str(toml), "--out", str(out), "--resume"]
    command += ["--jobs", "1", "--threads", "1"]
    with (out.parent / f"{out.name}.log").open("ab") as log:
        return subprocess.Popen(
            command, env={**os.environ, "ISOFUSION_CACHE": str(cache)}, stdout=log, stderr=log, start_new_session=True
        )


def finish(toml: Path, out: Path, cache: Path) -> None:
    code = start(toml, out, cache).wait(timeout=300)
    assert code == 0, (out.parent / f"{out.name}.log").read_text()[-3000:]


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(run: Path) -> dict:
    from isofusion.train.checkpoint import load_tensors, newest_checkpoint

    found = newest_checkpoint(run)
    assert found is not None
    return load_tensors(found)


def kill_when(process: subprocess.Popen[bytes], moment: Callable[[], bool], timeout: float = 240) -> None:
    """SIGKILL to the whole process group (pool and workers) the moment `moment()` holds."""
    end = time.monotonic() + timeout
    while not moment():
        assert process.poll() is None, "the study ended before the moment to kill it came"
        assert time.monotonic() < end, "the moment to kill it never came"
        time.sleep(0.0005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.timeout(600)
def test_kill_9_and_resume_is_bit_equal(tmp_path: Path) -> None:
    toml, cache = tmp_path / "tiny.toml", tmp_path / "cache"
    toml.write_text(STUDY)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    finish(toml, whole, cache)

    def lines(run: str) -> int:
        path = cut / "runs" / run / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    names = sorted(path.name for path in (whole / "runs").iterdir())
    trunks = [name for name in names if name.endswith("trunk")]
    branches = [name for name in names if not name.endswith("trunk")]
    assert len(trunks) == 2
    assert len(branches) == 4

    # 1. in the middle of a trunk
    kill_when(start(toml, cut, cache), lambda: any(lines(name) >= 7 for name in trunks))
    # 2. while a checkpoint is being written
    tmp_seen = lambda: bool(list((cut / "runs").glob("*/checkpoints/*.tmp")))  # noqa: E731
    for _ in range(5):
        kill_when(start(toml, cut, cache), tmp_seen)
        if tmp_seen():
            break
    assert tmp_seen(), "five tries and no checkpoint was caught half written"
    # 3. in the middle of a branch
    kill_when(
        start(toml, cut, cache),
        lambda: any(lines(name) >= 2 and not (cut / "runs" / name / "DONE").exists() for name in branches),
    )
    finish(toml, cut, cache)

    assert sorted(path.name for path in (cut / "runs").iterdir()) == names
    for name in names:
        expected, got = metrics(whole / "runs" / name), metrics(cut / "runs" / name)
        assert [{key: line[key] for key in COMPARED} for line in got] == [
            {key: line[key] for key in COMPARED} for line in expected
        ], name
        steps = [line["step"] for line in got]
        assert steps == sorted(set(steps)), f"{name}: a step appears twice"
        a, b = weights(whole / "runs" / name), weights(cut / "runs" / name)
        assert a.keys() == b.keys()
        for key in a:
            assert torch.equal(a[key], b[key]), f"{name}: {key}"
    for name in branches:
        first, second = (json.loads((root / "runs" / name / "eval.json").read_text()) for root in (whole, cut))
        assert first["domains"] == second["domains"]
