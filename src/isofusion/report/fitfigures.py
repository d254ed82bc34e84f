"""The figures of one fit (`isofusion fit --report`): each a function of the analysis and a layout, drawn twice.

A function returns None where the runs hold nothing to draw. Interpretations stand in fitpage.py, in the numbers of the
runs. One blue for the law, orange for what needs no law, grey for context; sizes and budgets run from light to dark.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import altair as alt
import numpy as np

from isofusion.laws.analysis import Analysis
from isofusion.laws.envelope import envelope
from isofusion.laws.frontier import compute_optimal
from isofusion.laws.holdout import HoldOut
from isofusion.laws.isoflop import IsoFlops
from isofusion.laws.profile import Profile
from isofusion.laws.rollout import Rollout
from isofusion.laws.sensitivity import Sensitivity
from isofusion.laws.table import clusters
from isofusion.report import style
from isofusion.report.figures import Chart, rows_of
from isofusion.report.panels import grid, layered
from isofusion.report.style import Layout
from isofusion.report.words import power, si

BLUE, ORANGE, GREY, PURPLE = "#0072B2", "#D55E00", "#9aa0a6", "#7b3294"
SHADES = ["#9ecae1", "#4292c6", "#2171b5", "#08519c", "#08224f"]
CURVES = 8  # law curves drawn at most: one per size would hide the points
BUDGETS = 9
NAMED = 5  # sizes or budgets that a legend names one by one; of more it shows round values
CLOUD = 300  # bootstrap draws drawn
POINTS = 700  # runs drawn at most
SHOWN = 3.0  # powers of ten of an estimate within which draws set a log axis; those further off are cut
NAMES = {"alpha": "α", "beta": "β", "E": "E, nats/token", "N*": "N*, parameters"}
MARKS = {"carry_over": "carry over", "power_law": "k·C^c", "nearest": "nearest run"}


def _chart(rows: list[dict[str, Any]]) -> Chart:
    return alt.Chart(rows_of(rows))


def _some(count: int, most: int) -> list[int]:
    """Evenly spread indices, ends included."""
    return sorted({round(float(i)) for i in np.linspace(0, count - 1, min(count, most))})


def _same(encoding: Any) -> dict[str, Any]:
    return {key: encoding[key] for key in ("scale", "axis", "title")}


def _width(layout: Layout, panels: int, margin: int = 66) -> tuple[int, int]:
    columns = min(panels, layout.columns) if layout.name == "wide" else 1
    return columns, int(layout.width / columns - margin)


def _shade(values: Any, title: str, layout: Layout, count: int = 5) -> alt.Color:
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


def loss_against_compute(a: Analysis, layout: Layout) -> Chart | None:
    """Every run; the law along a selection of sizes; the law's compute-optimal loss with its interval; k C^c."""
    runs, fit = a.runs, a.fit
    _, width = _width(layout, 1)
    pick = _some(len(runs), POINTS)
    points = [{"c": float(runs.c[i]), "loss": float(runs.loss[i]), "shade": float(runs.n[i])} for i in pick]
    cluster = clusters(runs.n)
    curves = []
    for k in _some(int(cluster.max()) + 1, CURVES):
        rows = cluster == k
        n = float(np.exp(np.log(runs.n[rows]).mean()))
        d = np.geomspace(runs.d[rows].min() / 1.3, runs.d[rows].max() * 1.3, 24)
        for c, loss in zip(_compute(a, n, d), fit.predict(np.full(24, n), d), strict=True):
            curves.append({"c": float(c), "loss": float(loss), "shade": n})
    front = _frontier(a)
    losses = [p["loss"] for p in points] + [f["loss"] for f in front]
    x = alt.X("c:Q", **style.log_axis([*runs.c, *(f["c"] for f in front)], "training compute, FLOPs", pad=0.02))
    y = alt.Y("loss:Q", **style.log_axis(losses, "loss (nats/token)", pad=0.05, plain=True))
    shade = _shade(runs.n, "parameters", layout)
    layers = [_chart(curves).mark_line(strokeWidth=1.1, opacity=0.8, clip=True).encode(x=x, y=y, color=shade)]
    layers.append(_chart(points).mark_point(filled=True, size=24, opacity=0.85).encode(x=x, y=y, color=shade))
    if front:
        base = _chart(front).encode(x=x)
        if "lo" in front[0]:
            area = base.mark_area(opacity=0.16, color=ORANGE, clip=True)
            layers.append(area.encode(y=alt.Y("lo:Q", **_same(y)), y2=alt.Y2("hi")))
        layers.append(base.mark_line(strokeWidth=2, color=ORANGE, clip=True).encode(y=y))
    hull = _hull(a)
    if hull:
        layers.append(_chart(hull).mark_line(strokeDash=[5, 3], strokeWidth=1.2, color=style.INK).encode(x=x, y=y))
    return layered(*layers, width=width, height=330 if layout.name == "wide" else 260)


def _compute(a: Analysis, n: float, d: np.ndarray) -> np.ndarray:
    """FLOPs of size n at d tokens under the analysis's cost."""
    return np.asarray(a.cost.per_token(np.array([n])))[0] * d


def _frontier(a: Analysis) -> list[dict[str, float]]:
    """Compute-optimal N, D, D/N and loss from the runs' compute to that asked for, with intervals of the draws."""
    c = np.geomspace(float(a.runs.c.min()), max(float(a.runs.c.max()), a.compute), 40)
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
    drawn = compute_optimal(a.fit, c[keep], cost=a.cost, params=a.intervals.draws)
    with np.errstate(over="ignore"):  # of draws that say nothing: infinite
        ratio = drawn.d / drawn.n
    for name, values in (("", drawn.loss), ("n_", drawn.n), ("ratio_", ratio)):
        low, high = a.intervals.quantiles(values)
        if not np.isfinite([low, high]).all():
            continue
        for i, row in enumerate(rows):
            row[f"{name}lo"], row[f"{name}hi"] = float(low[i]), float(high[i])
    return rows


def _hull(a: Analysis) -> list[dict[str, float]]:
    from isofusion.errors import InputError

    try:
        found = envelope(a.runs)
    except InputError:
        return []
    c = np.geomspace(found.c[0], found.c[-1], 24)
    return [{"c": float(x), "loss": float(v)} for x, v in zip(c, found.predict(c), strict=True)]


def optimal(a: Analysis, layout: Layout) -> Chart | None:
    """N* and D*/N* against compute with their intervals, the runs behind, and the computes asked for."""
    front = _frontier(a)
    if not front:
        return None
    columns, width = _width(layout, 2)
    pick = _some(len(a.runs), POINTS)
    panels = []
    for field, title, seen in (
        ("n", "compute-optimal N, parameters", a.runs.n),
        ("ratio", "tokens per parameter, D*/N*", a.runs.d / a.runs.n),
    ):
        runs = [{"c": float(a.runs.c[i]), "v": float(seen[i])} for i in pick]
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
        layers = [_chart(runs).mark_point(filled=True, size=14, opacity=0.45, color=GREY, clip=True).encode(x=x, y=y)]
        if rows[0]["lo"] is not None:
            area = _chart(rows).mark_area(opacity=0.18, color=BLUE, clip=True)
            layers.append(area.encode(x=x, y=alt.Y("lo:Q", **_same(y)), y2=alt.Y2("hi")))
        layers.append(_chart(rows).mark_line(color=BLUE, strokeWidth=2, clip=True).encode(x=x, y=y))
        asked = [{"c": r["compute"], "v": r["n" if field == "n" else "tokens_per_parameter"]} for r in a.answers]
        if asked:
            dots = _chart(asked).mark_point(filled=True, size=60, color=style.INK, clip=True)
            layers.append(dots.encode(x=x, y=y))
        panels.append(layered(*layers, width=width, height=230, title=title))
    return grid(panels, columns)


def isoflop(a: Analysis, layout: Layout) -> Chart | None:
    """Loss against N at equal compute: runs, the law's curve, its minimum and the parabola's; then N* against C."""
    found = a.isoflops
    if not isinstance(found, IsoFlops):
        return None
    columns, width = _width(layout, 2)
    budgets = [found.budgets[i] for i in _some(len(found.budgets), BUDGETS)]
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
    x = alt.X("n:Q", **style.log_axis([p["n"] for p in points], "parameters", pad=0.04))
    y = alt.Y("loss:Q", **style.log_axis([p["loss"] for p in points], "loss (nats/token)", plain=True))
    shade = _shade([b.c for b in budgets], "FLOPs", layout)
    left = [_chart(curves).mark_line(strokeWidth=1.2, clip=True).encode(x=x, y=y, color=shade)]
    left.append(_chart(points).mark_point(filled=True, size=26, opacity=0.9).encode(x=x, y=y, color=shade))
    if minima:
        cross = _chart(minima).mark_point(shape="diamond", size=55, filled=True, color=ORANGE, clip=True)
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
    layers = [_chart(line).mark_line(strokeWidth=2).encode(x=x, y=y, color=colour)]
    points = _chart(dots).mark_point(filled=True, size=42, opacity=0.9)
    layers.append(points.encode(x=x, y=y, color=colour, shape=alt.Shape("kind:N", scale=shapes, legend=legend)))
    return layered(*layers, width=width, height=260, title="best size per budget")


def residual_reach(r: Any) -> float:
    """Where the axis of residuals ends; those beyond are drawn as crosses at its edge."""
    return max(6.0 * 1.4826 * float(np.median(np.abs(r))), float(np.quantile(np.abs(r), 0.95)) * 1.3, 1e-8)


def residuals(a: Analysis, layout: Layout) -> Chart | None:
    """Observed over predicted less one, in per cent, against N and against D; the band is twice the typical one."""
    columns, width = _width(layout, 2)
    r = 100.0 * np.expm1(a.fit.residuals)
    band = 2.0 * 1.4826 * float(np.median(np.abs(r)))
    shown = residual_reach(r)
    pick = _some(len(r), POINTS)
    panels = []
    for seen, title in ((a.runs.n, "against parameters N"), (a.runs.d, "against tokens D")):
        rows: list[dict[str, Any]] = [
            {
                "x": float(seen[i]),
                "r": float(np.clip(r[i], -shown, shown)),
                "kind": "beyond" if abs(r[i]) > shown else "in",
            }
            for i in pick
        ]
        x = alt.X("x:Q", **style.log_axis(seen, title.split("against ")[1], pad=0.04))
        y = alt.Y("r:Q", **style.linear_axis([-shown, shown], "residual, % of the loss"))
        ends = [{"lo": -band, "hi": band}]
        layers = [_chart(ends).mark_rect(opacity=0.12, color=BLUE).encode(y=alt.Y("lo:Q", **_same(y)), y2=alt.Y2("hi"))]
        layers.append(_chart([{"r": 0.0}]).mark_rule(color=style.INK).encode(y=y))
        shape = alt.Shape("kind:N", scale=alt.Scale(domain=["in", "beyond"], range=["circle", "cross"]), legend=None)
        colour = alt.Color("kind:N", scale=alt.Scale(domain=["in", "beyond"], range=[BLUE, ORANGE]), legend=None)
        layers.append(
            _chart(rows).mark_point(filled=True, size=24, opacity=0.7).encode(x=x, y=y, shape=shape, color=colour)
        )
        panels.append(layered(*layers, width=width, height=200, title=title))
    return grid(panels, columns)


def profiles(a: Analysis, layout: Layout) -> Chart | None:
    """Objective above its minimum along one quantity, in units of what a 95 % interval takes; shaded: the interval."""
    found = {k: p for k, p in a.profiles.items() if isinstance(p, Profile)}
    if not found:
        return None
    columns = len(found) if layout.name == "wide" else 1
    width = int(layout.width / columns - 52)
    panels = []
    for name, p in found.items():
        depth = np.maximum(p.objective - p.minimum, 0.0) / p.threshold
        keep = depth <= 1.9
        rows: list[dict[str, Any]] = [
            {"v": float(v), "e": float(e)} for v, e in zip(p.values[keep], depth[keep], strict=True)
        ]
        log = name == "N*"
        values = [r["v"] for r in rows] + [v for v in (p.low, p.high) if v is not None]
        axis = style.log_axis(values, NAMES[name]) if log else style.linear_axis(values, NAMES[name], ticks=4)
        x = alt.X("v:Q", **axis)
        y = alt.Y("e:Q", **(style.linear_axis([0.0, 1.6], "objective above its minimum", pad=0.02, ticks=4)))
        span = {"lo": values[0] if p.low is None else p.low, "hi": max(values) if p.high is None else p.high}
        ends = {"x": alt.X("lo:Q", **_same(x)), "x2": alt.X2("hi")}
        layers = [_chart([span]).mark_rect(opacity=0.12, color=BLUE).encode(**ends)]
        layers.append(_chart([{"e": 1.0}]).mark_rule(strokeDash=[4, 3], color=style.INK).encode(y=y))
        layers.append(_chart(rows).mark_line(color=BLUE, interpolate="monotone", clip=True).encode(x=x, y=y))
        layers.append(_chart(rows).mark_point(color=BLUE, filled=True, size=20, clip=True).encode(x=x, y=y))
        layers.append(
            _chart([{"v": p.estimate, "e": 0.0}]).mark_point(color=ORANGE, filled=True, size=60).encode(x=x, y=y)
        )
        height = 170 if layout.name == "wide" else 140
        panels.append(layered(*layers, width=width, height=height))
    return grid(panels, columns)


def cloud(a: Analysis, layout: Layout) -> Chart | None:
    """Bootstrap draws: the two exponents; N* and D* at the compute of the answer."""
    if a.intervals is None:
        return None
    columns, width = _width(layout, 2)
    draws, pick = a.intervals.draws, _some(len(a.intervals.draws), CLOUD)
    rows: list[dict[str, Any]] = [{"x": float(draws.alpha[i]), "y": float(draws.beta[i])} for i in pick]
    panels = [_scatter(rows, a.fit.alpha, a.fit.beta, "α", "β", width, False)]
    best = compute_optimal(a.fit, a.compute, cost=a.cost)
    drawn = compute_optimal(a.fit, a.compute, cost=a.cost, params=draws)
    rows = [{"x": float(drawn.n[i, 0]), "y": float(drawn.d[i, 0])} for i in pick if np.isfinite(drawn.n[i, 0])]
    if rows and not best.edge[0]:
        panels.append(_scatter(rows, float(best.n[0]), float(best.d[0]), "N*, parameters", "D*, tokens", width, True))
    return grid(panels, columns)


def _scatter(rows: list[dict[str, float]], x0: float, y0: float, xt: str, yt: str, width: int, log: bool) -> Chart:
    axis = style.log_axis if log else style.linear_axis
    x = alt.X("x:Q", **axis(_about(x0, (r["x"] for r in rows), log), xt))
    y = alt.Y("y:Q", **axis(_about(y0, (r["y"] for r in rows), log), yt))
    dots = _chart(rows).mark_point(filled=True, size=12, opacity=0.35, color=BLUE, clip=True).encode(x=x, y=y)
    at = _chart([{"x": x0, "y": y0}]).mark_point(filled=True, size=80, color=ORANGE, stroke="white").encode(x=x, y=y)
    return layered(dots, at, width=width, height=230)


def _about(estimate: float, draws: Iterable[float], log: bool) -> list[float]:
    """What an axis must show: the estimate, and the draws; on a log axis those within SHOWN powers of ten of it."""
    near = [v for v in draws if not log or (v > 0 and abs(math.log10(v) - math.log10(estimate)) <= SHOWN)]
    return [estimate, *near]


def hold_out(a: Analysis, layout: Layout) -> Chart | None:
    """Predicted against observed for held-out runs with intervals; error of each step of the rollout over N."""
    columns, width = _width(layout, 2)
    tests = [t.steps for t in (a.rollouts["n"],) if isinstance(t, Rollout)]
    steps: list[HoldOut] = [*(tests[0] if tests else ([a.held] if isinstance(a.held, HoldOut) else []))]
    if not steps:
        return None
    rows: list[dict[str, Any]] = []
    for s in steps:
        for r in s.table():
            rows.append({"o": r["observed"], "p": r["predicted"], "lo": r["low"], "hi": r["high"], "shade": r["n"]})
    values = [r["o"] for r in rows] + [r["p"] for r in rows]
    reach = [min(values) / 1.03, max(values) * 1.03]
    x = alt.X("o:Q", **style.log_axis(reach, "observed loss (nats/token)", pad=0.0, plain=True))
    y = alt.Y("p:Q", **style.log_axis(reach, "predicted before training it", pad=0.0, plain=True))
    shade = _shade([r["shade"] for r in rows], "held-out size", layout, 3)
    layers = [_chart([{"o": v, "p": v} for v in reach]).mark_line(color=GREY, strokeWidth=1).encode(x=x, y=y)]
    bars = [r for r in rows if r["lo"] is not None]
    if bars:
        rule = _chart(bars).mark_rule(opacity=0.55, clip=True)
        layers.append(rule.encode(x=x, y=alt.Y("lo:Q", **_same(y)), y2=alt.Y2("hi"), color=shade))
    layers.append(_chart(rows).mark_point(filled=True, size=46, opacity=1).encode(x=x, y=y, color=shade))
    panels = [layered(*layers, width=width, height=270, title="predicted against observed")]
    right = _steps(a, width)
    return grid([*panels, right] if right else panels, columns)


def _steps(a: Analysis, width: int) -> Chart | None:
    """Mean error of each step of the rollout over N by the law and the baselines."""
    found = a.rollouts["n"]
    if not isinstance(found, Rollout) or len(found.steps) < 2:
        return None
    rows: list[dict[str, Any]] = []
    for s in found.steps:
        n = float(np.exp(np.log(s.held.n).mean()))
        rows.append({"n": n, "e": 100 * s.error(s.predicted, False), "kind": "law"})
        for key, name in MARKS.items():
            error = s.error(s.baselines[key], False)
            if math.isfinite(error):
                rows.append({"n": n, "e": 100 * error, "kind": name})
    kinds = ["law", *MARKS.values()]
    x = alt.X("n:Q", **style.log_axis([r["n"] for r in rows], "held-out size, parameters", pad=0.08))
    y = alt.Y("e:Q", **style.linear_axis([r["e"] for r in rows], "mean error, % of the loss", zero=True))
    scale = alt.Scale(domain=kinds, range=[BLUE, ORANGE, GREY, PURPLE])
    shapes = alt.Scale(domain=kinds, range=["circle", "square", "triangle-up", "diamond"])
    legend = alt.Legend(orient="top", title=None, columns=4 if width > 330 else 2)
    colour = alt.Color("kind:N", scale=scale, legend=legend)
    shape = alt.Shape("kind:N", scale=shapes, legend=legend)
    line = _chart(rows).mark_line(strokeWidth=1.3).encode(x=x, y=y, color=colour)
    dots = _chart(rows).mark_point(filled=True, size=46, opacity=1).encode(x=x, y=y, color=colour, shape=shape)
    return layered(line, dots, width=width, height=270, title="each next size, from all below it")


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
    counted = [r.n for r in s.counted]
    core = [min(counted), max(counted)]
    seen = [r["n"] for r in rows if core[0] / 30 < r["n"] < core[1] * 30]
    x = alt.X("n:Q", **style.log_axis(seen, f"N*, parameters, at {power(s.compute)} FLOPs"))
    y = alt.Y("label:N", sort=order, title=None, axis=alt.Axis(labelLimit=label, grid=True))
    span = _chart([{"lo": core[0], "hi": core[1]}]).mark_rect(opacity=0.13, color=ORANGE if s.undetermined else BLUE)
    layers = [span.encode(x=alt.X("lo:Q", **_same(x)), x2=alt.X2("hi"))]
    colour = alt.Color(
        "kind:N",
        scale=alt.Scale(domain=list(kinds), range=list(kinds.values())),
        legend=alt.Legend(orient="top", title=None, columns=3),
    )
    rows = [r for r in rows if r["n"] in seen]
    layers.append(_chart(rows).mark_point(filled=True, size=60, opacity=1).encode(x=x, y=y, color=colour))
    return layered(*layers, width=width, height=18 * len(order))


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
