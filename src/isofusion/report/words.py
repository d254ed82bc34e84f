"""Numbers as a reader wants them: 1.3M parameters, 2.4·10¹² FLOPs, 1.234 nats with its interval."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from isofusion.laws.interval import known
from isofusion.report.style import superscript

_UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K"))
DASH = "–"


def si(value: float | None) -> str:
    """Three significant digits with K, M, B or T; a power of ten far outside of these."""
    if value is None or not math.isfinite(value):
        return DASH
    if abs(value) >= 1e16 or 0 < abs(value) < 1e-4:
        return power(value)
    for size, unit in _UNITS:
        if abs(value) >= 0.9995 * size:
            return f"{three(value / size)}{unit}"
    return three(value)


def three(value: float) -> str:
    """Three significant digits, never in exponent notation."""
    if value == 0:
        return "0"
    value = float(f"{value:.3g}")
    digits = max(0, 2 - math.floor(math.log10(abs(value)) + 1e-9))
    text = f"{value:.{min(digits, 6)}f}"
    return text.rstrip("0").rstrip(".") if "." in text and digits > 2 else text


def power(value: float | None, digits: int = 1) -> str:
    """2.4·10¹²."""
    if value is None or not math.isfinite(value) or value <= 0:
        return DASH
    exponent = math.floor(math.log10(value))
    mantissa = round(value / 10**exponent, digits)
    if mantissa >= 10:
        mantissa, exponent = mantissa / 10, exponent + 1
    return f"{mantissa:.{digits}f}·10{superscript(exponent)}"


def fixed(value: float | None, digits: int = 3, sign: bool = False) -> str:
    """A loss or exponent with a real minus sign."""
    if value is None or not math.isfinite(value):
        return DASH
    return f"{value:{'+' if sign else ''}.{digits}f}".replace("-", "−")


def interval(pair: Sequence[float | None] | None, digits: int = 3, how: Any = None) -> str:
    """[low, high], or [at least low] or [at most high] where no more is known; `how` formats each end (default: fixed
    digits).
    """
    if not pair or (pair[0] is None and pair[1] is None):
        return "[no interval]"
    return f"[{known(pair, how or (lambda v: fixed(v, digits)), both='{}, {}')}]"


def percent(share: float | None, digits: int = 1) -> str:
    if share is None or not math.isfinite(share):
        return DASH
    value = 100 * share
    if 0 < abs(value) < 10**-digits:
        return f"< {10**-digits:g} %"
    if value >= 1e4:
        return f"{power(value)} %"
    return f"{value:.{digits}f} %".replace("-", "−")


def pretty(text: str) -> str:
    """3.2e+18 as 3.2·10¹⁸, sizes of up to a trillion as 2.29B, k C^c as k·Cᶜ; what is part of a name stays."""

    def shown(found: re.Match[str]) -> str:
        value = float(found[0])
        return si(value) if 1e3 <= value < 1e15 else power(value, len(found[1] or ".") - 1)

    number = r"(?<![\w.])(?<![\w.]-)\d+(\.\d+)?e[+-]?\d+"
    return re.sub(r"(?<![\w.^])-(?=\d)", "−", re.sub(number, shown, text.replace("k C^c", "k·Cᶜ")))


def listed(items: Sequence[str]) -> str:
    """a, b and c."""
    items = list(items)
    if len(items) < 2:
        return "".join(items)
    return ", ".join(items[:-1]) + " and " + items[-1]


def duration(seconds: float | None) -> str:
    if seconds is None or not math.isfinite(seconds):
        return DASH
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
