"""The figures about what the models do: token classes, use of the image, experts, training curves.

Follows arXiv 2504.07951 Figs. 10-13 (experts, specialisation) and goes past it with the world's known entropies and the
blind and shuffled-image losses. Fields of the analysis: see analysis.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import altair as alt

from isofusion.report import style
from isofusion.report.figures import NAMES, Analysis, Chart, rows_of
from isofusion.report.panels import grid, layered
from isofusion.report.style import Layout

_MARKS = {
    "oracle entropy": ("#000000", "oracle"),
    "learner's bound": ("#a07d1f", "bound"),
    "chance": ("#9aa0a6", "chance"),
}
"""Reference lines: colour, and the field of a class that holds the value."""
_TICK = "M-0.13,-1.1H0.13V1.1H-0.13Z"  # a thin upright bar, in Vega's unit square


def losses_by_class(a: Analysis, layout: Layout) -> Chart | None:
    """Loss of the largest model of each arm per domain and token class, with oracle, learner's bound and chance."""
    panels = []
    arms = a["study"]["arms"]
    groups = [d for d in a["study"]["domains"] if any(r["domain"] == d for r in a["classes"])]
    columns = max(1, len(groups)) if layout.name == "wide" else 1
    width = int(layout.width / columns - 118)
    styles = style.arm_styles(arms)
    marks = [name for name, (_, field) in _MARKS.items() if any(r.get(field) is not None for r in a["classes"])]
    names = [*arms, *marks]
    colours = [*(styles[arm]["colour"] for arm in arms), *(_MARKS[name][0] for name in marks)]
    scale = alt.Scale(domain=names, range=colours)
    shapes = alt.Scale(domain=names, range=[*(styles[arm]["shape"] for arm in arms), *[_TICK] * len(marks)])
    per_line = 4 if layout.name == "wide" else 2
    legend = alt.Legend(orient="top", title=None, columns=per_line, symbolSize=70, symbolOpacity=1)
    colour = alt.Color("name:N", scale=scale, legend=legend, title=None)
    shape = alt.Shape("name:N", scale=shapes, legend=legend, title=None)
    for domain in groups:
        rows = [r for r in a["classes"] if r["domain"] == domain]
        order = list(dict.fromkeys(r["label"] for r in rows))
        losses = [{"label": r["label"], "name": r["arm"], "v": r["loss"]} for r in rows]
        refs = []
        seen = set()
        for r in rows:
            for name in marks:
                value = r.get(_MARKS[name][1])
                if value is not None and (r["label"], name) not in seen:
                    seen.add((r["label"], name))
                    refs.append({"label": r["label"], "name": name, "v": value})
        values = [r["v"] for r in losses] + [r["v"] for r in refs]
        x = alt.X("v:Q", **style.linear_axis(values, "loss (nats/token)", zero=True, ticks=4))
        y = alt.Y("label:N", sort=order, title=None, axis=alt.Axis(grid=True, labelLimit=110))
        layers = []
        point = {"x": x, "y": y, "color": colour, "shape": shape}
        if refs:
            layers.append(alt.Chart(rows_of(refs)).mark_point(filled=True, size=130, opacity=0.9).encode(**point))
        dots = alt.Chart(rows_of(losses)).mark_point(filled=True, size=42, opacity=0.9)
        if len(arms) > 1:
            point["yOffset"] = alt.YOffset("name:N", scale=alt.Scale(domain=arms, paddingOuter=0.6))
        layers.append(dots.encode(**point))
        step = 34 if len(order) <= 7 else 26
        panels.append(layered(*layers, width=width, height=step * len(order), title=NAMES.get(domain, domain)))
    return grid(panels, columns) if panels else None


def image_use(a: Analysis, layout: Layout) -> Chart | None:
    """Loss with the true image, another image and none, of each arm's largest model; a line joins them."""
    rows = a["image_use"]
    if not rows:
        return None
    arms = a["study"]["arms"]
    groups = list(dict.fromkeys(r["domain"] for r in rows))
    columns = min(len(groups), 2) if layout.name == "wide" else 1
    width = int(layout.width / columns - 125)
    kinds = {"true image": "true", "another image": "shuffled", "no image": "blind"}
    panels = []
    for domain in groups:
        here = [r for r in rows if r["domain"] == domain]
        dots = [
            {"arm": r["arm"], "kind": name, "v": r[field]}
            for r in here
            for name, field in kinds.items()
            if r.get(field) is not None
        ]
        spans = []
        for r in here:
            ends = [r[f] for f in kinds.values() if r.get(f) is not None]
            spans.append({"arm": r["arm"], "v": min(ends), "v2": max(ends)})
        x = alt.X("v:Q", **style.linear_axis([d["v"] for d in dots], "loss (nats/token)", ticks=5))
        y = alt.Y("arm:N", sort=arms, title=None, axis=alt.Axis(labelLimit=120))
        span = alt.Chart(rows_of(spans)).mark_rule(color="#b6bbc1", strokeWidth=2).encode(x=x, x2=alt.X2("v2"), y=y)
        shape = alt.Shape(
            "kind:N",
            scale=alt.Scale(domain=list(kinds), range=["circle", "diamond", "cross"]),
            legend=alt.Legend(
                orient="top", title=None, columns=3, symbolFillColor=style.INK, symbolStrokeColor=style.INK
            ),
        )
        points = alt.Chart(rows_of(dots)).mark_point(filled=True, size=65, opacity=1)
        colour = style.arm_colour(arms, legend=False)
        marks = points.encode(x=x, y=y, color=colour, shape=shape)
        height = max(40, 30 * len(here))
        panels.append(layered(span, marks, width=width, height=height, title=NAMES.get(domain, domain)))
    return grid(panels, columns)


def tokens_per_expert(a: Analysis, layout: Layout) -> Chart | None:
    """Share of each modality's tokens that each expert takes, by layer, on one domain that has both modalities."""
    panels = []
    wide = layout.name == "wide"
    scale = alt.Scale(domain=["text", "image"], range=[style.TEXT_COLOUR, style.IMAGE_COLOUR])
    legend = alt.Legend(orient="top", title="tokens", columns=2)
    most = max((len(layers(e)) for e in a["experts"].values()), default=0)
    columns = min(most, 6) if wide else 2
    width = int(layout.width / max(1, columns) - (52 if wide else 60))
    for arm, entry in a["experts"].items():
        shown = layers(entry)
        count = len(shown)
        for layer in shown:
            rows = [
                {"expert": expert + 1, "modality": modality, "share": 100 * share}
                for modality in ("text", "image")
                for expert, share in enumerate(entry["shares"][modality][layer])
            ]
            bars = alt.Chart(rows_of(rows)).mark_bar()
            chart = bars.encode(
                x=alt.X("expert:O", title="expert", axis=alt.Axis(labelAngle=0)),
                xOffset=alt.XOffset("modality:N", sort=["text", "image"]),
                y=alt.Y("share:Q", title="% of tokens", scale=alt.Scale(domain=[0, 100]), axis=alt.Axis(tickCount=4)),
                color=alt.Color("modality:N", scale=scale, legend=legend),
            )
            panels.append(chart.properties(width=width, height=110, title=[arm, f"layer {layer + 1}"]))
        if columns > 1 and count % columns:  # each arm starts on a new line
            panels += [_blank(width) for _ in range(columns - count % columns)]
    return grid(panels, columns) if panels else None


def layers(entry: dict[str, Any], most: int = 6) -> list[int]:
    """Layers to draw: all of them, or six evenly spaced including first and last."""
    count = len(entry["shares"]["text"])
    if count <= most:
        return list(range(count))
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})


def _blank(width: int) -> Chart:
    return alt.Chart(rows_of([{}])).mark_point(opacity=0).properties(width=width, height=110)


def loss_against_tokens(a: Analysis, layout: Layout) -> Chart | None:
    """Training loss against tokens per arm: trunks at constant learning rate and the cool-downs that branch off."""
    curves = a["training"]
    if not curves:
        return None
    arms = [arm for arm in a["study"]["arms"] if any(c["arm"] == arm for c in curves)]
    columns, width = layout.panel(len(arms))
    if len(arms) == 4 and columns == 4:
        columns, width = 2, int(layout.width / 2 - 62)
    sizes = a["study"]["sizes"]
    shades = ["#c6dbef", "#6baed6", "#2171b5", "#08306b"] if len(sizes) <= 4 else None
    scheme = alt.Scale(domain=sizes, range=shades) if shades else alt.Scale(domain=sizes, scheme="blues")
    colour = alt.Color(
        "size:N",
        scale=scheme,
        legend=alt.Legend(orient="top", title="size", columns=6 if layout.name == "wide" else 3),
        sort=sizes,
    )
    last = max(t for c in curves for t in c["tokens"])
    first = last / 300  # the first fall from chance says nothing about arms
    tokens = [t for c in curves for t in c["tokens"] if t >= first]
    losses = [v for c in curves for v, t in zip(c["loss"], c["tokens"], strict=True) if t >= first]
    panels = []
    for arm in arms:
        rows = [
            {"size": c["size"], "run": c["run"], "tokens": t, "loss": v}
            for c in curves
            if c["arm"] == arm
            for t, v in zip(c["tokens"], c["loss"], strict=True)
            if t >= first
        ]
        x = alt.X("tokens:Q", **style.log_axis(tokens, "D, tokens seen", pad=0.01))
        y = alt.Y("loss:Q", **style.log_axis(losses, "training loss (nats/token)", plain=True))
        chart = alt.Chart(rows_of(rows)).mark_line(strokeWidth=1.1, clip=True)
        chart = chart.encode(x=x, y=y, color=colour, detail="run:N")
        panels.append(chart.properties(width=width, height=190, title=arm))
    return grid(panels, columns)


EVIDENCE_FIGURES: dict[str, Callable[[Analysis, Layout], Chart | None]] = {
    "loss-by-class": losses_by_class,
    "image-use": image_use,
    "tokens-per-expert": tokens_per_expert,
    "loss-against-tokens": loss_against_tokens,
}
