"""What the residuals of a fit say against its intervals: a spread that is not the same everywhere, a run unlike others.

Intervals (noise.py) take one spread for all runs, from their mean square: a spread that grows with N or D makes them
too narrow for what rests on the noisy runs, and an odd run, left in, all of them too wide: so noise.py sets it apart.
Both are told as warnings.
Units: residuals are log observed - log predicted (relative loss). Legend: m runs, S refits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from isofusion.laws.table import Array, Labels, Runs
from isofusion.laws.warn import FitWarning, percent

if TYPE_CHECKING:
    from isofusion.laws.bootstrap import Intervals

SURE = 2.576  # standard errors of Fisher's z of a rank correlation: p < 0.01, two-sided
EXACT = 1e-6  # residuals below are rounding: a table made from a law
FEWEST = 20  # runs (or trunks) below which a rank correlation of residuals says nothing
UNEVEN = 1.5  # mean |residual| in one third of the range over that in the other, from which it is told
LEVEL = 3  # E, A and alpha: parameters of the law that follow the level of trunks
SIGMAS = 6.0  # robust standard deviations from which a residual is odd
TRUNKS = 8  # trunks that resampling them takes (bootstrap.py)
MOST = 3  # odd runs named in one warning
LEFT_OUT = 40  # runs, those of the largest pull on the fit, that are left out one at a time


def residual_warnings(runs: Runs, residuals: Array, free: int, *, apart: bool = True) -> list[FitWarning]:
    """Of residuals [m] of a law with `free` fitted parameters. apart: the law can do without the odd runs."""
    odd = odd_runs(residuals, free, runs.group)
    rest = np.setdiff1d(np.arange(len(residuals)), odd)  # one odd run would decide the comparison of spreads as well
    found = [_odd_warning(runs, residuals, free, odd, apart), uneven_spread(runs.select(rest), residuals[rest])]
    return [warning for warning in found if warning is not None]


def robust_spread(residuals: Array, free: int) -> float:
    """Standard deviation of a normal sample with this median |residual|; the `free` smallest, which a fit that is
    nearly L1 sets to zero, do not count.
    """
    return 1.4826 * float(np.median(np.sort(np.abs(residuals))[free:]))


def odd_runs(residuals: Array, free: int, group: Labels) -> npt.NDArray[np.int64]:
    """Rows more than SIGMAS (more where few runs tell the spread) robust deviations away from the law, the farthest
    first. Where trunks [m] have branches: those of a trunk that is so far from the law, beside the other trunks, and
    those so far from the middle of their trunk.
    """
    trunks, member = np.unique(group, return_inverse=True)
    if len(trunks) == len(residuals):
        far = _far(residuals, free)
    else:
        middle = _middles(residuals, member)
        far = _far(middle, min(free, LEVEL))[member]
        far |= _far(residuals - middle[member], len(trunks) + max(0, free - LEVEL))
    odd = np.flatnonzero(far)
    return odd[np.argsort(-np.abs(residuals[odd]), kind="stable")]


def _far(residuals: Array, free: int) -> npt.NDArray[np.bool_]:
    left = len(residuals) - free
    if left < 4:
        return np.zeros(len(residuals), dtype=bool)
    limit = SIGMAS * math.sqrt(1.0 + 10.0 / left) * robust_spread(residuals, free)
    return np.abs(residuals) > max(limit, EXACT)


def _middles(residuals: Array, member: npt.NDArray[np.int64]) -> Array:
    """The median residual of each trunk; of the two of an even number of rows that nearer the law."""
    order = np.lexsort((residuals, member))
    count = np.bincount(member)
    first = np.cumsum(count) - count
    two = residuals[order[np.stack([first + (count - 1) // 2, first + count // 2])]]
    return np.where(np.abs(two[0]) <= np.abs(two[1]), two[0], two[1])


def _odd_warning(runs: Runs, residuals: Array, free: int, odd: npt.NDArray[np.int64], apart: bool) -> FitWarning | None:
    if not len(odd):
        return None
    far = np.abs(residuals) / max(robust_spread(residuals, free), 1e-12)
    listed = "; ".join(
        f"{_name(runs, i)} is {percent(abs(math.expm1(residuals[i])), digits=3)[0]} % "
        f"{'above' if residuals[i] > 0 else 'below'} the law ({far[i]:.0f} times the usual spread)"
        for i in odd[:MOST]
    )
    more = f"; and {len(odd) - MOST} more" if len(odd) > MOST else ""
    rest = np.delete(residuals, odd)
    whole, without = (math.sqrt(float(np.sum(r**2)) / max(1, len(r) - free)) for r in (residuals, rest))
    with_, usual = f"{percent(whole)[0]} %", f"{percent(without)[0]} %"
    say = (
        f"simulated studies (the default intervals) take the spread of the other runs, {usual} ({with_} with all), and "
        "resample such rows"
        if apart
        else f"intervals rest on a spread of {with_}, {usual} without: too few other runs to set it apart"
    )
    return FitWarning("odd-run", f"{listed}{more}: {say}; check such rows")


def uneven_spread(runs: Runs, residuals: Array) -> FitWarning | None:
    """Whether |residuals| clearly grow or fall with N (over trunks) or with D: Spearman's correlation, p < 0.01."""
    trunks, member = np.unique(runs.group, return_inverse=True)
    size = np.abs(residuals)
    count = np.bincount(member)
    by_trunk = np.bincount(member, size) / count, np.exp(np.bincount(member, np.log(runs.n)) / count)
    told = []
    for name, word, (values, at) in (("N", "sizes", by_trunk), ("D", "token budgets", (size, runs.d))):
        if len(values) < FEWEST or np.ptp(at) == 0 or np.ptp(values) == 0:
            continue
        rank = float(np.corrcoef(_ranks(values), _ranks(at))[0, 1])
        z = math.atanh(max(-0.999999, min(0.999999, rank))) * math.sqrt((len(values) - 3) / 1.06)
        low, high = (
            max(float(np.mean(values[part])), EXACT)
            for part in (at <= np.quantile(at, 1 / 3), at >= np.quantile(at, 2 / 3))
        )
        ratio = high / low
        if abs(z) > SURE and max(ratio, 1 / ratio) >= UNEVEN and (ratio > 1) == (rank > 0):
            which = "largest" if ratio > 1 else "smallest"
            told.append(
                f"residuals of the {which} third of the {word} are {max(ratio, 1 / ratio):.2g} times those of the "
                f"opposite third (rank correlation with {name} {rank:+.2f})"
            )
    if not told:
        return None
    wider = "row" if len(trunks) == len(runs) else "trunk" if len(trunks) >= TRUNKS else ""
    option = (
        f"resampling {wider}s makes no such assumption: `isofusion fit TABLE --resample {wider}` (`plan` too), or "
        f"bootstrap(fit, method='{wider}')"
        if wider
        else "no option here mends that with so few trunks"
    )
    return FitWarning(
        "uneven-spread", f"{'; '.join(told)}: intervals take one spread for all runs and may be too narrow; {option}"
    )


@dataclass(frozen=True)
class Pull:
    """What the fit would be without one run: its row, and alpha or beta as it then is."""

    row: int
    name: str
    value: float


def pulls(intervals: Intervals) -> list[Pull]:
    """Runs without which alpha or beta leaves its own interval, the strongest first."""
    from isofusion.laws.noise import tangent
    from isofusion.laws.refit import refit

    fit = intervals.fit
    m = len(fit.runs)
    if m - len(fit.names) < 2:
        return []
    basis, rest = tangent(fit)
    leverage = np.clip(np.sum(basis**2, axis=1), 0.0, 1.0 - 1.0 / m)
    pull = np.abs(rest) * np.sqrt(leverage) / (1.0 - leverage)  # the root of Cook's distance, up to a factor
    rows = np.argsort(-pull, kind="stable")[:LEFT_OUT]
    weights = np.ones((len(rows), m))
    weights[np.arange(len(rows)), rows] = 0.0
    params = refit(fit, weights=weights)[0]
    found: list[tuple[float, Pull]] = []
    for name in (k for k in ("alpha", "beta") if k in fit.names):
        low, high = intervals.interval(name)
        values = np.asarray(getattr(params, name))
        for row, value in zip(rows, values, strict=True):
            if not low <= value <= high and np.isfinite([low, high, value]).all():
                beyond = max(low - value, value - high) / max(high - low, 1e-300)
                found.append((float(beyond), Pull(int(row), name, float(value))))
    return [pull for _, pull in sorted(found, key=lambda pair: -pair[0])]


def pull_warning(intervals: Intervals) -> FitWarning | None:
    """A warning that names the runs of `pulls`, or None."""
    found = pulls(intervals)
    if not found:
        return None
    fit = intervals.fit
    first = {pull.row: pull for pull in reversed(found)}  # the strongest of each run
    rows = list(dict.fromkeys(pull.row for pull in found))
    listed = "; ".join(
        f"without {_name(fit.runs, row)} {first[row].name} is {first[row].value:.3g}, outside its interval "
        "({:.3g} to {:.3g})".format(*intervals.interval(first[row].name))
        for row in rows[:MOST]
    )
    more = f"; and {len(rows) - MOST} more such runs" if len(rows) > MOST else ""
    return FitWarning("odd-run", f"{listed}{more}: that run decides the answer; repeat it, or add runs near it")


def _ranks(values: Array) -> Array:
    """Ranks from 1, equal values sharing their mean rank."""
    _, of, count = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return np.asarray((last - 0.5 * (count - 1))[of], dtype=np.float64)


def _name(runs: Runs, row: int) -> str:
    return f"the run N = {runs.n[row]:.4g}, D = {runs.d[row]:.4g}, loss {runs.loss[row]:.4g}"
