"""Effective-compute gain: how many times the compute the base arm needs for the loss an arm reaches with C.

CEG(C) = C_base(L_arm*(C)) / C, with L*(C) an arm's compute-optimal loss and C_base its inverse for the base arm: 2
means that the base needs twice the compute. It is given only where both frontiers interpolate: C where the arm's best
N and D lie inside its runs, and C_base where the base's lie inside the base's; an extrapolated gain says more about
two irreducible losses than about runs. Per ledger, because an arm may be cheap in 6ND and dear in exact FLOPs.
Legend: S draws, c budgets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from isofusion.errors import InputError
from isofusion.laws.bootstrap import Intervals
from isofusion.laws.compare import names_of
from isofusion.laws.cost import Cost
from isofusion.laws.fit import LawFit
from isofusion.laws.forms import Params
from isofusion.laws.frontier import closed_form, optimum
from isofusion.laws.interval import interval
from isofusion.laws.table import Array

SLACK = 1.05  # a best size this factor outside the trained ones still counts as inside
WIDE = 100.0  # the base's frontier is tabulated this far beyond its runs, so that draws may fall outside them
UNBOUNDED = 50.0  # |log gain| from which the draws say nothing

Verdict = Literal["saves compute", "costs compute", "no gain shown"]


@dataclass(frozen=True)
class Gain:
    """CEG at compute c with pointwise intervals, and `mean`, its geometric mean over the range, with one.

    An end of an interval is infinite (low: 0) where more than the tail of the draws never reach the loss.
    """

    arm: str
    base: str
    ledger: str
    c: Array
    gain: Array
    low: Array
    high: Array
    mean: float
    mean_low: float
    mean_high: float
    level: float
    verdict: Verdict

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON; an infinite end becomes null."""
        out: dict[str, Any] = {}
        for k, v in self.__dict__.items():
            if isinstance(v, np.ndarray):
                out[k] = [float(x) if np.isfinite(x) else None for x in v]
            else:
                out[k] = None if isinstance(v, float) and not np.isfinite(v) else v
        return out


def effective_gain(
    arm: Intervals,
    base: Intervals,
    *,
    costs: tuple[Cost, Cost] | None = None,
    ledger: str | None = None,
    points: int = 25,
) -> Gain:
    """CEG of `arm` over `base`, with intervals from both arms' draws (taken as independent).

    costs: FLOPs per token of (arm, base); by default what each table's `c` holds. ledger: a name for them.
    Raises InputError where no compute has both frontiers inside their runs, saying what they span.
    """
    names = names_of(arm, base)
    cost_a, cost_b = costs or (Cost.of(arm.fit.runs), Cost.of(base.fit.runs))
    kinds = arm.fit.runs.compute, base.fit.runs.compute
    if costs is None and ledger is None:
        if kinds[0] != kinds[1]:
            raise InputError(
                f"{names[0]} counts compute as {kinds[0]}, {names[1]} as {kinds[1]}; a gain in FLOPs needs one ledger"
            )
        ledger = kinds[0]
    inner_a, inner_b = inside(arm.fit, cost_a), inside(base.fit, cost_b)
    for name, fit, span in ((names[0], arm.fit, inner_a), (names[1], base.fit, inner_b)):
        if span is None:
            raise InputError(
                f"{name}: at no compute is the best size inside its runs (N {fit.runs.n.min():.3g} to "
                f"{fit.runs.n.max():.3g}, D {fit.runs.d.min():.3g} to {fit.runs.d.max():.3g}); "
                "train sizes on both sides of the optimum"
            )
    assert inner_a is not None
    assert inner_b is not None
    table = np.geomspace(inner_b[0] / WIDE, inner_b[1] * WIDE, 49)
    base_point = frontier(base.fit, base.fit.params, cost_b, table)

    def gain_at(c: Array) -> Array:
        loss = frontier(arm.fit, arm.fit.params, cost_a, c)
        return invert(loss[None], base_point[None], table, np.atleast_1d(base.fit.E))[0] - np.log(c)

    c = np.geomspace(*inner_a, 400)
    reach = np.exp(gain_at(c)) * c
    ok = (reach >= inner_b[0] * (1 - 1e-9)) & (reach <= inner_b[1] * (1 + 1e-9))
    if not ok.any():
        raise InputError(
            f"{names[0]} interpolates from {inner_a[0]:.3g} to {inner_a[1]:.3g} FLOPs, which {names[1]} would "
            f"match with {reach[0]:.3g} to {reach[-1]:.3g}, but interpolates {inner_b[0]:.3g} to {inner_b[1]:.3g}: "
            "no gain without extrapolation; train the base over the losses the arm reaches"
        )
    c = np.geomspace(c[ok][0], c[ok][-1], points) if ok.sum() > 1 else c[ok]
    log_gain = gain_at(c)
    draws = invert(
        frontier(arm.fit, arm.draws, cost_a, c), frontier(base.fit, base.draws, cost_b, table), table, base.draws.E
    ) - np.log(c)
    low, high = _interval(draws, arm.level)
    mean_low, mean_high = (float(v) for v in _interval(draws.mean(axis=1), arm.level))
    verdict: Verdict = "saves compute" if mean_low > 1 else "costs compute" if mean_high < 1 else "no gain shown"
    return Gain(
        *names,
        ledger or "given",
        c,
        np.exp(log_gain),
        low,
        high,
        float(np.exp(log_gain.mean())),
        mean_low,
        mean_high,
        arm.level,
        verdict,
    )


def gains(
    arm: Intervals, base: Intervals, ledgers: Mapping[str, tuple[Cost, Cost]] | None = None, *, points: int = 25
) -> dict[str, Gain | str]:
    """CEG per ledger, or the reason why there is none. Default: what the tables hold, and 6ND beside it.

    6ND here is 6 x the N of the tables x D for both arms; for late fusion pass its own `Cost.late`.
    """
    if ledgers is None:
        ledgers = {arm.fit.runs.compute: (Cost.of(arm.fit.runs), Cost.of(base.fit.runs))}
        if arm.fit.runs.compute != base.fit.runs.compute:
            ledgers = {}
        ledgers |= {"6nd": (Cost.six_nd(), Cost.six_nd())}
    out: dict[str, Gain | str] = {}
    for name, costs in ledgers.items():
        try:
            out[name] = effective_gain(arm, base, costs=costs, ledger=name, points=points)
        except InputError as error:
            out[name] = str(error)
    return out


def inside(fit: LawFit, cost: Cost) -> tuple[float, float] | None:
    """Lowest and highest compute of the runs at which the law's best N and D lie inside the runs, or None."""
    spent = cost.per_token(fit.runs.n) * fit.runs.d
    c = np.geomspace(spent.min(), spent.max(), 400)
    n, d = _best(fit, fit.params, cost, c)[:2]
    ok = (n >= fit.runs.n.min() / SLACK) & (n <= fit.runs.n.max() * SLACK)
    ok &= (d >= fit.runs.d.min() / SLACK) & (d <= fit.runs.d.max() * SLACK)
    return (float(c[ok][0]), float(c[ok][-1])) if ok.any() else None


def frontier(fit: LawFit, params: Params, cost: Cost, c: Array) -> Array:
    """Compute-optimal loss at c of parameters or draws, N not held inside the sizes: [c] or [S, c]."""
    return _best(fit, params, cost, c)[2]


def _best(fit: LawFit, params: Params, cost: Cost, c: Array) -> tuple[Array, Array, Array]:
    if cost.kind == "6nd":
        return closed_form(params, c, float(np.exp(cost.log_k[0])))
    best = optimum(params, cost, c, (float(fit.runs.n.min()) / WIDE, float(fit.runs.n.max()) * WIDE))
    return best.n, best.d, best.loss


def invert(loss: Array, frontier_loss: Array, c: Array, floor: Array) -> Array:
    """log of the compute at which the frontiers [S, g] on the grid c [g] reach the losses [S, m]; beyond it by slope.

    Interpolated in log(L - floor), floor [S] the irreducible loss, where a frontier is nearly straight (for 6ND it is
    exactly so). Infinite where the loss is at or below the floor.
    """
    log_c = np.log(c)
    out = np.empty(np.broadcast_shapes(loss.shape, (len(frontier_loss), 1)))
    for s in range(len(out)):
        with np.errstate(divide="ignore", invalid="ignore"):
            y = -np.log(frontier_loss[s] - floor[s])  # rises with compute
            want = loss[s] - floor[s]
            x = np.where(want > 0, -np.log(np.where(want > 0, want, 1.0)), np.inf)
        good = np.isfinite(y)
        good[1:] &= np.diff(y) > 0
        if good.sum() < 2:
            out[s] = np.nan
            continue
        y, at = y[good], log_c[good]
        value = np.interp(x, y, at)
        value = np.where(x < y[0], at[0] + (x - y[0]) * (at[1] - at[0]) / (y[1] - y[0]), value)
        finite = np.where(np.isfinite(x), x, y[-1])
        end = at[-1] + (finite - y[-1]) * (at[-1] - at[-2]) / (y[-1] - y[-2])
        out[s] = np.where(x > y[-1], np.where(np.isfinite(x), end, np.inf), value)
    return out


def _interval(log_gain: Array, level: float) -> tuple[Array, Array]:
    """Percentile interval of gains from their logs along the first axis; 0 or infinite where draws are unbounded.

    A draw without a frontier (a term of its law is gone) counts as unbounded on both sides.
    """
    far = np.abs(log_gain) >= UNBOUNDED  # False of NaN
    low, high = interval(np.where(far, np.copysign(np.inf, log_gain), log_gain), level)
    return np.exp(low), np.exp(high)
