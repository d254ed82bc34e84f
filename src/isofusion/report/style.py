"""One look for every figure: palette per arm, log axes in powers of ten, wide and narrow layouts.

Colours are Okabe and Ito's colour-blind-safe set ("Color Universal Design", 2008); an arm keeps its colour, point shape
and dash in every figure, so that a figure also reads in grey.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt

FONT = "Arial, 'Liberation Sans', Helvetica, sans-serif"
INK = "#1f2328"
MUTED = "#6b7178"
GRID = "#e7e8ea"
TEXT_COLOUR = "#7b8794"  # text tokens, where a figure separates modalities
IMAGE_COLOUR = "#E69F00"  # image tokens
ORACLE_COLOUR = "#000000"
OFF = 1e6  # times the best: an end of a band that is not known lies off the axes

_KNOWN = {"early": 0, "late": 1, "early-moe": 2, "early-moe-routed": 3, "late-moe": 4}
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D1F", "#333333")
_SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-left", "triangle-right")
_DASHES = ([1, 0], [7, 3], [2, 2], [8, 2, 2, 2], [4, 4], [10, 3], [1, 3], [5, 1])


@dataclass(frozen=True)
class Layout:
    """Space a figure may use. `width` is the whole drawing in CSS pixels, `columns` the most panels side by side."""

    name: str
    width: int
    columns: int
    font: int

    def panel(self, panels: int, margin: int = 62) -> tuple[int, int]:
        """Panels per line and the width of one panel, axis labels taken off."""
        columns = max(1, min(self.columns, panels))
        return columns, int(self.width / columns - margin)


WIDE = Layout("wide", width=900, columns=4, font=11)
NARROW = Layout("narrow", width=350, columns=1, font=11)
WRAPPED = Layout("wide", width=900, columns=4, font=12)  # panels that stand in a row or, on a telephone, in a column


def arm_styles(arms: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colour, shape and dash of each arm: fixed for the usual names, the free slots in order for others."""
    taken = {_KNOWN[arm] for arm in arms if arm in _KNOWN}
    free = [slot for slot in range(len(_COLOURS)) if slot not in taken]
    styles = {}
    for arm in arms:
        slot = _KNOWN[arm] if arm in _KNOWN else (free.pop(0) if free else len(_COLOURS) - 1)
        styles[arm] = {"colour": _COLOURS[slot], "shape": _SHAPES[slot], "dash": list(_DASHES[slot])}
    return styles


def arm_colour(arms: Sequence[str], legend: bool = True, outline: float = 0) -> alt.Color:
    """`outline` is the width of the legend's strokes: all that is seen of it where every mark is open."""
    styles = arm_styles(arms)
    scale = alt.Scale(domain=list(arms), range=[styles[a]["colour"] for a in arms])
    return alt.Color("arm:N", scale=scale, legend=_legend(outline) if legend and len(arms) > 1 else None, title=None)


def arm_shape(arms: Sequence[str], legend: bool = True, outline: float = 0) -> alt.Shape:
    styles = arm_styles(arms)
    scale = alt.Scale(domain=list(arms), range=[styles[a]["shape"] for a in arms])
    return alt.Shape("arm:N", scale=scale, legend=_legend(outline) if legend and len(arms) > 1 else None, title=None)


def arm_dash(arms: Sequence[str]) -> alt.StrokeDash:
    styles = arm_styles(arms)
    scale = alt.Scale(domain=list(arms), range=[styles[a]["dash"] for a in arms])
    return alt.StrokeDash("arm:N", scale=scale, legend=_legend() if len(arms) > 1 else None, title=None)


def _legend(outline: float = 0) -> alt.Legend:
    return alt.Legend(
        orient="top",
        direction="horizontal",
        title=None,
        columns=2,
        symbolSize=70,
        symbolOpacity=1,
        symbolStrokeWidth=outline,
    )


def superscript(value: int) -> str:
    return str(value).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _power_label() -> str:
    """Vega expression: 10^x, or m·10^x where the tick is not a whole power."""
    power = "floor(log(datum.value / 0.995) / LN10)"  # what rounds to ten, as a legend's 9.99e17, is one of the next
    digits = f"toString({power})"
    for plain, raised in zip("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹", strict=True):
        digits = f"replace({digits}, regexp('{plain}', 'g'), '{raised}')"
    mantissa = f"(round(10 * datum.value / pow(10, {power})) / 10)"
    return f"({mantissa} == 1 ? '' : {mantissa} + '·') + '10' + {digits}"


def log_ticks(low: float, high: float, most: int = 7) -> list[float]:
    """Whole powers of ten, at most `most`; where fewer than three would show others between them, evenly spaced in the
    end."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    whole = [10.0**k for k in decades if low <= 10.0**k <= high]
    if len(whole) >= 3:
        return whole[:: max(1, math.ceil(len(whole) / most))]
    found: list[float] = []
    for steps in ((1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        found = [m * 10.0**k for k in decades for m in steps if low <= m * 10.0**k <= high]
        if len(found) >= 3:
            return found
    for step in (1.0, 0.5, 0.2, 0.1):
        unit = step * 10.0 ** math.floor(math.log10(low))
        even = [round(k * unit, 12 - decades.start) for k in range(math.ceil(low / unit), math.floor(high / unit) + 1)]
        if len(even) >= 3:
            return even
    return found


LAST_POWER = 300.0
"""Of ten, on a log axis: float64 ends soon after it."""


def log_domain(values: Iterable[float], pad: float = 0.05) -> tuple[float, float]:
    """Ends of a log axis around the positive finite values, a little wider than they are."""
    good = [v for v in values if v is not None and math.isfinite(v) and v > 0]
    if not good:
        return 1.0, 10.0
    low, high = math.log10(min(good)), math.log10(max(good))
    space = max((high - low) * pad, 0.05)
    return 10 ** max(low - space, -LAST_POWER), 10 ** min(high + space, LAST_POWER)


def log_axis(
    values: Iterable[float], title: str, pad: float = 0.05, plain: bool = False, ticks: int = 7
) -> dict[str, Any]:
    """Keyword arguments of a log x or y encoding: scale, axis and title, ticks labelled 10^x.

    plain: labelled as numbers instead, where none has more than five digits.
    """
    low, high = log_domain(values, pad)
    label = "format(datum.value, '~g')" if plain and low >= 1e-3 and high <= 1e5 else _power_label()
    axis = alt.Axis(values=log_ticks(low, high, ticks), labelExpr=label, labelFlush=False, labelOverlap=True)
    return {"scale": alt.Scale(type="log", domain=[low, high], nice=False), "axis": axis, "title": title}


def linear_axis(
    values: Iterable[float], title: str, zero: bool = False, pad: float = 0.06, ticks: int = 5
) -> dict[str, Any]:
    good = [v for v in values if v is not None and math.isfinite(v)]
    low, high = (min(good), max(good)) if good else (0.0, 1.0)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    space = (high - low) * pad or 0.05
    domain = [low - space, high + space]
    return {
        "scale": alt.Scale(domain=domain, nice=False, zero=False),
        "axis": alt.Axis(tickCount=ticks),
        "title": title,
    }


def themed(chart: Any, layout: Layout) -> dict[str, Any]:
    """The finished Vega-Lite specification: quiet axes, thin grid, no frame.

    The configuration is added to the specification, not the chart: Altair copies a whole chart at every `configure_*`.
    """
    size = layout.font
    spec: dict[str, Any] = chart.to_dict(validate=False)
    spec["config"] = {
        "font": FONT,
        "aria": False,  # a label and a role on every mark doubles the page; the drawing has a label of its own
        "background": "#ffffff",
        "padding": 4,
        "view": {"stroke": None},
        "axis": {
            "labelFontSize": size,
            "titleFontSize": size,
            "titleFontWeight": "normal",
            "labelColor": INK,
            "titleColor": INK,
            "gridColor": GRID,
            "domainColor": "#9aa0a6",
            "tickColor": "#9aa0a6",
            "tickSize": 4,
        },
        "legend": {
            "labelFontSize": size,
            "titleFontSize": size,
            "labelColor": INK,
            "titleFontWeight": "normal",
            "labelLimit": 220,
        },
        "title": {"fontSize": size + 1, "fontWeight": "bold", "color": INK, "anchor": "start", "offset": 6},
        "concat": {"spacing": 18},
    }
    return spec
