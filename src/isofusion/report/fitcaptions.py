"""What each figure of a fit shows, in the numbers of its runs."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from isofusion.laws.analysis import Analysis
from isofusion.laws.frontier import compute_optimal
from isofusion.laws.holdout import HoldOut
from isofusion.laws.isoflop import IsoFlops
from isofusion.laws.profile import Profile
from isofusion.laws.rollout import Rollout
from isofusion.laws.sensitivity import Choice, Sensitivity, times
from isofusion.laws.table import Runs
from isofusion.report.fitbase import drawable, placed
from isofusion.report.fitfigures import choices_reach, isoflop_drawn
from isofusion.report.fitfigures_tests import (
    CLOUD,
    errors_drawn,
    predictions,
    predictions_drawn,
    residual_reach,
    step_errors,
)  # fmt: skip
from isofusion.report.fittables import capital, short
from isofusion.report.words import fixed, interval, percent, power, pretty, si


def left_out(runs: Runs, mask: np.ndarray) -> str:
    """Says which runs lie too far from the others to be drawn, the first by its numbers; nothing where none does."""
    out = np.flatnonzero(~mask)
    if not len(out):
        return ""
    i = out[0]
    first = f"loss {short(float(runs.loss[i]))} at N = {si(runs.n[i])}, D = {si(runs.d[i])}"
    if len(out) == 1:
        return f" One run lies too far from the others to be drawn: {first}."
    return f" {len(out)} runs lie too far from the others to be drawn, one of them with {first}."


def _outside(mask: np.ndarray, what: str) -> str:
    count = int((~mask).sum())
    return f" Outside the axes: {count} {what}." if count else ""


def loss_caption(a: Analysis) -> str:
    """What the first figure shows."""
    r = np.abs(np.expm1(a.fit.residuals))
    text = (
        f"Points: runs, darker is larger. Blue lines: the law along a selection of sizes; it misses the typical run by "
        f"{percent(float(np.median(r)), 2)} of its loss and the worst by {percent(float(r.max()), 2)}. "
        "Orange: the loss of the best size at each compute, with its interval"
    )
    text += ", beyond the last runs extrapolated. " if a.compute > 1.001 * a.runs.c.max() else ". "
    return (
        text
        + "Dashed: k·C^c through the lower envelope of the runs, which needs no law of N and D."
        + (left_out(a.runs, drawable(a.runs)))
    )


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
    text += "." if a.cost.kind == "6nd" else " (closed form for 6ND; the line uses the FLOPs of the runs)."
    if a.intervals and any(None in (row["n_interval"] or [None]) for row in a.answers):
        text += " Where the band runs off the axes, that end is not known."
    return text + left_out(a.runs, drawable(a.runs))


def choices_caption(a: Analysis) -> str:
    """The verdict on the choices."""
    s = a.sensitivity
    assert isinstance(s, Sensitivity)
    gone = sum(1 for r in s.rows if not r.counts and math.isfinite(r.n))
    axis = choices_reach(s)
    far = any(not axis[0] <= r.n <= axis[1] for r in s.shown() if math.isfinite(r.n))
    low, high = (pick(s.counted, key=lambda r: r.n) for pick in (min, max))
    ends = (
        f"N* runs from {si(low.n)} ({_named(low)}; {short(low.tokens_per_parameter)} tokens per parameter) to "
        f"{si(high.n)} ({_named(high)}; {short(high.tokens_per_parameter)})"
    )
    verdict = f"{times(s.spread)}×: undetermined" if s.undetermined else f"within {times(s.spread)}×"
    text = f"The same runs fitted again with one choice changed at a time. {ends}, {verdict}."
    text += f" {gone} fit so much worse that the runs rule them out." if gone else ""
    return text + (" Crosses at the edge lie beyond the axis." if far else "")


def _named(row: Choice) -> str:
    name = "as fitted" if row.group == "default" else row.change if row.group == "law" else f"{row.group}: {row.change}"
    return pretty(name)


def _baselines(test: HoldOut | Rollout, runs: int) -> str:
    """Mean errors of the loss without a law; with the law's, where a baseline predicts some of the runs only."""
    names = {"carry_over": "the next smaller size carried over", "power_law": "k·C^c", "nearest": "the nearest run"}
    found = {name: test.beside(key, reducible=False) for key, name in names.items()}
    cells = {name: pair.cell(runs, lambda v: percent(v, 2)) for name, pair in found.items() if pair.runs}
    return ", ".join(f"{name} {error}" + (f" ({law})" if law else "") for name, (error, law) in cells.items())


def holdout_caption(a: Analysis) -> str:
    """Error of the law against that of the baselines."""
    r = a.rollouts["n"]
    if isinstance(r, Rollout):
        rates = "" if r.hit_rate is None else f"; {percent(r.hit_rate, 0)} of them fall in their 95 % interval (bars)"
        return (
            f"Each of the last {len(r.steps)} sizes predicted from everything smaller. Mean error over "
            f"{len(r.observed)} runs {percent(r.error(reducible=False), 2)} of the loss{rates}. "
            f"Baselines: {_baselines(r, len(r.observed))}. A law earns its keep where it beats all three."
            + _outside(predictions_drawn(predictions(a)), "of the held-out runs")
            + _outside(errors_drawn(step_errors(a)), "of the errors of single steps")
        )
    assert isinstance(a.held, HoldOut)
    error = percent(a.held.error(a.held.predicted, False), 2)
    text = f"The largest size predicted from the others: mean error {error} of the loss. "
    text += f"Baselines: {_baselines(a.held, len(a.held.held))}."
    return text + _outside(predictions_drawn(predictions(a)), "of the held-out runs")


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
    return f"{text}. {capital(found.bias_sentence)}.{_outside(isoflop_drawn(found), 'of the runs')}"


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
        f"Band: twice the typical residual, ±{percent(band, 2)}; {out} of {len(r)} runs lie outside it (5 % would if "
        f"residuals were normal). Rank correlation of the residuals: {' and '.join(parts)}. A trend or a bend here is "
        f"structure the law does not describe.{' Orange crosses lie beyond the axis.' if beyond else ''}"
    ) + left_out(a.runs, placed(a.runs))


def profiles_caption(a: Analysis) -> str:
    """Where profiles close, and where they do not."""
    parts, flat = [], []
    for name, p in a.profiles.items():
        if not isinstance(p, Profile):
            continue
        how = si if name == "N*" else short
        shown = {"alpha": "α", "beta": "β"}.get(name, name)
        parts.append(f"{shown} {how(p.estimate)} {interval((p.low, p.high), how=how)}")
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
    lost = int(compute_optimal(a.fit, a.compute, cost=a.cost, params=draws).edge.sum())
    return (
        f"{len(draws)} bootstrap draws ({a.intervals.note}), {min(CLOUD, len(draws))} of them drawn; orange: the fit. "
        f"α and β correlate by {fixed(corr, 2, sign=True)}. Then best size and tokens at {power(a.compute)} FLOPs"
        f"{f' where a draw has them ({lost} have not)' if lost else ''}; a draw with more parameters has fewer tokens, "
        "since both spend the same compute."
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
