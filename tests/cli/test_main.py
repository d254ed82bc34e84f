from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from isofusion.cli import main as cli
from isofusion.errors import InputError, RunFailure
from isofusion.study import jobs


def test_help_and_import_need_no_torch() -> None:
    code = (
        "import sys, isofusion\n"
        "assert 'torch' not in sys.modules\n"
        "from isofusion.cli.main import build, main\n"
        "try: main(['--help'])\n"
        "except SystemExit as e: assert e.code == 0\n"
        "try: main(['study', 'run', '--help'])\n"
        "except SystemExit as e: assert e.code == 0\n"
        "assert not {'torch', 'scipy', 'altair', 'pyarrow'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for verb in cli.VERBS:
        assert verb in done.stdout


def test_import_is_quick() -> None:
    code = "import time; t = time.process_time(); import isofusion, isofusion.cli.main; print(time.process_time() - t)"
    best = min(float(subprocess.check_output([sys.executable, "-c", code])) for _ in range(3))
    assert best < 0.4


def test_help_is_quick() -> None:
    """CPU time of the whole process, so that a busy machine does not fail it."""
    import resource

    best = float("inf")
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "isofusion.cli.main", "--help"], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        best = min(best, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert best < 0.8


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    from isofusion import __version__

    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.strip() == f"isofusion {__version__}"


@pytest.mark.parametrize("arguments", [["nonsense"], ["study", "nonsense"], ["study", "run"], ["--nonsense"]])
def test_usage_errors_are_exit_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (InputError("file: key: wrong"), 2, "error: file: key: wrong\n"),
        (RunFailure("a run failed"), 1, "error: a run failed\n"),
        (KeyboardInterrupt(), 130, "error: stopped\n"),
        (OSError(28, "No space left on device", "runs/x"), 1, "error: runs/x: No space left on device\n"),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), 1, "error: this needs the package 'torch'"),
    ],
)
def test_troubles_are_one_message_and_a_code(
    monkeypatch, capsys, error: BaseException, code: int, message: str
) -> None:
    def build(arguments):
        def app(**_):
            raise error

        return app

    monkeypatch.setattr(cli, "build", build)
    with pytest.raises(SystemExit) as ended:
        cli.main([])
    assert ended.value.code == code
    assert capsys.readouterr().err.startswith(message)


def test_a_user_without_a_home_folder_is_told_what_to_set(tmp_path: Path, monkeypatch, capsys) -> None:
    """As a container's user who is in no list of users."""

    def nobody(*_: object) -> None:
        raise KeyError("uid not found")

    for name in ("HOME", "ISOFUSION_CACHE", "LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", nobody)
    (tmp_path / "a.jsonl").write_text('{"text": "some words"}\n')
    with pytest.raises(SystemExit) as ended:
        cli.main(["data", "inspect", str(tmp_path)])
    assert ended.value.code == 1
    assert capsys.readouterr().err == (
        "error: this user has no home folder: set the variable HOME to a folder that can be written\n"
    )
    monkeypatch.setattr(
        "isofusion.study.jobs.command", lambda *words: "7|RUNNING|None" if "--user=" in words[3] else ""
    )
    assert list(jobs.queue()) == ["7"]


def test_a_pydantic_error_is_never_shown_raw(monkeypatch, capsys) -> None:
    from isofusion.config import TrainConfig

    monkeypatch.setattr(cli, "build", lambda arguments: lambda **_: TrainConfig(lr=-1))
    with pytest.raises(SystemExit) as ended:
        cli.main([])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error == "error: lr: input should be greater than 0, got -1\n"


def test_small_models_and_small_files_need_megabytes_and_not_0_gigabytes(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("ISOFUSION_CACHE", str(tmp_path / "cache"))
    tiny = [
        "--width",
        "16",
        "--head-dim",
        "16",
        "--depth",
        "1",
        "--vocab",
        "300",
        "--slots",
        "64",
        "--ffn-multiple",
        "16",
    ]
    with pytest.raises(SystemExit):
        cli.main(["count", *tiny])
    assert re.search(r"\d MB|\d kB", capsys.readouterr().out)
    (tmp_path / "a.jsonl").write_text('{"text": "a few words"}\n' * 40)
    with pytest.raises(SystemExit):
        cli.main(["data", "inspect", str(tmp_path / "a.jsonl"), "--row-len", "64", "--image-size", "16"])
    shown = capsys.readouterr().out
    assert "1, 960 B" in shown
    assert "440 B, " in shown


def test_counts_take_units_and_no_option_is_passed_over(capsys: pytest.CaptureFixture[str]) -> None:
    def call(*arguments: str) -> tuple[str, str]:
        with pytest.raises(SystemExit):
            cli.main(["count", *arguments])
        return tuple(capsys.readouterr())  # type: ignore[return-value]

    assert call("early-275m", "--tokens", "100B", "--json") == call("early-275m", "--tokens", "1e11", "--json")
    assert "'100X' is not a number; write e.g. 1.3e9, 1.3B" in call("early-275m", "--tokens", "100X")[1]
    for bad in ("nan", "inf", "-inf"):
        out, error = call("early-275m", "--tokens", bad)
        assert out == ""
        assert f"'{bad}' is not a number; write e.g. 1.3e9, 1.3B" in error
    only = "only a model of your own takes that; give its --width"
    assert call("--depth", "24", "--routing", "agnostic") == ("", f"error: --depth, --routing: {only}\n")
    out, error = call("--depth", "4", "--experts", "8")
    assert (out, error) == ("", "error: --depth, --experts: only a model of your own takes that; give its --width\n")
