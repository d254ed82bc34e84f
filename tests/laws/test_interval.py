"""One rule for the ends of an interval, whoever quotes it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from isofusion.laws.basis import of_fit
from isofusion.laws.bootstrap import bootstrap
from isofusion.laws.derived import at_compute
from isofusion.laws.fit import fit_law
from isofusion.laws.formanalysis import _answer
from isofusion.laws.formfit import fit_form
from isofusion.laws.frontier import Cost
from isofusion.laws.interval import ends, interval, known
from isofusion.laws.plan import make_plan
from isofusion.laws.table import Runs

inf, nan = np.inf, np.nan


def test_finite_draws_have_linear_percentiles() -> None:
    draws = np.random.default_rng(0).standard_normal((57, 3))
    low, high = interval(draws, 0.9)
    np.testing.assert_allclose([low, high], np.quantile(draws, [0.05, 0.95], axis=0), rtol=1e-12)
    assert [float(v) for v in interval(draws[:, 0], 0.9)] == [low[0], high[0]]


def test_failed_draws_widen_both_sides_and_too_many_leave_no_bound() -> None:
    draws = np.arange(1.0, 101.0)
    low, high = interval(draws, 0.9)
    some = np.concatenate([draws, [nan, nan]])
    assert interval(some, 0.9)[0] < low < high < interval(some, 0.9)[1]
    many = np.concatenate([draws, [nan] * 6])
    assert [float(v) for v in interval(many, 0.9)] == [-inf, inf]
    table = np.column_stack([np.concatenate([draws, [200.0, 201.0]]), some])
    assert (interval(table, 0.9)[1][0], interval(table, 0.9)[1][1]) == (
        interval(table[:, 0], 0.9)[1],
        interval(some, 0.9)[1],
    )


@pytest.mark.parametrize("side", [-1.0, 1.0])
def test_infinite_draws_take_the_bound_of_their_side_only(side: float) -> None:
    draws = np.concatenate([np.arange(1.0, 96.0), [side * inf] * 5])
    low, high = (float(v) for v in interval(draws, 0.9))
    assert (np.isinf(low), np.isinf(high)) == (side < 0, side > 0)
    draws = np.concatenate([np.arange(1.0, 98.0), [side * inf] * 3])
    assert np.isfinite(interval(draws, 0.9)).all()


@pytest.mark.parametrize(
    ("low", "high", "written", "said"),
    [
        (1.0, 2.5, [1.0, 2.5], "1 to 2.5"),
        (-np.inf, 2.5, [None, 2.5], "at most 2.5"),
        (1.0, np.inf, [1.0, None], "at least 1"),
        (-np.inf, np.inf, None, "no bound"),
        (np.nan, 2.5, [None, 2.5], "at most 2.5"),
    ],
)
def test_one_end_is_said_where_only_one_is_known(
    low: float, high: float, written: list[float | None] | None, said: str
) -> None:
    assert ends(low, high) == written
    assert known(written or [None, None], "{:g}".format) == said


@pytest.mark.parametrize(("gone", "low"), [("A", True), ("B", False)])
def test_another_laws_answer_knows_the_side_of_draws_without_optimum(
    gone: str, low: bool, simulate: Callable[..., Runs]
) -> None:
    """A term all but gone in 10 % of draws: N* is below (above) every size looked at. Both ends had been dropped."""
    runs = simulate(np.random.default_rng(0))
    fit = fit_form({"n": runs.n, "d": runs.d, "loss": runs.loss}, "p-norm")
    drawn = {name: value * np.linspace(0.99, 1.01, 100) for name, value in fit.params.items()}
    drawn[gone][::10] = 1e-9
    row = _answer(fit, drawn, Cost.of(runs), 1e20, runs)
    assert row is not None
    assert [end is None for end in row["n_interval"]] == [low, not low]
    assert [end is None for end in row["d_interval"]] == [not low, low]
    assert [end is None for end in row["tokens_per_parameter_interval"]] == [not low, low]
    assert None not in row["loss_interval"]


def test_plan_and_fit_quote_the_same_interval(simulate: Callable[..., Runs]) -> None:
    """Of the same draws: they differed by two draws at each end, 2.38e9 and 2.414e9 in the documents' example."""
    drawn = bootstrap(fit_law(simulate(np.random.default_rng(0))), 60)
    planned, fitted = make_plan(of_fit(drawn.fit, drawn), compute=1e21).intervals, at_compute(drawn, 1e21)
    for name in ("n", "d", "tokens_per_parameter", "loss"):
        assert planned[name] == pytest.approx((float(fitted[name].low), float(fitted[name].high)), rel=1e-6)
