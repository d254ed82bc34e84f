"""What the laws say about each arm: fits with intervals, compute-optimal N and D, differences, hold-out.

The fits are isofusion.laws'. Here they are combined: the mean over domains is the mean of the domains' laws (it is not
fitted as one power law), compute is the one the runs really spent, C = k(N)·D with k interpolated between the sizes,
because 6ND is off at small scale. Draws of an arm's domains share one seed, so that the luck of a trunk, which hits all
domains at once, is not averaged away; their branches share it too, which errs on the wide side. Draws of different arms
are independent, which overstates the uncertainty of a difference when arms share their data's luck.
Legend: S draws, G compute values, K sizes on the search grid.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from isofusion.errors import InputError
from isofusion.laws.bootstrap import Intervals, bootstrap
from isofusion.laws.doubt import law_warnings
from isofusion.laws.fit import LawFit, fit_law
from isofusion.laws.forms import Params
from isofusion.laws.frontier import Cost, envelope, exponents, regress_allocation
from isofusion.laws.holdout import hold_out, largest_size, leave_one_size_out
from isofusion.laws.interval import interval
from isofusion.laws.rollout import BASELINES
from isofusion.laws.table import Runs
from isofusion.report.evidence import LEVEL, t_interval, verdict

Array = npt.NDArray[np.float64]
DRAWS = 400
SEARCH = 220
"""Model sizes tried per compute value when the optimum is looked for."""


@dataclass(frozen=True)
class ArmLaws:
    """One arm: its runs, cost, and per domain the fit and its draws (a domain that failed is absent)."""

    arm: str
    runs: dict[str, Runs]
    cost: Cost
    fits: dict[str, LawFit]
    intervals: dict[str, Intervals]
    failures: dict[str, str]


def fit_arm(rows: list[dict[str, Any]], arm: str, domains: list[str], compute: str) -> ArmLaws:
    """Fit every domain of an arm; what cannot be fitted is kept with its reason."""
    runs: dict[str, Runs] = {}
    fits: dict[str, LawFit] = {}
    intervals: dict[str, Intervals] = {}
    failures: dict[str, str] = {}
    for domain in domains:
        try:
            runs[domain] = Runs.from_results(rows, arm, domain, compute=compute)
            fits[domain] = fit_law(runs[domain])
            intervals[domain] = bootstrap(fits[domain], DRAWS, level=LEVEL, seed=zlib.crc32(arm.encode()))
        except (InputError, np.linalg.LinAlgError, FloatingPointError, ValueError) as error:
            fits.pop(domain, None)
            failures[domain] = _why(error, arm, domain)
    if not runs:
        raise InputError(f"no domain has usable losses: {'; '.join(failures.values())}")
    return ArmLaws(arm, runs, smooth_cost(next(iter(runs.values()))), fits, intervals, failures)


def _why(error: Exception, arm: str, domain: str) -> str:
    """What an error says, without the name of the arm and domain that it is kept under."""
    text = str(error)
    for known in (f"{arm} / {domain}: ", f"results, arm {arm}, domain {domain}: "):
        text = text.replace(known, "")
    return text or type(error).__name__


def smooth_cost(runs: Runs) -> Cost:
    """FLOPs per token against N as a parabola in log-log, with its tangents beyond the sizes.

    The optimum divides slopes of loss by slopes of cost: interpolated cost has kinks at the sizes, and they would show
    as steps in D/N. Falls back on the measured cost with fewer than three sizes, or where a parabola misses it by 2 %.
    """
    measured = Cost.measured(runs)
    if len(measured.log_n) < 3:
        return measured
    centre = float(measured.log_n.mean())
    poly = np.polynomial.Polynomial.fit(measured.log_n - centre, measured.log_k, 2).convert()
    low, high = measured.log_n[0] - centre, measured.log_n[-1] - centre
    if np.abs(poly(measured.log_n - centre) - measured.log_k).max() > 0.02 or min(poly.deriv()([low, high])) <= 0:
        return measured
    x = np.linspace(low - np.log(1e4), high + np.log(1e4), 801)
    inside = np.clip(x, low, high)
    log_k = poly(inside) + poly.deriv()(inside) * (x - inside)
    return Cost("measured", x + centre, log_k, float(poly.deriv()(high)), measured.spread)


def fit_entry(laws: ArmLaws, domain: str) -> dict[str, Any]:
    """The fit as plain numbers: parameters, exponents a, b, d in closed form, and their intervals."""
    if domain not in laws.fits:
        return {"ok": False, "reason": laws.failures.get(domain, "not fitted")}
    fit, drawn = laws.fits[domain], laws.intervals[domain]
    quantities = {
        "E": lambda p: p.E,
        "A": lambda p: p.A,
        "alpha": lambda p: p.alpha,
        "B": lambda p: p.B,
        "beta": lambda p: p.beta,
        "a": lambda p: exponents(p)["a"],
        "b": lambda p: exponents(p)["b"],
        "d": lambda p: exponents(p)["d"],
    }
    residual = float(fit.residual_spread)
    entry: dict[str, Any] = {
        "ok": True,
        "runs": len(fit.runs),
        "residual_spread": residual,
        "share_at_bound": drawn.share_at_bound,
        "noise": drawn.noise.to_dict(),
        "warnings": [{"code": w.code, "message": w.message} for w in law_warnings(fit, drawn)],
        "interval": {},
        "refused": {},
    }
    for name, quantity in quantities.items():
        entry[name] = float(np.asarray(quantity(fit.params)))
        refused = drawn.refusal(name)
        entry["interval"][name] = None if refused else [float(v) for v in drawn.of(quantity)]
        if refused:
            entry["refused"][name] = refused
    oracle = fit.runs.oracle
    entry["oracle"] = None if oracle is None else float(np.mean(oracle))
    slopes = regress_allocation(fit)
    entry["regression"] = None if slopes is None else slopes.to_dict()
    return entry


def power_entry(runs: Runs | None) -> dict[str, Any]:
    """L = k C^c through the lower envelope of the runs (and with a floor), or the reason why there is none."""
    if runs is None:
        return {"ok": False, "reason": "no usable losses"}
    try:
        hull = envelope(runs)
    except InputError as error:
        return {"ok": False, "reason": str(error)}
    found = hull.to_dict()
    return {
        "ok": True,
        "k": found["k"],
        "c": found["exponent"],
        "spread": found["spread"],
        "range": found["c_range"],
        "floor": {
            "k": found["k_floor"],
            "c": found["exponent_floor"],
            "E": found["floor"],
            "spread": found["spread_floor"],
        },
    }


def power_of_mean(rows: list[dict[str, Any]], arm: str, compute: str) -> dict[str, Any]:
    """L = k C^c of the mean over domains: the paper's "AVG" row, a description and not a law of its own."""
    try:
        return power_entry(Runs.from_results(rows, arm, "mean", compute=compute))
    except InputError as error:
        return {"ok": False, "reason": str(error)}


def mean_loss(params: list[Params], n: Array, d: Array) -> Array:
    """Mean over domains of the laws' losses at (n, d)."""
    total = params[0].predict(n, d)
    for other in params[1:]:
        total = total + other.predict(n, d)
    return np.asarray(total / len(params))


def frontier(laws: ArmLaws, domains: list[str], grid_G: Array) -> dict[str, Any] | None:
    """Compute-optimal loss, N, D and D/N over a grid of compute, with intervals; None unless every domain has a law.

    `n`, `d`, `ratio` and `loss_free` are the free optimum; `loss` keeps N inside the trained sizes, as comparisons of
    arms must, so that no arm wins by a size nobody trained. An end that the draws do not tell is None (interval.py).
    """
    if any(domain not in laws.fits for domain in domains):
        return None
    point = [laws.fits[d].params for d in domains]
    drawn = [laws.intervals[d].draws for d in domains]
    ref = laws.runs[domains[0]]
    low_n, high_n = float(ref.n.min()), float(ref.n.max())
    free_K = np.geomspace(low_n / 100, high_n * 300, SEARCH)
    inside_K = np.geomspace(low_n, high_n, 80)
    names = ("loss", "loss_free", "n", "d", "ratio")
    table: dict[str, list[float | None]] = {f"{name}{end}": [] for name in names for end in ("", "_lo", "_hi")}
    inside_SG, free_SG, edge = [], [], []
    for c in grid_G:
        values: dict[str, tuple[Array, Array]] = {}
        for name, n_K in (("loss", inside_K), ("loss_free", free_K)):
            d_K = laws.cost.tokens(c, n_K)
            best = _optimum(mean_loss(point, n_K, d_K)[None], n_K)
            draws = _optimum(mean_loss(drawn, n_K, d_K), n_K)
            values[name] = best[0], draws[0]
        inside_SG.append(values["loss"][1])
        free_SG.append(values["loss_free"][1])
        edge.append(bool(best[2][0]))
        n, d = best[1], laws.cost.tokens(c, best[1])
        n_S, d_S = draws[1], laws.cost.tokens(c, draws[1])
        away = np.where(draws[2] == 0, 0.0, np.copysign(np.inf, draws[2]))  # of a draw without optimum only the side
        values |= {"n": (n, n_S + away), "d": (d, d_S - away), "ratio": (d / n, d_S / n_S - away)}
        for name, (one, many) in values.items():
            low, high = interval(many, LEVEL)
            table[name].append(float(one[0]))
            table[f"{name}_lo"].append(float(low) if np.isfinite(low) else None)
            table[f"{name}_hi"].append(float(high) if np.isfinite(high) else None)
    out: dict[str, Any] = {"c": grid_G.tolist(), "level": LEVEL, **table}
    slack = 1.05
    out["extrapolated"] = [
        bool(c > ref.c.max() * slack or not low_n / slack <= n <= high_n * slack)
        or not ref.d.min() / slack <= d <= ref.d.max() * slack
        for c, n, d in zip(out["c"], out["n"], out["d"], strict=True)
    ]
    out["no_interior_minimum"] = edge
    out["draws"] = np.array(inside_SG).T  # [S, G]; both are taken off before the analysis is written
    out["draws_free"] = np.array(free_SG).T
    return out


def _optimum(loss_SK: Array, n_K: Array) -> tuple[Array, Array, npt.NDArray[np.int64]]:
    """(lowest loss, its N, at which end of the grid it sits: -1, 1, or 0), refined by a parabola in log N."""
    at = loss_SK.argmin(axis=1)
    inner = np.clip(at, 1, len(n_K) - 2)
    rows = np.arange(len(loss_SK))
    left, mid, right = (loss_SK[rows, inner + s] for s in (-1, 0, 1))
    bend = left - 2 * mid + right
    shift = np.where(bend > 0, 0.5 * (left - right) / np.where(bend > 0, bend, 1.0), 0.0)
    shift = np.where(at == inner, np.clip(shift, -1, 1), 0.0)
    step = float(np.log(n_K[1] / n_K[0]))
    loss = np.where(at == inner, mid - 0.25 * (left - right) * shift, loss_SK[rows, at])
    return loss, np.exp(np.log(n_K[at]) + shift * step), np.sign(at - inner)


def regression(front: dict[str, Any], c_max: float) -> dict[str, float] | None:
    """Slopes of log N*, log D* on log C and of log D* on log N* over the frontier up to c_max."""
    inside = [i for i, c in enumerate(front["c"]) if c <= c_max * 1.001]
    if len(inside) < 3:
        return None
    c, n, d = (np.log(np.array(front[k])[inside]) for k in ("c", "n", "d"))
    slope = float(np.polyfit(n, d, 1)[0]) if np.ptp(n) > 1e-6 else None
    return {"a": float(np.polyfit(c, n, 1)[0]), "b": float(np.polyfit(c, d, 1)[0]), "d": slope}  # type: ignore[dict-item]


def fit_curves(laws: ArmLaws, domain: str, tiers: dict[float, str]) -> list[dict[str, Any]]:
    """The fitted law at each size of the arm over the compute its runs span, for drawing."""
    if domain not in laws.fits:
        return []
    runs, fit = laws.runs[domain], laws.fits[domain]
    curves = []
    for n in sorted(set(runs.n.tolist())):
        c = runs.c[runs.n == n]
        grid = np.geomspace(c.min(), c.max(), 16)
        loss = fit.predict(n, laws.cost.tokens(grid, n))
        curves.append({"size": tiers[n], "n": n, "c": grid.tolist(), "loss": np.asarray(loss).tolist()})
    return curves


def holdout(laws: ArmLaws, domain: str, points: list[dict[str, Any]]) -> dict[str, Any]:
    """Predict the largest size from the others (isofusion.laws.holdout), beside the loss of the next smaller size.

    Errors are means of |predicted − observed| relative to the reducible loss (`floor` says what was subtracted) and to
    the loss. `oracle_e`: the same errors of the law of the reducible loss itself, E fixed at the oracle entropy; None
    without one. Adds leave-one-size-out with either term dropped. `fit` and `held_n` are taken off by the caller.
    """
    runs = laws.runs.get(domain)
    if runs is None:
        return {"ok": False, "reason": laws.failures.get(domain, "no runs")}
    try:
        held = hold_out(runs, largest_size(runs), what="the largest size", draws=DRAWS, grid=8)
    except (InputError, np.linalg.LinAlgError, ValueError) as error:
        return {"ok": False, "reason": _why(error, laws.arm, domain)}
    found = held.to_dict()
    largest = float(held.held.n.max())
    entry: dict[str, Any] = {
        "ok": True,
        "size": next((p["size"] for p in points if p["n"] == largest), f"{largest:.3g}"),
        "n": largest,
        "runs": len(held.held),
        "floor": found["reducible_floor"],
        "error_reducible": found["mae_reducible"],
        "error": found["mae_loss"],
        "beside": {k: found["beside_baselines"][k] for k in BASELINES},
        "ratio_to_carry": found["ratio_to_carry_over"],
        "oracle_e": _with_known_floor(runs),
        "seeds_averaged": found["seeds_averaged"],
        "hit_rate": found["hit_rate"],
        "no_interval": found["no_interval"],
        "beats_carry": None if found["ratio_to_carry_over"] is None else found["ratio_to_carry_over"] < 1,
        "points": found["table"],
        "fit": held.fit,
        "held_n": float(held.held.n.min()),
    }
    if runs.n_sizes < 5:  # with four, a law from three sizes says little, and costs the report's time
        entry["leave_one_size_out"] = {"refused": f"{runs.n_sizes} sizes; it is run from 5 on"}
        return entry
    try:
        entry["leave_one_size_out"] = leave_one_size_out(runs)
    except (InputError, np.linalg.LinAlgError, ValueError) as error:
        entry["leave_one_size_out"] = {"refused": str(error)}
    return entry


def _with_known_floor(runs: Runs) -> dict[str, float | None] | None:
    oracle = runs.oracle_value(None)
    if oracle is None:
        return None
    try:
        found = hold_out(runs, largest_size(runs), draws=0, grid=8, fixed_e=float(oracle.mean())).to_dict()
    except (InputError, np.linalg.LinAlgError, ValueError):
        return None
    return {"error_reducible": found["mae_reducible"], "ratio_to_carry": found["ratio_to_carry_over"]}


def difference(first: dict[str, Any], second: dict[str, Any], free: bool = False) -> dict[str, list[Any]]:
    """First frontier's loss less the second's at equal compute, with the interval of the difference of their draws.

    `free` compares the unrestricted optima (needed beyond the runs), else N stays inside the trained sizes.
    """
    loss, draws = ("loss_free", "draws_free") if free else ("loss", "draws")
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(first[draws] - second[draws], [tail, 1 - tail], axis=0)
    diff = np.array(first[loss]) - np.array(second[loss])
    return {"c": first["c"], "diff": diff.tolist(), "lo": low.tolist(), "hi": high.tolist()}


def matched(points: list[dict[str, Any]], first: str, second: str, domain: str) -> list[dict[str, Any]]:
    """First less second arm's loss for runs of one size, seed and step count."""
    other = {
        (p["size"], p["seed"], p["steps"]): p
        for p in points
        if p["arm"] == second and p["loss"].get(domain) is not None
    }
    found = []
    for p in points:
        twin = other.get((p["size"], p["seed"], p["steps"]))
        if p["arm"] == first and twin is not None and p["loss"].get(domain) is not None:
            diff = p["loss"][domain] - twin["loss"][domain]
            found.append(
                {"size": p["size"], "seed": p["seed"], "steps": p["steps"], "c": p["c"], "d": p["d"], "diff": diff}
            )
    return found


def by_size(pairs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean difference per size over its budgets; an interval only where seeds repeat, for a trunk is one throw."""
    found = []
    for size in dict.fromkeys(p["size"] for p in pairs):
        mine = [p for p in pairs if p["size"] == size]
        c = float(np.exp(np.mean([np.log(p["c"]) for p in mine])))
        found.append({"size": size, "c": c, **(overall(mine) or {})})
    return found


def overall(pairs: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Mean difference over every matched run, one value a trunk, t interval over trunks."""
    trunks: dict[tuple[Any, ...], list[float]] = {}
    for p in pairs:
        trunks.setdefault((p["size"], p["seed"]), []).append(p["diff"])
    if not trunks:
        return None
    diff, lo, hi = t_interval(np.array([np.mean(v) for v in trunks.values()]))
    return {"diff": diff, "lo": lo, "hi": hi, "trunks": len(trunks), "pairs": len(pairs), "verdict": verdict(lo, hi)}
