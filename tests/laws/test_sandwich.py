"""Standard errors that know their measure: known variances of a mean and a median, wild rows, Epoch's bootstrap."""

from __future__ import annotations

import numpy as np
import pytest

from isofusion.laws.fit import fit_form, fit_law
from isofusion.laws.solve.criterion import Criterion
from isofusion.laws.solve.sandwich import sandwich
from isofusion.laws.table import Runs

ROWS, NOISE = 4000, 0.01


def of_a_constant(criterion: Criterion, wild: float = 0.0) -> float:
    """The standard error of one constant fitted to ROWS normal log losses around 0, in units of NOISE / sqrt(ROWS)."""
    log_loss = NOISE * np.random.default_rng(0).standard_normal(ROWS)
    log_loss[:3] += wild
    found = sandwich(np.ones((1, ROWS)), np.zeros(ROWS), log_loss, criterion)
    return float(found[0]) / (NOISE / np.sqrt(ROWS))


def test_a_mean_and_a_median_have_their_own_error() -> None:
    assert of_a_constant(Criterion("log-squares")) == pytest.approx(1.0, rel=0.03)
    median = np.sqrt(np.pi / 2)  # 1 / (2 f(0))
    for criterion in (Criterion("l1"), Criterion("huber", 1e-5)):
        assert of_a_constant(criterion) == pytest.approx(median, rel=0.12)  # the window is wide
    assert of_a_constant(Criterion("huber", 1.0)) == pytest.approx(1.0, rel=0.03)  # no residual reaches its corner


def test_wild_rows_move_the_error_of_squares_alone() -> None:
    assert of_a_constant(Criterion("log-squares"), wild=10.0) > 10.0
    for criterion in (Criterion("l1"), Criterion("huber", 1e-3)):
        assert of_a_constant(criterion, wild=10.0) == pytest.approx(of_a_constant(criterion), rel=0.02)


def test_weights_count_and_rows_that_fix_nothing_have_no_error() -> None:
    rows, log_loss = np.ones((1, ROWS)), NOISE * np.random.default_rng(0).standard_normal(ROWS)
    half = np.arange(ROWS) < ROWS // 2
    weighed = sandwich(rows, np.zeros(ROWS), log_loss, Criterion("log-squares"), half.astype(float))
    assert float(weighed[0]) == pytest.approx(NOISE / np.sqrt(half.sum()), rel=0.05)
    same = np.repeat(rows, 2, axis=0)
    found = sandwich(same, np.zeros(ROWS), log_loss, Criterion("l1"))
    assert not (found < 1.0).any()
    assert np.isnan(sandwich(np.ones((2, 2)), np.zeros(2), np.zeros(2), Criterion())).all()


def test_one_wild_run_makes_no_exponent_flat() -> None:
    rng = np.random.default_rng(3)
    n, d = (v.ravel() for v in np.meshgrid(np.geomspace(3e7, 1e9, 5), np.geomspace(1e9, 3.6e10, 4)))
    loss = (1.9 + 320 * n**-0.314 + 1970 * d**-0.338) * np.exp(rng.normal(0, 1e-3, len(n)))
    loss[7] *= 3e5
    fit = fit_law(Runs.of(n, d, loss))
    assert fit.alpha == pytest.approx(0.314, abs=0.02)
    assert "flat" not in [w.code for w in fit.warnings]


def test_errors_of_epochs_rows_are_those_of_their_bootstrap(epoch240: Runs) -> None:
    """The converged bootstrap of 4,000 resamples (fitdata/README.md)."""
    fit = fit_form({"n": epoch240.n, "d": epoch240.d, "loss": epoch240.loss}, "chinchilla")
    for name, deviation in (("E", 0.025657), ("A", 124.494), ("alpha", 0.015397), ("beta", 0.020594)):
        assert fit.errors[name] == pytest.approx(deviation, rel=0.3), name
    assert "independent" in fit.to_dict()["errors"]
