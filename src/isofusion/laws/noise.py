"""How noisy runs are: the luck of a trunk, shared by its branches, and what is left to each branch.

log loss = law + u_trunk + e_branch. The variances of u and e come from the residuals of the fit with the fitted
parameters projected out (moment estimates, Henderson's method 3). Differences between repeated seeds are among those
residuals, pooled with what else the law leaves over; their own spread (one-way analysis of variance inside each size)
is reported beside it. (Taking the larger of the two made intervals of 6 sizes x 2 seeds cover 96.1 to 97.5 %.) A
simulated study also draws the two variances, because they are known from few runs only: the mean squares over
chi-squares with their own degrees of freedom (generalised pivots, Weerahandi 1993). The luck of trunks has as many as
there are trunks beyond the parameters that take up their level (E, A, alpha): with three trunks none, and then nothing
here knows it.

Odd runs (residuals.py) are no noise of that kind: one would set the spread of all. The gross-error model of robust
statistics (Huber 1964) is used: most runs follow law and noise, a few are anything. So the spreads come from the other
runs about their own law, and a simulated study has noise on those only; an odd run keeps its observed loss, with a
weight that says how often it is there (Poisson with mean 1, one for each trunk: Hanley & MacGibbon 2006), like a row of
a resampled table. Tables without odd runs are not touched.
Legend: S draws, m runs, q trunks, p fitted parameters.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from scipy.special import chdtrc, chdtri, fdtrc  # tails of chi-square, its inverse, and of F

from isofusion.laws.fit import LEAST, RANK, LawFit, spared
from isofusion.laws.objective import Problem, jacobian
from isofusion.laws.refit import without
from isofusion.laws.residuals import EXACT, pull_warning
from isofusion.laws.table import Array, Labels, Runs, clusters
from isofusion.laws.warn import FitWarning, percent

if TYPE_CHECKING:
    from isofusion.laws.bootstrap import Intervals

SHARED = 0.01  # tail of the F test from which runs of one size are said to share their luck


@dataclass(frozen=True)
class Noise:
    """Spread of log loss (relative loss): between trunks, between branches of a trunk, and where it comes from."""

    trunk: float  # standard deviation of u
    branch: float  # standard deviation of e
    freedom: int  # degrees of freedom behind `trunk`; 0: the runs cannot tell it. Without trunks: behind `branch`
    branch_freedom: int
    per_trunk: float  # runs of a trunk that its mean square counts; 0 without trunks
    seed: float | None  # spread of equal runs with another seed; None without repeated seeds
    seed_freedom: int
    source: str
    odd: npt.NDArray[np.int64]  # runs that these spreads do not describe
    drawn: tuple[int, int]  # degrees of freedom of `trunk` (0: without trunks) and `branch` were no run odd

    @property
    def total(self) -> float:
        return float(np.hypot(self.trunk, self.branch))

    @property
    def unknown(self) -> str | None:
        """Why the luck of trunks is unknown, or None."""
        return None if self.freedom else "no residual freedom left to estimate the luck of trunks"

    def to_dict(self) -> dict[str, Any]:
        plain = {k: v for k, v in self.__dict__.items() if k != "drawn"}
        return plain | {"odd": len(self.odd), "total": self.total}


def tangent(fit: LawFit) -> tuple[Array, Array]:
    """(basis [m, p], residuals [m]): an orthonormal basis of the law's tangent space at the fit, and the part of the
    log residuals outside it. A robust fit leaves some of the tangent space in its residuals; variances do not want it.
    """
    problem = Problem.of(fit.runs, fit.form, fit.scale, fit.bounds)
    basis, _ = np.linalg.qr(jacobian(fit.theta[None], problem)[0][fit.form.free].T)
    r = fit.residuals
    return basis, r - basis @ (basis.T @ r)


def seed_variances(runs: Runs, residuals: Array) -> tuple[float, float, int, int] | None:
    """(between-trunk variance, within variance, df between, df within) of log loss from repeated seeds, or None.

    Inside each size the trunks are compared on the budgets they share; budget means are removed, so lack of fit does
    not enter.
    """
    budget = clusters(runs.d)
    if len(np.unique(runs.group)) == len(runs):
        return _independent_seeds(runs, residuals)
    ss_between = ss_within = 0.0
    df_between = df_within = 0
    weighted_k = 0.0
    for size in np.unique(runs.size):
        rows = np.flatnonzero(runs.size == size)
        trunks = np.unique(runs.group[rows])
        if len(trunks) < 2:
            continue
        shared = [
            b for b in np.unique(budget[rows]) if len(np.unique(runs.group[rows[budget[rows] == b]])) == len(trunks)
        ]
        if not shared:
            continue
        table = np.array(
            [[residuals[rows[(runs.group[rows] == t) & (budget[rows] == b)]].mean() for b in shared] for t in trunks]
        )
        table = table - table.mean(axis=0)
        means = table.mean(axis=1)
        k, s = len(shared), len(trunks)
        ss_between += k * float(np.sum(means**2))
        ss_within += float(np.sum((table - means[:, None]) ** 2))
        df_between += s - 1
        df_within += (s - 1) * (k - 1)
        weighted_k += k * (s - 1)
    if not df_between:
        return None
    within = ss_within / df_within if df_within else 0.0
    between = ss_between / df_between
    return max(0.0, (between - within) / (weighted_k / df_between)), within, df_between, df_within


def _independent_seeds(runs: Runs, residuals: Array) -> tuple[float, float, int, int] | None:
    """The same where every run is its own trunk: only the spread between seeds of equal runs, as within variance."""
    seed = np.unique(runs.seed, return_inverse=True)[1]
    if not seed.any():
        return None
    budget = clusters(runs.d)
    cell = np.unique(runs.size, return_inverse=True)[1] * (int(budget.max()) + 1) + budget
    cell = np.unique(cell, return_inverse=True)[1]
    pairs = np.unique(cell * (int(seed.max()) + 1) + seed) // (int(seed.max()) + 1)  # the cell of each seed in it
    repeated = np.bincount(pairs)[cell] > 1
    if not repeated.any():
        return None
    cell, r = np.unique(cell[repeated], return_inverse=True)[1], residuals[repeated]
    count = np.bincount(cell)
    squares = float(np.sum((r - (np.bincount(cell, r) / count)[cell]) ** 2))
    freedom = len(r) - len(count)
    return 0.0, squares / freedom, freedom, freedom


def estimate_noise(fit: LawFit) -> Noise:
    """Trunk and branch spread of a fit's runs, odd ones apart (see the module docstring)."""
    every = _spreads(fit)
    odd = spared(fit)
    return replace(_spreads(without(fit, odd)), odd=odd, drawn=every.drawn) if len(odd) else every


def _spreads(fit: LawFit) -> Noise:
    """Of all runs of a fit, whose residuals are from its own law."""
    runs = fit.runs
    basis, r = tangent(fit)
    trunks, member = np.unique(runs.group, return_inverse=True)
    count = np.bincount(member)
    free = max(1, len(runs) - basis.shape[1])
    total = float(r @ r)
    trunk_var, branch_var = 0.0, total / free
    freedom = branch_freedom = free
    per_trunk = 0.0
    source = "residuals (each run is its own trunk)"
    if len(trunks) < len(runs):
        # Residuals inside trunks, parameters projected out, see e alone; the rest of the sum of squares sees u too.
        sums = np.stack([np.bincount(member, column, len(trunks)) for column in (*basis.T, r)])  # [p + 1, q]
        inside = np.column_stack([basis, r]) - (sums / count)[:, member].T
        left, singular, _ = np.linalg.svd(inside[:, :-1], full_matrices=False)
        moved = left[:, singular > RANK * np.sqrt(count.max())]
        rest = inside[:, -1]
        free_within = len(runs) - len(trunks) - moved.shape[1]
        within_ss = float(np.sum((rest - moved @ (moved.T @ rest)) ** 2))
        weight_u = float(len(runs) - np.sum(sums[:-1] ** 2))  # trace of z' M z for trunks' indicators z
        freedom = max(0, len(trunks) - int(fit.form.free[:3].sum()))
        per_trunk = len(runs) / len(trunks)
        source = "variance components of the residuals (no seed is repeated)"
        if free_within <= 0:
            source = "residuals; too few runs inside trunks tell their luck apart: taken for none, maybe too narrow"
        else:
            branch_var, branch_freedom = within_ss / free_within, free_within
            if freedom and weight_u > 1e-9:
                per_trunk = weight_u / freedom
                trunk_var = max(0.0, (total - branch_var * free) / weight_u)
                if trunk_var == 0.0:
                    branch_var = total / free
        if not freedom:
            source = (
                f"residuals inside trunks; {len(trunks)} trunks leave no residual freedom to estimate their luck, "
                "which is left out: too narrow"
            )
    seeds = seed_variances(runs, fit.residuals)
    seed_spread, seed_free = None, 0
    if seeds is not None:
        seed_trunk, seed_within, seed_free, _ = seeds
        seed_spread = float(np.sqrt(seed_trunk + seed_within))
        source = f"residuals of the fit, which hold the repeated seeds ({seed_free} degrees of freedom) and any misfit"
    return Noise(
        float(np.sqrt(trunk_var)),
        float(np.sqrt(branch_var)),
        freedom,
        branch_freedom,
        per_trunk,
        seed_spread,
        seed_free,
        source,
        np.zeros(0, dtype=np.int64),
        (freedom if per_trunk else 0, branch_freedom),
    )


def shared_luck(fit: LawFit) -> FitWarning | None:
    """A warning where runs of one size (and seed) clearly deviate together and the table names no trunks.

    F test of a level for each of them beside the law's tangent space: of even runs p < SHARED in so many of 1.
    """
    runs = fit.runs
    if len(np.unique(runs.group)) < len(runs):
        return None
    label = np.char.add(np.char.add(clusters(runs.n).astype(np.str_), " seed "), runs.seed)
    noise = estimate_noise(replace(fit, runs=replace(runs, group=label)))
    inside = noise.branch_freedom
    between = len(runs) - len(noise.odd) - len(fit.names) - inside
    if noise.trunk == 0.0 or min(between, inside) < 2 or noise.total < EXACT:
        return None
    excess = noise.trunk**2 * noise.per_trunk * noise.freedom / max(noise.branch, EXACT) ** 2
    if not fdtrc(between, inside, 1.0 + excess / between) < SHARED:
        return None
    name, wider = _wider(fit, noise, label)
    luck, own = percent(noise.trunk, noise.branch)
    return FitWarning(
        "shared-luck",
        f"runs of one size deviate from the law together (by {luck} %, each on its own by {own} %), while intervals "
        f"take them for independent: that of {name} may be some {wider:.2g} times too narrow. If they are branches or "
        "checkpoints of one training run, name its column with --group; else N is miscounted or the law bends with N: "
        "--group with the column of N then gives intervals that allow for it",
    )


def _wider(fit: LawFit, noise: Noise, label: Labels) -> tuple[str, float]:
    """The parameter whose interval the luck that runs of one label share widens most, and how many times: linearly, odd
    runs apart.
    """
    rows = np.delete(np.arange(len(fit.runs)), noise.odd)
    problem = Problem.of(fit.runs, fit.form, fit.scale, fit.bounds)
    weight = np.linalg.pinv(jacobian(fit.theta[None], problem)[0][fit.form.free].T[rows])  # of runs in parameters
    member = np.unique(label[rows], return_inverse=True)[1]
    alone = np.sum(weight**2, axis=1)
    shared = np.array([np.sum(np.bincount(member, row) ** 2) for row in weight])
    ratio = np.sqrt((noise.branch**2 + noise.trunk**2 * shared / alone) / noise.total**2)
    found = {name: float(value) for name, value in zip(fit.names, ratio, strict=True) if name not in ("A", "B")}
    name = max(found, key=lambda key: found[key])
    return name, found[name]


def interval_warnings(intervals: Intervals) -> tuple[FitWarning, ...]:
    """What the runs say against the intervals: runs that decide an exponent alone, and luck that they share."""
    return tuple(w for w in (pull_warning(intervals), shared_luck(intervals.fit)) if w is not None)


def simulate_deviations(rng: np.random.Generator, fit: LawFit, draws: int) -> Array:
    """What runs like the fit's deviate from it in log loss, [S, m]: noise; odd runs what they do deviate."""
    noise = estimate_noise(fit)
    out = simulate_noise(rng, noise, fit.runs.group, draws)
    out[:, noise.odd] = fit.residuals[noise.odd]
    return out


def simulate_noise(rng: np.random.Generator, noise: Noise, group: np.ndarray, draws: int, least: int = LEAST) -> Array:
    """Noise of log loss for runs with these trunk labels, [S, m]; its variances are drawn too (inverse chi-square).

    Odd runs change no random number: losses of the same runs in several domains, drawn with one seed, share the luck of
    their trunks whichever of them are odd where. So chi-squares are drawn as if none were, and keep their tail at the
    degrees of freedom that are left.
    """
    trunks, member = np.unique(group, return_inverse=True)

    def scaled(variance: float, freedom: int, drawn: int) -> Array:  # [S, 1]
        freedom, drawn = max(freedom, least), max(drawn, least)
        found = rng.chisquare(drawn, size=(draws, 1))
        square = found if freedom == drawn else chdtri(freedom, chdtrc(drawn, found))
        return np.asarray(variance * freedom / square)

    branch = scaled(noise.branch**2, noise.branch_freedom, noise.drawn[1])
    trunk = np.zeros((draws, 1))
    if noise.drawn[0]:
        level = scaled(noise.branch**2 + noise.per_trunk * noise.trunk**2, noise.freedom, noise.drawn[0])
        if noise.per_trunk and noise.freedom:
            trunk = np.maximum(0.0, level - branch) / noise.per_trunk
    u = rng.standard_normal((draws, len(trunks))) * np.sqrt(trunk)
    return u[:, member] + rng.standard_normal((draws, len(group))) * np.sqrt(branch)
