"""`isofusion fit` from the shell: what it prints, JSON with a digest, other laws and objectives, the page."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from isofusion.cli.fit import command
from isofusion.cli.main import main
from isofusion.errors import InputError

app = typer.Typer()
app.command()(command)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five sizes x five budgets of a known law, a little noisy."""
    rng = np.random.default_rng(3)
    lines = ["params,tokens,loss,experts"]
    for n in np.geomspace(2e7, 1e9, 5):
        for d in np.geomspace(1e9, 3e10, 5):
            loss = (1.9 + 260 / n**0.30 + 1850 / d**0.335) * np.exp(0.001 * rng.standard_normal())
            lines.append(f"{n:.0f},{d:.0f},{loss:.6f},8")
    path = tmp_path_factory.mktemp("fit") / "runs.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def run(*arguments: object) -> str:
    out = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert out.exit_code == 0
    return out.stdout


def as_json(*arguments: object) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run(*arguments, "--json"))
    return found


def test_sections_come_in_the_order_of_need(table: Path) -> None:
    text = run(table, "--compute", "1e21", "--bootstrap", "40")
    places = [
        text.index(words)
        for words in ("The answer", "The law: L =", "Does it predict", "How far the answer moves", "How it was found")
    ]
    assert places == sorted(places)
    for words in ("each next size", "least squares", "as fitted", "starts end there", "digest"):
        assert words in text


def test_a_spread_above_two_is_undetermined(table: Path, tmp_path: Path) -> None:
    steady = as_json(table, "--bootstrap", "0")["sensitivity"]
    assert not steady["undetermined"]
    assert steady["spread"] < 2.0
    rows = table.read_text().splitlines()
    wild = [f"{r.rsplit(',', 2)[0]},{float(r.split(',')[2]) * (1 + 0.3 * (i % 6 == 0)):.5f},8" for i, r in
            enumerate(rows[1:])]  # fmt: skip
    path = tmp_path / "wild.csv"
    path.write_text("\n".join([rows[0], *wild]) + "\n")
    assert "undetermined" in run(path, "--bootstrap", "0")


def test_the_digest_follows_input_and_options(table: Path, tmp_path: Path) -> None:
    first = as_json(table, "--bootstrap", "0")
    assert len(first["digest"]) == 64
    assert as_json(table, "--bootstrap", "0", "--delta", "0.01")["digest"] != first["digest"]
    other = tmp_path / "runs.csv"
    other.write_text(table.read_text().replace("params,tokens", "n,d"))
    assert as_json(other, "--bootstrap", "0")["digest"] == first["digest"]  # the same runs by other names


def test_objectives_and_laws_by_name(table: Path) -> None:
    default = as_json(table, "--bootstrap", "0")["law"]
    for name in ("l1", "log-l2", "l2", "asymmetric"):
        law = as_json(table, "--bootstrap", "0", "--objective", name)["law"]
        assert law["parameters"]["alpha"]["value"] == pytest.approx(default["alpha"], rel=0.15)
    pnorm = as_json(table, "--bootstrap", "20", "--form", "p-norm", "--compute", "1e21")
    best = pnorm["optimal"][0]
    assert 6 * best["n"] * best["d"] == pytest.approx(1e21)
    assert best["n_interval"][0] <= best["n"] <= best["n_interval"][1]
    assert "The law: loss =" in run(table, "--bootstrap", "0", "--form", "p-norm")
    with pytest.raises(InputError, match="--column sparsity"):
        run(table, "--form", "sparsity")
    with pytest.raises(InputError, match="the laws are chinchilla"):
        run(table, "--form", "nonsense")
    with pytest.raises(InputError, match="choose huber"):
        run(table, "--objective", "nonsense")


def test_wrong_options_are_refused(table: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a folder that exists"):
        run(table, "--report", tmp_path / "none" / "fit.html")
    with pytest.raises(InputError, match="drop --form"):
        run(table, "--form", "p-norm", "--report", tmp_path / "fit.html")
    with pytest.raises(InputError, match="projection or paper"):
        run(table, "--starts", "nonsense")


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_the_answer_is_out_before_the_page_is_begun(
    table: Path, tmp_path: Path, more: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("isofusion.report.fitpage.os.replace", full_disk)
    page = tmp_path / "fit.html"
    with pytest.raises(SystemExit) as end:
        main(["fit", str(table), "--bootstrap", "40", "--report", str(page), *more])
    said = capsys.readouterr()
    assert end.value.code == 1
    assert said.err == f"error: --report {page}: No space left on device; the answer above is whole\n"
    assert json.loads(said.out)["optimal"] if more else "How it was found" in said.out
    assert list(tmp_path.iterdir()) == []  # no half page


def test_the_page_is_written_without_torch(table: Path, tmp_path: Path) -> None:
    page = tmp_path / "fit.html"
    code = (
        "import sys; from isofusion.cli.main import main\n"
        f"main(['fit', {str(table)!r}, '--bootstrap', '60', '--report', {str(page)!r}])\n"
    ).replace("main([", "sys.argv=['isofusion']\ntry:\n    main([") + (
        "except SystemExit as end:\n    assert not end.code\nsys.exit(3 if 'torch' in sys.modules else 0)"
    )
    out = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert page.read_text().startswith("<!doctype html>")
    assert "report:" in out.stdout
