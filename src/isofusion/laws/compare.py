"""Two arms compared at equal compute, or at equal inference cost, with intervals, where both have actually been seen.

At equal compute the difference is L_a*(C) - L_b*(C): each arm's fitted loss at its own best size for C, N held inside
the sizes it was trained at; where it changes sign is the crossover. At equal inference cost both have the same (active)
N. Beside it, losses paired by size and seed need no law at all. How much compute a difference is worth:
`isofusion.laws.gain`. Negative means the first arm is better. Legend: S draws, c budgets, n sizes.
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
from isofusion.laws.interval import interval
from isofusion.laws.table import Array, Runs, clusters

Verdict = Literal["first better", "second better", "no difference shown", "depends on compute", "depends on size"]


@dataclass(frozen=True)
class Crossover:
    """Compute at which two frontiers are equal. `low`, `high`: every C at which the pointwise interval holds zero.

    None for `c`: no crossover in range; None for an end: the interval reaches the end of the compared range there.
    """

    c: float | None
    low: float | None
    high: float | None
    first_better: Literal["below", "above"] | None  # on which side of c the first arm has the lower loss
    crossings: int
    compared: tuple[float, float]
    level: float

    def __str__(self) -> str:
        low, high = (f"{v:.3g}" for v in self.compared)
        if self.c is None:
            return f"none in range ({low} to {high} FLOPs)"
        more = f"; {self.crossings} sign changes, the first is given" if self.crossings > 1 else ""
        if self.low is None and self.high is None:
            return (
                f"{self.c:.3g} FLOPs, not determined: nowhere between {low} and {high} FLOPs "
                f"can the arms be told apart{more}"
            )
        ends = [
            f"below {low}" if self.low is None else f"{self.low:.3g}",
            f"above {high}" if self.high is None else f"{self.high:.3g}",
        ]
        return f"{self.c:.3g} FLOPs ({ends[0]} to {ends[1]}), first better {self.first_better} it{more}"

    def to_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "compared": list(self.compared), "text": str(self)}


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

    @property
    def crossover(self) -> Crossover:
        """Where the difference changes sign, or none."""
        return crossover(self)

    def to_dict(self) -> dict[str, Any]:
        plain = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in self.__dict__.items()}
        return {**plain, "crossover": self.crossover.to_dict()}


def frontier_loss(fit: LawFit, params: Params, c: Array) -> Array:
    """Fitted loss at each arm's best size for c, N inside the trained sizes: [c] or [S, c]."""
    return optimum(params, Cost.of(fit.runs), c, (float(fit.runs.n.min()), float(fit.runs.n.max()))).loss


def compute_range(runs: Runs) -> tuple[float, float]:
    """Lowest and highest compute with a run."""
    return float(runs.c.min()), float(runs.c.max())


Ends = tuple[Array, Array]  # lower and upper end


def bands(
    difference: Array, draws: Array, level: float, mixed: Verdict = "depends on compute"
) -> tuple[Ends, Ends, Verdict]:
    """Pointwise interval, simultaneous band and verdict of a difference [c] with draws [S, c].

    mixed: the verdict where either arm is shown to be better somewhere.

    The band is the largest standardised excursion of a draw over the whole range, so that a verdict that looks
    everywhere is wrong no more often than 1 - level.
    """
    low, high = interval(draws, level)
    centre, spread = np.median(draws, axis=0), np.maximum(draws.std(axis=0), 1e-300)
    width = float(np.quantile(np.max(np.abs(draws - centre) / spread, axis=1), level)) * spread
    band_low, band_high = difference - width, difference + width
    below, above = bool((band_high < 0).any()), bool((band_low > 0).any())
    verdict: Verdict = (
        mixed if below and above else "first better" if below else "second better" if above else "no difference shown"
    )
    return (low, high), (band_low, band_high), verdict


def names_of(first: Intervals, second: Intervals) -> tuple[str, str]:
    """Labels of two arms. Raises InputError if their draws or levels differ, so that a difference can be drawn."""
    if len(first.draws) != len(second.draws):
        raise InputError(
            f"{len(first.draws)} and {len(second.draws)} bootstrap draws; use the same number for both arms"
        )
    if first.level != second.level:
        raise InputError(f"intervals of level {first.level:g} and {second.level:g}; use the same level for both arms")
    return first.fit.runs.label or "first", second.fit.runs.label or "second"


def compare(first: Intervals, second: Intervals, *, points: int = 25) -> Comparison:
    """Difference of two fitted arms at equal compute over their overlapping range.

    Raises InputError if the ranges do not overlap or the draws differ in number.
    """
    names = names_of(first, second)
    a, b = compute_range(first.fit.runs), compute_range(second.fit.runs)
    low, high = max(a[0], b[0]), min(a[1], b[1])
    if not high > low * 1.05:
        raise InputError(
            f"{names[0]} spans {a[0]:.3g} to {a[1]:.3g} FLOPs and "
            f"{names[1]} {b[0]:.3g} to {b[1]:.3g}: no overlap to compare in"
        )
    c = np.geomspace(low, high, points)
    difference = frontier_loss(first.fit, first.fit.params, c) - frontier_loss(second.fit, second.fit.params, c)
    draws = frontier_loss(first.fit, first.draws, c) - frontier_loss(second.fit, second.draws, c)
    inner, outer, verdict = bands(difference, draws, first.level)
    return Comparison(*names, c, difference, *inner, *outer, first.level, verdict)


def crossover(comparison: Comparison) -> Crossover:
    """Compute at which the two frontiers cross, with an interval, or none in range.

    The interval inverts the pointwise one: it holds every C at which the difference may be zero, so it covers the
    crossing at the level stated, and is open where that set reaches the end of the compared range.
    """
    x, y = np.log(comparison.c), comparison.difference
    compared = float(comparison.c[0]), float(comparison.c[-1])
    signed = np.flatnonzero(y != 0)
    change = np.flatnonzero(np.sign(y[signed[:-1]]) != np.sign(y[signed[1:]]))
    if not len(change):
        return Crossover(None, None, None, None, 0, compared, comparison.level)
    i, j = (int(k) for k in signed[change[0] : change[0] + 2])
    at = x[i] + (x[j] - x[i]) * y[i] / (y[i] - y[j])

    def edge(k: int, step: int) -> float | None:  # walk outwards until the interval leaves zero, then interpolate where
        while 0 <= k < len(x):
            if comparison.high[k] < 0 or comparison.low[k] > 0:
                end = comparison.high if comparison.high[k] < 0 else comparison.low
                return float(np.exp(np.interp(0.0, *_rising(end[[k - step, k]], x[[k - step, k]]))))
            k += step
        return None

    side: Literal["below", "above"] = "below" if y[i] < 0 else "above"
    return Crossover(float(np.exp(at)), edge(i, -1), edge(j, 1), side, len(change), compared, comparison.level)


def _rising(value: Array, at: Array) -> tuple[Array, Array]:
    return (value, at) if value[0] <= value[1] else (value[::-1], at[::-1])


@dataclass(frozen=True)
class InferenceComparison:
    """L_first - L_second at equal N (parameters active per token): about 2 N FLOPs per generated token for both."""

    first: str
    second: str
    held: str  # what else is equal: "tokens" or "compute", and its value
    n: Array
    d_first: Array
    d_second: Array
    difference: Array
    low: Array
    high: Array
    band_low: Array
    band_high: Array
    level: float
    verdict: Verdict

    def to_dict(self) -> dict[str, Any]:
        return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in self.__dict__.items()}


def equal_inference(
    first: Intervals,
    second: Intervals,
    *,
    tokens: float | None = None,
    compute: float | None = None,
    points: int = 25,
) -> InferenceComparison:
    """Difference of two arms whose models cost the same to serve, at every size both were trained at.

    N is what the table counts: active parameters for experts, encoder and decoder for late fusion. Both arms see
    `tokens` tokens (default: the most that both were trained on), or spend `compute` training FLOPs each at that N.
    Raises InputError where the sizes do not overlap, or a size would need tokens outside an arm's budgets.
    """
    if tokens is not None and compute is not None:
        raise InputError("give tokens or compute, not both: one fixes the other at equal N")
    names = names_of(first, second)
    runs = first.fit.runs, second.fit.runs
    low, high = (max(float(r.n.min()) for r in runs), min(float(r.n.max()) for r in runs))
    if not high > low * 1.05:
        raise InputError(
            f"{names[0]} has {runs[0].n.min():.3g} to {runs[0].n.max():.3g} parameters and {names[1]} "
            f"{runs[1].n.min():.3g} to {runs[1].n.max():.3g}: no size in common to compare at"
        )
    n = np.geomspace(low, high, points)
    if compute is None:
        tokens = min(float(r.d.max()) for r in runs) if tokens is None else tokens
        d = np.full_like(n, tokens), np.full_like(n, tokens)
        held = f"{tokens:.3g} training tokens"
    else:
        d = Cost.of(runs[0]).tokens(compute, n), Cost.of(runs[1]).tokens(compute, n)
        held = f"{compute:.3g} training FLOPs"
    slack = 1.05
    inside = np.ones(points, dtype=bool)
    for arm, used in zip(runs, d, strict=True):
        inside &= (used >= arm.d.min() / slack) & (used <= arm.d.max() * slack)
    if inside.sum() < 2:
        spans = " and ".join(
            f"{name} was trained on {r.d.min():.3g} to {r.d.max():.3g}" for name, r in zip(names, runs, strict=True)
        )
        raise InputError(f"{held}: outside the tokens seen ({spans}); choose other tokens or compute")
    n, d_first, d_second = n[inside], d[0][inside], d[1][inside]
    difference = first.fit.predict(n, d_first) - second.fit.predict(n, d_second)
    draws = first.draws.predict(n, d_first) - second.draws.predict(n, d_second)
    inner, outer, verdict = bands(difference, draws, first.level, "depends on size")
    return InferenceComparison(*names, held, n, d_first, d_second, difference, *inner, *outer, first.level, verdict)


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


def paired(
    first: Runs, second: Runs, level: float = 0.95, *, match: Literal["tokens", "compute"] = "tokens"
) -> list[Paired]:
    """Law-free differences per size label present in both arms, then one row "all sizes" over every trunk pair.

    match "tokens": runs of one size, seed and token budget. "compute": the second arm's loss read off its own trunk of
    that size and seed at the first's FLOPs (log-log interpolated, never beyond it), for arms that cost differently.
    """
    if match not in ("tokens", "compute"):
        raise InputError(f"match = {match!r}: choose 'tokens' or 'compute'")
    trunks = (_by_tokens if match == "tokens" else _by_compute)(first, second)
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


Pairs = dict[tuple[str, str], list[tuple[float, float]]]  # (size, seed) -> (difference of loss, ratio of compute)


def _by_tokens(first: Runs, second: Runs) -> Pairs:
    budget = clusters(np.concatenate([first.d, second.d]))
    b1, b2 = budget[: len(first)], budget[len(first) :]
    right = {(second.size[j], int(b2[j]), second.seed[j]): j for j in range(len(second))}
    trunks: Pairs = {}
    for i in range(len(first)):
        j = right.get((first.size[i], int(b1[i]), first.seed[i]))
        if j is not None:
            key = str(first.size[i]), str(first.seed[i])
            trunks.setdefault(key, []).append((float(first.loss[i] - second.loss[j]), float(first.c[i] / second.c[j])))
    return trunks


def _by_compute(first: Runs, second: Runs) -> Pairs:
    trunks: Pairs = {}
    for i in range(len(first)):
        rows = np.flatnonzero((second.size == first.size[i]) & (second.seed == first.seed[i]))
        rows = rows[np.argsort(second.c[rows])]
        x = np.log(second.c[rows])
        at = float(np.log(first.c[i]))
        if len(rows) and x[0] - 1e-9 <= at <= x[-1] + 1e-9:
            loss = float(np.exp(np.interp(at, x, np.log(second.loss[rows]))))
            key = str(first.size[i]), str(first.seed[i])
            trunks.setdefault(key, []).append((float(first.loss[i]) - loss, 1.0))
    return trunks
