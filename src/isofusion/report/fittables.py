"""The tables of a fit's page, as HTML fragments, and the words they share with its captions."""

from __future__ import annotations

import html
import math
import re
from typing import Any

import numpy as np

from isofusion.laws.analysis import Analysis, Refused
from isofusion.laws.holdout import HoldOut
from isofusion.laws.profile import Profile
from isofusion.laws.sensitivity import Sensitivity
from isofusion.report.tables import Html, beside, folded, table, with_interval
from isofusion.report.words import DASH, fixed, interval, percent, power, pretty, si


def answers(a: Analysis) -> str:
    """What to train at each compute."""
    rows = [
        [
            Html(raised_power(row["compute"])),
            with_interval(si(row["n"]), row.get("n_interval"), si),
            with_interval(si(row["d"]), row.get("d_interval"), si),
            with_interval(short(row["tokens_per_parameter"]), row.get("tokens_per_parameter_interval"), short),
            with_interval(nats(row["loss"], 4), row.get("loss_interval"), lambda v: nats(v, 4)),
            "yes" if row["warnings"] else "no",
        ]
        for row in a.answers
    ]
    head = ["FLOPs", "N*", "D*, tokens", "D*/N*", "loss, nats/token", "far outside the runs"]
    return table(head, rows)


def law(a: Analysis) -> str:
    """Parameters with bootstrap and profile intervals, and the allocation."""
    found = a.to_dict()
    law, boot, split = found["law"], found["bootstrap"], found["allocation"]
    spans = (boot or {}).get("intervals", {})
    rows = []
    for name, shown in (("E", "E, nats/token"), ("A", "A"), ("alpha", "α"), ("B", "B"), ("beta", "β")):
        p = a.profiles.get(name)
        beside = interval((p.low, p.high), how=short) if isinstance(p, Profile) else DASH
        span = spans.get(name)
        told = "fixed" if name == "E" and law["fixed_e"] is not None else interval(span, how=short) if span else "none"
        rows.append([shown, short(law[name], 5), told, beside, DASH])
    for key, shown in (("a", "a: N* ∝ C^a"), ("b", "b: D* ∝ C^b"), ("d", "d: D* ∝ N*^d")):
        span = (split["closed_form_interval"] or {}).get(key)
        regression = fixed(split["regression"][key], 4) if split["regression"] else DASH
        told = interval(span, how=short) if span else "none"
        name = Html(re.sub(r"\^(\w)", r"<sup>\1</sup>", shown))
        rows.append([name, fixed(split["closed_form"][key], 4), told, DASH, regression])
    head = ["", "value", "interval (bootstrap)", "interval (profile)", "regression as in the paper"]
    return "<h3>The law: L = E + A/N<sup>α</sup> + B/D<sup>β</sup></h3>" + table(head, rows)


def choices(a: Analysis) -> str:
    """The sensitivity table; ruled-out choices in grey; below it those that gave no number, and why."""
    s = a.sensitivity
    if not isinstance(s, Sensitivity):
        return ""
    rows = []
    silent = {name for names in s.without.values() for name in names}
    for i, r in enumerate(s.shown()):
        if f"{r.group}: {r.change}" in silent:
            continue
        name = "as fitted" if r.group == "default" else f"{r.group}: {r.change}"
        numbers = [fixed(r.alpha), fixed(r.beta), fixed(r.a), si(r.n), si(r.d), short(r.tokens_per_parameter)]
        cells = [
            f"{i + 1}. {pretty(name)}",
            *numbers,
            nats(r.loss, 4),
            percent(r.misfit, 2),
            pretty(r.note),
        ]
        rows.append(
            [Html(f'<span style="color:#6b7178">{html.escape(c)}</span>') for c in cells] if not r.counts else cells
        )
    head = ["choice", "α", "β", "a", "N*", "D*", "D*/N*", "loss", "misfit", ""]
    missing = "".join(
        f"<p>No number from {html.escape(pretty(', '.join(names)))}: {html.escape(pretty(reason))}.</p>"
        for reason, names in s.without.items()
    )
    return table(head, rows, left=(9,)).replace('<td class="l">', '<td class="note">') + missing


def tests(a: Analysis) -> str:
    """Hold-outs and rollouts against the baselines."""
    rows = []
    parts: list[tuple[str, Any]] = [("the largest size", a.held)]
    parts += [("each next size", a.rollouts["n"]), ("each next doubling of compute", a.rollouts["c"])]
    missing = []
    for name, part in parts:
        if isinstance(part, Refused):
            missing.append(f"<p>{html.escape(capital(name))} could not be held out: {html.escape(part.reason)}.</p>")
            continue
        f = part.to_dict()
        acc = f["accuracy"]
        runs = len(part.held) if isinstance(part, HoldOut) else len(part.observed)
        r2 = fixed(acc["r2"]) if acc["r2"] is not None else DASH
        rows.append(
            [name, str(runs), percent(f["mae_loss"], 2), percent(f["mae_reducible"])]
            + [beside(part.beside(k), runs) for k in ("carry_over", "power_law", "nearest")]
            + [percent(f["hit_rate"], 0), short(acc["mse"], 2), r2]
        )
    head = ["held out", "runs", "error", "reducible", "carry over", "k·Cᶜ", "nearest", "in 95 %", "MSE", "R²"]
    note = (
        "<p>Mean absolute errors: of the loss, then of the reducible loss, for the law and for each baseline; share of "
        "runs inside their 95 % interval. In brackets, where a baseline predicts some of the runs only: the law on "
        "these.</p>"
    )
    return table(head, rows) + (note if rows else "") + "".join(missing)


def method(a: Analysis) -> str:
    """Objective, solver, cost, intervals, options."""
    fit = a.fit
    second = f"the next best end is {fit.next_best:.10g}" if fit.next_best is not None else "no other end was found"
    pairs = [
        ("Objective", f"sum of Huber on log residuals, δ = {fit.delta:g}: {fit.objective:.10g}"),
        ("Solver", f"{percent(fit.share, 0)} of {fit.starts} starts end there; {second}"),
        ("At the end", f"gradient norm {power(fit.gradient_norm)}, condition number {power(fit.condition)}"),
        ("Residual spread", percent(fit.residual_spread, 2)),
        (
            "Compute",
            ("C = 6·N·D" if a.cost.kind == "6nd" else f"C = k(N)·D, {a.cost.kind}")
            + (f", within {percent(a.cost.spread)}" if a.cost.spread else ""),
        ),
    ]
    if a.intervals:
        pairs.append(("Intervals", f"{len(a.intervals.draws)} draws; {a.intervals.note}"))
    pairs += [("Note", note) for note in a.notes]
    pairs.append(("Options", ", ".join(f"{k} {v}" for k, v in a.options.items() if v not in (None, []))))
    rows = "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in pairs)
    return f"<h2>How it was found</h2><dl>{rows}</dl>"


def every_run(a: Analysis) -> str:
    """Every run beside what the law says of it, folded away."""
    r, fit = a.runs, a.fit
    order = np.lexsort((r.d, r.n))
    predicted = fit.predict(r.n, r.d)
    rows = [
        [si(r.n[i]), si(r.d[i]), Html(raised_power(r.c[i])), fixed(r.loss[i], 4), fixed(predicted[i], 4),
         percent(float(r.loss[i] / predicted[i] - 1), 2)]
        for i in order[:2000]
    ]  # fmt: skip
    return folded(
        f"All {len(r)} runs and what the law says of them", table(["N", "D", "C, FLOPs", "loss", "law", "off by"], rows)
    )


def capital(text: str) -> str:
    """First letter up, no full stop."""
    return text[:1].upper() + text[1:].rstrip(".")


def short(value: float, digits: int = 3) -> str:
    """Significant digits, in full up to a hundred thousand; 2.53·10¹⁴ beyond and for very small values."""
    if value and math.isfinite(value) and not 1e-4 <= abs(value) < 1e5:
        return power(value, digits - 1) if value > 0 else f"−{power(-value, digits - 1)}"
    rounded = f"{value:.{digits}g}"
    return DASH if not math.isfinite(value) else f"{float(rounded):.0f}" if "e" in rounded else rounded


def nats(value: float, decimals: int = 3) -> str:
    """A loss to so many decimals, or three digits where these would show none or too many."""
    return fixed(value, decimals) if value == 0 or 0.01 <= abs(value) < 1e5 else short(value)


def raised_power(value: float) -> str:
    """2.41·10¹², escaped."""
    return html.escape(power(value, 2))
