"""Which runs next: the mathematics against brute force, the costs of branches, stop rules, and a small contest."""

from __future__ import annotations

import importlib.util
import sys
import time
import tracemalloc
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from isofusion.errors import InputError
from isofusion.laws.candidates import Candidates, Prices, Target, place
from isofusion.laws.design import Points, Spread, believe, calibrate, members, scale_of, slopes, to_params
from isofusion.laws.fit import fit_law
from isofusion.laws.forms import Params
from isofusion.laws.frontier import closed_form
from isofusion.laws.suggest import STRATEGIES, Strategy, campaign, exchange, greedy, suggest
from isofusion.laws.table import Runs

SIZES, TOKENS = np.geomspace(2e7, 2e9, 5), np.geomspace(4e8, 4e10, 4)
GOAL = Target.points([7e9, 2e10], [1.4e11, 4e11])


@pytest.fixture(scope="module")
def pool() -> Candidates:
    return Candidates.grid(SIZES, TOKENS)


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    """benchmarks/suggest.py as a module: the contest in small."""
    path = Path(__file__).parents[2] / "benchmarks/suggest.py"
    spec = importlib.util.spec_from_file_location("bench_suggest", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_suggest"] = module
    spec.loader.exec_module(module)
    return module


def points(n: object, d: object, trunk: list[str] | None = None) -> Points:
    n_, d_ = np.asarray(n, dtype=float), np.asarray(d, dtype=float)
    return Points(n_, d_, np.array(trunk or [f"t{i}" for i in range(len(n_))], dtype=np.str_))


def phi_of(truth: Params, scale: object) -> np.ndarray:
    phi = scale.to_theta(truth)[None]  # type: ignore[attr-defined]
    phi[:, [2, 4]] = np.log(phi[:, [2, 4]])
    return phi


def test_without_misfit_it_is_the_textbook_posterior(truth: Params) -> None:
    """Prior precision plus J'J/sigma^2, inverted; a further run is one more row."""
    done, new = points(SIZES[[0, 2, 4]], TOKENS[[0, 2, 1]]), points(SIZES[:2], TOKENS[[1, 3]])
    scale = scale_of(done, new)
    phi, sigma = phi_of(truth, scale), 0.003
    belief = believe(phi, done, new, (GOAL.n, GOAL.d), GOAL.weights, scale, Spread(0.0, sigma, 0.0))
    at_goal = slopes(phi, GOAL.n, GOAL.d, scale)[0]
    precision = np.diag([4.0, 1.0, 4.0, 1.0, 4.0])  # 1 / (0.5, 1, 0.5, 1, 0.5)^2
    rows = [slopes(phi, done.n, done.d, scale)[0]]
    for step in (0, 1):
        j = np.concatenate(rows, axis=1)
        cov = np.linalg.inv(precision + j @ j.T / sigma**2)
        assert belief.variances()[0] == pytest.approx(np.mean(np.diag(at_goal.T @ cov @ at_goal)), rel=1e-4)
        expected = belief.variances()[0] - belief.gains()[0, step]
        belief.learn(step)
        assert belief.variances()[0] == pytest.approx(expected, rel=1e-9)
        rows.append(slopes(phi, new.n[[step]], new.d[[step]], scale)[0])


def test_error_of_the_fit_with_misfit_and_trunk_luck_matches_simulation(truth: Params) -> None:
    """Simulate laws with a smooth misfit and lucky trunks, fit by penalised least squares, compare the errors."""
    done = points(np.repeat(SIZES, 2), np.tile(TOKENS[[0, 2]], 5), [f"t{i // 2}" for i in range(10)])
    scale, spread = scale_of(done), Spread(0.01, 0.004, 0.02)
    phi = phi_of(truth, scale)
    goal = (GOAL.n, GOAL.d)
    belief = believe(phi, done, done.select([0]), goal, GOAL.weights, scale, spread)
    rng = np.random.default_rng(0)
    draws = 40_000
    n, d = np.concatenate([done.n, GOAL.n]), np.concatenate([done.d, GOAL.d])
    apart = (np.log(n)[:, None] - np.log(n)) ** 2 + (np.log(d)[:, None] - np.log(d)) ** 2
    smooth = np.exp(-0.5 * apart / np.log(10.0) ** 2)
    misfit = rng.multivariate_normal(np.zeros(len(n)), spread.misfit**2 * smooth, draws, method="eigh")
    parameters = rng.standard_normal((draws, 5)) * np.array([0.5, 1.0, 0.5, 1.0, 0.5])
    j, j_goal = slopes(phi, done.n, done.d, scale)[0], slopes(phi, *goal, scale)[0]
    luck = spread.trunk * rng.standard_normal((draws, 5))[:, np.repeat(np.arange(5), 2)]
    seen = parameters @ j + misfit[:, :10] + luck + spread.branch * rng.standard_normal((draws, 10))
    weight = 1.0 / (spread.run**2 + spread.misfit**2)
    fitted = np.linalg.solve(np.diag([4.0, 1.0, 4.0, 1.0, 4.0]) + weight * j @ j.T, weight * j @ seen.T).T
    wrong = fitted @ j_goal - parameters @ j_goal - misfit[:, 10:]
    assert belief.variances()[0] == pytest.approx(np.mean(wrong**2), rel=0.03)


def test_best_size_moves_with_the_law_as_its_formula_says(truth: Params) -> None:
    scale = scale_of(points(SIZES, SIZES * 20))
    phi = phi_of(truth, scale)
    gradient = Target.at_compute([1e22], "n").gradient(scale)
    assert gradient is not None
    slope = gradient(phi)[0, :, 0]
    total = float(truth.alpha + truth.beta)
    assert slope[0] == pytest.approx(0.0, abs=1e-8)  # E does not move N*
    assert slope[[1, 3]] == pytest.approx([1 / total, -1 / total], rel=1e-5)


def test_members_are_the_prior_without_runs_and_close_in_with_them(truth: Params, pool: Candidates) -> None:
    every = points(pool.n, pool.d)
    scale = scale_of(every)
    at = np.log(7e9), np.log(1.4e11)

    def wide(rows: list[int]) -> float:
        some = every.select(rows)
        loss = np.log(truth.predict(some.n, some.d))
        best, drawn = members(some, loss, scale, Spread(0.0, 0.003, 0.0), 64)
        if len(rows) == len(every):
            assert float(to_params(best, scale).predict(7e9, 1.4e11)) == pytest.approx(
                float(truth.predict(7e9, 1.4e11)), rel=0.02
            )
        return float(np.std(np.log(to_params(drawn, scale).predict(np.exp(at[0]), np.exp(at[1])))))

    spreads = [wide([]), wide([0, 5, 19]), wide([0, 3, 5, 9, 14, 16, 19]), wide(list(range(20)))]
    assert spreads == sorted(spreads, reverse=True)
    assert spreads[0] > 0.2
    assert spreads[-1] < 0.02


def test_misfit_shows_where_the_law_is_not_true(truth: Params, pool: Candidates) -> None:
    every = points(pool.n, pool.d)
    scale, start = scale_of(every), Spread(0.0, 0.003, 0.008)
    rng = np.random.default_rng(1)
    noise = 0.003 * rng.standard_normal(len(every))
    a = float(truth.A) / every.n ** float(truth.alpha)
    b = float(truth.B) / every.d ** float(truth.beta)
    true = calibrate(every, np.log(float(truth.E) + a + b) + noise, scale, start)
    bent = calibrate(every, np.log(float(truth.E) + (a**1.4 + b**1.4) ** (1 / 1.4)) + noise, scale, start)
    assert true.misfit < 0.003
    assert bent.misfit > 0.006
    assert true.branch == pytest.approx(0.003, rel=0.5)


def test_branches_of_one_trunk_share_its_prefix() -> None:
    """k budgets cost 0.8 of the longest plus 0.2 of each, in whatever order they are chosen."""
    runs = Candidates.grid([1e8, 1e9], [1e9, 2e9, 8e9], shared=True)
    none, new = place(None, runs)
    whole = sum(6 * n * (0.8 * 8e9 + 0.2 * 11e9) for n in (1e8, 1e9))
    for order in ([0, 1, 2, 3, 4, 5], [5, 0, 4, 2, 3, 1]):
        prices = Prices.of(runs.cost, new, none, True)
        assert sum(prices.take(i) for i in order) == pytest.approx(whole)
    done = Runs.of([1e8], [4e9], [3.0], group=["trunk a"])
    old, new = place(done, runs)
    price = Prices.of(runs.cost, new, old, True).now() / runs.cost
    assert price == pytest.approx([0.2, 0.2, 1 - 0.8 / 2, 1, 1, 1])
    assert set(new.trunk[:3]) == {"trunk a"}
    alone = Candidates.grid([1e8], [1e9, 2e9])
    assert Prices.of(alone.cost, place(None, alone)[1], none, False).now() == pytest.approx(alone.cost)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_campaign_keeps_to_its_budget_and_repeats_nothing(truth: Params, strategy: Strategy, shared: bool) -> None:
    runs = Candidates.grid(SIZES, TOKENS, shared=shared)
    rng = np.random.default_rng(0)
    loss = truth.predict(runs.n, runs.d) * np.exp(0.003 * rng.standard_normal(len(runs)))
    budget = 0.1 * runs.cost.sum()
    end = campaign(strategy, runs, GOAL, budget, lambda i: float(loss[i]))
    assert 0 < end.spent <= budget * (1 + 1e-6)
    assert len(set(end.chosen)) == len(end.chosen) >= 5
    assert end.log_loss == pytest.approx(np.log(loss[list(end.chosen)]))
    _, at = place(None, runs)
    prices = Prices.of(runs.cost, at, at.select([]), shared)
    assert sum(prices.take(i) for i in end.chosen) == pytest.approx(end.spent)


def test_a_first_design_is_cheap_and_spread(pool: Candidates) -> None:
    plan = suggest(None, pool, GOAL, 1e20)
    assert plan.done == 0
    assert [p.cost for p in plan.picks] == sorted(p.cost for p in plan.picks)
    assert plan.after < 0.2 * plan.before
    assert plan.after == plan.picks[-1].error
    assert plan.spent == pytest.approx(plan.picks[-1].spent)
    assert plan.spent <= 1e20
    first = plan.picks[:4]
    assert sum(p.cost for p in first) < 0.1 * 1e20
    assert len({round(np.log(p.n), 3) for p in first}) >= 2
    assert len({round(np.log(p.d), 3) for p in first}) >= 2


def test_ten_thousand_runs_are_weighed_in_little_memory(pool: Candidates) -> None:
    """Nothing is held as the square of the runs: that would be 800 MB for one matrix."""
    rng = np.random.default_rng(0)
    n, d = np.exp(rng.uniform(np.log(2e7), np.log(2e9), 10_000)), np.exp(rng.uniform(np.log(4e8), np.log(4e10), 10_000))
    loss = (1.9 + 260 * n**-0.3 + 1850 * d**-0.335) * np.exp(0.003 * rng.standard_normal(10_000))
    tracemalloc.start()
    plan = suggest(Runs.of(n, d, loss), pool, GOAL, 1e21, most=2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4e8
    assert plan.done == 10_000
    assert plan.after < plan.before < 0.01


def test_the_order_of_done_runs_changes_nothing(pool: Candidates, truth: Params) -> None:
    n, d = (v.ravel() for v in np.meshgrid(SIZES, TOKENS))
    loss = truth.predict(n, d) * np.exp(0.02 * np.sin(9 * np.log(n)) + 0.001 * np.cos(7 * np.log(d)))
    order = np.random.default_rng(3).permutation(len(n))
    one = suggest(Runs.of(n, d, loss), pool, GOAL, 1e21)
    other = suggest(Runs.of(n[order], d[order], loss[order]), pool, GOAL, 1e21)
    assert (one.picks, one.spread, one.before) == (other.picks, other.spread, other.before)
    assert set(one.leave_out) == {int(order[i]) for i in other.leave_out}


def test_stop_rules(pool: Candidates) -> None:
    every = suggest(None, pool, GOAL, 1e20)
    few = suggest(None, pool, GOAL, 1e20, most=3)
    assert len(few.picks) == 3
    assert few.stopped == "3 runs chosen"
    level = 2.0 * every.after
    enough = suggest(None, pool, GOAL, 1e20, wanted=level)
    assert enough.after <= level
    assert enough.spent < every.spent
    assert "expected error at or below" in enough.stopped
    thrifty = suggest(None, pool, GOAL, 1e20, least=0.05)
    assert thrifty.spent < every.spent
    assert "help enough" in thrifty.stopped


def test_done_runs_count_and_are_not_suggested_again(truth: Params, pool: Candidates) -> None:
    rows = np.arange(0, 20, 3)
    done = Runs.of(pool.n[rows], pool.d[rows] * 1.01, truth.predict(pool.n[rows], pool.d[rows]))
    left = pool.not_in(done)
    assert len(left) == len(pool) - len(rows)
    plan = suggest(done, left, GOAL, 1e20, noise=0.003)
    assert plan.before < 0.2 * suggest(None, pool, GOAL, 1e20).before
    assert plan.spread.run == pytest.approx(0.003)
    same = suggest(done, left, GOAL, 1e20, noise=0.003)
    assert [p.index for p in same.picks] == [p.index for p in plan.picks]


def test_seeds_tell_the_noise(truth: Params) -> None:
    """Equal runs with other seeds, 2 % apart: the design reckons with that and not with its guess of 0.3 %."""
    n, d = np.repeat(SIZES, 4), np.tile(np.repeat(TOKENS[:2], 2), 5)
    rng = np.random.default_rng(3)
    loss = truth.predict(n, d) * np.exp(0.02 * rng.standard_normal(20))
    more = Runs.of([3e8], [3.9e10], [float(truth.predict(3e8, 3.9e10))])
    runs = Runs.of(
        np.append(n, more.n), np.append(d, more.d), np.append(loss, more.loss), seed=[str(i % 2) for i in range(21)]
    )
    plan = suggest(runs, Candidates.grid(SIZES, TOKENS[3:]), GOAL, 1e21)
    assert 0.01 < plan.spread.run < 0.04


def test_target_of_best_size_shrinks_too(pool: Candidates) -> None:
    plan = suggest(None, pool, Target.at_compute([1e22], "n"), 1e20)
    assert plan.after < 0.5 * plan.before


def test_bad_input_is_refused(pool: Candidates) -> None:
    for call, message in (
        (lambda: suggest(None, pool, GOAL, 1e10), "pays for none of 20 candidates"),
        (lambda: suggest(None, pool, GOAL, -1.0), "positive FLOPs"),
        (lambda: suggest(None, pool, GOAL, 1e20, most=0), "at least one"),
        (lambda: suggest(None, pool, GOAL, 1e20, wanted=2.0), "between 0 and 1"),
        (lambda: suggest(None, pool, GOAL, 1e20, noise=-0.1), "relative spread"),
        (lambda: suggest(None, pool, GOAL, 1e20, strategy="best"), "choose suggest, random"),  # type: ignore[arg-type]
        (lambda: Candidates.of([], []), "no candidates"),
        (lambda: Candidates.of([1e8, 1e9], [1e9]), "must be equal"),
        (lambda: Candidates.of([1e8, -1.0], [1e9, 1e9]), "row 2: -1"),
        (lambda: Candidates.of([1e8], [1e9], [-3.0]), "cost must be"),
        (lambda: Candidates.grid(np.geomspace(1e6, 1e9, 60), np.geomspace(1e6, 1e9, 60)), "coarser"),
        (lambda: Target.points([1e9], [1e9, 2e9]), "equally many"),
        (lambda: Target.points([1e9], [1e9], [0.0]), "weights"),
        (lambda: Target.at_compute([]), "positive FLOPs"),
        (lambda: Target.at_compute([1e22], "d"), "choose 'loss' or 'n'"),  # type: ignore[arg-type]
    ):
        with pytest.raises(InputError, match=message):
            call()


def test_small_contest(bench: ModuleType) -> None:
    """Two seeds of benchmarks/suggest.py, where the law is not quite true: the measured margins there are wide."""
    table = bench.run("p-norm", "narrow", list(STRATEGIES), 2, 0.15, 8)["strategies"]
    mine = table.pop("suggest")
    whole = table.pop("whole pool")
    assert mine["share"] <= 0.15 + 1e-9
    assert mine["unidentified"] == 0
    assert mine["ratio"] < 2.0
    assert whole["ratio"] == 1.0
    for name, other in table.items():
        assert mine["expected"] < other["expected"], name


def test_a_run_can_be_taken_out_again(truth: Params, pool: Candidates) -> None:
    """`forget` undoes `learn`, `gains` and `losses` foretell them, whatever the misfit and the trunks."""
    done, every = points(SIZES[:3], TOKENS[:3], ["a", "a", "b"]), points(pool.n, pool.d, ["a", "b"] * 10)
    scale = scale_of(every)
    phi = phi_of(truth, scale)
    belief = believe(phi, done, every, (GOAL.n, GOAL.d), GOAL.weights, scale, Spread(0.01, 0.004, 0.02))
    start, gain = belief.variances()[0], belief.gains()[0]
    belief.learn(7)
    assert start - belief.variances()[0] == pytest.approx(gain[7], rel=1e-6)
    loss = belief.losses()[0]
    assert loss[7] == pytest.approx(gain[7], rel=1e-6)
    first = len(pool)  # the done runs follow the candidates
    belief.forget(first + 1)
    belief.forget(7)
    rest = done.select([0, 2])
    short = believe(phi, rest, every, (GOAL.n, GOAL.d), GOAL.weights, scale, Spread(0.01, 0.004, 0.02))
    assert belief.variances()[0] == pytest.approx(short.variances()[0], rel=1e-6)


def test_exchanges_better_a_plan_within_its_budget(truth: Params) -> None:
    runs = Candidates.grid(SIZES, TOKENS, shared=True)
    none, at = place(None, runs)
    scale = scale_of(at)
    belief = believe(phi_of(truth, scale), none, at, (GOAL.n, GOAL.d), GOAL.weights, scale, Spread(0.002, 0.001, 0.0))
    prices, free = Prices.of(runs.cost, at, none, True), np.ones(len(runs), dtype=bool)
    budget = 0.15 * prices.total(range(len(runs)))
    picks, after, _ = greedy(belief, prices, budget, free, 1.0)
    better, then = exchange(after, prices, budget, free, picks)
    assert prices.total(better) <= budget * (1 + 1e-6)
    assert len(set(better)) == len(better)
    assert then.spread() < 0.99 * after.spread()
    for i in better:
        belief.learn(i)
    assert belief.spread() == pytest.approx(then.spread(), rel=1e-6)


def test_runs_that_bend_the_fit_are_left_out(truth: Params) -> None:
    """On a p-norm law the far corners bend the plain sum: without the runs named the fit is right further out."""
    runs = Candidates.grid(SIZES, TOKENS)

    def law(n: np.ndarray, d: np.ndarray) -> np.ndarray:
        a, b = float(truth.A) / n ** float(truth.alpha), float(truth.B) / d ** float(truth.beta)
        return float(truth.E) + (a**1.4 + b**1.4) ** (1 / 1.4)

    noise = np.exp(0.001 * np.random.default_rng(2).standard_normal(len(runs)))
    done = Runs.of(runs.n, runs.d, law(runs.n, runs.d) * noise)
    plan = suggest(done, Candidates.of([4e9], [8e10]), GOAL, 1e25)
    assert plan.leave_out
    assert plan.without < plan.before
    kept = np.setdiff1d(np.arange(len(done)), plan.leave_out)

    def wrong(rows: np.ndarray) -> float:
        fit = fit_law(done.select(rows))
        return float(np.abs(np.log(fit.predict(GOAL.n, GOAL.d) / law(GOAL.n, GOAL.d))).mean())

    assert wrong(kept) < 0.7 * wrong(np.arange(len(done)))


@pytest.mark.parametrize("seed", [0, 1])
def test_of_thousands_of_runs_those_that_bend_the_fit_are_left_out_too(seed: int) -> None:
    """Judged one by one no run of 2,000 counts for enough, and none was named; in cells of (N, D) they are."""
    rng = np.random.default_rng(seed)
    n, d = np.exp(rng.uniform(np.log([2e7, 4e8]), np.log([2e9, 4e10]), (2000, 2))).T

    def law(n: np.ndarray, d: np.ndarray) -> np.ndarray:
        return 1.7 + ((400 * n**-0.34) ** 1.5 + (900 * d**-0.31) ** 1.5) ** (1 / 1.5)

    done = Runs.of(n, d, law(n, d) * np.exp(0.003 * rng.standard_normal(2000)))
    wide = np.geomspace(1e9, 1e11, 2001)
    truth = law(wide, 1e22 / 6 / wide).min()
    started = time.process_time()
    plan = suggest(done, Candidates.of([4e9], [8e10]), Target.at_compute([1e22]), 1e25)
    assert time.process_time() - started < 20
    assert plan.without < 0.9 * plan.before
    kept = np.setdiff1d(np.arange(2000), plan.leave_out)
    wrong = [
        abs(float(closed_form(fit_law(done.select(rows), grid=6).params, 1e22)[2]) / truth - 1.0)
        for rows in (kept, np.arange(2000))
    ]
    assert wrong[0] < 0.4 * wrong[1]


@pytest.mark.parametrize("factor", [0.5, 1.5, 3.0])
def test_one_wild_run_changes_no_plan(truth: Params, factor: float) -> None:
    """One of 48 three times too high had set the noise: expected error 10 % instead of 0.35 %, 28 runs to leave out."""
    n, d = np.repeat(np.geomspace(2e7, 2e9, 8), 6), np.tile(np.geomspace(4e8, 4e10, 6), 8)
    loss = truth.predict(n, d) * np.exp(0.003 * np.random.default_rng(1).standard_normal(48))
    wild = loss * np.where(np.arange(48) == 20, factor, 1.0)
    runs = Candidates.grid(np.geomspace(2e8, 4e9, 4), np.geomspace(4e9, 1e11, 4))
    clean, odd = (suggest(Runs.of(n, d, values), runs, Target.at_compute([1e22]), 1e21) for values in (loss, wild))
    assert [run.index for run in odd.picks] == [run.index for run in clean.picks]
    assert odd.before == pytest.approx(clean.before, rel=0.1)
    assert odd.leave_out == ()
    assert odd.done == 48
    assert clean.notes == ()
    (note,) = odd.notes
    assert f"the run N = {n[20]:.4g}, D = {d[20]:.4g}, loss {wild[20]:.4g} is many times the usual spread away" in note


def test_repeats_are_seeds_of_their_own() -> None:
    runs = Candidates.grid([1e8, 1e9], [1e9, 8e9], seeds=2, shared=True)
    assert len(runs) == 8
    assert runs.seed.tolist() == [0] * 4 + [1] * 4
    assert runs.name[4].endswith("seed 1")
    none, new = place(None, runs)
    prices = Prices.of(runs.cost, new, none, True)
    assert len(set(new.trunk)) == 4
    assert prices.total(range(8)) == pytest.approx(2 * prices.total(range(4)))
    done = Runs.of([1e8, 1e8, 1e8], [1e9, 8e9, 1e9], [3.0, 2.5, 3.1], group=["a", "a", "b"])
    left = runs.not_in(done)  # trunk a has both budgets, trunk b the short one: its long branch is left
    assert sorted(zip(left.n.tolist(), left.d.tolist(), left.seed.tolist(), strict=True)) == [
        (1e8, 8e9, 1),
        *((1e9, d, s) for d in (1e9, 8e9) for s in (0, 1)),
    ]
    alone = Candidates.of([1e8], [1e9], seeds=3)
    assert alone.not_in(done).seed.tolist() == [2]
    with pytest.raises(InputError, match="fewer seeds"):
        Candidates.grid(np.geomspace(1e7, 1e9, 20), np.geomspace(1e8, 1e10, 20), seeds=2)
    with pytest.raises(InputError, match="at least 1"):
        Candidates.of([1e8], [1e9], seeds=0)
