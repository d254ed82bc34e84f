"""The figure of isoFLOPs: loss against size at budgets that the arms share (approach 2 of arXiv 2203.15556)."""

from __future__ import annotations

import altair as alt

from isofusion.report import style
from isofusion.report.figures import Analysis, Chart, rows_of
from isofusion.report.panels import grid, layered
from isofusion.report.style import Layout
from isofusion.report.words import power

PANELS = 3  # the largest budgets


def isoflops(a: Analysis, layout: Layout) -> Chart | None:
    """One panel per budget: each arm's sizes at its compute, a parabola through them, a ring at its lowest point."""
    arms = [arm for arm in a["study"]["arms"] if a["isoflop"].get(arm)]
    budgets = sorted({b["c"] for arm in arms for b in a["isoflop"][arm]})[-PANELS:]
    if not budgets or len(arms) < min(2, len(a["study"]["arms"])):
        return None
    columns = len(budgets) if layout.name == "wide" else 1
    width = min(int(layout.width / columns - 66), 420)
    all_n = [n for arm in arms for b in a["isoflop"][arm] for n in b["n"]]
    panels = []
    for c in budgets:
        mine = {arm: b for arm in arms for b in a["isoflop"][arm] if b["c"] == c}
        curves, points = (
            [
                {"arm": arm, "n": n, "loss": loss}
                for arm, b in mine.items()
                for n, loss in zip(part(b)["n"], part(b)["loss"], strict=True)
            ]
            for part in (lambda b: b["curve"], lambda b: b)
        )
        lowest = [
            {"arm": arm, "n": b["lowest"], "loss": b["lowest_loss"]}
            for arm, b in mine.items()
            if b["lowest"] is not None
        ]
        x = alt.X("n:Q", **style.log_axis(all_n, "N, parameters"))
        y = alt.Y("loss:Q", **style.linear_axis([p["loss"] for p in curves + points], "loss (nats/token)"))
        encoded = {"x": x, "y": y, "color": style.arm_colour(arms)}
        layers = [
            alt.Chart(rows_of(curves))
            .mark_line(strokeWidth=1.5, clip=True)
            .encode(**encoded, strokeDash=style.arm_dash(arms)),
            alt.Chart(rows_of(points)).mark_point(size=36, filled=True).encode(**encoded, shape=style.arm_shape(arms)),
        ]
        if lowest:
            ring = alt.Chart(rows_of(lowest)).mark_point(shape="circle", size=150, strokeWidth=1.6, filled=False)
            layers.append(ring.encode(**encoded))
        panels.append(layered(*layers, width=width, height=220, title=f"{power(c)} FLOPs"))
    return grid(panels, columns)
