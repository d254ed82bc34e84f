"""The mathematics of choosing runs: how much would a run tell about the law in a target region?

The law is uncertain in two ways. Its five parameters: a wide Gaussian prior (or the posterior that the done runs
leave) is carried to log losses by the law's Jacobian (`objective.jacobian`). And its shape: a smooth Gaussian process
of relative size `misfit` on top of it, without which a design would put every run at the few points that the formula
calls informative and believe the formula for the rest. Runs add noise, shared by branches of a trunk. All of it is
Gaussian in log loss, so what a run would teach does not depend on its result: choosing it, or leaving it out of
the fit, is a rank-one update.

The Jacobian depends on the law, and far from the optimum the linearisation says little. So everything is averaged
over `members`: laws drawn by randomised maximum a posteriori (each member fits noise-perturbed losses with its own
draw from the prior as the centre of the penalty; without runs the members *are* draws from the prior; exact where the
law is linear). That is pseudo-Bayesian design (Chaloner & Verdinelli 1995), sequential over a pool with costs as in Li
et al. arXiv 2604.22753, who average over local optima of the fit instead.
Coordinates phi = (log E, log A', log alpha', log B', log beta'): `forms.Scale`'s theta with logarithms of exponents.
Legend: M members, r done runs, c candidates, p = c + r rows, t targets, 5 parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from isofusion.laws.covariance import LEAST_NOISE, RunCovariance, log_likelihoods, smooth
from isofusion.laws.forms import Form, Params, Scale
from isofusion.laws.objective import Problem, jacobian
from isofusion.laws.table import Array, Labels, Runs

MEMBERS = 16
BOUNDS = (1e-4, 1e4)  # of exponents; only the penalty of the prior holds them here
PRIOR_MEAN = np.array([-0.35, -1.6, np.log(0.35), -1.6, np.log(0.35)])  # of phi, coefficients relative to the loss
PRIOR_SPREAD = np.array([0.5, 1.0, 0.5, 1.0, 0.5])
Gradient = Callable[[Array], Array]
Index = npt.NDArray[np.int64]
ALL = slice(None)


@dataclass(frozen=True)
class Spread:
    """Standard deviations in log loss: trunk luck, branch noise, and misfit of the law's shape."""

    trunk: float
    branch: float
    misfit: float

    @property
    def run(self) -> float:
        """Of one run with a trunk of its own."""
        return float(np.hypot(self.trunk, self.branch))


@dataclass(frozen=True)
class Points:
    """Places in (N, D): n, d [k] and the trunk that a run there belongs to."""

    n: Array
    d: Array
    trunk: Labels

    def __len__(self) -> int:
        return len(self.n)

    def select(self, rows: Array | list[int]) -> Points:
        return Points(self.n[rows], self.d[rows], self.trunk[rows])

    @classmethod
    def join(cls, *parts: Points) -> Points:
        return cls(*(np.concatenate([getattr(p, k) for p in parts]) for k in ("n", "d", "trunk")))


def scale_of(*parts: Points) -> Scale:
    """Common centre and spread of log N and log D of all points."""
    every = Points.join(*parts)
    return Scale.of(Runs.of(every.n, every.d, np.ones(len(every))))


def to_theta(phi: Array) -> Array:
    theta = phi.copy()
    theta[..., [2, 4]] = np.exp(phi[..., [2, 4]])
    return theta


def to_params(phi: Array, scale: Scale) -> Params:
    return scale.to_params(to_theta(phi))


def slopes(phi: Array, n: Array, d: Array, scale: Scale) -> Array:
    """d log prediction / d phi: [M, 5, k] at the points n, d [k]."""
    problem = Problem.of(Runs.of(n, d, np.ones(len(n))), Form(), scale, BOUNDS)
    out = jacobian(to_theta(phi), problem)
    out[:, [2, 4]] *= np.exp(phi[:, [2, 4]])[..., None]
    return out


def prior(level: float, scale: Scale) -> tuple[Array, Array]:
    """Mean and standard deviation of phi: the terms at the centre of the points, relative to exp(level)."""
    mean = PRIOR_MEAN + np.array([level, level, np.log(scale.spread_n), level, np.log(scale.spread_d)])
    return mean, PRIOR_SPREAD


def members(
    runs: Points, log_loss: Array, scale: Scale, spread: Spread, count: int = MEMBERS, seed: int = 0
) -> tuple[Array, Array]:
    """(best phi [5], phi [M, 5]): the maximum a posteriori law and `count` plausible ones (see the module docstring).

    Without runs the best is the prior's mean and the members are draws from the prior.
    """
    rng = np.random.Generator(np.random.Philox(key=seed))
    mean, deviation = prior(float(np.mean(log_loss)) if len(runs) else 0.0, scale)
    centre = mean + deviation * np.vstack([np.zeros(5), rng.standard_normal((count, 5))])
    if not len(runs):
        return centre[0], centre[1:]
    trunks, of = np.unique(runs.trunk, return_inverse=True)
    noise = np.hypot(spread.branch, spread.misfit) * rng.standard_normal((count, len(runs)))
    noise += spread.trunk * rng.standard_normal((count, len(trunks)))[:, of]
    target: Array = log_loss + np.vstack([np.zeros(len(runs)), noise])
    # trunk luck is shared, so a trunk of k branches weighs as 1 / (branch^2 + k trunk^2) each
    size = np.bincount(of)[of]
    variance: Array = spread.branch**2 + spread.misfit**2 + size.astype(np.float64) * spread.trunk**2
    phi = centre
    for heat in (1e4, 1e2, 1.0):  # a hot start keeps draws far from the runs from being trapped
        phi = _levenberg(phi, runs, target, scale, 1.0 / (heat * variance), centre, 1.0 / deviation**2)
    return phi[0], phi[1:]


def _levenberg(
    phi: Array, runs: Points, target: Array, scale: Scale, weight: Array, centre: Array, penalty: Array
) -> Array:
    """Minimise sum weight (log prediction - target)^2 + sum penalty (phi - centre)^2 for every member at once."""

    def cost(at: Array) -> tuple[Array, Array]:
        r = np.log(to_params(at, scale).predict(runs.n, runs.d)) - target
        return r, np.sum(weight * r * r, axis=1) + np.sum(penalty * (at - centre) ** 2, axis=1)

    damp = np.full(len(phi), 1e-3)
    r, f = cost(phi)
    for _ in range(40):
        slope = slopes(phi, runs.n, runs.d, scale)
        hess = np.matmul(slope * weight, np.swapaxes(slope, 1, 2)) + np.diag(penalty)
        grad = np.matmul(slope, (weight * r)[..., None])[..., 0] + penalty * (phi - centre)
        ridge = hess * np.eye(5) * damp[:, None, None]
        step = -np.linalg.solve(hess + ridge, grad[..., None])[..., 0]
        step *= np.minimum(1.0, 2.0 / np.maximum(np.abs(step).max(axis=1), 1e-300))[:, None]
        r_new, f_new = cost(phi + step)
        better = f_new < f
        if np.all(np.where(better, f - f_new, -np.sum(grad * step, axis=1)) <= 1e-6 * f + 1e-9):
            return np.where(better[:, None], phi + step, phi)
        phi = np.where(better[:, None], phi + step, phi)
        r, f = np.where(better[:, None], r_new, r), np.where(better, f_new, f)
        damp = np.where(better, damp * 0.2, np.maximum(damp, 1e-6) * 6.0)
    return phi


def _dot(a: Array, b: Array) -> Array:
    """Sums of products over axis 1 of [M, 5, p], in one pass: [M, p]."""
    return np.asarray(np.einsum("mkp,mkp->mp", a, b))


@dataclass
class Belief:
    """How wrong the fit will be at the targets, as runs are added to it (`learn`) or taken away (`forget`).

    The fit (`fit_law`) weighs runs alike and knows neither trunk luck nor misfit: with residuals r (misfit, luck,
    noise) it ends at phi_hat - phi = inv(info) b, where info = prior^-1 + w sum_i J_i J_i' and b = w sum_i J_i r_i +
    prior^-1 (m - phi). So five numbers carry all that was learnt, and what is kept is their covariance with each other
    (`moment`), with the residuals of the rows (`with_run`) and with the misfit at the targets (`with_goal`). With no
    trunk luck and no misfit this is the usual posterior. A run can make the fit worse: bias from a model that is not
    quite true (Box & Draper 1959). Runs enter b and info as sums, so that one can be taken out again exactly.
    """

    info: Array  # [M, 5, 5]
    moment: Array  # [M, 5, 5] covariance of b
    with_run: Array  # [M, 5, p] covariance of b with r
    with_goal: Array  # [M, 5, t] covariance of b with the misfit of the targets
    slope: Array  # [M, 5, p]
    at_goal: Array  # [M, 5, t]
    between: RunCovariance  # [p, p] of r
    to_goal: Array  # [M or 1, p, t] covariance of r with the misfit of the targets
    goal_variance: float  # of the misfit of the targets
    weight: float  # of a run in the fit
    weights: Array  # [t], sum 1

    def copy(self) -> Belief:
        return replace(
            self,
            info=self.info.copy(),
            moment=self.moment.copy(),
            with_run=self.with_run.copy(),
            with_goal=self.with_goal.copy(),
        )

    def variances(self) -> Array:
        """Weighted squared target error that each member expects, [M]."""
        gain = np.linalg.solve(self.info, self.at_goal)
        own = np.sum(gain * (np.matmul(self.moment, gain) - 2.0 * self.with_goal), axis=1)
        return np.maximum(own + self.goal_variance, 0.0) @ self.weights

    def spread(self) -> float:
        """Expected error (root mean square, relative) over targets and members."""
        return float(np.sqrt(np.mean(self.variances())))

    def gains(self, rows: slice = ALL) -> Array:
        """By how much a run at each of the rows is expected to reduce the squared target error, [M, p]; may be < 0."""
        return self._change(1.0, rows)

    def losses(self, rows: slice = ALL) -> Array:
        """By how much the squared target error is expected to grow without each row, [M, p], if it was learnt."""
        return -self._change(-1.0, rows)

    def _change(self, sign: float, rows: slice) -> Array:
        """Fall of the squared target error if a run at each row enters (1) or leaves (-1) the fit: Sherman-Morrison."""
        inverse = np.linalg.inv(self.info)
        aim = self.at_goal * self.weights  # [M, 5, t]
        square = np.matmul(aim, np.swapaxes(self.at_goal, 1, 2))  # sum_t J_t J_t'
        cross = np.matmul(aim, np.swapaxes(self.with_goal, 1, 2))
        slope, cov = self.slope[:, :, rows], self.with_run[:, :, rows]
        u = np.matmul(inverse, slope)  # [M, 5, p], as everything below that is not summed over axis 1
        h = _dot(slope, u)
        squared = np.matmul(square, u)
        v = np.matmul(inverse, squared)
        own = self.between.diagonal[rows]
        w = sign * self.weight
        shrink = w / (1.0 + w * h)
        size = _dot(u, squared)  # u' square u
        cov_u, cov_v = _dot(cov, u), _dot(cov, v)
        moved = np.matmul(self.moment, u) + w * (slope * cov_u[:, None] + cov * h[:, None])
        moved += (w * w * own * h)[:, None] * slope  # moment after the run, times u
        quadratic = w * w * own * size + 2.0 * w * cov_v
        quadratic += shrink * (shrink * size * _dot(u, moved) - 2.0 * _dot(v, moved))
        reach = _dot(np.matmul(aim, np.swapaxes(self.to_goal[:, rows], 1, 2)), u)
        linear = w * reach * (1.0 - shrink * h) - shrink * _dot(u, np.matmul(cross, u))
        return 2.0 * linear - quadratic

    def information(self, rows: slice = ALL) -> Array:
        """Gain in log determinant of the fit's information (D-optimality), [M, p]."""
        slope = self.slope[:, :, rows]
        return np.log1p(self.weight * np.sum(slope * np.linalg.solve(self.info, slope), axis=1))

    def learn(self, rows: int | Index) -> None:
        """Go on as if a run at this row (at each of these) were done and fitted."""
        self._enter(np.atleast_1d(rows), 1.0)

    def forget(self, rows: int | Index) -> None:
        """Go on as if that run (those), learnt before, were not in the fit."""
        self._enter(np.atleast_1d(rows), -1.0)

    def _enter(self, rows: Index, sign: float) -> None:
        """These rows enter (1) or leave (-1) the fit, all at once."""
        slope, w = self.slope[:, :, rows], sign * self.weight
        turned = np.swapaxes(slope, 1, 2)
        both = np.matmul(self.with_run[:, :, rows], turned)
        self.info += w * np.matmul(slope, turned)
        self.moment += w * (both + np.swapaxes(both, 1, 2))
        moved = self.between.times(slope, rows)
        self.moment += w * w * np.matmul(moved[:, :, rows], turned)
        self.with_run += w * moved
        self.with_goal += w * np.matmul(slope, self.to_goal[:, rows])


def believe(
    phi: Array,
    done: Points,
    candidates: Points,
    target: tuple[Array, Array],
    weights: Array,
    scale: Scale,
    spread: Spread,
    *,
    gradient: Gradient | None = None,
) -> Belief:
    """The belief at the members phi [M, 5] after the done runs. Its rows are the candidates, then the done runs.

    target: (n, d), each [t] or [M, t] (a compute-optimal point differs between members). gradient: phi [M, 5] ->
    [M, 5, t] where the target is another quantity than the log loss, such as log N*; the misfit is then left out of it.
    """
    count = len(phi)
    runs = Points.join(candidates, done)
    x, y = np.log(runs.n), np.log(runs.d)
    slope = slopes(phi, runs.n, runs.d, scale)
    between = RunCovariance.of(runs.n, runs.d, runs.trunk, (spread.trunk, spread.branch, spread.misfit))
    if gradient is None:
        n_t, d_t = (np.broadcast_to(v, (count, v.shape[-1])) for v in target)
        at_goal = np.concatenate([slopes(phi[m : m + 1], n_t[m], d_t[m], scale) for m in range(count)])
        to_goal = spread.misfit**2 * smooth(x, y, np.log(target[0]), np.log(target[1]))
    else:
        at_goal = gradient(phi)
        to_goal = np.zeros((len(x), at_goal.shape[-1]))
    prior_info = np.broadcast_to(np.diag(PRIOR_SPREAD**-2.0), (count, 5, 5))
    belief = Belief(
        prior_info.copy(),
        prior_info.copy(),
        np.zeros_like(slope),
        np.zeros_like(at_goal),
        slope,
        at_goal,
        between,
        to_goal if to_goal.ndim == 3 else to_goal[None],
        spread.misfit**2 if gradient is None else 0.0,
        1.0 / (spread.run**2 + spread.misfit**2 + LEAST_NOISE),
        weights,
    )
    belief._enter(np.arange(len(candidates), len(runs)), 1.0)
    return belief


def calibrate(runs: Points, log_loss: Array, scale: Scale, spread: Spread, *, noise_known: bool = False) -> Spread:
    """Noise and misfit after the done runs: posterior means of their logarithms, the law linearised at its best fit.

    Prior: `spread`'s noise within a factor 2 (one standard deviation of its logarithm); a misfit anywhere below
    `spread`'s is as likely on a log scale, above it less and less. A mean and not the likeliest value: the few first
    runs cannot rule a misfit out. Before any two runs it is `spread` itself, so that a first design does not stake all
    on cheap corners of (N, D) that help only where the law is exactly true. noise_known keeps trunk and branch.
    """
    if len(runs) < 2:
        return spread
    best, _ = members(runs, log_loss, scale, spread, 1)
    slope = slopes(best[None], runs.n, runs.d, scale)[0]
    mean, deviation = prior(float(np.mean(log_loss)), scale)
    rest = log_loss - np.log(to_params(best, scale).predict(runs.n, runs.d)) - (mean - best) @ slope
    where = RunCovariance.of(runs.n, runs.d, runs.trunk, (spread.trunk, spread.branch, spread.misfit))
    a, b = (
        v.ravel()
        for v in np.meshgrid([1.0] if noise_known else 2.0 ** np.arange(-3.0, 4.0), 2.0 ** np.arange(-6.0, 4.0))
    )
    log_weight = log_likelihoods(rest, slope.T * deviation, where, a, b)
    log_weight -= 0.5 * (np.log2(a) ** 2 + np.maximum(0.0, np.log2(b)) ** 2)
    weight = np.exp(log_weight - log_weight.max())
    noise, misfit = (float(np.exp(np.average(np.log(v), weights=weight))) for v in (a, b))
    return Spread(noise * spread.trunk, noise * spread.branch, misfit * spread.misfit)
