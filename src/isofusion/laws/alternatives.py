"""Two neighbours of the additive law, fitted from it, to see how far the answer rests on the law's shape.

"tied": L = E + A/N^alpha + B/D^alpha. "p-norm": L = E + ((A/N^alpha)^p + (B/D^beta)^p)^(1/p), which is the additive
law at p = 1 and the larger of the two terms as p grows. Both are laws of the catalogue, fitted to the same objective
(sum of Huber on log residuals) from the additive fit. They are looked at for what they say about N*, not for their own
parameters. Legend: m runs, c budgets, g sizes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from isofusion.laws.catalogue.bends import PNorm
from isofusion.laws.catalogue.law import Law
from isofusion.laws.catalogue.sums import Tied
from isofusion.laws.cost import REACH, Cost
from isofusion.laws.fit import LawFit
from isofusion.laws.formfit import follow_starts
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
        with np.errstate(invalid="ignore"):  # NaN where a law has no best size
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
    held = {} if fit.form.fixed_e is None else {"E": fit.form.fixed_e}
    low = float(fit.runs.loss.min())
    from_fit = {"E": max(fit.E, low * np.exp(-16.0)), "A": max(fit.A, 1e-300), "B": max(fit.B, 1e-300)} | held
    bounds = {"E": (low * np.exp(-16.0), low)}
    if kind == "tied":
        law: Law = Tied()
        mean = 0.5 * (fit.alpha + fit.beta)
        # at the centre of the runs the terms stay as they are
        shift = {"A": (mean - fit.alpha, fit.runs.n), "B": (mean - fit.beta, fit.runs.d)}
        moved = {k: from_fit[k] * np.exp(by * np.log(x).mean()) for k, (by, x) in shift.items()}
        starts = [from_fit | moved | {"alpha": mean}]
        bounds["alpha"] = fit.bounds
    else:
        law = PNorm()
        starts = [from_fit | {"alpha": fit.alpha, "beta": fit.beta, "p": p} for p in P_STARTS]
        bounds |= {"alpha": fit.bounds, "beta": fit.bounds, "p": P_RANGE}
    found, objective = follow_starts(fit.runs, law, starts, delta=fit.delta, fixed=held, bounds=bounds)
    alpha = found["alpha"]
    return Alternative(
        kind,
        found["E"],
        float(np.log(found["A"])),
        alpha,
        float(np.log(found["B"])),
        found.get("beta", alpha),
        found.get("p", 1.0),
        free=len(found) - len(held),
        objective=objective,
    )
