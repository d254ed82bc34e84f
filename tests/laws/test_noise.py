"""The variance components, against the projections written out as matrices."""

from __future__ import annotations

import itertools
import re
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from isofusion.laws.analysis import analyse
from isofusion.laws.basis import of_fit
from isofusion.laws.bootstrap import _draw, bootstrap
from isofusion.laws.coverage import Design, cover, studies
from isofusion.laws.fit import LawFit, fit_law
from isofusion.laws.noise import (
    estimate_noise,
    interval_warnings,
    seed_variances,
    shared_luck,
    simulate_noise,
    tangent,
)
from isofusion.laws.profile import profile
from isofusion.laws.refit import without
from isofusion.laws.residuals import odd_runs
from isofusion.laws.table import Runs
from isofusion.laws.tables.readers import read_runs


@pytest.mark.parametrize("seeds", [(1,) * 6, (3, 1, 2, 1, 1, 4)])
@pytest.mark.parametrize("uneven", [False, True])
def test_henderson_3_as_matrices(simulate: Callable[..., Runs], seeds: tuple[int, ...], uneven: bool) -> None:
    runs = simulate(np.random.default_rng(0), seeds=seeds)
    if uneven:  # trunks of different lengths, some of one run
        runs = runs.select(np.random.default_rng(1).random(len(runs)) < 0.7)
    fit = fit_law(runs, grid=6)
    basis, r = tangent(fit)
    trunks, member = np.unique(runs.group, return_inverse=True)
    z = (member[:, None] == np.arange(len(trunks))).astype(float)
    left, singular, _ = np.linalg.svd(np.column_stack([z, basis]), full_matrices=False)
    both = left[:, singular > 1e-10 * singular[0]]
    within = float(np.sum((r - both @ (both.T @ r)) ** 2)) / (len(runs) - both.shape[1])
    weight = len(runs) - np.sum((z.T @ basis) ** 2)
    between = (float(r @ r) - within * (len(runs) - 5)) / weight
    found = estimate_noise(fit)
    assert found.branch_freedom == len(runs) - both.shape[1]
    assert between > 0
    assert (found.branch**2, found.trunk**2) == pytest.approx((within, between), rel=1e-10)


def left_over(r: np.ndarray, *labels: np.ndarray) -> tuple[float, int]:
    """(sum of squares, degrees of freedom) that levels for these labels leave of r, by least squares."""
    hot = np.column_stack([(label[:, None] == np.unique(label)).astype(float) for label in labels])
    fitted, _, rank, _ = np.linalg.lstsq(hot, r, rcond=None)
    return float(np.sum((r - hot @ fitted) ** 2)), len(r) - int(rank)


def test_the_spread_of_seeds_is_an_analysis_of_variance() -> None:
    """Size "a" has three trunks on four budgets and a fifth for two of them, "b" two trunks on two, "c" one alone."""
    rows = [("a", seed, d) for seed in range(3) for d in (1, 2, 4, 8, 16) if (seed, d) != (1, 16)]
    rows += [("b", seed, d) for seed in range(2) for d in (1, 4)] + [("c", 0, d) for d in (1, 2, 4)]
    size, seed, d = (np.array(column) for column in zip(*rows, strict=True))
    trunk = np.array([f"{s}{k}" for s, k in zip(size, seed, strict=True)])
    runs = Runs.of(np.full(len(rows), 1e8), d * 1e9, np.ones(len(rows)), size=list(size), group=list(trunk), seed=seed)
    rng = np.random.default_rng(0)
    r = rng.standard_normal(len(rows)) + 3.0 * np.log(d) + 2.0 * (seed == 1)
    between = within = 0.0
    free_between = free_within = count = 0
    for s, budgets in (("a", 4), ("b", 2)):
        use = (size == s) & (d <= 8)
        (one, free_one), (two, free_two) = left_over(r[use], d[use]), left_over(r[use], d[use], trunk[use])
        between, free_between = between + one - two, free_between + free_one - free_two
        within, free_within = within + two, free_within + free_two
        count += budgets * (free_one - free_two)
    within /= free_within
    luck = (between / free_between - within) / (count / free_between)  # a mean square holds a trunk's luck so often
    assert luck > 0
    assert seed_variances(runs, r) == pytest.approx((luck, within, free_between, free_within))
    assert (free_between, free_within) == (3, 7)
    assert seed_variances(runs.select(seed == 0), r[seed == 0]) is None


def test_the_spread_of_seeds_where_every_run_is_its_own_trunk() -> None:
    size, seed, d = (np.array(c) for c in zip(*itertools.product("ab", range(3), (1, 2)), strict=True))
    keep = (size == "a") | (seed == 0)  # size "b" has one seed: nothing to learn from it
    runs = Runs.of(np.where(size == "a", 1e8, 2e8), d * 1e9, np.ones(len(d)), size=list(size), seed=seed).select(keep)
    r = np.random.default_rng(1).standard_normal(int(keep.sum())) + d[keep]
    squares, free = left_over(r[runs.size == "a"], runs.d[runs.size == "a"])
    assert seed_variances(runs, r) == pytest.approx((0.0, squares / free, free, free))
    assert free == 4


@pytest.mark.parametrize("factor", [0.5, 1.5, 3.0])
def test_one_wild_run_sets_no_spread(factor: float) -> None:
    """48 runs with 1 % noise: one run x 1.5 had made intervals five times as wide, x 3 twelve times."""
    runs = next(studies(Design(8, budgets=6, trunk=0.0, branch=0.01, branched=False), 1, seed=1)).runs
    wrong = runs.loss.copy()
    wrong[13] *= factor
    clean, odd = fit_law(runs), fit_law(runs.with_loss(wrong))
    found = estimate_noise(odd)
    assert found.odd.tolist() == [13]
    assert found.to_dict()["odd"] == 1
    assert found.branch_freedom == estimate_noise(clean).branch_freedom - 1
    assert found.branch == pytest.approx(estimate_noise(clean).branch, rel=0.1)
    drawn = bootstrap(odd, 300)
    assert "1 odd run resampled instead" in drawn.note
    for name in ("E", "alpha", "beta"):
        (low, high), (own_low, own_high) = drawn.interval(name), bootstrap(clean, 300).interval(name)
        assert 0.8 < (high - low) / (own_high - own_low) < 1.3
        assert low < getattr(odd, name) < high
    span = profile(odd, "alpha", draws=100)
    usual = profile(clean, "alpha", draws=100)
    assert None not in (span.low, span.high, usual.low, usual.high)
    assert (span.high - span.low) / (usual.high - usual.low) < 1.3  # type: ignore[operator]


def test_rows_of_an_odd_trunk_are_there_or_not_together() -> None:
    runs = next(studies(Design(12), 1, seed=3)).runs
    wrong = np.where(runs.group == "trunk 7-0", 1.2, 1.0)
    wrong[3] = 2.0
    fit = fit_law(runs.with_loss(runs.loss * wrong))
    noise = estimate_noise(fit)
    assert sorted(noise.odd) == [3, *np.flatnonzero(runs.group == "trunk 7-0")]
    log_loss, weights, _ = _draw(fit, noise, "hierarchical", 100, 0, 3)
    assert weights is not None
    assert (log_loss[:, noise.odd] == np.log(fit.runs.loss[noise.odd])).all()
    trunk = weights[:, runs.group == "trunk 7-0"]
    assert (trunk == trunk[:, :1]).all()
    assert trunk[:, 0].mean() == pytest.approx(1.0, abs=0.35)
    assert (trunk[:, 0] != weights[:, 3]).any()
    assert (np.delete(weights, noise.odd, axis=1) == 1.0).all()


def test_odd_runs_of_one_domain_leave_the_luck_of_trunks_shared() -> None:
    """Domains of an arm are drawn with one seed. An odd run takes a degree of freedom, and with another the chi-square
    used another count of random numbers: of 400 studies 34 were out of step, the mean over domains covered 85 % there.
    """
    runs = next(studies(Design(6, 2), 1, seed=5)).runs
    wrong = np.where(runs.group == "trunk 2-1", 1.3, 1.0)
    wrong[3] = 1.5
    one, other = (estimate_noise(fit_law(runs.with_loss(runs.loss * k))) for k in (1.0, wrong))
    assert (len(one.odd), len(other.odd)) == (0, 6)
    assert (other.freedom, other.branch_freedom) == (one.freedom - 1, one.branch_freedom - 5)
    for seed in range(12):
        draws = [
            simulate_noise(np.random.Generator(np.random.Philox(key=seed)), noise, runs.group, 200)
            for noise in (one, other)
        ]
        luck = [each[:, runs.group == "trunk 4-0"].mean(axis=1) for each in draws]
        assert np.corrcoef(luck)[0, 1] > 0.95
    alone = replace(other, drawn=(other.freedom, other.branch_freedom))  # as if there were no odd runs
    spread = [
        np.quantile(simulate_noise(np.random.default_rng(1), noise, runs.group, 20_000).std(axis=1), [0.05, 0.5, 0.95])
        for noise in (other, alone)
    ]
    assert spread[0] == pytest.approx(spread[1], rel=0.03)


def test_a_run_odd_in_two_domains_is_there_or_not_in_both() -> None:
    """Whatever else is odd in one of them."""
    runs = next(studies(Design(6, 2), 1, seed=5)).runs
    wrong = [np.ones(len(runs)), np.ones(len(runs))]
    wrong[0][33] = wrong[1][33] = wrong[1][3] = 1.5
    both = []
    for k in wrong:
        fit = fit_law(runs.with_loss(runs.loss * k))
        weights = _draw(fit, estimate_noise(fit), "hierarchical", 100, 0, 3)[1]
        assert weights is not None
        both.append(weights)
    assert (both[0][:, 33] == both[1][:, 33]).all()
    assert (both[1][:, 3] != both[1][:, 33]).any()


def test_odd_runs_leave_degrees_of_freedom_to_the_luck_of_trunks() -> None:
    """However many of them are trunks of one run; inside trunks too, or none is set apart."""
    rng = np.random.default_rng(0)
    for _ in range(2000):
        trunks = int(rng.integers(4, 14))
        member = np.repeat(np.arange(trunks), np.where(rng.random(trunks) < 0.6, 1, rng.integers(2, 6, trunks)))
        single = np.flatnonzero(np.bincount(member)[member] == 1)
        far = rng.choice(single if len(single) else np.arange(len(member)), max(1, len(single) // 2), replace=False)
        residuals = rng.normal(0, 0.003, trunks)[member] + rng.normal(0, 0.001, len(member))
        residuals[far] += rng.choice([0.3, 1.0], len(far))
        left = np.delete(member, odd_runs(residuals, 5, member.astype(str)))
        assert len(np.unique(left)) - 3 >= min(3, trunks - 3)
    whole = next(studies(Design(10), 1, seed=3)).runs
    runs = whole.select(np.array([4, 7, 13, 14, 17, 22, 26, 29, 31, 33, 36, 37, 38, 39, 40, 48]))
    wrong = np.ones(16)
    wrong[10:14] = 1.5, 1.5, 1.95, 1.5
    fit = fit_law(runs.with_loss(runs.loss * wrong))
    assert len(odd_runs(fit.residuals, 5, runs.group)) == 4
    found = estimate_noise(fit)
    assert len(found.odd) == 0
    assert found.trunk > 0.1
    assert any("too few other runs to set it apart" in w.message for w in fit.warnings)
    gone = estimate_noise(without(fit, np.arange(10, 14)))
    assert "too few runs inside trunks" in gone.source


def test_a_table_with_an_odd_run_covers_like_one_without() -> None:
    """60 studies: binomial tails put a true 95 % above 86 % with probability 0.997."""
    design = Design(12, 1, odd=1.5)
    clean, odd = cover(replace(design, odd=1.0), 60, draws=100), cover(design, 60, draws=100)
    for name in ("alpha", "beta", "N*(C)", "loss at 10x C"):
        assert odd[name].cover >= 0.86, name
        assert odd[name].width < 1.3 * clean[name].width, name


def without_groups(fit: LawFit) -> LawFit:
    runs = fit.runs
    return replace(fit, runs=Runs.of(runs.n, runs.d, runs.loss, seed=list(runs.seed)))


def test_luck_shared_by_the_runs_of_a_size_is_told_where_no_trunk_is_named() -> None:
    """Without its column of trunks such a table gave 95 % intervals of alpha that cover 61 %, and no word of it."""
    for design in (Design(12), Design(6, 2)):
        fits = [without_groups(fit) for fit in studies(design, 20, seed=4)]
        told = [warning for fit in fits if (warning := shared_luck(fit))]
        assert len(told) >= 19
        assert told[0].code == "shared-luck"
    luck, own = (float(v) for v in re.findall(r"by ([\d.]+) %", told[0].message))
    assert 0.2 < luck < 1.0
    assert 0.1 < own < 0.3
    fit = fits[0]
    drawn = bootstrap(fit, 60)
    assert told[0] in interval_warnings(drawn)
    assert told[0].message in [w["message"] for w in analyse(fit.runs, draws=60).warnings()]
    assert told[0].message in [w["message"] for w in of_fit(fit, drawn).facts["fit_warnings"]]
    assert shared_luck(next(studies(Design(6, 2), 1, seed=4))) is None  # trunks are named


def test_shared_luck_says_how_much_too_narrow_an_interval_is() -> None:
    """Which is what a user decides by."""
    for design in (Design(12), Design(8, 1, 8, trunk=0.002)):
        named = next(studies(design, 1, seed=4))
        told = shared_luck(without_groups(named))
        assert told is not None
        factor = float(re.search(r"that of alpha may be some ([\d.]+) times too narrow", told.message)[1])  # type: ignore[index]
        (low, high), (own_low, own_high) = (
            bootstrap(fit, 400).interval("alpha") for fit in (named, without_groups(named))
        )
        assert (high - low) / (own_high - own_low) == pytest.approx(factor, rel=0.25)


@pytest.mark.parametrize(
    "design",
    [
        Design(12, trunk=0.0, branched=False),
        Design(4, budgets=4, trunk=0.0, branched=False),
        Design(8, budgets=6, trunk=0.0, branch=0.01, branched=False, odd=1.5),
    ],
)
def test_luck_is_rarely_called_shared_where_it_is_not(design: Design) -> None:
    """p < 0.01: of 200 even tables 6 or more have a probability of 0.016."""
    assert sum(shared_luck(fit) is not None for fit in studies(design, 200, seed=6)) <= 5


def test_ten_thousand_runs_take_little_memory(simulate: Callable[..., Runs]) -> None:
    """Indicators of their trunks as a matrix would be 800 MB."""
    rng = np.random.default_rng(0)
    n, d = np.exp(rng.uniform(18, 22, 10_000)), np.exp(rng.uniform(20, 25, 10_000))
    loss = (1.9 + 260 * n**-0.3 + 1850 * d**-0.335) * np.exp(0.003 * rng.standard_normal(10_000))
    for group in (None, [f"t{i // 2}" for i in range(10_000)]):
        fit = fit_law(Runs.of(n, d, loss, group=group), grid=4)
        tracemalloc.start()
        found = estimate_noise(fit)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2e7
        assert found.total == pytest.approx(0.003, rel=0.03)


def test_what_shared_luck_advises_mends_the_interval(tmp_path: Path) -> None:
    """Sizes read off a figure differ by their reading: grouped by N to the digit nothing shared anything."""
    named = next(studies(Design(12), 1, seed=4))
    n = named.runs.n * np.exp(1e-3 * np.random.default_rng(0).standard_normal(len(named.runs)))
    rows = zip(n, named.runs.d, named.runs.loss, strict=True)
    path = tmp_path / "runs.csv"
    path.write_text("\n".join(["params,tokens,loss", *(f"{a:.8g},{b:.8g},{c:.8g}" for a, b, c in rows)]) + "\n")
    runs, notes = read_runs(path, columns={"group": "params"})
    fit = fit_law(runs)
    assert len(np.unique(fit.runs.group)) == 12
    assert shared_luck(fit) is None
    assert any("column 'params' is N: runs of one size (12) share their luck" in note for note in notes)
    (low, high), (own_low, own_high) = (bootstrap(each, 400).interval("alpha") for each in (named, fit))
    assert (high - low) / (own_high - own_low) == pytest.approx(1.0, abs=0.1)
