"""Two neighbours of the additive law, fitted from it, to see how far the answer rests on the law's shape.

"tied": L = E + A/N^alpha + B/D^alpha. "p-norm": L = E + ((A/N^alpha)^p + (B/D^beta)^p)^(1/p), which is the additive
law at p = 1 and the larger of the two terms as p grows. Both are fitted to the same objective (sum of Huber on log
residuals) by L-BFGS-B with exact gradients from the additive fit, through the same continuation in delta. They are
looked at for what they say about N*, not for their own parameters. Legend: m runs, c budgets, g sizes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from isofusion.laws.cost import REACH, Cost
from isofusion.laws.fit import LawFit, continuation
from isofusion.laws.table import Array, Runs

P_RANGE = (0.25, 8.0)  # past 8 the p-norm is the larger term to 9 % at worst
P_STARTS = (0.5, 1.0, 2.0, 4.0)
SIZES = 1601  # sizes on which an optimum is looked for, before a parabola refines it

Kind = Literal["tied", "p-norm"]


@dataclass(frozen=True)
class Alternative:
    """A fitted neighbour of the additive law. E in nats/token; A, B in nats/token at N = 1, D = 1."""

    kind: Kind
    E: float
    log_a: float
    alpha: float
    log_b: float
    beta: float
    p: float
    free: int  # fitted parameters
    objective: float

    @property
    def note(self) -> str:
        return f"p = {self.p:.3g}" if self.kind == "p-norm" else ""

    def predict(self, n: Array | float, d: Array | float) -> Array:
        """Loss in nats/token at n parameters and d tokens, which broadcast."""
        t_a = self.p * (self.log_a - self.alpha * np.log(np.asarray(n, dtype=np.float64)))
        t_b = self.p * (self.log_b - self.beta * np.log(np.asarray(d, dtype=np.float64)))
        return self.E + np.exp(np.logaddexp(t_a, t_b) / self.p)

    def optimum(self, cost: Cost, c: Array, runs: Runs) -> tuple[Array, Array, Array]:
        """Compute-optimal (N, D, loss) at c [c] by search over N; NaN where the search range ends first."""
        x = np.linspace(np.log(runs.n.min() / REACH), np.log(runs.n.max() * REACH), SIZES)
        c_ = np.asarray(c, dtype=np.float64)
        with np.errstate(over="ignore"):
            loss = self.predict(np.exp(x), cost.tokens(c_[:, None], np.exp(x)))
        best = np.argmin(loss, axis=1)
        inner = np.clip(best, 1, SIZES - 2)
        rows = np.arange(len(c_))
        left, mid, right = (loss[rows, inner + s] for s in (-1, 0, 1))
        bend = left - 2.0 * mid + right
        shift = np.where(bend > 0, 0.5 * (left - right) / np.where(bend > 0, bend, 1.0), 0.0)
        n = np.exp(x[inner] + np.clip(shift, -1.0, 1.0) * (x[1] - x[0]))
        n = np.where(inner == best, n, np.nan)
        d = cost.tokens(c_, n)
        return n, d, self.predict(n, d)


def fit_alternative(fit: LawFit, kind: Kind) -> Alternative:
    """Fit the neighbour to the runs of an additive fit with both terms, at its delta and with its E fixed if it was."""
    from scipy.optimize import minimize

    runs, fixed = fit.runs, fit.form.fixed_e
    centre_n, centre_d = float(np.log(runs.n).mean()), float(np.log(runs.d).mean())
    x, y, target = np.log(runs.n) - centre_n, np.log(runs.d) - centre_d, np.log(runs.loss)
    low = float(target.min())
    e0 = np.log(max(fit.E, np.exp(low - 16.0))) if fixed is None else (np.log(fixed) if fixed > 0 else -np.inf)
    a0 = np.log(max(fit.A, 1e-300)) - fit.alpha * centre_n
    b0 = np.log(max(fit.B, 1e-300)) - fit.beta * centre_d

    def unpack(v: Array) -> tuple[float, float, float, float, float, float]:
        e = float(v[0]) if fixed is None else e0
        v = v[1:] if fixed is None else v
        if kind == "tied":
            return e, float(v[0]), float(v[1]), float(v[2]), float(v[1]), 1.0
        return e, float(v[0]), float(v[1]), float(v[2]), float(v[3]), float(np.exp(v[4]))

    def value(v: Array, delta: float, scale: float) -> tuple[float, Array]:
        e, a, alpha, b, beta, p = unpack(v)
        t_a, t_b = a - alpha * x, b - beta * y
        both = np.logaddexp(p * t_a, p * t_b)
        log_pred = np.logaddexp(e, both / p)
        r = log_pred - target
        size = np.abs(r)
        f = float(np.sum(np.where(size <= delta, 0.5 * r * r, delta * (size - 0.5 * delta))))
        u = np.clip(r, -delta, delta)
        above = u * np.exp(both / p - log_pred)  # weight of the two terms together
        s_a = np.exp(p * t_a - both)
        g_a, g_b = above * s_a, above * (1.0 - s_a)
        grad = [float(np.sum(u - above))] if fixed is None else []
        d_alpha, d_beta = -float(np.sum(g_a * x)), -float(np.sum(g_b * y))
        if kind == "tied":
            grad += [float(g_a.sum()), d_alpha + d_beta, float(g_b.sum())]
        else:
            slope = (s_a * t_a + (1.0 - s_a) * t_b) - both / p  # d (both / p) / d log p
            grad += [float(g_a.sum()), d_alpha, float(g_b.sum()), d_beta, float(np.sum(above * slope))]
        return f / scale, np.array(grad) / scale

    edge: list[tuple[float, float | None]] = [(low - 16.0, low)] if fixed is None else []
    exponent = fit.bounds
    if kind == "tied":
        starts = [[a0, 0.5 * (fit.alpha + fit.beta), b0]]
        edge += [(low - 16.0, None), exponent, (low - 16.0, None)]
    else:
        starts = [[a0, fit.alpha, b0, fit.beta, np.log(p)] for p in P_STARTS]
        edge += [
            (low - 16.0, None),
            exponent,
            (low - 16.0, None),
            exponent,
            (float(np.log(P_RANGE[0])), float(np.log(P_RANGE[1]))),
        ]
    lowest = np.array([e[0] for e in edge])
    highest = np.array([np.inf if e[1] is None else e[1] for e in edge])
    best: tuple[float, Array] | None = None
    for start in starts:
        v = np.array([e0, *start] if fixed is None else start)
        v = np.clip(v, lowest, highest)
        for delta in continuation(fit.delta):
            scale = max(value(v, delta, 1.0)[0], 1e-300)
            options = {"maxiter": 500, "ftol": 1e-12, "gtol": 1e-9}
            v = minimize(value, v, (delta, scale), method="L-BFGS-B", jac=True, bounds=edge, options=options).x
        f = value(v, fit.delta, 1.0)[0]
        if best is None or f < best[0]:
            best = f, v
    assert best is not None
    e, a, alpha, b, beta, p = unpack(best[1])
    return Alternative(
        kind,
        float(np.exp(e)),
        a + alpha * centre_n,
        alpha,
        b + beta * centre_d,
        beta,
        p,
        free=len(best[1]),
        objective=best[0],
    )
