"""The page of one fit: the answer and what it cannot say, figures with sentences in the runs' own numbers, tables.

`write_page(analysis, "fit.html")` writes one file without scripts or outside resources, readable on a telephone.
"""

from __future__ import annotations

import html
import math
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from altair.utils.schemapi import debug_mode

from isofusion.laws.analysis import Analysis, Refused
from isofusion.laws.holdout import Beside, HoldOut
from isofusion.laws.isoflop import IsoFlops
from isofusion.laws.profile import Profile
from isofusion.laws.rollout import Rollout
from isofusion.laws.sensitivity import Choice, Sensitivity
from isofusion.report import render
from isofusion.report.css import CSS
from isofusion.report.fitfigures import CLOUD, FIGURES, residual_reach
from isofusion.report.fittables import answers, capital, choices, every_run, law, method, pretty, short, tests
from isofusion.report.panels import Grid
from isofusion.report.style import NARROW, WIDE, WRAPPED, themed
from isofusion.report.tables import raised
from isofusion.report.words import fixed, interval, percent, power, si


def write_page(a: Analysis, path: str | Path) -> Path:
    """Draw every figure and write the page to `path`; returns it. Raises OSError where that cannot be written."""
    path = Path(path)
    text = page(a, draw(a))
    tmp = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    tmp.write_text(text, encoding="utf-8")
    os.replace(tmp, path)
    return path


@dataclass(frozen=True)
class Drawing:
    """The SVGs of one figure: its panels, which the page sets side by side or below one another; or, where there is
    only one, a wide and a narrow drawing of it. Drawing each panel once is a third of the time of the page."""

    panels: tuple[str, ...] = ()
    wide: str = ""
    narrow: str = ""

    def html(self, label: str) -> str:
        """As it stands in the page's figure element."""
        if not self.panels:
            wide, narrow = render.inline(self.wide, label), render.inline(self.narrow, label)
            return f'<div class="wide">{wide}</div><div class="narrow">{narrow}</div>'
        cells = "".join(f"<div>{render.inline(panel, label)}</div>" for panel in self.panels)
        return f'<div class="panels p{len(self.panels)}">{cells}</div>'


def draw(a: Analysis) -> dict[str, Drawing]:
    """Every figure these runs support, by name. A thread draws while the next specification is made."""
    found: dict[str, tuple[bool, list[Future[str]]]] = {}  # whether these are panels, and the drawings
    with ThreadPoolExecutor(1) as pool, debug_mode(False):  # validating every mark takes longer than drawing; tests do
        for name, make in FIGURES.items():
            wide = make(a, WRAPPED)
            if isinstance(wide, Grid) and len(wide.panels) > 1:
                found[name] = True, [pool.submit(render.svg, themed(panel, WRAPPED)) for panel in wide.panels]
            elif wide is not None and (narrow := make(a, NARROW)) is not None:
                both = themed(make(a, WIDE), WIDE), themed(narrow, NARROW)
                found[name] = False, [pool.submit(render.svg, spec) for spec in both]
    out = {}
    for name, (panels, futures) in found.items():
        drawn = [future.result() for future in futures]
        out[name] = Drawing(tuple(drawn)) if panels else Drawing((), *drawn)
    return out


def page(a: Analysis, drawn: dict[str, Drawing]) -> str:
    """The whole HTML document."""
    esc, runs = html.escape, a.runs
    title = runs.label or "runs"
    spans = (
        f"{len(runs)} runs, {runs.n_sizes} sizes from {si(runs.n.min())} to {si(runs.n.max())} parameters, "
        f"{si(runs.d.min())} to {si(runs.d.max())} tokens, {power(runs.c.min())} to {power(runs.c.max())} FLOPs "
        f"(C is {'6ND' if runs.compute == '6nd' else runs.compute})"
    )
    parts = [
        "<!doctype html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{esc(title)} – isofusion fit</title>',
        '<meta name="viewport" content="width=device-width,initial-scale=1">',
        f"<style>{CSS}</style></head><body><main>",
        f'<h1>{esc(title)}</h1><p class="sub">{esc(spans)}. Intervals are 95 %.</p>',
        '<div class="top"><section><h2>The answer</h2>',
        *(f"<p>{raised(esc(line))}</p>" for line in headline(a)),
        '</section><section class="not"><h2>What these runs cannot say</h2><ul>',
        *(f"<li>{raised(esc(line))}</li>" for line in cannot(a)),
        "</ul></section></div>",
        "<h2>The numbers</h2>",
        answers(a),
        law(a),
    ]
    number = 0
    for name, (heading, caption) in CAPTIONS.items():
        if name not in drawn:
            continue
        number += 1
        parts.append(
            f'<h2 id="{name}">{esc(heading)}</h2><figure>{drawn[name].html(esc(heading, quote=True))}'
            f"<figcaption><b>Figure {number}.</b> {raised(esc(pretty(caption(a))))}</figcaption></figure>"
        )
        parts.append(TABLES[name](a) if name in TABLES else "")
    parts += [method(a), every_run(a)]
    parts.append(f"<footer>Made by isofusion. Runs and options: sha256 {a.digest}.</footer></main></body></html>")
    return "\n".join(part for part in parts if part) + "\n"


def headline(a: Analysis) -> list[str]:
    """The answer in sentences: best size at each compute, then whether it can be relied on."""
    lines = []
    for row in a.answers[-2:]:
        n, d = _with(row, "n", si), _with(row, "d", si)
        ratio = _with(row, "tokens_per_parameter", lambda v: f"{v:.3g}")
        lines.append(
            f"With {power(row['compute'])} FLOPs train {n} parameters on {d} tokens ({ratio} tokens per parameter); "
            f"expected loss {_with(row, 'loss', lambda v: fixed(v))} nats/token."
        )
    if not lines:
        lines.append("The law has no compute-optimal size at the runs' compute or ten times that.")
    s = a.sensitivity
    if isinstance(s, Sensitivity):
        low, high = min(r.n for r in s.counted), max(r.n for r in s.counted)
        told = (
            f"Undetermined: choices these runs do not decide move N* from {si(low)} to {si(high)}, {s.spread:.1f}×."
            if s.undetermined
            else f"Every choice the runs do not rule out keeps N* between {si(low)} and {si(high)} ({s.spread:.2f}×)."
        )
        lines.append(f"{told} (At {power(s.compute)} FLOPs.)")
    return lines


def cannot(a: Analysis) -> list[str]:
    """What a reader must not take from the page: weak tests, refused parts, warnings; the gravest first."""
    rows = []
    if isinstance(a.rollouts["n"], Rollout):
        ratio = a.rollouts["n"].ratio("carry_over")
        if ratio is not None and ratio > 1:
            rows.append(
                f"Whether the law is worth having: it predicts the next size {ratio:.2g}× worse than simply taking the "
                "next smaller size's loss at equal tokens."
            )
    found = [w for w in a.warnings() if w["code"] != "isoflop-not-bracketed"]
    rows += [capital(w["message"]) + "." for w in found[:7]]
    if len(found) > 7:
        rows.append(f"{len(found) - 7} more warnings are in the output of --json.")
    if a.intervals:
        rows += [f"No interval for {k}: {v}." for k in a.fit.names if (v := a.intervals.refusal(k))]
        if a.intervals.share_at_bound > 0.025:
            rows.append(
                f"{percent(a.intervals.share_at_bound)} of the bootstrap draws end with an exponent at a bound: the "
                "intervals describe the bounds as much as the runs."
            )
    for what, part in (("hold-out", a.held), ("table of choices", a.sensitivity), ("isoFLOP analysis", a.isoflops)):
        if isinstance(part, Refused):
            rows.append(f"No {what}: {part.reason}.")
    if isinstance(a.isoflops, IsoFlops):
        open_ends = [b for b in a.isoflops.budgets if not b.bracketed]
        if open_ends:
            told = f"{len(open_ends)} of {len(a.isoflops.budgets)} compute budgets do not bracket their best size"
            rows.append(f"{told}; e.g. at {power(open_ends[0].c)} FLOPs {open_ends[0].why}.")
    if a.runs.compute == "6nd":
        rows.append("Compute is taken as 6ND: attention, embeddings and encoders are not counted as they really cost.")
    rows.append(
        "Whether the law holds outside the runs: intervals take its form for granted, the choices below test it."
    )
    return [pretty(row) for row in rows]


def _with(row: dict[str, Any], key: str, how: Callable[[float], str]) -> str:
    span = row.get(f"{key}_interval")
    return f"{how(row[key])} {interval(span, how=how)}" if span else how(row[key])


def loss_caption(a: Analysis) -> str:
    """What the first figure shows."""
    r = np.abs(a.fit.residuals)
    text = (
        f"Points: runs, darker is larger. Blue lines: the law along a selection of sizes; it misses the typical run by "
        f"{percent(float(np.median(r)), 2)} of its loss and the worst by {percent(float(r.max()))}. "
        "Orange: the loss of the best size at each compute, with its interval"
    )
    text += ", beyond the last runs extrapolated. " if a.compute > 1.001 * a.runs.c.max() else ". "
    return text + "Dashed: k·C^c through the lower envelope of the runs, which needs no law of N and D."


def optimal_caption(a: Analysis) -> str:
    """Allocation in numbers."""
    p = a.fit.params
    share = float(p.beta / (p.alpha + p.beta))
    grows = "faster than" if share > 0.5 else "slower than"
    text = (
        "Line and band: the law's best size with its interval; grey: the runs; black: the answers above. "
        f"N* grows as C^{fixed(share, 2)}, {grows} tokens: ten times the compute buys {10**share:.2g}× the parameters "
        f"and {10 ** (1 - share):.2g}× the tokens"
    )
    return text + ("." if a.cost.kind == "6nd" else " (closed form for 6ND; the line uses the FLOPs of the runs).")


def choices_caption(a: Analysis) -> str:
    """The verdict on the choices."""
    s = a.sensitivity
    assert isinstance(s, Sensitivity)
    gone = sum(1 for r in s.rows if not r.counts and math.isfinite(r.n))
    low, high = (pick(s.counted, key=lambda r: r.n) for pick in (min, max))
    ends = (
        f"N* runs from {si(low.n)} ({_named(low)}; {low.tokens_per_parameter:.3g} tokens per parameter) to "
        f"{si(high.n)} ({_named(high)}; {high.tokens_per_parameter:.3g})"
    )
    verdict = f"{s.spread:.1f}×: undetermined" if s.undetermined else f"within {s.spread:.2f}×"
    text = f"The same runs fitted again with one choice changed at a time. {ends}, {verdict}."
    return text + (f" {gone} fit so much worse that the runs rule them out; far ones are not drawn." if gone else "")


def _named(row: Choice) -> str:
    name = "as fitted" if row.group == "default" else row.change if row.group == "law" else f"{row.group}: {row.change}"
    return pretty(name)


def _of(found: Beside, runs: int) -> str:
    return "" if found.runs == runs else f" (of the {found.runs} runs it predicts)"


def holdout_caption(a: Analysis) -> str:
    """Error of the law against that of the baselines."""
    r = a.rollouts["n"]
    if isinstance(r, Rollout):
        rates = "" if r.hit_rate is None else f"; {percent(r.hit_rate, 0)} of them fall in their 95 % interval (bars)"
        others = [
            f"{name} {percent(e, 2)}{_of(r.beside(k), len(r.observed))}"
            for k, name in (
                ("carry_over", "the next smaller size carried over"),
                ("power_law", "k·C^c"),
                ("nearest", "the nearest run"),
            )
            if math.isfinite(e := r.error(k, reducible=False))
        ]
        return (
            f"Each of the last {len(r.steps)} sizes predicted from everything smaller. Mean error over "
            f"{len(r.observed)} runs {percent(r.error(reducible=False), 2)} of the loss{rates}. "
            f"Baselines: {', '.join(others)}. A law earns its keep where it beats all three."
        )
    assert isinstance(a.held, HoldOut)
    error = percent(a.held.error(a.held.predicted, False), 2)
    return f"The largest size predicted from the others: mean error {error} of the loss."


def isoflop_caption(a: Analysis) -> str:
    """Minima per budget and the parabola's bias."""
    found = a.isoflops
    assert isinstance(found, IsoFlops)
    good = sum(b.bracketed for b in found.budgets)
    line = found.power["parabola"]
    text = (
        f"Lines: the law at each budget; orange diamonds: its minima. {good} of {len(found.budgets)} budgets "
        "bracket their best size"
    )
    if line is not None:
        span = f" {interval(line.interval)}" if line.interval else ""
        own = fixed(float(a.fit.beta / (a.fit.alpha + a.fit.beta)), 2)
        text += f"; parabolas through them give N* ∝ C^{fixed(line.a, 2)}{span}, the law {own}"
    return f"{text}. {capital(found.bias_sentence)}."


def residuals_caption(a: Analysis) -> str:
    """Trends and outliers in the residuals."""
    r = a.fit.residuals
    parts = []
    for name, values in (("N", a.runs.n), ("D", a.runs.d)):
        x, y = np.argsort(np.argsort(values)), np.argsort(np.argsort(r))
        parts.append(f"{fixed(float(np.corrcoef(x, y)[0, 1]), 2, sign=True)} with {name}")
    band = 2 * 1.4826 * float(np.median(np.abs(r)))
    out, relative = int(np.sum(np.abs(r) > band)), np.abs(np.expm1(r))
    beyond = bool(np.any(relative > residual_reach(relative)))
    return (
        f"Band: twice the typical residual, ±{percent(band)}; {out} of {len(r)} runs lie outside it (5 % would if "
        f"residuals were normal). Rank correlation of the residuals: {' and '.join(parts)}. A trend or a bend here is "
        f"structure the law does not describe.{' Orange crosses lie beyond the axis.' if beyond else ''}"
    )


def profiles_caption(a: Analysis) -> str:
    """Where profiles close, and where they do not."""
    parts, flat = [], []
    for name, p in a.profiles.items():
        if not isinstance(p, Profile):
            continue
        how = si if name == "N*" else short
        shown = {"alpha": "α", "beta": "β"}.get(name, name)
        ends = [how(v) if v is not None else "no end" for v in (p.low, p.high)]
        parts.append(f"{shown} {how(p.estimate)} [{ends[0]}, {ends[1]}]")
        if p.low is None or p.high is None:
            flat.append(shown)
    text = (
        "Each quantity held at a value, everything else fitted again. At the dashed line the objective has risen by "
        f"what a 95 % interval takes (1 on this axis; calibrated on simulated studies). {'; '.join(parts)}. "
    )
    return text + (f"No end for {', '.join(flat)}: the runs cannot bound it on that side." if flat else "")


def cloud_caption(a: Analysis) -> str:
    """Correlation of the draws."""
    assert a.intervals is not None
    draws = a.intervals.draws
    corr = float(np.corrcoef(draws.alpha, draws.beta)[0, 1])
    return (
        f"{len(draws)} bootstrap draws ({a.intervals.note}), {min(CLOUD, len(draws))} of them drawn; orange: the fit. "
        f"α and β correlate by {fixed(corr, 2, sign=True)}. Then best size and tokens at {power(a.compute)} FLOPs; a "
        "draw with more parameters has fewer tokens, since both spend the same compute."
    )


CAPTIONS: dict[str, tuple[str, Callable[[Analysis], str]]] = {
    "loss-against-flops": ("Loss against compute", loss_caption),
    "compute-optimal": ("Compute-optimal size and data", optimal_caption),
    "choices": ("How far the answer moves with choices", choices_caption),
    "hold-out": ("Does it predict runs it has not seen?", holdout_caption),
    "isoflop": ("At equal compute", isoflop_caption),
    "residuals": ("Residuals", residuals_caption),
    "profiles": ("How well each quantity is pinned down", profiles_caption),
    "cloud": ("Bootstrap draws", cloud_caption),
}
TABLES: dict[str, Callable[[Analysis], str]] = {"choices": choices, "hold-out": tests}
