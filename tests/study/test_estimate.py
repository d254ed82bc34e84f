from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from isofusion.errors import InputError
from isofusion.study import estimate as module
from isofusion.study.estimate import estimate, nominal_shape, schedule
from isofusion.study.run import prepare, refuse_what_does_not_fit
from isofusion.study.spec import StudySpec


def test_schedule_of_one_and_two_jobs(toml: Path) -> None:
    runs = StudySpec.from_toml(toml).runs()[:3]  # a trunk of 16 steps, branches forked at 8 and 16
    seconds = [16.0, 2.0, 4.0]
    start = module.START_SECONDS
    assert schedule(runs, seconds, 1) == start + 22
    # two jobs: the short branch starts at the fork (8 s) beside the trunk, the long one when the trunk ends
    assert schedule(runs, seconds, 2) == start + 16 + 4


def test_costs_every_run(toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISOFUSION_CACHE", str(tmp_path / "cache"))
    spec = StudySpec.from_toml(toml)
    found = estimate(spec, out=tmp_path / "out", jobs=1, threads=1, probe=False)
    assert [row["run"] for row in found.rows] == [run.name for run in spec.runs()]
    assert found.totals["slots_trained"] == 3 * (0.8 * 5120 + 0.2 * (5120 + 2560))
    assert found.totals["slots_without_branching"] == 3 * (2560 + 5120)
    short, long = found.rows[1:3]
    assert long["flops"] == pytest.approx(2 * short["flops"])
    assert long["tokens"] <= 5120  # padding is not counted
    assert found.rows[0]["flops"] + 0.2 * long["flops"] == pytest.approx(long["flops"])
    assert found.totals["flops"] == pytest.approx(sum(row["own_flops"] for row in found.rows))
    assert found.rows[4]["n"] > short["n"]
    assert found.sources == [{"name": "captions", "epochs": None, "unique_tokens": found.sources[0]["unique_tokens"]}]
    assert found.problems == []
    assert not (tmp_path / "out").exists()


def test_rounding_is_told_for_the_steps_of_every_arm(read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The late arm's longer steps had gone unseen: 21 of 256 slots are 10.5 of 512."""
    monkeypatch.setenv("ISOFUSION_CACHE", str(tmp_path / "cache"))
    late = ("encoder_lr_scale = 0.5", "encoder_lr_scale = 0.5\nrows_per_step = 4")
    spec = read(late, ("[2560, 5120]", "[5376, 10240]"))
    notes = estimate(spec, out=tmp_path / "out", jobs=1, threads=1, probe=False).notes
    assert "budgets are rounded to whole steps of 512 slots (by 4.8 % at most)" in notes


def test_validation_files_that_are_training_files_are_told(toml: Path, tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("torch", reason="training needs the [train] extra")
    monkeypatch.setenv("ISOFUSION_CACHE", str(tmp_path / "cache"))
    lines = [{"text": f"{n} bottles of {n * n} on the wall, {'and on ' * 9}"} for n in range(200)]
    (tmp_path / "prose.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = '{ name = "s", domain = "text", format = "text", weight = 1, train = ["*.jsonl"], val = ["*.jsonl"] }'
    toml.write_text(re.sub("sources = .*", f'tokenizer = "train:300"\nsources = [{source}]', toml.read_text()))
    spec = StudySpec.from_toml(toml, data=tmp_path)
    told = "source s: 200 of 200 whole texts of validation are in training too: its loss may be too low"
    assert told in estimate(spec, out=tmp_path / "out", jobs=1, threads=1, probe=False).notes
    found = prepare(spec)
    assert told in found
    assert not any("val_rows" in note for note in found)
    (tmp_path / "few.jsonl").write_text("".join(json.dumps({"text": f"{n} cans"}) + "\n" for n in range(9)))
    toml.write_text(toml.read_text().replace('val = ["*.jsonl"]', 'val = ["few.jsonl"]'))
    note = "domain text: its validation files hold 1 of the 2 rows of data.val_rows"
    assert note in prepare(StudySpec.from_toml(toml, data=tmp_path))


WITHOUT_EXTRA = """
import sys
EXTRA = {"torch", "PIL", "tokenizers", "zstandard", "safetensors", "psutil"}  # pyproject.toml: [train]
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in EXTRA else self.finder.find_spec(name, path, target)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
from isofusion.cli.main import main
main(sys.argv[1:])
"""


def test_planning_needs_only_the_base_dependencies(toml: Path, tmp_path: Path) -> None:
    def isofusion(*arguments: str, cache: str = "empty") -> str:
        command = [sys.executable, "-c", WITHOUT_EXTRA, *arguments]
        environment = {**os.environ, "ISOFUSION_CACHE": str(tmp_path / cache)}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "study" in isofusion("--help")
    isofusion("study", "lock", str(toml), "--out", str(tmp_path / "out"))
    estimated = json.loads(isofusion("study", "estimate", str(toml), "--jobs", "1", "--json"))
    assert any("it needs torch: pip install 'isofusion[train]'" in note for note in estimated["notes"])
    with pytest.MonkeyPatch.context() as patch:  # the same numbers as with everything installed
        patch.setenv("ISOFUSION_CACHE", str(tmp_path / "cache"))
        full = estimate(StudySpec.from_toml(toml), out=tmp_path / "out", jobs=1, threads=1, probe=False).as_json()
    assert estimated["runs"] == full["runs"]
    assert estimated["sources"] == full["sources"]
    # blocks that a full install has kept do not get in the way
    assert json.loads(isofusion("study", "estimate", str(toml), "--jobs", "1", "--json", cache="cache")) == estimated


def test_the_probe_is_measured_once(toml: Path, tmp_path: Path, fake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISOFUSION_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("FAKE_STEP", "0")
    spec = StudySpec.from_toml(toml)
    found = estimate(spec, out=tmp_path / "out", jobs=1, threads=1, train=fake)
    assert found.totals["seconds_basis"] == "from a probe"
    assert found.rows[0]["seconds"] == pytest.approx(16 * 0.5)  # the fake writes half a second for every step
    again = estimate(spec, out=tmp_path / "out", jobs=1, threads=1, train="no_such_module:train")
    assert again.totals["seconds"] == found.totals["seconds"]


def test_nominal_shape_without_data(toml: Path) -> None:
    shape = nominal_shape(StudySpec.from_toml(toml))
    assert shape.image_share == pytest.approx(0.544)
    assert shape.tokens == 128
    assert shape.images == pytest.approx(0.544 * 128 / 36)


def test_what_does_not_fit_is_refused(toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = StudySpec.from_toml(toml)
    refuse_what_does_not_fit(spec, tmp_path, 1)
    monkeypatch.setattr(module, "available_memory", lambda: 1e6)
    with pytest.raises(InputError, match=r"this machine: memory: 1 jobs need .* 1 MB are free; use fewer --jobs"):
        refuse_what_does_not_fit(spec, tmp_path, 1)
    monkeypatch.setattr(module, "available_memory", lambda: 1e12)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(InputError, match=r"disk: checkpoints need up to \d+\.?\d* MB and 10 B are"):
        refuse_what_does_not_fit(spec, tmp_path, 1)
