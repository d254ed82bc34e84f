from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from isofusion.errors import InputError
from isofusion.laws.table import Runs, clusters, distinct


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "runs.csv"
    path.write_text(text)
    return path


def test_csv_finds_usual_names_and_reads_units(tmp_path: Path) -> None:
    runs = Runs.from_csv(write(tmp_path, "params,tokens,loss,trunk\n1.3B,20G,2.5,a\n275M,1e10,2.9,b\n"), group="trunk")
    assert runs.n.tolist() == [1.3e9, 275e6]
    assert runs.d.tolist() == [20e9, 1e10]
    assert runs.group.tolist() == ["a", "b"]
    np.testing.assert_allclose(runs.c, 6 * runs.n * runs.d)
    assert runs.compute == "6nd"


def test_csv_with_flops_but_no_tokens_derives_tokens(tmp_path: Path) -> None:
    runs = Runs.from_csv(write(tmp_path, "N,FLOPs,loss\n1e9,6e19,2.5\n"))
    assert runs.d.tolist() == [1e10]
    assert runs.compute == "6nd"
    given = Runs.from_csv(write(tmp_path, "N,D,FLOPs,loss\n1e9,1e10,7e19,2.5\n"))
    assert given.compute == "given"
    assert given.c.tolist() == [7e19]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["empty"]),
        ("n,d,loss\n", ["header and no rows"]),
        ("n,d,loss\n1e8,1e9,3\n1e8,1e9,nan\n", ["line 3", "'loss'", "not finite"]),
        ("n,d,loss\n1e8,0,3\n", ["line 2", "'d'", "not positive"]),
        ("n,d,loss\n-1e8,1e9,3\n", ["line 2", "'n'", "not positive"]),
        ("n,d,loss\n1e8,1e9,high\n", ["line 2", "'high' is not a number"]),
        ("n,d,loss\n1e8,,3\n", ["line 2", "'d'", "empty"]),
        ("width,d,loss\n1e8,1e9,3\n", ["no column for n", "width, d, loss"]),
    ],
)
def test_bad_csv_is_named_by_line_and_reason(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(InputError) as error:
        Runs.from_csv(write(tmp_path, text))
    for word in [*words, "runs.csv"]:
        assert word in str(error.value)


def test_missing_file_and_unknown_column_list_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        Runs.from_csv(tmp_path / "none.csv")
    with pytest.raises(InputError, match=r"no column 'final'.*Columns: n, d, loss"):
        Runs.from_csv(write(tmp_path, "n,d,loss\n1,1,1\n"), loss="final")


def result(**change: object) -> dict[str, object]:
    row: dict[str, object] = {
        "run": "early-a-s0-d10", "arm": "early", "size": "a", "seed": 0, "parent": "early-a-s0-trunk", "n": 1000,
        "tokens": 5e4, "flops": 4e8, "flops_6nd": 3e8, "loss_caption": 2.0, "loss_mean": 2.5, "oracle_caption": 1.5,
    }  # fmt: skip
    return {**row, **change}


def test_results_pick_arm_domain_and_ledger() -> None:
    rows = [result(), result(run="x", size="b", n="2000", parent=""), result(arm="late")]
    runs = Runs.from_results(rows, "early", "caption")
    assert runs.n.tolist() == [1000.0, 2000.0]
    assert runs.c.tolist() == [4e8, 4e8]
    assert runs.group.tolist() == ["early-a-s0-trunk", "x"]  # without a parent a run is its own trunk
    assert runs.oracle is not None
    assert runs.oracle.tolist() == [1.5, 1.5]
    assert Runs.from_results(rows, "late", "mean", compute="6nd").c.tolist() == [3e8]
    assert Runs.from_results(rows, "late", "mean").oracle_value() is None or runs.oracle is not None


def test_results_refuse_unknown_arm_domain_and_bad_loss() -> None:
    with pytest.raises(InputError, match="arms with runs: early"):
        Runs.from_results([result()], "late", "caption")
    with pytest.raises(InputError, match="no column 'loss_video'"):
        Runs.from_results([result()], "early", "video")
    with pytest.raises(InputError, match=r"run bad, column 'loss_caption': nan is not finite"):
        Runs.from_results([result(run="bad", loss_caption=float("nan"))], "early", "caption")


def test_values_within_five_percent_are_one_size() -> None:
    values = np.array([1.0e9, 4e9, 1.02e9, 4.1e9, 2e9])
    assert distinct(values) == 3
    assert clusters(values).tolist() == [0, 2, 0, 2, 1]


def test_arrays_of_unequal_length_or_sign_are_refused() -> None:
    with pytest.raises(InputError, match="must be equal"):
        Runs.of([1e8, 2e8], [1e9], [3.0])
    with pytest.raises(InputError, match="row 1: -2"):
        Runs.of([1e8, 2e8], [1e9, 1e9], [3.0, -2.0])
