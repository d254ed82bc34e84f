from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from isofusion.errors import InputError
from isofusion.laws.bootstrap import Intervals, bootstrap
from isofusion.laws.derived import allocation, answer, at_compute, loss_at
from isofusion.laws.fit import fit_law
from isofusion.laws.frontier import Cost, closed_form
from isofusion.laws.table import Runs


@pytest.fixture(scope="module")
def drawn(simulate: Callable[..., Runs]) -> Intervals:
    return bootstrap(fit_law(simulate(np.random.default_rng(0)), grid=8), 200)


def test_answers_hang_together(drawn: Intervals) -> None:
    fit = drawn.fit
    found = at_compute(drawn, 1e21)
    n, d, loss = closed_form(fit.params, 1e21)
    assert found["n"].value == pytest.approx(float(n))
    assert found["loss"].value == pytest.approx(float(loss))
    assert found["tokens_per_parameter"].value == pytest.approx(float(d / n))
    for name in found:
        assert found[name].low < found[name].value < found[name].high
    # C is fixed, so where N* is at its highest D* is at its lowest
    assert found["n"].high * found["d"].low == pytest.approx(1e21 / 6.0, rel=1e-3)
    assert found["n"].factor == pytest.approx(found["d"].factor, rel=1e-3)
    share = allocation(drawn)
    assert share["a"].value + share["b"].value == pytest.approx(1.0)
    assert share["a"].high == pytest.approx(1.0 - share["b"].low)
    assert share["d"].value == pytest.approx(fit.alpha / fit.beta)


def test_arrays_of_budgets_and_any_cost(drawn: Intervals) -> None:
    budgets = np.array([1e20, 1e21, 1e22])
    closed = at_compute(drawn, budgets)
    numeric = at_compute(drawn, budgets, cost=Cost("measured", np.zeros(1), np.log([6.0]), 1.0, 0.0))
    assert closed["n"].low.shape == (3,)
    assert (np.diff(closed["loss"].value) < 0).all()
    for name in closed:
        assert numeric[name].low == pytest.approx(closed[name].low, rel=1e-3)
    assert closed["n"].to_dict()["level"] == 0.95


def test_loss_and_any_function(drawn: Intervals) -> None:
    point = loss_at(drawn, 1e9, 1e10)
    assert point.value == pytest.approx(float(drawn.fit.predict(1e9, 1e10)))
    alpha = answer(drawn, lambda p: p.alpha)
    assert (alpha.low, alpha.high) == drawn.interval("alpha")


def test_refusals(drawn: Intervals, simulate: Callable[..., Runs]) -> None:
    with pytest.raises(InputError, match="positive FLOPs"):
        at_compute(drawn, -1.0)
    one_term = bootstrap(fit_law(simulate(np.random.default_rng(1)), d_term=False, grid=8), 20)
    with pytest.raises(InputError, match="without both terms"):
        allocation(one_term)


def test_a_draw_whose_search_ended_has_no_bound_on_that_side(drawn: Intervals) -> None:
    """Measured FLOPs have no closed form; the end of the search (ten thousand times the runs) was quoted as an end."""
    lost = np.arange(len(drawn.draws)) % 10 == 0
    odd = replace(drawn, draws=replace(drawn.draws, A=np.where(lost, 1e-9, drawn.draws.A)))
    runs = replace(drawn.fit.runs, c=6.1 * drawn.fit.runs.n * drawn.fit.runs.d, compute="given")
    found = at_compute(odd, 1e21, cost=Cost.measured(runs))
    assert (found["n"].low, found["d"].high, found["tokens_per_parameter"].high) == (-np.inf, np.inf, np.inf)
    assert np.isfinite([found["n"].high, found["d"].low]).all()
