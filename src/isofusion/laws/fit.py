"""Fit L(N, D) = E + A/N^alpha + B/D^beta: `fit_law(runs)` finds the optimum and says how it knows.

Starts come from variable projection (for each exponent pair of a grid the non-negative E, A, B solve a 3x3 weighted
least-squares problem), go through Huber continuation 0.1 -> 0.01 -> delta with the exact Newton solver of
`objective`, and the lowest end wins. Method and measurements: reference to Hoffmann et al. 2203.15556 App. D.2 and
arXiv 2504.07951 App. C for the objective. What the runs cannot identify is refused with the runs that would fix it.
Legend: S starts, m runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from isofusion.errors import InputError
from isofusion.laws.forms import NAMES, Form, Params, Scale
from isofusion.laws.objective import Problem, Solution, jacobian, minimise, value
from isofusion.laws.table import Array, Runs, distinct

DELTA = 1e-3
BOUNDS = (0.01, 3.0)  # of both exponents
GRID = 16  # exponents per axis of the variable-projection grid
SAME_BASIN = 1e-6  # relative difference of objectives that still counts as the same end

WarningCode = Literal[
    "irreducible-loss-zero",
    "term-vanished",
    "exponent-at-bound",
    "too-few-sizes",
    "too-few-budgets",
    "extrapolation",
    "flat",
    "unidentified",
    "not-converged",
]


@dataclass(frozen=True)
class FitWarning:
    """Something a reader of the fit must know: a code for programs, a sentence for people."""

    code: WarningCode
    message: str

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


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
    def residuals(self) -> Array:
        """log observed - log predicted, [m]."""
        return np.log(self.runs.loss) - np.log(self.predict(self.runs.n, self.runs.d))

    @property
    def residual_spread(self) -> float:
        """Standard deviation of the residuals (relative loss), corrected for the fitted parameters."""
        free = max(1, len(self.runs) - len(self.names))
        return float(np.sqrt(np.sum(self.residuals**2) / free))

    def extrapolation(self, n: Array | float, d: Array | float, decades: float = 1.0) -> FitWarning | None:
        """A warning if a point lies more than `decades` outside the runs in N or in D."""
        out = []
        for name, values, seen in (("N", n, self.runs.n), ("D", d, self.runs.d)):
            values = np.asarray(values, dtype=np.float64)
            above = float(np.log10(values.max() / seen.max()))
            below = float(np.log10(seen.min() / values.min()))
            if max(above, below) > decades:
                where = f"{above:.1f} decades above" if above > below else f"{below:.1f} decades below"
                out.append(f"{name} is {where} the runs ({seen.min():.3g} to {seen.max():.3g})")
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


def projection_starts(
    runs: Runs, form: Form, scale: Scale, bounds: tuple[float, float], grid: int = GRID
) -> tuple[Array, Array]:
    """theta [S, 5] and its relative squared error [S] per exponent pair; coefficients by non-negative LS."""
    exponents = np.geomspace(max(bounds[0], 0.05), min(bounds[1], 2.0), grid)
    alphas = exponents if form.n_term else np.ones(1)
    betas = exponents if form.d_term else np.ones(1)
    alpha, beta = (v.ravel() for v in np.meshgrid(alphas, betas, indexing="ij"))
    # columns relative to the loss, so that least squares weighs relative errors as the objective does
    inverse = 1.0 / runs.loss
    centred_n, centred_d = np.log(runs.n) - scale.mean_n, np.log(runs.d) - scale.mean_d
    columns = np.stack(
        [
            np.broadcast_to(inverse, (len(alpha), len(runs))),
            np.exp(-alpha[:, None] * centred_n) * inverse,
            np.exp(-beta[:, None] * centred_d) * inverse,
        ],
        axis=1,
    )
    target = np.ones(len(runs)) - (0.0 if form.fixed_e is None else form.fixed_e * inverse)
    wanted = form.free[[0, 1, 3]]
    gram = np.matmul(columns, np.swapaxes(columns, 1, 2))
    moment = np.matmul(columns, target)
    best = np.full(len(alpha), np.inf)
    coefficients = np.zeros((len(alpha), 3))
    for subset in range(1, 8):  # every active set of the 3 coefficients: exact NNLS
        on = np.array([bool(subset & 1), bool(subset & 2), bool(subset & 4)])
        if (on & ~wanted).any():
            continue
        idx = np.flatnonzero(on)
        sub = gram[:, idx[:, None], idx] + 1e-13 * np.eye(len(idx)) * np.trace(gram, axis1=1, axis2=2)[:, None, None]
        solved = np.linalg.solve(sub, moment[:, idx, None])[..., 0]
        error = target @ target - np.sum(solved * moment[:, idx], axis=1)
        ok = (solved >= 0).all(axis=1) & (error < best)
        best = np.where(ok, error, best)
        full = np.zeros_like(coefficients)
        full[:, idx] = solved
        coefficients = np.where(ok[:, None], full, coefficients)
    # a term projected away starts small rather than at zero, where its gradient would vanish
    coefficients = np.maximum(coefficients, 1e-3 * runs.loss.min())
    theta = np.stack(
        [
            np.log(coefficients[:, 0]),
            np.log(coefficients[:, 1]),
            alpha * scale.spread_n,
            np.log(coefficients[:, 2]),
            beta * scale.spread_d,
        ],
        axis=1,
    )
    return pin(theta, form), best


def pin(theta: Array, form: Form) -> Array:
    """theta with the parameters that are not free at their fixed values (a dropped term's log coefficient is -inf)."""
    theta = theta.copy()
    if form.fixed_e is not None:
        theta[..., 0] = np.log(form.fixed_e) if form.fixed_e > 0 else -np.inf
    if not form.n_term:
        theta[..., 1], theta[..., 2] = -np.inf, 0.0
    if not form.d_term:
        theta[..., 3], theta[..., 4] = -np.inf, 0.0
    return theta


def continuation(delta: float) -> list[float]:
    """Deltas from smooth to the one asked for: 0.1, 0.01, ... , delta."""
    out = [d for d in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5) if d > delta * 1.001]
    return out + [delta]


def follow(theta: Array, problem: Problem, stages: list[float]) -> Solution:
    """Minimise at each delta in turn, loosely until the last."""
    for stage in stages[:-1]:
        theta = minimise(theta, problem, stage, tolerance=1e-7).theta
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
) -> LawFit:
    """Fit the law to the runs' losses. `fixed_e` fixes the irreducible loss (the oracle entropy of a known world).

    delta: Huber's threshold on log residuals. bounds: of both exponents. grid: starts per exponent axis.
    Raises InputError where the runs cannot identify the law.
    """
    form = Form(n_term, d_term, fixed_e)
    if not delta > 0:
        raise InputError(f"delta = {delta}: give a positive threshold on log residuals (default {DELTA})")
    if not 0 < bounds[0] < bounds[1]:
        raise InputError(f"bounds = {bounds}: give 0 < lowest exponent < highest exponent")
    if fixed_e is not None and fixed_e >= runs.loss.min():
        raise InputError(
            f"{runs.label or 'runs'}: fixed E = {fixed_e:.6g} is not below the lowest loss {runs.loss.min():.6g}"
        )
    check_identified(runs, form)
    scale = Scale.of(runs)
    problem = Problem.of(runs, form, scale, bounds)
    theta, error = projection_starts(runs, form, scale, bounds, grid)
    starts = len(theta)
    stages = continuation(delta)
    first = minimise(theta, problem, stages[0], 60, 1e-7)
    # starts that already met go on as one; the raw projections with the least error also go straight to the last stages
    weight, unique = _merge(first)
    direct = np.argsort(error)[:8]
    ends = np.concatenate([first.theta[unique], theta[direct]])
    weight = np.concatenate([weight, np.zeros(len(direct))])
    last = follow(ends, problem, stages)
    best = int(np.argmin(last.objective))
    low = float(last.objective[best])
    same = last.objective <= low + SAME_BASIN * abs(low) + 1e-20
    others = last.objective[~same]
    theta_best = last.theta[best]
    params = scale.to_params(theta_best[None])
    seen = form.free & ~vanished(theta_best, problem)  # what is gone cannot be flat; its own warning says it is gone
    gauss = jacobian(theta_best[None], problem)[0][seen]
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
        starts=starts,
        share=float(weight[same].sum() / starts),
        next_best=float(others.min()) if len(others) else None,
        gradient_norm=float(last.gradient[best]),
        condition=condition,
        warnings=(),
        runs=runs,
        scale=scale,
        theta=theta_best,
    )
    object.__setattr__(fit, "warnings", _warnings(fit, bool(last.converged[best]), gauss, seen))
    return fit


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


def _merge(ends: Solution) -> tuple[Array, np.ndarray]:
    """(how many starts each distinct end stands for, index of one start per distinct end)."""
    # the objective to 9 digits tells ends apart: equal values at different points would both be optimal anyway
    key = np.round(np.log(np.maximum(ends.objective, 1e-300)), 4)
    _, index, count = np.unique(key, return_index=True, return_counts=True)
    return count.astype(np.float64), index


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
    if fit.condition > 1e12:
        say("unidentified", f"condition number {fit.condition:.1e}: some parameters trade off exactly; widen N and D")
        return tuple(out)
    deviation = np.sqrt(np.diag(np.linalg.inv(gauss @ gauss.T))) * fit.residual_spread
    error = dict(zip([n for n, s in zip(NAMES, seen, strict=True) if s], deviation, strict=True))
    for name, unit in (("alpha", fit.scale.spread_n), ("beta", fit.scale.spread_d)):
        at = getattr(fit, name)
        if name in error and error[name] / unit > 0.5 * at:
            say("flat", f"{name} = {at:.3g} has a standard error of about {error[name] / unit:.2g}: flat along it")
    return tuple(out)
