"""Mixture laws: exact gradients, the best shares against a brute-force simplex, and fits of planted laws."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from isofusion.cli import main as cli
from isofusion.errors import InputError
from isofusion.laws.mixture import MixtureLaw, optimal_mixture
from isofusion.laws.mixture_fit import fit_mixture, least_mixtures, read_mixtures

C, G = np.array([1.0, 4.0, 2.0]), np.array([0.3, 0.5, 0.4])
ADDITIVE = MixtureLaw("additive", 1.7, C, G, 0.3, 0.33, A=260.0, B=1850.0)
JOINT = MixtureLaw(
    "joint", 1.7, C, G, 0.3, 0.33, P=np.array([2e7, 9e7, 5e7]), Q=np.array([1e9, 3e9, 9e8]), gA=0.3, gB=0.33
)


def design(mixtures: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """n, d [m] and shares [m, 3]: every mixture at 5 of 3 sizes x 3 token counts."""
    shares = np.random.default_rng(seed).dirichlet(np.full(3, 2.0), mixtures)
    scales = ((1e8, 2e10), (1e8, 1e11), (3e8, 5e10), (9e8, 2e10), (9e8, 1e11))
    rows = [(n, d, h) for h in shares for n, d in scales]
    return np.array([r[0] for r in rows]), np.array([r[1] for r in rows]), np.array([r[2] for r in rows])


@pytest.mark.parametrize("law", [ADDITIVE, JOINT], ids=["additive", "joint"])
def test_gradient_is_exact(law: MixtureLaw) -> None:
    for h in np.random.default_rng(1).dirichlet(np.full(3, 3.0), 5):
        step = 1e-6
        numeric = [
            (law.predict(1e9, 1e11, h + step * e) - law.predict(1e9, 1e11, h - step * e)) / (2 * step)
            for e in np.eye(3)
        ]
        assert law.gradient(1e9, 1e11, h) == pytest.approx(np.array(numeric), rel=1e-6)


@pytest.mark.parametrize("law", [ADDITIVE, JOINT], ids=["additive", "joint"])
def test_best_shares_beat_the_whole_simplex(law: MixtureLaw) -> None:
    best = optimal_mixture([law], 1e9, 1e11)
    grid = np.array([(i, j, 200 - i - j) for i in range(201) for j in range(201 - i)]) / 200.0
    losses = law.predict(1e9, 1e11, grid)
    assert best.objective <= losses.min() + 1e-12
    assert best.shares == pytest.approx(grid[losses.argmin()], abs=0.006)
    assert best.shares.sum() == pytest.approx(1.0)
    assert best.residual < 1e-7
    assert best.objective < best.uniform


def test_additive_optimum_ignores_scale_and_joint_does_not() -> None:
    small, large = (optimal_mixture([ADDITIVE], n, d).shares for n, d in ((1e8, 1e10), (1e11, 1e13)))
    assert small == pytest.approx(large, abs=1e-6)
    small, large = (optimal_mixture([JOINT], n, d).shares for n, d in ((1e8, 1e10), (1e11, 1e13)))
    assert np.abs(small - large).max() > 0.02


def test_weights_and_floor() -> None:
    other = MixtureLaw("additive", 1.5, C[::-1].copy(), G, 0.3, 0.33, A=200.0, B=1500.0)
    first = optimal_mixture([ADDITIVE, other], 1e9, 1e11, weights=[1, 0]).shares
    assert first == pytest.approx(optimal_mixture([ADDITIVE], 1e9, 1e11).shares, abs=1e-6)
    both = optimal_mixture([ADDITIVE, other], 1e9, 1e11, weights=[1, 1])
    assert both.objective == pytest.approx(float(both.losses.mean()))
    held = optimal_mixture([ADDITIVE], 1e9, 1e11, floor=0.2).shares
    assert held.min() >= 0.2 - 1e-9
    useless = MixtureLaw("additive", 1.5, np.array([1.0, 0.0, 2.0]), G, 0.3, 0.33, A=200.0, B=1500.0)
    assert optimal_mixture([useless], 1e9, 1e11).shares[1] == pytest.approx(0.0, abs=1e-8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"laws": []}, "laws over the same domains"),
        ({"weights": [-1.0]}, "weights"),
        ({"floor": 0.4}, "below 0.333"),
        ({"n": 0.0}, "positive parameters"),
    ],
)
def test_bad_questions(arguments: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        optimal_mixture(**{"laws": [ADDITIVE], "n": 1e9, "d": 1e11, **arguments})


@pytest.mark.parametrize(
    ("law", "tolerance"),
    [(ADDITIVE, 2e-3), pytest.param(JOINT, 2e-3, marks=pytest.mark.slow)],
    ids=["additive", "joint"],
)
def test_a_planted_law_gives_its_best_mixture(law: MixtureLaw, tolerance: float) -> None:
    """From 12 mixtures with 0.05 % noise: what the fitted law recommends costs at most 0.002 nats under the truth."""
    n, d, h = design(12)
    noise = np.exp(5e-4 * np.random.default_rng(2).standard_normal(len(n)))
    fit = fit_mixture(n, d, h, law.predict(n, d, h) * noise, kind=law.kind, starts=32)
    assert fit.mre < 8e-4
    fresh = np.random.default_rng(3).dirichlet(np.full(3, 2.0), 50)
    assert fit.law.predict(2e9, 2e11, fresh) == pytest.approx(law.predict(2e9, 2e11, fresh), rel=6e-3)
    best = optimal_mixture([fit.law], 2e9, 2e11)
    regret = float(law.predict(2e9, 2e11, best.shares)) - optimal_mixture([law], 2e9, 2e11).objective
    assert 0 <= regret + 1e-12 < tolerance


def test_too_few_mixtures_are_refused() -> None:
    assert least_mixtures(3) == 10
    n, d, h = design(9)
    with pytest.raises(InputError, match=r"9 .*mixtures of 3 domains.* 1 or more"):
        fit_mixture(n, d, h, ADDITIVE.predict(n, d, h))
    n, d, h = design(10)
    with pytest.raises(InputError, match="sum to"):
        fit_mixture(n, d, 0.9 * h, ADDITIVE.predict(n, d, h))
    with pytest.raises(InputError, match="additive or joint"):
        fit_mixture(n, d, h, ADDITIVE.predict(n, d, h), kind="cubic")  # type: ignore[arg-type]


def write(path: Path, mixtures: int, per_cent: bool = False) -> Path:
    n, d, h = design(mixtures)
    noise = np.exp(3e-4 * np.random.default_rng(2).standard_normal((2, len(n))))
    losses = [ADDITIVE.predict(n, d, h) * noise[0], (ADDITIVE.predict(n, d, h) + 0.3) * noise[1]]
    lines = ["n,d,h_caption,h_interleaved,h_text,loss_caption,loss_text"]
    shares = 100 * h if per_cent else h
    lines += [",".join(map(str, (n[i], d[i], *shares[i], losses[0][i], losses[1][i]))) for i in range(len(n))]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_table_of_mixtures(tmp_path: Path) -> None:
    table = read_mixtures(write(tmp_path / "mix.csv", 11))
    assert table.domains == ("caption", "interleaved", "text")
    assert (table.rows, table.mixtures) == (55, 11)
    assert set(table.losses) == {"caption", "text"}
    same = read_mixtures(write(tmp_path / "per-cent.csv", 11, per_cent=True))
    assert same.shares == pytest.approx(table.shares)
    told = table.warnings(np.array([0.99, 0.005, 0.005]), 1e12, 1e11)
    assert any("share of caption" in text for text in told)
    assert any("N = 1e+12" in text for text in told)


def test_bad_tables_name_the_line(tmp_path: Path) -> None:
    path = tmp_path / "mix.csv"
    for text, message in (
        ("", "needs columns"),
        ("n,d,h_a,loss\n1,1,1,2\n", "needs columns"),
        ("n,d,h_a,h_b,loss\n1e8,1e10,0.5,half,3\n", "line 2, column 'h_b': 'half' is not a number"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            read_mixtures(path)
    with pytest.raises(InputError, match="no such file"):
        read_mixtures(tmp_path / "none.csv")


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "mix.csv", 11)
    asked = ["plan", "--mixtures", str(path), "--n", "1B", "--d", "100B", "--target", "caption=1"]
    with pytest.raises(SystemExit) as ended:
        cli.main([*asked, "--bootstrap", "20", "--json"])
    assert not ended.value.code
    result = json.loads(capsys.readouterr().out)
    assert sum(result["shares"].values()) == pytest.approx(1.0)
    truth = optimal_mixture([ADDITIVE], 1e9, 1e11)
    found = np.array(list(result["shares"].values()))
    assert float(ADDITIVE.predict(1e9, 1e11, found)) == pytest.approx(truth.objective, abs=0.003)
    assert result["objective"] <= min(result["uniform"], result["best_seen"]) + 1e-9
    for name, share in result["shares"].items():
        low, high = result["intervals"][name]
        assert low - 0.02 <= share <= high + 0.02
    few = write(tmp_path / "few.csv", 9)
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan", "--mixtures", str(few), "--n", "1B", "--d", "100B"])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "9" in error
    assert "mixtures of 3 domains" in error
