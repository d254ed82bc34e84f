"""What to train: N, D and loss for a budget, a loss target, a size, a token count or a lifetime of inference.

Training costs C = k(N) D; k(N) = 6N, or 6 (f N_v + N_t) for late fusion (arXiv 2504.07951 App. C.2), or measured on the
runs. T tokens of inference cost k(N) T / 3 more (a forward pass is a third of a training step), so the total is
k(N) (D + T / 3) = 6ND + 2NT (Sardana et al. 2401.00448). Every answer is one minimum over log N, found on a grid and by
golden section, for the law and for all its draws at once.
Units: N parameters, D and T tokens, C FLOPs, loss nats/token. Legend: S draws (1 for the law itself), g grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from isofusion.errors import InputError
from isofusion.laws import family
from isofusion.laws.basis import Basis
from isofusion.laws.interval import ends, interval
from isofusion.laws.surface import Array, Rate, Surface, six_n
from isofusion.laws.warn import beyond, extrapolates

SEARCH = (1e4, 1e15)  # parameters between which the optimum is looked for
TOKENS = (1e3, 1e22)  # and tokens, where the size is given
EDGE = 1.2  # an optimum within this factor of an end of the search is none: the search ended, not the law's descent
# what moves how, as an optimum runs out of the upper end of the search: of such draws nothing but the side is known
OPEN: dict[str, dict[str, int]] = {
    "compute": {"n": 1, "d": -1, "tokens_per_parameter": -1},
    "loss": {"n": 1, "d": -1, "tokens_per_parameter": -1},
    "n": {"d": 1, "tokens_per_parameter": 1, "compute": 1, "total": 1},
    "d": {"n": 1, "tokens_per_parameter": -1, "compute": 1, "total": 1},
}
GRID = 221
GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0
CURVE = (4.0, 2.0, 1.0, 0.5, 0.25, 0.125)  # N over the optimum's, in the over-training table
NEAR = 0.02  # decades outside the range of the runs from which a plan says so at all


@dataclass(frozen=True)
class Point:
    """One answer for S draws: arrays [S]; `compute` is training only, `total` has the inference. inf: no such point."""

    n: Array
    d: Array
    loss: Array
    compute: Array
    total: Array


@dataclass(frozen=True)
class Planner:
    """A loss surface, a training cost per token and a lifetime of inference tokens."""

    surface: Surface
    rate: Rate = six_n
    inference: float = 0.0

    def total(self, n: Array, d: Array) -> Array:
        """Training and inference FLOPs."""
        return self.rate(n) * (d + self.inference / 3.0)

    def point(self, n: Array, d: Array) -> Point:
        """The point at n parameters and d tokens, [S]."""
        n, d = np.broadcast_arrays(n + np.zeros_like(self.surface.floor), d)
        with np.errstate(invalid="ignore"):
            return Point(n, d, self.surface.loss(n, d), self.rate(n) * d, self.total(n, d))

    def tokens_left(self, total: float | Array, n: Array) -> Array:
        """Training tokens that a total budget leaves at n parameters (0 where inference eats all of it)."""
        with np.errstate(invalid="ignore"):  # of a draw that never reaches the loss: NaN
            return np.maximum(total / self.rate(n) - self.inference / 3.0, 0.0)

    def at_compute(self, total: float | Array) -> Point:
        """Lowest loss at a total budget (scalar or [S])."""
        n = _minimise(lambda n: self.surface.loss(n, self.tokens_left(total, n)), len(self.surface.floor))
        return self.point(n, self.tokens_left(total, n))

    def at_loss(self, loss: float | Array) -> Point:
        """Cheapest way to a loss; inf where a draw's irreducible loss is not below it."""
        n = _minimise(lambda n: self.total(n, self.surface.tokens(loss, n)), len(self.surface.floor))
        d = self.surface.tokens(loss, n)
        none = ~np.isfinite(d)
        return self.point(np.where(none, np.inf, n), d)

    def at_size(self, n: float) -> Point:
        """The tokens for which n parameters are compute-optimal (no inference)."""
        one = np.full(len(self.surface.floor), float(n))
        return self.point(one, _balance(lambda d: -self._excess(one, d), len(one), TOKENS))

    def at_tokens(self, d: float) -> Point:
        """The size for which d tokens are compute-optimal (no inference)."""
        one = np.full(len(self.surface.floor), float(d))
        return self.point(_balance(lambda n: self._excess(n, one), len(one), SEARCH), one)

    def _excess(self, n: Array, d: Array) -> Array:
        """What log N gains over log D per FLOP: positive where the model is too small for its tokens."""
        step = 1e-4

        def slope(f: Callable[[float], Array]) -> Array:
            return (f(1.0 + step) - f(1.0 - step)) / (math.log1p(step) - math.log1p(-step))

        cost = slope(lambda x: np.log(self.rate(n * x)))
        gain_n = -slope(lambda x: self.surface.loss(n * x, d))
        return gain_n + cost * slope(lambda x: self.surface.loss(n, d * x))


def side(p: Point, asked: str) -> Array:
    """-1, 1 where a draw's optimum ran into the lower, upper end of the search (no optimum: 1), else 0: [S]."""
    values, (low, high) = (p.d, TOKENS) if asked == "n" else (p.n, SEARCH)
    return np.where(values < low * EDGE, -1.0, np.where(values < high / EDGE, 0.0, 1.0))


def _minimise(f: Callable[[Array], Array], draws: int) -> Array:
    """n [S] that minimises f, which takes n of shape [g, S] or [S]: a grid in log n, then golden section."""
    grid = np.linspace(math.log(SEARCH[0]), math.log(SEARCH[1]), GRID)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        values = np.broadcast_to(f(np.exp(grid)[:, None] + np.zeros(draws)), (GRID, draws))
        best = np.argmin(np.where(np.isnan(values), np.inf, values), axis=0)
        low, high = grid[np.maximum(best - 1, 0)], grid[np.minimum(best + 1, GRID - 1)]
        left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
        at_left, at_right = f(np.exp(left)), f(np.exp(right))
        for _ in range(44):  # 0.618^44 of two grid steps is 7e-11, below what a flat minimum can tell apart
            go_left = at_left < at_right
            low, high = np.where(go_left, low, left), np.where(go_left, right, high)
            left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
            at_left, at_right = f(np.exp(left)), f(np.exp(right))
    return np.asarray(np.exp(0.5 * (low + high)), dtype=np.float64)


def _balance(f: Callable[[Array], Array], draws: int, span: tuple[float, float]) -> Array:
    """Zero of f by bisection in the logarithm: f(x [S]) falls from positive to negative."""
    low, high = np.full(draws, math.log(span[0])), np.full(draws, math.log(span[1]))
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        for _ in range(70):
            mid = 0.5 * (low + high)
            up = f(np.exp(mid)) > 0
            low, high = np.where(up, mid, low), np.where(up, high, mid)
    return np.asarray(np.exp(0.5 * (low + high)), dtype=np.float64)


@dataclass(frozen=True)
class Plan:
    """The answer: plain numbers, ready for JSON (`to_dict`). Intervals are (low, high) or None."""

    asked: dict[str, Any]
    basis: Basis
    answer: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    readings: dict[
        str, tuple[float, float]
    ]  # span over other readings of a figure behind the coefficients; no interval
    curve: list[dict[str, Any]]
    inference: dict[str, Any] | None
    shape: family.Shape | None
    warnings: list[dict[str, str]]

    def to_dict(self) -> dict[str, Any]:
        """Everything but the curves' arrays; infinities become null, and so does an interval without ends."""
        b = self.basis
        return plain(
            {
                "asked": self.asked,
                "law": {
                    "name": b.name,
                    "loss_of": b.loss_of,
                    "cost": b.cost,
                    "n_range": b.n_range,
                    "d_range": b.d_range,
                    "c_range": b.c_range,
                    "interval": b.interval,
                    "level": b.level if b.draws is not None else None,
                    "notes": list(b.notes),
                    **b.facts,
                },
                "answer": self.answer,
                "intervals": {k: ends(*span) for k, span in self.intervals.items()},
                "readings": self.readings,
                "curve": [
                    {k: ends(*v) if k.endswith("_interval") else v for k, v in row.items()} for row in self.curve
                ],
                "inference": self.inference,
                "shape": self.shape.to_dict() if self.shape else None,
                "warnings": self.warnings,
            }
        )


def plain(value: Any) -> Any:
    """JSON-ready: tuples to lists, NumPy numbers to Python's, non-finite numbers to null."""
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    return value


def make_plan(
    basis: Basis,
    *,
    compute: float | None = None,
    loss: float | None = None,
    n: float | None = None,
    d: float | None = None,
    inference_tokens: float = 0.0,
    asked: dict[str, Any] | None = None,
) -> Plan:
    """Answer exactly one of compute (FLOPs, inference included), loss (nats/token), n (parameters), d (tokens).

    inference_tokens goes with compute or loss. Raises InputError for anything else and for a loss below the floor.
    """
    given = {k: v for k, v in (("compute", compute), ("loss", loss), ("n", n), ("d", d)) if v is not None}
    if len(given) != 1:
        raise InputError(f"give exactly one of compute, loss, n, d; got {', '.join(given) or 'none'}")
    (what, value), *_ = given.items()
    if not (math.isfinite(value) and value > 0):
        raise InputError(f"{what} = {value:g}: give a positive number")
    if not (math.isfinite(inference_tokens) and inference_tokens >= 0):
        raise InputError(f"inference tokens = {inference_tokens:g}: give a number of tokens, 0 or more")
    if inference_tokens and what in ("n", "d"):
        raise InputError(f"inference tokens go with a compute or a loss target, not with a fixed {what}")
    floor = float(basis.surface.floor[0])
    if what == "loss" and value <= floor:
        raise InputError(f"loss {value:g} is not above the irreducible loss {floor:.4g} of {basis.name}; aim higher")
    planners = [Planner(s, basis.rate, inference_tokens) for s in (basis.surface, basis.draws) if s is not None]
    steps = {"compute": Planner.at_compute, "loss": Planner.at_loss, "n": Planner.at_size, "d": Planner.at_tokens}
    points = [steps[what](planner, value) for planner in planners]
    best = points[0]
    searched = "D between {:g} and {:g}".format(*TOKENS) if what == "n" else "N between {:g} and {:g}".format(*SEARCH)
    if side(best, what).any():
        why = "inference alone costs more than this budget" if inference_tokens and what == "compute" else "no optimum"
        raise InputError(f"{basis.name}: {why}: {searched} was searched, and an edge of a search is no answer")
    quantities = [_quantities(p, what) for p in points]
    answer = {k: float(v[0]) for k, v in quantities[0].items()}
    intervals = {}
    if len(points) > 1:
        fixed = {"compute": "total", "loss": "loss", "n": "n", "d": "d"}[what]
        intervals = {k: _interval(v, basis.level) for k, v in quantities[1].items() if k != fixed}
        if what == "compute" and not inference_tokens:
            intervals.pop("compute")  # given, as the total is
    others = [_quantities(steps[what](Planner(s, basis.rate, inference_tokens), value), what) for s in basis.readings]
    readings = (
        {k: (min(float(o[k][0]) for o in others), max(float(o[k][0]) for o in others)) for k in others[0]}
        if others
        else {}
    )
    curve = [_off(planners, points, factor, basis.level, what) for factor in CURVE]
    warnings = _extrapolation(basis, answer)
    if len(points) > 1 and (share := float(np.mean(side(points[1], what) != 0))):
        text = (
            f"{100 * share:.1f} % of the draws have no optimum: {searched} was searched; beyond it, no bound is known"
        )
        warnings.append({"code": "draws-without-optimum", "message": text})
    return Plan(
        asked or {what: value, "inference_tokens": inference_tokens},
        basis,
        answer,
        intervals,
        readings,
        curve,
        _compare_inference(basis, planners[0], best) if inference_tokens else None,
        family.nearest(answer["n"], basis.fusion),
        warnings,
    )


def _quantities(p: Point, asked: str) -> dict[str, Array]:
    """Every quantity of the points, [S]; infinite where the search ended before the optimum."""
    with np.errstate(invalid="ignore"):
        ratio = p.d / p.n
    out = {"n": p.n, "d": p.d, "loss": p.loss, "compute": p.compute, "total": p.total, "tokens_per_parameter": ratio}
    where = np.where(np.isfinite(p.n) & np.isfinite(p.d), side(p, asked), 0.0)
    for key, sign in OPEN[asked].items():
        out[key] = np.where(where == 0, out[key], np.copysign(np.inf, sign * where))
    return out


def _off(planners: list[Planner], points: list[Point], factor: float, level: float, asked: str) -> dict[str, Any]:
    """A model of factor x the optimal N: what it loses at the same total, and costs for the same loss."""
    found = []
    for planner, best in zip(planners, points, strict=True):
        n = best.n * factor
        d = planner.tokens_left(best.total, n)
        with np.errstate(invalid="ignore", divide="ignore"):
            at = planner.surface.loss(n, d)
            more = planner.total(n, planner.surface.tokens(best.loss, n)) / best.total - 1.0
        if factor == 1.0:
            more = np.zeros_like(more)
        unknown = (side(best, asked) != 0) & np.isfinite(best.n)  # nothing is known beside an optimum not found
        at, more = np.where(unknown, np.nan, at), np.where(unknown, np.nan, more)
        with np.errstate(invalid="ignore"):
            ratio, above = d / n, at - best.loss
        found.append({"n": n, "d": d, "tokens_per_parameter": ratio, "loss": at, "above": above, "extra": more})
    row: dict[str, Any] = {"factor": factor, **{k: float(v[0]) for k, v in found[0].items()}}
    if len(found) > 1:
        row["above_interval"] = _interval(found[1]["above"], level)
        row["extra_interval"] = _interval(found[1]["extra"], level)
    return row


def _interval(values: Array, level: float) -> tuple[float, float]:
    """interval.py's rule, as numbers; infinite where the draws give no bound."""
    low, high = interval(values, level)
    return float(low), float(high)


def _compare_inference(basis: Basis, planner: Planner, best: Point) -> dict[str, Any]:
    """Against the training-optimal model of the same loss, which then serves the same tokens."""
    naive = Planner(basis.surface, basis.rate).at_loss(best.loss)
    whole = planner.total(naive.n, naive.d)
    return {
        "tokens": planner.inference,
        "share_of_total": float(1.0 - best.compute[0] / best.total[0]),
        "training_optimal_n": float(naive.n[0]),
        "training_optimal_d": float(naive.d[0]),
        "training_optimal_total": float(whole[0]),
        "saved": float(1.0 - best.total[0] / whole[0]),
    }


def _extrapolation(basis: Basis, answer: dict[str, float]) -> list[dict[str, str]]:
    """Warnings where N, D or C lie outside what the law rests on: "extrapolation" as in `isofusion fit` (warn.py's
    rule), "outside" up to there.
    """
    out = []
    for name, key, span in (
        ("N", "n", basis.n_range),
        ("D", "d", basis.d_range),
        ("C", "compute", basis.c_range),
    ):
        if span is None:
            continue
        far, side = beyond(answer[key], span)
        if far > NEAR:
            text = f"{name} = {answer[key]:.3g} is {far:.1f} decades {side} what the law rests on"
            text += f" ({span[0]:.3g} to {span[1]:.3g})"
            code = "extrapolation" if extrapolates(far) else "outside"
            out.append({"code": code, "message": text})
    return out
