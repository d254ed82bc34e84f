"""kill -9 at the worst moments, then `study run --resume`: the same bits at the end."""

from __future__ import annotations

import json
import os
import shutil
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
NEEDED = {"step", "loss", "grad_norm", "lr", "keys_digest", "tokens", "balance_loss"}
"""What a line of metrics.jsonl must hold; everything it holds is compared, but for the time."""
CLOCKS = {"wall_s": 0, "input_wait_s": 0}  # what no two runs share


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
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(line.keys() >= NEEDED for line in lines)
    return [{key: value for key, value in line.items() if key != "wall"} for line in lines]


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

    kept: list[tuple[Path, bytes]] = []  # lines that a resume may not train again: those up to the last checkpoint

    def kill_at(run: str, count: int) -> None:
        """Kill when `count` lines of a run are written, and remember what its last checkpoint covers."""
        kill_when(start(toml, cut, cache), lambda: lines(run) >= count)
        folder = cut / "runs" / run
        assert not (folder / "DONE").exists(), f"{run} was over before it was killed"
        written = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
        newest = max((int(p.name[5:]) for p in folder.glob("checkpoints/step_*") if p.name[5:].isdigit()), default=0)
        kept.append((folder / "metrics.jsonl", b"".join(x for x in written if json.loads(x)["step"] <= newest)))

    # 1. in the middle of the experts' trunk, which goes first
    kill_at("early-moe-s16-s0-trunk", 7)
    # 2. while a checkpoint is being written
    tmp_seen = lambda: bool(list((cut / "runs").glob("*/checkpoints/*.tmp")))  # noqa: E731
    for _ in range(5):
        kill_when(start(toml, cut, cache), tmp_seen)
        if tmp_seen():
            break
    assert tmp_seen(), "five tries and no checkpoint was caught half written"
    # 3. in the middle of the dense trunk, and of a branch after and one before its first own checkpoint
    kill_at("early-s16-s0-trunk", 7)
    kill_at("early-moe-s16-s0-d80", 6)
    kill_at("early-s16-s0-d80", 2)
    finish(toml, cut, cache)

    assert [covered.count(b"\n") >= 4 for _, covered in kept] == [True, True, True, False]
    for path, covered in kept:  # with the very times they took: they were not trained a second time
        assert path.read_bytes().startswith(covered), path

    assert sorted(path.name for path in (cut / "runs").iterdir()) == names
    for name in names:
        expected, got = metrics(whole / "runs" / name), metrics(cut / "runs" / name)
        assert got == expected, name
        steps = [line["step"] for line in got]
        assert steps == sorted(set(steps)), f"{name}: a step appears twice"
        a, b = weights(whole / "runs" / name), weights(cut / "runs" / name)
        assert a.keys() == b.keys()
        for key in a:
            assert torch.equal(a[key], b[key]), f"{name}: {key}"
    for name in branches:
        first, second = (json.loads((root / "runs" / name / "eval.json").read_text()) for root in (whole, cut))
        assert {**first, **CLOCKS} == {**second, **CLOCKS}


@pytest.mark.timeout(600)
def test_a_damaged_fork_of_a_finished_trunk_is_trained_again(tmp_path: Path) -> None:
    toml, cache = tmp_path / "tiny.toml", tmp_path / "cache"
    toml.write_text(STUDY.partition('[[arms]]\nname = "early-moe"')[0])
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    finish(toml, whole, cache)
    shutil.copytree(whole, cut)
    trunk, short, long = (f"early-s16-s0-{part}" for part in ("trunk", "d40", "d80"))
    shutil.rmtree(cut / "runs" / long)
    rotten = cut / "runs" / trunk / "checkpoints" / "step_64" / "model.safetensors"
    data = rotten.read_bytes()
    rotten.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    finish(toml, cut, cache)

    said = [x for x in (tmp_path / "cut.log").read_text().splitlines() if "training it again" in x]
    assert len(said) == 1
    assert said[0].startswith(f"{trunk}: its checkpoint step_64,")
    assert rotten.read_bytes() == data
    lines = [(root / "runs" / trunk / "metrics.jsonl").read_bytes().splitlines() for root in (whole, cut)]
    assert lines[0][:32] == lines[1][:32]  # with the very times they took: it went on from step_32
    assert lines[0][32:] != lines[1][32:]
    for name in (trunk, long):
        assert metrics(whole / "runs" / name) == metrics(cut / "runs" / name)
        a, b = weights(whole / "runs" / name), weights(cut / "runs" / name)
        assert all(torch.equal(a[key], b[key]) for key in a)
    first, second = (json.loads((root / "runs" / long / "eval.json").read_text()) for root in (whole, cut))
    assert {**first, **CLOCKS} == {**second, **CLOCKS}
    for path in (whole / "runs" / short).rglob("*"):  # a finished branch is left as it was
        if path.is_file():
            assert path.read_bytes() == (cut / path.relative_to(whole)).read_bytes(), path
