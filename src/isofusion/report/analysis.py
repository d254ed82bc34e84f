"""Everything the report shows, computed once into one plain dict, which is also written to <out>/analysis.json.

Fields (None or absent where the study does not allow it):
  study       name, title, runs, arms, domains, sizes, seeds, compute axis and label, c_min, c_max, c_ref, reducible
  arms        per arm: fusion, experts, sizes, ranges of N, D and C, number of runs
  points      one per finished branch: arm, size, n, d, c, steps, seed, loss per domain and "mean"
  unread      finished runs that are left out because their files cannot be read
  entropy     per domain: oracle, text_oracle (a reader without images), learner's bound at the largest D, chance
  fits        arm -> domain -> parameters, a, b, d, regression, intervals, power law, warnings; or ok = False, reason
  frontier    arm -> domain or "mean" -> compute-optimal loss, N, D, D/N over compute with intervals, extrapolated flags
  isoflop     arm -> budgets that arms share: sizes, losses at equal compute, the parabola and its lowest point
  differences pairs of arms: at equal compute, at matched size, verdicts
  answer      the recommendation at c_ref ("ref") and at 10 times that ("ten")
  speed       sizes: tokens/s, FLOP/s, share of the peak, memory per arm and size; pairs: time of arms at equal FLOPs
  holdout, predicted, classes, fusion, fusion_compare, image_use, experts, noise, tuning, training
  warnings, cannot   sentences;  methods   what was run, on what, at what cost
Units: N parameters (active ones for experts), D text + image tokens, C FLOPs, losses nats per target token.
"""

from __future__ import annotations

import json
import math
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import numpy as np

from isofusion.errors import InputError
from isofusion.laws.analysis import aside
from isofusion.laws.table import clusters
from isofusion.report import advice, evidence, isoflop, lawside, methods
from isofusion.report import speed as speeds
from isofusion.report.evidence import LEVEL, number
from isofusion.report.words import si

Analysis = dict[str, Any]
DOMAIN_ORDER = ("caption", "interleaved", "text")
OF_ARMS = ("fits", "frontier", "isoflop", "fit_curves", "holdout")
"""Fields that are kept by arm and come from `_arm_laws`."""
SAME_SIZE = 1.10
"""Arms' sizes within this factor are one size tier (they are matched within 5 %)."""


def analyse(out: Path, rows: list[dict[str, Any]] | None = None, *, pool: Executor | None = None) -> Analysis:
    """Compute the analysis of a study folder and write it to <out>/analysis.json.

    `rows` defaults to every row of the study's ledger, tuning and excluded runs included. `pool`: where half of the
    arms are fitted meanwhile, e.g. a ProcessPoolExecutor; the same numbers, sooner. Raises InputError when no run has
    finished.
    """
    from isofusion.study.ledger import results, unread
    from isofusion.study.lock import write_atomic

    out = Path(out)
    lost = unread(out) if rows is None else []
    if rows is None:
        rows = results(out, all_runs=True)
    excluded = [r for r in rows if r.get("excluded")]
    sweep = [r for r in rows if r.get("variant") and not r.get("excluded")]
    main = [r for r in rows if not r.get("variant") and not r.get("excluded")]
    if not main and lost:
        more = f" (and those of {len(lost) - 1} more)" if len(lost) > 1 else ""
        raise InputError(f"{out}: no finished run can be reported: {lost[0]}{more}: {advice.UNREAD}")
    if not main:
        raise InputError(f"{out}: no run has finished yet; let `isofusion study run` finish at least one branch")
    lock = methods.read_json(out / "study.lock") or {}
    spec = lock.get("spec", {})
    compute = spec.get("compute", "exact")
    column = "flops" if compute == "exact" else "flops_6nd"
    domains = [d for d in DOMAIN_ORDER if any(number(r.get(f"loss_{d}")) is not None for r in main)]
    if not domains:
        raise InputError(f"{out}: no finished run has a validation loss; look at eval.json in its run folders")
    arms = _arm_order(main, spec)
    tiers = _tiers(main)
    points = [_point(r, domains, column, tiers) for r in main]
    a: Analysis = {"schema": 1, "points": points, "unread": lost}
    a["study"] = _study(out, spec, main, points, arms, domains, tiers, compute)
    a["arms"] = {arm: _arm(arm, main, points) for arm in arms}
    a["entropy"] = _entropy(out, main, domains)
    a["study"]["reducible"] = all(a["entropy"][d]["oracle"] is not None for d in domains)
    _laws(a, main, arms, domains, compute, tiers, pool)
    pairs = [(p["first"], p["second"]) for p in a["differences"]]
    a["classes"] = evidence.classes(out, main)
    a["fusion"] = evidence.fusion(a["classes"])
    a["fusion_compare"] = evidence.fusion_compare(out, main, pairs, tiers)
    a["image_use"] = evidence.image_use(out, main)
    a["experts"] = evidence.experts(out, main)
    a["noise"] = _noise(a, domains)
    a["tuning"] = evidence.tuning(main, sweep, arms)
    a["training"] = evidence.training_curves(out, main, tiers)
    sizes = speeds.speeds(out, main, tiers)
    a["speed"] = {"sizes": sizes, "pairs": speeds.at_equal_flops(sizes, pairs)}
    a["below_bound"] = _below_bound(main, a["noise"], domains)
    a["methods"] = methods.methods(out, lock, main, sweep, excluded, a)
    a["answer"] = advice.answer(a)
    for by_domain in a["frontier"].values():  # draws served the comparisons; they are not part of the record
        for front in by_domain.values():
            front.pop("draws", None)
            front.pop("draws_free", None)
    a["warnings"] = advice.warnings(a)
    a["cannot"] = advice.cannot_say(a)
    a = plain(a)
    write_atomic(out / "analysis.json", json.dumps(a, indent=1, allow_nan=False) + "\n")
    return a


def plain(value: Any) -> Any:
    """Numbers, strings, lists and dicts only; a number that is not finite becomes None."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, (int, np.integer)):
        return int(value)
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    return value


def _arm_order(rows: list[dict[str, Any]], spec: dict[str, Any]) -> list[str]:
    present = list(dict.fromkeys(r["arm"] for r in rows))
    named = [arm.get("name") for arm in spec.get("arms", [])]
    return [arm for arm in named if arm in present] + [arm for arm in present if arm not in named]


def _tiers(rows: list[dict[str, Any]]) -> dict[float, str]:
    """N -> name of its size tier: the arms' own label where they agree, with N beside it."""
    n = np.array(sorted({float(r["n"]) for r in rows}))
    names = {}
    tier = clusters(n, SAME_SIZE)
    for t in range(int(tier.max()) + 1):
        members = n[tier == t]
        labels = {str(r["size"]) for r in rows if float(r["n"]) in members}
        middle = si(float(np.exp(np.log(members).mean())))
        for value in members:
            names[float(value)] = f"{labels.copy().pop()} ({middle})" if len(labels) == 1 else middle
    return names


def _point(r: dict[str, Any], domains: list[str], column: str, tiers: dict[float, str]) -> dict[str, Any]:
    loss = {d: number(r.get(f"loss_{d}")) for d in domains}
    known = [v for v in loss.values() if v is not None]
    mean = number(r.get("loss_mean"))
    loss["mean"] = mean if mean is not None else (float(np.mean(known)) if len(known) == len(domains) else None)
    point = {"run": r["run"], "arm": r["arm"], "size": tiers[float(r["n"])], "seed": r["seed"], "steps": r["steps"]}
    numbers = {"n": float(r["n"]), "d": float(r["tokens"]), "c": float(r[column]), "trunk": r.get("parent") or r["run"]}
    return point | numbers | {"loss": loss}


def _study(
    out: Path,
    spec: dict[str, Any],
    rows: list[dict[str, Any]],
    points: list[dict[str, Any]],
    arms: list[str],
    domains: list[str],
    tiers: dict[float, str],
    compute: str,
) -> dict[str, Any]:
    tops = [max(p["c"] for p in points if p["arm"] == arm) for arm in arms]
    return {
        "name": spec.get("name") or out.name,
        "title": spec.get("title") or spec.get("name") or out.name,
        "description": spec.get("description", ""),
        "assumed": spec.get("assumed", ""),
        "runs": len(points),
        "arms": arms,
        "domains": domains,
        "sizes": list(dict.fromkeys(tiers[n] for n in sorted(tiers))),
        "seeds": sorted({r["seed"] for r in rows}),
        "world": all(s.get("format") == "world" for s in spec.get("data", {}).get("sources", [])) and bool(spec),
        "compute_axis": compute,
        "compute_label": "C, FLOPs (exact ledger)" if compute == "exact" else "C, FLOPs (6ND)",
        "level": LEVEL,
        "c_min": min(p["c"] for p in points),
        "c_max": max(p["c"] for p in points),
        "c_ref": min(tops),
    }


def _arm(arm: str, rows: list[dict[str, Any]], points: list[dict[str, Any]]) -> dict[str, Any]:
    mine = [r for r in rows if r["arm"] == arm]
    pts = [p for p in points if p["arm"] == arm]
    spans = {k: [min(p[k] for p in pts), max(p[k] for p in pts)] for k in ("n", "d", "c")}
    sizes = {}
    for r in sorted(mine, key=lambda r: r["n"]):
        keys = ("n", "n_total", "n_active", "n_encoder", "n_decoder", "n_nonembedding", "width", "depth")
        sizes[r["size"]] = {k: r.get(k) for k in keys}
    return {
        "fusion": mine[0]["fusion"],
        "n_experts": mine[0]["n_experts"],
        "routing": mine[0].get("routing"),
        "runs": len(mine),
        "sizes": sizes,
        "range": spans,
        "n_word": "active parameters" if mine[0]["n_experts"] else "parameters",
    }


def _entropy(out: Path, rows: list[dict[str, Any]], domains: list[str]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    longest = max(rows, key=lambda r: r["tokens"])
    entries = evidence.load_eval(out, longest).get("domains", {})
    for domain in domains:
        oracles = [v for r in rows if (v := number(r.get(f"oracle_{domain}"))) is not None]
        found[domain] = {
            "oracle": float(np.mean(oracles)) if len(oracles) == len(rows) else None,
            "bound": number(longest.get(f"bound_{domain}")),
            "text_oracle": number(entries.get(domain, {}).get("text_oracle")),
            "chance": number(entries.get(domain, {}).get("chance")),
        }
    known = [found[d]["oracle"] for d in domains]
    found["mean"] = {"oracle": float(np.mean(known)) if None not in known else None, "bound": None, "chance": None}
    return found


def _laws(
    a: Analysis,
    rows: list[dict[str, Any]],
    arms: list[str],
    domains: list[str],
    compute: str,
    tiers: dict[float, str],
    pool: Executor | None,
) -> None:
    """Fill fits, frontier, fit_curves, differences, holdout and predicted; every second arm is fitted in the pool."""
    c_ref = a["study"]["c_ref"]
    grid = np.concatenate([np.geomspace(a["study"]["c_min"], c_ref, 25), np.geomspace(c_ref, 10 * c_ref, 10)[1:]])
    a |= {key: {} for key in OF_ARMS} | {"predicted": [], "differences": []}
    budgets = isoflop.common_budgets(a["points"], arms)
    started = {}
    for i, arm in enumerate(arms):
        mine = [p for p in a["points"] if p["arm"] == arm]
        c_max = a["arms"][arm]["range"]["c"][1]
        where = pool if i % 2 else None
        started[arm] = aside(where, _arm_laws, rows, arm, domains, compute, tiers, mine, grid, c_max, budgets)
    laws = {arm: started[arm]() for arm in [*arms[::2], *arms[1::2]]}  # those of the pool are computed meanwhile
    for arm in arms:
        found = laws[arm]
        for key in OF_ARMS:
            a[key][arm] = found[key]
        a["predicted"] += found["predicted"]
    for first, second, label in _pairs(a):
        a["differences"].append(_difference(a, first, second, label))


def _arm_laws(
    rows: list[dict[str, Any]],
    arm: str,
    domains: list[str],
    compute: str,
    tiers: dict[float, str],
    points: list[dict[str, Any]],
    grid_G: np.ndarray,
    c_max: float,
    budgets: list[float],
) -> dict[str, Any]:
    """One arm's fits, frontier, fit_curves and holdout by domain, its isoFLOPs, and its part of predicted."""
    out: dict[str, Any] = {key: {} for key in OF_ARMS} | {"isoflop": [], "predicted": []}
    fits, fronts = out["fits"], out["frontier"]
    try:
        laws = lawside.fit_arm(rows, arm, domains, compute)
    except InputError as error:
        for domain in domains:
            fits[domain] = {"ok": False, "reason": str(error), "power": {"ok": False, "reason": str(error)}}
        return out
    for domain in domains:
        fits[domain] = lawside.fit_entry(laws, domain)
        fits[domain]["power"] = lawside.power_entry(laws.runs.get(domain))
        out["fit_curves"][domain] = lawside.fit_curves(laws, domain, tiers)
        held = lawside.holdout(laws, domain, points)
        out["holdout"][domain] = held
        out["predicted"] += _predicted(arm, domain, points, held, laws)
        fronts[domain] = lawside.frontier(laws, [domain], grid_G)
    if len(domains) > 1:
        fits["mean"] = {"ok": False, "reason": "the mean over domains is not fitted; it is the mean of their laws"}
        fits["mean"]["power"] = lawside.power_of_mean(rows, arm, compute)
        fronts["mean"] = lawside.frontier(laws, domains, grid_G)
    out["isoflop"] = isoflop.at_budgets(laws, domains, budgets)
    out["frontier"] = {key: front for key, front in fronts.items() if front}
    for key, front in out["frontier"].items():
        fits[key]["frontier_slopes"] = lawside.regression(front, c_max)
    return out


def _predicted(
    arm: str, domain: str, points: list[dict[str, Any]], held: dict[str, Any], laws: lawside.ArmLaws
) -> list[dict[str, Any]]:
    """Observed and predicted losses: held-out runs from the law without them, the others from the same law."""
    fit = held.pop("fit", None) or laws.fits.get(domain)
    held_n = held.pop("held_n", float("inf"))
    if fit is None:
        return []
    found = []
    for p in points:
        if p["loss"].get(domain) is None:
            continue
        out = p["n"] >= held_n
        value = float(fit.predict(p["n"], p["d"]))
        found.append(
            {
                "run": p["run"],
                "arm": arm,
                "domain": domain,
                "observed": p["loss"][domain],
                "predicted": value,
                "heldout": out,
            }
        )
    return found


def _pairs(a: Analysis) -> list[tuple[str, str, str]]:
    """(first, second, label): early − late, each expert arm − its dense arm, modality-routed − agnostic."""
    arms = a["arms"]
    dense = {info["fusion"]: arm for arm, info in reversed(arms.items()) if not info["n_experts"]}
    found = []
    if {"early", "late"} <= dense.keys():
        found.append((dense["early"], dense["late"]))
    experts = [arm for arm, info in arms.items() if info["n_experts"]]
    found += [(arm, dense[arms[arm]["fusion"]]) for arm in experts if arms[arm]["fusion"] in dense]
    for i, one in enumerate(experts):
        found += [(two, one) for two in experts[i + 1 :] if arms[one]["fusion"] == arms[two]["fusion"]]
    return [(one, two, f"{one} − {two}") for one, two in found]


def _difference(a: Analysis, first: str, second: str, label: str) -> dict[str, Any]:
    item: dict[str, Any] = {"first": first, "second": second, "label": label}
    item |= {"at_equal_compute": {}, "at_ref": {}, "at_ten": {}, "matched": {}, "by_size": {}, "overall": {}}
    c_ref = a["study"]["c_ref"]
    for domain in [*a["study"]["domains"], "mean"]:
        one, two = (a["frontier"][arm].get(domain) for arm in (first, second))
        if one and two:
            curve = lawside.difference(one, two)
            item["at_equal_compute"][domain] = curve
            free = lawside.difference(one, two, free=True)
            for key, c, source in (("at_ref", c_ref, curve), ("at_ten", 10 * c_ref, free)):
                i = int(np.argmin(np.abs(np.log(np.array(curve["c"]) / c))))
                lo, hi = source["lo"][i], source["hi"][i]
                entry = {"c": curve["c"][i], "diff": source["diff"][i], "lo": lo, "hi": hi}
                item[key][domain] = entry | {"verdict": evidence.verdict(lo, hi)}
        pairs = lawside.matched(a["points"], first, second, domain)
        item["matched"][domain] = pairs
        item["by_size"][domain] = lawside.by_size(pairs)
        item["overall"][domain] = lawside.overall(pairs)
    return item


def _noise(a: Analysis, domains: list[str]) -> dict[str, Any]:
    """Seed spread per domain and, beside it, the residual spread of the fits (nats/token) and their ratio."""
    found = evidence.noise(a["points"], domains)
    at = {(p["run"]): p for p in a["points"]}
    for domain in domains:
        squares, freedom = 0.0, 0
        for arm, by_domain in a["fit_curves"].items():
            entry = a["fits"][arm].get(domain, {})
            if not by_domain.get(domain) or not entry.get("ok"):
                continue
            mine = [p for p in at.values() if p["arm"] == arm and p["loss"].get(domain) is not None]
            law = [
                entry["E"] + entry["A"] / p["n"] ** entry["alpha"] + entry["B"] / p["d"] ** entry["beta"] for p in mine
            ]
            gaps = np.array([p["loss"][domain] for p in mine]) - np.array(law)
            squares += float((gaps**2).sum())
            freedom += max(len(mine) - 5, 1)
        if freedom:
            entry = found.setdefault(domain, {"sd": None, "groups": 0, "freedom": 0})
            entry["residual_sd"] = math.sqrt(squares / freedom)
            entry["ratio"] = entry["residual_sd"] / entry["sd"] if entry["sd"] else None
    return found


def _below_bound(rows: list[dict[str, Any]], noise: dict[str, Any], domains: list[str]) -> list[dict[str, Any]]:
    """Runs whose loss is under the learner's bound by more than twice the seed spread: a leak, or a wrong bound."""
    found = []
    for r in rows:
        for d in domains:
            loss, bound = number(r.get(f"loss_{d}")), number(r.get(f"bound_{d}"))
            slack = 2 * (noise.get(d, {}).get("sd") or 0.0)
            if loss is not None and bound is not None and loss < bound - slack:
                found.append({"run": r["run"], "domain": d, "loss": loss, "bound": bound})
    return found
