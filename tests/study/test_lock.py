from __future__ import annotations

import json
from pathlib import Path

import pytest

from isofusion.errors import InputError
from isofusion.study.jobs import append, read_lines
from isofusion.study.lock import (
    LOCK,
    SESSIONS,
    _digest,
    check_lock,
    later_changes,
    locked_spec,
    record_session,
    write_lock,
)
from isofusion.study.spec import REMARKS, StudySpec


def lock(out: Path, toml: Path) -> StudySpec:
    spec = StudySpec.from_toml(toml)
    write_lock(out, spec, toml=toml, jobs=1, threads=1)
    return spec


def test_locks_runs_and_analysis(tmp_path: Path, toml: Path) -> None:
    spec = lock(tmp_path / "out", toml)
    written = json.loads((tmp_path / "out" / LOCK).read_text())
    assert written["runs"] == {run.name: run.digest() for run in spec.runs()}
    assert written["analysis"]["holdout"] == "none"
    assert locked_spec(tmp_path / "out") == spec
    assert later_changes(tmp_path / "out") == []


def test_a_changed_study_is_refused_field_by_field(tmp_path: Path, toml: Path) -> None:
    out = tmp_path / "out"
    lock(out, toml)
    before = (out / LOCK).read_bytes()
    changed = ["arms.early.sizes.s16.lr=0.5", "study.holdout=largest-size", "study.title=other words"]
    with pytest.raises(InputError) as caught:
        check_lock(out, StudySpec.from_toml(toml, overrides=changed))
    message = str(caught.value)
    assert "arms.early.sizes.s16.train.lr: 0.005 -> 0.5" in message
    assert "holdout: 'none' -> 'largest-size'" in message
    assert "--out" in message
    assert "title" not in message
    assert (out / LOCK).read_bytes() == before


def test_words_may_change(tmp_path: Path, toml: Path) -> None:
    lock(tmp_path / "out", toml)
    check_lock(tmp_path / "out", StudySpec.from_toml(toml, overrides=["study.title=better words"]))


def test_a_setting_younger_than_the_lock_is_no_change(tmp_path: Path, toml: Path) -> None:
    """Locks of before sizes had budgets of their own."""
    out = tmp_path / "out"
    spec = lock(out, toml)
    tree = json.loads((out / LOCK).read_text())
    for arm in tree["spec"]["arms"]:
        for size in arm["sizes"]:
            assert size.pop("budgets") == []
    tree["digest"] = _digest({key: value for key, value in tree["spec"].items() if key not in REMARKS})
    (out / LOCK).write_text(json.dumps(tree))
    check_lock(out, spec)
    assert later_changes(out) == []
    with pytest.raises(InputError, match=r"arms.early.sizes.s16.budgets: \[\] -> \[2560\]"):
        check_lock(out, StudySpec.from_toml(toml, overrides=["arms.early.sizes.s16.budgets=[2560]"]))


def test_later_changes_are_listed(tmp_path: Path, toml: Path) -> None:
    out = tmp_path / "out"
    lock(out, toml)
    record_session(out, jobs=1, threads=2)
    toml.write_text(toml.read_text().replace("lr = 5e-3", "lr = 6e-3"))
    tree = json.loads((out / LOCK).read_text())
    tree["analysis"]["holdout"] = "largest-size"
    (out / LOCK).write_text(json.dumps(tree))
    folder = out / "runs" / "early-s16-s0-trunk"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"digest": "0" * 64}))
    text = "\n".join(later_changes(out))
    assert "edited by hand" in text
    assert "2 threads per run instead of 1" in text
    assert "train.lr: 0.005 -> 0.006" in text
    assert "run early-s16-s0-trunk was trained with another configuration" in text


def test_a_tokenizer_that_is_not_here_is_no_edit_of_the_study(tmp_path: Path, toml: Path, monkeypatch) -> None:
    """As where a report is made on another machine: the size of its vocabulary is not known there."""
    monkeypatch.chdir(tmp_path)
    Path("tok.json").write_text(json.dumps({"model": {"vocab": {"a": 0, "b": 600}}}))
    toml.write_text(toml.read_text().replace("[data]", '[data]\ntokenizer = "tok.json"'))
    spec = lock(tmp_path / "out", toml)
    assert {size.model.vocab_size for arm in spec.arms for size in arm.sizes} == {601}
    Path("tok.json").unlink()
    assert later_changes(tmp_path / "out") == []
    with pytest.raises(
        InputError, match=r"the tokenizer tok.json is not here, .*put it back, or run the command where"
    ):
        check_lock(tmp_path / "out", StudySpec.from_toml(toml))
    Path("tok.json").write_text(json.dumps({"model": {"vocab": {"a": 0, "b": 700}}}))
    [early, *_] = later_changes(tmp_path / "out")
    assert "edited after the lock" in early
    assert "vocab_size: 601 -> 701" in early
    with pytest.raises(InputError, match="vocab_size: 601 -> 701"):
        check_lock(tmp_path / "out", StudySpec.from_toml(toml))


def test_a_line_cut_in_half_costs_itself_alone(tmp_path: Path, toml: Path) -> None:
    out = tmp_path / "out"
    lock(out, toml)
    record_session(out, jobs=1, threads=1)
    path = out / SESSIONS
    path.write_bytes(path.read_bytes()[:-9])
    record_session(out, jobs=1, threads=2)
    assert [line["threads"] for line in read_lines(path)] == [2]
    assert len(path.read_text().splitlines()) == 2  # what was cut stays as it was
    append(path, {"started_at": "later"})
    with path.open("ab") as file:
        file.write(b'[1, 2]\nnull\n7\n"\xff')
    (out / "runs" / "early-s16-s0-trunk").mkdir(parents=True)
    (out / "runs" / "early-s16-s0-trunk" / "run.json").write_text("null")
    [change] = later_changes(out)
    assert change.endswith("2 threads per run instead of 1")


def test_damaged_or_missing_lock(tmp_path: Path, toml: Path) -> None:
    with pytest.raises(InputError, match="not a study folder"):
        locked_spec(tmp_path)
    spec = lock(tmp_path / "out", toml)
    good = json.loads((tmp_path / "out" / LOCK).read_text())
    for key, value in [("spec", {}), ("spec", 3), *((k, 3) for k in good if k not in ("format", "jobs", "threads"))]:
        (tmp_path / "out" / LOCK).write_text(json.dumps(good | {key: value}))
        if key.startswith("analysis"):
            assert later_changes(tmp_path / "out") == [f"{LOCK} was edited by hand after it was written"]
            continue
        for read in (check_lock, lambda out, spec: later_changes(out)):
            with pytest.raises(InputError, match="damaged"):
                read(tmp_path / "out", spec)
    (tmp_path / LOCK).write_text("{")
    with pytest.raises(InputError, match="damaged"):
        check_lock(tmp_path, StudySpec.from_toml(toml))
