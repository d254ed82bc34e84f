"""docs/fit-your-own-runs.md: its table, its commands and its Python, run as a reader would."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from isofusion.cli.main import main

PAGE = (Path(__file__).parents[2] / "docs/fit-your-own-runs.md").read_text(encoding="utf-8")


def blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", PAGE, re.S | re.M)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "runs.csv").write_text(blocks("csv")[0])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_python_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    found = blocks("python")
    assert len(found) == 4
    for code in found:
        exec(compile(code, "fit-your-own-runs.md", "exec"), names)
    shown = capsys.readouterr().out
    assert "1.7e+09 parameters, 9.8e+10 tokens, loss 2.736\nFalse\n0.314" in shown
    assert (folder / "fit.html").is_file()


def test_the_five_commands_say_what_the_page_shows(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commands = [shlex.split(line) for line in blocks("sh")]
    assert len(commands) == 5
    shown = []
    for words in commands:
        assert words[0] == "isofusion"
        with pytest.raises(SystemExit) as end:
            main(words[1:])
        assert not end.value.code
        shown.append(capsys.readouterr().out)
    for printed, pasted in zip(shown, blocks("text"), strict=True):
        numbers = set(re.findall(r"\S+", printed))
        lines = [line for line in pasted.splitlines() if line.strip() not in ("", "...")]
        missing = [w for line in lines for w in line.split() if w not in numbers]
        assert not missing, missing
