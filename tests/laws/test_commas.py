"""Decimal commas and thousands: a column is read as its clear cells say, and refused where they do not."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isofusion.errors import InputError
from isofusion.laws.tables.commas import settle
from isofusion.laws.tables.readers import read_runs


@pytest.mark.parametrize(
    ("column", "values", "told"),
    [
        (["0,125B", "1,300B", "7B"], [1.25e8, 1.3e9, 7e9], "commas are decimal marks, as '0,125B' shows"),
        (["3,14B", "1,300 tokens"], [3.14e9, 1.3], "commas are decimal marks, as '3,14B' shows"),
        (["1.250,5", "1.300", "2,5"], [1250.5, 1300, 2.5], "dots separate thousands, as '1.250,5' shows"),
        (["1.250.000", "300.000"], [1.25e6, 3e5], "dots separate thousands, as '1.250.000' shows"),
        (["1 250,5 M", "12 000"], [1.2505e9, 12_000], "commas are decimal marks, as '1 250,5 M' shows"),
        (["1,3e9", "2,750e9"], [1.3e9, 2.75e9], "commas are decimal marks, as '1,3e9' shows"),
        (["1,250,000", "1,300B"], [1.25e6, 1.3e12], "commas separate thousands, as '1,250,000' shows"),
        (["1,250.5", "1,300 M"], [1250.5, 1.3e9], "commas separate thousands, as '1,250.5' shows"),
    ],
)
def test_a_clear_cell_settles_its_column(column: list[str], values: list[float], told: str) -> None:
    rows = len(column)
    runs, notes = read_runs({"params": column, "d": [f"{i + 1}B" for i in range(rows)], "loss": [3.0] * rows})
    np.testing.assert_allclose(runs.n, values, rtol=1e-12)
    assert any(note.startswith("column 'params': ") and note.endswith(told) for note in notes), notes


def test_a_loss_may_have_decimal_commas_that_are_clear() -> None:
    runs, notes = read_runs({"n": [1e8, 2e8], "d": [1e9, 2e9], "loss": ["3,1416", "2,900"]})
    assert runs.loss.tolist() == [3.1416, 2.9]
    assert "column 'loss': commas are decimal marks, as '3,1416' shows" in notes


@pytest.mark.parametrize(
    ("role", "column", "refused"),
    [
        ("params", ["1,300B", "1,500B"], "'1,300B' is not clear"),  # nothing settles it
        ("params", ["0,125B", "1.3B"], "'0,125B' is not clear"),  # both marks: somebody wrote two conventions
        ("params", ["0,125B", "1.300B"], "'0,125B' is not clear"),  # 1.3 or 1,300 billion
        ("params", ["0,125B", "1,250,000"], "'0,125B' is not clear"),
        ("params", ["3,14", "1.250"], "'3,14' is not a number"),
        ("params", ["1,30,000", "1,300B"], "'1,30,000' is not a number"),
        ("params", ["12.34,5B", "0,125B"], "'12.34,5B' is not a number"),
        ("loss", ["3.01,5", "3,14"], "'3.01,5' is not a number"),  # no 301.5
        ("loss", ["3,250", "3,125"], "write 3.25, not 3,25"),
        ("loss", ["3,25", "1.250"], "write 3.25, not 3,25"),
        ("loss", ["1,250,000", "3.5"], "write 3.25, not 3,25"),
    ],
)
def test_what_stays_unclear_is_refused(role: str, column: list[str], refused: str) -> None:
    table: dict[str, Any] = {"params": [1e8, 2e8], "d": [1e9, 2e9], "loss": [3.0, 2.9]} | {role: column}
    with pytest.raises(InputError, match=f"row 0, column '{role}': .*{refused}"):
        read_runs(table)


def test_plain_columns_are_not_touched_and_nothing_is_said() -> None:
    for cells in (["1.3B", "275M"], ["1,300,000", "2,600"], [1.3e9, 2.6e9], ["1.250", "3"]):
        notes: list[str] = []
        found = settle(cells, "n", "params", notes)
        assert [str(v).replace(",", "") for v in found] == [str(v).replace(",", "") for v in cells]
        assert notes == []


def test_a_german_spreadsheet(tmp_path: Path) -> None:
    """Semicolons between cells, decimal commas in all columns, the unit in a header; and in a side table."""
    (tmp_path / "runs.csv").write_text("run;Params (M);tokens;loss\na;0,5;1.000.000,0;3,25\nb;1,250;2.000.000;3,125\n")
    runs, notes = read_runs(tmp_path / "runs.csv")
    np.testing.assert_allclose(runs.n, [5e5, 1.25e6])
    np.testing.assert_allclose(runs.d, [1e6, 2e6])
    assert runs.loss.tolist() == [3.25, 3.125]
    assert sum("commas are decimal marks" in note for note in notes) == 3
    (tmp_path / "meta.csv").write_text("run;params\na;0,125B\nb;1,300B\n")
    runs, _ = read_runs(tmp_path / "runs.csv", columns={"n": "params"}, meta=tmp_path / "meta.csv")
    np.testing.assert_allclose(runs.n, [1.25e8, 1.3e9])


def test_lines_that_end_in_carriage_returns_alone() -> None:
    text = 'n,d,loss,note\r1e8,1e9,3.0,a\r\r2e8,1e9,2.9,"b\rc"\r3e8,1e9,nan,d\r'
    runs, notes = read_runs(io.BytesIO(text.encode()), drop_bad=True)
    assert runs.n.tolist() == [1e8, 2e8]
    assert notes == ["dropped 1 of 3 rows: column 'loss': nan is not finite (line 6)"]
    with pytest.raises(InputError, match="line 6, column 'loss'"):
        read_runs(io.BytesIO(text.encode()))
