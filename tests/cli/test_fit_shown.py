"""What `fit` prints and draws: readable when narrow, compared on equal runs, and whole whatever one wild run does."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isofusion.cli.fitshow import si
from isofusion.cli.main import main
from isofusion.laws.holdout import carry_over
from isofusion.laws.rollout import rollout
from isofusion.laws.sensitivity import times
from isofusion.laws.table import Runs
from isofusion.report.words import percent

SIZES, TOKENS = (3e7, 7.5e7, 1.8e8, 4.2e8, 1e9), (1e9, 4e9, 12e9, 36e9)


def table(folder: Path, wild: float = 1.0, at: int = 7) -> Path:
    """20 runs of one law; one loss is `wild` times too high."""
    rng = np.random.default_rng(3)
    lines = ["params,tokens,loss"]
    for n in SIZES:
        for d in TOKENS:
            loss = (1.9 + 320 * n**-0.314 + 1970 * d**-0.338) * np.exp(rng.normal(0, 1e-3))
            lines.append(f"{n:.0f},{d:.0f},{loss * (wild if len(lines) - 1 == at else 1.0):.6f}")
    path = folder / "runs.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def fit(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit) as end:
        main(["fit", *map(str, arguments)])
    assert not end.value.code
    return capsys.readouterr().out


@pytest.mark.parametrize(("wild", "at"), [(3.0, 7), (3.0, 0), (5.0, 7), (10.0, 19)])
@pytest.mark.filterwarnings("error")
def test_a_wild_run_costs_no_page(wild: float, at: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "fit.html"
    out = fit(capsys, table(tmp_path, wild, at), "--compute", "1e21", "--report", page)
    assert "The answer" in out
    text = page.read_text()
    assert "Infinity" not in text
    assert "00000000000" not in text.partition("<svg")[0]  # numbers of a hundred digits


@pytest.fixture
def one_sided(tmp_path: Path) -> Path:
    """20 noisy runs whose FLOPs are not 6 N D: in some draws N* is below all sizes looked at."""
    rng = np.random.default_rng(8)
    lines = ["params,tokens,loss,flops"]
    for n in np.geomspace(3e7, 1e9, 5):
        for d in np.geomspace(1e9, 3e10, 4):
            loss = (1.9 + 260 * n**-0.301 + 1850 * d**-0.335) * np.exp(0.06 * rng.standard_normal())
            lines.append(f"{n:.6g},{d:.6g},{loss:.6g},{(6 * n + 2e8) * d:.6g}")
    path = tmp_path / "runs.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_an_interval_with_one_end_is_told_everywhere(
    one_sided: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was shown as if there were none."""
    asked = (one_sided, "--compute", "1e21", "--bootstrap", "200")
    best = json.loads(fit(capsys, *asked, "--json"))["optimal"][0]
    assert best["n_interval"][0] is None
    assert best["d_interval"][1] is None
    assert best["tokens_per_parameter_interval"][1] is None
    assert None not in best["loss_interval"]
    size, tokens = si(best["n_interval"][1]), si(best["d_interval"][0])
    page = tmp_path / "fit.html"
    out = fit(capsys, *asked, "--report", page)
    assert f"(at most {size})" in out
    assert f"(at least {tokens})" in out
    text = page.read_text()
    assert f"[at most {size}]" in text
    assert f"[at least {tokens}]" in text
    assert "Where the band runs off the axes, that end is not known." in text
    with pytest.raises(SystemExit):
        main(["plan", "--runs", *map(str, asked)])
    assert f"(at most {best['n_interval'][1]:.4g})" in capsys.readouterr().out


def test_an_answer_is_whole_in_a_narrow_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("isofusion.cli.fitshow.WIDTH", 80)
    out = fit(capsys, table(tmp_path), "--compute", "1e21")
    answer = out[out.index("The answer") : out.index("stable")]
    assert "…" not in answer
    assert max(map(len, answer.splitlines())) <= 80
    assert len(re.findall(r"\bto\b", answer)) == 4


@pytest.mark.parametrize("make", [{}, {"wild": 3e5}, {"wild": 1e6, "at": 19}, {"n": 1}, {"rows": 7}])
@pytest.mark.parametrize("more", [[], ["--objective", "l1"]])
@pytest.mark.filterwarnings("error")
def test_no_line_is_over_80_columns_and_none_loses_a_word(
    make: dict[str, float],
    more: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = table(tmp_path, make.get("wild", 1.0), int(make.get("at", 7)))
    lines = path.read_text().splitlines()
    if "n" in make:
        lines[8] = f"{make['n']},{lines[8].partition(',')[2]}"
    if "rows" in make:
        lines = [lines[0], *(lines[i] for i in (1, 2, 5, 7, 10, 12))]
    path.write_text("\n".join(lines) + "\n")
    said = {}
    for width in (80, 200):
        monkeypatch.setenv("COLUMNS", str(width))
        said[width] = fit(capsys, path, "--bootstrap", "100", *more)
        assert max(map(len, said[width].splitlines())) <= width
    assert "…" not in said[80]
    words = {width: sorted(re.findall(r"[^\s─]+", text)) for width, text in said.items()}
    assert words[80] == words[200]  # nothing is cut, no number split
    assert not re.search(r"(?<![.\d])\d{12}|(?<!\d)0\.0000(?!\d)", said[80])


def test_a_factor_is_given_to_three_digits() -> None:
    shown = [times(v) for v in (1.0, 1.174, 27.31, 104.2, 999.4, 1e3, 4.5e268, float("inf"))]
    assert shown == ["1.00", "1.17", "27.3", "104", "999", "over 1000", "over 1000", "over 1000"]


def test_another_objective_does_not_show_the_default_laws_verdict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = table(tmp_path)
    assert "stable at" in fit(capsys, path, "--compute", "1e21")
    out = fit(capsys, path, "--compute", "1e21", "--objective", "l2")
    assert "stable at" not in out
    assert "The default law beside it" in out


def test_a_baseline_stands_beside_the_law_on_its_own_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tokens of the largest size are new for all but one of its runs: there is nothing to carry over."""
    n, d = (x.ravel() for x in np.meshgrid(SIZES, TOKENS, indexing="ij"))
    d = np.where((n == SIZES[-1]) & (d > 1e9), d * 50, d)
    noise = np.where((n == SIZES[-1]) & (d > 1e9), 1.05, 1.0)  # which the law cannot know
    loss = (1.9 + 320 * n**-0.314 + 1970 * d**-0.338) * noise
    found = rollout(Runs.of(n, d, loss), "n", draws=0, steps=1)
    carried: dict[str, Any] = found.to_dict()["baselines"]["carry_over"]
    assert carried["runs"] == 1
    assert carried["law_mae_reducible"] < 0.3 * found.to_dict()["mae_reducible"]
    lines = ["params,tokens,loss", *(f"{a:.0f},{b:.0f},{c:.6f}" for a, b, c in zip(n, d, loss, strict=True))]
    (tmp_path / "runs.csv").write_text("\n".join(lines) + "\n")
    assert ", 1 run)" in fit(capsys, tmp_path / "runs.csv")
    step = json.loads(fit(capsys, tmp_path / "runs.csv", "--json"))["hold_out"]
    assert step["beside_baselines"]["carry_over"]["runs"] == 1


def test_a_law_that_a_baseline_beats_is_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One N of 1 bends the law; the next smaller size's loss then says more than the law does."""
    path = table(tmp_path)
    assert "without the law" not in fit(capsys, path)
    lines = path.read_text().splitlines()
    lines[8] = "1," + lines[8].partition(",")[2]
    path.write_text("\n".join(lines) + "\n")
    page = tmp_path / "fit.html"
    warned = " ".join(fit(capsys, path, "--report", page).partition("The law: L =")[0].split())
    found = json.loads(fit(capsys, path, "--json"))
    step = found["rollout"]["n"]["baselines"]["carry_over"]
    assert step["runs"] == 11
    errors = (
        f"carry over is off by {100 * step['mae_reducible']:.2g} %, the law by {100 * step['law_mae_reducible']:.2g} %"
    )
    said = f"each next size, {errors} on the same 11 runs"
    assert "warning holdout-worse: held-out runs are predicted better without the law: largest size, " in warned
    assert said in warned
    assert found["warnings"][0]["code"] == "holdout-worse"
    assert said in page.read_text()
    assert f"carried over {percent(step['mae_loss'], 2)} (law " in page.read_text()


def test_a_twin_is_no_smaller_size() -> None:
    train = Runs.of(np.array([1e8, 1e8, 2e8, 2e8]), np.array([1e9, 2e9] * 2), np.array([3.0, 2.9, 2.8, 2.7]))
    test = Runs.of(np.array([2.06e8, 2.4e8]), np.array([1e9, 1e9]), np.array([2.8, 2.75]))
    assert carry_over(train, test).tolist() == pytest.approx([3.0, 2.8])


def test_standard_errors_weigh_another_form_and_the_default_law_says_that_they_do_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = table(tmp_path, wild=1.05)
    lines = path.read_text().splitlines()
    errors = ["stderr", *("1.0" if i == 7 else "0.003" for i in range(len(lines) - 1))]
    path.write_text("\n".join(f"{line},{error}" for line, error in zip(lines, errors, strict=True)) + "\n")
    assert "do not weigh the default law's runs" in " ".join(fit(capsys, path, "--se", "stderr").split())
    laws = [
        json.loads(fit(capsys, path, "--form", "chinchilla", "--objective", "l2", *more, "--json"))["law"]["parameters"]
        for more in ([], ["--se", "stderr"])
    ]
    plain, weighed = (abs(law["beta"]["value"] - 0.338) for law in laws)
    assert weighed < 0.2 * plain  # the wild run counts for nothing


def test_seven_runs_are_not_called_stable(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = table(tmp_path)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], *(lines[i] for i in (1, 2, 4, 6, 8, 9, 11))]) + "\n")
    out = " ".join(fit(capsys, path, "--report", tmp_path / "fit.html").split())
    assert "stable at" not in out
    assert "but 2 degrees of freedom can rule out little" in out
    assert "With 2 degrees of freedom they can rule out little." in (tmp_path / "fit.html").read_text()
    assert "stable at" in fit(capsys, table(tmp_path))


def test_resample_chooses_how_intervals_are_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = table(tmp_path)
    plain, rows = (json.loads(fit(capsys, path, "--json", *more)) for more in ([], ["--resample", "row"]))
    assert [x["bootstrap"]["method"] for x in (plain, rows)] == ["hierarchical", "row"]
    assert plain["law"]["objective"] == rows["law"]["objective"]
    assert plain["bootstrap"]["intervals"] != rows["bootstrap"]["intervals"]
    assert plain["digest"] != rows["digest"]
    for wrong, said in ((["--resample", "jackknife"], "choose hierarchical"), (["--form", "chinchilla"], "--resample")):
        with pytest.raises(SystemExit) as end:
            main(["fit", str(path), "--resample", "row", *wrong])
        assert end.value.code == 2
        assert said in capsys.readouterr().err
