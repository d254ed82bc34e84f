"""The sentences under the figures and at the top of the page, written from the numbers of this study.

Each function takes the analysis and returns plain text. Where a difference may be 0 the sentence says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from isofusion.laws.holdout import Beside
from isofusion.report.advice import mean_key
from isofusion.report.figures import NAMES
from isofusion.report.words import fixed, interval, listed, percent, power, si

Analysis = dict[str, Any]
SURE = 1.96
"""Standard errors below chance before a loss is called below it."""


def headline(a: Analysis) -> list[str]:
    """The answer: which architecture, N and D at which budget, and how sure."""
    s, found = a["study"], []
    ref, ten, best_run = a["answer"]["ref"], a["answer"]["ten"], a["answer"]["best_run"]
    if ref is None:
        failed = ((arm, domain, f) for arm, by in a["fits"].items() for domain, f in by.items() if not f.get("ok"))
        reason = next((f"{arm} / {domain}: {f['reason']}" for arm, domain, f in failed), "no fit")
        found.append(f"No law could be fitted, so there is no compute-optimal answer ({reason}).")
        if best_run:
            found.append(
                f"The best run is {best_run['run']}: {fixed(best_run['loss'])} nats/token with N = {si(best_run['n'])} "
                f"and D = {si(best_run['d'])} at {power(best_run['c'])} FLOPs. One run is not a recommendation."
            )
        return found
    best = ref["arms"][0]
    lead = "Train" if len(s["arms"]) == 1 or ref["clear"] else "On the numbers alone, train"
    found.append(
        f"{lead} {best['arm']} with N = {si(best['n'])} {interval(best['n_interval'], how=si)} "
        f"{a['arms'][best['arm']]['n_word']} on D = {si(best['d'])} {interval(best['d_interval'], how=si)} tokens "
        f"(D/N = {si(best['ratio'])}) for {power(ref['c'])} FLOPs, the largest budget every arm reached. Its laws "
        f"predict {fixed(best['loss'])} {interval(best['loss_interval'])} nats/token, {_mean_words(a)}."
    )
    if best["extrapolated"]:
        n, d = a["arms"][best["arm"]]["range"]["n"], a["arms"][best["arm"]]["range"]["d"]
        found.append(
            f"That optimum lies outside what was trained ({si(n[0])}–{si(n[1])} {a['arms'][best['arm']]['n_word']}, "
            f"{si(d[0])}–{si(d[1])} tokens), so its N and D lean on the laws; the loss is for the trained sizes."
        )
    found += _how_sure(ref, s["level"])
    if a["answer"]["without_law"]:
        found.append(f"No law, and so no rank, for {listed(a['answer']['without_law'])}.")
    if ten:
        r = ten["arms"][0]
        sure = (
            f"it is best in {percent(r['p_best'], 0)} of the draws"
            if len(ten["arms"]) > 1
            else "there is no other arm to compare"
        )
        found.append(
            f"At ten times that, {power(ten['c'])} FLOPs (extrapolated): {r['arm']}, N = {si(r['n'])} "
            f"{interval(r['n_interval'], how=si)}, D = {si(r['d'])} {interval(r['d_interval'], how=si)}, loss "
            f"{fixed(r['loss'])} {interval(r['loss_interval'])}; {sure}."
        )
    return found


def _mean_words(a: Analysis) -> str:
    domains = a["study"]["domains"]
    return f"the mean over {listed([NAMES[d] for d in domains])}" if len(domains) > 1 else f"on {NAMES[domains[0]]}"


def _how_sure(ref: dict[str, Any], level: float) -> list[str]:
    rows = ref["arms"]
    if len(rows) < 2:
        return []
    best, second = rows[0], rows[1]
    gap = f"{second['arm']} is {fixed(second['gap'])} {interval(second['gap_interval'])} nats/token behind"
    if ref["clear"]:
        return [
            f"How sure: {gap}, and every other arm's {percent(level, 0)} interval excludes 0; {best['arm']} is best in "
            f"{percent(best['p_best'], 0)} of the bootstrap draws."
        ]
    beaten = [r["arm"] for r in rows[1:] if r["worse"]]
    more = f" It does beat {listed(beaten)}." if beaten else ""
    return [
        f"How sure: not enough to choose. {gap}, an interval with 0 inside or at its edge, so this study cannot "
        f"say whether {best['arm']} is better than {listed(ref['tied'])}; best in {percent(best['p_best'], 0)} of "
        f"the draws.{more}"
    ]


def loss_against_flops(a: Analysis) -> str:
    key = mean_key(a)
    text = f"{a['study']['runs']} runs; lines: compute-optimal loss of each arm's law, N inside the trained sizes, "
    text += f"with {percent(a['study']['level'], 0)} bands"
    text += "; dashes tell arms apart, no more." if len(a["study"]["arms"]) > 1 else "."
    rows = (a["answer"]["ref"] or {"arms": []})["arms"]
    if rows:
        at = "; ".join(f"{r['arm']} {fixed(r['loss'])} {interval(r['loss_interval'])}" for r in rows)
        text += f" At {power(a['answer']['ref']['c'])} FLOPs the {NAMES[key]} loss is: {at} nats/token."
    oracle = a["entropy"][key]["oracle"]
    if oracle is not None:
        text += f" Dotted: the oracle entropy, {fixed(oracle)} nats/token, which no model can pass."
    return text


def isoflops(a: Analysis) -> str:
    budgets = {arm: found for arm, found in a["isoflop"].items() if found}
    moved = max(b["moved"] for found in budgets.values() for b in found)
    c = max(b["c"] for found in budgets.values() for b in found)
    text = (
        f"IsoFLOPs of the {NAMES[mean_key(a)]} loss: runs of several sizes at one compute; the laws only move each "
        f"run's loss to the panel's FLOPs (by {percent(moved)} at most). Lines: parabolas in log N; rings: their "
        "lowest points. No intervals are drawn, most points are single runs: the differences below say what is shown."
    )
    parts = []
    for arm, found in budgets.items():
        at = next((b for b in found if b["c"] == c), None)
        if at is None or at["lowest"] is None:
            parts.append(f"{arm} has none between its sizes")
            continue
        own = _law_size(a, arm, c)
        law = f" (its laws: {si(own)})" if own is not None else ""
        parts.append(f"{arm} {fixed(at['lowest_loss'])} at N = {si(at['lowest'])}{law}")
    absent = [arm for arm in a["study"]["arms"] if arm not in budgets]
    left = f" Without a law in every domain, or four sizes at one compute: {listed(absent)}." if absent else ""
    return f"{text} Lowest at {power(c)} FLOPs: {'; '.join(parts)}.{left}"


def _law_size(a: Analysis, arm: str, c: float) -> float | None:
    """Compute-optimal N of an arm's laws at c FLOPs, between the points of its frontier."""
    front = a["frontier"].get(arm, {}).get(mean_key(a))
    if not front or not front["c"][0] <= c <= front["c"][-1]:
        return None
    return float(np.exp(np.interp(np.log(c), np.log(front["c"]), np.log(front["n"]))))


def scaling_per_arm(a: Analysis) -> str:
    parts = []
    for arm, by_domain in a["fits"].items():
        power_law = (by_domain.get(mean_key(a)) or {}).get("power") or {}
        if power_law.get("ok"):
            parts.append(f"{arm} {power_law['k']:.3g}·C^{fixed(power_law['c'], 4)}")
    what = "Loss above the oracle entropy" if a["study"]["reducible"] else "Loss"
    text = f"{what} on log axes; lines: the law at each size; dashed: k·C^c through the lower envelope."
    if parts:
        text += f" For the {NAMES[mean_key(a)]} loss the envelope follows {'; '.join(parts)}."
    failed = [f"{arm} / {d}" for arm, by in a["fits"].items() for d, f in by.items() if d != "mean" and not f.get("ok")]
    return text + (f" No law for {listed(failed)}." if failed else "")


def differences(a: Analysis) -> str:
    key, parts = mean_key(a), []
    for pair in a["differences"]:
        at, run = pair["at_ref"].get(key), pair["overall"].get(key)
        words = []
        if at:
            sure = {"lower": f"{pair['first']} is better", "higher": f"{pair['second']} is better"}.get(
                at["verdict"], "cannot say"
            )
            words.append(
                f"{fixed(at['diff'], sign=True)} {interval((at['lo'], at['hi']))} at {power(at['c'])} FLOPs ({sure})"
            )
        if run:
            sure = {"lower": f"{pair['first']} lower", "higher": f"{pair['second']} lower"}.get(
                run["verdict"], "cannot say"
            )
            words.append(
                f"{fixed(run['diff'], sign=True)} {interval((run['lo'], run['hi']))} over {run['pairs']} matched runs "
                f"({sure})"
            )
        if words:
            parts.append(f"{pair['label']}: {' and '.join(words)}")
    text = (
        "Below 0 the first arm is better. Bands: laws at equal compute; circles: runs of one size, seed and token "
        "budget; dots: their mean per size, with an interval where seeds repeat. Matched runs have equal N (active N "
        "for experts) and D, not equal C. A narrow screen shows the mean only."
    )
    return f"{text} In nats/token, {NAMES[key]}: {'. '.join(parts)}." if parts else text


def compute_optimal(a: Analysis) -> str:
    parts = []
    for arm, by_domain in a["fits"].items():
        slopes = (by_domain.get(mean_key(a)) or {}).get("frontier_slopes")
        if slopes and slopes["d"] is not None:
            parts.append(f"{arm} N ∝ C^{fixed(slopes['a'])}, D ∝ C^{fixed(slopes['b'])}")
    text = "Optimum of the mean of the domains' laws at the FLOPs each token really cost; dashed: outside the runs."
    if parts:
        text += f" {'; '.join(parts)}."
    for r in (a["answer"]["ref"] or {"arms": []})["arms"][:1]:
        text += (
            f" At {power(a['answer']['ref']['c'])} FLOPs {r['arm']} wants {si(r['ratio'])} "
            f"{interval(r['ratio_interval'], how=si)} tokens per parameter."
        )
    fronts = [by_domain.get(mean_key(a)) or {} for by_domain in a["frontier"].values()]
    if any(None in front.get(f"{k}_{end}", []) for front in fronts for k in ("n", "d") for end in ("lo", "hi")):
        text += " Where a band runs off the axes, that end is not known."
    return text


def predicted_against_observed(a: Analysis) -> str:
    parts = []
    for arm, by_domain in a["holdout"].items():
        good = [h for h in by_domain.values() if h.get("ok")]
        if good:
            ours = sum(h["error_reducible"] for h in good) / len(good)
            parts.append(f"{arm} {percent(ours)}{_carried_over(good)}")
    text = "Open: runs the law was fitted on. Filled: the largest size, held out. On the line the prediction is exact."
    if not parts:
        return text + " No hold-out test was possible with these sizes."
    return f"{text} Mean absolute error of the hold-out, relative to the reducible loss: {'; '.join(parts)}."


def _carried_over(tests: list[dict[str, Any]]) -> str:
    """The baseline's mean error over the domains where it predicts something; the law's there where that is less."""
    pairs = [(Beside.of(h["beside"]["carry_over"]), h["runs"]) for h in tests if h["beside"]["carry_over"]["runs"]]
    if not pairs:
        return ""
    base, law = (
        percent(sum(errors) / len(pairs)) for errors in zip(*((p.baseline, p.law) for p, _ in pairs), strict=True)
    )
    whole = len(pairs) == len(tests) and all(p.runs == runs for p, runs in pairs)
    return f" (next smaller size carried over: {base}{'' if whole else f'; the law on the same runs: {law}'})"


def loss_by_class(a: Analysis) -> str:
    text = "Each arm's largest run. "
    if any(r.get("oracle") is not None for r in a["classes"]):
        text += "Ticks: oracle entropy (what no model can pass), learner's bound at this D, chance. "
    elif any(r.get("chance") is not None for r in a["classes"]):
        text += "Ticks: chance, a guess among all tokens. "
    parts, m = [], None
    for arm in a["study"]["arms"]:
        pooled = pooled_fusion(a, arm)
        if pooled is None:
            continue
        m = pooled["log_m"]
        blind = ""
        if pooled["blind"] is not None:
            blind = f"; blind {fixed(pooled['blind'])}, {_against(m, pooled['blind'], pooled['blind_se'])}"
        parts.append(f"{arm} {fixed(pooled['loss'])}, {_against(m, pooled['loss'], pooled['se'])}{blind}")
    if m is not None:
        text += f"All fusion targets together, against their chance level log m = {fixed(m)}: {'. '.join(parts)}. "
    across = [r for r in a["fusion_compare"] if a["arms"][r["first"]]["fusion"] != a["arms"][r["second"]]["fusion"]]
    compared = [
        f"{r['first']} − {r['second']} on {r['class']}: {fixed(r['diff'], sign=True)} {interval((r['lo'], r['hi']))}"
        f" ({'cannot say' if r['verdict'] == 'cannot say' else r['first'] + ' ' + r['verdict']})"
        for r in across
    ]
    if compared:
        text += f"Paired by size, seed and budget, interval over trunks: {'; '.join(compared)}. "
    documents = [
        f"{r['first']} − {r['second']} on {r['class']}: {fixed(d['diff'], sign=True)} (standard error {fixed(d['se'])})"
        for r in across
        if (d := r.get("documents"))
    ]
    if documents:
        text += f"The largest of both, paired by document: {'; '.join(documents)}."
    return text.strip()


def _against(chance: float, loss: float, se: float | None) -> str:
    """Whether a loss is below chance for sure, by its standard error over documents."""
    if not se:
        return "no standard error known"
    says = "below chance" if (chance - loss) / se > SURE else "not clearly below chance"
    return f"{says} (standard error {fixed(se)})"


def pooled_fusion(a: Analysis, arm: str) -> dict[str, Any] | None:
    """Target-weighted fusion loss of an arm's largest run over domains and both question orders."""
    rows = [r for r in a["fusion"] if r["arm"] == arm and r["log_m"] is not None and r["targets"]]
    if not rows:
        return None
    total = sum(r["targets"] for r in rows)

    def mean(field: str) -> float | None:
        if any(r[field] is None for r in rows):
            return None
        return float(sum(r[field] * r["targets"] for r in rows) / total)

    def error(field: str) -> float | None:
        if any(r[field] is None for r in rows):
            return None
        return float(sum((r[field] * r["targets"] / total) ** 2 for r in rows) ** 0.5)

    means = {field: mean(field) for field in ("loss", "blind", "log_m")}
    return means | {"se": error("se"), "blind_se": error("blind_se"), "targets": total}


def image_use(a: Analysis) -> str:
    parts, unsure, alone = [], [], []
    for r in a["image_use"]:
        d = r.get("d_shuffled")
        if d:
            parts.append(
                f"{r['arm']} {r['domain']} {fixed(d['diff'], sign=True)} {interval((d['lo'], d['hi']))}, "
                f"t = {fixed(d['t'], 1)}"
            )
            if d["lo"] <= 0:
                unsure.append(f"{r['arm']} on {NAMES[r['domain']]}")
        elif r["shuffled"] is not None:
            parts.append(
                f"{r['arm']} {r['domain']} {fixed(r['shuffled'] - r['true'], sign=True)} (no documents kept, so no "
                f"interval)"
            )
            unsure.append(f"{r['arm']} on {NAMES[r['domain']]}")
        elif NAMES[r["domain"]] not in alone:
            alone.append(NAMES[r["domain"]])
    text = "Largest run of each arm. No image: grey patches; another image: one of the same set. "
    if alone:
        text += f"Too few validation documents of {listed(alone)} have images to show each another's (data.val_rows). "
    if not parts:
        return text.strip()
    text += f"What another image costs, paired by document, in nats/token: {'; '.join(parts)}. "
    told = [
        f"{NAMES[domain]} {fixed(e['text_oracle'] - e['oracle'])} ({fixed(e['text_oracle'])} − {fixed(e['oracle'])})"
        for domain, e in a["entropy"].items()
        if e.get("text_oracle") is not None and e["oracle"] is not None and e["text_oracle"] > e["oracle"] + 5e-4
    ]
    if told:
        text += f"What the images tell, H(text) − H(text | image), known exactly here: {'; '.join(told)}. "
    if unsure:
        return text + f"This study cannot say whether {listed(unsure)} looks at the image."
    return text + "Every interval is above 0: all of them look at the image."


def tokens_per_expert(a: Analysis) -> str:
    parts = []
    for arm, e in a["experts"].items():
        score = e["balanced"]
        top = max(range(len(score)), key=lambda i: score[i])
        parts.append(
            f"{arm}: {fixed(score[0], 2)} in the first layer, {fixed(score[-1], 2)} in the last, highest in layer "
            f"{top + 1} ({fixed(score[top], 2)}); not corrected for the token mixture, mean "
            f"{fixed(sum(e['score']) / len(e['score']), 2)}"
        )
    return (
        "Share of each modality's validation tokens that an expert takes, largest run. Specialisation, 0 (experts "
        f"blind to modality) to 1 (each expert one modality): {'. '.join(parts)}."
    )


def loss_against_tokens(a: Analysis) -> str:
    trunks = [c for c in a["training"] if c["kind"] == "trunk"]
    text = f"Seed {min(a['study']['seeds'])}; {len(trunks)} trunks at constant learning rate and the cool-downs that "
    text += "branch off them."
    ends = [(c["arm"], c["size"], c["loss"][-1]) for c in a["training"] if c["kind"] == "branch"]
    if ends:
        arm, size, loss = min(ends, key=lambda e: e[2])
        text += f" Lowest training loss at the end of a cool-down: {fixed(loss)} nats/token ({arm}, {size})."
    return text


def speed(a: Analysis) -> str:
    rows, pairs = a["speed"]["sizes"], a["speed"]["pairs"]
    jobs, threads = a["methods"]["jobs"], a["methods"]["threads"]
    text = "Training alone, as it ran"
    if jobs and threads:
        runs = "one run at a time" if jobs == 1 else f"{jobs} runs at a time"
        text += f" ({runs}, {threads} thread{'' if threads == 1 else 's'} each)"
    text += "; FLOPs by the exact ledger."
    for arm in a["study"]["arms"]:
        mine = [r for r in rows if r["arm"] == arm]
        if mine:
            low, high = mine[0], mine[-1]
            text += (
                f" {arm}: {si(low['tokens_per_s'])} tokens/s at N = {si(low['n'])}, {si(high['tokens_per_s'])} at "
                f"{si(high['n'])} ({power(high['flops_per_s'])} FLOP/s)."
            )
    for label in dict.fromkeys(r["label"] for r in pairs):
        ratios = [r["time_ratio"] for r in pairs if r["label"] == label]
        span = f"{min(ratios):.2f} to {max(ratios):.2f}" if len(ratios) > 1 else f"{ratios[0]:.2f}"
        text += f" At equal FLOPs {label} takes {span} times as long."
    if pairs:
        text += " Right: each arm in its colour over the arm it is compared with first in this list; 1 is equally fast."
    return text


CAPTIONS: dict[str, tuple[str, Callable[[Analysis], str]]] = {
    "loss-against-flops": ("Loss against compute", loss_against_flops),
    "isoflops": ("Loss against size at equal compute", isoflops),
    "differences": ("Differences between arms", differences),
    "compute-optimal": ("Compute-optimal size and data", compute_optimal),
    "scaling-per-arm": ("The laws, arm by arm", scaling_per_arm),
    "predicted-against-observed": ("Predicted against observed", predicted_against_observed),
    "loss-by-class": ("Loss by domain and token class", loss_by_class),
    "image-use": ("Does it look at the image?", image_use),
    "tokens-per-expert": ("Who takes which tokens", tokens_per_expert),
    "loss-against-tokens": ("Training", loss_against_tokens),
    "speed": ("Speed", speed),
}
"""Figures in the order of the page: name -> (heading, caption)."""
