"""Typed warnings that travel with a fit: a code for programs, a sentence for people."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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
]


@dataclass(frozen=True)
class FitWarning:
    """Something a reader of the fit must know: a code for programs, a sentence for people."""

    code: WarningCode
    message: str

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"
