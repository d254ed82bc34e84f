"""The figures of one fit that test it: hold-outs, residuals, profiles, bootstrap draws. As in fitfigures.py."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import altair as alt
import numpy as np

from isofusion.laws.analysis import Analysis
from isofusion.laws.frontier import compute_optimal
from isofusion.laws.holdout import HoldOut
from isofusion.laws.profile import Profile
from isofusion.laws.rollout import Rollout
from isofusion.report import style
from isofusion.report.figures import Chart
from isofusion.report.fitbase import (
    BLUE,
    GREY,
    LOSS,
    ORANGE,
    POINTS,
    PURPLE,
    SHOWN,
    chart,
    ordinary,
    placed,
    same,
    shaded,
    some,
    width_of,
)  # fmt: skip
from isofusion.report.panels import grid, layered
from isofusion.report.style import Layout

CLOUD = 300  # bootstrap draws drawn
NAMES = {"alpha": "α", "beta": "β", "E": "E, nats/token", "N*": "N*, parameters"}
MARKS = {"carry_over": "carry over", "power_law": "k·Cᶜ", "nearest": "nearest run"}


def hold_out(a: Analysis, layout: Layout) -> Chart | None:
    """Predicted against observed for held-out runs with intervals; error of each step of the rollout over N."""
    columns, width = width_of(layout, 2)
    rows = predictions(a)
    if not rows:
        return None
    keep = predictions_drawn(rows)
    rows = [r for r, ok in zip(rows, keep, strict=True) if ok] or rows
    values = [r["o"] for r in rows] + [r["p"] for r in rows]
    reach = [min(values) / 1.03, max(values) * 1.03]
    x = alt.X("o:Q", **style.log_axis(reach, "observed loss (nats/token)", pad=0.0, plain=True))
    y = alt.Y("p:Q", **style.log_axis(reach, "predicted before training it", pad=0.0, plain=True))
    shade = shaded([r["shade"] for r in rows], "held-out size", layout, 3)
    layers = [chart([{"o": v, "p": v} for v in reach]).mark_line(color=GREY, strokeWidth=1).encode(x=x, y=y)]
    bars = [r for r in rows if r["lo"] is not None]
    if bars:
        rule = chart(bars).mark_rule(opacity=0.55, clip=True)
        layers.append(rule.encode(x=x, y=alt.Y("lo:Q", **same(y)), y2=alt.Y2("hi"), color=shade))
    layers.append(chart(rows).mark_point(filled=True, size=46, opacity=1).encode(x=x, y=y, color=shade))
    panels = [layered(*layers, width=width, height=270, title="predicted against observed")]
    right = _steps(a, width)
    return grid([*panels, right] if right else panels, columns)


def predictions(a: Analysis) -> list[dict[str, Any]]:
    """Every held-out run of the rollout over N, else of the largest size: observed o, predicted p, interval, size."""
    test = a.rollouts["n"]
    steps = test.steps if isinstance(test, Rollout) else (a.held,) if isinstance(a.held, HoldOut) else ()
    return [
        {"o": r["observed"], "p": r["predicted"], "lo": r["low"], "hi": r["high"], "shade": r["n"]}
        for s in steps
        for r in s.table()
    ]


def predictions_drawn(rows: list[dict[str, Any]]) -> np.ndarray:
    """bool: which held-out runs may set the axes."""
    return ordinary([r["o"] for r in rows], LOSS) & ordinary([r["p"] for r in rows], LOSS)


def step_errors(a: Analysis) -> list[dict[str, Any]]:
    """Mean error e (per cent of the loss) of each step of the rollout over N, by the law and the baselines."""
    found = a.rollouts["n"]
    if not isinstance(found, Rollout) or len(found.steps) < 2:
        return []
    rows: list[dict[str, Any]] = []
    for s in found.steps:
        n = float(np.exp(np.log(s.held.n).mean()))
        rows.append({"n": n, "e": 100 * s.error(s.predicted, False), "kind": "law"})
        for key, name in MARKS.items():
            error = s.error(s.baselines[key], False)
            if math.isfinite(error):
                rows.append({"n": n, "e": 100 * error, "kind": name})
    return rows


def errors_drawn(rows: list[dict[str, Any]]) -> np.ndarray:
    """bool: which of them may set the axis; an error of nothing always may."""
    e = np.array([r["e"] for r in rows])
    return ordinary(e, 1.0) | (e == 0)


def _steps(a: Analysis, width: int) -> Chart | None:
    rows = step_errors(a)
    if not rows:
        return None
    seen = [r["e"] for r, ok in zip(rows, errors_drawn(rows), strict=True) if ok]
    looks = {"law": (BLUE, "circle"), "carry over": (ORANGE, "square"), "k·Cᶜ": (GREY, "triangle-up")}
    looks["nearest run"] = (PURPLE, "diamond")
    kinds = [kind for kind in looks if any(r["kind"] == kind for r in rows)]
    x = alt.X("n:Q", **style.log_axis([r["n"] for r in rows], "held-out size, parameters", pad=0.08))
    y = alt.Y("e:Q", **style.linear_axis(seen, "mean error, % of the loss", zero=True))
    scale = alt.Scale(domain=kinds, range=[looks[kind][0] for kind in kinds])
    shapes = alt.Scale(domain=kinds, range=[looks[kind][1] for kind in kinds])
    legend = alt.Legend(orient="top", title=None, columns=4 if width > 330 else 2)
    colour = alt.Color("kind:N", scale=scale, legend=legend)
    shape = alt.Shape("kind:N", scale=shapes, legend=legend)
    line = chart(rows).mark_line(strokeWidth=1.3, clip=True).encode(x=x, y=y, color=colour)
    dots = (
        chart(rows).mark_point(filled=True, size=46, opacity=1, clip=True).encode(x=x, y=y, color=colour, shape=shape)
    )
    return layered(line, dots, width=width, height=270, title="each next size, from all below it")


def residual_reach(r: Any) -> float:
    """Where the axis of residuals ends; those beyond are drawn as crosses at its edge. No single run moves it."""
    return max(
        6.0 * 1.4826 * float(np.median(np.abs(r))), float(np.quantile(np.abs(r), 0.95, method="lower")) * 1.3, 1e-8
    )


def residuals(a: Analysis, layout: Layout) -> Chart | None:
    """Observed over predicted less one, in per cent, against N and against D; the band is twice the typical one."""
    columns, width = width_of(layout, 2)
    r = 100.0 * np.expm1(a.fit.residuals)
    band = 2.0 * 1.4826 * float(np.median(np.abs(r)))
    shown = residual_reach(r)
    inside = placed(a.runs)
    pick = np.flatnonzero(inside)[some(int(inside.sum()), POINTS)]
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
        x = alt.X("x:Q", **style.log_axis(seen[inside], title.split("against ")[1], pad=0.04))
        y = alt.Y("r:Q", **style.linear_axis([-shown, shown], "residual, % of the loss"))
        ends = [{"lo": -band, "hi": band}]
        layers = [chart(ends).mark_rect(opacity=0.12, color=BLUE).encode(y=alt.Y("lo:Q", **same(y)), y2=alt.Y2("hi"))]
        layers.append(chart([{"r": 0.0}]).mark_rule(color=style.INK).encode(y=y))
        shape = alt.Shape("kind:N", scale=alt.Scale(domain=["in", "beyond"], range=["circle", "cross"]), legend=None)
        colour = alt.Color("kind:N", scale=alt.Scale(domain=["in", "beyond"], range=[BLUE, ORANGE]), legend=None)
        layers.append(
            chart(rows).mark_point(filled=True, size=24, opacity=0.7).encode(x=x, y=y, shape=shape, color=colour)
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
        axis = style.log_axis(values, NAMES[name], ticks=4) if log else style.linear_axis(values, NAMES[name], ticks=4)
        x = alt.X("v:Q", **axis)
        y = alt.Y("e:Q", **(style.linear_axis([0.0, 1.6], "objective above its minimum", pad=0.02, ticks=4)))
        span = {"lo": values[0] if p.low is None else p.low, "hi": max(values) if p.high is None else p.high}
        ends = {"x": alt.X("lo:Q", **same(x)), "x2": alt.X2("hi")}
        layers = [chart([span]).mark_rect(opacity=0.12, color=BLUE).encode(**ends)]
        layers.append(chart([{"e": 1.0}]).mark_rule(strokeDash=[4, 3], color=style.INK).encode(y=y))
        layers.append(chart(rows).mark_line(color=BLUE, interpolate="monotone", clip=True).encode(x=x, y=y))
        layers.append(chart(rows).mark_point(color=BLUE, filled=True, size=20, clip=True).encode(x=x, y=y))
        layers.append(
            chart([{"v": p.estimate, "e": 0.0}]).mark_point(color=ORANGE, filled=True, size=60).encode(x=x, y=y)
        )
        height = 170 if layout.name == "wide" else 140
        panels.append(layered(*layers, width=width, height=height))
    return grid(panels, columns)


def cloud(a: Analysis, layout: Layout) -> Chart | None:
    """Bootstrap draws: the two exponents; N* and D* at the compute of the answer."""
    if a.intervals is None:
        return None
    columns, width = width_of(layout, 2)
    draws, pick = a.intervals.draws, some(len(a.intervals.draws), CLOUD)
    rows: list[dict[str, Any]] = [{"x": float(draws.alpha[i]), "y": float(draws.beta[i])} for i in pick]
    panels = [_scatter(rows, a.fit.alpha, a.fit.beta, "α", "β", width, False)]
    best = compute_optimal(a.fit, a.compute, cost=a.cost)
    drawn = compute_optimal(a.fit, a.compute, cost=a.cost, params=draws)
    rows = [{"x": float(drawn.n[i, 0]), "y": float(drawn.d[i, 0])} for i in pick if not drawn.edge[i, 0]]
    if rows and not best.edge[0]:
        panels.append(_scatter(rows, float(best.n[0]), float(best.d[0]), "N*, parameters", "D*, tokens", width, True))
    return grid(panels, columns)


def _scatter(rows: list[dict[str, float]], x0: float, y0: float, xt: str, yt: str, width: int, log: bool) -> Chart:
    axis = style.log_axis if log else style.linear_axis
    x = alt.X("x:Q", **axis(_about(x0, (r["x"] for r in rows), log), xt))
    y = alt.Y("y:Q", **axis(_about(y0, (r["y"] for r in rows), log), yt))
    dots = chart(rows).mark_point(filled=True, size=12, opacity=0.35, color=BLUE, clip=True).encode(x=x, y=y)
    at = chart([{"x": x0, "y": y0}]).mark_point(filled=True, size=80, color=ORANGE, stroke="white").encode(x=x, y=y)
    return layered(dots, at, width=width, height=230)


def _about(estimate: float, draws: Iterable[float], log: bool) -> list[float]:
    """What an axis must show: the estimate, and the draws; on a log axis those within SHOWN powers of ten of it."""
    near = [v for v in draws if not log or (v > 0 and abs(math.log10(v) - math.log10(estimate)) <= SHOWN)]
    return [estimate, *near]
