"""The loss frontier L = k C^c through the lower envelope of a table of runs (arXiv 2504.07951 App. C.3).

It needs no law of N and D, so it is a check on one and a baseline for its predictions; and the sizes on the envelope
give an allocation of their own (Hoffmann et al. 2203.15556, approach 1). Units: C in FLOPs, loss in nats/token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from isofusion.errors import InputError
from isofusion.laws.table import Array, Runs, cell_means, clusters


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
    size, _, c, loss = cell_means(clusters(runs.n), clusters(runs.d), np.log(runs.c), np.log(runs.loss))
    order = np.lexsort((loss, c, size))
    ends = np.flatnonzero(np.diff(size)) + 1
    return [(np.exp(c[rows]), np.exp(loss[rows])) for rows in np.split(order, ends)]


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


@dataclass(frozen=True)
class BestSizes:
    """N*(C) = exp(intercept) C^a through the sizes that are best at some compute (Hoffmann et al., approach 1)."""

    a: float
    intercept: float
    sizes: int  # sizes that are best somewhere and not the smallest or largest

    def size(self, c: Array | float) -> Array:
        """Compute-optimal N at c FLOPs."""
        return np.exp(self.intercept + self.a * np.log(np.asarray(c, dtype=np.float64)))


def best_sizes(runs: Runs, points: int = 200) -> BestSizes | None:
    """At `points` values of compute the size whose (interpolated) curve is lowest; log N regressed on log C.

    Compute where the smallest or the largest size wins is left out: the best size may lie outside the runs there.
    None where fewer than three sizes remain.
    """
    curves = size_curves(runs)
    cluster = clusters(runs.n)
    n = np.array([np.exp(np.log(runs.n[cluster == k]).mean()) for k in range(len(curves))])
    x = np.linspace(np.log(runs.c.min()), np.log(runs.c.max()), points)
    table = np.array([np.interp(x, np.log(c), np.log(y), left=np.inf, right=np.inf) for c, y in curves])
    best = np.argmin(table, axis=0)
    keep = np.isfinite(table.min(axis=0)) & (best > 0) & (best < len(curves) - 1)
    used = len(np.unique(best[keep]))
    if used < 3:
        return None
    a, intercept = np.polyfit(x[keep], np.log(n[best[keep]]), 1)
    return BestSizes(float(a), float(intercept), used)


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

    def solve(exponent: Array) -> tuple[Array, Array, Array]:
        """Sum of squares, k and E per exponent [t]."""
        power, floor = np.exp(exponent[:, None] * x) / loss, 1.0 / loss
        pp, pf, ff = (power * power).sum(axis=1), power @ floor, floor @ floor
        p1, f1 = power.sum(axis=1), floor.sum()
        singular = pp * ff - pf * pf
        with np.errstate(divide="ignore", invalid="ignore"):
            k, e = (p1 * ff - f1 * pf) / singular, (f1 * pp - p1 * pf) / singular
        k, e = np.where(e < 0, p1 / pp, k), np.where(e < 0, 0.0, e)
        k, e = np.where(k < 0, 0.0, k), np.where(k < 0, f1 / ff, e)
        return ((k[:, None] * power + e[:, None] * floor - 1.0) ** 2).sum(axis=1), k, e

    low, high = np.log(1e-3), np.log(3.0)
    for _ in range(6):  # zoom on -exponent; the profile has one minimum
        trial = np.linspace(low, high, 41)
        best = int(np.argmin(solve(-np.exp(trial))[0]))
        low, high = trial[max(0, best - 1)], trial[min(40, best + 1)]
    exponent = -float(np.exp(0.5 * (low + high)))
    k, e = (float(v[0]) for v in solve(np.array([exponent]))[1:])
    k_raw = k * float(np.exp(-exponent * np.log(c).mean()))
    spread = float(np.sqrt(np.mean((np.log(e + k_raw * c**exponent) - np.log(loss)) ** 2)))
    return k_raw, exponent, e, spread
