"""Any law of FORMS, under any objective, to the depth of `isofusion fit --form NAME --objective KIND`.

Law, standard errors, percentile intervals from resampled trunks, and (where the law rests on N and D alone) the
compute-optimal size. The default law under its default objective gets more: `isofusion.laws.analysis`.
Legend: S draws, c budgets, g sizes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from isofusion.errors import InputError
from isofusion.laws.analysis import BEYOND, Refused, attempt, digest
from isofusion.laws.cost import REACH, Cost
from isofusion.laws.fit import DELTA
from isofusion.laws.formfit import FormFit, check_columns, fit_form
from isofusion.laws.forms import find
from isofusion.laws.interval import ends, interval
from isofusion.laws.sensitivity import Sensitivity, sensitivity
from isofusion.laws.solve.criterion import Kind
from isofusion.laws.table import Array, Runs
from isofusion.laws.warn import beyond, extrapolates

LEVEL = 0.95
FEWEST_TRUNKS = 8  # below that, resampling trunks leaves draws that identify nothing; rows are resampled instead
SIZES = 801  # sizes among which an optimum is looked for
DRAWS = 200  # bootstrap draws at most: every one is a fit of a law without a solver of its own
ON_RUNS = ("n", "d", "c")  # columns that every table has


@dataclass(frozen=True)
class FormAnalysis:
    """A fitted law with intervals, what it says at each compute, and the default law's sensitivity beside it."""

    runs: Runs
    notes: tuple[str, ...]
    options: dict[str, Any]
    extra: dict[str, Array]
    fit: FormFit
    intervals: dict[str, list[float | None] | None]  # percentile (interval.py), by parameter; empty without draws
    resampled: str
    answers: tuple[dict[str, Any], ...]
    no_answer: str  # why there is none, or ""
    sensitivity: Sensitivity | Refused

    @property
    def digest(self) -> str:
        return digest(self.runs, self.options, self.extra)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON."""
        return {
            "digest": self.digest,
            "options": self.options,
            "notes": list(self.notes),
            "law": self.fit.to_dict(),
            "bootstrap": {"intervals": self.intervals, "note": self.resampled},
            "optimal": [dict(row) for row in self.answers],
            "no_optimum": self.no_answer or None,
            "sensitivity": self.sensitivity.to_dict(),
        }


def analyse_form(
    runs: Runs,
    form: str,
    compute: Sequence[float] = (),
    *,
    extra: Mapping[str, Array] | None = None,
    objective: Kind = "huber",
    delta: float = DELTA,
    weights: Array | str | None = None,
    fixed: Mapping[str, float] | None = None,
    draws: int = DRAWS,
    notes: Sequence[str] = (),
    seed: int = 0,
) -> FormAnalysis:
    """Fit law `form` to runs and further columns `extra` [m] (sparsity, width, ...), in natural units.

    draws: at most DRAWS are taken (0: no intervals). Raises InputError for an unknown law or objective, missing
    columns, rows that cannot identify the law, or compute that is not positive.
    """
    asked = sorted(float(c) for c in compute)
    if any(not (np.isfinite(c) and c > 0) for c in asked):
        raise InputError(f"--compute {asked}: give positive FLOPs, e.g. --compute 1e20")
    law, more = find(form), dict(extra or {})
    if missing := [k for k in law.columns if k not in ON_RUNS and k not in more]:
        names = " ".join(f"--column {k}=NAME" for k in missing)
        raise InputError(f"{law.name} ({law.formula}) needs columns {', '.join(missing)}: name them with {names}")
    if short := [f"{k} {np.size(v)}" for k, v in more.items() if np.size(v) != len(runs)]:
        raise InputError(f"columns {', '.join(short)} rows beside {len(runs)} runs; they must be equal")
    check_columns({k: getattr(runs, k) for k in ON_RUNS} | more, law, runs.label or "runs")  # rows as the user has them
    runs, order = runs.canonical(*(np.asarray(more[k], dtype=np.float64) for k in sorted(more)))
    more = {k: np.asarray(v, dtype=np.float64)[order] for k, v in more.items()}
    if weights is not None and not isinstance(weights, str):
        weights = np.asarray(weights, dtype=np.float64)
        weights = weights[order] if weights.shape == order.shape else weights  # fit_form refuses the latter
    columns: dict[str, Any] = {k: getattr(runs, k) for k in (*ON_RUNS, "loss")} | more
    if isinstance(weights, str) and weights == "se":
        if runs.se is None:
            raise InputError("weights from standard errors: name their column with --se")
        columns["se"] = runs.se
    fit = fit_form(
        columns,
        law,
        objective=objective,
        delta=delta,
        weights=weights,  # type: ignore[arg-type]
        fixed=fixed,
        label=runs.label,
    )
    counts, resampled = _resampled(runs, min(draws, DRAWS), seed)
    drawn = fit.refit(weights=counts)[0] if draws else {}
    intervals = {k: _ends(v) for k, v in drawn.items() if k not in fit.fixed}
    cost = Cost.of(runs)
    answers: list[dict[str, Any]] = []
    why = ""
    if set(law.columns) <= {"n", "d"} and {"n", "d"} <= set(law.columns):
        for c in asked or [float(runs.c.max()), BEYOND * float(runs.c.max())]:
            row = _answer(fit, drawn, cost, c, runs)
            if row is None and asked:
                raise InputError(f"--compute {c:g}: {law.name} has no interior optimum in N there")
            answers += [row] if row else []
    else:
        why = f"{law.name} rests on {', '.join(law.columns)}: a best size at a budget takes their values too"
    at = asked[-1] if asked else BEYOND * float(runs.c.max())
    return FormAnalysis(
        runs,
        tuple(notes),
        {
            "form": form,
            "objective": objective,
            "compute": asked,
            "bootstrap": min(draws, DRAWS),
            "delta": delta,
            "fixed": dict(fixed or {}),
            "weights": weights if isinstance(weights, str) else None,
            "seed": seed,
        },
        more,
        fit,
        intervals,
        resampled if draws else "no bootstrap draws asked for",
        tuple(answers),
        why,
        attempt(lambda: sensitivity(runs, at, cost=cost)),
    )


def _resampled(runs: Runs, draws: int, seed: int) -> tuple[Array, str]:
    """Row weights [S, m] of resampled trunks (rows, where there are few trunks), and what was done."""
    rng = np.random.Generator(np.random.Philox(key=seed))
    names, member = np.unique(runs.group, return_inverse=True)
    if len(names) < FEWEST_TRUNKS:
        member, what = np.arange(len(runs)), f"rows resampled ({len(names)} trunks are too few)"
    else:
        what = f"{len(names)} trunks resampled" if len(names) < len(runs) else "rows resampled"
    units = int(member.max()) + 1
    picks = rng.integers(0, units, size=(draws, units))
    counts = np.stack([np.bincount(row, minlength=units) for row in picks]) if draws else np.zeros((0, units))
    return counts[:, member].astype(np.float64), what


def _answer(fit: FormFit, drawn: Mapping[str, Array], cost: Cost, c: float, runs: Runs) -> dict[str, Any] | None:
    """N*, D*, D/N and loss at c FLOPs by search over N; None where the range ends first."""
    best = _optimum(fit, fit.params, cost, c, runs)
    if not np.isfinite(best["n"]):
        return None
    row: dict[str, Any] = {"compute": c, **{k: float(v) for k, v in best.items()}}
    if drawn:
        each = _optimum(fit, drawn, cost, c, runs)
        for name, values in each.items():
            row[f"{name}_interval"] = _ends(values)
    warning = fit.extrapolation({"n": np.array([row["n"]]), "d": np.array([row["d"]])})
    told = [warning.message] if warning else []
    far, side = beyond(c, runs.c)
    if extrapolates(far):
        told.append(f"C is {far:.1f} decades {side} the rows ({runs.c.min():.3g} to {runs.c.max():.3g})")
    row["warnings"] = [{"code": "extrapolation", "message": f"at {c:.3g} FLOPs {'; '.join(told)}"}] if told else []
    return row


def _optimum(fit: FormFit, params: Mapping[str, Any], cost: Cost, c: float, runs: Runs) -> dict[str, Any]:
    """The lowest of SIZES sizes along C = k(N) D, refined by a parabola: scalars, or [S] for drawn parameters.

    Where the range ends first only the side is known: N* infinite, above or (-) below, D* and D/N the other way.
    """
    x = np.linspace(np.log(runs.n.min() / REACH), np.log(runs.n.max() * REACH), SIZES)
    loss = np.atleast_2d(fit.law.predict(params, {"n": np.exp(x), "d": cost.tokens(c, np.exp(x))}))
    best = np.argmin(np.where(np.isfinite(loss), loss, np.inf), axis=1)
    inner, rows = np.clip(best, 1, SIZES - 2), np.arange(len(loss))
    left, mid, right = (loss[rows, inner + s] for s in (-1, 0, 1))
    bend = left - 2.0 * mid + right
    shift = np.where(bend > 0, 0.5 * (left - right) / np.where(bend > 0, bend, 1.0), 0.0)
    n = np.exp(x[inner] + np.clip(shift, -1.0, 1.0) * (x[1] - x[0]))
    d = cost.tokens(c, n)
    side = np.where(np.isfinite(loss).any(axis=1), np.sign(best - inner), np.nan)
    with np.errstate(invalid="ignore"):
        away = side * np.inf
    n, d, ratio = (np.where(side == 0, inside, out) for inside, out in ((n, away), (d, -away), (d / n, -away)))
    out = {"n": n, "d": d, "tokens_per_parameter": ratio, "loss": mid - 0.25 * (left - right) * shift}
    return out if np.ndim(next(iter(params.values()))) else {k: v[0] for k, v in out.items()}


def _ends(values: Array) -> list[float | None] | None:
    low, high = interval(values, LEVEL)
    return ends(float(low), float(high))
