"""The interval of a set of draws: one rule for every command that quotes one.

Percentiles of the draws, interpolated linearly between neighbours. A draw that failed (NaN: no optimum, a term gone)
may lie anywhere, so it counts as below every value for the low end and above every value for the high end. Of an
infinite and a finite neighbour the outer one is the end, so that too many failed or infinite draws leave none: -inf or
inf. With fewer than 40 draws the ends of a 95 % interval lie between the outermost two draws; `bootstrap` takes 20 at
least. Where one end is infinite only the other is known: `ends` writes that down for JSON, `known` says it in
every command and on every page: at least, at most. Legend: S draws.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def interval(values: Any, level: float) -> tuple[Array, Array]:
    """(low, high) of draws [S, ...] along their first axis, each [...]; see the module's docstring for the rule."""
    draws = np.asarray(values, dtype=np.float64)
    tail = (1.0 - level) / 2.0
    failed = np.isnan(draws)
    low = _quantile(np.where(failed, -np.inf, draws), tail, "lower")
    return low, _quantile(np.where(failed, np.inf, draws), 1.0 - tail, "higher")


def ends(low: float, high: float) -> list[float | None] | None:
    """An interval for JSON: null for an end that is not known; None where neither is."""
    both = [float(v) if np.isfinite(v) else None for v in (low, high)]
    return None if both == [None, None] else both


def known(span: Sequence[float | None] | None, how: Callable[[float], str], both: str = "{} to {}") -> str:
    """What an interval by `ends` says, its ends shown by `how`; nothing is known of an end that is None."""
    low, high = span or (None, None)
    if low is not None and high is not None:
        return both.format(how(low), how(high))
    return f"at least {how(low)}" if low is not None else f"at most {how(high)}" if high is not None else "no bound"


def _quantile(draws: Array, share: float, outer: Any) -> Array:
    """Linear quantile; where one of the two neighbours is infinite, the outer of them."""
    with np.errstate(invalid="ignore"):
        found = np.quantile(draws, share, axis=0)
    if np.isfinite(found).all():
        return np.asarray(found, dtype=np.float64)
    edge = np.quantile(draws, share, axis=0, method=outer)
    return np.asarray(np.where(np.isfinite(found), found, edge), dtype=np.float64)
