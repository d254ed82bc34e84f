from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from isofusion.study import progress
from isofusion.study.progress import Progress, RichProgress, duration, make_progress, si
from isofusion.study.spec import StudySpec


def screen(terminal: bool) -> tuple[io.StringIO, Console]:
    buffer = io.StringIO()
    return buffer, Console(file=buffer, width=100, force_terminal=terminal)


def test_units() -> None:
    assert [duration(s) for s in (5, 75, 3723)] == ["5 s", "1 min 15 s", "1 h 02 min"]
    assert [si(v) for v in (12, 1500, 2.5e6, 6e11, 3e21)] == ["12", "1.5K", "2.5M", "600B", "3.00e+21"]


def test_plain_lines_without_a_terminal(toml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    configs = {run.name: run for run in StudySpec.from_toml(toml).runs()}
    buffer, console = screen(False)
    shown = make_progress(configs, set(), console)
    assert type(shown) is Progress
    shown.open()
    shown.started("early-s16-s0-trunk")
    clock[0] = 5.0
    shown.event({"run": "early-s16-s0-trunk", "step": 1, "loss": 6.0})
    shown.event({"run": "early-s16-s0-trunk", "step": 8, "loss": 3.25})
    shown.tick()
    assert buffer.getvalue() == ""  # nothing for 15 seconds
    clock[0] = 16.0
    shown.tick()
    shown.finished("early-s16-s0-trunk", "done")
    lines = buffer.getvalue().splitlines()
    assert len(lines) == 2
    assert "early-s16-s0-trunk 50% loss 3.250" in lines[0]
    assert "0/9 runs" in lines[0]
    assert "left" in lines[0]
    assert "tokens/s" in lines[0]
    assert lines[1] == "[1/9] early-s16-s0-trunk done, training loss 3.2500"
    assert "\x1b" not in buffer.getvalue()


def test_time_left_counts_work_not_runs(toml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(progress, "cost_hint", lambda run: float(run.end_step - run.start_step))
    configs = {run.name: run for run in StudySpec.from_toml(toml).runs()[:3]}  # 16 + 2 + 4 steps
    shown = make_progress(configs, set(), screen(False)[1])
    assert shown.seconds_left() is None
    shown.started("early-s16-s0-trunk")
    clock[0] = 32.0
    shown.finished("early-s16-s0-trunk", "done")
    assert shown.seconds_left() == pytest.approx(6 * 2.0)


def test_a_terminal_gets_a_live_table(toml: Path) -> None:
    configs = {run.name: run for run in StudySpec.from_toml(toml).runs()}
    buffer, console = screen(True)
    shown = make_progress(configs, {"early-s16-s0-trunk"}, console)
    assert isinstance(shown, RichProgress)
    shown.open()
    shown.started("late-s16-s0-trunk")
    shown.event({"run": "late-s16-s0-trunk", "step": 4, "loss": 2.5})
    shown.last_draw = -1e9
    shown.tick()
    shown.close()
    text = buffer.getvalue()
    assert "late-s16-s0-trunk" in text
    assert "4/16" in text
    assert "2.5000" in text
    assert "1/9 runs" in text


def test_the_time_left_has_a_line_of_its_own(toml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind the bar it was cut off at 80 columns."""
    configs = {run.name: run for run in StudySpec.from_toml(toml).runs()}
    buffer = io.StringIO()
    console = Console(file=buffer, width=80)
    shown = make_progress(configs, set(), Console(width=80, force_terminal=True))
    shown.started("early-s16-s0-trunk")
    shown.event({"event": "progress", "run": "early-s16-s0-trunk", "step": 10})
    monkeypatch.setattr(shown, "summary", lambda: "12/90 runs, 1 failed, 31.4K tokens/s, about 2 h 05 min left")
    console.print(shown.render())
    assert "12/90 runs, 1 failed, 31.4K tokens/s, about 2 h 05 min left" in buffer.getvalue().splitlines()
