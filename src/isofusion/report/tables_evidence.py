"""The tables under the figures: differences, hold-out and noise floor, token classes, use of the image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from isofusion.laws.holdout import Beside
from isofusion.report.figures import NAMES
from isofusion.report.tables import Analysis, arm_cell, beside, esc, folded, gap, losses, table
from isofusion.report.words import DASH, fixed, percent, power, si


def after(name: str, a: Analysis) -> str:
    """The table that belongs under a figure, if any."""
    if name == "differences":
        return _differences(a)
    if name == "predicted-against-observed":
        return _holdout(a)
    if name == "loss-by-class":
        return _classes(a)
    if name == "image-use":
        return _image(a)
    if name == "speed":
        return _speed(a)
    return ""


def _differences(a: Analysis) -> str:
    rows = []
    for pair in a["differences"]:
        for domain in [*a["study"]["domains"], "mean"]:
            at, run = pair["at_ref"].get(domain), pair["overall"].get(domain)
            rows.append(
                [
                    pair["label"],
                    NAMES[domain],
                    gap(at) if at else DASH,
                    _says(pair, at),
                    gap(run) if run else DASH,
                    _says(pair, run),
                    str(run["pairs"]) if run else "0",
                ]
            )
    ref = power(a["study"]["c_ref"])
    head = ["difference", "loss", f"laws at {ref} FLOPs", "so", "matched runs", "so", "pairs"]
    return (
        f"<details><summary>All differences, nats/token</summary>{table(head, rows, left=(1, 3, 5))}</details>"
        if rows
        else ""
    )


def _says(pair: dict[str, Any], entry: dict[str, Any] | None) -> str:
    if not entry:
        return DASH
    return {"lower": f"{pair['first']} better", "higher": f"{pair['second']} better"}.get(
        entry["verdict"], "cannot say"
    )


def _holdout(a: Analysis) -> str:
    rows, runs = [], []
    tests = [h for by_domain in a["holdout"].values() for h in by_domain.values()]
    known = any(h.get("oracle_e") for h in tests)
    dropped = any("ratio_without_n" in (h.get("leave_one_size_out") or {}) for h in tests)
    for arm, by_domain in a["holdout"].items():
        for domain, h in by_domain.items():
            if not h.get("ok"):
                rows.append([arm_cell(a, arm), NAMES[domain], "not possible", *[DASH] * (6 + known + dropped)])
                continue
            loo = h.get("leave_one_size_out") or {}
            drop = [loo.get("ratio_without_n"), loo.get("ratio_without_d")]
            rows.append(
                [
                    arm_cell(a, arm),
                    NAMES[domain],
                    h["size"],
                    percent(h["error_reducible"]),
                    *([percent((h["oracle_e"] or {}).get("error_reducible"))] if known else []),
                    *(beside(Beside.of(h["beside"][k]), h["runs"]) for k in ("carry_over", "power_law")),
                    percent(h["error"], 2),
                    "none" if h.get("no_interval") else percent(h["hit_rate"], 0),
                    {True: "yes", False: "NO", None: DASH}[h["beats_carry"]],
                    *([" / ".join(f"{v:.1f}×" if v else DASH for v in drop)] if dropped else []),
                ]
            )
            runs += [
                [
                    arm_cell(a, arm),
                    NAMES[domain],
                    si(p["d"]),
                    fixed(p["observed"]),
                    losses(p["predicted"], (p["low"], p["high"])),
                ]
                for p in h["points"]
            ]
    if not rows:
        return ""
    head = [
        "arm",
        "domain",
        "held out",
        "error, reducible",
        *(["with E = oracle"] if known else []),
        "next size carried over",
        "k·Cᶜ",
        "error, loss",
        "in the 95 % range",
        "beats carry-over",
        *(["without N / D term"] if dropped else []),
    ]
    reasons = sorted({h["no_interval"] for h in tests if h.get("no_interval")})
    why = "".join(f"<p>95 % range: {esc(reason)}.</p>" for reason in reasons)
    if any("(law" in cell for row in rows for cell in row):
        why += "<p>In brackets, where a baseline predicts some of the held-out runs only: the law on these.</p>"
    why += _averaged(a)
    noise = _noise(a)
    detail = table(["arm", "domain", "D, tokens", "observed", "predicted"], runs, left=(1,))
    more = folded("Held-out runs one by one", detail)
    shown = table(head, rows, left=(1, 2)) if runs else "<p>Not possible; the warnings say why.</p>"
    return f"<h3>Hold-out</h3>{shown}{why}{more}{noise}"


def _carried(mean: dict[str, Any]) -> str:
    error, some = percent(mean["carry_over"]), mean["carried_cells"] not in (0, mean["cells"])
    return f"{error}, the law on the same {mean['carried_cells']} {percent(mean['law_on_carried'])}" if some else error


def _averaged(a: Analysis) -> str:
    """The hold-out for the mean loss of a size's seeds at each D, where seeds are repeated there."""
    said = []
    for arm, by_domain in a["holdout"].items():
        for domain, h in by_domain.items():
            mean = h.get("seeds_averaged")
            if not h.get("ok") or not mean:
                continue
            terms = (h.get("leave_one_size_out") or {}).get("seeds_averaged") or {}
            drop = [terms.get(f"ratio_without_{t}") for t in "nd"]
            grow = f"; without N / D term {' / '.join(f'{v:.1f}×' for v in drop)}" if all(drop) else ""
            said.append(
                f"{esc(arm)} {NAMES[domain]} {percent(mean['mae_reducible'])} "
                f"(next size carried over {_carried(mean)}{grow})"
            )
    return f"<p>Seeds averaged, error of a size's mean loss at each D: {', '.join(said)}.</p>" if said else ""


def _noise(a: Analysis) -> str:
    rows = []
    for domain, n in a["noise"].items():
        groups = f"{n['groups']} groups, {n['freedom']} d.f." if n["groups"] else "no repeated seed"
        rows.append(
            [
                NAMES[domain],
                fixed(n.get("sd"), 4),
                groups,
                fixed(n.get("residual_sd"), 4),
                f"{n['ratio']:.2f}" if n.get("ratio") else DASH,
            ]
        )
    head = ["domain", "spread over seeds", "from", "residual of the laws", "ratio"]
    return f"<h3>Noise floor, nats/token</h3>{table(head, rows, left=(2,))}" if rows else ""


def _classes(a: Analysis) -> str:
    rows = [
        [
            arm_cell(a, r["arm"]),
            NAMES[r["domain"]],
            r["label"],
            *(fixed(r[k]) for k in ("loss", "se", "oracle", "bound", "chance", "blind", "blind_se", "shuffled")),
            f"{r['targets']:.0f}" if r["targets"] else DASH,
        ]
        for r in sorted(a["classes"], key=lambda r: (r["domain"], r["class"] is not None, r["label"]))
    ]
    head = [
        "arm",
        "domain",
        "targets",
        "loss",
        "s.e.",
        "oracle",
        "learner's bound",
        "chance",
        "no image",
        "s.e.",
        "another image",
        "count",
    ]
    compare = [
        [
            f"{r['first']} − {r['second']}",
            r["class"],
            gap(r),
            str(r["trunks"]),
            {"lower": r["first"], "higher": r["second"]}.get(r["verdict"], "cannot say"),
            gap(d) if (d := r.get("documents")) else DASH,
            fixed(d["t"], 1) if d else DASH,
            f"{d['docs']} at {d['size']}" if d else DASH,
        ]
        for r in a["fusion_compare"]
    ]
    head_compare = ["difference", "targets", "nats/token", "trunks", "better", "same documents", "t", "documents"]
    more = table(head_compare, compare, left=(1, 4))
    fusion = folded("Fusion targets, arm against arm (paired by size, seed and budget; by document)", more)
    listing = table(head, rows, left=(1, 2))
    return fusion + folded("All classes, largest run of each arm", listing)


def _image(a: Analysis) -> str:
    rows = []
    for r in a["image_use"]:
        cells = [arm_cell(a, r["arm"]), NAMES[r["domain"]], fixed(r["true"]), fixed(r["shuffled"]), fixed(r["blind"])]
        for kind in ("shuffled", "blind"):
            d = r.get(f"d_{kind}")
            cells += [gap(d), fixed(d["t"], 1)] if d else [DASH, DASH]
        rows.append([*cells, str(r["docs"])])
    head = [
        "arm",
        "domain",
        "true",
        "another image",
        "no image",
        "another − true",
        "t",
        "no image − true",
        "t",
        "documents",
    ]
    return table(head, rows, left=(1,))


def _speed(a: Analysis) -> str:
    """Columns that no run measured are left out."""
    rows = a["speed"]["sizes"]
    columns: list[tuple[str, str, Callable[[float], str]]] = [
        ("tokens/s", "tokens_per_s", si),
        ("FLOP/s", "flops_per_s", power),
        ("of the measured peak", "mfu_measured", percent),
        ("of the data sheet's peak", "mfu_datasheet", percent),
        ("waiting for data", "input_wait", percent),
        ("peak memory", "peak_memory", lambda value: f"{si(value)}B"),
    ]
    columns = [c for c in columns if any(r[c[1]] is not None for r in rows)]
    cells = [
        [arm_cell(a, r["arm"]), r["size"], *(DASH if r[key] is None else show(r[key]) for _, key, show in columns)]
        for r in rows
    ]
    return folded("Speed by arm and size", table(["arm", "size", *(c[0] for c in columns)], cells, left=(1,)))
