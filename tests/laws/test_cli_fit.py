"""`isofusion fit` on its own app, as main.py mounts it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


@pytest.fixture
def study(tmp_path: Path, simulate: Callable[..., Runs]) -> Path:
    """A study folder with two arms, tuning and excluded runs, as the ledger writes it (text loss absent)."""
    lines = ["run,arm,size,seed,parent,n,tokens,flops,flops_6nd,loss_caption,loss_text,loss_mean,variant,excluded"]
    for arm, gain in (("early", 1.0), ("late", 1.3)):
        runs = simulate(np.random.default_rng(1), sizes=4, budgets=4, seeds=(1,) * 4, gain=gain)
        for i in range(len(runs)):
            n, d, loss = float(runs.n[i]), float(runs.d[i]), float(runs.loss[i])
            cells = [f"{arm}-{i}", arm, runs.size[i], 0, f"{arm}-{runs.group[i]}", n, d, 7 * n * d, 6 * n * d, loss]
            lines += [",".join(map(str, [*cells, "", loss + 0.1, *end])) for end in (("", 0), ("", 1), ("lr2x", 0))]
    (tmp_path / "results.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


def fit(*arguments: object) -> dict[str, Any]:
    asked = [*map(str, arguments), "--bootstrap", "0", "--json"]
    out = CliRunner().invoke(app, asked, catch_exceptions=False)
    result: dict[str, Any] = json.loads(out.stdout)
    return result


def test_an_arm_and_a_domain_of_a_study(study: Path) -> None:
    caption = fit(study, "--arm", "early", "--domain", "caption")
    assert caption["law"]["label"] == "early / caption"
    assert (caption["law"]["runs"], caption["law"]["compute"]) == (16, "exact")  # no tuning, no excluded runs
    assert caption["input"]["note"] is None
    mean = fit(study / "results.csv", "--arm", "early", "--compute-axis", "6nd")
    assert (mean["law"]["label"], mean["law"]["compute"]) == ("early / mean", "6nd")
    assert "no --domain given" in mean["input"]["note"]
    assert mean["law"]["E"] == pytest.approx(caption["law"]["E"] + 0.1, abs=0.03)
    shown = CliRunner().invoke(
        app, [str(study), "--arm", "late", "--bootstrap", "20", "--compute", "1e20"], catch_exceptions=False
    )
    for words in ("late / mean", "no --domain given", "interval not available", "too-few-sizes"):
        assert words in shown.stdout


def test_arms_are_never_mixed(study: Path, table: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="2 arms; choose one with --arm: early, late"):
        fit(study)
    with pytest.raises(InputError, match="choose with --arm and --domain"):
        fit(study / "results.csv", "--loss", "loss_caption", "--group", "parent")
    with pytest.raises(InputError, match="arms with runs: early, late"):
        fit(study, "--arm", "moe")
    with pytest.raises(InputError, match="run early-0, column 'loss_text': empty"):
        fit(study, "--arm", "early", "--domain", "text")
    with pytest.raises(InputError, match="choose caption, interleaved"):
        fit(study, "--arm", "early", "--domain", "video")
    with pytest.raises(InputError, match="choose exact or 6nd"):
        fit(study, "--arm", "early", "--compute-axis", "flops")
    with pytest.raises(InputError, match="fix the columns already"):
        fit(study, "--arm", "early", "--loss", "loss_caption")
    with pytest.raises(InputError, match="this is another table"):
        fit(table, "--arm", "early")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no results\.csv"):
        fit(tmp_path / "empty")


def test_fitting_never_imports_torch(table: Path) -> None:
    code = (
        "import sys; from isofusion.cli import fit; from isofusion.laws import compare, holdout, table;"
        f"runs = table.Runs.from_csv({str(table)!r});"
        "holdout.hold_out(runs, holdout.largest_size(runs), draws=20, grid=4); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
