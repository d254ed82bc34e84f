"""Minimise the objective on a surface q(theta) = t: damped Newton in the tangent space, then back onto the surface.

Used by profile.py. q is any smooth function of the parameters; its first and second derivatives are central
differences in the solver's coordinates (31 evaluations for every start at once), the objective's are exact.
Legend: S starts, 5 parameters in the solver's coordinates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from isofusion.laws.fit import LawFit
from isofusion.laws.forms import Params
from isofusion.laws.objective import Kernel, Problem, Solution, jacobian
from isofusion.laws.table import Array

WIDTH = 1e-4  # of the differences; coordinates are standardised, so all are of order one
CLOSE = 1e-9  # relative distance from the surface that counts as on it
LONGEST = 1.0  # longest step in any coordinate


@dataclass(frozen=True)
class Constraint:
    """q as a function of theta, with derivatives; q of positive quantities is taken in its logarithm inside."""

    of_params: Callable[[Params], Array]
    fit: LawFit
    log: bool

    @classmethod
    def of(cls, quantity: Callable[[Params], Array], fit: LawFit) -> Constraint:
        """A quantity that is positive at the fit and is fixed by its logarithm (A, N*, ...) is kept positive."""
        value = float(np.asarray(quantity(_params(fit, fit.theta[None]))).ravel()[0])
        return cls(quantity, fit, value > 0)

    def params(self, theta: Array) -> Params:
        return _params(self.fit, theta)

    def value(self, theta: Array) -> Array:
        """q at theta [S, 5]: [S], in the quantity's own unit."""
        with np.errstate(all="ignore"):
            return np.asarray(self.of_params(self.params(theta)), dtype=np.float64).reshape(len(theta))

    def inner(self, theta: Array) -> Array:
        with np.errstate(all="ignore"):
            value = self.value(theta)
            return np.log(value) if self.log else value

    def to_inner(self, target: Array) -> Array:
        with np.errstate(all="ignore"):
            return np.log(target) if self.log else target

    def possible(self, target: float) -> bool:
        return target > 0 or not self.log

    def edge(self, sign: float) -> float:
        """The value past which the quantity cannot go on this side."""
        return 0.0 if self.log and sign < 0 else sign * np.inf

    def gradient(self, theta: Array) -> Array:
        """d q / d theta [S, 5] (of log q where `log`); zero where a parameter is not free."""
        return self.slope(theta)[1]

    def slope(self, theta: Array) -> tuple[Array, Array]:
        """q [S] and its gradient [S, 5]: 11 evaluations where `derivatives` takes 31."""
        free = np.flatnonzero(self.fit.form.free)
        shifts = np.zeros((1 + 2 * len(free), theta.shape[1]))
        shifts[1 + np.arange(len(free)), free] = WIDTH
        shifts[1 + len(free) + np.arange(len(free)), free] = -WIDTH
        q = self.inner((theta[:, None, :] + shifts[None]).reshape(-1, theta.shape[1])).reshape(len(theta), -1)
        grad = np.zeros((len(theta), 5))
        grad[:, free] = (q[:, 1 : 1 + len(free)] - q[:, 1 + len(free) :]) / (2.0 * WIDTH)
        return q[:, 0], np.nan_to_num(grad)

    def derivatives(self, theta: Array) -> tuple[Array, Array, Array]:
        """q [S], gradient [S, 5] and Hessian [S, 5, 5] (of log q where `log`); zero where a parameter is not free."""
        free = np.flatnonzero(self.fit.form.free)
        k = len(free)
        pairs = [(i, j) for i in range(k) for j in range(i)]
        shifts = np.zeros((1 + 2 * k + 2 * len(pairs), theta.shape[1]))
        for i, f in enumerate(free):
            shifts[1 + 2 * i, f], shifts[2 + 2 * i, f] = WIDTH, -WIDTH
        for n, (i, j) in enumerate(pairs):
            row = 1 + 2 * k + 2 * n
            shifts[row, free[[i, j]]], shifts[row + 1, free[[i, j]]] = WIDTH, -WIDTH
        points = (theta[:, None, :] + shifts[None]).reshape(-1, theta.shape[1])
        q = self.inner(points).reshape(len(theta), -1)
        at, plus, minus = q[:, 0], q[:, 1 : 1 + 2 * k : 2], q[:, 2 : 2 + 2 * k : 2]
        grad, hess = np.zeros((len(theta), 5)), np.zeros((len(theta), 5, 5))
        grad[:, free] = (plus - minus) / (2.0 * WIDTH)
        hess[:, free, free] = (plus - 2.0 * at[:, None] + minus) / WIDTH**2
        for n, (i, j) in enumerate(pairs):
            both = q[:, 1 + 2 * k + 2 * n] + q[:, 2 + 2 * k + 2 * n] - 2.0 * at
            one = plus[:, i] + minus[:, i] + plus[:, j] + minus[:, j] - 4.0 * at
            mixed = (both - one) / (2.0 * WIDTH**2)
            hess[:, free[i], free[j]] = hess[:, free[j], free[i]] = mixed
        return at, np.nan_to_num(grad), np.nan_to_num(hess)

    def first_step(self, theta: Array, fit: LawFit, threshold: float) -> float:
        """A third of a rough half-width: the quantity's standard error from the Gauss-Newton matrix."""
        problem = Problem.of(fit.runs, fit.form, fit.scale, fit.bounds)
        gauss = jacobian(theta[None], problem)[0][fit.form.free]
        slope = self.gradient(theta[None])[0][fit.form.free]
        eigen, vectors = np.linalg.eigh(gauss @ gauss.T)
        along = (vectors.T @ slope) ** 2 / np.maximum(eigen, 1e-12 * eigen[-1])  # flat directions are wide, not absent
        spread = float(np.sqrt(along.sum())) * fit.residual_spread
        value = float(self.value(theta[None])[0])
        step = min(0.6 * spread, 2.0) * value if self.log else 0.6 * spread
        return abs(float(step)) or 1e-6


def _params(fit: LawFit, theta: Array) -> Params:
    p = fit.scale.to_params(theta)
    count = len(theta)
    zero, gone = np.zeros(count), np.full(count, np.nan)
    return Params(
        p.E if fit.form.fixed_e is None else np.full(count, fit.form.fixed_e),
        p.A if fit.form.n_term else zero,
        p.alpha if fit.form.n_term else gone,
        p.B if fit.form.d_term else zero,
        p.beta if fit.form.d_term else gone,
    )


def retract(theta: Array, problem: Problem, constraint: Constraint, target: Array) -> tuple[Array, np.ndarray]:
    """Newton steps along the gradient of q onto q = target (inner scale): (theta [S, 5], whether it got there [S])."""
    theta = theta.copy()
    gap = np.full(len(theta), np.inf)
    for _ in range(30):
        at, slope = constraint.slope(theta)
        gap = target - at
        away = ~(np.abs(gap) <= CLOSE * (1.0 + np.abs(target)))
        if not away.any():
            break
        held = ((theta <= problem.lower) & (slope * gap[:, None] < 0)) | (
            (theta >= problem.upper) & (slope * gap[:, None] > 0)
        )
        slope = np.where(held, 0.0, slope)
        norm = np.maximum(np.sum(slope**2, axis=1), 1e-300)
        step = slope * (gap / norm)[:, None]
        step *= np.minimum(1.0, LONGEST / np.maximum(np.abs(step).max(axis=1), 1e-300))[:, None]
        step = np.where(np.isfinite(step) & away[:, None], step, 0.0)
        theta = np.where(problem.free, np.clip(theta + step, problem.lower, problem.upper), theta)
    return theta, np.abs(gap) <= CLOSE * (1.0 + np.abs(target))


def minimise_on(
    start: Array, problem: Problem, delta: float, constraint: Constraint, target: Array, max_iterations: int = 120
) -> Solution:
    """Minimise from start [S, 5] on q = target [S] (the quantity's unit). objective inf where it cannot be met.

    `gradient` is the norm of the gradient in the tangent space.
    """
    want = constraint.to_inner(np.asarray(target, dtype=np.float64))
    theta, on = retract(start, problem, constraint, want)
    stages = [d for d in (1e-1, 1e-2, 1e-3, 1e-4) if delta * 1.001 < d <= 1e-2] + [delta]
    result = None
    for stage in stages:
        loose = 1e-7 if stage != stages[-1] else 1e-14
        result = _descend(theta, on, problem, stage, constraint, want, max_iterations, loose)
        theta = result.theta
    assert result is not None
    return result


def _descend(
    start: Array,
    on: np.ndarray,
    problem: Problem,
    delta: float,
    constraint: Constraint,
    want: Array,
    max_iterations: int,
    tolerance: float,
) -> Solution:
    total = len(start)
    theta_all, f_all, g_all = start.copy(), np.full(total, np.inf), np.full(total, np.inf)
    done_all = np.zeros(total, dtype=bool)
    live = np.flatnonzero(on)
    if not len(live):
        return Solution(theta_all, f_all, g_all, done_all)
    theta, damp = start[live], np.full(len(live), 1e-3)
    derivatives = Kernel(problem, delta, len(live))
    f, grad, hess = derivatives(theta, live)
    for iteration in range(max_iterations + 1):
        _, slope, bend = constraint.derivatives(theta)
        held = np.broadcast_to(~problem.free, theta.shape).copy()
        for _ in range(2):  # the multiplier and what the box holds depend on each other
            s = np.where(held, 0.0, slope)
            norm = np.maximum(np.sum(s**2, axis=1), 1e-300)
            multiplier = np.sum(np.where(held, 0.0, grad) * s, axis=1) / norm
            lagrange = grad - multiplier[:, None] * slope
            held |= ((theta <= problem.lower) & (lagrange > 0)) | ((theta >= problem.upper) & (lagrange < 0))
        s = np.where(held, 0.0, slope)
        unit = s / np.sqrt(np.maximum(np.sum(s**2, axis=1), 1e-300))[:, None]
        project = np.eye(5) - unit[:, :, None] * unit[:, None, :]
        project = np.where(held[:, :, None] | held[:, None, :], 0.0, project)
        g = np.matmul(project, np.where(held, 0.0, lagrange)[..., None])[..., 0]
        h = np.matmul(np.matmul(project, hess - multiplier[:, None, None] * bend), project)
        eigen, vectors = np.linalg.eigh(h)
        size = np.abs(eigen)
        top = np.maximum(size.max(axis=1), 1e-300)
        along = np.matmul(np.swapaxes(vectors, 1, 2), g[..., None])[..., 0]
        step = -np.matmul(vectors, (along / (size + (damp * top)[:, None] + 1e-14 * top[:, None]))[..., None])[..., 0]
        step = np.matmul(project, step[..., None])[..., 0]
        step *= np.minimum(1.0, LONGEST / np.maximum(np.abs(step).max(axis=1), 1e-300))[:, None]
        promise = -np.sum(g * step, axis=1)
        done = (promise <= tolerance * f) | (f <= 1e-28 * problem.x.size) | (damp > 1e7)
        stop = done | (iteration == max_iterations)
        if stop.any():
            rows = live[stop]
            theta_all[rows], f_all[rows], done_all[rows] = theta[stop], f[stop], done[stop]
            g_all[rows] = np.linalg.norm(g[stop], axis=1)
            keep = ~stop
            live, theta, f, grad, hess, damp, step = (a[keep] for a in (live, theta, f, grad, hess, damp, step))
        if not len(live):
            break
        moved = np.where(problem.free, np.clip(theta + step, problem.lower, problem.upper), theta)
        trial, back = retract(moved, problem, constraint, want[live])
        f_new, grad_new, hess_new = derivatives(trial, live)
        better = back & (f_new < f)
        theta = np.where(better[:, None], trial, theta)
        f = np.where(better, f_new, f)
        grad = np.where(better[:, None], grad_new, grad)
        hess = np.where(better[:, None, None], hess_new, hess)
        damp = np.where(better, damp * 0.1, np.maximum(damp, 1e-6) * 8.0)
    return Solution(theta_all, f_all, g_all, done_all)
