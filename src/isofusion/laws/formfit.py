"""`fit_form`: fit any law of FORMS, or your own, to columns of numbers, with the same report as `fit_law`.

Starts by variable projection (solve/formstart.py), the best of them followed by exact Newton steps through a fine
continuation from smooth to the measure asked for (solve/criterion.py); starts that met go on as one; corners are
finished exactly. Legend: S starts, P parameters, m rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from isofusion.errors import InputError
from isofusion.laws.catalogue.law import Law
from isofusion.laws.forms import find
from isofusion.laws.formwarn import condition_of, form_warnings, standard_errors
from isofusion.laws.solve.criterion import Criterion, FormProblem, Kind, polish, se_weights
from isofusion.laws.solve.formstart import form_starts
from isofusion.laws.solve.newton import Solution, newton
from isofusion.laws.table import Array, Runs
from isofusion.laws.warn import DECADES, FitWarning, beyond, extrapolates

STARTS = 256
KEPT = 48  # projected starts with the least error that are followed
DIRECT = 8  # starts that skip the smooth measures
PATHS = 12  # distinct smooth ends that are followed to the end
SAME_BASIN = 1e-6  # relative difference of objectives that still counts as the same end
SLOTS = 1 << 16  # S * P * m numbers worked on at once


@dataclass(frozen=True)
class FormFit:
    """A fitted law; `params` by name in natural units, `errors` sandwich standard errors, rows taken for independent
    (solve/sandwich.py)."""

    law: Law
    params: dict[str, float]
    errors: dict[str, float]
    criterion: Criterion
    objective: float  # SUM over rows of the exact measure
    starts: int  # starts that were followed
    share: float  # of them, that ended in the best basin
    next_best: float | None  # next stationary value found, None if every start agrees
    gradient_norm: float  # in the solver's coordinates; at a corner, of the Lagrangian
    condition: float  # of the Gauss-Newton matrix, columns of unit length, coefficients taken out of their exponents
    warnings: tuple[FitWarning, ...]
    columns: dict[str, Array]
    target: Array  # [m] what was fitted
    weights: Array  # [m]
    fixed: dict[str, float]
    theta: Array  # [P]
    lower: Array
    upper: Array
    label: str = ""

    def predict(self, columns: Mapping[str, Any] | Runs) -> Array:
        """The law at new rows: [m]. Raises InputError where a column is missing or out of the law's domain."""
        x = _columns(columns, self.law, self.label or "columns")
        self.law.valid(x, self.label or "columns")
        return self.law.predict(self.params, x)

    def extrapolation(self, columns: Mapping[str, Any] | Runs, decades: float = DECADES) -> FitWarning | None:
        """A warning if a row lies more than `decades` outside the fitted rows in any positive column."""
        out = []
        for name, values in _columns(columns, self.law, self.label or "columns").items():
            seen = self.columns[name]
            if not ((seen > 0).all() and (values > 0).all()):
                continue
            far, side = beyond(values, seen)
            if extrapolates(far, decades):
                out.append(f"{name} is {far:.1f} decades {side} the rows ({seen.min():.3g} to {seen.max():.3g})")
        return FitWarning("extrapolation", "; ".join(out)) if out else None

    @property
    def residuals(self) -> Array:
        """log observed - log predicted, [m]."""
        return np.log(self.target) - self.law.log_prediction(self.theta[None], self.columns)[0]

    @property
    def residual_spread(self) -> float:
        """Standard deviation of the residuals (relative), corrected for the fitted parameters."""
        free = max(1, len(self.target) - len(self.law.parameters) + len(self.fixed))
        return float(np.sqrt(np.sum(self.weights * self.residuals**2) / free))

    @property
    def free(self) -> np.ndarray:
        """bool[P]: which parameters were fitted."""
        return np.array([name not in self.fixed for name in self.law.names])

    def refit(self, log_loss: Array | None = None, weights: Array | None = None) -> tuple[dict[str, Array], Array]:
        """Refit draws from this fit: log targets [S, m] and/or row weights [S, m] -> parameters [S] by name, objective.

        Row weights multiply those of the fit. Corners (l1, asymmetric) stay rounded at the last width.
        """
        draws = len(log_loss) if log_loss is not None else len(weights) if weights is not None else 1
        rows = np.log(self.target) if log_loss is None else log_loss
        weight = self.weights if weights is None else weights * self.weights
        base = FormProblem(self.law, self.columns, rows, weight, self.criterion, 1.0)
        widths = self.criterion.widths(float(np.median(self.target)))[-6:]
        if not self.criterion.cornered and len(widths) > 2:
            widths = [widths[-1] * 10.0, widths[-1]]
        end = _follow(np.repeat(self.theta[None], draws, axis=0), base, widths, self.lower, self.upper, self.free)
        return self.law.natural(end.theta), end.objective

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON; NaN becomes null."""

        def plain(v: float) -> float | None:
            return float(v) if np.isfinite(v) else None

        return {
            "law": self.law.name,
            "formula": self.law.formula,
            "source": self.law.source,
            "label": self.label,
            "parameters": {
                p.name: {
                    "value": plain(self.params[p.name]),
                    "error": plain(self.errors.get(p.name, np.nan)),
                    "unit": p.unit,
                    "fixed": p.name in self.fixed,
                }
                for p in self.law.parameters
            },
            "errors": "sandwich estimates, rows taken for independent; where runs share trunks see the bootstrap",
            "objective": {"kind": self.criterion.kind, "delta": self.criterion.delta, "value": self.objective},
            "convergence": {
                "starts": self.starts,
                "share_in_best_basin": self.share,
                "next_best_objective": self.next_best,
                "gradient_norm": plain(self.gradient_norm),
                "condition": plain(self.condition),
            },
            "residual_spread": self.residual_spread,
            "rows": len(self.target),
            "warnings": [{"code": w.code, "message": w.message} for w in self.warnings],
        }


def fit_form(
    columns: Mapping[str, Any] | Runs,
    form: str | Law,
    *,
    target: str | None = None,
    objective: Kind | Criterion = "huber",
    delta: float = 1e-3,
    w: float = 10.0,
    weights: Array | Sequence[float] | Literal["se"] | None = None,
    fixed: Mapping[str, float] | None = None,
    bounds: Mapping[str, tuple[float, float]] | None = None,
    starts: int = STARTS,
    label: str = "",
) -> FormFit:
    """Fit a law by name (FORMS) or instance to columns [m] (a mapping of arrays, or Runs: n, d, c, loss, se).

    target: the column that is fitted (default the law's: "loss"). objective: huber (delta), log-squares, squares, l1,
    asymmetric (w) or a Criterion. weights: row weights, or "se" for the column `se` (standard errors of the loss).
    fixed: parameters held at a value. bounds: of parameters, in natural units. starts: projected starts.
    Raises InputError for an unknown law, missing or bad columns, or rows that cannot identify the law, saying which
    runs would.
    """
    law = find(form) if isinstance(form, str) else form
    criterion = objective if isinstance(objective, Criterion) else Criterion(objective, delta, w)
    label = label or (columns.label if isinstance(columns, Runs) else "") or "runs"
    x = _columns(columns, law, label)
    name = target or law.target
    y = _column(columns, name, label)
    _check_target(y, name, label, len(next(iter(x.values()))))
    law.valid(x, label)
    held = _known(law, fixed, "fixed")
    free = np.array([n not in held for n in law.names])
    if not free.any():
        raise InputError(f"{label}: every parameter of {law.name} is fixed; leave one free")
    if len(y) < int(free.sum()) + 1:
        raise InputError(
            f"{label}: {len(y)} runs for the {int(free.sum())} parameters of {law.name}; at least "
            f"{int(free.sum()) + 1} are needed: {law.identified_by}"
        )
    law.identified(x, frozenset(np.array(law.names)[free].tolist()), label)
    lower, upper = _box(law, held, bounds, y)
    weight = np.ones(len(y))
    if isinstance(weights, str):
        weight = se_weights(_column(columns, weights, label), y, criterion.kind)
    elif weights is not None:
        weight = np.asarray(weights, dtype=np.float64)
        if weight.shape != y.shape or not (np.isfinite(weight) & (weight >= 0)).all() or not weight.any():
            raise InputError(f"{label}: weights must be {len(y)} finite numbers >= 0, not all zero")
    problem = FormProblem(law, x, np.log(y), weight, criterion, 1.0)
    first, error = form_starts(law, x, y, held, lower, upper, starts)
    kept = np.argsort(error)[: KEPT if len(first) > KEPT else len(first)]
    kept = kept[np.isfinite(error[kept])]
    if not len(kept):
        raise InputError(
            f"{label}: {law.name} is not defined at any start; widen the bounds or check the columns' units"
        )
    widths = criterion.widths(float(np.median(y)))
    ends, count = _search(first[kept], problem, widths, lower, upper, free)
    # the starts that are best in the measure itself go straight to its last widths: on a flat profile another way down
    direct = first[np.argsort(problem.exact(first))[:DIRECT]]
    straight = _finish(_follow(direct, problem, widths[-4:], lower, upper, free), problem, widths, lower, upper, free)
    ends = Solution(*(np.concatenate([getattr(ends, k), getattr(straight, k)]) for k in ends.__dataclass_fields__))
    count = np.concatenate([count, np.ones(len(direct))])
    followed = len(kept) + len(direct)
    best = int(np.argmin(ends.objective))
    theta, low, gradient = ends.theta[best], float(ends.objective[best]), float(ends.gradient[best])
    if not np.isfinite(low):
        raise InputError(f"{label}: {law.name} could not be evaluated near any start; check the columns' units")
    same = ends.objective <= low * (1.0 + SAME_BASIN) + 1e-20
    others = ends.objective[~same & np.isfinite(ends.objective)]
    natural = {k: float(v) for k, v in law.natural(theta).items()} | held
    condition = condition_of(law, theta, x, weight, free)
    fit = FormFit(
        law=law,
        params=natural,
        errors={},
        criterion=criterion,
        objective=low,
        starts=followed,
        share=float(count[same].sum() / followed),
        next_best=float(others.min()) if len(others) else None,
        gradient_norm=gradient,
        condition=condition,
        warnings=(),
        columns=x,
        target=y,
        weights=weight,
        fixed=held,
        theta=theta,
        lower=lower,
        upper=upper,
        label=label,
    )
    fit = replace(fit, errors=standard_errors(fit))
    return replace(fit, warnings=tuple(form_warnings(fit, bool(ends.converged[best]))))


def follow_starts(
    columns: Mapping[str, Any] | Runs,
    law: Law,
    starts: Sequence[Mapping[str, float]],
    *,
    delta: float = 1e-3,
    fixed: Mapping[str, float] | None = None,
    bounds: Mapping[str, tuple[float, float]] | None = None,
) -> tuple[dict[str, float], float]:
    """Huber fit of a law from given parameters alone, where good ones are known: (parameters, objective) of the best.

    No search, no report: `fit_form` has both. Raises InputError for unknown names in fixed or bounds.
    """
    label = "columns"
    x, y = _columns(columns, law, label), _column(columns, law.target, label)
    held = _known(law, fixed, "fixed")
    free = np.array([n not in held for n in law.names])
    lower, upper = _box(law, held, bounds, y)
    theta = np.array([[float(p.to_theta(start[p.name])) for p in law.parameters] for start in starts])
    problem = FormProblem(law, x, np.log(y), np.ones(len(y)), Criterion("huber", delta), 1.0)
    ends = _follow(theta, problem, problem.criterion.widths(float(np.median(y))), lower, upper, free)
    best = int(np.argmin(ends.objective))
    return {k: float(v) for k, v in law.natural(ends.theta[best]).items()} | held, float(ends.objective[best])


def _search(
    theta: Array, problem: FormProblem, widths: list[float], lower: Array, upper: Array, free: np.ndarray
) -> tuple[Solution, Array]:
    """Follow every start in the smoothest measure, then each distinct end on: ends, and the starts behind each."""
    smooth = Criterion("log-squares")
    ends = _newton(theta, replace(problem, criterion=smooth), lower, upper, free, 1e-10)
    index, count = _distinct(ends)
    index, count = index[:PATHS], count[:PATHS]
    out = _follow(ends.theta[index], problem, widths, lower, upper, free)
    return _finish(out, problem, widths, lower, upper, free), count


def _finish(
    out: Solution, problem: FormProblem, widths: list[float], lower: Array, upper: Array, free: np.ndarray
) -> Solution:
    """The same ends in the exact measure, its corners found exactly where they are."""
    if not problem.criterion.cornered:
        return out
    objective = problem.exact(out.theta)
    points, gradient, converged = out.theta.copy(), out.gradient.copy(), np.zeros(len(out.theta), dtype=bool)
    for s in range(len(points)):
        for width in (widths[-1], widths[-1] * 10, widths[-1] / 10):
            done = polish(points[s], replace(problem, width=width), free & _inside(points[s], lower, upper))
            if done is None or (free & ~((done[0] >= lower) & (done[0] <= upper))).any():
                continue
            if done[1] <= objective[s] * (1 + 1e-12):
                points[s], objective[s], gradient[s] = done
                converged[s] = True
                break
    return Solution(points, objective, gradient, converged)


def _inside(theta: Array, lower: Array, upper: Array) -> np.ndarray:
    return np.asarray((theta > lower) & (theta < upper))


def _follow(
    theta: Array, problem: FormProblem, widths: list[float], lower: Array, upper: Array, free: np.ndarray
) -> Solution:
    for width in widths[:-1]:
        theta = _newton(theta, replace(problem, width=width), lower, upper, free, 1e-9, 60).theta
    return _newton(theta, replace(problem, width=widths[-1]), lower, upper, free, 1e-15)


def _newton(
    theta: Array,
    problem: FormProblem,
    lower: Array,
    upper: Array,
    free: np.ndarray,
    tolerance: float,
    iterations: int = 200,
) -> Solution:
    rows = problem.log_loss.shape[-1]
    longest = np.array([10.0 if p.log or p.linear else 0.5 for p in problem.law.parameters])
    return newton(
        theta,
        problem,
        lower,
        upper,
        free,
        slots=max(4, SLOTS // (rows * theta.shape[1])),
        max_iterations=iterations,
        tolerance=tolerance,
        longest=longest,
        tiny=1e-28 * rows,
    )


def _distinct(ends: Solution) -> tuple[np.ndarray, Array]:
    """(one index per distinct objective, ascending; how many starts share it)."""
    order = np.argsort(ends.objective)
    value = ends.objective[order]
    new = np.concatenate([[True], np.diff(value) > 1e-6 * np.abs(value[:-1]) + 1e-18])
    group = np.cumsum(new) - 1
    return order[new], np.bincount(group).astype(np.float64)


def check_columns(columns: Mapping[str, Any] | Runs, law: Law, label: str) -> None:
    """Raise InputError, naming the row, where a column is missing, of another length or out of the law's domain."""
    law.valid(_columns(columns, law, label), label)


def _columns(columns: Mapping[str, Any] | Runs, law: Law, label: str) -> dict[str, Array]:
    out = {name: _column(columns, name, label) for name in law.columns}
    lengths = {name: len(v) for name, v in out.items()}
    if len(set(lengths.values())) > 1:
        raise InputError(f"{label}: columns of different lengths: {', '.join(f'{k} {v}' for k, v in lengths.items())}")
    return out


def _column(columns: Mapping[str, Any] | Runs, name: str, label: str) -> Array:
    if isinstance(columns, Runs):
        value = getattr(columns, name, None) if name in ("n", "d", "c", "loss", "se", "oracle") else None
        have = "n, d, c, loss"
    else:
        value = columns.get(name)
        have = ", ".join(columns) or "none"
    if value is None:
        raise InputError(f"{label}: this law needs a column '{name}'; the columns are {have}")
    try:
        return np.atleast_1d(np.asarray(value, dtype=np.float64)).ravel()
    except (TypeError, ValueError) as error:
        raise InputError(f"{label}: column '{name}' holds something that is not a number: {error}") from error


def _check_target(y: Array, name: str, label: str, rows: int) -> None:
    if len(y) != rows:
        raise InputError(f"{label}: column '{name}' has {len(y)} rows and the others {rows}; they must be equal")
    bad = np.flatnonzero(~(np.isfinite(y) & (y > 0)))
    if len(bad):
        raise InputError(
            f"{label}: '{name}' must be positive and finite (row {bad[0]}: {y[bad[0]]:g}); drop those rows"
        )
    if float(np.ptp(np.log(y))) < 1e-9:
        raise InputError(f"{label}: every run has the same {name} ({y[0]:.6g}); there is nothing to fit")


def _known(law: Law, values: Mapping[str, float] | None, what: str) -> dict[str, float]:
    out = {k: float(v) for k, v in (values or {}).items()}
    for name, value in out.items():
        if name not in law.names:
            raise InputError(f"{what}: {law.name} has no parameter '{name}'; it has {', '.join(law.names)}")
        if not np.isfinite(value) or (law.parameters[law.names.index(name)].log and value <= 0):
            raise InputError(f"{what}: {name} = {value:g} is not a value {law.name} can take")
    return out


def _box(
    law: Law, held: Mapping[str, float], bounds: Mapping[str, tuple[float, float]] | None, y: Array
) -> tuple[Array, Array]:
    """Bounds in theta, [P] each."""
    lower, upper = np.empty(len(law.parameters)), np.empty(len(law.parameters))
    for i, p in enumerate(law.parameters):
        low, high = p.lower, p.upper
        if bounds and p.name in bounds:
            low, high = bounds[p.name]
            if not low < high or (p.log and low <= 0):
                raise InputError(f"bounds: {p.name} in ({low:g}, {high:g}); give lowest < highest" + " > 0" * p.log)
        lower[i], upper[i] = p.to_theta(low), p.to_theta(high)
        if p.name == "E" and not (bounds and "E" in bounds):
            lower[i] = float(np.log(y.min())) - 16.0  # below 1e-7 of the lowest loss it is at its floor
    for name in bounds or {}:
        if name not in law.names:
            raise InputError(f"bounds: {law.name} has no parameter '{name}'; it has {', '.join(law.names)}")
    for name, value in held.items():
        i = law.names.index(name)
        lower[i] = upper[i] = law.parameters[i].to_theta(value)
    return lower, upper
