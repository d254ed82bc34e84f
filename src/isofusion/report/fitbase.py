"""What the figures of one fit share: colours, rows as charts, which of many runs are drawn, the scale of sizes.

One blue for the law, orange for what needs no law, grey for context; sizes and budgets run from light to dark.
"""

from __future__ import annotations

from typing import Any

import altair as alt
import numpy as np

from isofusion.laws.table import clusters
from isofusion.report import style
from isofusion.report.figures import Chart, rows_of
from isofusion.report.style import Layout

BLUE, ORANGE, GREY, PURPLE = "#0072B2", "#D55E00", "#9aa0a6", "#7b3294"
SHADES = ["#9ecae1", "#4292c6", "#2171b5", "#08519c", "#08224f"]
NAMED = 5  # sizes or budgets that a legend names one by one; of more it shows round values
POINTS = 700  # runs drawn at most
SHOWN = 3.0  # powers of ten of an estimate within which draws set a log axis; those further off are cut


def chart(rows: list[dict[str, Any]]) -> Chart:
    return alt.Chart(rows_of(rows))


def some(count: int, most: int) -> list[int]:
    """Evenly spread indices, ends included."""
    return sorted({round(float(i)) for i in np.linspace(0, count - 1, min(count, most))})


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
        titleOrient="left" if layout.name == "wide" else "top", tickCount=count,
        values=each if len(each) <= NAMED else _ticks(low, high),
    )  # fmt: skip
    return alt.Color("shade:Q", scale=alt.Scale(type="log", domain=[low, high], range=SHADES), legend=legend)


_LABEL = f"datum.value < 1e15 ? replace(format(datum.value, '.3~s'), 'G', 'B') : {style._power_label()}"


def _ticks(low: float, high: float) -> list[float]:
    ticks = style.log_ticks(low, high)
    return [float(t) for t in (ticks if len(ticks) > 1 else [low, high])]
