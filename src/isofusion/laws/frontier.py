"""Compute-optimal N and D of a fitted law, in closed form and numerically, and the paper's regression beside them.

Sources: arXiv 2504.07951 App. C (closed form a = beta/(alpha+beta), b = alpha/(alpha+beta) for C = 6 N D; App. C.2
regression of N*, D* on C, the paper's way where there is no closed form). Compute is C = k(N) D: k = 6N, late fusion's
6 (f N_v + N_t), or measured on the runs (exact ledger), because 6ND is wrong there (`isofusion.laws.cost`). The lower
envelope of App. C.3 is `isofusion.laws.envelope`. Units: C in FLOPs, N parameters, D tokens.
Legend: S draws, c budgets, g grid points.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from isofusion.errors import InputError
from isofusion.laws.cost import REACH, Cost
from isofusion.laws.envelope import Envelope, envelope, size_curves
from isofusion.laws.fit import LawFit
from isofusion.laws.forms import Params
from isofusion.laws.table import Array

__all__ = [
    "Cost",
    "Envelope",
    "Optimum",
    "Regression",
    "closed_form",
    "compute_optimal",
    "envelope",
    "exponents",
    "optimum",
    "regress_allocation",
    "size_curves",
]

GRID = 241  # points in log N of the numeric optimum before refinement


def exponents(params: Params) -> dict[str, Array]:
    """Closed-form a, b, d of N* ~ C^a, D* ~ C^b, D* ~ N*^d for C proportional to N D."""
    total = params.alpha + params.beta
    return {"a": params.beta / total, "b": params.alpha / total, "d": params.alpha / params.beta}


def closed_form(params: Params, c: Array | float, constant: float = 6.0) -> tuple[Array, Array, Array]:
    """(N*, D*, L*) at compute c for C = constant N D: shapes c, with the draws' axis in front."""
    c_ = np.asarray(c, dtype=np.float64)
    lift = (...,) + (None,) * c_.ndim
    A, alpha, B, beta, E = (
        np.asarray(v, dtype=np.float64)[lift] for v in (params.A, params.alpha, params.B, params.beta, params.E)
    )
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        n = np.exp((np.log(alpha * A) - np.log(beta * B) + beta * np.log(c_ / constant)) / (alpha + beta))
        d = c_ / constant / n
        return n, d, E + A * n**-alpha + B * d**-beta


@dataclass(frozen=True)
class Optimum:
    """Compute-optimal N, D and loss at c: arrays [c] or [S, c]; `edge` where the search range ended first."""

    c: Array
    n: Array
    d: Array
    loss: Array
    edge: np.ndarray


def optimum(params: Params, cost: Cost, c: Array | float, n_range: tuple[float, float]) -> Optimum:
    """Minimise the law along C = k(N) D over N in n_range: a grid in log N, then two refinements. Any cost model."""
    c_ = np.atleast_1d(np.asarray(c, dtype=np.float64))
    draws = np.ndim(params.E) == 1
    one = Params(*(np.atleast_1d(getattr(params, k)) for k in ("E", "A", "alpha", "B", "beta")))
    grid = np.linspace(np.log(n_range[0]), np.log(n_range[1]), GRID)
    size = np.broadcast_to(grid, (len(one), len(c_), GRID))
    step = grid[1] - grid[0]
    # first pass: N and D terms are separable, so each is one matrix over (S, grid) and (S, c, grid)
    k = cost.per_token(np.exp(grid))
    best = np.argmin(one.predict(np.exp(grid)[None, :], c_[:, None] / k[None, :]), axis=2)
    edge = (best == 0) | (best == GRID - 1)
    centre = np.take_along_axis(size, best[..., None], axis=2)[..., 0]

    def loss_at(x: Array) -> Array:  # x [S, c, g]
        n = np.exp(x)
        d = c_[None, :, None] / cost.per_token(n)
        lift = (slice(None), None, None)
        with np.errstate(divide="ignore"):
            first = np.exp(np.log(one.A)[lift] - one.alpha[lift] * np.log(n))
            second = np.exp(np.log(one.B)[lift] - one.beta[lift] * np.log(d))
        return one.E[lift] + first + second

    for _ in range(2):
        offsets = np.linspace(-1.0, 1.0, 9) * step
        x = np.clip(centre[..., None] + offsets, grid[0], grid[-1])
        centre = np.take_along_axis(x, np.argmin(loss_at(x), axis=2)[..., None], axis=2)[..., 0]
        step /= 4.0
    x = centre[..., None] + np.array([-step, 0.0, step])
    low, mid, high = np.moveaxis(loss_at(x), 2, 0)
    curve = low - 2.0 * mid + high
    with np.errstate(divide="ignore", invalid="ignore"):
        shift = np.where((curve > 0) & ~edge, 0.5 * (low - high) / curve, 0.0)
    centre = np.clip(centre + np.clip(shift, -1.0, 1.0) * step, grid[0], grid[-1])
    n = np.exp(centre)
    d = c_ / cost.per_token(n)
    loss = loss_at(centre[..., None])[..., 0]
    return Optimum(c_, n, d, loss, edge) if draws else Optimum(c_, n[0], d[0], loss[0], edge[0])


def compute_optimal(
    fit: LawFit, c: Array | float, *, cost: Cost | None = None, params: Params | None = None
) -> Optimum:
    """Compute-optimal N, D, loss for a fit (or its draws `params`): closed form for 6ND, numeric for measured cost."""
    if not (fit.form.n_term and fit.form.d_term):
        raise InputError(f"{fit.form.formula}: a law without both terms has no compute-optimal size")
    cost = cost or Cost.of(fit.runs)
    use = fit.params if params is None else params
    if cost.kind == "6nd":
        c_ = np.atleast_1d(np.asarray(c, dtype=np.float64))
        n, d, loss = closed_form(use, c_, float(np.exp(cost.log_k[0])))
        return Optimum(c_, n, d, loss, ~np.isfinite(n))
    return optimum(use, cost, c, (float(fit.runs.n.min()) / REACH, float(fit.runs.n.max()) * REACH))


@dataclass(frozen=True)
class Regression:
    """App. C.2: slopes of log N*, log D* on log C, and of log D* on log N*, over budgets with an interior optimum."""

    a: float
    b: float
    d: float
    used: int
    dropped: int
    spacing: str

    def to_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)


def regress_allocation(
    fit: LawFit,
    *,
    cost: Cost | None = None,
    d_range: tuple[float, float] | None = None,
    spacing: Literal["log", "linear"] = "log",
    points: int = 4000,
) -> Regression | None:
    """The paper's regression: at every FLOP value of the runs, candidate token counts, N from C, the best of them.

    d_range defaults to ten times beyond the runs on both sides. None if fewer than 3 budgets have an interior optimum.
    """
    cost = cost or Cost.of(fit.runs)
    low, high = d_range or (float(fit.runs.d.min()) / 10.0, float(fit.runs.d.max()) * 10.0)
    d = np.geomspace(low, high, points) if spacing == "log" else np.linspace(low, high, points)
    c = np.unique(np.round(np.log(fit.runs.c), 3))
    n = cost.size(np.exp(c)[:, None], d[None, :])
    best = np.argmin(fit.predict(n, np.broadcast_to(d, n.shape)), axis=1)
    inside = (best > 0) & (best < points - 1)
    if inside.sum() < 3:
        return None
    log_n, log_d = np.log(n[np.arange(len(c)), best])[inside], np.log(d[best])[inside]
    slope = [float(np.polyfit(x, y, 1)[0]) for x, y in ((c[inside], log_n), (c[inside], log_d), (log_n, log_d))]
    return Regression(
        slope[0], slope[1], slope[2], used=int(inside.sum()), dropped=int((~inside).sum()), spacing=spacing
    )
