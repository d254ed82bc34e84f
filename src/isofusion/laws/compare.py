"""Two arms compared at equal compute, with intervals, over the compute both have actually seen.

The difference is L_a*(C) - L_b*(C): each arm's fitted loss at its own best size for C, with N and D held inside the
sizes and budgets it was trained at. Beside it, losses paired by size, budget and seed need no law at all.
Negative means the first arm is better. Legend: S draws, c budgets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy.special import stdtrit  # Student's t quantile; scipy.stats takes half a second to import

from isofusion.errors import InputError
from isofusion.laws.bootstrap import Intervals
from isofusion.laws.fit import LawFit
from isofusion.laws.forms import Params
from isofusion.laws.frontier import Cost, optimum
from isofusion.laws.table import Array, Runs, clusters

Verdict = Literal["first better", "second better", "no difference shown", "depends on compute"]


@dataclass(frozen=True)
class Comparison:
    """L_first - L_second at compute c, pointwise interval and simultaneous band over the whole range."""

    first: str
    second: str
    c: Array
    difference: Array
    low: Array
    high: Array
    band_low: Array
    band_high: Array
    level: float
    verdict: Verdict

    def to_dict(self) -> dict[str, Any]:
        return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in self.__dict__.items()}


def frontier_loss(fit: LawFit, params: Params, c: Array) -> Array:
    """Fitted loss at each arm's best size for c, N inside the trained sizes: [c] or [S, c]."""
    return optimum(params, Cost.of(fit.runs), c, (float(fit.runs.n.min()), float(fit.runs.n.max()))).loss


def compute_range(runs: Runs) -> tuple[float, float]:
    """Lowest and highest compute with a run."""
    return float(runs.c.min()), float(runs.c.max())


def compare(first: Intervals, second: Intervals, *, points: int = 25) -> Comparison:
    """Difference of two fitted arms at equal compute over their overlapping range.

    Raises InputError if the ranges do not overlap or the draws differ in number.
    """
    if len(first.draws) != len(second.draws):
        raise InputError(
            f"{len(first.draws)} and {len(second.draws)} bootstrap draws; use the same number for both arms"
        )
    a, b = compute_range(first.fit.runs), compute_range(second.fit.runs)
    low, high = max(a[0], b[0]), min(a[1], b[1])
    names = first.fit.runs.label or "first", second.fit.runs.label or "second"
    if not high > low * 1.05:
        raise InputError(
            f"{names[0]} spans {a[0]:.3g} to {a[1]:.3g} FLOPs and "
            f"{names[1]} {b[0]:.3g} to {b[1]:.3g}: no overlap to compare in"
        )
    c = np.geomspace(low, high, points)
    difference = frontier_loss(first.fit, first.fit.params, c) - frontier_loss(second.fit, second.fit.params, c)
    draws = frontier_loss(first.fit, first.draws, c) - frontier_loss(second.fit, second.draws, c)
    tail = (1.0 - first.level) / 2.0
    inner = np.quantile(draws, [tail, 1.0 - tail], axis=0)
    # simultaneous: the largest standardised excursion of a draw over the whole range
    centre, spread = np.median(draws, axis=0), np.maximum(draws.std(axis=0), 1e-300)
    width = float(np.quantile(np.max(np.abs(draws - centre) / spread, axis=1), first.level)) * spread
    band = difference - width, difference + width
    below, above = bool((band[1] < 0).any()), bool((band[0] > 0).any())
    verdict: Verdict = (
        "depends on compute"
        if below and above
        else "first better"
        if below
        else "second better"
        if above
        else "no difference shown"
    )
    return Comparison(*names, c, difference, inner[0], inner[1], *band, first.level, verdict)


@dataclass(frozen=True)
class Paired:
    """Mean of loss_first - loss_second over runs equal in size, budget and seed; the trunk pair is the unit."""

    size: str
    difference: float
    low: float | None  # None with fewer than two trunk pairs
    high: float | None
    pairs: int  # trunk pairs
    runs: int
    compute_ratio: float  # mean C_first / C_second of the paired runs

    def to_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)


def paired(first: Runs, second: Runs, level: float = 0.95) -> list[Paired]:
    """Law-free differences per size label present in both arms, then one row "all sizes" over every trunk pair."""
    budget = clusters(np.concatenate([first.d, second.d]))
    b1, b2 = budget[: len(first)], budget[len(first) :]
    right = {(second.size[j], int(b2[j]), second.seed[j]): j for j in range(len(second))}
    trunks: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for i in range(len(first)):
        j = right.get((first.size[i], int(b1[i]), first.seed[i]))
        if j is not None:
            key = str(first.size[i]), str(first.seed[i])
            trunks.setdefault(key, []).append((float(first.loss[i] - second.loss[j]), float(first.c[i] / second.c[j])))
    out = []
    for size in [*dict.fromkeys(k[0] for k in trunks), None]:
        chosen = [v for k, v in trunks.items() if size is None or k[0] == size]
        if not chosen:
            continue
        means = np.array([np.mean([p[0] for p in v]) for v in chosen])
        half = None
        if len(means) > 1:
            half = float(stdtrit(len(means) - 1, 0.5 + level / 2.0) * means.std(ddof=1) / np.sqrt(len(means)))
        mean = float(means.mean())
        out.append(
            Paired(
                "all sizes" if size is None else size,
                mean,
                None if half is None else mean - half,
                None if half is None else mean + half,
                len(means),
                sum(len(v) for v in chosen),
                float(np.mean([p[1] for v in chosen for p in v])),
            )
        )
    return out
