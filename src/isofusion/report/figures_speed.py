"""The figure of training speed: tokens/s, FLOP/s, and time at equal FLOPs between arms (arXiv 2504.07951 Fig. 4)."""

from __future__ import annotations

from typing import Any

import altair as alt

from isofusion.report import style
from isofusion.report.figures import Analysis, Chart, rows_of
from isofusion.report.panels import grid, layered
from isofusion.report.style import Layout


def speed(a: Analysis, layout: Layout) -> Chart | None:
    """Tokens/s and FLOP/s against N per arm; time of pairs of arms at equal FLOPs against N, 1 = equally fast."""
    rows = a["speed"]["sizes"]
    if not rows:
        return None
    arms = [arm for arm in a["study"]["arms"] if any(r["arm"] == arm for r in rows)]
    pairs = shown_pairs(a)
    panels = 3 if pairs else 2
    columns = panels if layout.name == "wide" else 1
    width = int(layout.width / columns - 66)
    x = alt.X("n:Q", **style.log_axis([r["n"] for r in rows], "N, parameters"))
    drawn = []
    for field, title in (("tokens_per_s", "tokens per second"), ("flops_per_s", "FLOP per second")):
        y = alt.Y(f"{field}:Q", **style.log_axis([r[field] for r in rows], title))
        base = alt.Chart(rows_of(rows)).encode(x=x, y=y, color=style.arm_colour(arms))
        lines = base.mark_line(strokeWidth=1.5).encode(strokeDash=style.arm_dash(arms))
        points = base.mark_point(size=36, filled=True, opacity=0.9).encode(shape=style.arm_shape(arms))
        drawn.append(layered(lines, points, width=width, height=190, title=title))
    if pairs:
        values = [r["time_ratio"] for r in pairs] + [1.0]
        y = alt.Y("time_ratio:Q", **style.linear_axis(values, "ratio"))
        base = alt.Chart(rows_of(pairs)).encode(x=x, y=y, color=style.arm_colour(arms))
        one = alt.Chart(rows_of([{"y": 1.0}])).mark_rule(color=style.INK, strokeDash=[2, 3], strokeWidth=1)
        lines = base.mark_line(strokeWidth=1.5).encode(strokeDash=style.arm_dash(arms))
        points = base.mark_point(size=36, filled=True, opacity=0.9).encode(shape=style.arm_shape(arms))
        title = "time at equal FLOPs"
        drawn.append(layered(one.encode(y="y:Q"), lines, points, width=width, height=190, title=title))
    return grid(drawn, columns)


def shown_pairs(a: Analysis) -> list[dict[str, Any]]:
    """Rows of the third panel, one line per arm in that arm's colour: against the first arm it is compared with."""
    rows = a["speed"]["pairs"]
    against: dict[str, str] = {}
    for r in rows:
        against.setdefault(r["first"], r["second"])
    return [{**r, "arm": r["first"]} for r in rows if against[r["first"]] == r["second"]]
