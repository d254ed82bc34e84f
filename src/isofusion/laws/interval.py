"""The interval of a set of draws: one rule for every command that quotes one.

Percentiles of the draws, interpolated linearly between neighbours. A draw that failed (NaN: no optimum, a term gone)
may lie anywhere, so it counts as below every value for the low end and above every value for the high end. Of an
infinite and a finite neighbour the outer one is the end, so that too many failed or infinite draws leave none: -inf or
inf. With fewer than 40 draws the ends of a 95 % interval lie between the outermost two draws; `bootstrap` takes 20 at
least. Legend: S draws.
"""

from __future__ import annotations

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


def _quantile(draws: Array, share: float, outer: Any) -> Array:
    """Linear quantile; where one of the two neighbours is infinite, the outer of them."""
    with np.errstate(invalid="ignore"):
        found = np.quantile(draws, share, axis=0)
    if np.isfinite(found).all():
        return np.asarray(found, dtype=np.float64)
    edge = np.quantile(draws, share, axis=0, method=outer)
    return np.asarray(np.where(np.isfinite(found), found, edge), dtype=np.float64)
