"""Jobs and threads by a probe, put through the pool's schedule."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from isofusion.errors import InputError
from isofusion.study import split as module
from isofusion.study.lock import read_lock, write_lock
from isofusion.study.spec import StudySpec


@pytest.fixture
def spec(toml: Path, monkeypatch: pytest.MonkeyPatch) -> StudySpec:
    monkeypatch.setattr(module, "cores", lambda: 4)
    monkeypatch.setattr(module, "thread_budget", lambda jobs, threads: (jobs or 4, threads or 1))
    monkeypatch.setattr(module, "NARROW_STEP", 0.0)
    return StudySpec.from_toml(toml)


def probes(
    monkeypatch: pytest.MonkeyPatch, seconds: dict[tuple[int, int], float], full: set[int] = frozenset()
) -> list[Any]:
    asked: list[Any] = []

    def estimate(spec: StudySpec, *, jobs: int, threads: int, **_: Any) -> Any:
        asked.append((jobs, threads))
        problems = ["memory: too little"] if jobs in full else []
        return SimpleNamespace(totals={"seconds": seconds[jobs, threads]}, problems=problems)

    monkeypatch.setattr(module, "estimate", estimate)
    return asked


def test_the_split_with_the_least_time_is_taken_and_told(
    spec: StudySpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = probes(monkeypatch, {(4, 1): 300.0, (2, 2): 200.0, (1, 4): 260.0})
    split = module.choose_split(spec, tmp_path)
    assert asked == [(4, 1), (2, 2), (1, 4)]
    assert (split.jobs, split.threads) == (2, 2)
    assert "4 x 1: 5 min" in split.notes[0]
    assert split.notes[0].endswith(": 2 x 2")
    probes(monkeypatch, {(4, 1): 300.0, (2, 2): 280.0, (1, 4): 260.0})
    alone = module.choose_split(spec, tmp_path)
    assert (alone.jobs, alone.threads) == (1, 4)
    lock = write_lock(tmp_path, spec, toml=None, jobs=split.jobs, threads=split.threads)
    assert read_lock(tmp_path)["threads"] == lock["threads"] == 2


def test_a_split_that_does_not_fit_is_left_out(
    spec: StudySpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = {(4, 1): 1.0, (2, 2): 2.0, (1, 4): 3.0}
    probes(monkeypatch, times, full={4})
    assert module.choose_split(spec, tmp_path).jobs == 2
    probes(monkeypatch, times, full={4, 2, 1})
    with pytest.raises(InputError, match="does not fit this machine: memory: too little"):
        module.choose_split(spec, tmp_path)


def test_nothing_is_probed_where_there_is_no_choice(
    spec: StudySpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = probes(monkeypatch, {})
    assert module.choose_split(spec, tmp_path, threads=2).threads == 2
    assert module.choose_split(spec, tmp_path, jobs=3).jobs == 3
    assert module.choose_split(spec, tmp_path, probe=False).threads == 1
    monkeypatch.setattr(module, "NARROW_STEP", 1e10)  # the models of this study are narrow
    split = module.choose_split(spec, tmp_path)
    assert (split.jobs, split.threads, split.notes) == (4, 1, [])
    assert asked == []


def test_candidates_use_every_power_of_two() -> None:
    assert module.candidates(6) == [(6, 1), (3, 2), (1, 4)]
    assert module.candidates(1) == [(1, 1)]
