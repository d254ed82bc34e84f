from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from isofusion.study import ledger
from isofusion.study.spec import StudySpec

TINY = """
[study]
name = "tiny"
title = "a tiny study"
seeds = [0]
budgets = [2560, 5120]
holdout = "none"

[data]
row_len = 128
image_size = 48
patch_size = 8
val_rows = 2
sources = [{ name = "captions", domain = "caption", format = "world", weight = 1 }]

[model]
depth = 2
head_dim = 8
ffn_multiple = 16

[train]
lr = 5e-3
warmup_steps = 1
rows_per_step = 2

[[arms]]
name = "early"
[arms.sizes]
s16 = { width = 16 }
s32 = { width = 32 }

[[arms]]
name = "late"
fusion = "late"
encoder_width = 16
[arms.train]
encoder_lr_scale = 0.5
[arms.sizes]
s16 = { width = 16, lr = 1e-3 }
"""


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return path


@pytest.fixture
def read(tmp_path: Path) -> Callable[[str], StudySpec]:
    """Read the tiny study with (old, new) text replacements applied."""

    def reader(*changes: tuple[str, str]) -> StudySpec:
        text = TINY
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        path = tmp_path / "changed.toml"
        path.write_text(text)
        return StudySpec.from_toml(path)

    return reader


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of the fake training function, importable by the workers."""
    here = Path(__file__).parent
    paths = [str(here.parents[1] / "src"), str(here), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    return "fake_train:train_run"


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake: str) -> Iterator[Any]:
    """A SLURM on the PATH whose jobs can import the tests' fake training."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    from fake_slurm import Cluster

    folder = tmp_path / "slurm"
    made = Cluster(folder)
    monkeypatch.setenv("PATH", f"{made.bin}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SLURM", str(folder))
    monkeypatch.setattr(ledger, "_parameters", lambda model: dict.fromkeys(ledger.COUNTS, 1000))
    yield made
    made.close()
