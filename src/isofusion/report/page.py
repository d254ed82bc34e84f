"""One self-contained page: the answer, what the study cannot say, the figures with their sentences, tables, methods.

No script, no external resource. Each figure stands in two drawings, wide and narrow; CSS shows the one that fits.
`build_report` writes <out>/report.html, <out>/analysis.json and <out>/figures/NAME.svg and .png.
"""

from __future__ import annotations

import html
import os
from pathlib import Path
from typing import Any

from altair.utils.schemapi import debug_mode

from isofusion.report import render, tables, tables_evidence, text
from isofusion.report.analysis import Analysis, analyse
from isofusion.report.figures import FIGURES
from isofusion.report.figures_evidence import EVIDENCE_FIGURES
from isofusion.report.style import NARROW, WIDE, themed
from isofusion.report.words import percent

DRAW = FIGURES | EVIDENCE_FIGURES

CSS = """
:root{--ink:#1f2328;--muted:#5b626a;--line:#dcdfe3;--paper:#fff;--tint:#f6f7f8}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);font:17px/1.55 Charter,"Bitstream Charter","Sitka Text",Cambria,
"Liberation Serif",Georgia,serif}
main{max-width:58rem;margin:0 auto;padding:2.2rem 1.1rem 4rem}
h1{font-size:1.75rem;line-height:1.2;margin:0 0 .2rem}
h2{font-size:1.22rem;margin:2.6rem 0 .5rem;line-height:1.3}
h3{font-size:1.02rem;margin:1.4rem 0 .3rem}
p{margin:.45rem 0;max-width:44rem}
.sub{color:var(--muted);margin-top:0}
.top{display:grid;grid-template-columns:1.25fr 1fr;gap:1.4rem;margin:1.4rem 0 1rem}
.top section{border-top:3px solid var(--ink);padding-top:.5rem}
.top section.not{border-color:#b9bec4}
.top h2{margin-top:0}
.top p:first-of-type{font-size:1.06rem}
ul{margin:.4rem 0;padding-left:1.15rem;max-width:46rem}
li{margin:.25rem 0}
.not ul{font-size:.93rem}
figure{margin:0 0 1.2rem}
figure svg{display:block;width:100%;height:auto}
figure .narrow{display:none}
figcaption{font-size:.93rem;line-height:1.45;color:var(--ink);max-width:48rem;margin-top:.4rem}
.scroll{overflow-x:auto;margin:.5rem 0 .8rem}
table{border-collapse:collapse;font:13.5px/1.4 Arial,"Liberation Sans",Helvetica,sans-serif;
font-variant-numeric:tabular-nums}
th,td{padding:.28rem .6rem;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th{font-weight:600;border-bottom:1.5px solid var(--ink);vertical-align:bottom}
th:first-child,td:first-child{text-align:left;padding-left:0}
td.l,th.l{text-align:left}
td .iv{color:var(--muted);font-size:.92em}
.dot{display:inline-block;width:.68em;height:.68em;border-radius:50%;margin-right:.4em}
.warn li b{font-family:Arial,"Liberation Sans",Helvetica,sans-serif;font-size:.82rem}
details{margin:.6rem 0}
summary{cursor:pointer;color:var(--muted)}
dl{display:grid;grid-template-columns:11rem 1fr;gap:.2rem 1rem;font-size:.95rem;margin:.5rem 0}
dt{color:var(--muted)}
dd{margin:0;overflow-wrap:anywhere}
sup{font-size:.72em;line-height:0}
code,pre{font:13px/1.45 "DejaVu Sans Mono",Menlo,Consolas,monospace}
pre{background:var(--tint);padding:.7rem .8rem;overflow-x:auto}
footer{margin-top:3rem;color:var(--muted);font-size:.85rem}
@media(max-width:760px){
body{font-size:16px}main{padding:1.2rem .9rem 3rem}
.top{grid-template-columns:1fr}
figure .wide{display:none}figure .narrow{display:block}
figure svg{margin:0 auto}
dl{grid-template-columns:1fr;gap:0}dt{margin-top:.5rem}
}
@media print{body{font-size:10.5pt}main{max-width:none;padding:0}figure,table{break-inside:avoid}details{display:none}}
"""


def build_report(out: str | Path, rows: list[dict[str, Any]] | None = None) -> Path:
    """Analyse the study in `out` and write its page; returns the page's path.

    `rows` defaults to the study's ledger. Raises InputError when no run has finished.
    """
    out = Path(out)
    a = analyse(out, rows)
    drawn, missing = draw_figures(a, out / "figures")
    path = out / "report.html"
    tmp = out / f"report.html.{os.getpid()}.tmp"
    tmp.write_text(page(a, drawn, missing), encoding="utf-8")
    os.replace(tmp, path)
    return path


def draw_figures(a: Analysis, folder: Path) -> tuple[dict[str, tuple[str, str]], list[str]]:
    """Draw every figure in both layouts: name -> (wide SVG, narrow SVG), and the names with nothing to draw.

    The wide one is also written to `folder` as NAME.svg and NAME.png; files of an earlier build are replaced.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn: dict[str, tuple[str, str]] = {}
    missing = []
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
        (folder / f"{name}.png").write_bytes(render.png(drawn[name][0]))
    return drawn, missing


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
