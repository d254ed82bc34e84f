"""The mathematics of choosing runs: how much would a run tell about the law in a target region?

The law is uncertain in two ways. Its five parameters: a wide Gaussian prior (or the posterior that the done runs
leave) is carried to log losses by the law's Jacobian (`objective.jacobian`). And its shape: a smooth Gaussian process
of relative size `misfit` on top of it, without which a design would put every run at the few points that the formula
calls informative and believe the formula for the rest. Runs add noise, shared by branches of a trunk. All of it is
Gaussian in log loss, so what a run would teach does not depend on its result: choosing it is a rank-one update.

The Jacobian depends on the law, and far from the optimum the linearisation says little. So everything is averaged
over `members`: laws drawn by randomised maximum a posteriori (each member fits noise-perturbed losses with its own
draw from the prior as the centre of the penalty; without runs the members *are* draws from the prior; exact where the
law is linear). That is pseudo-Bayesian design (Chaloner & Verdinelli 1995), sequential over a pool with costs as in Li
et al. arXiv 2604.22753, who average over local optima of the fit instead.
Coordinates phi = (log E, log A', log alpha', log B', log beta'): `forms.Scale`'s theta with logarithms of exponents.
Legend: M members, r done runs, c candidates, t targets, p = c + t points, 5 parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from isofusion.laws.forms import Form, Params, Scale
from isofusion.laws.objective import Problem, jacobian
from isofusion.laws.table import Array, Labels, Runs

MEMBERS = 16
BOUNDS = (1e-4, 1e4)  # of exponents; only the penalty of the prior holds them here
PRIOR_MEAN = np.array([-0.35, -1.6, np.log(0.35), -1.6, np.log(0.35)])  # of phi, coefficients relative to the loss
PRIOR_SPREAD = np.array([0.5, 1.0, 0.5, 1.0, 0.5])
REACH = np.log(10.0)  # the misfit's correlation length: one decade of N or of D
Gradient = Callable[[Array], Array]


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


@dataclass
class Belief:
    """How wrong the fit will be: `error` [M, p, p] is the covariance of (fitted - true) log loss over candidates and
    targets, `model` [M, p, p] the covariance that a least-squares fit of the law itself believes in.

    The fit (`fit_law`) weighs runs alike and knows neither trunk luck nor misfit, so what it makes of a run is the
    gain by `model`, and what comes of it is `error` under that gain (Joseph's form of the Kalman update, which holds
    for any gain; with no trunk luck and no misfit both are the usual posterior). A run can make the fit worse: bias
    from a model that is not quite true (Box & Draper 1959).
    """

    error: Array
    model: Array
    noise: float  # variance that a further run adds to its point
    fit_noise: float  # variance of a run as the fit sees it
    candidates: int
    weights: Array  # [t], sum 1

    def copy(self) -> Belief:
        return Belief(self.error.copy(), self.model.copy(), self.noise, self.fit_noise, self.candidates, self.weights)

    def variances(self) -> Array:
        """Weighted squared target error that each member expects, [M]."""
        own = np.diagonal(self.error, axis1=1, axis2=2)[:, self.candidates :]
        return np.maximum(own, 0.0) @ self.weights

    def spread(self) -> float:
        """Expected error (root mean square, relative) over targets and members."""
        return float(np.sqrt(np.mean(self.variances())))

    def gains(self) -> Array:
        """By how much a run at each candidate is expected to reduce the squared target error, [M, c]; may be < 0."""
        c = self.candidates
        gain = self.model[:, c:, :c] / (self.own(self.model)[:, None] + self.fit_noise)
        after = gain * (self.own(self.error)[:, None] + self.noise)
        return np.einsum("t,mtc->mc", self.weights, gain * (2.0 * self.error[:, c:, :c] - after))

    def information(self) -> Array:
        """Gain in log determinant of the fit's information (D-optimality), [M, c]."""
        return np.log1p(np.maximum(self.own(self.model), 0.0) / self.fit_noise)

    def own(self, cov: Array) -> Array:
        return np.diagonal(cov, axis1=1, axis2=2)[:, : self.candidates]

    def learn(self, candidate: int) -> None:
        """Go on as if a run at this candidate were done and fitted."""
        column = self.model[:, :, candidate]
        gain = column / (column[:, candidate] + self.fit_noise)[:, None]
        self.model -= gain[:, :, None] * column[:, None, :]
        row = self.error[:, candidate, :].copy()
        at = row[:, candidate] + self.noise
        half = gain * at[:, None] * 0.5 - row
        self.error += gain[:, :, None] * half[:, None, :] + half[:, :, None] * gain[:, None, :]


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
    """The belief at the members phi [M, 5] after the done runs.

    target: (n, d), each [t] or [M, t] (a compute-optimal point differs between members). gradient: phi [M, 5] ->
    [M, 5, t] where the target is another quantity than the log loss, such as log N*; the misfit is then left out of it.
    """
    count, r, c = len(phi), len(done), len(candidates)
    runs = Points.join(done, candidates)
    n_t, d_t = (np.broadcast_to(v, (count, v.shape[-1])) for v in target)
    at_target = (
        np.concatenate([slopes(phi[m : m + 1], n_t[m], d_t[m], scale) for m in range(count)])
        if gradient is None
        else gradient(phi)
    )
    slope = np.concatenate([slopes(phi, runs.n, runs.d, scale), at_target], axis=2)
    model = np.matmul(np.swapaxes(slope * PRIOR_SPREAD[:, None] ** 2, 1, 2), slope)
    error = model.copy()
    if spread.misfit > 0:
        x = np.concatenate([np.broadcast_to(np.log(runs.n), (count, r + c)), np.log(n_t)], axis=1)
        y = np.concatenate([np.broadcast_to(np.log(runs.d), (count, r + c)), np.log(d_t)], axis=1)
        kernel = smooth(x, y)
        if gradient is not None:
            kernel[:, r + c :], kernel[:, :, r + c :] = 0.0, 0.0
        error += spread.misfit**2 * kernel
    error[:, : r + c, : r + c] += spread.trunk**2 * (runs.trunk[:, None] == runs.trunk[None])
    fit_noise = spread.run**2 + spread.misfit**2 + 1e-12
    noise = spread.branch**2 + 1e-12
    if r:  # all done runs at once: the same as learning them one after the other
        seen = np.linalg.solve(model[:, :r, :r] + fit_noise * np.eye(r), model[:, :r, r:])  # [M, r, p]: gains, turned
        gain = np.swapaxes(seen, 1, 2)
        half = np.matmul(gain, 0.5 * np.matmul(error[:, :r, :r] + noise * np.eye(r), seen) - error[:, :r, r:])
        model = model[:, r:, r:] - np.matmul(gain, model[:, :r, r:])
        error = error[:, r:, r:] + half + np.swapaxes(half, 1, 2)
    return Belief(error, model, noise, fit_noise, c, weights)


def smooth(x: Array, y: Array) -> Array:
    """Correlation of the misfit between points at log N = x, log D = y, both [..., k]: [..., k, k]."""
    apart = (x[..., :, None] - x[..., None, :]) ** 2 + (y[..., :, None] - y[..., None, :]) ** 2
    return np.exp(-0.5 * apart / REACH**2)


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
    wide = (slope.T * deviation**2) @ slope
    kernel = smooth(np.log(runs.n), np.log(runs.d))
    same = (runs.trunk[:, None] == runs.trunk[None]).astype(np.float64)
    a, b = (
        v.ravel()
        for v in np.meshgrid([1.0] if noise_known else 2.0 ** np.arange(-3.0, 4.0), 2.0 ** np.arange(-6.0, 4.0))
    )
    cov = wide + (a * spread.trunk)[:, None, None] ** 2 * same + (b * spread.misfit)[:, None, None] ** 2 * kernel
    cov += ((a * spread.branch) ** 2 + 1e-12)[:, None, None] * np.eye(len(runs))
    root = np.linalg.cholesky(cov)
    z = np.linalg.solve(root, np.broadcast_to(rest[:, None], (len(a), len(rest), 1)))[..., 0]
    log_weight = -0.5 * np.sum(z * z, axis=1) - np.log(np.diagonal(root, axis1=1, axis2=2)).sum(axis=1)
    log_weight -= 0.5 * (np.log2(a) ** 2 + np.maximum(0.0, np.log2(b)) ** 2)
    weight = np.exp(log_weight - log_weight.max())
    noise, misfit = (float(np.exp(np.average(np.log(v), weights=weight))) for v in (a, b))
    return Spread(noise * spread.trunk, noise * spread.branch, misfit * spread.misfit)
