"""Every source gives the same runs; units, names, repeated and bad rows; what the reader is told."""

from __future__ import annotations

import gzip
import io
import json
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from isofusion.errors import InputError
from isofusion.laws.table import Runs
from isofusion.laws.tables import cells, collect
from isofusion.laws.tables.readers import read_columns, read_runs

N = [1.3e9, 2.75e8, 1.3e9, 2.75e8]
D = [2e10, 1e10, 4e10, 2e10]
LOSS = [2.5, 2.9, 2.4, 2.8]
CSV = "params,tokens,loss\n1.3B,20G,2.5\n275M,1e10,2.9\n\n1_300_000_000,40 billion,2.4\n,,\n275 M,2e10,2.8\n"
COLUMNS = {"params": N, "tokens": D, "loss": LOSS}
RECORDS = [dict(zip(COLUMNS, row, strict=True)) for row in zip(N, D, LOSS, strict=True)]


class ArrowOnly:
    """Any library's frame: all that is known of it is the Arrow C stream."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table

    def __arrow_c_stream__(self, requested_schema: Any = None) -> Any:
        return self.table.__arrow_c_stream__(requested_schema)


class Trickle:
    """A text source with nothing but read(size), which gives a few characters at a time."""

    def __init__(self, text: str) -> None:
        self.text = io.StringIO(text)

    def read(self, size: int = -1) -> str:
        return self.text.read(min(size, 7))


def sources(tmp_path: Path) -> dict[str, Any]:
    def file(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    parquet.write_table(pa.table(COLUMNS), tmp_path / "runs.parquet", row_group_size=3)
    lines = "".join(json.dumps(row) + "\n" for row in RECORDS)
    return {
        "csv": file("runs.csv", CSV),
        "tsv": file("runs.tsv", CSV.replace(",", "\t")),
        "semicolons, windows line ends": file("semi.csv", CSV.replace(",", ";").replace("\n", "\r\n")),
        "utf-16 with a byte order mark": file("u.txt", CSV.replace(",", "\t").encode("utf-16")),
        "utf-8 with a byte order mark": file("bom.csv", b"\xef\xbb\xbf" + CSV.encode()),
        "csv.gz": file("runs.csv.gz", gzip.compress(CSV.encode())),
        "jsonl": file("runs.jsonl", lines),
        "jsonl.gz": file("runs.jsonl.gz", gzip.compress(lines.encode())),
        "json list": file("list.json", json.dumps(RECORDS, indent=1)),
        "json columns": file("columns.json", json.dumps(COLUMNS)),
        "parquet": tmp_path / "runs.parquet",
        "parquet by another name": file("mystery", (tmp_path / "runs.parquet").read_bytes()),
        "path as text": str(tmp_path / "runs.csv"),
        "dict": COLUMNS,
        "dict of arrays": {name: np.asarray(values) for name, values in COLUMNS.items()},
        "records": RECORDS,
        "pyarrow": pa.table(COLUMNS),
        "arrow stream": ArrowOnly(pa.table(COLUMNS)),
        "open text": io.StringIO(CSV),
        "open bytes": io.BytesIO(CSV.encode()),
        "only read(size)": Trickle(CSV),
    }


def test_every_source_gives_the_same_runs(tmp_path: Path) -> None:
    for name, source in sources(tmp_path).items():
        runs, notes = read_runs(source)
        for found, expected in ((runs.n, N), (runs.d, D), (runs.loss, LOSS)):
            np.testing.assert_allclose(found, expected, err_msg=name)
        assert (runs.compute, notes) == ("6nd", []), name


def test_pandas_frame(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(COLUMNS)
    assert read_runs(frame)[0].loss.tolist() == LOSS
    with pytest.raises(InputError, match=r"row 1, column 'loss': 'high' is not a number"):
        read_runs(frame.assign(loss=[2.5, "high", 2.4, 2.8]))
    nested = pandas.DataFrame(  # the frame Weights & Biases' own guide builds from its public API
        {
            "summary": [{"loss": loss} for loss in LOSS],
            "config": [{"params": n, "data": {"tokens": d}} for n, d in zip(N, D, strict=True)],
            "name": list("abcd"),
        }
    )
    assert read_runs(nested)[0].d.tolist() == D


def test_nested_columns_of_arrow_and_parquet(tmp_path: Path) -> None:
    configs = [{"params": n, "data": {"tokens": d}} for n, d in zip(N, D, strict=True)]
    table = pa.table({"config": configs, "summary": [{"loss": loss} for loss in LOSS]})
    parquet.write_table(table, tmp_path / "runs.parquet")
    for source in (table, tmp_path / "runs.parquet"):
        runs, _ = read_runs(source)
        assert (runs.n.tolist(), runs.d.tolist(), runs.loss.tolist()) == (N, D, LOSS)


def test_named_pipe_is_read_once(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_text(CSV))
    writer.start()
    runs, _ = read_runs(pipe)
    writer.join()
    assert runs.loss.tolist() == LOSS


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1.3B", 1.3e9), ("275M", 2.75e8), ("2.1e22", 2.1e22), ("1,300,000", 1.3e6), ("1_300_000", 1.3e6),
        ("1 300 000", 1.3e6), ("1.5 ZFLOPs", 1.5e21), ("300 B tokens", 3e11), ("7B params", 7e9), ("12 bn", 1.2e10),
        (" 5e9 ", 5e9), (".5M", 5e5),
    ],
)  # fmt: skip
def test_counts_with_units(text: str, value: float) -> None:
    assert cells.parse(text) == (pytest.approx(value, rel=1e-15), "")


@pytest.mark.parametrize(
    "text", ["1,3", "1.300.000", "1,30,000", "1_3", "6.1e", "6.1E", "0x10", "high", "True", "1.3BB", "--1", "1e", "B"]
)
def test_doubtful_counts_are_no_numbers(text: str) -> None:
    assert "is not a number" in cells.parse(text)[1]


@pytest.mark.parametrize("text", ["0,125B", "1,300B", "0,030", "0,125 M tokens"])
def test_a_comma_that_may_be_decimal_is_asked_about(text: str) -> None:
    whole = text.replace(",", "").lstrip("0")
    assert cells.parse(text)[1] == f"'{text}' is not clear: write {text.replace(',', '.')} or {whole}"
    assert cells.parse("1,300 tokens") == (1300.0, "")
    assert cells.parse("1,300,000M") == (1.3e12, "")


def test_a_loss_has_no_unit_and_no_comma() -> None:
    for text in ("3,25", "3,250", "3M"):
        assert "is not a number" in cells.parse(text, "loss")[1]
    assert cells.parse("0", "oracle") == (0.0, "")
    assert "not positive" in cells.parse("0", "loss")[1]


def test_units_in_column_names_are_used_and_told() -> None:
    table = {"Params (M)": [70, "410M"], "D [billions]": [20, 20], "total_gflops": [1e10, 2e10], "loss": [3.0, 2.5]}
    runs, notes = read_runs(table)
    np.testing.assert_allclose(runs.n, [70e6, 410e6])  # a unit in the cell wins over the column's
    np.testing.assert_allclose(runs.d, [20e9, 20e9])
    np.testing.assert_allclose(runs.c, [1e19, 2e19])
    assert sum("the unit in its name" in note for note in notes) == 3
    runs, _ = read_runs(
        {"size": [70, 410], "toks": [20, 20], "loss": [3.0, 2.5]}, columns={"n": "size:M", "d": "toks:B"}
    )
    np.testing.assert_allclose(runs.n * runs.d, [70e6 * 20e9, 410e6 * 20e9])


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"n": [70, 410], "d": [2e10, 4e10], "loss": [3.0, 2.5]}, "--n COLUMN:M"),
        ({"n": [7e7, 4e8], "d": [20, 40], "loss": [3.0, 2.5]}, "--d COLUMN:B"),
        ({"n": [70, 410], "d": [20, 40], "loss": [3.0, 2.5]}, "--n COLUMN:M --d COLUMN:B"),
        ({"n": [7e7, 4e8], "d": [2e10, 4e10], "loss": [45.0, 30.0]}, "logarithm"),
        ({"n": [7e7, 4e8], "d": [2e10, 4e10], "loss": [3.0, 2.5], "c": [8.4e9, 9.6e10]}, "x 6 N D"),
    ],
)
def test_doubtful_units_are_noted(table: dict[str, list[float]], words: str) -> None:
    assert words in " ".join(read_runs(table)[1])


def test_one_of_n_d_c_is_derived() -> None:
    base = {"loss": [3.0, 2.5], "n": [1e8, 2e8], "d": [1e9, 2e9], "flops": [6e17, 2.4e18]}
    for left_out, kind in (("n", "6nd"), ("d", "6nd"), ("flops", "6nd"), ("", "given")):
        runs, _ = read_runs({name: values for name, values in base.items() if name != left_out})
        np.testing.assert_allclose(runs.n, base["n"])
        np.testing.assert_allclose(runs.d, base["d"])
        np.testing.assert_allclose(runs.c, base["flops"])
        assert runs.compute == kind


def test_columns_that_look_alike_are_told_or_refused() -> None:
    table = {"N": [1e8, 2e8], "params": [1, 2], "d": [1e9, 2e9], "loss": [3.0, 2.5]}
    runs, notes = read_runs(table)
    assert runs.n.tolist() == [1e8, 2e8]
    assert "parameters read from column 'N'; --n chooses another (there is 'params')" in notes
    two = {"n": [1e8], "d": [1e9], "eval/loss": [3.0], "test/loss": [2.5]}
    with pytest.raises(InputError, match="could each be the loss; choose with --loss"):
        read_runs(two)
    assert read_runs(two, columns={"loss": "test/loss"})[0].loss.tolist() == [2.5]
    with pytest.raises(InputError, match="2 columns are named 'loss'"):
        read_runs(io.StringIO("n,d,loss,loss\n1e8,1e9,3,2\n"))
    with pytest.raises(InputError, match="no role 'width'"):
        read_runs(table, columns={"width": "w"})


def test_of_experts_the_active_parameters_are_read_and_told() -> None:
    """The law's N is what one token passes through."""
    for total, active in (
        ("total_params", "active_params"),
        ("params", "Active Parameters (B)"),
        ("config.total_params", "config.active_params"),
    ):
        unit = 1e-9 if "(B)" in active else 1.0
        table = {total: [8e9, 4e9], active: [2e9 * unit, 1e9 * unit], "tokens": [1e11, 2e11], "loss": [2.5, 2.6]}
        runs, notes = read_runs(table)
        assert runs.n.tolist() == pytest.approx([2e9, 1e9])
        told = next(note for note in notes if note.startswith("parameters read"))
        assert told == (
            f"parameters read from column '{active}': of experts the law counts the active ones; "
            f"--n chooses another (there is '{total}')"
        )
        assert read_runs(table, columns={"n": total})[0].n.tolist() == [8e9, 4e9]
    only, notes = read_runs({"n_active": [2e9, 1e9], "tokens": [1e11, 2e11], "loss": [2.5, 2.6]})
    assert (only.n.tolist(), notes) == ([2e9, 1e9], [])


def test_repeated_seeds_are_fine_and_repeated_rows_are_not() -> None:
    head = "n,d,loss,seed\n1e8,1e9,3.0,0\n2e8,1e9,2.9,0\n"
    runs, _ = read_runs(io.StringIO(head + "1e8,1e9,3.01,1\n100M,1e9,3.0,2\n"))
    assert len(runs) == 4
    with pytest.raises(InputError, match=r"line 4 repeats line 2 \(the same N, D, loss, seed and run"):
        read_runs(io.StringIO(head + "100M,1e9,3.0,0\n"))
    runs, notes = read_runs(io.StringIO(head + "100M,1e9,3.0,0\n"), drop_bad=True)
    assert len(runs) == 2
    assert notes == ["dropped 1 of 3 rows: the same N, D, loss, seed and run as an earlier row (line 4)"]
    named = "run,n,d,loss\na,1e8,1e9,3.0\nb,1e8,1e9,3.0\n"
    assert len(read_runs(io.StringIO(named))[0]) == 2  # two runs, by name


def test_bad_rows_are_listed_or_dropped_by_line() -> None:
    text = "n,d,loss\n1e8,1e9,3\n1e8,2e9,nan\n-1,1e9,3\n2e8,0,2.9\n1,300,000,1e9,3\n2e8,4e9,\n3e8,1e9,2.8\n4e8,1e9,x\n"
    with pytest.raises(InputError) as error:
        read_runs(io.StringIO(text))
    for words in (
        "line 3, column 'loss': nan is not finite",
        "line 4, column 'n': -1 is not positive",
        "line 5, column 'd': 0 is not positive",
        "line 6: 5 cells under 3 columns (a number like 1,300,000 needs quotes)",
        "line 7, column 'loss': empty",
        "and 1 more",
        "--drop-bad",
    ):
        assert words in str(error.value)
    runs, notes = read_runs(io.StringIO(text), drop_bad=True)
    assert runs.n.tolist() == [1e8, 3e8]
    assert "dropped 6 of 8 rows" in notes[0]
    assert "column 'loss': 'x' is not a number (line 9)" in notes[0]
    with pytest.raises(InputError, match="none of the 1 rows is usable: line 2"):
        read_runs(io.StringIO("n,d,loss\n1,1,x\n"), drop_bad=True)


def test_standard_errors_and_oracle_are_read_only_where_named() -> None:
    table = {"n": [1e8, 2e8], "d": [1e9, 2e9], "loss": [3.0, 2.5], "se": [0.01, 0.02], "oracle": [1.0, 0.0]}
    assert read_runs(table)[0].se is None
    runs, _ = read_runs(table, columns={"se": "se", "oracle": "oracle"})
    assert runs.se is not None
    assert runs.oracle is not None
    assert (runs.se.tolist(), runs.oracle.tolist()) == ([0.01, 0.02], [1.0, 0.0])
    with pytest.raises(InputError, match="row 1, column 'se': 0 is not positive"):
        read_runs({**table, "se": [0.01, 0]}, columns={"se": "se"})
    with pytest.raises(InputError, match="se must be 2 positive finite"):
        Runs.of([1, 2], [1, 2], [1, 2], se=[1.0])


def test_numbers_out_of_run_names_and_a_side_table() -> None:
    table = {"name": ["lm-n70M-d2B", "lm-n160M-d3.5B"], "loss": [3.0, 2.5]}
    runs, _ = read_runs(table, n_from_name="-n([0-9.]+[MB])", d_from_name="-d([0-9.]+[MB])")
    assert runs.n.tolist() == [70e6, 160e6]
    assert runs.d.tolist() == [2e9, 3.5e9]
    with pytest.raises(InputError, match=r"row 1: --n-from-name finds no number in 'lm-n160M"):
        read_runs(table, n_from_name="n(70M)", d_from_name="-d([0-9.]+[MB])")
    with pytest.raises(InputError, match="one pair of brackets"):
        read_runs(table, n_from_name="n70M", d_from_name="d(.)")
    meta = {"run": ["lm-n160M-d3.5B", "lm-n70M-d2B", "spare"], "params (M)": [160, 70, 1], "tokens": ["3.5B", "2B", 1]}
    runs, notes = read_runs(table, meta=meta)
    assert runs.n.tolist() == [70e6, 160e6]
    assert runs.d.tolist() == [2e9, 3.5e9]
    assert "the side table has 1 runs without losses here: spare" in notes
    odd = {"run": table["name"], "P": [1, 2], "Q": [3, 4], "n": [5, 6], "d": [7, 8]}  # names of either table will do
    runs, _ = read_runs({**table, "T": [1e9, 2e9]}, columns={"n": "P:M", "d": "T"}, meta=odd)
    assert (runs.n.tolist(), runs.d.tolist()) == ([1e6, 2e6], [1e9, 2e9])
    with pytest.raises(InputError, match="no column 'R'"):
        read_runs(table, columns={"n": "R"}, meta=odd)
    with pytest.raises(InputError, match="row 0: not in the side table"):
        read_runs(table, meta={"run": ["x"], "n": [1], "d": [1]})
    with pytest.raises(InputError, match="run 'x' is there twice"):
        read_runs(table, meta={"run": ["x", "x"], "n": [1, 1], "d": [1, 1]})


def test_rows_of_one_run_call_for_a_group() -> None:
    table = {"run": ["a", "a", "b"], "n": [1e8, 1e8, 2e8], "d": [1e9, 2e9, 1e9], "loss": [3.0, 2.9, 2.8]}
    assert any("--group" in note for note in read_runs(table)[1])
    runs, notes = read_runs(table, columns={"group": "run"})
    assert (runs.group.tolist(), notes) == (["a", "a", "b"], [])


def test_further_columns_for_other_laws() -> None:
    table = {"n": [1e8, 2e8], "d": [1e9, 2e9], "loss": [3.0, 2.5], "S": [0.0, 0.75]}
    runs, extra, _ = read_columns(table, {"sparsity": "S"})
    assert len(runs) == 2
    assert extra["sparsity"].tolist() == [0.0, 0.75]
    with pytest.raises(InputError, match="no column 'U'"):
        read_columns(table, {"unique": "U"})


def test_ledger_rows_of_any_source(tmp_path: Path) -> None:
    row = {
        "run": "a", "arm": "early", "size": "s", "seed": 0, "parent": "t", "n": 1000, "tokens": 5e4, "flops": 4e8,
        "flops_6nd": 3e8, "loss_caption": 2.0, "loss_mean": 2.5, "variant": "", "excluded": 0,
    }  # fmt: skip
    rows = [
        row,
        {**row, "run": "b", "n": 2000},
        {**row, "run": "c", "variant": "lr2x"},
        {**row, "run": "d", "excluded": 1},
    ]
    runs, notes = read_runs(pa.Table.from_pylist(rows), domain="caption")
    assert (runs.n.tolist(), runs.compute, runs.group.tolist(), notes) == ([1e3, 2e3], "exact", ["t", "t"], [])
    with pytest.raises(InputError, match=r"row 2, run a, it is in row 0 already"):
        read_runs([*rows[:2], row])
    runs, notes = read_runs([*rows[:2], {**row, "run": "e", "loss_mean": None}], drop_bad=True)
    assert len(runs) == 2
    assert "dropped 1 of 3 rows: column 'loss_mean': empty (row 2)" in notes
    runs, _ = read_runs(rows, columns={"n": "n", "d": "tokens", "loss": "loss_caption"})  # still without tuning runs
    assert len(runs) == 2


def test_published_tables_as_they_are(fitdata: Path) -> None:
    """Column names and faults of real files: a gigaFLOP column, and 21 rows that repeat a loss to 16 digits."""
    raw = fitdata / "open_athena_isoflops/extract/marin_202603/raw/isoflop-comma.csv"
    runs, notes = read_runs(raw, columns={"loss": "eval/paloma/macro_loss"})
    assert 0.9 < np.median(runs.c / (6 * runs.n * runs.d)) < 1.5
    assert any("total_gflops" in note for note in notes)
    misfitting = fitdata / "misfitting/scaling_results_last_ckpt_only.csv"
    with pytest.raises(InputError, match="line 155 repeats line 151"):
        read_runs(misfitting)
    assert len(read_runs(misfitting, drop_bad=True)[0]) == 261 - 21


def test_what_is_no_table_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def file(content: bytes) -> Path:
        (tmp_path / "x").write_bytes(content)
        return tmp_path / "x"

    for content, words in (
        (b"PK\x03\x04...", "spreadsheet"),
        (b"\x00\x01\x02", "binary"),
        (b"PAR1 and no more", "broken parquet"),
        (b"\x1f\x8b\x08 and no more", "broken gzip"),
        (gzip.compress(CSV.encode() * 999)[:-20], "broken gzip"),
        (b'{"n": 1, "d":\n', "neither JSON"),
        (b'{"n": 1}\n{"n": \n', "line 2 is not JSON"),
        (b'{"n": 1}\n[1]\n', "line 2 is no object"),
        (b"[]", "no rows"),
        (b"[1, 2]", "cannot read a list"),
        (b'{"n": [1, 2], "d": [1]}', "unequal length"),
        (b'n,d,loss\n"' + b"1,2\n" * 50_000, "does a quote never close"),
    ):
        with pytest.raises(InputError, match=words):
            read_runs(file(content))
    with pytest.raises(InputError, match="cannot read a float"):
        read_runs(3.0)
    with pytest.raises(InputError, match="parquet cannot be read from a pipe"):
        read_runs(io.BytesIO(b"PAR1"))
    monkeypatch.setattr(collect, "MAX_ROWS", 3)
    with pytest.raises(InputError, match=r"more than 3 rows.*one row per finished run"):
        read_runs(io.StringIO(CSV))
