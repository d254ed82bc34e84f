"""Standard errors of a fit's parameters that do not take least squares for granted: the sandwich estimate.

A measure that is flat in its tails (Huber, l1) moves its minimum by what the rows near its corner say, not by the
spread of all residuals: B^-1 M B^-1, M the squares of the slopes and B the bend, both summed with the rows' gradients
(Huber, "The behavior of maximum likelihood estimates under nonstandard conditions", 1967). The bend of a corner is a
density, counted over the nearer half of the residuals (Powell's estimate: Koenker, "Quantile Regression", 2005, 3.4).

Rows are taken for independent: where they share a trunk's luck only the bootstrap of trunks is honest. Measured for
alpha over 150 simulated studies each of 16 to 49 runs with normal, Laplace and t noise: 1.02 to 1.22 of its true spread
(least squares 0.79 to 1.19, and without limit once a run is wild). Beside the converged bootstrap of Epoch's 240 rows:
E 0.86, A 0.98, alpha 0.98, beta 0.73, B 0.50 of it (least squares 0.68, 0.75, 0.73, 0.49, 0.34).
Legend: P parameters, m rows.
"""

from __future__ import annotations

import numpy as np

from isofusion.laws.solve.criterion import Criterion
from isofusion.laws.table import Array

NEAR = 0.5  # share of the residuals, without the P that a corner fits exactly, over which the density is counted
WORSE = 1e3  # times the condition of all rows: the near ones alone do not fix every parameter


def sandwich(
    jacobian: Array, log_prediction: Array, log_loss: Array, criterion: Criterion, weights: Array | float = 1.0
) -> Array:
    """Standard errors [P] of the parameters in whose gradient of the log prediction jacobian [P, m] stands.

    NaN where the rows do not fix them.
    """
    count, rows = jacobian.shape
    length = np.linalg.norm(jacobian, axis=1)
    unknown = np.full(count, np.nan)
    if rows <= count or (length <= 0).any() or not np.isfinite(jacobian).all():
        return unknown
    unit = jacobian / length[:, None]
    slope, bend = _derivatives(log_prediction, log_loss, criterion, count)
    spread = (unit * (np.asarray(weights) * slope) ** 2) @ unit.T * (rows / (rows - count))
    bends = [(unit * (np.asarray(weights) * each)) @ unit.T for each in (bend, np.full(rows, bend.mean()))]
    near, every = (float(np.linalg.cond(b)) for b in bends)
    try:
        inverse = np.linalg.inv(bends[0] if near <= WORSE * every else bends[1])
    except np.linalg.LinAlgError:
        return unknown
    with np.errstate(invalid="ignore"):
        return np.asarray(np.sqrt(np.diag(inverse @ spread @ inverse)) / length)


def _derivatives(log_prediction: Array, log_loss: Array, criterion: Criterion, count: int) -> tuple[Array, Array]:
    """First and second derivative [m] of the measure in the log prediction, its corners spread over the near rows."""
    z, first, _ = criterion.gap(log_prediction, log_loss)
    if criterion.kind in ("squares", "log-squares"):
        return z * first, np.ones_like(z) * first * first
    below, above = criterion.slopes
    away = np.maximum(z / above, -z / below)
    width = max(float(np.quantile(np.sort(away)[count:], NEAR)), 1e-12)
    if criterion.kind == "huber":
        width = max(width, criterion.delta)
        slope, height = np.clip(z, -criterion.delta, criterion.delta), criterion.delta / width
    else:
        slope, height = np.where(z > 0, above, -below), 1.0 / width
    return np.asarray(slope * first), np.asarray(height * (away <= width) * first * first)
