"""SUM of Huber_delta(log prediction - log loss), its exact gradient and Hessian, for the law E + A/N^alpha + B/D^beta.

The log prediction is a log-sum-exp of affine functions of theta, so with softmax weights p_k over the terms and their
design vectors z_k, d logpred = sum p_k z_k =: g and d2 logpred = sum p_k z_k z_k' - g g'. Everything is a moment sum
over runs against 1, x, x^2, y, y^2, xy, which all starts share: one matrix product each. The SUM matters: a mean is so
small that library tolerances stop at once (reference/fitting.md, fault 1). Other laws: law.py; other objectives:
criterion.py.
Legend: S starts (or bootstrap draws), m runs, 5 parameters (log E, log A', alpha', log B', beta') standardised.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from isofusion.laws.forms import Form, Scale
from isofusion.laws.solve.newton import Solution, newton
from isofusion.laws.solve.powers import Powers
from isofusion.laws.table import Array, Runs

__all__ = ["Kernel", "Problem", "Solution", "derivatives", "huber", "jacobian", "minimise", "terms", "value"]

CHUNK = 1 << 17  # S * m elements worked on at once: enough to hide what Python costs, few enough for the last cache
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

    @cached_property
    def columns(self) -> tuple[Powers, Powers, Array, Array, Array]:
        """exp(c - a x) and exp(c - b y); 1, x, x^2 [m, 3], 1, y, y^2 [m, 3] and 1, x, y, xy [m, 4]."""
        x, y, one = self.x, self.y, np.ones_like(self.x)
        return (
            Powers(x),
            Powers(y),
            np.stack([one, x, x * x], axis=1),
            np.stack([one, y, y * y], axis=1),
            np.stack([one, x, y, x * y], axis=1),
        )

    def but(self, *, log_loss: Array | None = None, weights: Array | None = None) -> Problem:
        """The same runs with other losses or weights, [m] or [S, m]; what was computed of their N and D is kept."""
        other = replace(
            self,
            log_loss=self.log_loss if log_loss is None else log_loss,
            weights=self.weights if weights is None else weights,
        )
        vars(other)["columns"] = self.columns
        return other


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


class Kernel:
    """Objective, gradient and Hessian of one Problem, in preallocated memory for up to `rows` starts at a time."""

    def __init__(self, problem: Problem, delta: float, rows: int) -> None:
        self.problem, self.delta = problem, delta
        power_a, power_b, self.by_a, self.by_b, self.by_ab = problem.columns
        self.power_a, self.power_b = power_a.anew(), power_b.anew()
        self.memory = np.empty((8, rows, problem.x.size))
        self.weighted = problem.weights.ndim == 2 or bool((problem.weights != 1.0).any())

    def __call__(self, theta: Array, which: np.ndarray) -> tuple[Array, Array, Array]:
        """f [k], gradient [k, 5], Hessian [k, 5, 5] at theta [k, 5] for the rows `which` of losses and weights."""
        k, problem, delta = len(theta), self.problem, self.delta
        p_a, p_b, r, u, v, v_a, v_b, work = self.memory[:, :k]
        log_loss = problem.log_loss if problem.log_loss.ndim == 1 else problem.log_loss[which]
        weights = problem.weights if problem.weights.ndim == 1 else problem.weights[which]
        there = np.isfinite(theta)
        finite = theta if there.all() else np.where(there, theta, 0.0)  # a dropped term: log coefficient -inf
        self.power_a(finite[:, 1:3], p_a)
        self.power_b(finite[:, 3:5], p_b)
        with np.errstate(over="ignore"):
            e = np.exp(theta[:, 0:1])
        if finite is not theta:
            p_a[~there[:, 1]] = 0.0
            p_b[~there[:, 3]] = 0.0
        np.add(p_a, p_b, out=v)
        v += e  # the prediction; the box keeps every exponent far from overflow, so no maximum is subtracted
        np.log(v, out=r)
        r -= log_loss
        np.divide(1.0, v, out=v)
        p_a *= v
        p_b *= v
        # u = w rho', v = w rho'' - u; rho = clipped r times (r - clipped r / 2)
        np.clip(r, -delta, delta, out=u)
        np.equal(u, r, out=v, casting="unsafe")
        np.multiply(u, 0.5, out=work)
        np.subtract(r, work, out=work)
        if self.weighted:
            u *= weights
            v *= weights
        f = np.einsum("sm,sm->s", u, work)
        v -= u
        np.multiply(v, p_a, out=v_a)
        np.multiply(v, p_b, out=v_b)
        np.multiply(v_a, p_b, out=work)
        ab = work @ self.by_ab
        mixed, slope, curve = [], [], []  # sums of v p, u p and v p^2 + u p against 1, x (and x^2)
        for share, own, by in ((p_a, v_a, self.by_a), (p_b, v_b, self.by_b)):
            mixed.append(own @ by[:, :2])
            np.multiply(u, share, out=work)
            slope.append(work @ by[:, :2])
            own *= share
            own += work
            curve.append(own @ by)
        # the three shares sum to 1, which gives all sums that have E's in them
        ea = mixed[0] - curve[0][:, :2] + slope[0] - ab[:, :2]
        eb = mixed[1] - curve[1][:, :2] + slope[1] - ab[:, ::2]
        grad, hess = np.empty((k, 5)), np.empty((k, 5, 5))
        grad[:, 0] = u.sum(axis=1) - slope[0][:, 0] - slope[1][:, 0]
        hess[:, 0, 0] = grad[:, 0] + v.sum(axis=1) - mixed[0][:, 0] - mixed[1][:, 0] - ea[:, 0] - eb[:, 0]
        for at, (down, bend) in ((1, (slope[0], curve[0])), (3, (slope[1], curve[1]))):
            grad[:, at], grad[:, at + 1] = down[:, 0], -down[:, 1]
            hess[:, at, at], hess[:, at + 1, at + 1] = bend[:, 0], bend[:, 2]
            hess[:, at, at + 1] = hess[:, at + 1, at] = -bend[:, 1]
        hess[:, 0, 1] = hess[:, 1, 0] = ea[:, 0]
        hess[:, 0, 2] = hess[:, 2, 0] = -ea[:, 1]
        hess[:, 0, 3] = hess[:, 3, 0] = eb[:, 0]
        hess[:, 0, 4] = hess[:, 4, 0] = -eb[:, 1]
        hess[:, 1, 3] = hess[:, 3, 1] = ab[:, 0]
        hess[:, 2, 3] = hess[:, 3, 2] = -ab[:, 1]
        hess[:, 1, 4] = hess[:, 4, 1] = -ab[:, 2]
        hess[:, 2, 4] = hess[:, 4, 2] = ab[:, 3]
        return f, grad, hess


def derivatives(theta: Array, problem: Problem, delta: float) -> tuple[Array, Array, Array]:
    """Objective [S], gradient [S, 5], Hessian [S, 5, 5], all exact (at |r| = delta the Hessian is one-sided)."""
    return Kernel(problem, delta, len(theta))(theta, np.arange(len(theta)))


def minimise(
    theta: Array, problem: Problem, delta: float, max_iterations: int = 200, tolerance: float = 1e-15
) -> Solution:
    """Damped Newton (solve/newton.py) from every row of theta [S, 5] at once, inside the box.

    Stops when the predicted relative decrease is below `tolerance` (the default is rounding).
    """
    slots = min(len(theta), max(8, CHUNK // problem.x.size))
    return newton(
        theta,
        Kernel(problem, delta, slots),
        problem.lower,
        problem.upper,
        problem.free,
        slots=slots,
        max_iterations=max_iterations,
        tolerance=tolerance,
        tiny=1e-28 * problem.x.size,
        logs=(0, 1, 3),
    )
