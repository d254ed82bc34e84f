"""The figures of one fit that show its law and answer: loss against compute, best size, isoFLOPs, choices.

Each is a function of the analysis and a layout, drawn twice; None where the runs hold nothing to draw. How far to trust
them: fitfigures_tests.py. What they say in the runs' own numbers: fitcaptions.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import altair as alt
import numpy as np

from isofusion.laws.analysis import Analysis
from isofusion.laws.derived import at_compute
from isofusion.laws.envelope import envelope
from isofusion.laws.frontier import compute_optimal
from isofusion.laws.isoflop import IsoFlop, IsoFlops
from isofusion.laws.sensitivity import Sensitivity
from isofusion.laws.table import clusters
from isofusion.report import style
from isofusion.report.figures import Chart
from isofusion.report.fitbase import (
    BLUE,
    GREY,
    LOSS,
    ORANGE,
    PLACE,
    POINTS,
    PURPLE,
    SHOWN,
    chart,
    drawable,
    ordinary,
    same,
    shaded,
    some,
    width_of,
)  # fmt: skip
from isofusion.report.fitfigures_tests import cloud, hold_out, profiles, residuals
from isofusion.report.panels import grid, layered
from isofusion.report.style import Layout
from isofusion.report.words import power, si

CURVES = 8  # law curves drawn at most: one per size would hide the points
BUDGETS = 9


def loss_against_compute(a: Analysis, layout: Layout) -> Chart | None:
    """Every run; the law along a selection of sizes; the law's compute-optimal loss with its interval; k C^c."""
    runs, fit = a.runs.select(drawable(a.runs)), a.fit
    _, width = width_of(layout, 1)
    pick = some(len(runs), POINTS)
    points = [{"c": float(runs.c[i]), "loss": float(runs.loss[i]), "shade": float(runs.n[i])} for i in pick]
    cluster = clusters(runs.n)
    curves = []
    for k in some(int(cluster.max()) + 1, CURVES):
        rows = cluster == k
        n = float(np.exp(np.log(runs.n[rows]).mean()))
        d = np.geomspace(runs.d[rows].min() / 1.3, runs.d[rows].max() * 1.3, 24)
        for c, loss in zip(_compute(a, n, d), fit.predict(np.full(24, n), d), strict=True):
            curves.append({"c": float(c), "loss": float(loss), "shade": n})
    front = _frontier(a)
    losses = [p["loss"] for p in points] + [f["loss"] for f in front]
    x = alt.X("c:Q", **style.log_axis([*runs.c, *(f["c"] for f in front)], "training compute, FLOPs", pad=0.02))
    y = alt.Y("loss:Q", **style.log_axis(losses, "loss (nats/token)", pad=0.05, plain=True))
    shade = shaded(runs.n, "parameters", layout)
    layers = [chart(curves).mark_line(strokeWidth=1.1, opacity=0.8, clip=True).encode(x=x, y=y, color=shade)]
    layers.append(chart(points).mark_point(filled=True, size=24, opacity=0.85).encode(x=x, y=y, color=shade))
    if front:
        base = chart(front).encode(x=x)
        if "lo" in front[0]:
            area = base.mark_area(opacity=0.16, color=ORANGE, clip=True)
            layers.append(area.encode(y=alt.Y("lo:Q", **same(y)), y2=alt.Y2("hi")))
        layers.append(base.mark_line(strokeWidth=2, color=ORANGE, clip=True).encode(y=y))
    hull = _hull(a)
    if hull:
        layers.append(chart(hull).mark_line(strokeDash=[5, 3], strokeWidth=1.2, color=style.INK).encode(x=x, y=y))
    return layered(*layers, width=width, height=330 if layout.name == "wide" else 260)


def _compute(a: Analysis, n: float, d: np.ndarray) -> np.ndarray:
    """FLOPs of size n at d tokens under the analysis's cost."""
    return np.asarray(a.cost.per_token(np.array([n])))[0] * d


def _frontier(a: Analysis) -> list[dict[str, float]]:
    """Compute-optimal N, D, D/N and loss from the runs' compute to that asked for, with intervals of the draws."""
    seen = a.runs.c[drawable(a.runs)]
    c = np.geomspace(float(seen.min()), max(float(seen.max()), a.compute), 40)
    best = compute_optimal(a.fit, c, cost=a.cost)
    keep = ~best.edge & np.isfinite(best.n)
    if not keep.any():
        return []
    rows: list[dict[str, Any]] = [
        {"c": float(c[i]), "n": float(best.n[i]), "ratio": float(best.d[i] / best.n[i]), "loss": float(best.loss[i])}
        for i in np.flatnonzero(keep)
    ]
    if a.intervals is None:
        return rows
    found = at_compute(a.intervals, c[keep], cost=a.cost)
    for name, key in (("", "loss"), ("n_", "n"), ("ratio_", "tokens_per_parameter")):
        best_c, low, high = found[key].value, found[key].low, found[key].high
        low, high = (
            np.where(np.isfinite(end), end, best_c * by) for end, by in ((low, 1 / style.OFF), (high, style.OFF))
        )
        for i, row in enumerate(rows):
            row[f"{name}lo"], row[f"{name}hi"] = float(low[i]), float(high[i])
    return rows


def _hull(a: Analysis) -> list[dict[str, float]]:
    from isofusion.errors import InputError

    try:
        found = envelope(a.runs)
    except InputError:
        return []
    seen = a.runs.c[drawable(a.runs)]
    ends = max(float(found.c[0]), float(seen.min())), min(float(found.c[-1]), float(seen.max()))
    if not ends[0] < ends[1]:
        return []
    c = np.geomspace(*ends, 24)
    return [{"c": float(x), "loss": float(v)} for x, v in zip(c, found.predict(c), strict=True)]


def optimal(a: Analysis, layout: Layout) -> Chart | None:
    """N* and D*/N* against compute with their intervals, the runs behind, and the computes asked for."""
    front = _frontier(a)
    if not front:
        return None
    columns, width = width_of(layout, 2)
    shown = a.runs.select(drawable(a.runs))
    pick = some(len(shown), POINTS)
    panels = []
    for field, title, seen in (
        ("n", "compute-optimal N, parameters", shown.n),
        ("ratio", "tokens per parameter, D*/N*", shown.d / shown.n),
    ):
        runs = [{"c": float(shown.c[i]), "v": float(seen[i])} for i in pick]
        rows: list[dict[str, Any]] = [
            {"c": f["c"], "v": f[field], "lo": f.get(f"{field}_lo"), "hi": f.get(f"{field}_hi")} for f in front
        ]
        values = [f["v"] for f in rows]
        if rows[0]["lo"] is not None:
            reach = 30.0
            values += [max(f["lo"], min(values) / reach) for f in rows] + [
                min(f["hi"], max(values) * reach) for f in rows
            ]
        x = alt.X("c:Q", **style.log_axis([f["c"] for f in front], "training compute, FLOPs", pad=0.02))
        y = alt.Y("v:Q", **(style.log_axis([*values, *seen], title, plain=field == "ratio") | {"title": None}))
        layers = [chart(runs).mark_point(filled=True, size=14, opacity=0.45, color=GREY, clip=True).encode(x=x, y=y)]
        if rows[0]["lo"] is not None:
            area = chart(rows).mark_area(opacity=0.18, color=BLUE, clip=True)
            layers.append(area.encode(x=x, y=alt.Y("lo:Q", **same(y)), y2=alt.Y2("hi")))
        layers.append(chart(rows).mark_line(color=BLUE, strokeWidth=2, clip=True).encode(x=x, y=y))
        asked = [{"c": r["compute"], "v": r["n" if field == "n" else "tokens_per_parameter"]} for r in a.answers]
        if asked:
            dots = chart(asked).mark_point(filled=True, size=60, color=style.INK, clip=True)
            layers.append(dots.encode(x=x, y=y))
        panels.append(layered(*layers, width=width, height=230, title=title))
    return grid(panels, columns)


def _budgets(found: IsoFlops) -> list[IsoFlop]:
    return [found.budgets[i] for i in some(len(found.budgets), BUDGETS)]


def isoflop_drawn(found: IsoFlops) -> np.ndarray:
    """bool: which runs of the budgets that are drawn may set an axis, in their order."""
    n, loss = (np.concatenate([getattr(b, k) for b in _budgets(found)]) for k in ("n", "loss"))
    return ordinary(n, PLACE) & ordinary(loss, LOSS)


def isoflop(a: Analysis, layout: Layout) -> Chart | None:
    """Loss against N at equal compute: runs, the law's curve, its minimum and the parabola's; then N* against C."""
    found = a.isoflops
    if not isinstance(found, IsoFlops):
        return None
    columns, width = width_of(layout, 2)
    budgets = _budgets(found)
    points: list[dict[str, Any]] = []
    curves: list[dict[str, Any]] = []
    minima: list[dict[str, Any]] = []
    for b in budgets:
        points += [{"n": float(n), "loss": float(v), "shade": b.c} for n, v in zip(b.n, b.loss, strict=True)]
        n = np.geomspace(b.n[0] / 1.3, b.n[-1] * 1.3, 40)
        loss = a.fit.predict(n, a.cost.tokens(b.c, n))
        curves += [{"n": float(x), "loss": float(v), "shade": b.c} for x, v in zip(n, loss, strict=True)]
        at = b.best["law"]
        if math.isfinite(at) and n[0] <= at <= n[-1]:
            minima.append({"n": at, "loss": float(a.fit.predict(at, a.cost.tokens(b.c, at))), "shade": b.c})
    keep = isoflop_drawn(found)
    points = [p for p, ok in zip(points, keep, strict=True) if ok]
    x = alt.X("n:Q", **style.log_axis([p["n"] for p in points], "parameters", pad=0.04))
    y = alt.Y("loss:Q", **style.log_axis([p["loss"] for p in points], "loss (nats/token)", plain=True))
    shade = shaded([b.c for b in budgets], "FLOPs", layout)
    left = [chart(curves).mark_line(strokeWidth=1.2, clip=True).encode(x=x, y=y, color=shade)]
    left.append(chart(points).mark_point(filled=True, size=26, opacity=0.9).encode(x=x, y=y, color=shade))
    if minima:
        cross = chart(minima).mark_point(shape="diamond", size=55, filled=True, color=ORANGE, clip=True)
        left.append(cross.encode(x=x, y=y))
    panels = [layered(*left, width=width, height=260, title="loss at equal compute")]
    right = _minima(a, found, width)
    return grid([*panels, right] if right else panels, columns)


def _minima(a: Analysis, found: IsoFlops, width: int) -> Chart | None:
    kinds = {"parabola": ORANGE, "akima": PURPLE, "law": BLUE}
    rows: list[dict[str, Any]] = [
        {"c": b.c, "n": b.best[k], "kind": k}  # type: ignore[index]
        for b in found.budgets
        for k in kinds
        if b.bracketed and math.isfinite(b.best[k])  # type: ignore[index]
    ]
    if len({r["c"] for r in rows}) < 2:
        return None
    x = alt.X("c:Q", **style.log_axis([r["c"] for r in rows], "FLOPs", pad=0.04))
    y = alt.Y("n:Q", **(style.log_axis([r["n"] for r in rows], "") | {"title": None}))
    scale = alt.Scale(domain=list(kinds), range=list(kinds.values()))
    shapes = alt.Scale(domain=list(kinds), range=["circle", "diamond", "stroke"])
    legend = alt.Legend(orient="top", title=None, columns=3)
    dots = [r for r in rows if r["kind"] != "law"]
    line = [r for r in rows if r["kind"] == "law"]
    colour = alt.Color("kind:N", scale=scale, legend=legend)
    layers = [chart(line).mark_line(strokeWidth=2).encode(x=x, y=y, color=colour)]
    points = chart(dots).mark_point(filled=True, size=42, opacity=0.9)
    layers.append(points.encode(x=x, y=y, color=colour, shape=alt.Shape("kind:N", scale=shapes, legend=legend)))
    return layered(*layers, width=width, height=260, title="best size per budget")


def choices(a: Analysis, layout: Layout) -> Chart | None:
    """N* under every choice; the band is the range over those the runs do not rule out."""
    s = a.sensitivity
    if not isinstance(s, Sensitivity):
        return None
    rows: list[dict[str, Any]] = [
        {"label": f"{i + 1}. {_short(r.group, r.change)}", "n": r.n, "kind": _kind(r.group, r.counts)}
        for i, r in enumerate(s.shown())
        if math.isfinite(r.n)
    ]
    order = [r["label"] for r in rows]
    label = 250 if layout.name == "wide" else 150
    width = layout.width - label - 40
    kinds = {"default": style.INK, "counted": BLUE, "ruled out": GREY}
    low, high = choices_reach(s)
    counted = [r.n for r in s.counted]
    core = [max(low, min(counted)), min(high, max(counted))]
    for row in rows:
        row["far"] = not low <= row["n"] <= high
        row["n"] = min(max(row["n"], low), high)
    seen = [r["n"] for r in rows]
    x = alt.X("n:Q", **style.log_axis(seen, f"N*, parameters, at {power(s.compute)} FLOPs"))
    y = alt.Y("label:N", sort=order, title=None, axis=alt.Axis(labelLimit=label, grid=True))
    span = chart([{"lo": core[0], "hi": core[1]}]).mark_rect(opacity=0.13, color=ORANGE if s.undetermined else BLUE)
    layers = [span.encode(x=alt.X("lo:Q", **same(x)), x2=alt.X2("hi"))]
    colour = alt.Color(
        "kind:N",
        scale=alt.Scale(domain=list(kinds), range=list(kinds.values())),
        legend=alt.Legend(orient="top", title=None, columns=3),
    )
    shapes = alt.Scale(domain=[False, True], range=["circle", "cross"])
    dots = chart(rows).mark_point(filled=True, size=60, opacity=1)
    layers.append(dots.encode(x=x, y=y, color=colour, shape=alt.Shape("far:N", scale=shapes, legend=None)))
    return layered(*layers, width=width, height=18 * len(order))


def choices_reach(s: Sensitivity) -> tuple[float, float]:
    """Lowest and highest N* on the axis of choices: a little beyond the range of the counted ones, and within SHOWN
    powers of ten of the fit's own; those further out are drawn as crosses at its ends."""
    counted, own = [r.n for r in s.counted], s.rows[0].n
    return max(min(counted) / 30, own / 10**SHOWN), min(max(counted) * 30, own * 10**SHOWN)


def _kind(group: str, counts: bool) -> str:
    return "default" if group == "default" else "counted" if counts else "ruled out"


def _short(group: str, change: str) -> str:
    """A choice in few letters."""
    if group == "default":
        return "as fitted"
    if group == "delta":
        value, _, rest = change.partition(" ")
        exponent = math.log10(float(value))
        shown = "10" + style.superscript(round(exponent)) if exponent < -0.5 else value
        return f"δ = {shown} {rest}".rstrip()
    if group == "size left out":
        return f"without size {si(float(change))}"
    return change.replace("without the", "less").replace(" of the N and D terms", "").replace("k C^c", "k·Cᶜ")


FIGURES: dict[str, Callable[[Analysis, Layout], Chart | None]] = {
    "loss-against-flops": loss_against_compute,
    "compute-optimal": optimal,
    "choices": choices,
    "hold-out": hold_out,
    "isoflop": isoflop,
    "residuals": residuals,
    "profiles": profiles,
    "cloud": cloud,
}
"""In the order of the page."""
