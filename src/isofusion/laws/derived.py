"""Every answer a plan quotes, each with its interval: exponents a, b, d; N*, D*, D/N and loss at C; loss at (N, D).

All from one set of bootstrap draws, so that a plan's numbers hang together: N* and D* of one draw spend the same C.
Crossovers of two arms are compare.py's, gains gain.py's. Units: C in FLOPs, N parameters, D tokens, loss nats/token.
Legend: S draws, c budgets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from isofusion.errors import InputError
from isofusion.laws.bootstrap import Intervals
from isofusion.laws.forms import Params
from isofusion.laws.frontier import Cost, compute_optimal, exponents
from isofusion.laws.table import Array


@dataclass(frozen=True)
class Answer:
    """A value and its interval, scalars or arrays [c]. NaN where a draw has no such value (no interior optimum)."""

    value: Array
    low: Array
    high: Array
    level: float

    @property
    def factor(self) -> Array:
        """high / low: by what factor the answer is undetermined (for N*, above 2 is a wide one)."""
        return self.high / self.low

    def to_dict(self) -> dict[str, Any]:
        return {k: np.asarray(getattr(self, k), dtype=np.float64).tolist() for k in ("value", "low", "high")} | {
            "level": self.level
        }


def answer(intervals: Intervals, quantity: Callable[[Params], Array]) -> Answer:
    """Any function of the parameters, Params [S] -> [S, ...], at the fit and on the draws."""
    low, high = intervals.of(quantity)
    one = Params(*(np.atleast_1d(getattr(intervals.fit.params, k)) for k in ("E", "A", "alpha", "B", "beta")))
    return Answer(np.asarray(quantity(one))[0], np.asarray(low), np.asarray(high), intervals.level)


def allocation(intervals: Intervals) -> dict[str, Answer]:
    """a, b, d of N* ~ C^a, D* ~ C^b, D* ~ N*^d for C proportional to N D (arXiv 2504.07951 App. C)."""
    _both_terms(intervals)
    return {name: answer(intervals, lambda p, name=name: exponents(p)[name]) for name in ("a", "b", "d")}  # type: ignore[misc]


def at_compute(intervals: Intervals, c: Array | float, *, cost: Cost | None = None) -> dict[str, Answer]:
    """N*, D*, D/N and loss at compute c [c] (or scalar) in FLOPs: keys "n", "d", "tokens_per_parameter", "loss".

    Raises InputError where the law has only one term or c is not positive.
    """
    _both_terms(intervals)
    budgets = np.atleast_1d(np.asarray(c, dtype=np.float64))
    if not (np.isfinite(budgets) & (budgets > 0)).all():
        raise InputError(f"compute {c}: give positive FLOPs, e.g. 1e20")
    fit = intervals.fit
    best = compute_optimal(fit, budgets, cost=cost)
    drawn = compute_optimal(fit, budgets, cost=cost, params=intervals.draws)
    # where the search of a draw ended before its optimum, only the side is known: no bound there
    outwards = np.where(drawn.n > np.sqrt(fit.runs.n.min() * fit.runs.n.max()), np.inf, -np.inf)
    lost = drawn.edge & np.isfinite(drawn.n)
    drawn_n, drawn_d = np.where(lost, outwards, drawn.n), np.where(lost, -outwards, drawn.d)
    with np.errstate(over="ignore"):  # of draws that say nothing: infinite
        drawn_ratio = np.where(lost, -outwards, drawn.d / drawn.n)
    pairs = {
        "n": (best.n, drawn_n),
        "d": (best.d, drawn_d),
        "tokens_per_parameter": (best.d / best.n, drawn_ratio),
        "loss": (best.loss, drawn.loss),
    }
    out = {}
    for name, (value, draws) in pairs.items():
        low, high = intervals.quantiles(draws)
        parts = (value, low, high) if np.ndim(c) else (value[0], low[0], high[0])
        out[name] = Answer(np.asarray(parts[0]), np.asarray(parts[1]), np.asarray(parts[2]), intervals.level)
    return out


def loss_at(intervals: Intervals, n: Array | float, d: Array | float) -> Answer:
    """The law's loss at n parameters and d tokens (which broadcast together). A new run's loss: `predictive`."""
    return answer(intervals, lambda p: p.predict(n, d))


def _both_terms(intervals: Intervals) -> None:
    form = intervals.fit.form
    if not (form.n_term and form.d_term):
        raise InputError(f"{form.formula}: a law without both terms has no compute-optimal size")
