"""The tables of the page: warnings, ranking, laws, methods, all runs. HTML fragments; see also tables_evidence.py."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from typing import Any

from isofusion.laws.holdout import Beside
from isofusion.report.figures import NAMES
from isofusion.report.style import arm_styles
from isofusion.report.words import DASH, duration, fixed, interval, listed, percent, power, pretty, si

Analysis = dict[str, Any]
esc = html.escape
LAW, SPLIT = ("E", "alpha", "beta"), ("a", "b", "d")


class Html(str):
    """A cell that is already HTML."""

    __slots__ = ()


def raised(text: str) -> str:
    """x^2 and C^−0.05 with raised exponents; `text` is escaped already."""
    return re.sub(r"\^([−-]?\d+(?:\.\d+)?|[αβabcd])", r"<sup>\1</sup>", text)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = ()) -> str:
    """An HTML table; the first column and those in `left` are aligned left. Cells are escaped unless Html."""
    if not rows:
        return ""

    def cell(tag: str, i: int, value: str) -> str:
        mark = ' class="l"' if i in left else ""
        return f"<{tag}{mark}>{value if isinstance(value, Html) else esc(str(value))}</{tag}>"

    top = "".join(cell("th", i, value) for i, value in enumerate(head))
    body = "".join("<tr>" + "".join(cell("td", i, v) for i, v in enumerate(row)) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def arm_cell(a: Analysis, arm: str) -> Html:
    colour = arm_styles(a["study"]["arms"])[arm]["colour"]
    return Html(f'<span class="dot" style="background:{colour}"></span>{esc(arm)}')


def with_interval(value: str, pair: Any, how: Any) -> Html:
    if not pair or (pair[0] is None and pair[1] is None):
        return Html(esc(value))
    return Html(f'{esc(value)} <span class="iv">{esc(interval(pair, how=how))}</span>')


def beside(found: Beside, runs: int) -> Html:
    """A baseline's error; in brackets below, where it predicts some of the `runs` only, the law's on these."""
    error, law = found.cell(runs, percent)
    return Html(esc(error) + (f' <span class="iv below">({esc(law)})</span>' if law else ""))


def losses(value: float | None, pair: Any) -> Html:
    return with_interval(fixed(value), pair, fixed)


def gap(entry: dict[str, Any]) -> Html:
    """A signed difference with its interval."""
    return with_interval(fixed(entry["diff"], sign=True), (entry["lo"], entry["hi"]), fixed)


def folded(summary: str, content: str) -> str:
    """Content that opens on a click; nothing where there is no content."""
    return f"<details><summary>{esc(summary)}</summary>{content}</details>" if content else ""


def warnings(a: Analysis) -> str:
    if not a["warnings"]:
        return "<h2>Warnings</h2><p>None.</p>"
    items = []
    for w in a["warnings"]:
        shown = [f"{esc(_where(a, i['where']))}: {esc(pretty(i['text']))}" for i in w["items"]]
        first = shown[0]
        more = "".join(f"<li>{line}</li>" for line in shown[1:])
        rest = f"<details><summary>and {len(shown) - 1} more</summary><ul>{more}</ul></details>" if more else ""
        items.append(f"<li><b>{esc(w['code'])}</b> {first}{rest}</li>")
    return f'<h2>Warnings</h2><ul class="warn">{"".join(items)}</ul>'


def _where(a: Analysis, where: list[str]) -> str:
    fits = len(a["study"]["arms"]) * len(a["study"]["domains"])
    if len(where) == fits and fits > 1:
        return "every arm and domain"
    if len(where) > 4:
        return f"{listed(where[:3])} and {len(where) - 3} more"
    return listed(where)


def answer(a: Analysis) -> str:
    """The arms ranked at the largest common budget and at ten times that."""
    parts = []
    for key, title in (("ref", "At the largest budget every arm reached"), ("ten", "At ten times that (extrapolated)")):
        ranked = a["answer"][key]
        if not ranked:
            continue
        rows = []
        for r in ranked["arms"]:
            gap = with_interval(fixed(r["gap"], sign=True), r["gap_interval"], fixed)
            rows.append(
                [
                    arm_cell(a, r["arm"]),
                    with_interval(fixed(r["loss"]), r["loss_interval"], fixed),
                    gap if r["gap_interval"] else "best",
                    percent(r["p_best"], 0) if len(ranked["arms"]) > 1 else DASH,
                    with_interval(si(r["n"]), r["n_interval"], si),
                    with_interval(si(r["d"]), r["d_interval"], si),
                    with_interval(si(r["ratio"]), r["ratio_interval"], si),
                    "yes" if r["extrapolated"] else "no",
                ]
            )
        head = [
            "arm",
            "loss, nats/token",
            "behind the best",
            "best in draws",
            "N*",
            "D*, tokens",
            "D*/N*",
            "outside the runs",
        ]
        parts.append(f"<h3>{esc(title)}: {esc(power(ranked['c']))} FLOPs</h3>{table(head, rows)}")
    return "".join(parts)


def laws(a: Analysis) -> str:
    """Parameters and exponents of every fit, then what follows for N* and D* (one table of both would not fit)."""
    rows, split = [], []
    for arm, by_domain in a["fits"].items():
        for domain, f in by_domain.items():
            name = NAMES.get(domain, domain)
            p = f.get("power") or {}
            k, c = (f"{p['k']:.3g}", fixed(p["c"], 4)) if p.get("ok") else (DASH, DASH)
            if not f.get("ok"):
                reason = DASH if domain == "mean" else "no law"
                rows.append([arm_cell(a, arm), name, reason, DASH, DASH, DASH, k, c])
                continue
            show = {q: with_interval(fixed(f[q]), f["interval"][q], fixed) for q in (*LAW, *SPLIT)}
            reg = f.get("regression")
            slopes = f"{fixed(reg['a'])}, {fixed(reg['b'])}, {fixed(reg['d'])}" if reg else DASH
            rows.append([arm_cell(a, arm), name, *(show[q] for q in LAW), percent(f["share_at_bound"]), k, c])
            split.append([arm_cell(a, arm), name, *(show[q] for q in SPLIT), slopes])
    head = ["arm", "domain", "E", "α", "β", "draws at a bound", "k", "c"]
    note = (
        "L = E + A/N^α + B/D^β per domain; L = k·C^c through the lower envelope. The mean over domains is not fitted "
        "as a law of its own."
    )
    fits = [f for by_domain in a["fits"].values() for f in by_domain.values()]
    reasons = dict.fromkeys(f["refused"]["E"] for f in fits if f.get("refused", {}).get("E"))
    why = "".join(f"<p>E has no interval where {esc(r)}.</p>" for r in reasons)
    shares = table(["arm", "domain", *SPLIT, "a, b, d by regression"], split, left=(1,))
    if shares:
        told = "N* ∝ C^a, D* ∝ C^b, D* ∝ N*^d: in closed form for C ∝ ND, and by regression on the FLOPs really spent."
        shares = f"<h3>What the laws say of N* and D*</h3>{shares}<p>{raised(esc(told))}</p>"
    missing = [
        f"{arm} / {d}: {f['reason']}"
        for arm, by in a["fits"].items()
        for d, f in by.items()
        if d != "mean" and not f.get("ok")
    ]
    failed = "".join(f"<li>{esc(m)}</li>" for m in missing)
    lists = f"<p>Without a law:</p><ul>{failed}</ul>" if failed else ""
    more = _irreducible(a)
    return f"<h3>The laws</h3>{table(head, rows, left=(1,))}<p>{raised(esc(note))}</p>{why}{lists}{shares}{more}"


def _irreducible(a: Analysis) -> str:
    rows = []
    for arm, by_domain in a["fits"].items():
        for domain, f in by_domain.items():
            if not f.get("ok") or f.get("oracle") is None:
                continue
            low, high = f["interval"]["E"] or (None, None)
            inside = DASH if low is None else "inside" if low <= f["oracle"] <= high else "outside"
            rows.append(
                [
                    arm_cell(a, arm),
                    NAMES[domain],
                    fixed(f["E"]),
                    fixed(f["oracle"]),
                    fixed(f["E"] - f["oracle"], sign=True),
                    DASH if low is None else fixed(high - low),
                    inside,
                ]
            )
    head = ["arm", "domain", "fitted E", "oracle entropy", "bias", "width of the interval", "oracle in the interval"]
    if not rows:  # nobody knows the entropy of real data
        return ""
    return folded("Fitted irreducible loss against the oracle entropy", table(head, rows, left=(1,)))


def methods(a: Analysis) -> str:
    """Data, mixture, training, seeds, lock, versions, cost, and how to do it again."""
    m, s = a["methods"], a["study"]
    pairs: list[tuple[str, str]] = []

    def add(name: str, value: str | None) -> None:
        pairs.append((name, value if value else "not known"))

    if s["description"]:
        add("Study", s["description"])
    if s["assumed"]:
        add("Assumed", s["assumed"])
    weights = sum(x.get("weight", 0) or 0 for x in m["sources"])
    mix = [
        f"{x['name']} {percent(_first(x.get('share_rows'), (x.get('weight') or 0) / (weights or 1)), 0)}"
        for x in m["sources"]
        if x.get("name")
    ]
    add("Mixture (rows)", ", ".join(mix))
    add("Data fingerprint", m["fingerprint"])
    if m["world"]:
        add("World", ", ".join(f"{k} {v}" for k, v in m["world"].items()))
    repeated = [f"{x['name']} {x['epochs']:.2g}" for x in m["sources"] if x.get("epochs")]
    add(
        "Epochs (longest run)",
        ", ".join(repeated) if repeated else "no source repeats (endless)" if s["world"] else None,
    )
    add(
        "Packing",
        f"rows of {m['row_len']} slots, images {m['image_size']} px in patches of {m['patch_size']}, "
        f"tokenizer {m['tokenizer']}"
        if m["row_len"]
        else None,
    )
    t = m["train"]
    if t:
        decay = (
            f"AdamW, peak learning rate {t.get('lr')}, {t.get('rows_per_step')} rows a step, "
            f"warm-up {t.get('warmup_steps')} steps, cool-down {percent(t.get('cooldown_share'), 0)} "
            f"({t.get('cooldown_shape')}), clip {t.get('clip')}"
        )
        add("Training (longest run)", f"{decay}, {m['precision'] or t.get('precision')}")
    add(
        "Tokens trained",
        f"{si(m['tokens_trained'])} in all, {power(m['flops_trained'])} FLOPs (trunks counted once)"
        if m["tokens_trained"]
        else None,
    )
    add(
        "Cost",
        f"{duration(m['seconds'])} of training summed over jobs; {m['jobs']} jobs × {m['threads']} threads"
        if m["seconds"]
        else None,
    )
    add("Seeds", f"{', '.join(map(str, m['seeds']))}; {m['runs_with_seeds']} branches repeat another seed")
    add("Tuning", "; ".join(f"{arm}: {t['verdict']} ({t['detail']})" for arm, t in a["tuning"].items()))
    planned = f" of {m['planned']} planned" if m["planned"] else ""
    left_out = f"; left out: {', '.join(m['excluded'])}" if m["excluded"] else ""
    add("Runs", f"{m['finished']} finished branches{planned}, {m['tuning_runs']} of them tuning runs{left_out}")
    add(
        "Compute axis",
        f"{s['compute_label']}; N: total parameters, active ones for experts; D: text and image tokens, no padding",
    )
    add("Hold-out, metric", f"{m['holdout']}; {m['metric']}" if m["metric"] else None)
    locked = f"{m['locked_at']}, digest {m['lock_digest'][:16]}…" if m["lock_digest"] else None
    add("Locked", locked or (m["lock_unreadable"] or None))
    changes = (
        "none"
        if m["later_changes"] == []
        else "; ".join(m["later_changes"])
        if m["later_changes"]
        else m["lock_unreadable"]
    )
    add("Changed since the lock", changes)
    add("Versions", ", ".join(f"{k} {v}" for k, v in m["versions"].items() if v))
    machine = {k: v for k, v in m["environment"].items() if isinstance(v, (str, int, float)) and k not in m["versions"]}
    add("Machine", ", ".join(f"{k} {v}" for k, v in machine.items()))
    rows = "".join(f"<dt>{esc(k)}</dt><dd>{esc(str(v))}</dd>" for k, v in pairs)
    study = m["again"] or f"{s['name']}.toml"
    again = f"isofusion study estimate {study}\nisofusion study run {study} --out runs/{s['name']}-again"
    return f"<h2>Methods</h2><dl>{rows}</dl><h2>Do it again</h2><pre>{esc(again)}</pre>"


def _first(*values: float | None) -> float | None:
    return next((v for v in values if v is not None), None)


def results(a: Analysis) -> str:
    """Every run, folded away."""
    domains = a["study"]["domains"]
    shown = [*domains, "mean"] if len(domains) > 1 else domains
    rows = [
        [p["run"], p["arm"], si(p["n"]), si(p["d"]), power(p["c"], 2), *(fixed(p["loss"].get(d), 4) for d in shown)]
        for p in sorted(a["points"], key=lambda p: (a["study"]["arms"].index(p["arm"]), p["n"], p["seed"], p["d"]))
    ]
    head = ["run", "arm", "N", "D", "C, FLOPs", *shown]
    return folded(f"All {len(rows)} runs (also in results.csv)", table(head, rows, left=(1,)))
