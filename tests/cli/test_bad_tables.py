"""Must-show 9: every bad table ends `isofusion fit` with exit code 2 and one clear message, the endless ones too."""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from isofusion.cli.main import main
from isofusion.errors import InputError
from isofusion.laws.tables.readers import read_runs

SIX = "n,d,loss\n" + "".join(f"{{n}}e8,{{d}}e9,{3 - i / 10}\n" for i in range(6))
ONE_SIZE = "n,d,loss\n" + "".join(f"1e8,{2**i}e9,{3 - i / 10}\n" for i in range(6))
ONE_BUDGET = "n,d,loss\n" + "".join(f"{2**i}e8,1e9,{3 - i / 10}\n" for i in range(6))
IDENTICAL = "n,d,loss\n" + "1e8,1e9,3\n" * 6
GOOD = "n,d,loss\n" + "".join(
    f"{n:g},{d:g},{1.8 + 400 / n**0.34 + 1500 / d**0.36}\n" for n in (1e8, 3e8, 1e9) for d in (2e9, 8e9, 3e10)
)

SUMS, MEANS = (
    ",".join(f"{sum(float(line.split(',')[i]) for line in GOOD.splitlines()[1:]) / k:.6g}" for i in range(3)) + "\n"
    for k in (1, 9)
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["the file is empty", "columns for parameters, tokens and loss"]),
        ("\n\n", ["the file is empty"]),
        ("n,d,loss\n", ["a header and no rows", "3 sizes x 3 token budgets"]),
        (ONE_SIZE, ["1 model size", "add runs"]),
        (ONE_BUDGET, ["1 token budget", "add runs"]),
        (IDENTICAL, ["line 3 repeats line 2", "--drop-bad"]),
        (GOOD + "1e9,3e9,high\n", ["line 11", "'loss'", "'high' is not a number"]),
        (GOOD + "-1e9,3e9,2.5\n", ["line 11", "'n'", "-1e+09 is not positive"]),
        (GOOD + "1e9,0,2.5\n", ["line 11", "'d'", "0 is not positive"]),
        (GOOD + "1e9,3e9,nan\n", ["line 11", "'loss'", "nan is not finite"]),
        (GOOD + "1e9,inf,2.5\n", ["line 11", "'d'", "inf is not finite"]),
        (GOOD + "1e9,3e9\n", ["line 11", "'loss'", "empty"]),
        (GOOD.replace("loss", "bpb"), ["no column for loss", "--loss", "n, d, bpb"]),
        (GOOD.replace("n,", "width,"), ["no column for n", "--n", "width, d, loss"]),
        ("\x00\x01", ["binary file"]),
        (GOOD + "n,d,loss\n", ["line 11: the header again", "--drop-bad"]),
        (GOOD + "total,,\n", ["line 11", "'total' is not a number"]),
        (GOOD + SUMS, ["line 11: N, D and loss are the sums of those of the rows above", "--drop-bad"]),
        (GOOD + MEANS, ["line 11: N, D and loss are the means of those of the rows above"]),
        (GOOD + "1e9,3e9,25%\n", ["line 11", "'25%' is a percentage, no loss in nats per token"]),
        (GOOD.replace("loss", "val_bpb"), ["'val_bpb' is in bits: N* and D* are those of a loss in nats"]),
        (GOOD.replace("loss", "ppl"), ["'ppl' holds perplexities: a loss is their natural logarithm"]),
        (GOOD.replace("loss", "Accuracy"), ["'Accuracy' holds scores, which rise"]),
        (GOOD.replace(",d,", ",steps,"), ["no column for tokens", "'steps' counts steps: tokens are these times the"]),
        (GOOD.replace(",d,", ",D/N,"), ["'D/N' is tokens per parameter: tokens are these times N"]),
        (GOOD.replace(",d,", ",tokens_per_param,"), ["'tokens_per_param' is tokens per parameter"]),
    ],
)
def test_a_bad_table_is_one_message_and_exit_code_2(
    text: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "runs.csv"
    path.write_text(text)
    with pytest.raises(SystemExit) as end:
        main(["fit", str(path), "--bootstrap", "0"])
    shown = capsys.readouterr()
    assert end.value.code == 2
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1
    for word in ["runs.csv", *words]:
        assert word in shown.err


def test_a_table_whose_numbers_are_something_else_says_so() -> None:
    """They fit, and their answer is wrong by the unit or by more."""
    head, *body = GOOD.splitlines()
    cells = [[float(cell) for cell in line.split(",")] for line in body]

    def notes(change: Callable[[float, float, float], tuple[float, float, float]], name: str = head) -> str:
        rows = "".join(",".join(f"{v:.6g}" for v in change(*row)) + "\n" for row in cells)
        return "; ".join(read_runs(io.StringIO(f"{name}\n{rows}"))[1])

    assert notes(lambda n, d, loss: (n, d, loss)) == ""
    assert "the losses rise with N and D" in notes(lambda n, d, loss: (n, d, 1 / (loss - 1)))
    assert "for an accuracy take 1 - accuracy" in notes(lambda n, d, loss: (n, d, 1 / (loss - 1)))
    steps = notes(lambda n, d, loss: (n, d / 1e6, loss))
    assert "no run has more than 30000 tokens; if it counts steps" in steps
    assert "if tokens per parameter, these times N" in notes(lambda n, d, loss: (n, d / n, loss))
    assert "a perplexity is no loss" in notes(lambda n, d, loss: (n, d, math.exp(loss + 1)))
    assert "is in bits" in notes(lambda n, d, loss: (n, d, loss / 3), "n,d,loss (bits/byte)")


def test_dropping_the_bad_rows_of_a_good_table_fits_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "runs.csv"
    path.write_text(GOOD + "1e9,3e9,nan\n1e9,x,2.5\n")
    with pytest.raises(SystemExit) as end:
        main(["fit", str(path), "--drop-bad", "--bootstrap", "0"])
    assert not end.value.code
    shown = capsys.readouterr().out
    assert "dropped 2 of 11 rows" in shown
    assert "(line 11)" in shown
    path.write_text(IDENTICAL)
    with pytest.raises(SystemExit) as end:  # one row is left, which fits nothing
        main(["fit", str(path), "--drop-bad", "--bootstrap", "0"])
    assert end.value.code == 2


def fit_from_pipe(chunks: Iterator[bytes]) -> tuple[int, str, float, int]:
    """(exit code, stderr, peak memory in MB, bytes taken) of `isofusion fit -` fed from a pipe until it hangs up."""
    code = (
        "import pathlib, resource, sys\n"
        "from isofusion.cli.main import main\n"
        "def peak():\n"
        "    status = pathlib.Path('/proc/self/status')\n"
        "    if status.exists():  # Linux hands the peak of the process that starts a program on to it in ru_maxrss\n"
        "        return status.read_text().partition('VmHWM:')[2].split()[0]\n"
        "    return str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
        "try: main(['fit', '-', '--bootstrap', '0'])\n"
        "finally: sys.stderr.write(peak())\n"
    )
    pipe = subprocess.PIPE
    child = subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, stderr=pipe, bufsize=0)
    assert child.stdin is not None
    taken = 0
    with contextlib.suppress(BrokenPipeError):
        for chunk in chunks:
            taken += child.stdin.write(chunk) or 0
    child.stdin.close()
    child.stdin = None
    _, error = child.communicate(timeout=60)
    message, _, peak = error.decode().rpartition("\n")
    unit = 1e-6 if sys.platform == "darwin" else 1e-3  # macOS counts bytes, Linux kilobytes
    return child.returncode, message, float(peak) * unit, taken


TWO_GB = 2 * 1024**3
PADDED = b"1e8,1e9,3," + b"x" * 243 + b"\n"


@pytest.mark.parametrize(
    ("start", "chunk", "words"),
    [
        (
            b"n,d,loss,note\n",
            PADDED * 256,
            "more than 100,000 rows; a table of final losses has one row per finished run",
        ),
        (b"n,d,loss\n", b"1" * 65536, "line 2 is longer than"),
        (b'n,d,loss\n"', (b"1" * 1023 + b"\n") * 64, "does a quote never close"),
        (b"[\n", b'{"n": 1e8, "d": 1e9, "loss": 3.0},\n' * 2048, "write one object per line"),
    ],
)
def test_two_gigabytes_through_a_pipe_are_refused_in_little_memory(start: bytes, chunk: bytes, words: str) -> None:
    count = TWO_GB // len(chunk)
    code, message, peak, taken = fit_from_pipe(itertools.chain([start], itertools.repeat(chunk, count)))
    assert code == 2
    assert words in message
    assert message.count("\n") == 0
    assert peak < 500
    assert taken < TWO_GB / 8  # it hung up long before the end


def test_a_good_table_from_standard_input() -> None:
    code, message, _, _ = fit_from_pipe(iter([GOOD.encode()]))
    assert (code, message) == (0, "")


class Endless(io.RawIOBase):
    """Two gigabytes of rows that are made as they are read."""

    def __init__(self) -> None:
        self.given = 0

    def readable(self) -> bool:
        return True

    def readinto(self, target: memoryview) -> int:  # type: ignore[override]
        if self.given >= TWO_GB:
            return 0
        text = b"run,_step,loss\n" if self.given == 0 else b"a,1,3\n" * (len(target) // 6)
        target[: len(text)] = text
        self.given += len(text)
        return len(text)


def test_a_study_file_is_no_table(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("[study]\n")
    with pytest.raises(InputError, match=r"mine\.toml: this is a study's file, no table; .* e\.g\. runs/mine"):
        read_runs(tmp_path / "mine.toml")


def test_an_open_file_is_not_read_to_its_end() -> None:
    source = Endless()
    with pytest.raises(InputError, match="no column for n"):  # said before two gigabytes of a history are read
        read_runs(source)
    assert source.given < 1 << 20
