"""The page of one fit: the answer and what it cannot say, figures with sentences in the runs' own numbers, tables.

`write_page(analysis, "fit.html")` writes one file without scripts or outside resources, readable on a telephone.
"""

from __future__ import annotations

import html
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from altair.utils.schemapi import debug_mode

from isofusion.laws.analysis import Analysis, Refused
from isofusion.laws.fit import FREEDOM
from isofusion.laws.isoflop import IsoFlops
from isofusion.laws.sensitivity import Sensitivity, times
from isofusion.report import render
from isofusion.report.css import CSS
from isofusion.report.fitcaptions import CAPTIONS
from isofusion.report.fitfigures import FIGURES
from isofusion.report.fittables import answers, capital, choices, every_run, law, method, nats, short, tests
from isofusion.report.panels import Grid
from isofusion.report.style import NARROW, WIDE, WRAPPED, themed
from isofusion.report.tables import raised
from isofusion.report.words import interval, power, pretty, si


def write_page(a: Analysis, path: str | Path) -> Path:
    """Draw every figure and write the page to `path`; returns it. Raises OSError where that cannot be written."""
    path = Path(path)
    text = page(a, draw(a))
    tmp = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        tmp.write_text(text, encoding="utf-8")
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)
    return path


@dataclass(frozen=True)
class Drawing:
    """The SVGs of one figure: its panels, which the page sets side by side or below one another; or, where there is
    only one, a wide and a narrow drawing of it; or why it failed. Drawing each panel once is a third of the time of the
    page."""

    panels: tuple[str, ...] = ()
    wide: str = ""
    narrow: str = ""
    failed: str = ""

    def html(self, label: str) -> str:
        """As it stands in the page's figure element."""
        if self.failed:
            return f"<p>{html.escape(self.failed)}</p>"
        if not self.panels:
            wide, narrow = render.inline(self.wide, label), render.inline(self.narrow, label)
            return f'<div class="wide">{wide}</div><div class="narrow">{narrow}</div>'
        cells = "".join(f"<div>{render.inline(panel, label)}</div>" for panel in self.panels)
        return f'<div class="panels p{len(self.panels)}">{cells}</div>'


def draw(a: Analysis) -> dict[str, Drawing]:
    """Every figure these runs support, by name. A thread draws while the next specification is made."""
    found: dict[str, tuple[bool, list[Future[str]]]] = {}
    out: dict[str, Drawing] = {}
    with ThreadPoolExecutor(1) as pool, debug_mode(False):  # validating every mark takes longer than drawing; tests do
        for name in FIGURES:
            try:
                if started := _start(a, name, pool):
                    found[name] = started
            except Exception as error:  # whatever one figure stumbles over, the page keeps the others
                out[name] = Drawing(failed=_unable("figure", error))
    for name, (panels, futures) in found.items():
        try:
            drawn = [future.result() for future in futures]
            out[name] = Drawing(tuple(drawn)) if panels else Drawing((), *drawn)
        except Exception as error:
            out[name] = Drawing(failed=_unable("figure", error))
    return out


def _start(a: Analysis, name: str, pool: ThreadPoolExecutor) -> tuple[bool, list[Future[str]]] | None:
    """(Whether the drawings are panels, the drawings to come) of one figure; None where there is nothing to draw."""
    make = FIGURES[name]
    wide = make(a, WRAPPED)
    if isinstance(wide, Grid) and len(wide.panels) > 1:
        return True, [pool.submit(render.svg, themed(panel, WRAPPED)) for panel in wide.panels]
    if wide is None or (narrow := make(a, NARROW)) is None:
        return None
    return False, [pool.submit(render.svg, spec) for spec in (themed(make(a, WIDE), WIDE), themed(narrow, NARROW))]


def _unable(what: str, error: Exception) -> str:
    reason = (str(error).strip().splitlines() or ["no reason given"])[0][:300]
    name = type(error).__name__
    return f"This {what} could not be drawn up: {reason} ({name}). The rest of the page does not rest on it."


def _caption(a: Analysis, caption: Callable[[Analysis], str]) -> str:
    try:
        return raised(html.escape(pretty(caption(a))))
    except Exception as error:
        return html.escape(_unable("caption", error))


def _table(a: Analysis, make: Callable[[Analysis], str]) -> str:
    try:
        return make(a)
    except Exception as error:
        return f"<p>{html.escape(_unable('table', error))}</p>"


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
        _table(a, answers),
        _table(a, law),
    ]
    number = 0
    for name, (heading, caption) in CAPTIONS.items():
        if name not in drawn:
            continue
        number += 1
        parts.append(
            f'<h2 id="{name}">{esc(heading)}</h2><figure>{drawn[name].html(esc(heading, quote=True))}'
            f"<figcaption><b>Figure {number}.</b> {_caption(a, caption)}</figcaption></figure>"
        )
        parts.append(_table(a, TABLES[name]) if name in TABLES else "")
    parts += [_table(a, method), _table(a, every_run)]
    parts.append(f"<footer>Made by isofusion. Runs and options: sha256 {a.digest}.</footer></main></body></html>")
    return "\n".join(part for part in parts if part) + "\n"


def headline(a: Analysis) -> list[str]:
    """The answer in sentences: best size at each compute, then whether it can be relied on."""
    lines = []
    for row in a.answers[-2:]:
        n, d = _with(row, "n", si), _with(row, "d", si)
        ratio = _with(row, "tokens_per_parameter", short)
        lines.append(
            f"With {power(row['compute'])} FLOPs train {n} parameters on {d} tokens ({ratio} tokens per parameter); "
            f"expected loss {_with(row, 'loss', nats)} nats/token."
        )
    if not lines:
        lines.append("The law has no compute-optimal size at the runs' compute or ten times that.")
    s = a.sensitivity
    if isinstance(s, Sensitivity):
        low, high = min(r.n for r in s.counted), max(r.n for r in s.counted)
        spread = f"{times(s.spread)}×"
        told = (
            f"Undetermined: choices these runs do not decide move N* from {si(low)} to {si(high)}, {spread}."
            if s.undetermined
            else f"Every choice the runs do not rule out keeps N* between {si(low)} and {si(high)} ({spread})."
        )
        if not s.undetermined and (free := a.fit.freedom) < FREEDOM:
            told += f" With {free} degree{'s' * (free != 1)} of freedom they can rule out little."
        lines.append(f"{told} (At {power(s.compute)} FLOPs.)")
    return lines


def cannot(a: Analysis) -> list[str]:
    """What a reader must not take from the page: weak tests, refused parts, warnings; the gravest first."""
    rows = []
    found = [w for w in a.warnings() if w["code"] != "isoflop-not-bracketed"]
    rows += [capital(w["message"]) + "." for w in found[:7]]
    if len(found) > 7:
        rows.append(f"{len(found) - 7} more warnings are in the output of --json.")
    if a.intervals:
        rows += [f"No interval for {k}: {v}." for k in a.fit.names if (v := a.intervals.refusal(k))]
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


TABLES: dict[str, Callable[[Analysis], str]] = {"choices": choices, "hold-out": tests}
