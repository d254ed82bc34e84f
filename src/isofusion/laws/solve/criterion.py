"""What a fit minimises: a sum over rows of one of five measures of the gap between law and loss.

| kind        | gap z                      | measure                                                                |
| huber       | log prediction - log loss  | z^2/2 inside |z| <= delta, delta (|z| - delta/2) outside (the field's) |
| log-squares | log prediction - log loss  | z^2/2                                                                  |
| squares     | prediction - loss          | z^2/2                                                                  |
| l1          | log prediction - log loss  | |z|: the limit of huber/delta, what Besiroglu et al. 2404.10102 report |
| asymmetric  | prediction - loss          | w z above the loss, -z below (the `chinchilla` package's default)      |

The last two have corners. They are approached by rounding the corner (a quadratic of shrinking width) and finished
exactly by `polish`: at the optimum some rows are fitted exactly, and with those as equations Newton's method on the
Lagrangian ends at rounding. Legend: S starts, P parameters, m rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from isofusion.errors import InputError
from isofusion.laws.catalogue.law import Columns, Law
from isofusion.laws.table import Array

Kind = Literal["huber", "log-squares", "squares", "l1", "asymmetric"]
RATIO = 0.74  # of successive widths: in steps of ten the path jumps between the objective's own small basins


@dataclass(frozen=True)
class Criterion:
    """The measure; `delta` is huber's threshold, `w` what asymmetric charges for a prediction above the loss."""

    kind: Kind = "huber"
    delta: float = 1e-3
    w: float = 10.0

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise InputError(f"objective {self.kind!r}: choose {', '.join(get_args(Kind))}")
        if not self.delta > 0:
            raise InputError(f"delta = {self.delta}: give a positive threshold on log residuals (default 1e-3)")
        if not self.w > 0:
            raise InputError(f"w = {self.w}: give a positive charge for predictions above the loss (default 10)")

    @property
    def cornered(self) -> bool:
        return self.kind in ("l1", "asymmetric")

    @property
    def slopes(self) -> tuple[float, float]:
        """(below, above): slopes of a cornered measure on both sides."""
        return (1.0, self.w) if self.kind == "asymmetric" else (1.0, 1.0)

    def gap(self, log_prediction: Array, log_loss: Array) -> tuple[Array, Array | float, Array | float]:
        """z and its first and second derivative in the log prediction."""
        if self.kind in ("squares", "asymmetric"):
            prediction = np.exp(np.minimum(log_prediction, 300.0))
            return prediction - np.exp(log_loss), prediction, prediction
        return log_prediction - log_loss, 1.0, 0.0

    def value(self, log_prediction: Array, log_loss: Array) -> Array:
        """The measure itself, row by row."""
        z, _, _ = self.gap(log_prediction, log_loss)
        if self.cornered:
            below, above = self.slopes
            return np.where(z > 0, above * z, -below * z)
        return self.rounded(log_prediction, log_loss, self.delta)[0]

    def rounded(self, log_prediction: Array, log_loss: Array, width: float) -> tuple[Array, Array, Array]:
        """Measure with corners rounded over `width` (huber: its threshold), and derivatives in the log prediction."""
        z, first, second = self.gap(log_prediction, log_loss)
        if self.kind in ("squares", "log-squares"):
            rho, slope, bend = 0.5 * z * z, z, np.ones_like(z)
        else:
            below, above = self.slopes
            inside = np.clip(z, -below * width, above * width)
            scale = 1.0 if self.kind == "huber" else 1.0 / width
            rho = inside * (z - 0.5 * inside) * scale
            slope, bend = inside * scale, (inside == z) * scale
        return rho, slope * first, bend * first * first + slope * second

    def widths(self, typical: float) -> list[float]:
        """Widths from smooth to the last one, in fine steps; `typical`: a typical loss."""
        if self.kind in ("squares", "log-squares"):
            return [1.0]
        last = self.delta if self.kind == "huber" else 1e-6
        unit = typical if self.kind == "asymmetric" else 1.0
        if last >= 0.1:
            return [last * unit]
        steps = max(1, int(np.ceil(np.log(last / 0.1) / np.log(RATIO))))
        return [float(v) * unit for v in np.geomspace(0.1, last, steps + 1)]


def se_weights(se: Array, loss: Array, kind: Kind = "huber") -> Array:
    """Row weights [m], mean 1, from standard errors of the loss: 1/s^2 of the relative error s, 1/s for l1, asymmetric.

    Raises InputError unless every standard error is positive and finite.
    """
    se = np.asarray(se, dtype=np.float64)
    if se.shape != loss.shape or not (np.isfinite(se) & (se > 0)).all():
        raise InputError(f"standard errors must be {len(loss)} positive finite numbers; drop the weights or mend them")
    relative = se if kind in ("squares", "asymmetric") else se / loss
    weight = relative ** (-1.0 if kind in ("l1", "asymmetric") else -2.0)
    return weight / weight.mean()


@dataclass(frozen=True)
class FormProblem:
    """Rows, law and measure in the form newton() takes. log_loss and weights are [m], or [S, m] per start."""

    law: Law
    x: Columns
    log_loss: Array
    weights: Array
    criterion: Criterion
    width: float

    def __call__(self, theta: Array, which: np.ndarray) -> tuple[Array, Array, Array, Array]:
        """f [k], gradient [k, P], Hessian [k, P, P] and Gauss-Newton metric [k, P, P]; f is inf where undefined."""
        made = self.law.expand(theta, self.x)
        log_loss = self.log_loss if self.log_loss.ndim == 1 else self.log_loss[which]
        weights = self.weights if self.weights.ndim == 1 else self.weights[which]
        defined = np.asarray(np.isfinite(made.log_prediction).all(axis=1))
        log_prediction = np.where(defined[:, None], made.log_prediction, 0.0)
        jacobian = np.where(defined[:, None, None], made.jacobian, 0.0)
        rho, slope, bend = self.criterion.rounded(log_prediction, log_loss, self.width)
        u, v = weights * slope, weights * bend
        turned = np.swapaxes(jacobian, 1, 2)
        hess = np.matmul(jacobian * v[:, None, :], turned)
        with np.errstate(all="ignore"):
            bend_sum = made.curvature(u)
        usable = np.asarray(np.isfinite(bend_sum).all(axis=(1, 2)))  # else Gauss-Newton alone
        hess = hess + np.where(usable[:, None, None], bend_sum, 0.0)
        metric = np.matmul(jacobian * (weights + np.zeros_like(u))[:, None, :], turned)
        f = np.where(defined, np.sum(weights * rho, axis=1), np.inf)
        return f, np.matmul(jacobian, u[..., None])[..., 0], hess, metric

    def exact(self, theta: Array) -> Array:
        """The measure without rounding, summed over rows: [S]."""
        log_prediction = self.law.log_prediction(theta, self.x)
        with np.errstate(invalid="ignore"):
            total = np.sum(self.weights * self.criterion.value(log_prediction, self.log_loss), axis=1)
        return np.where(np.isfinite(total), total, np.inf)


def polish(theta: Array, problem: FormProblem, free: np.ndarray) -> tuple[Array, float, float] | None:
    """(theta [P], objective, gradient norm of the Lagrangian) at the exact corner near theta [P], or None if none is.

    The rows inside the rounded corner are taken as fitted exactly (there are at most as many as parameters); Newton on
    the Lagrangian; optimal if each multiplier lies between the measure's two slopes and no other row changed its side.
    """
    criterion, index = problem.criterion, np.flatnonzero(free)
    below, above = criterion.slopes
    theta = theta.copy()

    def rows(t: Array) -> tuple[Array, Array, Callable[[Array], Array]]:
        made = problem.law.expand(t[None], problem.x)
        z, first, second = criterion.gap(made.log_prediction[0], problem.log_loss)
        jacobian = made.jacobian[0][index] * first

        def curvature(u: Array) -> Array:
            with np.errstate(all="ignore"):
                inner = made.curvature((u * first)[None])[0][np.ix_(index, index)]
                return np.asarray(inner + (made.jacobian[0][index] * (u * second)) @ made.jacobian[0][index].T)

        return z, jacobian, curvature

    z, jacobian, curvature = rows(theta)
    active = np.flatnonzero((z >= -below * problem.width) & (z <= above * problem.width))
    if not 0 < len(active) <= len(index):
        return None
    side = np.where(z > 0, above, -below) * problem.weights
    side[active] = 0.0
    multiplier, norm = np.zeros(len(active)), np.inf
    for _ in range(30):
        u = side.copy()
        u[active] = multiplier
        touch = jacobian[:, active]
        top = np.concatenate([curvature(u), touch], axis=1)
        system = np.concatenate([top, np.concatenate([touch.T, np.zeros((len(active),) * 2)], axis=1)])
        right = -np.concatenate([jacobian @ side, z[active]])
        if not (np.isfinite(system).all() and np.isfinite(right).all()):
            return None
        solved = np.linalg.lstsq(system, right, rcond=1e-15)[0]
        step, multiplier = solved[: len(index)], solved[len(index) :]
        theta[index] += step
        if np.abs(step).max() > 30.0:  # left the neighbourhood
            return None
        z, jacobian, curvature = rows(theta)
        if not np.isfinite(z).all():
            return None
        u[active] = multiplier
        with np.errstate(all="ignore"):
            norm = float(np.linalg.norm(jacobian @ u))
        if np.abs(step).max() < 1e-13 * max(1.0, float(np.abs(theta[index]).max())):
            break
    slack = 1e-9 * problem.weights[active]
    inside = (multiplier >= -below * problem.weights[active] - slack) & (
        multiplier <= above * problem.weights[active] + slack
    )
    kept = np.sign(z) == np.sign(side)
    kept[active] = np.abs(z[active]) < 1e-9
    if not (inside.all() and kept.all()):
        return None
    return theta, float(problem.exact(theta[None])[0]), norm
