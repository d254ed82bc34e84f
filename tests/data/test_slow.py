"""Long work says how far it is: seldom, and only where a program shows it."""

from __future__ import annotations

import logging

import pytest

from isofusion.data import slow
from isofusion.data.inspect import inspect


def test_short_work_is_silent_and_long_work_speaks_seldom(monkeypatch, caplog) -> None:
    caplog.set_level(logging.INFO, "isofusion.data")
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    work = slow.Slow("reading")
    for now in (100.5, 101.9, 102.0, 102.1, 116.9, 117.5, 118.0):
        work.at("{:.1f} s", now - 100)
    assert caplog.messages == ["reading: 2.0 s", "reading: 17.5 s"]


def test_every_long_part_of_the_first_reading_speaks(files, tmp_path, monkeypatch, caplog) -> None:
    caplog.set_level(logging.INFO, "isofusion.data")
    monkeypatch.setattr(slow, "FIRST", 0.0)
    monkeypatch.setattr(slow, "EVERY", 0.0)
    files.jsonl(tmp_path / "a.jsonl", [{"text": f"{n} green bottles"} for n in range(3)])
    settings = {"row_len": 64, "image_size": 16, "patch_size": 8, "tokenizer": "train:300"}
    inspect(str(tmp_path / "a.jsonl"), **settings)
    assert caplog.messages == [
        *(f"reading source a.jsonl (train): file 1 of 1, a.jsonl, {n} samples" for n in range(3)),
        *["training the tokenizer: 0 MB of text read"] * 3,
        "training the tokenizer: learning its tokens",
        "tokenising source a.jsonl: 0 of 3 documents",
    ]
    caplog.clear()
    inspect(str(tmp_path / "a.jsonl"), **settings)
    assert caplog.messages == []  # it is in the cache


def test_the_command_line_shows_it(files, tmp_path, monkeypatch, capsys) -> None:
    from isofusion.cli.main import main

    monkeypatch.setattr(slow, "FIRST", 0.0)
    path = files.jsonl(tmp_path / "a.jsonl", [{"text": f"{n} green bottles"} for n in range(3)])
    with pytest.raises(SystemExit):
        main(["data", "inspect", str(path), "--tokenizer", "train:300"])
    assert "reading source a.jsonl (train): file 1 of 1, a.jsonl, 0 samples\n" in capsys.readouterr().err
    assert not logging.getLogger("isofusion").handlers
