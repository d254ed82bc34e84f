"""The figures about laws: loss against FLOPs, differences between arms, optimal N and D, predicted against observed.

Every figure is defined once, as a function of the analysis (see analysis.py for its fields) and a layout, and drawn in
both layouts. A function returns None where the study holds nothing to draw. What each shows follows arXiv 2504.07951:
loss against FLOPs Figs. 1 and 26, per arm and data type Fig. 27, optimal N, D, D/N Figs. 1 and 22, predicted against
observed Figs. 23-24.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import altair as alt

from isofusion.report import style
from isofusion.report.panels import grid, layered
from isofusion.report.style import Layout

Analysis = dict[str, Any]
Chart = Any  # an Altair chart, or a Panel or Grid of them (panels.py)
NAMES = {"caption": "captions", "interleaved": "interleaved", "text": "text", "mean": "mean over domains"}


def domains_with_mean(a: Analysis) -> list[str]:
    domains: list[str] = list(a["study"]["domains"])
    return domains + ["mean"] if len(domains) > 1 else domains


def rows_of(values: list[dict[str, Any]]) -> alt.Data:
    """Inline data as one JSON string: Altair copies structured values at every step of building a chart.

    What is infinite or no number has no place in a drawing: its row is left out.
    """
    try:
        text = json.dumps(values, allow_nan=False)
    except ValueError:
        text = json.dumps([row for row in values if all(_drawable(v) for v in row.values())])
    return alt.Data(values=text, format=alt.DataFormat(type="json"))


def _drawable(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def loss_against_compute(a: Analysis, layout: Layout) -> Chart | None:
    """Observed losses of every run and, per arm, the compute-optimal loss its law gives, with its interval."""
    arms = a["study"]["arms"]
    domains = domains_with_mean(a)
    columns, width = layout.panel(len(domains))
    if len(domains) == 4 and columns == 4:
        columns, width = 2, int(layout.width / 2 - 62)
    all_c = [p["c"] for p in a["points"]]
    if not all_c:
        return None
    panels = []
    for domain in domains:
        points = [
            {"arm": p["arm"], "c": p["c"], "loss": p["loss"][domain], "run": p["run"]}
            for p in a["points"]
            if p["loss"].get(domain) is not None
        ]
        lines = _frontier_rows(a, domain, c_max=1.001 * max(all_c), c_min=0.999 * min(all_c))
        oracle = a["entropy"].get(domain, {}).get("oracle")
        losses = [p["loss"] for p in points] + [r["loss"] for r in lines]
        if oracle is not None and min(losses) - oracle < 0.8 * (max(losses) - min(losses)):
            losses.append(oracle)  # else the line would squeeze the curves; the caption has the number
        else:
            oracle = None
        x = alt.X("c:Q", **style.log_axis(all_c, a["study"]["compute_label"]))
        y = alt.Y("loss:Q", **style.linear_axis(losses, "loss (nats/token)"))
        layers = []
        if lines:
            base = alt.Chart(rows_of(lines)).encode(x=x, color=style.arm_colour(arms))
            layers.append(base.mark_area(opacity=0.13, clip=True).encode(y=alt.Y("lo:Q", **_same(y)), y2=alt.Y2("hi")))
            layers.append(base.mark_line(strokeWidth=2, clip=True).encode(y=y, strokeDash=style.arm_dash(arms)))
        layers.append(
            alt.Chart(rows_of(points))
            .mark_point(size=26, opacity=0.75, filled=True)
            .encode(x=x, y=y, color=style.arm_colour(arms), shape=style.arm_shape(arms))
        )
        if oracle is not None:
            layers.append(_rule_y(oracle))
        panels.append(layered(*layers, width=width, height=200, title=NAMES.get(domain, domain)))
    return grid(panels, columns)


def _same(encoding: Any) -> dict[str, Any]:
    """Scale, axis and title of an existing encoding, for a second layer on the same axis."""
    return {key: encoding[key] for key in ("scale", "axis", "title")}


def _rule_y(value: float, dash: list[int] | None = None) -> Chart:
    rule = alt.Chart(rows_of([{"y": value}])).mark_rule(color=style.INK, strokeDash=dash or [2, 3], strokeWidth=1)
    return rule.encode(y="y:Q")


def _frontier_rows(a: Analysis, domain: str, c_min: float = 0.0, c_max: float = float("inf")) -> list[dict[str, Any]]:
    found = []
    for arm, by_domain in a["frontier"].items():
        f = by_domain.get(domain)
        if not f:
            continue
        for i, c in enumerate(f["c"]):
            if c_min <= c <= c_max:
                found.append({"arm": arm, "c": c, "loss": f["loss"][i], "lo": f["loss_lo"][i], "hi": f["loss_hi"][i]})
    return found


def scaling_per_arm(a: Analysis, layout: Layout) -> Chart | None:
    """One panel per arm and domain: reducible loss, the fitted law at each size, and the power law of the envelope."""
    panels = []
    arms, domains = a["study"]["arms"], a["study"]["domains"]
    columns = len(domains) if layout.name == "wide" else 1
    width = int(layout.width / columns - 66)
    sizes = a["study"]["sizes"]
    shades = ["#c6dbef", "#6baed6", "#2171b5", "#08306b"] if len(sizes) <= 4 else None
    scheme = alt.Scale(domain=sizes, range=shades) if shades else alt.Scale(domain=sizes, scheme="blues")
    colour = alt.Color(
        "size:N",
        scale=scheme,
        legend=alt.Legend(orient="top", title="size", columns=6 if layout.name == "wide" else 3),
        sort=sizes,
    )
    all_c = [p["c"] for p in a["points"]]
    for domain in domains:
        oracle = a["entropy"].get(domain, {}).get("oracle") if a["study"]["reducible"] else 0.0
        offset = oracle or 0.0
        values = [p["loss"][domain] - offset for p in a["points"] if p["loss"].get(domain) is not None]
        for arm in arms:
            panels.append((domain, arm, offset, values))
    if layout.name == "wide":  # rows of the page are arms, columns are domains
        panels.sort(key=lambda p: (arms.index(p[1]), domains.index(p[0])))
    charts = []
    name = "reducible loss (nats/token)" if a["study"]["reducible"] else "loss (nats/token)"
    for domain, arm, offset, values in panels:
        points = [
            {"size": p["size"], "c": p["c"], "loss": p["loss"][domain] - offset}
            for p in a["points"]
            if p["arm"] == arm and p["loss"].get(domain) is not None and p["loss"][domain] > offset
        ]
        if not points:
            continue
        x = alt.X("c:Q", **style.log_axis(all_c, a["study"]["compute_label"]))
        y = alt.Y("loss:Q", **style.log_axis(values, name, pad=0.08, plain=True))
        layers = []
        lines = [
            {"size": curve["size"], "c": c, "loss": loss - offset}
            for curve in a["fit_curves"].get(arm, {}).get(domain, [])
            for c, loss in zip(curve["c"], curve["loss"], strict=True)
            if loss > offset
        ]
        if lines:
            layers.append(
                alt.Chart(rows_of(lines)).mark_line(strokeWidth=1.3, clip=True).encode(x=x, y=y, color=colour)
            )
        layers.append(
            alt.Chart(rows_of(points)).mark_point(size=22, filled=True, opacity=1).encode(x=x, y=y, color=colour)
        )
        envelope = _power_rows(a, arm, domain, offset)
        if envelope:
            layers.append(
                alt.Chart(rows_of(envelope))
                .mark_line(strokeDash=[5, 3], color=style.INK, strokeWidth=1.2, clip=True)
                .encode(x=x, y=y)
            )
        title = f"{arm} · {NAMES.get(domain, domain)}"
        height = 150 if layout.name == "wide" else 120
        charts.append(layered(*layers, width=width, height=height, title=title))
    return grid(charts, columns) if charts else None


def _power_rows(a: Analysis, arm: str, domain: str, offset: float) -> list[dict[str, float]]:
    """Points of k·C^c over the range it was fitted on, less the oracle entropy."""
    power = (a["fits"].get(arm, {}).get(domain) or {}).get("power")
    if not power or not power.get("ok"):
        return []
    low, high = power["range"]
    grid_c = [low * (high / low) ** (i / 24) for i in range(25)]
    found = [{"c": c, "loss": power["k"] * c ** power["c"] - offset} for c in grid_c]
    return [row for row in found if row["loss"] > 0]


def differences(a: Analysis, layout: Layout) -> Chart | None:
    """Loss of one arm less another's: at equal compute from the laws (band), at matched size (points)."""
    panels = []
    domains = domains_with_mean(a) if layout.name == "wide" else domains_with_mean(a)[-1:]
    columns = len(domains)
    width = int(layout.width / columns - 62)
    all_c = [p["c"] for p in a["points"]]
    for pair in a["differences"]:
        core = [v for domain in domains for v in _trimmed(_spread(pair, domain, max(all_c)))]
        for domain in domains:
            layers = []
            band = pair["at_equal_compute"].get(domain)
            rows = []
            if band:
                rows = [
                    {"c": c, "diff": m, "lo": lo, "hi": hi}
                    for c, m, lo, hi in zip(band["c"], band["diff"], band["lo"], band["hi"], strict=True)
                    if c <= 1.001 * max(all_c)
                ]
            sizes = [
                {"c": s["c"], "diff": s["diff"], "lo": s["lo"], "hi": s["hi"], "size": s["size"]}
                for s in pair["by_size"].get(domain, [])
            ]
            matched = [{"c": m["c"], "diff": m["diff"]} for m in pair["matched"].get(domain, [])]
            if not rows and not matched:
                continue
            x = alt.X("c:Q", **style.log_axis(all_c, a["study"]["compute_label"]))
            y = alt.Y("diff:Q", **style.linear_axis(core, "difference (nats/token)", zero=True, ticks=4))
            tint = style.arm_styles(a["study"]["arms"])[pair["first"]]["colour"]
            if rows:
                base = alt.Chart(rows_of(rows)).encode(x=x)
                layers.append(
                    base.mark_area(opacity=0.18, color=tint, clip=True).encode(
                        y=alt.Y("lo:Q", **_same(y)), y2=alt.Y2("hi")
                    )
                )
                layers.append(base.mark_line(color=tint, clip=True).encode(y=y))
            layers.append(_rule_y(0.0, [1, 0]))
            dots = alt.Chart(rows_of(matched)).mark_point(size=18, color=tint, opacity=0.6, clip=True)
            layers.append(dots.encode(x=x, y=y))
            whiskers = [s for s in sizes if s["lo"] is not None]
            if whiskers:
                bars = alt.Chart(rows_of(whiskers)).encode(x=x)
                ends = {"y": alt.Y("lo:Q", **_same(y)), "y2": alt.Y2("hi")}
                layers.append(bars.mark_rule(color=style.INK, clip=True).encode(**ends))
                layers.append(bars.mark_point(filled=True, size=38, color=style.INK, clip=True).encode(y=y))
            title = [pair["label"], NAMES.get(domain, domain)]
            height = 140 if layout.name == "wide" else 170
            panels.append(layered(*layers, width=width, height=height, title=title))
    return grid(panels, columns) if panels else None


def _spread(pair: dict[str, Any], domain: str, c_max: float) -> list[float]:
    band = pair["at_equal_compute"].get(domain) or {"c": [], "diff": [], "lo": [], "hi": []}
    inside = [i for i, c in enumerate(band["c"]) if c <= 1.001 * c_max]
    found = [band[k][i] for k in ("diff", "lo", "hi") for i in inside]
    return found + [m["diff"] for m in pair["matched"].get(domain, [])]


def _trimmed(values: list[float]) -> list[float]:
    """The bulk of the values, so that one wild interval does not flatten the panel (what is beyond is clipped)."""
    good = sorted(v for v in values if v is not None)
    if len(good) < 12:
        return good
    low, high = good[len(good) // 20], good[-1 - len(good) // 20]
    space = high - low
    return [v for v in good if low - 0.5 * space <= v <= high + 0.5 * space]


def compute_optimal(a: Analysis, layout: Layout) -> Chart | None:
    """Compute-optimal N, D and D/N against C per arm, from the laws averaged over domains; dashed = extrapolated."""
    key = "mean" if len(a["study"]["domains"]) > 1 else a["study"]["domains"][0]
    arms = a["study"]["arms"]
    columns = 3 if layout.name == "wide" else 1
    width = int(layout.width / columns - 66)
    titles = {"n": "optimal N, parameters", "d": "optimal D, tokens", "ratio": "optimal D/N, tokens per parameter"}
    all_c = [c for arm in a["frontier"].values() for c in (arm.get(key) or {"c": []})["c"]]
    if not all_c:
        return None
    panels = []
    for field, title in titles.items():
        rows = []
        for arm, by_domain in a["frontier"].items():
            f = by_domain.get(key)
            if not f:
                continue
            piece = 0
            for i, c in enumerate(f["c"]):
                low, high = (
                    f[field][i] * by if f[f"{field}_{end}"][i] is None else f[f"{field}_{end}"][i]
                    for end, by in (("lo", 1 / style.OFF), ("hi", style.OFF))
                )
                row = {"arm": arm, "c": c, "v": f[field][i], "lo": low, "hi": high}
                beyond = f["extrapolated"]
                if i and beyond[i] != beyond[i - 1]:  # close the piece here, so that the line has no gap
                    rows.append({**row, "part": "extrapolated" if beyond[i - 1] else "inside", "piece": piece})
                    piece += 1
                rows.append({**row, "part": "extrapolated" if beyond[i] else "inside", "piece": piece})
        x = alt.X("c:Q", **style.log_axis(all_c, a["study"]["compute_label"], pad=0.02))
        values = [r["v"] for r in rows]
        bounds = [v for r in rows for v in (r["lo"], r["hi"])]
        inside = [min(max(v, min(values) / 10), max(values) * 10) for v in bounds]
        y = alt.Y("v:Q", **(style.log_axis(values + inside, title, plain=field == "ratio") | {"title": None}))
        base = alt.Chart(rows_of(rows)).encode(x=x, color=style.arm_colour(arms))
        band = base.mark_area(opacity=0.12, clip=True).encode(y=alt.Y("lo:Q", **_same(y)), y2=alt.Y2("hi"))
        dash = alt.StrokeDash(
            "part:N", scale=alt.Scale(domain=["inside", "extrapolated"], range=[[1, 0], [4, 3]]), legend=None
        )
        line = base.mark_line(strokeWidth=2, clip=True).encode(y=y, strokeDash=dash, detail="piece:O")
        panels.append(layered(band, line, width=width, height=220, title=title))
    return grid(panels, columns)


def predicted_against_observed(a: Analysis, layout: Layout) -> Chart | None:
    """Loss the law predicts against the loss observed; filled points are the held-out largest size."""
    arms = a["study"]["arms"]
    domains = [d for d in a["study"]["domains"] if any(p["domain"] == d for p in a["predicted"])]
    if not domains:
        return None
    columns, width = layout.panel(len(domains), margin=64)
    outline = 0 if any(p["heldout"] for p in a["predicted"]) else 1.1
    panels = []
    for domain in domains:
        rows = [p for p in a["predicted"] if p["domain"] == domain]
        values = [p[k] for p in rows for k in ("observed", "predicted")]
        x = alt.X("observed:Q", **style.linear_axis(values, "observed loss (nats/token)", ticks=4))
        y = alt.Y("predicted:Q", **style.linear_axis(values, "predicted loss (nats/token)", ticks=4))
        ends = [{"observed": v, "predicted": v} for v in (min(values), max(values))]
        line = alt.Chart(rows_of(ends)).mark_line(color="#9aa0a6", strokeWidth=1).encode(x=x, y=y)
        colour, shape = style.arm_colour(arms, outline=outline), style.arm_shape(arms, outline=outline)
        fitted = [p for p in rows if not p["heldout"]]
        held = [p for p in rows if p["heldout"]]
        inside = alt.Chart(rows_of(fitted)).mark_point(size=30, strokeWidth=1.1, opacity=0.7)
        outside = alt.Chart(rows_of(held)).mark_point(
            size=75, filled=True, opacity=1, stroke="#000000", strokeWidth=0.8
        )
        layers = [line]
        for part, data in ((inside, fitted), (outside, held)):
            if data:
                layers.append(part.encode(x=x, y=y, color=colour, shape=shape))
        panels.append(layered(*layers, width=width, height=min(width, 260), title=NAMES.get(domain, domain)))
    return grid(panels, columns)


FIGURES: dict[str, Callable[[Analysis, Layout], Chart | None]] = {
    "loss-against-flops": loss_against_compute,
    "scaling-per-arm": scaling_per_arm,
    "differences": differences,
    "compute-optimal": compute_optimal,
    "predicted-against-observed": predicted_against_observed,
}
"""Name of the file -> the function that draws it."""
