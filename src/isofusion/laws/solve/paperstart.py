"""The paper's own search, to reproduce fits "as published": a fixed grid of starts and L-BFGS with its usual tolerance.

arXiv 2504.07951 App. C: alpha, beta in {0, 0.5, 2.5}; a, b in {0, 5, ..., 30}; e in {-1, -0.5, 0.5, 1}, with A = e^a,
B = e^b, E = e^e; minimise the sum of Huber of log-sum-exp(a - alpha log N, b - beta log D, e) - log L; keep the lowest.
L-BFGS stops at a relative decrease of 2.2e-9 of max(|f|, 1), so many ends stop short: the share of starts says so.
"""

from __future__ import annotations

import itertools

import numpy as np

from isofusion.laws.forms import Scale
from isofusion.laws.objective import Problem, derivatives
from isofusion.laws.solve.newton import Solution
from isofusion.laws.table import Array, Runs

EXPONENTS = (0.0, 0.5, 2.5)
LOG_COEFFICIENTS = (0.0, 5.0, 10.0, 15.0, 20.0, 25.0, 30.0)
LOG_FLOORS = (-1.0, -0.5, 0.5, 1.0)


def paper_starts(runs: Runs, problem: Problem, scale: Scale, delta: float) -> tuple[Solution, Array]:
    """Ends of all 1,764 starts in the solver's coordinates, and their weights (all 1)."""
    from scipy.optimize import minimize  # 0.1 s to import, and only this search needs it

    log_n, log_d, log_loss = np.log(runs.n), np.log(runs.d), np.log(runs.loss)

    def objective(p: Array) -> tuple[float, Array]:
        e, a, alpha, b, beta = p
        t_a, t_b = a - alpha * log_n, b - beta * log_d
        top = np.maximum(np.maximum(t_a, t_b), e)
        w_e, w_a, w_b = np.exp(e - top), np.exp(t_a - top), np.exp(t_b - top)
        total = w_e + w_a + w_b
        r = top + np.log(total) - log_loss
        inside = np.clip(r, -delta, delta)
        u = inside / total
        u_a, u_b = u * w_a, u * w_b
        gradient = np.array([u @ w_e, u_a.sum(), -(u_a @ log_n), u_b.sum(), -(u_b @ log_d)])
        return float(inside @ (r - 0.5 * inside)), gradient

    ends = []
    for alpha, beta, a, b, e in itertools.product(EXPONENTS, EXPONENTS, LOG_COEFFICIENTS, LOG_COEFFICIENTS, LOG_FLOORS):
        end = minimize(objective, np.array([e, a, alpha, b, beta]), jac=True, method="L-BFGS-B")
        ends.append((*end.x, bool(end.success)))
    raw = np.array([row[:5] for row in ends])
    theta = np.stack(
        [
            raw[:, 0],
            raw[:, 1] - raw[:, 2] * scale.mean_n,
            raw[:, 2] * scale.spread_n,
            raw[:, 3] - raw[:, 4] * scale.mean_d,
            raw[:, 4] * scale.spread_d,
        ],
        axis=1,
    )
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        f, gradient, _ = derivatives(theta, problem, delta)
    f = np.where(np.isfinite(f), f, np.inf)
    converged = np.array([row[5] for row in ends], dtype=bool)
    return Solution(theta, f, np.linalg.norm(gradient, axis=1), converged), np.ones(len(theta))
