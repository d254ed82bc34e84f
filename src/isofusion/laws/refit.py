"""The law fitted again, warm-started at a fit: to other losses or weights of its runs, many draws at once, or to fewer
of its runs. Legend: S draws, m runs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from isofusion.laws.fit import LawFit, at_bound, continuation, follow
from isofusion.laws.forms import NAMES, Params
from isofusion.laws.objective import Problem, Solution
from isofusion.laws.table import Array


def refit(
    fit: LawFit, log_loss: Array | None = None, weights: Array | None = None, start: Array | None = None
) -> tuple[Params, Array, np.ndarray]:
    """Refit draws, warm-started at `fit` or at start [S, 5]: log losses [S, m] and/or row weights [S, m].

    Returns parameters [S], objectives [S] and whether an exponent ended at a bound [S].
    """
    problem = Problem.of(fit.runs, fit.form, fit.scale, fit.bounds).but(log_loss=log_loss, weights=weights)
    draws = len(log_loss) if log_loss is not None else len(weights) if weights is not None else 1
    end = _solve(fit, problem, np.repeat(fit.theta[None], draws, axis=0) if start is None else start)
    return _natural(fit, end.theta), end.objective, at_bound(end.theta, problem)


def without(fit: LawFit, rows: npt.NDArray[np.int64]) -> LawFit:
    """The law fitted to the other runs. What it says of its search and its warnings are those of the fit to all."""
    runs = fit.runs.select(np.delete(np.arange(len(fit.runs)), rows))
    end = _solve(fit, Problem.of(runs, fit.form, fit.scale, fit.bounds), fit.theta[None])
    params = _natural(fit, end.theta)
    found: dict[str, Any] = {name: float(getattr(params, name)[0]) for name in NAMES}
    return replace(fit, **found, objective=float(end.objective[0]), runs=runs, theta=end.theta[0])


def _solve(fit: LawFit, problem: Problem, start: Array) -> Solution:
    stages = [d for d in continuation(fit.delta) if d <= max(fit.delta, 1e-2) * 1.001]
    return follow(start, problem, stages)


def _natural(fit: LawFit, theta: Array) -> Params:
    """theta [S, 5] -> parameters [S]; those of a dropped term are 0 and NaN, a fixed E is what it is."""
    params, form = fit.scale.to_params(theta), fit.form
    gone = np.full(len(theta), np.nan)
    return Params(
        params.E if form.fixed_e is None else np.full(len(theta), form.fixed_e),
        params.A if form.n_term else np.zeros(len(theta)),
        params.alpha if form.n_term else gone,
        params.B if form.d_term else np.zeros(len(theta)),
        params.beta if form.d_term else gone,
    )
