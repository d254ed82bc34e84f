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
        changed = list(difflib.unified_diff(before, now, "reviewed", "now", lineterm="", n=0))
        pytest.fail(
            f"the runs of studies/{toml.name} changed; if that is meant, run `{COMMAND}` and review the difference:\n"
            + "\n".join(changed[:40]),
            pytrace=False,
        )


def test_no_golden_text_without_its_study() -> None:
    assert {path.stem for path in HERE.glob("*.txt")} == {toml.stem for toml in TOMLS}


@pytest.mark.parametrize(
    "change", ["train.eps=2e-8", "data.val_rows=3", "study.holdout=none", "model.balance_weight=0.1"]
)
def test_any_change_shows(change: str) -> None:
    toml = regenerate.STUDIES / "world-mini.toml"
    assert regenerate.describe(toml, [change]) != regenerate.describe(toml)
