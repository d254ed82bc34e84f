"""Fit L(N, D) = E + A/N^alpha + B/D^beta: `fit_law(runs)` finds the optimum and says how it knows.

Starts come from variable projection (start.py): every exponent pair of a grid, followed to its minimum with E, A, B
solved for. Starts that met there go on as one through a fine Huber continuation with the exact Newton solver of
`objective` (in steps of a quarter: in steps of ten the path jumps between the Huber objective's own small basins), and
the lowest end wins. Objective: Hoffmann et al. 2203.15556 App. D.2 and arXiv 2504.07951 App. C; `starts="paper"` runs
that paper's own grid with L-BFGS. What the runs cannot identify is refused with the runs that would fix it. Other laws
and objectives: `fit_form` (formfit.py).
Legend: S starts, m runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from isofusion.errors import InputError
from isofusion.laws.formfit import FormFit, fit_form
from isofusion.laws.forms import NAMES, Form, Params, Scale
from isofusion.laws.formwarn import FLAT, FLAT_SAYS
from isofusion.laws.objective import Problem, Solution, jacobian, minimise, terms, value
from isofusion.laws.residuals import odd_runs, residual_warnings
from isofusion.laws.solve.criterion import Criterion
from isofusion.laws.solve.paperstart import paper_starts
from isofusion.laws.solve.restart import joined, restart
from isofusion.laws.solve.sandwich import sandwich
from isofusion.laws.solve.start import GRID, Projector, descend, exponent_grid, merge, pin, projection_starts
from isofusion.laws.table import Array, Runs, distinct
from isofusion.laws.warn import DECADES, FitWarning, WarningCode, beyond, extrapolates

__all__ = [
    "BOUNDS",
    "DELTA",
    "GRID",
    "FitWarning",
    "FormFit",
    "LawFit",
    "WarningCode",
    "at_bound",
    "check_identified",
    "continuation",
    "evaluate",
    "fewest",
    "fine_continuation",
    "fit_form",
    "fit_law",
    "follow",
    "pin",
    "projection_starts",
    "vanished",
]

DELTA = 1e-3
BOUNDS = (0.01, 3.0)  # of both exponents
LOOSE = 1e-6  # predicted relative decrease at which the next stage starts
SAME_BASIN = 1e-6  # relative difference of objectives that still counts as the same end
LEAST = 3  # degrees of freedom of a drawn variance: below, it has no mean, and refits of such draws say nothing
FREEDOM = 4  # degrees of freedom below which a fit is not tested by its own runs (3 sizes x 3 budgets leave 4)
RANK = 1e-10  # singular value, beside a whole trunk's, from which a direction counts
RATIO = 0.74  # of successive deltas in the fine continuation
Starts = Literal["projection", "paper"]


@dataclass(frozen=True)
class LawFit:
    """A fitted law. E in nats/token; A, B in nats/token at N = 1, D = 1.

    A dropped term has coefficient 0 and exponent NaN.
    """

    E: float
    A: float
    alpha: float
    B: float
    beta: float
    form: Form
    delta: float
    bounds: tuple[float, float]
    objective: float  # SUM of Huber
    starts: int
    share: float  # of starts that ended in the best basin
    next_best: float | None  # next stationary value found, None if every start agrees
    gradient_norm: float  # projected, standardised coordinates
    condition: float  # of the Gauss-Newton matrix, standardised coordinates
    warnings: tuple[FitWarning, ...]
    runs: Runs
    scale: Scale
    theta: Array  # [5] standardised

    @property
    def params(self) -> Params:
        return Params.of(self.E, self.A, self.alpha, self.B, self.beta)

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters that were fitted."""
        return tuple(n for n, free in zip(NAMES, self.form.free, strict=True) if free)

    def predict(self, n: Array | float, d: Array | float) -> Array:
        """Loss in nats/token at n parameters, d tokens."""
        return self.params.predict(n, d)

    @property
    def freedom(self) -> int:
        """Degrees of freedom: runs beyond the fitted parameters."""
        return len(self.runs) - len(self.names)

    @property
    def residuals(self) -> Array:
        """log observed - log predicted, [m]."""
        return np.log(self.runs.loss) - np.log(self.predict(self.runs.n, self.runs.d))

    @property
    def residual_spread(self) -> float:
        """Standard deviation of the residuals (relative loss), corrected for the fitted parameters."""
        return float(np.sqrt(np.sum(self.residuals**2) / max(1, self.freedom)))

    def extrapolation(
        self, n: Array | float, d: Array | float, c: Array | float | None = None, decades: float = DECADES
    ) -> FitWarning | None:
        """A warning if a point lies more than `decades` outside the runs in N, in D or in compute."""
        out = []
        for name, values, seen in (("N", n, self.runs.n), ("D", d, self.runs.d), ("C", c, self.runs.c)):
            if values is None:
                continue
            far, side = beyond(values, seen)
            if extrapolates(far, decades):
                out.append(f"{name} is {far:.1f} decades {side} the runs ({seen.min():.3g} to {seen.max():.3g})")
        return FitWarning("extrapolation", "; ".join(out)) if out else None

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON; NaN becomes null."""

        def plain(v: float) -> float | None:
            return float(v) if np.isfinite(v) else None

        return {
            "law": self.form.formula,
            "label": self.runs.label,
            **{k: plain(getattr(self, k)) for k in NAMES},
            "fixed_e": self.form.fixed_e,
            "delta": self.delta,
            "bounds": list(self.bounds),
            "objective": self.objective,
            "convergence": {
                "starts": self.starts,
                "share_in_best_basin": self.share,
                "next_best_objective": self.next_best,
                "gradient_norm": self.gradient_norm,
                "condition": plain(self.condition),
            },
            "residual_spread": self.residual_spread,
            "runs": len(self.runs),
            "freedom": self.freedom,
            "sizes": self.runs.n_sizes,
            "budgets": self.runs.n_budgets,
            "n_range": [float(self.runs.n.min()), float(self.runs.n.max())],
            "d_range": [float(self.runs.d.min()), float(self.runs.d.max())],
            "compute": self.runs.compute,
            "warnings": [{"code": w.code, "message": w.message} for w in self.warnings],
        }


def fewest(form: Form) -> int:
    """Model sizes (token budgets) that an N term (D term) takes at least."""
    return 2 if form.fixed_e is not None else 3


def check_identified(runs: Runs, form: Form) -> None:
    """Raise InputError where these runs cannot determine the law's parameters, saying which runs would fix it."""
    what = runs.label or "runs"
    needed = fewest(form)
    for wanted, name, values in ((form.n_term, "model size", runs.n), (form.d_term, "token budget", runs.d)):
        have = distinct(values)
        if wanted and have < needed:
            raise InputError(
                f"{what}: {have} {name}{'s' * (have != 1)} ({values.min():.3g} to {values.max():.3g}) cannot "
                f"determine the {'N' if name == 'model size' else 'D'} term of {form.formula}; "
                f"add runs at {needed - have} or more other {name}s"
            )
    free = int(form.free.sum())
    if len(runs) < free + 1:
        raise InputError(
            f"{what}: {len(runs)} runs for {free} parameters; "
            f"at least {free + 1} are needed (3 sizes x 3 budgets is a start)"
        )
    if float(np.ptp(np.log(runs.loss))) < 1e-9:
        raise InputError(f"{what}: every run has the same loss ({runs.loss[0]:.6g}); there is nothing to fit")
    if form.n_term and form.d_term:
        corr = float(np.corrcoef(np.log(runs.n), np.log(runs.d))[0, 1])
        if abs(corr) > 0.9999:
            slope = float(np.polyfit(np.log(runs.n), np.log(runs.d), 1)[0])
            raise InputError(
                f"{what}: tokens follow parameters exactly (D ~ N^{slope:.2f}), so the N and D terms "
                f"cannot be told apart; add runs at two or more token budgets at the smallest and at the largest size"
            )


def spared(fit: LawFit) -> npt.NDArray[np.int64]:
    """Odd runs of a fit (residuals.py), the farthest first, if the others identify the law and its noise; else none.

    Its noise: LEAST degrees of freedom are left, and inside trunks that have branches one, where all runs have it (else
    the luck of trunks would be taken for that of branches). Trunks keep LEAST beyond the law's level: `odd_runs` calls
    fewer than half of those odd.
    """
    odd = odd_runs(fit.residuals, len(fit.names), fit.runs.group)
    if not len(odd):
        return odd
    others = fit.runs.select(np.delete(np.arange(len(fit.runs)), odd))
    try:
        check_identified(others, fit.form)
    except InputError:
        return odd[:0]
    if len(others) - len(fit.names) < LEAST:
        return odd[:0]
    rows = np.arange(len(fit.runs))
    branched = len(np.unique(others.group)) < len(others)
    lost = branched and _inside_freedom(fit, rows) > 0 >= _inside_freedom(fit, np.setdiff1d(rows, odd))
    return odd[:0] if lost else odd


def _inside_freedom(fit: LawFit, rows: npt.NDArray[np.int64]) -> int:
    """Degrees of freedom of the residuals of these rows inside their trunks, the law's tangent space taken out."""
    problem = Problem.of(fit.runs, fit.form, fit.scale, fit.bounds)
    basis = np.linalg.qr(jacobian(fit.theta[None], problem)[0][fit.form.free].T[rows])[0]
    trunks, member = np.unique(fit.runs.group[rows], return_inverse=True)
    count = np.bincount(member)
    means = np.stack([np.bincount(member, column) for column in basis.T]) / count
    singular = np.linalg.svd(basis - means[:, member].T, compute_uv=False)
    return len(rows) - len(trunks) - int(np.sum(singular > RANK * np.sqrt(count.max())))


def continuation(delta: float) -> list[float]:
    """Deltas from smooth to the one asked for: 0.1, 0.01, ... , delta."""
    out = [d for d in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5) if d > delta * 1.001]
    return out + [delta]


def fine_continuation(delta: float) -> list[float]:
    """Deltas from 0.1 down to the one asked for in steps of about a quarter."""
    if delta >= 0.1:
        return [delta]
    steps = int(np.ceil(np.log(delta / 0.05) / np.log(RATIO))) if delta < 0.05 else 0
    return [0.1, *(np.geomspace(0.05, delta, steps + 1) if steps else [delta])]


def follow(theta: Array, problem: Problem, stages: list[float]) -> Solution:
    """Minimise at each delta in turn, loosely until the last; a delta that no residual exceeds changes nothing."""
    reach = np.inf  # the largest residual so far
    for stage in stages[:-1]:
        if stage < reach:
            theta = minimise(theta, problem, stage, tolerance=LOOSE).theta
            if stage != stages[-2]:
                reach = float(np.max(np.abs(terms(theta, problem.x, problem.y)[0] - problem.log_loss)))
    return minimise(theta, problem, stages[-1])


def fit_law(
    runs: Runs,
    *,
    n_term: bool = True,
    d_term: bool = True,
    fixed_e: float | None = None,
    delta: float = DELTA,
    bounds: tuple[float, float] = BOUNDS,
    grid: int = GRID,
    starts: Starts = "projection",
    near: LawFit | None = None,
) -> LawFit:
    """Fit the law to the runs' losses. `fixed_e` fixes the irreducible loss (the oracle entropy of a known world).

    delta: Huber's threshold on log residuals. bounds: of both exponents. grid: starts per exponent axis.
    starts="paper": the grid and L-BFGS of arXiv 2504.07951 App. C as published (full law only; about a minute).
    near: a fit of most of the same runs, whose exponents are one start more.
    Raises InputError where the runs cannot identify the law.
    """
    form = Form(n_term, d_term, fixed_e)
    if not delta > 0:
        raise InputError(f"delta = {delta}: give a positive threshold on log residuals (default {DELTA})")
    if not 0 < bounds[0] < bounds[1]:
        raise InputError(f"bounds = {bounds}: give 0 < lowest exponent < highest exponent")
    if grid < 2:
        raise InputError(f"grid = {grid}: give 2 or more starts per exponent axis")
    if fixed_e is not None and fixed_e >= runs.loss.min():
        raise InputError(
            f"{runs.label or 'runs'}: fixed E = {fixed_e:.6g} is not below the lowest loss {runs.loss.min():.6g}"
        )
    check_identified(runs, form)
    scale = Scale.of(runs)
    problem = Problem.of(runs, form, scale, bounds)
    if starts == "paper":
        if not form.free.all():
            raise InputError("starts = 'paper' is the published fit of the full law; drop n_term, d_term and fixed_e")
        ends, weight = paper_starts(runs, problem, scale, delta)
    elif starts == "projection":
        ends, weight = _search(runs, form, scale, problem, bounds, delta, grid, near)
    else:
        raise InputError(f"starts = {starts!r}: choose 'projection' or 'paper'")
    best = int(np.argmin(ends.objective))
    low = float(ends.objective[best])
    same = ends.objective <= low + SAME_BASIN * abs(low) + 1e-20
    others = ends.objective[~same & np.isfinite(ends.objective)]
    theta = ends.theta[best]
    params = scale.to_params(theta[None])
    seen = form.free & ~vanished(theta, problem)  # what is gone cannot be flat; its own warning says it is gone
    gauss = jacobian(theta[None], problem)[0][seen]
    singular = np.linalg.svd(gauss, compute_uv=False)
    condition = float((singular[0] / singular[-1]) ** 2) if len(singular) and singular[-1] > 0 else np.inf
    fit = LawFit(
        E=float(params.E[0]) if fixed_e is None else float(fixed_e),
        A=float(params.A[0]) if n_term else 0.0,
        alpha=float(params.alpha[0]) if n_term else np.nan,
        B=float(params.B[0]) if d_term else 0.0,
        beta=float(params.beta[0]) if d_term else np.nan,
        form=form,
        delta=delta,
        bounds=bounds,
        objective=low,
        starts=int(weight.sum()),
        share=float(weight[same].sum() / weight.sum()),
        next_best=float(others.min()) if len(others) else None,
        gradient_norm=float(ends.gradient[best]),
        condition=condition,
        warnings=(),
        runs=runs,
        scale=scale,
        theta=theta,
    )
    object.__setattr__(fit, "warnings", _warnings(fit, bool(ends.converged[best]), gauss, seen))
    return fit


def _search(
    runs: Runs,
    form: Form,
    scale: Scale,
    problem: Problem,
    bounds: tuple[float, float],
    delta: float,
    grid: int,
    near: LawFit | None,
) -> tuple[Solution, Array]:
    """Ends of the search and how many starts each stands for (0: an extra end, not one of the grid's)."""
    projector = Projector(runs, form, scale)
    exponents = exponent_grid(form, scale, bounds, grid)
    if near is not None:
        both = np.nan_to_num(np.clip([near.alpha, near.beta], *bounds)) * [scale.spread_n, scale.spread_d]
        exponents = np.concatenate([exponents, np.where([form.n_term, form.d_term], both, 0.0)[None]])
    first = projector(exponents)
    low_exponents, coefficients, _ = descend(projector, exponents, first, bounds)
    use = form.free[[2, 4]]
    index, weight = merge(low_exponents[:, use] if use.any() else low_exponents)
    main = follow(projector.theta(low_exponents[index], coefficients[index]), problem, fine_continuation(delta))
    # the raw projections with the least error go straight to this delta: another way down, to see other ends
    direct = np.argsort(first.error)[: max(1, len(exponents) // 32)]
    beside = projector.theta(exponents[direct], first.coefficients[direct])
    main, others = restart(main, problem, delta, min(1.0, grid / GRID), beside)
    ends = joined([main, *others])
    return ends, np.concatenate([weight, np.zeros(len(ends.theta) - len(weight))])


def evaluate(runs: Runs, params: Params, delta: float = DELTA) -> float:
    """The objective at given parameters, e.g. a published fit's."""
    scale = Scale.of(runs)
    problem = Problem.of(runs, Form(), scale, BOUNDS)
    return float(value(scale.to_theta(params)[None], problem, delta)[0])


def vanished(theta: Array, problem: Problem) -> np.ndarray:
    """bool[..., 5]: E under 0.1 %, or the N or D term at its largest under 0.01 %, of the lowest loss."""
    low = float(np.min(problem.log_loss))
    e = theta[..., 0] < low + np.log(1e-3)
    a = theta[..., 1] - theta[..., 2] * problem.x.min() < low + np.log(1e-4)
    b = theta[..., 3] - theta[..., 4] * problem.y.min() < low + np.log(1e-4)
    return np.stack([e, a, a, b, b], axis=-1)


def at_bound(theta: Array, problem: Problem) -> np.ndarray:
    """bool[S]: a free exponent sits at an edge of its range, or the term it belongs to has vanished."""
    out = np.zeros(len(theta), dtype=bool)
    for coefficient, exponent in ((1, 2), (3, 4)):
        if problem.free[exponent]:
            tight = 1e-6 * (problem.upper[exponent] - problem.lower[exponent])
            out |= (theta[:, exponent] <= problem.lower[exponent] + tight) | (
                theta[:, exponent] >= problem.upper[exponent] - tight
            )
            out |= vanished(theta, problem)[:, coefficient]
    return out


def _warnings(fit: LawFit, converged: bool, gauss: Array, seen: np.ndarray) -> tuple[FitWarning, ...]:
    out: list[FitWarning] = []
    runs, form = fit.runs, fit.form

    def say(code: WarningCode, message: str) -> None:
        out.append(FitWarning(code, message))

    if not converged:
        say("not-converged", f"the best start stopped at gradient norm {fit.gradient_norm:.1e}")
    if form.fixed_e is None and not seen[0]:
        say("irreducible-loss-zero", f"E went to {fit.E:.2g}; the runs do not reach low enough to see a floor")
    for used, name, exponent, there in (
        (form.n_term, "alpha", fit.alpha, seen[1]),
        (form.d_term, "beta", fit.beta, seen[3]),
    ):
        if not used:
            continue
        edge = next((b for b in fit.bounds if abs(exponent - b) < 1e-6 * (fit.bounds[1] - fit.bounds[0])), None)
        if edge is not None:
            say("exponent-at-bound", f"{name} sits at its bound {edge:g}; the law does not describe these runs")
        if not there:
            say("term-vanished", f"the term of {name} is under 0.01 % of every loss; widen its range")
    if form.n_term and runs.n_sizes < 5:
        left = runs.n_sizes - 1
        test = (
            f"a hold-out then predicts from {left}, a weak test; train 5 or more"
            if left >= fewest(form)
            else "no hold-out can test it; train 5 or more"
        )
        say("too-few-sizes", f"alpha rests on {runs.n_sizes} model sizes; {test}")
    if form.d_term and runs.n_budgets < 4:
        say("too-few-budgets", f"beta rests on {runs.n_budgets} token budgets; add longer or shorter runs")
    if fit.freedom < FREEDOM:
        say(
            "too-few-runs",
            f"{len(runs)} runs for {len(fit.names)} parameters leave {fit.freedom} degree{'s' * (fit.freedom != 1)} of "
            "freedom: the law passes near its runs whatever they are, and no choice or interval can show how wrong it "
            f"is; train {FREEDOM - fit.freedom} or more other runs",
        )
    out += residual_warnings(runs, fit.residuals, len(fit.names), apart=len(spared(fit)) > 0)
    if fit.condition > 1e12:
        say("unidentified", f"condition number {fit.condition:.1e}: some parameters trade off exactly; widen N and D")
        return tuple(out)
    log_loss = np.log(runs.loss)
    deviation = sandwich(gauss, log_loss - fit.residuals, log_loss, Criterion("huber", fit.delta))
    error = dict(zip([n for n, s in zip(NAMES, seen, strict=True) if s], deviation, strict=True))
    for name, unit in (("alpha", fit.scale.spread_n), ("beta", fit.scale.spread_d)):
        at = getattr(fit, name)
        if name in error and not error[name] / unit <= FLAT * at:
            say("flat", f"{name} = {at:.3g} {FLAT_SAYS.format(error[name] / unit)}")
    return tuple(out)
