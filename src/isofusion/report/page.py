"""One self-contained page: the answer, what the study cannot say, the figures with their sentences, tables, methods.

No script, no external resource. Each figure stands in two drawings, wide and narrow; CSS shows the one that fits.
`build_report` writes <out>/report.html, <out>/analysis.json and <out>/figures/NAME.svg and .png.
"""

from __future__ import annotations

import html
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from altair.utils.schemapi import debug_mode

from isofusion.report import render, tables, tables_evidence, text
from isofusion.report.analysis import Analysis, analyse
from isofusion.report.css import CSS
from isofusion.report.figures import FIGURES
from isofusion.report.figures_evidence import EVIDENCE_FIGURES
from isofusion.report.figures_isoflop import isoflops
from isofusion.report.figures_speed import speed
from isofusion.report.style import NARROW, WIDE, themed
from isofusion.report.words import percent
from isofusion.study.lock import write_atomic

DRAW = FIGURES | EVIDENCE_FIGURES | {"isoflops": isoflops, "speed": speed}


def build_report(out: str | Path, rows: list[dict[str, Any]] | None = None, *, pool: Executor | None = None) -> Path:
    """Analyse the study in `out` and write its page; returns the page's path.

    `rows` defaults to the study's ledger; `pool`: see `analyse`. Raises InputError when no run has finished.
    """
    out = Path(out)
    render.warm()
    a = analyse(out, rows, pool=pool)
    path = out / "report.html"
    try:
        drawn, missing = draw_figures(a, out / "figures")
        write_atomic(path, page(a, drawn, missing))
    except OSError as error:  # a write to a full disk does not say where
        raise OSError(error.errno, error.strerror, error.filename or str(path)) from error
    return path


def draw_figures(a: Analysis, folder: Path) -> tuple[dict[str, tuple[str, str]], list[str]]:
    """Draw every figure in both layouts: name -> (wide SVG, narrow SVG), and the names with nothing to draw.

    The wide one is also written to `folder` as NAME.svg and NAME.png; files of an earlier build are replaced.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn: dict[str, tuple[str, str]] = {}
    missing = []
    with ThreadPoolExecutor(1) as beside:  # turns a drawing into pixels while the next one is made
        painted = []
        for name in text.CAPTIONS:
            with debug_mode(False):  # validating every mark against the schema takes longer than drawing; tests do it
                wide, narrow = DRAW[name](a, WIDE), DRAW[name](a, NARROW)
            if wide is None or narrow is None:
                missing.append(name)
                for old in (folder / f"{name}.svg", folder / f"{name}.png"):
                    old.unlink(missing_ok=True)
                continue
            drawn[name] = render.svg(themed(wide, WIDE)), render.svg(themed(narrow, NARROW))
            (folder / f"{name}.svg").write_text(drawn[name][0], encoding="utf-8")
            painted.append(beside.submit(_paint, drawn[name][0], folder / f"{name}.png"))
        for one in painted:
            one.result()
    return drawn, missing


def _paint(drawing: str, path: Path) -> None:
    path.write_bytes(render.png(drawing))


def page(a: Analysis, drawn: dict[str, tuple[str, str]], missing: list[str]) -> str:
    """The whole HTML document."""
    s = a["study"]
    esc = html.escape
    spans = f"{s['runs']} runs, {_plural(len(s['arms']), 'arm')}, {_plural(len(s['sizes']), 'size')}"
    parts = [
        "<!doctype html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{esc(s["title"])} – isofusion</title>',
        '<meta name="viewport" content="width=device-width,initial-scale=1">',
        f"<style>{CSS}</style></head><body><main>",
        f'<h1>{esc(s["title"])}</h1><p class="sub">Scaling laws of native multimodal models. {esc(spans)}, domains: '
        f"{esc(', '.join(s['domains']))}. Intervals are {esc(percent(s['level'], 0))}.</p>",
        '<div class="top"><section><h2>The answer</h2>',
        *(f"<p>{esc(line)}</p>" for line in text.headline(a)),
        '</section><section class="not"><h2>What this study cannot say</h2><ul>',
        *(f"<li>{esc(line)}</li>" for line in a["cannot"]),
        "</ul></section></div>",
        tables.warnings(a),
        "<h2>The numbers</h2>",
        tables.answer(a),
        tables.laws(a),
    ]
    number = 0
    for name, (title, caption) in text.CAPTIONS.items():
        if name in drawn:
            number += 1
            parts.append(_figure(number, name, title, caption(a), drawn[name]))
        parts.append(tables_evidence.after(name, a))
    if missing:
        names = ", ".join(text.CAPTIONS[name][0] for name in missing)
        parts.append(f"<p>Not drawn, because this study holds nothing to show there: {esc(names)}.</p>")
    parts += [tables.methods(a), tables.results(a)]
    parts.append("<footer>Made by isofusion; every number is in analysis.json, every figure in figures/.</footer>")
    parts.append("</main></body></html>")
    return "\n".join(part for part in parts if part) + "\n"


def _figure(number: int, name: str, title: str, caption: str, drawings: tuple[str, str]) -> str:
    esc = html.escape
    wide, narrow = (render.inline(drawing, esc(title, quote=True)) for drawing in drawings)
    return (
        f'<h2 id="{name}">{esc(title)}</h2><figure><div class="wide">{wide}</div><div class="narrow">{narrow}</div>'
        f"<figcaption><b>Figure {number}.</b> {tables.raised(esc(caption))}</figcaption></figure>"
    )


def _plural(count: int, word: str) -> str:
    return f"{count} {word}{'' if count == 1 else 's'}"
