"""The answer of a study, its warnings, and what it cannot say: decided from the analysis, never from hopes.

A difference counts as shown only when its interval excludes 0. Everything past the largest compute that every arm
reached is called extrapolated. Sentences are plain text; the page escapes them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from isofusion.laws.holdout import Beside
from isofusion.laws.rollout import furthest_ahead
from isofusion.report.words import fixed, interval, listed, percent, power, si

Analysis = dict[str, Any]
MANY_EPOCHS = 4.0
BY = {
    "carry_over": "carrying over the next size's loss",
    "power_law": "k C^c",
    "nearest": "taking the nearest run's loss",
}
"""Baselines of a hold-out (rollout.BASELINES), in a sentence."""


def mean_key(a: Analysis) -> str:
    return "mean" if len(a["study"]["domains"]) > 1 else a["study"]["domains"][0]


def answer(a: Analysis) -> dict[str, Any]:
    """The recommendation at c_ref ("ref") and at ten times that ("ten"), or the best run where there is no law."""
    key = mean_key(a)
    fronts = {arm: f[key] for arm, f in a["frontier"].items() if f.get(key)}
    missing = [arm for arm in a["study"]["arms"] if arm not in fronts]
    out: dict[str, Any] = {"key": key, "without_law": missing, "best_run": _best_run(a, key)}
    for name, factor, field in (("ref", 1.0, "loss"), ("ten", 10.0, "loss_free")):
        out[name] = _recommend(fronts, factor * a["study"]["c_ref"], field) if fronts else None
    return out


def _best_run(a: Analysis, key: str) -> dict[str, Any] | None:
    known = [p for p in a["points"] if p["loss"].get(key) is not None]
    if not known:
        return None
    p = min(known, key=lambda p: p["loss"][key])
    return {k: p[k] for k in ("run", "arm", "size", "n", "d", "c")} | {"loss": p["loss"][key]}


def _recommend(fronts: dict[str, dict[str, Any]], c: float, field: str) -> dict[str, Any]:
    draws_name = "draws" if field == "loss" else "draws_free"
    first = next(iter(fronts.values()))
    i = int(np.argmin(np.abs(np.log(np.array(first["c"]) / c))))
    losses = {arm: f[field][i] for arm, f in fronts.items()}
    order = sorted(losses, key=lambda arm: losses[arm])
    draws = np.stack([fronts[arm][draws_name][:, i] for arm in order])
    wins = np.bincount(draws.argmin(axis=0), minlength=len(order)) / draws.shape[1]
    rows = []
    for rank, arm in enumerate(order):
        f = fronts[arm]
        gap = draws[rank] - draws[0]
        level = f["level"]
        tail = (1 - level) / 2
        lo, hi = (float(v) for v in np.quantile(gap, [tail, 1 - tail]))
        rows.append(
            {
                "arm": arm,
                "loss": losses[arm],
                "loss_interval": [f[f"{field}_lo"][i], f[f"{field}_hi"][i]],
                **{k: f[k][i] for k in ("n", "d", "ratio")},
                **{f"{k}_interval": [f[f"{k}_lo"][i], f[f"{k}_hi"][i]] for k in ("n", "d", "ratio")},
                "extrapolated": f["extrapolated"][i],
                "no_interior_minimum": f["no_interior_minimum"][i],
                "p_best": float(wins[rank]),
                "gap": losses[arm] - losses[order[0]],
                "gap_interval": [lo, hi] if rank else None,
                "worse": bool(rank and lo > 0),
            }
        )
    tied = [r["arm"] for r in rows[1:] if not r["worse"]]
    return {"c": float(first["c"][i]), "arms": rows, "best": order[0], "tied": tied, "clear": not tied}


UNREAD = (
    "its run.json or eval.json cannot be read: damaged, or of another version of isofusion; restore the file, or "
    "delete the run's folder and train it again with --resume"
)


def warnings(a: Analysis) -> list[dict[str, Any]]:
    """What a reader must know before using a number: {"code", "text"}, most serious first, equal ones merged."""
    found: list[tuple[str, str, str]] = []  # code, what, where
    for arm, by_domain in a["fits"].items():
        for domain, fit in by_domain.items():
            where = f"{arm} / {domain}"
            if domain == "mean":
                continue
            if not fit.get("ok"):
                found.append(("no-fit", f"no law: {fit['reason']}", where))
                continue
            for w in fit["warnings"]:
                found.append((w["code"], w["message"], where))
    for arm, by_domain in a["holdout"].items():
        for domain, held in by_domain.items():
            where = f"{arm} / {domain}"
            ahead = furthest_ahead({k: Beside.of(v) for k, v in held["beside"].items()}) if held.get("ok") else None
            if ahead:
                name, pair = ahead
                text = (
                    f"the hold-out is predicted worse ({percent(pair.law)} of the reducible loss) than by "
                    f"{BY[name]} ({percent(pair.baseline)})"
                )
                if pair.runs < held["runs"]:
                    text += f", on the {pair.runs} of {held['runs']} runs that this predicts"
                found.append(("holdout-worse", text, where))
            elif not held.get("ok") and a["fits"][arm].get(domain, {}).get("ok"):
                found.append(("no-holdout", f"no hold-out test: {held.get('reason')}", where))
    for r in a["below_bound"]:
        text = f"loss {fixed(r['loss'])} is below the learner's bound {fixed(r['bound'])}: a leak, or a wrong bound"
        found.append(("below-bound", text, r["run"]))
    for s in a["methods"]["sources"]:
        if (s.get("epochs") or 0) > MANY_EPOCHS:
            text = f"repeated {s['epochs']:.1f} times (more than {MANY_EPOCHS:g} epochs): its D is not all fresh"
            found.append(("repetition", text, str(s.get("name"))))
        found += [("validation-seen", leak, str(s.get("name"))) for leak in s.get("leaks") or ()]
    untuned = [arm for arm, t in a["tuning"].items() if t["verdict"] != "tuned"]
    if untuned:
        details = "; ".join(dict.fromkeys(a["tuning"][arm]["detail"] for arm in untuned))
        found.append(
            ("untuned", f"untuned ({details}): a badly set learning rate can pass for an architecture", listed(untuned))
        )
    if not any(n.get("sd") for n in a["noise"].values()):
        found.append(
            ("no-noise-floor", "no run is repeated with another seed: the noise floor is taken from the fits", "study")
        )
    if a["methods"]["planned"] and a["methods"]["finished"] < a["methods"]["planned"]:
        done, planned = a["methods"]["finished"], a["methods"]["planned"]
        found.append(("unfinished", f"{done} of {planned} planned runs have finished", "study"))
    found += [("unread", f"finished, and left out here: {UNREAD}", run) for run in a["unread"]]
    return _merged(found)


_ORDER = (
    "no-fit",
    "below-bound",
    "validation-seen",
    "unread",
    "unfinished",
    "exponent-at-bound",
    "term-vanished",
    "not-converged",
    "draws-at-bound",
    "odd-run",
    "holdout-worse",
    "untuned",
    "wide-interval",
    "irreducible-loss-zero",
    "flat",
    "unidentified",
    "uneven-spread",
    "shared-luck",
    "too-few-runs",
    "repetition",
    "no-noise-floor",
    "too-few-sizes",
    "too-few-budgets",
    "no-holdout",
)


def _merged(found: list[tuple[str, str, str]]) -> list[dict[str, Any]]:
    """One entry a code and text; entries of one code with different numbers become one list."""
    codes: dict[str, dict[str, list[str]]] = {}
    for code, text, where in found:
        codes.setdefault(code, {}).setdefault(text, []).append(where)
    rank = {code: i for i, code in enumerate(_ORDER)}
    merged = []
    for code in sorted(codes, key=lambda c: rank.get(c, len(rank))):
        items = [{"text": text, "where": where} for text, where in codes[code].items()]
        merged.append({"code": code, "items": items, "count": sum(len(i["where"]) for i in items)})
    return merged


def cannot_say(a: Analysis) -> list[str]:
    """Sentences on what this study leaves open."""
    s, found = a["study"], []
    key = mean_key(a)
    for pair in a["differences"]:
        at = pair["at_ref"].get(key)
        if at is None:
            found.append(f"How {pair['first']} and {pair['second']} compare at equal compute: at least one has no law.")
        elif at["verdict"] == "cannot say":
            found.append(
                f"Which of {pair['first']} and {pair['second']} is better at {power(at['c'])} FLOPs: their difference, "
                f"{fixed(at['diff'], sign=True)} {interval((at['lo'], at['hi']))} nats/token, may be 0."
            )
    trained = dict.fromkeys(source.get("domain") for source in a["methods"]["sources"])
    if unknown := [domain for domain in trained if domain and domain not in s["domains"]]:
        found.append(
            f"Anything about the domain {listed(unknown)}: it was trained on and never validated (no source of it has "
            f"validation files)."
        )
    if len(s["arms"]) == 1:
        found.append(f"Whether another architecture would do better: only {s['arms'][0]} was trained.")
    best = (a["answer"].get("ref") or {"arms": []})["arms"][:1]
    if best and best[0]["extrapolated"]:
        r = best[0]
        n, d = a["arms"][r["arm"]]["range"]["n"], a["arms"][r["arm"]]["range"]["d"]
        found.append(
            f"The exact optimum of {r['arm']} at the largest budget: N = {si(r['n'])} and D = {si(r['d'])} lie outside "
            f"the runs' {si(n[0])}–{si(n[1])} parameters or {si(d[0])}–{si(d[1])} tokens."
        )
    found.append(
        f"Anything beyond {power(s['c_ref'])} FLOPs, {si(max(p['n'] for p in a['points']))} parameters and "
        f"{si(max(p['d'] for p in a['points']))} tokens: the figures at ten times that are extrapolated by the laws."
    )
    untuned = [arm for arm, t in a["tuning"].items() if t["verdict"] != "tuned"]
    if untuned:
        found.append(f"Whether {listed(untuned)} would rank the same with tuned learning rates.")
    if s["world"]:
        found.append(
            "How far this carries to photographs and real text: the data is the built-in world, small models, one "
            "mixture. Its entropy is known; its images are not the world's."
        )
    else:
        found.append("How another mixture, image resolution or tokenizer would rank the arms: one was trained.")
    found.append("Anything about skills after instruction tuning: only validation losses were measured.")
    return found
