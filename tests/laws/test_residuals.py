"""What residuals say against intervals: uneven spread, odd runs, runs that decide an exponent, no freedom left."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest

from isofusion.laws.analysis import analyse
from isofusion.laws.basis import of_fit
from isofusion.laws.bootstrap import bootstrap
from isofusion.laws.coverage import Design, studies
from isofusion.laws.fit import LawFit, fit_law
from isofusion.laws.forms import Params
from isofusion.laws.noise import estimate_noise
from isofusion.laws.residuals import odd_runs, pull_warning, pulls, residual_warnings
from isofusion.laws.table import Array, Runs


def grid(
    truth: Params, spread: Callable[[Array, Array], Array], sizes: int = 8, budgets: int = 8, seed: int = 0
) -> Runs:
    n = np.repeat(np.geomspace(1e8, 1e10, sizes), budgets)
    d = np.tile(np.geomspace(1e9, 2e11, budgets), sizes)
    noise = spread(n, d) * np.random.default_rng(seed).standard_normal(len(n))
    return Runs.of(n, d, truth.predict(n, d) * np.exp(noise))


def said(fit: LawFit, code: str) -> list[str]:
    return [w.message for w in fit.warnings if w.code == code]


def test_a_spread_that_grows_or_falls_is_told_with_the_wider_option(truth: Params) -> None:
    even = fit_law(grid(truth, lambda n, d: np.full(len(n), 0.002)))
    assert said(even, "uneven-spread") == []
    (small,) = said(fit_law(grid(truth, lambda n, d: 0.002 * (1e8 / n) ** 0.5)), "uneven-spread")
    assert "residuals of the smallest third of the sizes" in small
    assert "isofusion fit TABLE --resample row" in small
    (long,) = said(fit_law(grid(truth, lambda n, d: 0.002 * (d / 1e9) ** 0.4)), "uneven-spread")
    assert "residuals of the largest third of the token budgets" in long


def test_rarely_told_without_cause(truth: Params) -> None:
    """At p < 0.01 for N and for D at most about 2 of 100 even tables."""
    odd = [fit_law(grid(truth, lambda n, d: np.full(len(n), 0.002), seed=s), grid=6).warnings for s in range(60)]
    assert sum(any(w.code in ("uneven-spread", "odd-run") for w in found) for found in odd) <= 4


def test_rounding_of_a_table_made_from_a_law_is_no_uneven_spread(truth: Params) -> None:
    """Residuals of 1e-16 differ with N as rounding does; those of a third may all be zero."""
    runs = grid(truth, lambda n, d: np.zeros(len(n)))
    for grows in (np.geomspace(1e-16, 1e-14, len(runs)), np.where(runs.n > 1e9, 1e-15, 0.0)):
        assert residual_warnings(runs, grows, 5) == []
    (told,) = residual_warnings(runs, np.where(runs.n > 1e9, 1e-3 * np.arange(1.0, 65.0), 0.0), 5)
    assert told.code == "uneven-spread"


def test_steady_branches_do_not_make_their_trunks_odd() -> None:
    """Branches of 0.02 % tell nothing of trunks of 0.5 %: before, 49 of 500 such tables had odd runs. An odd
    row is found inside its trunk, an odd trunk beside the others.
    """
    every = list(studies(Design(8, 1, 5, trunk=0.005, branch=0.0002), 200, seed=5))
    assert sum(len(odd_runs(fit.residuals, 5, fit.runs.group)) > 0 for fit in every) <= 3
    fit = every[0]
    row, trunk = fit.residuals.copy(), fit.residuals.copy()
    row[17] += 0.01  # twice the luck of a trunk, 50 times that of a branch
    assert odd_runs(row, 5, fit.runs.group).tolist() == [17]
    trunk[fit.runs.group == fit.runs.group[17]] += 0.3
    assert sorted(odd_runs(trunk, 5, fit.runs.group)) == np.flatnonzero(fit.runs.group == fit.runs.group[17]).tolist()


def test_of_two_branches_the_one_far_from_the_law_is_odd() -> None:
    group = np.repeat([f"t{i}" for i in range(10)], 2)
    residuals = 1e-3 * np.random.default_rng(0).standard_normal(20)
    residuals[7] = -0.4
    assert odd_runs(residuals, 5, group).tolist() == [7]


def test_rows_of_a_trunk_are_no_independent_witnesses(truth: Params) -> None:
    """One unlucky trunk of 20 rows is one number, not twenty; with few trunks nothing is said of N."""
    runs = grid(truth, lambda n, d: np.full(len(n), 1e-4), sizes=6, budgets=20)
    trunk = np.array([f"t{i}" for i in range(6) for _ in range(20)])
    luck = np.repeat([0.02, 0.0, -0.0, 0.0, 0.0, 0.0], 20)
    shared = Runs.of(runs.n, runs.d, runs.loss * np.exp(luck), group=list(trunk))
    assert not any("the sizes" in text for text in said(fit_law(shared), "uneven-spread"))


def test_an_odd_run_is_named_with_what_it_does_to_the_intervals(truth: Params) -> None:
    runs = grid(truth, lambda n, d: np.full(len(n), 0.002))
    wrong = runs.loss.copy()
    wrong[13] *= 1.2
    fit = fit_law(runs.with_loss(wrong))
    (told,) = said(fit, "odd-run")
    assert f"the run N = {runs.n[13]:.4g}, D = {runs.d[13]:.4g}, loss {wrong[13]:.4g} is" in told
    assert "% above the law" in told
    assert "take the spread of the other runs, 0.19 % (2.4 % with all), and resample such rows" in told
    assert said(fit_law(runs), "odd-run") == []
    assert any(w["code"] == "odd-run" for w in analyse(runs.with_loss(wrong), draws=0).warnings())


def test_an_odd_run_without_which_the_law_is_not_identified_stays_in(truth: Params) -> None:
    """The third size is one run, three times too high: set apart, alpha would rest on two sizes."""
    runs = grid(truth, lambda n, d: np.full(len(n), 0.002), sizes=2, budgets=8)
    n, d = np.append(runs.n, 1e12), np.append(runs.d, 2e11)
    fit = fit_law(Runs.of(n, d, np.append(runs.loss, 3.0 * truth.predict(1e12, 2e11))), fixed_e=None)
    assert len(estimate_noise(fit).odd) == 0
    kept = residual_warnings(fit.runs, np.append(np.tile([1e-3, -1e-3], 8), 0.5), 5, apart=False)[0].message
    assert "intervals rest on a spread of 14 %, 0.12 % without: too few other runs to set it apart" in kept


def test_a_third_of_the_laws_loss_is_67_percent_below_it(truth: Params) -> None:
    runs = grid(truth, lambda n, d: np.full(len(n), 0.002))
    wrong = runs.loss.copy()
    wrong[13] /= 3.0
    (told,) = said(fit_law(runs.with_loss(wrong)), "odd-run")
    assert re.search(r" is 66\.\d % below the law", told)


def test_a_run_that_decides_an_exponent_is_named(truth: Params) -> None:
    """A lone largest size whose loss is off: the law bends to it, so its residual is small and its pull is not."""
    runs = grid(truth, lambda n, d: np.full(len(n), 0.0003), sizes=5, budgets=4)
    far = Runs.of(
        np.append(runs.n, 1e12), np.append(runs.d, 2e11), np.append(runs.loss, 1.01 * truth.predict(1e12, 2e11))
    )
    drawn = bootstrap(fit_law(far), 200)
    assert pulls(drawn)[0].row == len(runs)
    assert said(drawn.fit, "odd-run") == []
    told = pull_warning(drawn)
    assert told is not None
    assert told.code == "odd-run"
    assert "without the run N = 1e+12" in told.message
    assert "outside its interval" in told.message
    assert any("N = 1e+12" in w["message"] for w in of_fit(drawn.fit, drawn).facts["fit_warnings"])
    assert any("N = 1e+12" in w["message"] for w in analyse(far, draws=200).warnings())
    assert pull_warning(bootstrap(fit_law(runs), 200)) is None


@pytest.mark.parametrize(("rows", "degrees"), [(6, "1 degree of"), (7, "2 degrees of"), (8, "3 degrees of"), (9, "")])
def test_few_degrees_of_freedom_are_told(truth: Params, rows: int, degrees: str) -> None:
    """Six runs for five parameters end wherever the starts go, and every choice gives nearly the same law."""
    runs = grid(truth, lambda n, d: np.full(len(n), 0.002), sizes=3, budgets=3)
    keep = [0, 1, 3, 4, 8, 2, 6, 5, 7][:rows]
    fit = fit_law(runs.select(np.array(keep)))
    told = said(fit, "too-few-runs")
    assert fit.freedom == rows - 5 == fit.to_dict()["freedom"]
    assert bool(told) == bool(degrees)
    if told:
        assert f"{rows} runs for 5 parameters leave {degrees} freedom" in told[0]
        assert f"train {9 - rows} or more other runs" in told[0]


def test_epochs_points_name_the_rows_that_were_published_as_outliers(epoch: Runs, epoch240: Runs) -> None:
    """Without the five largest losses the spread grows with N, and resampled rows give beta a wider interval than any
    that takes one spread for all. With them beta's interval is that of resampled rows and holds what is fitted without
    them, 0.367.
    """
    (told,) = said(fit_law(epoch), "odd-run")
    largest = np.sort(epoch.loss)[-5:]
    assert sum(f"loss {loss:.4g}" in told for loss in largest) == 3
    assert "and 1 more" in told
    low, high = bootstrap(fit_law(epoch), 400).interval("beta")
    assert low < 0.37
    assert high > 0.56
    fit = fit_law(epoch240)
    assert "with N +0.2" in said(fit, "uneven-spread")[0]
    spans = {m: bootstrap(fit, 400, method=m).interval("beta") for m in ("residual", "hierarchical", "row")}
    one, apart, row = spans.values()  # one spread for all rows; for all but three odd ones, resampled; none
    assert row[1] - row[0] > 1.5 * (one[1] - one[0])
    assert row[0] < apart[0] < one[0]
    assert one[1] < apart[1] < row[1]
    even = fit_law(epoch240.select(np.setdiff1d(np.arange(240), estimate_noise(fit).odd)))
    narrow, wide = (bootstrap(even, 400, method=m).interval("beta") for m in ("hierarchical", "row"))
    assert wide[1] - wide[0] > 1.5 * (narrow[1] - narrow[0])
