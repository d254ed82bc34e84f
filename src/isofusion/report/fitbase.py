"""What the figures of one fit share: colours, rows as charts, which of many runs are drawn, the scale of sizes.

One blue for the law, orange for what needs no law, grey for context; sizes and budgets run from light to dark.
"""

from __future__ import annotations

from typing import Any

import altair as alt
import numpy as np

from isofusion.laws.table import Runs, clusters
from isofusion.report import style
from isofusion.report.figures import Chart, rows_of
from isofusion.report.style import Layout

BLUE, ORANGE, GREY, PURPLE = "#0072B2", "#D55E00", "#9aa0a6", "#7b3294"
SHADES = ["#9ecae1", "#4292c6", "#2171b5", "#08519c", "#08224f"]
NAMED = 5  # sizes or budgets that a legend names one by one; of more it shows round values
POINTS = 700  # runs drawn at most
SHOWN = 3.0  # powers of ten of an estimate within which draws set a log axis; those further off are cut
FENCE = 3.0  # interquartile ranges beyond the quartiles: Tukey's outer fence ("Exploratory Data Analysis", 1977)
PLACE, LOSS = 1.5, 0.5  # powers of ten beyond the quartiles of N, D or C, and of losses, that are never wild
RARE = 10  # more wild values than one in so many are not wild


def chart(rows: list[dict[str, Any]]) -> Chart:
    return alt.Chart(rows_of(rows))


def some(count: int, most: int) -> list[int]:
    """Evenly spread indices, ends included."""
    return sorted({round(float(i)) for i in np.linspace(0, count - 1, min(count, most))})


def ordinary(values: Any, least: float) -> np.ndarray:
    """bool[k]: which positive values may set a log axis, so that one wild value does not squash the others.

    Wild are those beyond FENCE interquartile ranges, and `least` powers of ten, outside the quartiles; none is if that
    would be more than one in RARE (of few values: more than one).
    """
    values = np.asarray(values, dtype=np.float64)
    usable = np.isfinite(values) & (values > 0)
    if not usable.any():
        return usable
    log = np.full(len(values), np.nan)
    log[usable] = np.log10(values[usable])
    low, high = np.quantile(log[usable], [0.25, 0.75])
    reach = max(FENCE * float(high - low), least)
    inside = usable & (log >= low - reach) & (log <= high + reach)
    return inside if (usable & ~inside).sum() <= max(1, len(values) // RARE) else usable


def placed(runs: Runs) -> np.ndarray:
    """bool[m]: runs whose N, D and C may set an axis."""
    return np.logical_and.reduce([ordinary(v, PLACE) for v in (runs.n, runs.d, runs.c)])


def drawable(runs: Runs) -> np.ndarray:
    """bool[m]: runs that are drawn; the others are named in a caption."""
    return placed(runs) & ordinary(runs.loss, LOSS)


def same(encoding: Any) -> dict[str, Any]:
    return {key: encoding[key] for key in ("scale", "axis", "title")}


def width_of(layout: Layout, panels: int, margin: int = 66) -> tuple[int, int]:
    columns = min(panels, layout.columns) if layout.name == "wide" else 1
    return columns, int(layout.width / columns - margin)


def shaded(values: Any, title: str, layout: Layout, count: int = 5) -> alt.Color:
    """Light to dark over the logarithm of a quantity, with a bar as legend."""
    low, high = float(np.min(values)), float(np.max(values))
    of = clusters(np.asarray(values, dtype=np.float64))
    each = [float(np.exp(np.log(np.asarray(values)[of == k]).mean())) for k in range(int(of.max()) + 1)]
    legend = alt.Legend(
        orient="top", direction="horizontal", title=title, gradientLength=190, gradientThickness=8, labelExpr=_LABEL,
        titlePadding=10, titleOrient="left" if layout.name == "wide" else "top", tickCount=count,
        values=each if len(each) <= NAMED else _ticks(low, high),
    )  # fmt: skip
    return alt.Color("shade:Q", scale=alt.Scale(type="log", domain=[low, high], range=SHADES), legend=legend)


_LABEL = f"datum.value < 1e15 ? replace(format(datum.value, '.3~s'), 'G', 'B') : {style._power_label()}"


def _ticks(low: float, high: float) -> list[float]:
    ticks = style.log_ticks(low, high)
    return [float(t) for t in (ticks if len(ticks) > 1 else [low, high])]
