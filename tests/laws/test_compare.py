from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from isofusion.errors import InputError
from isofusion.laws.bootstrap import bootstrap
from isofusion.laws.compare import Comparison, compare, crossover, equal_inference, paired
from isofusion.laws.fit import fit_law
from isofusion.laws.forms import Params
from isofusion.laws.table import Runs

SEEDS = (3, 1, 1, 1, 1, 3)


def test_an_arm_against_itself_is_null(simulate: Callable[..., Runs]) -> None:
    fit = fit_law(simulate(np.random.default_rng(0), seeds=SEEDS, label="a"))
    result = compare(bootstrap(fit, 200, seed=0), bootstrap(fit, 200, seed=1))
    assert np.abs(result.difference).max() == 0.0
    assert result.verdict == "no difference shown"
    one = bootstrap(fit, 200, seed=0)  # draw by draw the difference is none
    for same in (compare(one, one), equal_inference(one, one)):
        assert np.abs([same.low, same.high, same.band_low, same.band_high]).max() < 1e-12


def test_two_studies_of_one_law_are_rarely_told_apart(simulate: Callable[..., Runs]) -> None:
    rng = np.random.default_rng(1)
    shown = 0
    for k in range(8):
        a, b = (bootstrap(fit_law(simulate(rng, seeds=SEEDS)), 100, seed=2 * k + i) for i in range(2))
        shown += compare(a, b, points=8).verdict != "no difference shown"
    assert shown <= 2


def test_a_planted_gain_is_found_with_its_sign(simulate: Callable[..., Runs]) -> None:
    rng = np.random.default_rng(2)
    better = simulate(rng, seeds=SEEDS, gain=2.0, label="better")
    plain = simulate(rng, seeds=SEEDS, label="plain")
    a, b = (bootstrap(fit_law(r), 200, seed=i) for i, r in enumerate((better, plain)))
    result = compare(a, b)
    assert result.verdict == "first better"
    assert (result.first, result.second) == ("better", "plain")
    assert compare(b, a).verdict == "second better"
    assert (result.band_low <= result.low + 0.01).all()
    assert result.c[0] == pytest.approx(max(better.c.min(), plain.c.min()))
    rows = paired(better, plain)
    assert [r.size for r in rows] == ["0", "1", "2", "3", "4", "5", "all sizes"]
    assert rows[-1].pairs == sum(SEEDS)
    assert rows[-1].high is not None
    assert rows[-1].high < 0
    assert rows[1].low is None  # one trunk pair has no spread
    gaps = better.loss - plain.loss  # the same design, row by row
    trunks = [gaps[(better.size == "0") & (better.seed == seed)].mean() for seed in np.unique(better.seed)]
    assert len(trunks) == rows[0].pairs == 3
    assert rows[0].difference == pytest.approx(np.mean(trunks))
    span = ttest_1samp(trunks, 0.0).confidence_interval(0.95)
    assert (rows[0].low, rows[0].high) == pytest.approx((span.low, span.high))


def test_no_overlap_is_refused(simulate: Callable[..., Runs]) -> None:
    runs = simulate(np.random.default_rng(0))
    far = replace(runs, n=runs.n * 1e4, c=runs.c * 1e4)
    a, b = (bootstrap(fit_law(r), 50) for r in (runs, far))
    with pytest.raises(InputError, match="no overlap"):
        compare(a, b)
    assert paired(runs, replace(far, size=np.array(["other"] * len(far)))) == []


def test_runs_paired_at_equal_compute(simulate: Callable[..., Runs]) -> None:
    """An arm whose tokens cost twice as much: no worse per token, worse per FLOP."""
    runs = simulate(np.random.default_rng(0), seeds=(2,) * 6)
    dear = replace(runs, c=runs.c * 2.0, compute="exact")
    assert {r.difference for r in paired(dear, runs)} == {0.0}
    assert paired(dear, runs)[-1].compute_ratio == pytest.approx(2.0)
    rows = paired(dear, runs, match="compute")
    assert rows[-1].low is not None
    assert rows[-1].low > 0
    assert {r.compute_ratio for r in rows} == {1.0}
    i = int(
        np.flatnonzero((runs.size == "2") & (runs.seed == "0"))[0]
    )  # budgets double: twice the FLOPs is the next run
    assert len(rows) == 7
    # budgets double, so twice the FLOPs is the next run
    one = paired(dear.select(np.array([i])), runs, match="compute")[0]
    assert one.difference == pytest.approx(runs.loss[i] - runs.loss[i + 1])
    with pytest.raises(InputError, match="match"):
        paired(dear, runs, match="size")  # type: ignore[arg-type]


def hand(difference: list[float], half: float) -> Comparison:
    y = np.array(difference)
    c = np.geomspace(1e18, 1e20, len(y))
    return Comparison("a", "b", c, y, y - half, y + half, y - half, y + half, 0.95, "no difference shown")


def test_crossover_by_hand() -> None:
    line = list(np.linspace(-0.02, 0.02, 41))
    found = crossover(hand(line, 0.005))
    assert found.c == pytest.approx(1e19)
    assert found.low == pytest.approx(1e19 * 10**-0.25)  # the interval leaves zero where |difference| is 0.005
    assert found.high == pytest.approx(1e19 * 10**0.25)
    assert found.first_better == "below"
    assert "first better below it" in str(found)
    flipped = crossover(hand(line[::-1], 0.005))
    assert flipped.first_better == "above"
    assert flipped.low == pytest.approx(1e19 * 10**-0.25)
    between = crossover(hand(line, 0.0053))  # between two points, on both sides
    assert between.low == pytest.approx(1e19 * 10**-0.265)
    assert between.high == pytest.approx(1e19 * 10**0.265)
    upper = crossover(hand(list(np.linspace(-0.02, 0.004, 25)), 0.005))
    assert upper.low is not None
    assert upper.high is None
    assert f"({upper.low:.3g} to above 1e+20)" in str(upper)
    lower = crossover(hand(list(np.linspace(-0.004, 0.02, 25)), 0.005))
    assert lower.low is None
    assert f"(below 1e+18 to {lower.high:.3g})" in str(lower)
    sharp = crossover(hand(list(np.linspace(-0.021, 0.02, 42)), 1e-5))
    assert sharp.c is not None
    assert sharp.low is not None
    assert sharp.high is not None
    assert sharp.low <= sharp.c <= sharp.high
    open_end = crossover(hand(line, 0.03))
    assert (open_end.low, open_end.high) == (None, None)
    assert "not determined" in str(open_end)
    none = crossover(hand([0.01, 0.02, 0.03], 0.05))
    assert none.c is None
    assert str(none) == "none in range (1e+18 to 1e+20 FLOPs)"
    assert "2 sign changes" in str(crossover(hand([-0.01, 0.01, -0.01], 0.001)))


def test_a_planted_crossover_is_found(simulate: Callable[..., Runs], truth: Params) -> None:
    """Arms whose N terms cross at N = 5e8, so their frontiers cross near the compute where that is the best size."""
    steep = Params.of(1.904, 260.0 * 5e8**0.06, 0.361, 1850.0, 0.335)
    rng = np.random.default_rng(5)
    a, b = (
        bootstrap(fit_law(simulate(rng, seeds=(2,) * 6, trunk=0.0005, branch=0.0005, law=law)), 200, seed=i)
        for i, law in enumerate((steep, truth))
    )
    found = compare(a, b).crossover
    assert found.c is not None
    assert found.low is not None
    assert found.high is not None
    assert found.low < found.c < found.high
    clean = [bootstrap(fit_law(simulate(rng, trunk=0.0, branch=0.0, law=law)), 20, seed=0) for law in (steep, truth)]
    exact = compare(*clean).crossover.c
    assert exact is not None
    assert found.low < exact < found.high
    assert found.first_better == "above"


def test_equal_inference_cost(simulate: Callable[..., Runs], truth: Params) -> None:
    rng = np.random.default_rng(4)
    better, plain = (simulate(rng, seeds=SEEDS, gain=g) for g in (2.0, 1.0))
    a, b = (bootstrap(fit_law(r), 200, seed=i) for i, r in enumerate((better, plain)))
    found = equal_inference(a, b)
    assert found.verdict == "first better"
    assert found.held == "3.2e+10 training tokens"
    assert found.n[[0, -1]] == pytest.approx([1e8, 3e9])
    want = truth.predict(2 * found.n, 3.2e10) - truth.predict(found.n, 3.2e10)
    assert (found.band_low <= want).all()
    assert (want <= found.band_high).all()
    assert (found.low < found.difference).all()
    assert (found.difference < found.high).all()
    at_compute = equal_inference(a, b, compute=1e20)
    assert (at_compute.n >= 1e20 / 6 / 3.2e10 / 1.06).all()  # smaller ones would need more tokens than were seen
    np.testing.assert_allclose(6 * at_compute.n * at_compute.d_first, 1e20)
    assert equal_inference(a, a).verdict == "no difference shown"
    short = bootstrap(fit_law(plain.select(plain.d < 2e10)), 200)  # the longest that both arms were trained
    assert equal_inference(a, short).held == equal_inference(short, a).held == "1.6e+10 training tokens"
    with pytest.raises(InputError, match="outside the tokens seen"):
        equal_inference(a, b, tokens=1e13)
    with pytest.raises(InputError, match="not both"):
        equal_inference(a, b, tokens=1e10, compute=1e20)
    far = bootstrap(fit_law(replace(plain, n=plain.n * 1e3)), 200)
    with pytest.raises(InputError, match="no size in common"):
        equal_inference(a, far)
