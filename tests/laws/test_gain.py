"""Effective-compute gain: nothing against itself, two where two was planted, refused where it would extrapolate."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from isofusion.errors import InputError
from isofusion.laws.bootstrap import Intervals, bootstrap
from isofusion.laws.cost import Cost
from isofusion.laws.fit import fit_law
from isofusion.laws.forms import Params
from isofusion.laws.frontier import closed_form
from isofusion.laws.gain import effective_gain, gains, inside, invert
from isofusion.laws.table import Runs

Make = Callable[..., Runs]


def drawn(runs: Runs, seed: int = 0, draws: int = 200) -> Intervals:
    return bootstrap(fit_law(runs), draws, seed=seed)


def test_an_arm_against_itself_gains_nothing(simulate: Make) -> None:
    arm = drawn(simulate(np.random.default_rng(0), seeds=(2,) * 6))
    found = effective_gain(arm, arm)
    np.testing.assert_allclose(found.gain, 1.0, rtol=1e-9)
    np.testing.assert_allclose((found.low, found.high), 1.0, rtol=1e-9)
    assert found.verdict == "no gain shown"


def test_a_planted_gain_is_exactly_two_without_noise(simulate: Make) -> None:
    """gain=2 gives an arm the losses of twice its N, so its frontier is the base's at twice the compute."""
    rng = np.random.default_rng(0)
    arm, base = (
        drawn(simulate(rng, trunk=0.0, branch=0.0, gain=g, label=label)) for g, label in ((2.0, "twice"), (1.0, "once"))
    )
    found = effective_gain(arm, base)
    assert (found.arm, found.base, found.ledger) == ("twice", "once", "6nd")
    np.testing.assert_allclose(found.gain, 2.0, rtol=1e-6)
    assert found.mean == pytest.approx(2.0, rel=1e-6)
    np.testing.assert_allclose(effective_gain(base, arm).gain, 0.5, rtol=1e-6)
    exact = [replace(i, fit=replace(i.fit, runs=replace(i.fit.runs, compute="exact"))) for i in (arm, base)]
    both = gains(*exact)
    assert set(both) == {"exact", "6nd"}
    for one in both.values():
        assert not isinstance(one, str)
        np.testing.assert_allclose(one.gain, 2.0, rtol=1e-3)


def test_planted_gains_are_covered_and_nulls_stay_null(simulate: Make) -> None:
    rng = np.random.default_rng(7)
    covered = shown = 0
    for k in range(6):
        base, same, better = (
            drawn(simulate(rng, seeds=(2,) * 6, gain=g), 3 * k + i, 100) for i, g in enumerate((1.0, 1.0, 2.0))
        )
        found = effective_gain(better, base, points=7)
        covered += found.mean_low <= 2.0 <= found.mean_high
        shown += effective_gain(same, base, points=7).verdict != "no gain shown"
        assert found.verdict == "saves compute"
        assert effective_gain(base, better, points=7).verdict == "costs compute"
    assert covered >= 5
    assert shown <= 1


def test_the_range_is_where_both_frontiers_interpolate(simulate: Make, truth: Params) -> None:
    rng = np.random.default_rng(1)
    arm, base = (drawn(simulate(rng, trunk=0.0, branch=0.0, gain=g)) for g in (2.0, 1.0))
    found = effective_gain(arm, base)
    low, high = inside(base.fit, Cost.six_nd()) or (0.0, 0.0)
    assert low <= found.c[0] * 2.0 * 1.02
    assert found.c[-1] * 2.0 <= high * 1.02
    for c in (low * 1.01, high * 0.99):
        n, d, _ = closed_form(truth, np.array(c))
        assert 1e8 / 1.06 <= n <= 3e9 * 1.06
        assert 2e9 / 1.06 <= d <= 3.2e10 * 1.06
    spent = base.fit.runs.c
    for c, end in ((low / 1.1, spent.min()), (high * 1.1, spent.max())):  # and beyond them they do not
        n, d, _ = closed_form(truth, np.array(c))
        within = 1e8 / 1.05 <= n <= 3e9 * 1.05 and 2e9 / 1.05 <= d <= 3.2e10 * 1.05
        assert not within or not spent.min() <= c <= spent.max(), end
    both = inside(arm.fit, Cost.six_nd()) or (0.0, 0.0)
    ends = max(both[0], low / 2.0), min(both[1], high / 2.0)  # the arm needs half of the base's compute
    assert (found.c[0], found.c[-1]) == pytest.approx(ends, rel=0.03)


def test_refusals_say_what_to_train(simulate: Make) -> None:
    rng = np.random.default_rng(2)
    runs = simulate(rng, trunk=0.0, branch=0.0)
    base = drawn(runs)
    undertrained = runs.select(runs.d < 3e9 * (runs.n / 1e9))  # every run far short of its best tokens
    with pytest.raises(InputError, match="train sizes on both sides"):
        effective_gain(drawn(undertrained), base)
    lower = Params.of(1.0, 260.0, 0.301, 1850.0, 0.335)  # losses the base has no compute for
    far = drawn(simulate(rng, trunk=0.0, branch=0.0, law=lower))
    with pytest.raises(InputError, match="no gain without extrapolation"):
        effective_gain(far, base)
    ledger = drawn(replace(runs, compute="exact"))
    with pytest.raises(InputError, match="one ledger"):
        effective_gain(ledger, base)
    with pytest.raises(InputError, match="same number"):
        effective_gain(drawn(runs, draws=50), base)
    assert all(isinstance(v, str) for v in gains(far, base).values())


def test_a_loss_below_the_bases_floor_takes_infinite_compute() -> None:
    c = np.geomspace(1e18, 1e22, 9)
    frontier = 2.0 + 30.0 * c**-0.1
    log_c = invert(
        np.array([[2.0 + 30.0 * at**-0.1 for at in (3e19, math.inf, 1e24, 1e16)]]), frontier[None], c, np.array([2.0])
    )
    assert np.exp(log_c[0, 0]) == pytest.approx(3e19)
    assert log_c[0, 1] == np.inf
    assert np.exp(log_c[0, 2:]) == pytest.approx([1e24, 1e16])  # beyond the table on either side
    assert invert(np.array([[1.9]]), frontier[None], c, np.array([2.0]))[0, 0] == np.inf


def test_unbounded_ends_become_null_in_json(simulate: Make) -> None:
    """Draws whose base floor lies above the arm's losses never reach them: the interval is open upwards."""
    rng = np.random.default_rng(0)
    arm, base = (drawn(simulate(rng, seeds=(2,) * 6, gain=g)) for g in (2.0, 1.0))
    high_floor = base.draws.E.copy()
    high_floor[: len(high_floor) // 4] = 4.0
    draws = Params(high_floor, base.draws.A, base.draws.alpha, base.draws.B, base.draws.beta)
    found = effective_gain(arm, replace(base, draws=draws))
    assert np.isinf(found.mean_high)
    assert found.to_dict()["mean_high"] is None
    json.dumps(found.to_dict(), allow_nan=False)
