"""Profile of the objective along one quantity: how bad must the fit get for alpha, E, N*(C), ... to be that value?

For every value t of a quantity q the others are re-optimised subject to q(theta) = t (Newton on the surface q = t,
warm-started at the neighbour). What is within a threshold of the minimum is the interval (Venzon and Moolgavkar
1988). The objective sums Huber losses of correlated residuals; it is no log-likelihood, chi-squared gives no threshold:
- scale="noise" (default): the threshold is a quantile, over studies simulated at the fit with the noise model of
  noise.py, of min_{q = q_fit} f - min f: the profile at the truth, where the truth is known.
- scale="residual": rows independent; chi-squared times mean(psi^2) / mean(psi') of the residuals (Huber 1981, 7.10).
A profile that never reaches the threshold on a side has no end there, and a warning "flat" says so.
Legend: S starts or draws, g points of the profile, 5 parameters in the solver's coordinates.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal

import numpy as np

from isofusion.errors import InputError
from isofusion.laws.fit import FitWarning, LawFit
from isofusion.laws.forms import NAMES, Params
from isofusion.laws.frontier import Cost, closed_form
from isofusion.laws.noise import simulate_deviations, tangent
from isofusion.laws.objective import Problem
from isofusion.laws.refit import refit
from isofusion.laws.solve.constrained import Constraint, minimise_on
from isofusion.laws.table import Array

STEPS = 25  # at most so many points on either side
REACH = 1e3  # a positive quantity is followed up and down by at most this factor
TARGET = 0.3  # aimed-for growth of sqrt(excess / threshold) from point to point
Quantity = Callable[[Params], Array]


@dataclass(frozen=True)
class Profile:
    """Objective along a quantity, others re-optimised. Arrays [g], ascending in `values`."""

    name: str
    estimate: float
    values: Array
    objective: Array
    params: Params  # the re-optimised law at each value, arrays [g]
    minimum: float
    threshold: float  # excess objective at the ends of the interval
    low: float | None  # None: no end on this side, see `warnings`
    high: float | None
    level: float
    scale: str
    warnings: tuple[FitWarning, ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "estimate": self.estimate,
            "interval": [self.low, self.high],
            "level": self.level,
            "scale": self.scale,
            "threshold": self.threshold,
            "minimum": self.minimum,
            "values": self.values.tolist(),
            "objective": self.objective.tolist(),
            "warnings": [{"code": w.code, "message": w.message} for w in self.warnings],
        }


def quantity_of(fit: LawFit, name: str, at: float | None = None) -> Quantity:
    """The function of Params behind a name: E, A, alpha, B, beta, or with compute `at` FLOPs: N*, D*, D/N, loss.

    Raises InputError for an unknown name, a parameter that was not fitted, or compute that is no multiple of N D.
    """
    if name in NAMES:
        if name not in fit.names:
            raise InputError(f"profile of {name}: {fit.form.formula} does not fit it; choose {', '.join(fit.names)}")
        return lambda p: getattr(p, name)
    if name not in ("N*", "D*", "D/N", "loss"):
        raise InputError(f"profile of {name!r}: choose {', '.join(fit.names)}, N*, D*, D/N, loss, or give a function")
    if at is None or not (np.isfinite(at) and at > 0):
        raise InputError(f"profile of {name}: give the compute it is at, e.g. at=1e21 (FLOPs)")
    cost = Cost.of(fit.runs)
    if not (fit.form.n_term and fit.form.d_term):
        raise InputError(f"profile of {name}: {fit.form.formula} has no compute-optimal size")
    if cost.kind != "6nd":
        raise InputError(
            f"profile of {name}: compute is measured, k(N) has kinks between the sizes and N* sticks to them; "
            "use the bootstrap's interval, or a table without FLOPs (C = 6 N D)"
        )
    pick = {"N*": 0, "D*": 1, "loss": 2}
    constant = float(np.exp(cost.log_k[0]))

    def value(p: Params) -> Array:
        out = closed_form(p, at, constant)
        return out[1] / out[0] if name == "D/N" else out[pick[name]]

    return value


def profile(
    fit: LawFit,
    quantity: str | Quantity,
    *,
    at: float | None = None,
    level: float = 0.95,
    scale: Literal["noise", "residual"] = "noise",
    draws: int = 200,
    seed: int = 0,
    name: str | None = None,
    studies: Studies | None = None,
) -> Profile:
    """Profile a parameter, a derived quantity (`at` compute in FLOPs) or any smooth function of Params [S] -> [S].

    draws: simulated studies behind the threshold (scale="noise"); `studies`: the same already simulated. Raises
    InputError for a quantity that the law does not have, a level outside (0, 1), or fewer than 20 draws.
    """
    if not 0 < level < 1:
        raise InputError(f"level = {level}: give a coverage between 0 and 1, e.g. 0.95")
    if scale not in ("noise", "residual"):
        raise InputError(f"scale {scale!r}: choose noise or residual")
    if scale == "noise" and draws < 20:
        raise InputError(f"{draws} simulated studies give no threshold; use 200 or more")
    label = name or (quantity if isinstance(quantity, str) else str(getattr(quantity, "__name__", "quantity")))
    of = quantity_of(fit, quantity, at) if isinstance(quantity, str) else quantity
    problem = Problem.of(fit.runs, fit.form, fit.scale, fit.bounds)
    constraint = Constraint.of(of, fit)
    estimate = float(constraint.value(fit.theta[None])[0])
    if not np.isfinite(estimate) or not np.any(constraint.gradient(fit.theta[None])):
        raise InputError(f"profile of {label}: the fitted law gives {estimate:g} and does not depend on it smoothly")
    if scale == "noise":
        threshold = noise_threshold(fit, constraint, level, studies or Studies.of(fit, draws, seed))
    else:
        threshold = residual_threshold(fit, level)
    sides = _both_sides(fit, problem, constraint, estimate, threshold)
    values = np.concatenate([sides[0][0][::-1], [estimate], sides[1][0]])
    objective = np.concatenate([sides[0][1][::-1], [fit.objective], sides[1][1]])
    theta = np.concatenate([sides[0][2][::-1], fit.theta[None], sides[1][2]])
    ends = [side[3] for side in sides]
    said = []
    for end, side, reached in zip(ends, ("below", "above"), (values[0], values[-1]), strict=True):
        if end is None:
            excess = max(0.0, float(objective[0 if side == "below" else -1] - fit.objective)) / threshold
            said.append(
                FitWarning(
                    "flat",
                    f"{label} has no end {side}: at {reached:.3g} the objective is up by {100 * excess:.0f} % of what "
                    f"a {100 * level:g} % interval takes; the runs cannot bound it on that side",
                )
            )
    low = float(objective.min())
    if low < fit.objective - 1e-3 * threshold:
        said.append(
            FitWarning(
                "not-converged", f"the profile of {label} found {low:.10g}, below the fit's {fit.objective:.10g}"
            )
        )
    return Profile(
        label,
        estimate,
        values,
        objective,
        constraint.params(theta),
        fit.objective,
        threshold,
        ends[0],
        ends[1],
        level,
        scale,
        tuple(said),
    )


@dataclass(frozen=True)
class Studies:
    """Studies simulated at a fit with its noise (noise.py), odd runs as they are, and the law fitted to each."""

    log_loss: Array  # [S, m]
    objective: Array  # [S] of the law fitted to each

    @classmethod
    def of(cls, fit: LawFit, draws: int = 200, seed: int = 0) -> Studies:
        rng = np.random.Generator(np.random.Philox(key=seed))
        log_loss = np.log(fit.predict(fit.runs.n, fit.runs.d)) + simulate_deviations(rng, fit, draws)
        return cls(log_loss, refit(fit, log_loss=log_loss)[1])


def noise_threshold(fit: LawFit, constraint: Constraint, level: float, studies: Studies) -> float:
    """Quantile of the profile's excess at the truth over simulated studies."""
    problem = Problem.of(fit.runs, fit.form, fit.scale, fit.bounds).but(log_loss=studies.log_loss)
    start = np.repeat(fit.theta[None], len(studies.objective), axis=0)
    held = minimise_on(start, problem, fit.delta, constraint, constraint.value(start))
    return float(np.quantile(np.maximum(held.objective - studies.objective, 0.0), level))


def residual_threshold(fit: LawFit, level: float) -> float:
    """chi-squared(1) / 2 times mean(psi^2) / mean(psi') of independent residuals.

    psi' is 1 inside delta and 0 outside; the share inside is a density estimate over a window of half the median
    absolute residual (or delta, whichever is larger), so that a handful of rows near zero does not decide it.
    """
    _, r = tangent(fit)
    psi = np.clip(r, -fit.delta, fit.delta)
    window = max(fit.delta, 0.5 * float(np.median(np.abs(r))))
    slope = float(np.mean(np.abs(r) <= window)) * fit.delta / window
    free = max(1, len(r) - len(fit.names))
    return float(0.5 * NormalDist().inv_cdf(0.5 + 0.5 * level) ** 2 * np.sum(psi**2) / free / max(slope, 1e-300))


Side = tuple[Array, Array, Array, float | None]  # values, objectives, thetas, end of the interval or None; outwards
Point = tuple[Array, float, bool]  # theta [5], objective, whether it is the minimum on the surface


def _both_sides(
    fit: LawFit, problem: Problem, constraint: Constraint, estimate: float, threshold: float
) -> tuple[Side, Side]:
    """The walks down and up from the fit, whose solves are made together: half the calls."""
    first = constraint.first_step(fit.theta, fit, threshold)
    walks = [_walk(fit, constraint, estimate, threshold, sign, first) for sign in (-1.0, 1.0)]
    asked = {i: next(walk) for i, walk in enumerate(walks)}
    sides: dict[int, Side] = {}
    while asked:
        start = np.stack([theta for theta, _ in asked.values()])
        target = np.array([value for _, value in asked.values()])
        end = minimise_on(start, problem, fit.delta, constraint, target)
        for row, i in enumerate(list(asked)):
            reached = bool(np.isfinite(end.objective[row])) and bool(end.converged[row])
            try:
                asked[i] = walks[i].send((end.theta[row], float(end.objective[row]), reached))
            except StopIteration as stop:
                sides[i] = stop.value
                del asked[i]
    return sides[0], sides[1]


def _walk(
    fit: LawFit, constraint: Constraint, estimate: float, threshold: float, sign: float, first: float
) -> Generator[tuple[Array, float], Point, Side]:
    """One side: yields (start [5], value of the quantity) to solve at, is sent the Point there, returns the Side.

    Steps adapt so that sqrt(excess / threshold) grows evenly; it is nearly linear in the quantity, so the end is
    found by interpolating it and solving there once more.
    """
    values, objectives, thetas = [estimate], [fit.objective], [fit.theta]
    depth = [0.0]
    step = sign * first
    for _ in range(STEPS):
        target = values[-1] + step
        if not constraint.possible(target):
            target = 0.25 * values[-1] + 0.75 * constraint.edge(sign)
        theta, objective, reached = yield thetas[-1], target
        if not reached:
            if abs(step) < 1e-4 * max(abs(values[-1] - estimate), 1e-12):
                break
            step *= 0.25
            continue
        values.append(target)
        objectives.append(objective)
        thetas.append(theta)
        depth.append(float(np.sqrt(max(0.0, objectives[-1] - fit.objective) / threshold)))
        if depth[-1] >= 1.0 or (estimate > 0 and not 1.0 / REACH < target / estimate < REACH):
            break
        grown = max(depth[-1] - depth[-2], 0.0)
        step = (target - values[-2]) * float(np.clip(TARGET / max(grown, 1e-12), 0.5, 4.0))
    end_value = None
    if depth[-1] >= 1.0:
        inner, outer, d_in, d_out = values[-2], values[-1], depth[-2], depth[-1]
        theta = thetas[-2]
        for _ in range(6):  # regula falsi on the depth, each a solve on the surface
            share = (1.0 - d_in) / max(d_out - d_in, 1e-300)
            end_value = inner + (outer - inner) * min(max(share, 0.02), 0.98)
            found, objective, reached = yield theta, end_value
            if not reached:
                break
            d_new = float(np.sqrt(max(0.0, objective - fit.objective) / threshold))
            if abs(d_new - 1.0) < 1e-4:
                break
            if d_new < 1.0:
                inner, d_in, theta = end_value, d_new, found
            else:
                outer, d_out = end_value, d_new
    return np.array(values[1:]), np.array(objectives[1:]), np.array(thetas[1:]).reshape(-1, 5), end_value
