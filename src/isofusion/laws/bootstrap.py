"""Intervals for a fitted law and for anything computed from it.

Default: hierarchical parametric bootstrap (DESIGN.md section 6). Branches of one trunk share its luck, so a simulated
study is  log L* = log L_fit + u_trunk + e_branch,  refitted. The variances of u and e come from repeated seeds where
there are any (one-way analysis of variance inside each size, pooled) and never below what the residuals of the fit
show (moment estimate with the fitted parameters projected out; Henderson's method 3). Each draw also draws the two
variances, because they are known from few runs only: the mean squares over chi-squares with their own degrees of
freedom (generalised pivots, Weerahandi 1993). The luck of trunks has as many as there are trunks beyond the parameters
that take up their level (E, A, alpha): with three trunks none, and then nothing here knows it. Row and trunk (cluster)
resampling are options; rows of one trunk are not independent, so row intervals are too narrow.
Legend: S draws, m runs, q trunks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from isofusion.errors import InputError
from isofusion.laws.fit import LawFit, at_bound, continuation, follow
from isofusion.laws.forms import Params
from isofusion.laws.objective import Problem, jacobian
from isofusion.laws.table import Array, Runs, clusters

Method = Literal["hierarchical", "row", "trunk"]
LEAST = 3  # least degrees of freedom of a drawn variance: below, it has no mean, and refits of such draws say nothing


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

    @property
    def total(self) -> float:
        return float(np.hypot(self.trunk, self.branch))

    @property
    def unknown(self) -> str | None:
        """Why the luck of trunks is unknown, or None."""
        return None if self.freedom else "no residual freedom left to estimate the luck of trunks"

    def to_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "total": self.total}


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
    budget = clusters(runs.d)
    squares, freedom = 0.0, 0
    for size, b in dict.fromkeys(zip(runs.size.tolist(), budget.tolist(), strict=True)):
        rows = (runs.size == size) & (budget == b)
        if len(np.unique(runs.seed[rows])) > 1:
            squares += float(np.sum((residuals[rows] - residuals[rows].mean()) ** 2))
            freedom += int(rows.sum()) - 1
    return (0.0, squares / freedom, freedom, freedom) if freedom else None


def estimate_noise(fit: LawFit) -> Noise:
    """Trunk and branch spread for the parametric bootstrap (see the module docstring)."""
    runs, r = fit.runs, fit.residuals
    problem = Problem.of(runs, fit.form, fit.scale, fit.bounds)
    jac = jacobian(fit.theta[None], problem)[0][fit.form.free].T
    basis, _ = np.linalg.qr(jac)
    m = np.eye(len(runs)) - basis @ basis.T  # residual maker
    r = m @ r
    trunks = np.unique(runs.group)
    z = (runs.group[:, None] == trunks[None, :]).astype(np.float64)
    z = z[:, z.sum(axis=0) > 0]
    free = max(1, len(runs) - jac.shape[1])
    total = float(r @ r)
    grouped = len(trunks) < len(runs)
    trunk_var, branch_var = 0.0, total / free
    freedom = branch_freedom = free
    per_trunk = 0.0
    source = "residuals (each run is its own trunk)"
    if grouped:
        # Residuals inside trunks, parameters projected out, see e alone; the rest of the sum of squares sees u too.
        both, rank = np.linalg.qr(np.column_stack([z, jac]))[0], np.linalg.matrix_rank(np.column_stack([z, jac]))
        if rank < both.shape[1]:
            u, _, _ = np.linalg.svd(np.column_stack([z, jac]), full_matrices=False)
            both = u[:, :rank]
        free_within = len(runs) - int(rank)
        within_ss = float(np.sum((r - both @ (both.T @ r)) ** 2))
        weight_u = float(np.trace(z.T @ m @ z))
        freedom = max(0, len(trunks) - int(fit.form.free[:3].sum()))
        per_trunk = len(runs) / len(trunks)
        source = "variance components of the residuals (no seed is repeated)"
        if free_within > 0:
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
    seeds = seed_variances(runs, np.log(runs.loss) - np.log(fit.predict(runs.n, runs.d)))
    seed_spread, seed_free = None, 0
    if seeds is not None:
        seed_trunk, seed_within, seed_free, _ = seeds
        seed_spread = float(np.sqrt(seed_trunk + seed_within))
        trunk_var, branch_var = max(trunk_var, seed_trunk), max(branch_var, seed_within)
        freedom = max(freedom, seed_free)
        source = f"repeated seeds ({seed_free} degrees of freedom), never below the residuals of the fit"
    return Noise(
        float(np.sqrt(trunk_var)),
        float(np.sqrt(branch_var)),
        freedom,
        branch_freedom,
        per_trunk,
        seed_spread,
        seed_free,
        source,
    )


@dataclass(frozen=True)
class Intervals:
    """Bootstrap draws of a fit. `interval` for a parameter, `of` for any function of the parameters."""

    fit: LawFit
    draws: Params  # arrays [S]
    noise: Noise
    method: Method
    level: float
    objective: Array  # [S]
    bound: np.ndarray  # bool[S]: an exponent at a bound, or a term gone
    note: str
    seed: int
    least: int = LEAST

    @property
    def share_at_bound(self) -> float:
        return float(self.bound.mean())

    @property
    def share_without_floor(self) -> float:
        """Share of draws whose irreducible loss went to zero (below 0.1 % of the lowest loss)."""
        return float(np.mean(1e-3 * self.fit.runs.loss.min() > self.draws.E)) if self.fit.form.fixed_e is None else 0.0

    def interval(self, name: str) -> tuple[float, float]:
        """Percentile interval of E, A, alpha, B or beta."""
        return self.of(lambda p: getattr(p, name))

    def of(self, quantity: Callable[[Params], Array]) -> Any:
        """Percentile interval (low, high) of quantity(draws), along its first axis; arrays if it has more axes."""
        return self.quantiles(quantity(self.draws))

    def quantiles(self, values: Array) -> Any:
        """Percentile interval of values already computed on the draws, along their first axis."""
        tail = (1.0 - self.level) / 2.0
        with np.errstate(invalid="ignore"):
            low, high = np.quantile(np.asarray(values, dtype=np.float64), [tail, 1.0 - tail], axis=0)
        return (float(low), float(high)) if np.ndim(low) == 0 else (low, high)

    def predictive(self, n: Array, d: Array, group: np.ndarray | None = None) -> tuple[Array, Array]:
        """Interval for the loss a new run at (n, d) would show: fit uncertainty plus trunk and branch noise.

        Raises InputError where the runs cannot tell how lucky a trunk is (`Noise.unknown`).
        """
        if self.noise.unknown:
            raise InputError(f"interval not available: {self.noise.unknown}")
        rng = np.random.Generator(np.random.Philox(key=self.seed + 1))
        log_loss = np.log(self.draws.predict(n, d))
        log_loss = log_loss + _simulate(
            rng, self.noise, np.arange(len(n)).astype(str) if group is None else group, len(self.draws), self.least
        )
        tail = (1.0 - self.level) / 2.0
        low, high = np.exp(np.quantile(log_loss, [tail, 1.0 - tail], axis=0))
        return low, high

    def to_dict(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "draws": len(self.draws),
            "level": self.level,
            "note": self.note,
            "noise": self.noise.to_dict(),
            "share_at_bound": self.share_at_bound,
            "share_without_floor": self.share_without_floor,
            "intervals": {name: list(self.interval(name)) for name in self.fit.names},
        }


def _simulate(rng: np.random.Generator, noise: Noise, group: np.ndarray, draws: int, least: int = LEAST) -> Array:
    """Noise of log loss for runs with these trunk labels, [S, m]; its variances are drawn too (inverse chi-square)."""
    trunks, member = np.unique(group, return_inverse=True)
    branch_freedom = max(noise.branch_freedom, least)
    branch = noise.branch**2 * branch_freedom / rng.chisquare(branch_freedom, size=(draws, 1))
    trunk = np.zeros((draws, 1))
    if noise.per_trunk and noise.freedom:
        freedom = max(noise.freedom, least)
        square = noise.branch**2 + noise.per_trunk * noise.trunk**2
        trunk = np.maximum(0.0, square * freedom / rng.chisquare(freedom, size=(draws, 1)) - branch) / noise.per_trunk
    u = rng.standard_normal((draws, len(trunks))) * np.sqrt(trunk)
    return u[:, member] + rng.standard_normal((draws, len(group))) * np.sqrt(branch)


def refit(fit: LawFit, log_loss: Array | None = None, weights: Array | None = None) -> tuple[Params, Array, np.ndarray]:
    """Refit draws, warm-started at `fit`: log losses [S, m] and/or row weights [S, m].

    Returns parameters [S], objectives [S] and whether an exponent ended at a bound [S].
    """
    base = Problem.of(fit.runs, fit.form, fit.scale, fit.bounds)
    problem = Problem(
        base.x,
        base.y,
        base.log_loss if log_loss is None else log_loss,
        base.weights if weights is None else weights,
        base.lower,
        base.upper,
        base.free,
    )
    draws = len(log_loss) if log_loss is not None else len(weights) if weights is not None else 1
    start = np.repeat(fit.theta[None], draws, axis=0)
    stages = [d for d in continuation(fit.delta) if d <= max(fit.delta, 1e-2) * 1.001]
    end = follow(start, problem, stages)
    params = fit.scale.to_params(end.theta)
    gone = np.full(draws, np.nan)
    params = Params(
        params.E if fit.form.fixed_e is None else np.full(draws, fit.form.fixed_e),
        params.A if fit.form.n_term else np.zeros(draws),
        params.alpha if fit.form.n_term else gone,
        params.B if fit.form.d_term else np.zeros(draws),
        params.beta if fit.form.d_term else gone,
    )
    return params, end.objective, at_bound(end.theta, problem)


def bootstrap(
    fit: LawFit,
    draws: int = 1000,
    *,
    method: Method = "hierarchical",
    level: float = 0.95,
    seed: int = 0,
    least: int = LEAST,
) -> Intervals:
    """Draw `draws` simulated or resampled studies and refit each.

    method: "hierarchical" (default), "row" (resample runs; the literature's, ignores trunks) or "trunk" (resample
    trunks; needs many). least: a drawn variance has at least so many degrees of freedom; 1 for honest predictions from
    few trunks. Raises InputError for fewer than 20 draws, a level outside (0, 1) or too few trunks.
    """
    if draws < 20:
        raise InputError(f"{draws} bootstrap draws say nothing about a tail; use 200 or more")
    if not 0 < level < 1:
        raise InputError(f"level = {level}: give a coverage between 0 and 1, e.g. 0.95")
    rng = np.random.Generator(np.random.Philox(key=seed))
    runs, noise = fit.runs, estimate_noise(fit)
    if method == "hierarchical":
        centre = np.log(fit.predict(runs.n, runs.d))
        params, objective, bound = refit(fit, log_loss=centre + _simulate(rng, noise, runs.group, draws, least))
        note = f"simulated studies; noise from {noise.source}"
    elif method == "row":
        picks = rng.integers(0, len(runs), size=(draws, len(runs)))
        params, objective, bound = refit(fit, weights=_counts(picks, len(runs)))
        note = (
            "rows resampled; runs of one trunk are treated as independent, so intervals are too narrow if they are not"
        )
    elif method == "trunk":
        trunks, member = np.unique(runs.group, return_inverse=True)
        if len(trunks) < 8:
            raise InputError(
                f"resampling {len(trunks)} trunks leaves draws that identify nothing; use method 'hierarchical'"
            )
        picks = rng.integers(0, len(trunks), size=(draws, len(trunks)))
        params, objective, bound = refit(fit, weights=_counts(picks, len(trunks))[:, member])
        note = f"{len(trunks)} trunks resampled"
    else:
        raise InputError(f"bootstrap method {method!r}: choose hierarchical, row or trunk")
    return Intervals(fit, params, noise, method, level, objective, bound, note, seed, least)


def _counts(picks: np.ndarray, size: int) -> Array:
    """How often each of `size` items is in each row of picks: [S, size]."""
    rows = np.arange(len(picks))[:, None] * size
    return np.bincount((picks + rows).ravel(), minlength=len(picks) * size).reshape(len(picks), size).astype(np.float64)
