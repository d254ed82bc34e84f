"""One rule for the ends of an interval, whoever quotes it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from isofusion.laws.basis import of_fit
from isofusion.laws.bootstrap import bootstrap
from isofusion.laws.derived import at_compute
from isofusion.laws.fit import fit_law
from isofusion.laws.interval import interval
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


def test_plan_and_fit_quote_the_same_interval(simulate: Callable[..., Runs]) -> None:
    """Of the same draws: they differed by two draws at each end, 2.38e9 and 2.414e9 in the documents' example."""
    drawn = bootstrap(fit_law(simulate(np.random.default_rng(0))), 60)
    planned, fitted = make_plan(of_fit(drawn.fit, drawn), compute=1e21).intervals, at_compute(drawn, 1e21)
    for name in ("n", "d", "tokens_per_parameter", "loss"):
        assert planned[name] == pytest.approx((float(fitted[name].low), float(fitted[name].high)), rel=1e-6)
