"""Everything that is told against a fitted law, as one list: `fit`, `plan`, their page and the report of a study
print it alike.

Those of the fit itself (fit.py, residuals.py), of runs that decide or share too much (noise.py), and of the intervals:
an exponent whose draws pile up at its bound, or whose interval is wide.
"""

from __future__ import annotations

import numpy as np

from isofusion.laws.bootstrap import Intervals
from isofusion.laws.fit import LawFit
from isofusion.laws.noise import interval_warnings
from isofusion.laws.warn import FitWarning, percent

MAX_AT_BOUND = 0.025  # share of draws with an exponent at its bound: the tail of a 95 % interval
WIDE = 0.5  # an exponent's interval wider than this share of it each way


def law_warnings(fit: LawFit, intervals: Intervals | None = None) -> tuple[FitWarning, ...]:
    """Of a fit and, where there are any, its intervals."""
    return fit.warnings if intervals is None else (*fit.warnings, *interval_warnings(intervals), *_width(intervals))


def _width(intervals: Intervals) -> list[FitWarning]:
    fit, found = intervals.fit, []
    if intervals.share_at_bound > MAX_AT_BOUND:
        share = percent(intervals.share_at_bound)[0]
        found.append(
            FitWarning(
                "draws-at-bound",
                f"{share} % of the bootstrap draws end with an exponent at its bound: intervals describe the bounds "
                "as much as the runs",
            )
        )
    for name in (name for name in ("alpha", "beta") if name in fit.names):
        value, (low, high) = getattr(fit, name), intervals.interval(name)
        if np.isfinite([low, high]).all() and high - low > 2 * WIDE * value:
            found.append(
                FitWarning("wide-interval", f"{name} = {value:.3g} ({low:.3g} to {high:.3g}) is poorly determined")
            )
    return found
