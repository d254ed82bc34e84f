"""One run of a locked study by itself, and what is refused before any rank is met."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="training needs the [train] extra")

from isofusion.errors import InputError  # noqa: E402
from isofusion.study.lock import write_lock  # noqa: E402
from isofusion.study.spec import StudySpec  # noqa: E402
from isofusion.train.launch import BAD_INPUT, DONE, FAILED, main  # noqa: E402
from isofusion.train.parallel import connected  # noqa: E402

STUDY = """
[study]
name = "tiny"
title = "a tiny study"
seeds = [0]
budgets = [2048]
holdout = "none"

[data]
row_len = 128
image_size = 48
patch_size = 8
tokenizer = "world"
val_rows = 2
sources = [{ name = "text", domain = "text", format = "world", weight = 1 }]

[model]
depth = 1
head_dim = 8
ffn_multiple = 16
patch_size = 8

[train]
lr = 5e-3
warmup_steps = 0
rows_per_step = 2

[[arms]]
name = "early"
[arms.sizes]
s16 = { width = 16 }
"""


def test_a_trunk_then_its_branch(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("ISOFUSION_CACHE", str(cache))
    toml, out = tmp_path / "tiny.toml", tmp_path / "out"
    toml.write_text(STUDY)
    spec = StudySpec.from_toml(toml)
    write_lock(out, spec, toml=toml, jobs=1, threads=1, overrides=[])
    trunk, branch = sorted(spec.runs(), key=lambda run: run.kind, reverse=True)
    failure = out / "runs" / branch.name / "failure.json"

    assert main([str(out), "early-s17-s0-trunk", "--device", "cpu"]) == BAD_INPUT
    assert f"no run 'early-s17-s0-trunk' in this study; there are: {trunk.name}" in capsys.readouterr().err
    assert main([str(out), branch.name, "--device", "cpu"]) == FAILED
    assert json.loads(failure.read_text())["kind"] == "fork"
    assert main([str(out), trunk.name, "--device", "cpu"]) == DONE
    assert f"{trunk.name}: done at step {trunk.end_step}" in capsys.readouterr().out
    assert main([str(out), branch.name, "--device", "cpu"]) == DONE
    assert not failure.exists()
    assert (out / "runs" / branch.name / "eval.json").exists()


@pytest.mark.parametrize(
    ("ranks", "how", "why"),
    [
        ("6", {"device": "cpu", "replicas": 4}, r"--replicas 4 does not divide the 6 ranks"),
        ("1", {"device": "tpu"}, r'device "tpu" is unknown; choose auto, cpu or cuda'),
    ],
)
def test_what_cannot_be_is_refused(ranks: str, how: dict, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", ranks)
    with pytest.raises(InputError, match=why), connected(**how):
        pass


@pytest.mark.parametrize("option", ["--threads", "--replicas", "--timeout"])
@pytest.mark.parametrize("value", ["0", "-1", "1.5", "nan", "many"])
def test_numbers_below_one_are_a_usage_error(tmp_path: Path, option: str, value: str, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path), "a-run", f"{option}={value}"])
    assert ended.value.code == 2
    assert f"argument {option}: {value}: must be a whole number, at least 1" in capsys.readouterr().err
