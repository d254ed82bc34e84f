"""Tiny runs on the built-in world, and a way to run them on several gloo ranks of this machine."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from isofusion.config import RunConfig

SOURCES = [{"name": d, "domain": d, "format": "world", "weight": 1} for d in ("caption", "text")]
MODELS = {
    "early": {},
    "late": {"fusion": "late", "encoder_width": 8},
    "moe": {"n_experts": 4},
}
Ranks = Callable[..., list[list[str]]]


def run_config(arm: str, steps: int, **changes: Any) -> RunConfig:
    """A trunk of `steps` updates; two rows a step, one of captions and one of text."""
    model = {"width": 16, "depth": 2, "head_dim": 8, "ffn_multiple": 16, "vocab_size": 512, "patch_size": 8}
    train = {"lr": 0.01, "warmup_steps": 2, "rows_per_step": 2, "precision": "fp32", **changes.pop("train", {})}
    return RunConfig.model_validate(
        {
            "study": "t", "arm": arm, "size": "s", "seed": 0, "kind": "trunk", "end_step": steps, "forks": [steps],
            "model": model | MODELS[arm],
            "data": {"sources": SOURCES, "row_len": 128, "image_size": 48, "patch_size": 8, "val_rows": 2},
            "train": train,
            **changes,
        }
    )  # fmt: skip


def job(run: RunConfig, root: Path, **changes: Any) -> dict[str, Any]:
    """One entry of ranks.py's list."""
    plain = {"stop": None, "asynchronous": False, "replicas": 1, "env": {}}
    return {"run": run.model_dump(mode="json"), "root": str(root), **plain, **changes}


@contextmanager
def started(command: list[str], env: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """A process in a group of its own, all of which is gone afterwards, whatever happens."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, start_new_session=True
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def torchrun(ranks: int, *arguments: str) -> AbstractContextManager[subprocess.Popen[str]]:
    """torchrun on this machine, on a port that is free."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", *arguments]
    return started(command, {**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def on_ranks(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """on_ranks(n, jobs) -> for each job what each rank said: "done", "interrupted" or an error."""

    def go(ranks: int, jobs: list[dict[str, Any]], warnings: str = "error") -> list[list[str]]:
        from torch.distributed import TCPStore

        path = tmp_path_factory.mktemp("jobs") / "jobs.json"
        path.write_text(json.dumps(jobs))
        store = TCPStore(
            "localhost", 0, is_master=True, wait_for_workers=False
        )  # a port that is free, as torchrun does
        meet = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        env = {**os.environ, "OMP_NUM_THREADS": "1", "ISOFUSION_CACHE": str(cache), **meet}
        program = str(Path(__file__).with_name("ranks.py"))
        command = [sys.executable, "-W", warnings, program, str(path), str(ranks)]
        with started(command, env) as process:
            output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output[-5000:]
        said: list[list[str]] = json.loads(path.with_suffix(".done").read_text())
        return said

    return go
