"""A stand-in for `train_run` that keeps its contract (folders, forks, DONE, stop, resume) and trains nothing.

Behaviour by environment: FAKE_DIE / FAKE_FAIL / FAKE_BAD / FAKE_TERM = name of the run to kill (once), fail, reject or
tell to stop;
FAKE_STEP = seconds per step; FAKE_ROT = name of the trunk whose forks never read back whole.
"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

from isofusion.errors import InputError, RunFailure


class LostFork(RunFailure):
    kind = "fork"


def loss_of(step: int) -> float:
    return 5.0 / (1 + step) ** 0.5


def train_run(config, folder: Path, runs_root: Path, *, threads: int, on_event=None, stop=None) -> str:
    print("a library that prints must not break the protocol")
    assert os.environ["OMP_NUM_THREADS"] == os.environ["RAYON_NUM_THREADS"] == str(threads)
    assert os.environ["MALLOC_MMAP_MAX_"] == "0"
    assert os.environ["MALLOC_TRIM_THRESHOLD_"] == "4000000000"
    assert "GLIBC_TUNABLES" in os.environ
    assert os.environ["MALLOC_TOP_PAD_"] == os.environ.get("FAKE_TOP_PAD", "268435456")
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    if os.environ.get("FAKE_BAD") == config.name:
        raise InputError("data/figures: 12 of 20 samples are bad")
    (folder / "run.json").write_text(json.dumps({"config": config.model_dump(mode="json"), "digest": config.digest()}))
    if config.kind == "branch":
        fork = runs_root / config.parent / "checkpoints" / f"step_{config.start_step}"
        assert fork.is_dir()
        if (fork / "damaged").exists() or os.environ.get("FAKE_ROT") == config.parent:
            raise LostFork(f"{fork} is damaged")
    saved = [int(path.name.removeprefix("step_")) for path in (folder / "checkpoints").glob("step_*")]
    first = max(saved, default=config.start_step)
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    path.write_text("".join(line + "\n" for line in lines if json.loads(line)["step"] <= first))
    with path.open("a") as file:
        for step in range(first + 1, config.end_step + 1):
            if stop is not None and stop():
                (folder / "checkpoints" / f"step_{step - 1}").mkdir(exist_ok=True)
                return "interrupted"
            time.sleep(float(os.environ.get("FAKE_STEP", "0")))
            file.write(json.dumps({"step": step, "loss": loss_of(step), "wall": 0.5, "pid": os.getpid()}) + "\n")
            file.flush()
            if on_event is not None:
                on_event({"event": "step", "step": step, "loss": loss_of(step)})
            if step in config.forks or step == config.end_step:
                (folder / "checkpoints" / f"step_{step}").mkdir(exist_ok=True)
            if step == first + 3:
                if os.environ.get("FAKE_FAIL") == config.name:
                    raise RunFailure("loss is not finite at step 3; lower train.lr")
                marker = runs_root.parent / "died"
                if os.environ.get("FAKE_DIE") == config.name and not marker.exists():
                    marker.touch()
                    os.kill(os.getpid(), signal.SIGKILL)
                if os.environ.get("FAKE_TERM") == config.name:
                    os.kill(os.getpid(), signal.SIGTERM)
    if config.kind == "branch":
        value = loss_of(config.end_step) + 1.0 / config.model.width
        measured = {"loss": value, "oracle": 0.1, "bound": 0.05, "blind": value + 1, "shuffled": value + 2}
        tokens = config.end_step * config.train.rows_per_step * config.data.row_len
        evaluation = {
            "step": config.end_step,
            "tokens": tokens,
            "text_tokens": tokens // 2,
            "image_tokens": tokens - tokens // 2,
            "flops": 6.0 * tokens,
            "flops_6nd": 6.0 * tokens,
            "domains": {"caption": measured, "text": {"loss": 2.0, "oracle": None}},
            "mean": value,
        }
        (folder / "eval.json").write_text(json.dumps(evaluation))
    (folder / "DONE").write_text("")
    if on_event is not None:
        on_event({"event": "done", "step": config.end_step})
    return "done"
