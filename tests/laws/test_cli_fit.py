"""`isofusion fit` on its own app, as main.py mounts it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from isofusion.cli.fit import command
from isofusion.errors import InputError
from isofusion.laws.table import Runs

app = typer.Typer()
app.command()(command)


@pytest.fixture
def table(tmp_path: Path, simulate: Callable[..., Runs]) -> Path:
    runs = simulate(np.random.default_rng(0), seeds=(2, 1, 1, 1, 1, 2))
    rows = zip(runs.n, runs.d, runs.loss, runs.group, runs.size, runs.seed, strict=True)
    path = tmp_path / "runs.csv"
    path.write_text("n,d,loss,trunk,size,seed\n" + "".join(",".join(map(str, r)) + "\n" for r in rows))
    return path


def test_json_holds_the_answer(table: Path) -> None:
    out = CliRunner().invoke(
        app,
        [str(table), "--group", "trunk", "--compute", "1e21", "--bootstrap", "100", "--json"],
        catch_exceptions=False,
    )
    assert out.exit_code == 0
    result = json.loads(out.stdout)
    best = result["optimal"][0]
    assert 6 * best["n"] * best["d"] == pytest.approx(1e21)
    assert best["n_interval"][0] < best["n"] < best["n_interval"][1]
    assert result["allocation"]["regression"]["a"] == pytest.approx(result["allocation"]["closed_form"]["a"], abs=0.005)
    assert "repeated seeds" in result["bootstrap"]["note"]
    assert result["hold_out"]["mae_reducible"] < 0.1


def test_text_names_parameters_and_warnings(table: Path) -> None:
    out = CliRunner().invoke(app, [str(table), "--compute", "1e26", "--bootstrap", "50"], catch_exceptions=False)
    assert out.exit_code == 0
    for word in ("alpha", "tokens per parameter", "warning extrapolation", "held out", "carry over"):
        assert word in out.stdout


def test_bad_tables_raise_input_errors(tmp_path: Path, table: Path) -> None:
    bad = tmp_path / "bad.csv"
    bad.write_text("n,d,loss\n1e8,1e9,x\n")
    with pytest.raises(InputError, match="line 2"):
        CliRunner().invoke(app, [str(bad)], catch_exceptions=False)
    with pytest.raises(InputError, match="positive FLOPs"):
        CliRunner().invoke(app, [str(table), "--compute", "-1"], catch_exceptions=False)


def test_fitting_never_imports_torch(table: Path) -> None:
    code = (
        "import sys; from isofusion.cli import fit; from isofusion.laws import compare, holdout, table;"
        f"runs = table.Runs.from_csv({str(table)!r});"
        "holdout.hold_out(runs, holdout.largest_size(runs), draws=20, grid=4); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
