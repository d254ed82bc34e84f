"""The verbs of `isofusion study`, with the pool and the page replaced: they have their own tests."""

from __future__ import annotations

import json
import os
import sys
import types
from pathlib import Path

import pytest

from isofusion.cli.main import main
from isofusion.errors import RunFailure
from isofusion.study.lock import later_changes, read_lock

STUDY = """
[study]
name = "small"
budgets = [2560, 5120]
[data]
row_len = 128
image_size = 48
patch_size = 8
sources = [{ name = "captions", domain = "caption", format = "world", weight = 1 }]
[model]
depth = 2
head_dim = 8
ffn_multiple = 16
[train]
warmup_steps = 1
rows_per_step = 2
[[arms]]
name = "early"
[arms.sizes]
s16 = { width = 16 }
"""
ROOT = Path(__file__).parents[2]


@pytest.fixture
def toml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("small.toml").write_text(STUDY)
    return Path("small.toml")


def call(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


def test_lock_then_edit_is_refused(toml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("study", "lock", toml) == 0
    assert "runs/small/study.lock: 3 runs" in capsys.readouterr().out
    before = Path("runs/small/study.lock").read_bytes()
    toml.write_text(STUDY.replace("width = 16", "width = 24"))
    assert call("study", "run", toml) == 2
    error = capsys.readouterr().err
    assert "arms.early.sizes.s16.model.width: 16 -> 24" in error
    assert "Traceback" not in error
    assert Path("runs/small/study.lock").read_bytes() == before


def test_another_data_folder_in_the_file_is_another_study(toml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("one", "two"):
        Path(name).mkdir()
    toml.write_text(STUDY.replace("[data]", '[data]\nfolder = "one"'))
    assert call("study", "lock", toml, "--jobs", 1) == 0
    toml.write_text(STUDY.replace("[data]", '[data]\nfolder = "two"'))
    capsys.readouterr()
    assert call("study", "run", toml) == 2
    assert "data.folder: 'one' -> 'two'" in capsys.readouterr().err
    assert any("data.folder: 'one' -> 'two'" in change for change in later_changes(Path("runs/small")))
    assert call("study", "run", toml, "--set", "data.folder='one'", "--data", "two") == 2
    assert "data.folder: 'one' -> 'two'" in capsys.readouterr().err


def test_other_spellings_of_one_data_folder_are_no_change(
    toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Relative, absolute, ./, a slash behind, a link, ~: the digests of runs keep what the lock has."""
    monkeypatch.setenv("HOME", str(tmp_path))
    Path("one").mkdir()
    Path("link").symlink_to("one")
    spellings = ("one", "one/", "./one", "link", "~/one", str(tmp_path / "one"), "link/../one", f"{tmp_path}//link/")
    for first in spellings:
        toml.write_text(STUDY.replace("[data]", f'[data]\nfolder = "{first}"'))
        assert call("study", "lock", toml, "--jobs", 1) == 0
        before = read_lock(Path("runs/small"))
        for other in spellings:
            toml.write_text(STUDY.replace("[data]", f'[data]\nfolder = "{other}"'))
            assert call("study", "lock", toml) == 0, (first, other, capsys.readouterr().err)
            assert call("study", "lock", toml, "--data", os.path.expanduser(other)) == 0
            assert later_changes(Path("runs/small")) == []
        assert read_lock(Path("runs/small")) == before
        Path("runs/small/study.lock").unlink()
    toml.write_text(STUDY)  # without a folder: where you are
    assert call("study", "lock", toml, "--jobs", 1) == 0
    assert call("study", "lock", toml, "--data", ".") == 0
    capsys.readouterr()
    assert call("study", "lock", toml, "--data", "one") == 2
    assert "data.folder: None -> 'one'" in capsys.readouterr().err


def test_a_relative_data_folder_belongs_to_where_it_was_locked(
    toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("one").mkdir()
    Path("elsewhere").mkdir()
    assert call("study", "lock", toml, "--jobs", 1, "--data", "one") == 0
    monkeypatch.chdir("elsewhere")
    capsys.readouterr()
    again = ("study", "lock", tmp_path / toml, "--out", "../runs/small")
    assert call(*again) == 2
    assert f"locked with data folder one in {tmp_path}, and there is no such folder here: run the command there" in (
        capsys.readouterr().err
    )
    assert call(*again, "--data", tmp_path / "one") == 2
    assert f"(the same folder, named from {tmp_path} when the study was locked: run the command there)" in (
        capsys.readouterr().err
    )


def test_a_data_folder_of_the_command_line_is_remembered(toml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("one", "two"):
        Path(name).mkdir()
    toml.write_text(STUDY.replace("[data]", '[data]\nfolder = "two"'))
    assert call("study", "lock", toml, "--jobs", 1, "--data", "one") == 0
    before = read_lock(Path("runs/small"))
    assert before["spec"]["data"]["folder"] == "one"
    assert call("study", "lock", toml, "--jobs", 1) == 0
    assert read_lock(Path("runs/small")) == before
    assert later_changes(Path("runs/small")) == []
    assert call("study", "lock", toml, "--jobs", 1, "--data", "two") == 2
    assert "data.folder: 'one' -> 'two'" in capsys.readouterr().err


def test_a_study_locked_before_a_setting_was_refused_says_what_can_be_done(
    toml: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("study", "lock", toml, "--jobs", 1) == 0
    lock = Path("runs/small/study.lock")
    lock.write_text(lock.read_text().replace('"weight_decay": 0.0001', '"weight_decay": 1.0'))
    toml.write_text(STUDY.replace("[train]", "[train]\nweight_decay = 1.0"))
    capsys.readouterr()
    for verb in ("run", "lock"):
        assert call("study", verb, toml) == 2
        error = capsys.readouterr().err
        assert error.startswith(
            "error: small.toml: [train]: weight_decay: input should be less than 1, got 1.0; runs/sm"
        )
        assert "its finished runs can be reported (isofusion study report runs/small)" in error
    assert call("study", "status", "runs/small") == 0
    assert "3 waiting" in capsys.readouterr().out


def test_status_of_a_run_whose_failure_cannot_be_read(toml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("study", "lock", toml, "--jobs", 1) == 0
    folder = Path("runs/small/runs/early-s16-s0-trunk")
    folder.mkdir(parents=True)
    for text in ("", '{"kind": "failure", "mess', "[]"):
        (folder / "failure.json").write_text(text)
        capsys.readouterr()
        assert call("study", "status", "runs/small") == 0
        assert f"{folder}/failure.json cannot be read; see runs/small/logs" in capsys.readouterr().out


def test_a_file_is_no_folder_for_a_study(toml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("notes").write_text("mine")
    for verb in ("estimate", "lock", "run"):
        assert call("study", verb, toml, "--out", "notes") == 2
        assert "--out notes: this is a file, and a study needs a folder" in capsys.readouterr().err
    assert Path("notes").read_text() == "mine"


def test_bad_study_is_exit_code_2(toml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toml.write_text(STUDY.replace("width = 16", "width = 20"))
    for verb in ("estimate", "lock", "run"):
        assert call("study", verb, toml) == 2
        assert capsys.readouterr().err.startswith(
            'error: small.toml: arm "early", size "s16": width 20 is not a multiple'
        )
    assert call("study", "run", "nothing.toml") == 2
    assert call("study", "status", "nothing") == 2
    assert not Path("runs").exists()


def test_data_that_cannot_be_read_leaves_no_lock_behind(toml: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """Otherwise the study, once mended, would differ from its lock."""
    monkeypatch.setenv("ISOFUSION_CACHE", str(tmp_path / "cache"))
    source = '{ name = "t", domain = "text", format = "text", weight = 1, val = ["*.jsonl"], train = ["*.jsonl"] }'
    text = STUDY.replace('{ name = "captions", domain = "caption", format = "world", weight = 1 }', source)
    toml.write_text(text.replace("[data]", '[data]\ntokenizer = "own.json"'))
    Path("data").mkdir()
    Path("data/a.jsonl").write_text('{"text": "words"}\n')
    from tokenizers import Tokenizer, models

    bare = Tokenizer(models.WordLevel({"words": 0, "?": 1}, unk_token="?"))
    bare.save("data/own.json")
    assert call("study", "run", toml, "--data", "data") == 2
    assert "own.json lacks reserved tokens: pad" in (error := capsys.readouterr().err)
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    Path("data/own.json").unlink()
    assert call("study", "run", toml, "--data", "data") == 2
    assert capsys.readouterr().err.startswith("error: cannot read the tokenizer own.json")
    assert not Path("runs").exists()

    # a few bad samples do not stop a study, but they are said before it starts
    toml.write_text(toml.read_text().replace("own.json", "train:300"))
    Path("data/a.jsonl").write_text('{"text": "words"}\n' * 40 + '{"text": 3}\n')
    monkeypatch.setattr("isofusion.study.run.run_study", lambda *_, **__: None)
    monkeypatch.setattr("isofusion.cli.study.report_command", lambda out: None)
    assert call("study", "run", toml, "--data", "data", "--jobs", 1) == 0
    note = "note: source t (train): left out: wrong type 1; first: a.jsonl: 41: wrong type"
    assert note in capsys.readouterr().err
    assert Path("runs/small/study.lock").exists()
    assert call("study", "lock", toml, "--out", "apart", "--data", "data", "--jobs", 1) == 0
    assert note not in capsys.readouterr().err  # a lock reads no data
    assert call("study", "run", toml, "--out", "apart", "--jobs", 1) == 0
    assert note in capsys.readouterr().err


def test_a_domain_that_nothing_validates_is_said_before_it_is_locked(toml: Path, capsys) -> None:
    caption = '{ name = "captions", domain = "caption", format = "world", weight = 1 }'
    words = '{ name = "t", domain = "text", format = "text", weight = 1, train = ["*.jsonl"] }'
    common = toml.read_text().replace("[data]", '[data]\ntokenizer = "train:300"')
    toml.write_text(common.replace(caption, words))
    for verb in ("estimate", "lock", "run"):
        assert call("study", verb, toml) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: small.toml: [data]: no source has validation files")
        assert "give val = [" in error
    assert not Path("runs").exists()
    two = caption.replace('format = "world"', 'format = "webdataset", train = ["*.tar"], val = ["*.tar"]')
    toml.write_text(common.replace(caption, f"{two}, {words}"))
    note = "note: no source of domain text has validation files (val = [...])"
    assert call("study", "lock", toml, "--jobs", 1) == 0
    assert note in capsys.readouterr().err
    assert call("study", "estimate", toml, "--no-probe", "--jobs", 1) == 0
    assert note in capsys.readouterr().out


@pytest.mark.parametrize("verb", ["lock", "run"])
def test_an_out_folder_that_cannot_be_written_is_told_before_the_data_is_read(
    toml: Path, tmp_path: Path, verb: str, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("ours").mkdir()
    real = os.access  # root may write anywhere
    monkeypatch.setattr("os.access", lambda path, mode: Path(path).name != "ours" and real(path, mode))
    monkeypatch.setattr("isofusion.study.run.prepare", lambda *_: pytest.fail("the data was read"))
    assert call("study", verb, toml, "--out", "ours/new/study") == 2
    where = tmp_path / "ours"
    assert (
        capsys.readouterr().err == f"error: --out ours/new/study: no right to write in {where}; choose another --out\n"
    )


@pytest.mark.parametrize("verb", ["lock", "run"])
def test_an_out_folder_in_a_closed_folder_or_below_a_file_is_told_clearly(
    toml: Path, tmp_path: Path, verb: str, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("isofusion.study.run.prepare", lambda *_: pytest.fail("the data was read"))
    Path("notes").write_text("")
    assert call("study", verb, toml, "--out", "notes/new/study") == 2
    below = f"error: --out notes/new/study: {tmp_path / 'notes'} is a file, and a study needs a folder"
    assert capsys.readouterr().err == f"{below}; choose another --out\n"
    Path("ours").mkdir()
    stat, access = os.stat, os.access  # root may look everywhere

    def closed(path, *arguments, **named):
        if "ours/" in os.fspath(path):
            raise PermissionError(13, "Permission denied", path)
        return stat(path, *arguments, **named)

    monkeypatch.setattr("os.stat", closed)
    monkeypatch.setattr("os.access", lambda path, mode: Path(path).name != "ours" and access(path, mode))
    assert call("study", verb, toml, "--out", "ours/new/study") == 2
    shut = f"error: --out ours/new/study: no right to write in {tmp_path / 'ours'}; choose another --out\n"
    assert capsys.readouterr().err == shut


def test_run_ends_with_the_path_of_the_report(toml: Path, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    seen = {}

    def run_study(spec, out, **settings):
        seen.update(settings, out=out, spec=spec)

    page = types.ModuleType("isofusion.report.page")
    page.build_report = lambda out, pool: out / "report.html"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "isofusion.report.page", page)
    monkeypatch.setattr("isofusion.study.run.run_study", run_study)
    monkeypatch.setattr("isofusion.study.run.refuse_what_does_not_fit", lambda *_: None)
    assert call("study", "run", toml, "--out", "here", "--jobs", 1, "--set", "train.lr=0.25", "--resume") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "here/report.html"
    assert seen["resume"] is True
    assert seen["jobs"] == 1
    assert seen["spec"].arms[0].sizes[0].train.lr == 0.25
    assert "--out here --resume" in seen["command"]
    # what was locked need not be repeated
    assert call("study", "run", toml, "--out", "here", "--jobs", 1, "--resume") == 0
    assert seen["spec"].arms[0].sizes[0].train.lr == 0.25
    assert call("study", "report", "here") == 0
    assert "fitting the laws of here and drawing its page ...\n" in capsys.readouterr().err


def test_failures_and_signals_have_their_codes(toml: Path, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    from isofusion.study.run import Interrupted

    monkeypatch.setattr("isofusion.study.run.refuse_what_does_not_fit", lambda *_: None)
    for error, code in ((RunFailure("2 of 3 runs did not finish"), 1), (Interrupted("stopped with 1 of 3", 15), 143)):

        def run_study(*_, error=error, **__):
            raise error

        monkeypatch.setattr("isofusion.study.run.run_study", run_study)
        assert call("study", "run", toml, "--jobs", 1) == code
        assert str(error) in capsys.readouterr().err


def test_status(toml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call("study", "lock", toml)
    trunk, branch = (Path("runs/small/runs") / name for name in ("early-s16-s0-trunk", "early-s16-s0-d10"))
    trunk.mkdir(parents=True)
    (trunk / "metrics.jsonl").write_text('{"step": 7, "loss": 3.5}\n{"step": 8, "lo')
    (trunk / "DONE").write_text("")
    branch.mkdir()
    (branch / "failure.json").write_text('{"kind": "died", "message": "its worker was killed by signal 9"}')
    capsys.readouterr()
    assert call("study", "status", toml, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["counts"] == {"done": 1, "unfinished": 0, "failed": 1, "waiting": 1}
    assert found["runs"][0] == {"run": trunk.name, "state": "done", "step": 7, "end_step": 16, "loss": 3.5}
    assert call("study", "status", "runs/small") == 0
    text = capsys.readouterr().out
    assert "killed by signal 9" in text
    assert "1 done, 1 failed, 1 waiting" in text


def test_paper_study_is_costed_without_data(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "paper"
    assert call("study", "estimate", ROOT / "studies" / "paper.toml", "--out", out, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] is False
    assert any("assumed" in note for note in found["notes"])
    assert found["totals"]["image_share"] == 0.544
    largest = max(found["runs"], key=lambda row: row["flops_6nd"] if row["arm"] == "early" else 0)
    assert largest["flops_6nd"] == pytest.approx(6 * 3.35e9 * 600e9, rel=0.02)
    assert largest["flops_6nd"] == pytest.approx(6 * largest["n"] * largest["tokens"], rel=1e-6)
    assert not out.exists()
