"""SUM of Huber_delta(log prediction - log loss), its exact gradient and Hessian, and a batched damped Newton solver.

The log prediction is a log-sum-exp of affine functions of theta, so with softmax weights p_k over the terms and their
design vectors z_k, d logpred = sum p_k z_k =: g and d2 logpred = sum p_k z_k z_k' - g g'. Everything is a moment sum
over runs. The SUM matters: a mean is so small that library tolerances stop at once (reference/fitting.md, fault 1).
Legend: S starts (or bootstrap draws), m runs, 5 parameters (log E, log A', alpha', log B', beta') standardised.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from isofusion.laws.forms import Form, Scale
from isofusion.laws.table import Array, Runs

CHUNK = 1 << 16  # S * m elements worked on at once, so that temporaries stay in cache
VANISHED = 16.0  # a term this many e-folds below the lowest loss (1e-7 of it) is at its floor


@dataclass(frozen=True)
class Problem:
    """Runs in the solver's coordinates. log_loss and weights are [m], or [S, m] when every start has its own."""

    x: Array
    y: Array
    log_loss: Array
    weights: Array
    lower: Array  # [5]
    upper: Array  # [5]
    free: np.ndarray  # bool[5]

    @classmethod
    def of(
        cls, runs: Runs, form: Form, scale: Scale, bounds: tuple[float, float], weights: Array | None = None
    ) -> Problem:
        log_loss = np.log(runs.loss)
        low, high = float(log_loss.min()), float(log_loss.max())
        lower = np.array(
            [low - VANISHED, low - VANISHED, bounds[0] * scale.spread_n, low - VANISHED, bounds[0] * scale.spread_d]
        )
        upper = np.array([high + 1.0, high + 30.0, bounds[1] * scale.spread_n, high + 30.0, bounds[1] * scale.spread_d])
        if weights is None:
            weights = np.ones(len(runs))
        return cls(scale.x(runs.n), scale.y(runs.d), log_loss, weights, lower, upper, form.free)


def terms(theta: Array, x: Array, y: Array) -> tuple[Array, Array, Array, Array]:
    """theta [S, 5] -> log prediction [S, m] and the shares of the three terms in it, each [S, m]."""
    t_e = theta[:, 0:1] + np.zeros_like(x)
    t_a = theta[:, 1:2] - theta[:, 2:3] * x
    t_b = theta[:, 3:4] - theta[:, 4:5] * y
    top = np.maximum(np.maximum(t_e, t_a), t_b)
    e, a, b = np.exp(t_e - top), np.exp(t_a - top), np.exp(t_b - top)
    total = e + a + b
    return top + np.log(total), e / total, a / total, b / total


def huber(residual: Array, delta: float) -> Array:
    """0.5 r^2 inside |r| <= delta, delta (|r| - delta/2) outside."""
    size = np.abs(residual)
    return np.where(size <= delta, 0.5 * residual * residual, delta * (size - 0.5 * delta))


def value(theta: Array, problem: Problem, delta: float) -> Array:
    """Objective [S] at theta [S, 5]."""
    log_pred = terms(theta, problem.x, problem.y)[0]
    return np.sum(problem.weights * huber(log_pred - problem.log_loss, delta), axis=-1)


def jacobian(theta: Array, problem: Problem) -> Array:
    """d log prediction / d theta, [S, 5, m]."""
    _, p_e, p_a, p_b = terms(theta, problem.x, problem.y)
    return np.stack([p_e, p_a, -problem.x * p_a, p_b, -problem.y * p_b], axis=1)


def derivatives(theta: Array, problem: Problem, delta: float) -> tuple[Array, Array, Array]:
    """Objective [S], gradient [S, 5], Hessian [S, 5, 5], all exact (at |r| = delta the Hessian is one-sided)."""
    x, y, w = problem.x, problem.y, problem.weights
    log_pred, p_e, p_a, p_b = terms(theta, x, y)
    r = log_pred - problem.log_loss
    f = np.sum(w * huber(r, delta), axis=-1)
    u = w * np.clip(r, -delta, delta)
    v = w * (np.abs(r) <= delta) - u
    g_p = np.stack([p_e, p_a, -x * p_a, p_b, -y * p_b], axis=1)
    grad = np.matmul(g_p, u[..., None])[..., 0]
    hess = np.matmul(g_p * v[:, None, :], np.swapaxes(g_p, 1, 2))
    # + sum_i u_i sum_k p_k z_k z_k': block diagonal, and mostly already in the gradient
    hess[:, 0, 0] += grad[:, 0]
    for i, share, z in ((1, p_a, x), (3, p_b, y)):
        hess[:, i, i] += grad[:, i]
        hess[:, i, i + 1] += grad[:, i + 1]
        hess[:, i + 1, i] += grad[:, i + 1]
        hess[:, i + 1, i + 1] += np.sum(u * share * (z * z), axis=-1)
    return f, grad, hess


@dataclass(frozen=True)
class Solution:
    """Ends of S starts: theta [S, 5], objective [S], norm of the projected gradient [S], whether it converged [S]."""

    theta: Array
    objective: Array
    gradient: Array
    converged: np.ndarray


def minimise(
    theta: Array, problem: Problem, delta: float, max_iterations: int = 200, tolerance: float = 1e-15
) -> Solution:
    """Damped Newton from every row of theta [S, 5] at once, inside the box; each start has its own damping.

    Eigenvalues enter by their absolute value (the objective is not convex); parameters held by a bound or not free are
    left out of the step. Stops when the predicted relative decrease is below `tolerance` (the default is rounding).
    """
    per_start = problem.log_loss.ndim == 2, problem.weights.ndim == 2
    rows = max(1, CHUNK // problem.x.size)
    parts = []
    for i in range(0, len(theta), rows):
        part = Problem(
            problem.x,
            problem.y,
            problem.log_loss[i : i + rows]
            if per_start[0]
            else np.broadcast_to(problem.log_loss, (len(theta[i : i + rows]), problem.x.size)),
            problem.weights[i : i + rows]
            if per_start[1]
            else np.broadcast_to(problem.weights, (len(theta[i : i + rows]), problem.x.size)),
            problem.lower,
            problem.upper,
            problem.free,
        )
        parts.append(_minimise(theta[i : i + rows], part, delta, max_iterations, tolerance))
    return Solution(
        *(np.concatenate([getattr(p, k) for p in parts]) for k in ("theta", "objective", "gradient", "converged"))
    )


def _take(problem: Problem, rows: np.ndarray) -> Problem:
    return Problem(
        problem.x, problem.y, problem.log_loss[rows], problem.weights[rows], problem.lower, problem.upper, problem.free
    )


def _minimise(start: Array, whole: Problem, delta: float, max_iterations: int, tolerance: float) -> Solution:
    free = whole.free
    theta_all = np.where(free, np.clip(start, whole.lower, whole.upper), start)
    f_all = np.empty(len(start))
    grad_all = np.empty(len(start))
    done_all = np.zeros(len(start), dtype=bool)
    live = np.arange(len(start))
    problem = whole
    theta = theta_all.copy()
    f, grad, hess = derivatives(theta, problem, delta)
    damp = np.full(len(start), 1e-3)
    for iteration in range(max_iterations + 1):
        held = ~free | ((theta <= problem.lower) & (grad > 0)) | ((theta >= problem.upper) & (grad < 0))
        g = np.where(held, 0.0, grad)
        h = np.where(held[:, :, None] | held[:, None, :], 0.0, hess)
        eigen, vectors = np.linalg.eigh(h)
        size = np.abs(eigen)
        top = np.maximum(size.max(axis=1), 1e-300)
        along = np.matmul(np.swapaxes(vectors, 1, 2), g[..., None])[..., 0]
        step = -np.matmul(vectors, (along / (size + (damp * top)[:, None] + 1e-14 * top[:, None]))[..., None])[..., 0]
        step = np.where(held, 0.0, step)
        step *= np.minimum(1.0, 3.0 / np.maximum(np.abs(step).max(axis=1), 1e-300))[:, None]
        trial = np.where(free, np.clip(theta + step, problem.lower, problem.upper), theta)
        moved = np.where(free, trial, 0.0) - np.where(free, theta, 0.0)  # a dropped term sits at -inf
        promise = -np.sum(g * moved, axis=1)  # first-order decrease, twice the Newton decrement
        done = (promise <= tolerance * f) | (f <= 1e-28 * problem.x.size)
        stuck = damp > 1e8
        stop = done | stuck | (iteration == max_iterations)
        if stop.any():
            rows = live[stop]
            theta_all[rows], f_all[rows] = theta[stop], f[stop]
            grad_all[rows], done_all[rows] = np.linalg.norm(g[stop], axis=1), (done | stuck)[stop]
            keep = ~stop
            live, theta, f, grad, hess, damp, trial = (a[keep] for a in (live, theta, f, grad, hess, damp, trial))
            problem = _take(problem, keep)
        if not len(live):
            break
        f_new, grad_new, hess_new = derivatives(trial, problem, delta)
        better = f_new < f
        theta = np.where(better[:, None], trial, theta)
        f = np.where(better, f_new, f)
        grad = np.where(better[:, None], grad_new, grad)
        hess = np.where(better[:, None, None], hess_new, hess)
        damp = np.where(better, damp * 0.1, np.maximum(damp, 1e-6) * 8.0)
    return Solution(theta_all, f_all, grad_all, done_all)
