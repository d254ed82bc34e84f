"""A ready study changes only when someone means it to: its resolved runs are kept as text beside this test."""

from __future__ import annotations

import difflib
import importlib.util
from pathlib import Path

import pytest

HERE = Path(__file__).parent
COMMAND = "python tests/golden/regenerate.py"

spec = importlib.util.spec_from_file_location("regenerate", HERE / "regenerate.py")
assert spec is not None
assert spec.loader is not None
regenerate = importlib.util.module_from_spec(spec)
spec.loader.exec_module(regenerate)

TOMLS = sorted(regenerate.STUDIES.glob("*.toml"))


@pytest.mark.parametrize("toml", TOMLS, ids=lambda path: path.stem)
def test_resolved_runs_are_the_reviewed_ones(toml: Path) -> None:
    golden = HERE / f"{toml.stem}.txt"
    if not golden.exists():
        pytest.fail(f"{golden.name} is missing; make it with `{COMMAND}` and review it")
    before, now = golden.read_text(encoding="utf-8").splitlines(), regenerate.describe(toml).splitlines()
    if before != now:
        changed = [line for line in difflib.unified_diff(before, now, "reviewed", "now", lineterm="", n=0)]
        pytest.fail(
            f"the runs of studies/{toml.name} changed; if that is meant, run `{COMMAND}` and review the difference:\n"
            + "\n".join(changed[:40]),
            pytrace=False,
        )


def test_no_golden_text_without_its_study() -> None:
    assert {path.stem for path in HERE.glob("*.txt")} == {toml.stem for toml in TOMLS}


def test_a_changed_setting_shows(tmp_path: Path) -> None:
    """The text would miss no change: one digit of one setting is enough."""
    text = (regenerate.STUDIES / "world-mini.toml").read_text()
    for old, new in (("weight_decay = 1e-4", "weight_decay = 2e-4"), ("warmup_steps = 12", "warmup_steps = 11")):
        assert old in text
        changed = tmp_path / "world-mini.toml"
        changed.write_text(text.replace(old, new))
        assert regenerate.describe(changed) != regenerate.describe(regenerate.STUDIES / "world-mini.toml")
