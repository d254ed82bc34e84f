"""Everything `isofusion fit` says about a table of runs, gathered once: printed, written as JSON, drawn as a page.

    from isofusion.laws.analysis import analyse
    from isofusion.laws.tables.readers import read_runs

    runs, notes = read_runs("runs.csv")
    result = analyse(runs, [1e21], notes=notes)
    result.fit.params, result.answers[0]["n_interval"], result.sensitivity.sentence

A part that these runs cannot support is a `Refused` with the reason, never left out silently. Another law or another
objective: `analyse_form` (formanalysis.py). Units: C in FLOPs, N parameters, D tokens, loss nats/token.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import BrokenExecutor, Executor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import numpy as np

from isofusion.errors import InputError
from isofusion.laws.bootstrap import Intervals, Method, bootstrap
from isofusion.laws.derived import allocation, at_compute
from isofusion.laws.doubt import law_warnings
from isofusion.laws.fit import DELTA, LawFit, Starts, fit_law
from isofusion.laws.frontier import Cost, Regression, compute_optimal, exponents, regress_allocation
from isofusion.laws.holdout import HoldOut, hold_out, largest_size
from isofusion.laws.interval import ends
from isofusion.laws.isoflop import IsoFlops, isoflops
from isofusion.laws.profile import Profile, Studies, profile
from isofusion.laws.rollout import Rollout, beaten, rollout
from isofusion.laws.sensitivity import Sensitivity, sensitivity
from isofusion.laws.table import Runs
from isofusion.laws.warn import FitWarning

T = TypeVar("T")
BEYOND = 10.0  # the answer is given at this many times the largest compute of the runs where none is asked for
TEST_DRAWS = 200  # bootstrap draws of each hold-out at most
STEP_DRAWS, STEPS = 60, 5  # draws and steps of a rollout
TEST_GRID = 4  # starts per exponent of a rollout's fits, beside the fit to all runs; the same ends, sooner
PROFILED = ("alpha", "beta", "E", "N*")


@dataclass(frozen=True)
class Refused:
    """A part that these runs cannot support."""

    reason: str

    def to_dict(self) -> dict[str, str]:
        return {"refused": self.reason}


@dataclass(frozen=True)
class Analysis:
    """The fit, what it says at each compute, how well it predicts, and how far its answer rests on choices."""

    runs: Runs
    notes: tuple[str, ...]
    options: dict[str, Any]
    fit: LawFit
    intervals: Intervals | None
    cost: Cost
    answers: tuple[dict[str, Any], ...]  # per compute: n, d, tokens_per_parameter, loss, each with NAME_interval:
    # [low, high], an end that no draw bounds None; None where neither is known
    regression: Regression | None
    held: HoldOut | Refused
    rollouts: dict[str, Rollout | Refused]  # by "n" and "c"
    sensitivity: Sensitivity | Refused
    isoflops: IsoFlops | Refused
    profiles: dict[str, Profile | Refused] = field(default_factory=dict)
    doubts: tuple[FitWarning, ...] = ()  # what is told against the law and its intervals

    @property
    def compute(self) -> float:
        """Where sensitivity, cloud and profiles look: the largest compute asked for, or BEYOND times the runs'."""
        return float(self.answers[-1]["compute"]) if self.answers else BEYOND * float(self.runs.c.max())

    @property
    def digest(self) -> str:
        """sha256 of the runs, in any order of their rows, and the options: equal digests, equal result."""
        return digest(self.runs, self.options)

    @property
    def tests(self) -> dict[str, HoldOut | Rollout | Refused]:
        """The hold-outs by name."""
        each = {"n": "each next size", "c": "each next factor 2 in compute"}
        return {"largest size": self.held} | {name: self.rollouts[by] for by, name in each.items()}

    def warnings(self) -> list[dict[str, str]]:
        """Whether a baseline beats the law; those of the law, of each answer and of the isoFLOP budgets; each once."""
        worse = beaten({name: test for name, test in self.tests.items() if not isinstance(test, Refused)})
        found = [{"code": "holdout-worse", "message": worse}] if worse else []
        found += [{"code": w.code, "message": w.message} for w in self.doubts]
        found += [w for row in self.answers for w in row["warnings"]]
        for p in (*self.profiles.values(), self.isoflops):
            if isinstance(p, (Profile, IsoFlops)):
                found += [{"code": str(w.code), "message": w.message} for w in p.warnings]
        return list({(w["code"], w["message"]): w for w in found}.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON."""
        split = {k: float(v) for k, v in exponents(self.fit.params).items()}
        spans = {k: ends(float(v.low), float(v.high)) for k, v in _allocation(self.intervals).items()}
        return {
            "digest": self.digest,
            "options": self.options,
            "notes": list(self.notes),
            "law": self.fit.to_dict(),
            "bootstrap": self.intervals.to_dict() if self.intervals else None,
            "allocation": {
                "closed_form": split,
                "closed_form_interval": spans or None,
                "regression": self.regression.to_dict() if self.regression else None,
                "cost": {"kind": self.cost.kind, "spread": self.cost.spread},
            },
            "optimal": [dict(row) for row in self.answers],
            "hold_out": self.held.to_dict(),
            "rollout": {by: r.to_dict() for by, r in self.rollouts.items()},
            "sensitivity": self.sensitivity.to_dict(),
            "isoflop": self.isoflops.to_dict(),
            "profiles": {name: p.to_dict() for name, p in self.profiles.items()} or None,
            "warnings": self.warnings(),
        }


def analyse(
    runs: Runs,
    compute: Sequence[float] = (),
    *,
    draws: int = 1000,
    method: Method = "hierarchical",
    delta: float = DELTA,
    fixed_e: float | None = None,
    starts: Starts = "projection",
    profiles: bool = False,
    notes: Sequence[str] = (),
    seed: int = 0,
    pool: Executor | None = None,
) -> Analysis:
    """Fit E + A/N^alpha + B/D^beta and everything that judges it. compute: budgets in FLOPs to answer at.

    Without compute the answer is given at the runs' largest and at ten times that. draws: of the bootstrap (0: no
    intervals). method: of the bootstrap; hold-outs and profiles keep theirs. profiles: profile alpha, beta, E and N*
    too. pool: where the hold-outs and the sensitivity are computed meanwhile, e.g. a ProcessPoolExecutor; the same
    numbers, sooner. The order of the runs changes nothing. Raises InputError where the runs cannot identify the law,
    compute is not positive, or the law has no optimum at a compute asked for.
    """
    asked = [float(c) for c in compute]
    if any(not (np.isfinite(c) and c > 0) for c in asked):
        raise InputError(f"--compute {asked}: give positive FLOPs, e.g. --compute 1e20")
    runs, _ = runs.canonical()
    fit = fit_law(runs, delta=delta, fixed_e=fixed_e, starts=starts)
    cost = Cost.of(runs)
    largest = float(runs.c.max())
    tests = aside(pool, _tests, fit, min(draws, TEST_DRAWS), min(draws, STEP_DRAWS), seed)
    intervals = bootstrap(fit, draws, method=method, seed=seed) if draws else None
    answers = [_answer(fit, intervals, cost, c, strict=True) for c in sorted(asked)] or [
        found for c in (largest, BEYOND * largest) if (found := _answer(fit, intervals, cost, c, strict=False))
    ]
    at = float(answers[-1]["compute"]) if answers else BEYOND * largest  # type: ignore[index]
    budgets = attempt(lambda: isoflops(runs, fit=fit, cost=cost, draws=min(draws, TEST_DRAWS)))
    known = None if isinstance(budgets, Refused) else budgets
    choices = aside(pool, attempt, partial(sensitivity, runs, at, fit=fit, cost=cost, budgets=known))
    found_profiles: dict[str, Profile | Refused] = {}
    studies = Studies.of(fit) if profiles else None
    for name in PROFILED if profiles else ():
        if name == "E" and fixed_e is not None:
            continue
        point = at if name == "N*" else None
        found_profiles[name] = attempt(partial(profile, fit, name, at=point, studies=studies))
    regression = regress_allocation(fit, cost=cost)
    held, by_size, by_compute = tests()
    return Analysis(
        runs=runs,
        notes=tuple(notes),
        options={
            "compute": sorted(asked),
            "bootstrap": draws,
            "delta": delta,
            "fixed_e": fixed_e,
            "starts": starts,
            "seed": seed,
            **({"resample": method} if method != "hierarchical" else {}),
        },
        fit=fit,
        intervals=intervals,
        cost=cost,
        answers=tuple(row for row in answers if row),
        regression=regression,
        held=held,
        rollouts={"n": by_size, "c": by_compute},
        sensitivity=choices(),
        isoflops=budgets,
        profiles=found_profiles,
        doubts=law_warnings(fit, intervals),
    )


def _tests(
    fit: LawFit, draws: int, step_draws: int, seed: int
) -> tuple[HoldOut | Refused, Rollout | Refused, Rollout | Refused]:
    """The largest size held out, and the rollouts over size and over compute."""
    runs, held = fit.runs, largest_size(fit.runs)
    what = f"largest size ({_name(runs, held)})"
    options: dict[str, Any] = {"delta": fit.delta, "fixed_e": fit.form.fixed_e, "seed": seed}
    found = attempt(lambda: hold_out(runs, held, what=what, draws=draws, **options))
    last = None if isinstance(found, Refused) else found
    options |= {"draws": step_draws, "grid": TEST_GRID, "steps": STEPS, "fit": fit, "near": fit}
    return (
        found,
        attempt(lambda: rollout(runs, "n", last_step=last, **options)),
        attempt(lambda: rollout(runs, "c", **options)),
    )


def aside(pool: Executor | None, make: Callable[..., T], *inputs: Any) -> Callable[[], T]:
    """Start make(*inputs) in the pool and return what gives its result; here and later without a pool that works."""
    here = partial(make, *inputs)
    if pool is None:
        return here
    try:
        future = pool.submit(make, *inputs)
    except BrokenExecutor:
        return here

    def result() -> T:
        try:
            return future.result()
        except BrokenExecutor:
            return here()

    return result


def attempt(make: Callable[[], T]) -> T | Refused:
    """What `make` returns, or the reason why these runs do not support it."""
    try:
        return make()
    except InputError as error:
        return Refused(str(error))


def digest(runs: Runs, options: Mapping[str, Any], extra: Mapping[str, Any] | None = None) -> str:
    """sha256 over every number of the runs as read (and further columns) and the options, as hexadecimal digits."""
    columns: dict[str, Any] = {k: getattr(runs, k) for k in ("n", "d", "loss", "c", "size", "group", "seed")}
    columns |= {k: v for k in ("se", "oracle") if (v := getattr(runs, k)) is not None} | dict(extra or {})
    plain = {k: np.asarray(v).tolist() for k, v in columns.items()}
    text = json.dumps({"columns": plain, "compute": runs.compute, "options": dict(options)}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _allocation(intervals: Intervals | None) -> dict[str, Any]:
    return allocation(intervals) if intervals else {}


def _answer(fit: LawFit, intervals: Intervals | None, cost: Cost, c: float, *, strict: bool) -> dict[str, Any] | None:
    """N*, D*, D/N and loss at c, with intervals and an extrapolation warning; None (strict: InputError) without one."""
    best = compute_optimal(fit, c, cost=cost)
    if bool(best.edge[0]):
        if strict:
            raise InputError(f"--compute {c:g}: no interior optimum in N; the law's exponents do not bracket one")
        return None
    n, d = float(best.n[0]), float(best.d[0])
    row: dict[str, Any] = {"compute": c, "n": n, "d": d, "tokens_per_parameter": d / n, "loss": float(best.loss[0])}
    if intervals:
        for name, found in at_compute(intervals, c, cost=cost).items():
            row[f"{name}_interval"] = ends(float(found.low), float(found.high))
    warning = fit.extrapolation(best.n, best.d, c)
    row["warnings"] = [{"code": warning.code, "message": f"at {c:.3g} FLOPs {warning.message}"}] if warning else []
    return row


def _name(runs: Runs, rows: np.ndarray) -> str:
    """Size as labelled, and N where the label is not N itself."""
    n = f"N = {runs.n[rows].mean():.3g}"
    label = str(runs.size[rows][0])
    return n if label == f"{runs.n[rows][0]:.3g}" else f"{label}, {n}"
