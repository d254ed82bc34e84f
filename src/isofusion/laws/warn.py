"""Typed warnings that travel with a fit: a code for programs, a sentence for people."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

DECADES = 1.0
"""One rule for every command: N, D or C more than this many decades outside the runs is an extrapolation."""

WarningCode = Literal[
    "irreducible-loss-zero",
    "term-vanished",
    "exponent-at-bound",
    "too-few-sizes",
    "too-few-budgets",
    "extrapolation",
    "flat",
    "unidentified",
    "not-converged",
    "isoflop-not-bracketed",
    "too-few-runs",
    "odd-run",
    "uneven-spread",
    "shared-luck",
    "draws-at-bound",
    "wide-interval",
]


def beyond(values: Any, seen: Any) -> tuple[float, str]:
    """(decades, "above" or "below"): how far the farthest of `values` lies outside the range of `seen`; <= 0 inside."""
    values, seen = np.asarray(values, dtype=np.float64), np.asarray(seen, dtype=np.float64)
    with np.errstate(divide="ignore"):  # a best size of zero lies infinitely far below
        above, below = float(np.log10(values.max() / seen.max())), float(np.log10(seen.min() / values.min()))
    return (above, "above") if above > below else (below, "below")


def extrapolates(decades: float, most: float = DECADES) -> bool:
    """Whether so many decades outside the runs are an extrapolation; exactly `most` (ten times the runs) is none."""
    return decades > most + 1e-9


def percent(*shares: float, digits: int = 2) -> list[str]:
    """Shares in per cent, in full up to a million and to so many digits: to more where they would look equal and are
    not.
    """
    for more in range(digits, 17):
        told = [f"{100 * share:.{more}g}" for share in shares]
        if len(set(told)) == len(set(shares)):
            break
    return [f"{float(text):.0f}" if "e+" in text and float(text) < 1e6 else text for text in told]


@dataclass(frozen=True)
class FitWarning:
    """Something a reader of the fit must know: a code for programs, a sentence for people."""

    code: WarningCode
    message: str

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"
