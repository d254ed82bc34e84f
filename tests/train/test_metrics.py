from __future__ import annotations

import errno
from pathlib import Path

import pytest

from isofusion.errors import RunFailure
from isofusion.train.metrics import MetricsLog, read_metrics, truncate_metrics


def write(path: Path, steps: range) -> None:
    log = MetricsLog(path)
    for step in steps:
        log.append({"step": step, "loss": 1.0 / step})
    log.close()


def test_lines_are_on_disk_at_once(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "m.jsonl")
    log.append({"step": 1})
    assert read_metrics(tmp_path / "m.jsonl") == [{"step": 1}]
    log.close()


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    write(path, range(1, 4))
    for torn in (b'{"step": 4, "lo', b'{"step": 4}'):  # without its newline a line may still be growing
        path.write_bytes(path.read_bytes().split(b'{"step": 4')[0] + torn)
        assert [r["step"] for r in read_metrics(path)] == [1, 2, 3]


def test_truncate_cuts_later_steps_and_a_torn_end(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    write(path, range(1, 8))
    path.write_bytes(path.read_bytes() + b'{"ste')
    assert truncate_metrics(path, 5) == 2
    write(path, range(6, 9))
    assert [r["step"] for r in read_metrics(path)] == list(range(1, 9))


def test_no_file_is_no_metrics(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "none") == []
    assert truncate_metrics(tmp_path / "none", 3) == 0


def test_a_nan_is_refused_rather_than_written(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "m.jsonl")
    with pytest.raises(ValueError):
        log.append({"loss": float("nan")})
    log.close()


def test_full_disk_says_so(tmp_path: Path) -> None:
    class Full:
        def write(self, text: str) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    log = MetricsLog(tmp_path / "m.jsonl")
    log.close()
    log._file = Full()  # type: ignore[assignment]
    with pytest.raises(RunFailure, match=r"No space left.*resume"):
        log.append({"step": 1})


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_full_disk_is_one_clear_message_also_when_the_file_is_closed() -> None:
    log = MetricsLog(Path("/dev/full"))
    with pytest.raises(RunFailure, match=r"cannot write metrics.*free some space and resume"):
        log.append({"step": 1})
    log.close()
