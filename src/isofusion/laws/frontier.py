"""Compute-optimal N and D, and the loss frontier L = k C^c.

Sources: arXiv 2504.07951 App. C (closed form a = beta/(alpha+beta), b = alpha/(alpha+beta); App. C.2 regression of
N*, D* on C; App. C.3 lower envelope). Compute is C = k(N) D: k = 6N, or measured on the runs (exact ledger, late
fusion), because 6ND is wrong there. Units: C in FLOPs, N parameters, D tokens.
Legend: S draws, c budgets, g grid points.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from isofusion.errors import InputError
from isofusion.laws.fit import LawFit
from isofusion.laws.forms import Params
from isofusion.laws.table import Array, Runs, clusters

GRID = 241  # points in log N of the numeric optimum before refinement
REACH = 1e4  # the numeric optimum looks this far outside the runs' sizes


@dataclass(frozen=True)
class Cost:
    """Training FLOPs per token as a function of N: C = k(N) D. `spread`: largest relative misfit of k at a size."""

    kind: Literal["6nd", "measured"]
    log_n: Array
    log_k: Array
    slope: float
    spread: float

    @classmethod
    def six_nd(cls, constant: float = 6.0) -> Cost:
        """C = constant · N · D."""
        return cls("6nd", np.zeros(1), np.log(np.array([constant])), 1.0, 0.0)

    @classmethod
    def measured(cls, runs: Runs) -> Cost:
        """k(N) from the runs' own FLOPs: log-log interpolation between sizes, log-log regression outside them."""
        cluster = clusters(runs.n)
        ids = range(int(cluster.max()) + 1)
        log_k = np.log(runs.c / runs.d)
        at_n = np.array([np.log(runs.n[cluster == i]).mean() for i in ids])
        at_k = np.array([log_k[cluster == i].mean() for i in ids])
        spread = float(np.max(np.abs(np.exp(log_k - at_k[cluster]) - 1.0)))
        slope = float(np.polyfit(at_n, at_k, 1)[0]) if len(at_n) > 1 else 1.0
        if slope <= 0:
            raise InputError(
                f"{runs.label or 'runs'}: FLOPs per token fall as N grows (slope {slope:.2f}); check the FLOPs column"
            )
        return cls("measured", at_n, at_k, slope, spread)

    @classmethod
    def of(cls, runs: Runs) -> Cost:
        """6ND where the table's compute is 6ND, else measured."""
        return cls.six_nd() if runs.compute == "6nd" else cls.measured(runs)

    def per_token(self, n: Array | float) -> Array:
        """FLOPs per token at N parameters."""
        x = np.log(np.asarray(n, dtype=np.float64))
        inside = np.interp(x, self.log_n, self.log_k)
        outside = np.minimum(x - self.log_n[0], 0.0) + np.maximum(x - self.log_n[-1], 0.0)
        return np.exp(inside + self.slope * outside)

    def tokens(self, c: Array | float, n: Array | float) -> Array:
        """D = C / k(N)."""
        return np.asarray(c, dtype=np.float64) / self.per_token(n)

    def size(self, c: Array | float, d: Array | float) -> Array:
        """N with k(N) = C / D (k interpolated on a fine grid)."""
        target = np.log(np.asarray(c, dtype=np.float64)) - np.log(np.asarray(d, dtype=np.float64))
        if self.kind == "6nd":
            return np.exp(target - self.log_k[0])
        grid = np.linspace(self.log_n[0] - np.log(REACH), self.log_n[-1] + np.log(REACH), 4001)
        return np.exp(np.interp(target, np.maximum.accumulate(np.log(self.per_token(np.exp(grid)))), grid))


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


@dataclass(frozen=True)
class Envelope:
    """Lower envelope of loss against compute and its fits L = k C^c and L = k2 C^c2 + E2 (E2 >= 0)."""

    hull_c: Array  # vertices of the lower convex hull in (log C, log L)
    hull_loss: Array
    c: Array  # sampled compute used for the fits
    loss: Array
    k: float
    exponent: float
    spread: float  # rms of log residuals of k C^c
    k_floor: float
    exponent_floor: float
    floor: float
    spread_floor: float
    cutoff: float  # FLOPs below which the envelope was dropped

    def predict(self, c: Array | float, floor: bool = False) -> Array:
        """k C^c, or k C^c + E."""
        c_ = np.asarray(c, dtype=np.float64)
        return self.floor + self.k_floor * c_**self.exponent_floor if floor else self.k * c_**self.exponent

    def to_dict(self) -> dict[str, Any]:
        keep = ("k", "exponent", "spread", "k_floor", "exponent_floor", "floor", "spread_floor", "cutoff")
        return {**{k: getattr(self, k) for k in keep}, "c_range": [float(self.c[0]), float(self.c[-1])]}


def size_curves(runs: Runs) -> list[tuple[Array, Array]]:
    """Per model size its (C, loss) curve, ascending in C; seeds averaged, so that luck does not make the envelope."""
    out = []
    size, budget = clusters(runs.n), clusters(runs.d)
    for s in range(int(size.max()) + 1):
        points = []
        for b in np.unique(budget[size == s]):
            rows = (size == s) & (budget == b)
            points.append((np.log(runs.c[rows]).mean(), np.log(runs.loss[rows]).mean()))
        points.sort()
        out.append((np.exp([p[0] for p in points]), np.exp([p[1] for p in points])))
    return out


def envelope(
    runs: Runs, *, cutoff: float = 3.0, points: int = 200, spacing: Literal["linear", "log"] = "linear"
) -> Envelope:
    """App. C.3: interpolate each size's curve, lower convex hull in log-log, drop C below cutoff x the lowest C, fit.

    The paper drops C <= 3e19, which is relative to its own range; here it is relative. Raises InputError if
    nothing is left.
    """
    if cutoff < 1:
        raise InputError(f"cutoff = {cutoff}: give a factor >= 1 on the lowest compute")
    xs, ys = [], []
    for c, loss in size_curves(runs):
        x = np.log(c)
        dense = np.linspace(x[0], x[-1], 64) if len(x) > 1 else x
        xs.append(dense)
        ys.append(np.interp(dense, x, np.log(loss)))
    hull_x, hull_y = _lower_hull(np.concatenate(xs), np.concatenate(ys))
    low = np.log(cutoff) + hull_x[0]
    if len(hull_x) < 2 or hull_x[-1] - low < np.log(1.5):
        raise InputError(
            f"{runs.label or 'runs'}: the lower envelope spans {np.exp(hull_x[-1] - hull_x[0]):.3g}x in compute; "
            f"dropping its lowest {cutoff:g}x leaves nothing to fit. Add longer or larger runs, or lower the cutoff"
        )
    c = (
        np.linspace(np.exp(low), np.exp(hull_x[-1]), points)
        if spacing == "linear"
        else np.geomspace(np.exp(low), np.exp(hull_x[-1]), points)
    )
    y = np.interp(np.log(c), hull_x, hull_y)
    slope, intercept = np.polyfit(np.log(c), y, 1)
    spread = float(np.sqrt(np.mean((y - intercept - slope * np.log(c)) ** 2)))
    k2, c2, e2, spread2 = _power_with_floor(c, np.exp(y))
    return Envelope(
        np.exp(hull_x),
        np.exp(hull_y),
        c,
        np.exp(y),
        float(np.exp(intercept)),
        float(slope),
        spread,
        k2,
        c2,
        e2,
        spread2,
        float(np.exp(low)),
    )


def _lower_hull(x: Array, y: Array) -> tuple[Array, Array]:
    """Lower convex hull (Andrew's monotone chain), cut at its lowest point: past it more compute does not help."""
    hull: list[tuple[float, float]] = []
    for p in sorted(zip(x.tolist(), y.tolist(), strict=True)):
        while len(hull) > 1 and (hull[-1][0] - hull[-2][0]) * (p[1] - hull[-2][1]) <= (hull[-1][1] - hull[-2][1]) * (
            p[0] - hull[-2][0]
        ):
            hull.pop()
        hull.append(p)
    lowest = min(range(len(hull)), key=lambda i: hull[i][1])
    out = np.array(hull[: lowest + 1])
    return out[:, 0], out[:, 1]


def _power_with_floor(c: Array, loss: Array) -> tuple[float, float, float, float]:
    """(k, exponent, E, rms log residual) of k C^c + E, E >= 0, relative least squares; k and E are linear given c."""
    x = np.log(c) - np.log(c).mean()

    def solve(exponent: float) -> tuple[float, float, float]:
        columns = np.column_stack([np.exp(exponent * x), np.ones_like(x)]) / loss[:, None]
        k, e = np.linalg.lstsq(columns, np.ones_like(x), rcond=None)[0]
        if e < 0:
            k, e = float(columns[:, 0].sum() / (columns[:, 0] @ columns[:, 0])), 0.0
        if k < 0:
            k, e = 0.0, float(columns[:, 1].sum() / (columns[:, 1] @ columns[:, 1]))
        return float(np.sum((columns @ np.array([k, e]) - 1.0) ** 2)), float(k), float(e)

    low, high = np.log(1e-3), np.log(3.0)
    for _ in range(6):  # zoom on -exponent; the profile has one minimum
        trial = np.linspace(low, high, 41)
        best = int(np.argmin([solve(-float(np.exp(t)))[0] for t in trial]))
        low, high = trial[max(0, best - 1)], trial[min(40, best + 1)]
    exponent = -float(np.exp(0.5 * (low + high)))
    _, k, e = solve(exponent)
    k_raw = k * float(np.exp(-exponent * np.log(c).mean()))
    spread = float(np.sqrt(np.mean((np.log(e + k_raw * c**exponent) - np.log(loss)) ** 2)))
    return k_raw, exponent, e, spread
