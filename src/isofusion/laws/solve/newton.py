"""A damped Newton solver for thousands of small problems at once: exact derivatives, boxes, one damping per start.

The starts live in a fixed number of slots that fit the cache; a start that has converged leaves its slot to the next
one, so that every vectorised call works on full arrays. Where the Hessian is positive definite the step is a closed
LDL' solve written over the batch; elsewhere eigenvalues enter by their absolute value (the objectives are not convex).
Legend: S slots, P parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from isofusion.laws.table import Array

Derivatives = Callable[[Array, np.ndarray], tuple[Array, ...]]
FIRST_DAMPING = 1e-4
LONGEST = 3.0  # longest step in any coordinate
MOST_TAKEN = 0.9  # share of a positive parameter that one step may take from it
FEW = 64  # problems up to which a LAPACK call each is sooner than a vectorised elimination


@dataclass(frozen=True)
class Solution:
    """Ends of S starts: theta [S, P], objective [S], norm of the projected gradient [S], whether it converged [S]."""

    theta: Array
    objective: Array
    gradient: Array
    converged: np.ndarray


def solve_positive(hess: Array, rhs: Array) -> tuple[Array, np.ndarray]:
    """(x [P, S], positive [S]): x solves hess [P, P, S] x = rhs [P, S] by LDL'; positive says where that is valid.

    The slots are the last axis, so that each of the P elimination steps is one operation on contiguous memory.
    """
    size = len(rhs)
    work, x = hess.copy(), rhs.copy()
    positive = np.ones(hess.shape[2], dtype=bool)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        for j in range(size):
            pivot = work[j, j]
            positive &= pivot > 1e-14 * hess[j, j]  # False for NaN and for a negative diagonal
            if j + 1 < size:
                ratio = work[j + 1 :, j] / pivot
                work[j + 1 :, j + 1 :] -= ratio[:, None] * work[j, j + 1 :][None]
                x[j + 1 :] -= ratio * x[j]
        for j in range(size - 1, -1, -1):
            x[j] = (x[j] - np.einsum("ks,ks->s", work[j, j + 1 :], x[j + 1 :])) / work[j, j]
    return x, positive & (np.einsum("ps,ps->s", hess[range(size), range(size)], hess[range(size), range(size)]) > 0)


def _solve_few(hess: Array, diagonal: Array, rhs: Array) -> Array | None:
    """x [S, P] with hess [S, P, P] x = rhs by LAPACK, a call each; None unless every matrix is positive definite."""
    try:
        root = np.linalg.cholesky(hess)
        x: Array = np.asarray(np.linalg.solve(hess, rhs[..., None])[..., 0], dtype=np.float64)
    except np.linalg.LinAlgError:
        return None
    pivots = np.diagonal(root, axis1=1, axis2=2) ** 2
    return x if (pivots > 1e-14 * diagonal).all() and np.isfinite(x).all() else None


def solve_any(hess: Array, rhs: Array, damp: Array) -> Array:
    """x [S, P] with (|hess| + damp top I) x = rhs: eigenvalues of hess [S, P, P] by absolute value, top the largest."""
    eigen, vectors = np.linalg.eigh(hess)
    size = np.abs(eigen)
    top = np.maximum(size.max(axis=1), 1e-300)[:, None]
    along = np.matmul(np.swapaxes(vectors, 1, 2), rhs[..., None])[..., 0]
    return np.matmul(vectors, (along / (size + damp[:, None] * top + 1e-14 * top))[..., None])[..., 0]


def newton_step(grad: Array, hess: Array, damp: Array, metric: Array | None = None) -> Array:
    """Descent step [S, P] from gradient [S, P] and Hessian [S, P, P]; parameters with a zero row stay where they are.

    Damping is a multiple of the identity, or of `metric` [S, P, P] (Gauss-Newton), which makes the step the same in
    whatever units and combinations the parameters are.
    """
    diagonal = np.arange(grad.shape[1])
    if metric is not None:
        scale = 1.0 / np.sqrt(np.maximum(metric[:, diagonal, diagonal], 1e-24))
        both = scale[:, :, None] * scale[:, None, :]
        metric = metric * both
        metric[:, diagonal, diagonal] += 1e-9
        return scale * _metric_step(grad * scale, hess * both, damp, metric)
    own = hess[:, diagonal, diagonal]
    own = own + (damp * np.abs(own).max(axis=1))[:, None]
    own[own == 0.0] = 1.0  # held parameters
    damped = hess.copy()
    damped[:, diagonal, diagonal] = own
    if len(hess) <= FEW and (found := _solve_few(damped, own, grad)) is not None:
        return -found
    x, positive = solve_positive(np.ascontiguousarray(np.moveaxis(damped, 0, 2)), np.ascontiguousarray(grad.T))
    step = -x.T
    rest = np.flatnonzero(~positive | ~np.isfinite(step).all(axis=1))
    if len(rest):
        step[rest] = -solve_any(hess[rest], grad[rest], damp[rest])
    return step


def _metric_step(grad: Array, hess: Array, damp: Array, metric: Array) -> Array:
    """The same with damping along `metric` (unit diagonal): in the coordinates where the metric is the identity."""
    root = np.linalg.cholesky(metric)
    inner = np.linalg.solve(root, np.swapaxes(np.linalg.solve(root, hess), 1, 2))
    inner = 0.5 * (inner + np.swapaxes(inner, 1, 2))
    z = solve_any(inner, np.linalg.solve(root, grad[..., None])[..., 0], damp)
    back = np.linalg.solve(np.swapaxes(root, 1, 2), z[..., None])[..., 0]
    return np.asarray(-back, dtype=np.float64)


def newton(
    start: Array,
    derivatives: Derivatives,
    lower: Array,
    upper: Array,
    free: np.ndarray,
    *,
    slots: int,
    max_iterations: int = 200,
    tolerance: float = 1e-15,
    longest: float | Array = LONGEST,
    tiny: float = 0.0,
    logs: Sequence[int] = (),
) -> Solution:
    """Minimise from every row of start [S, P]; derivatives(theta [k, P], which rows [k]) -> f, gradient, Hessian, and
    optionally a metric for the damping (see newton_step), as fresh arrays: they are written to.

    Parameters held by a bound, or not free, are left out of the step. A start ends when the predicted relative
    decrease is below `tolerance` (the default is rounding) or f is below `tiny`. logs: coordinates that are logarithms
    of what the law is linear in; Newton's step is then that of the parameter itself. The valleys of a small Huber
    threshold, along which a few rows stay fitted exactly, are nearly straight there and bent in the logarithm.
    """
    total = len(start)
    theta_all = np.where(free, np.clip(start, lower, upper), start)
    f_all, grad_all = np.full(total, np.inf), np.full(total, np.inf)
    done_all = np.zeros(total, dtype=bool)
    linear, fixed = np.array(logs, dtype=np.int64), ~free
    live = np.arange(min(slots, total))
    waiting = len(live)
    trial = theta_all[live]
    theta = trial.copy()
    count, size = len(live), start.shape[1]
    f, damp = np.full(count, np.inf), np.full(count, FIRST_DAMPING)
    age = np.zeros(count, dtype=np.int64)
    grad, hess, metric = np.zeros((count, size)), np.zeros((count, size, size)), np.zeros((count, size, size))
    while len(live):
        f_new, grad_new, hess_new, *metric_new = derivatives(trial, live)
        better = f_new < f
        lowered = np.where(np.isinf(f), damp, np.where(damp < 1e-9, 0.0, damp * 0.03))
        if better.all():
            theta, f, grad, hess, damp = trial, f_new, grad_new, hess_new, lowered
            metric = metric_new[0] if metric_new else metric
        else:
            damp = np.where(better, lowered, np.where(np.isinf(f), damp, _raise(damp)))
            np.copyto(theta, trial, where=better[:, None])
            np.copyto(f, f_new, where=better)
            np.copyto(grad, grad_new, where=better[:, None])
            np.copyto(hess, hess_new, where=better[:, None, None])
            if metric_new:
                np.copyto(metric, metric_new[0], where=better[:, None, None])
        lost = ~np.isfinite(f)  # a start at which the law is not defined
        held = fixed | ((theta <= lower) & (grad > 0)) | ((theta >= upper) & (grad < 0))
        g, h, still = grad, hess, bool(held.any())
        if still:
            g = np.where(held, 0.0, grad)
            pairs = held[:, :, None] | held[:, None, :]
            h = np.where(pairs, 0.0, hess)
        if linear.size:
            h = h.copy() if h is hess else h
            h[:, linear, linear] -= g[:, linear]
        down = np.where(lost[:, None], 0.0, g) if lost.any() else g
        step = newton_step(down, h, damp, (np.where(pairs, 0.0, metric) if still else metric) if metric_new else None)
        step *= np.minimum(1.0, 1.0 / np.maximum(np.abs(step / longest).max(axis=1), 1e-300))[:, None]
        if linear.size:
            step *= np.minimum(1.0, MOST_TAKEN / np.maximum(-step[:, linear].min(axis=1), 1e-300))[:, None]
            step[:, linear] = np.log1p(step[:, linear])
        trial = np.minimum(np.maximum(theta + step, lower), upper)
        if still:
            trial = np.where(held, theta, trial)
        # first-order decrease, twice the Newton decrement; a dropped term sits at -inf and does not move
        moved = trial - theta if free.all() else np.where(free, trial, 0.0) - np.where(free, theta, 0.0)
        promise = -np.sum(g * moved, axis=1)
        done = (np.abs(promise) <= tolerance * f) | (f <= tiny)  # a step the box bends may point up: not an end
        stuck = damp > 1e8
        stop = done | stuck | lost | (age >= max_iterations)
        age += 1
        if not stop.any():
            continue
        rows = live[stop]
        theta_all[rows], f_all[rows] = theta[stop], f[stop]
        grad_all[rows], done_all[rows] = np.sqrt(np.sum(g[stop] ** 2, axis=1)), ((done | stuck) & ~lost)[stop]
        new = np.arange(waiting, min(total, waiting + len(rows)))
        waiting += len(new)
        at = np.flatnonzero(stop)
        put, drop = at[: len(new)], at[len(new) :]
        live = live.copy()
        live[put], trial[put], f[put], damp[put], age[put] = new, theta_all[new], np.inf, FIRST_DAMPING, 0
        theta[put] = trial[put]
        if len(drop):
            keep = np.ones(len(live), dtype=bool)
            keep[drop] = False
            live, age = live[keep], age[keep]
            theta, trial, f, damp = theta[keep], trial[keep], f[keep], damp[keep]
            grad, hess, metric = grad[keep], hess[keep], metric[keep]
    return Solution(theta_all, f_all, grad_all, done_all)


def _raise(damp: Array) -> Array:
    return np.maximum(damp, 1e-6) * 8.0
