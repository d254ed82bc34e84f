"""Where fits start: variable projection. For given exponents the law is linear in E, A, B, so those three are solved
for (non-negative least squares on relative errors) and the search is over the two exponents alone.

Every exponent pair of a grid is a start. `descend` follows each to its minimum of the projected least squares (Golub
and Pereyra 1973; Jacobian after Kaufman 1975), where E, A and B are optimal at every step and no start gets lost on a
plateau where a term is tiny; starts that meet go on as one. Everything comes from 6 x 6 moment matrices of the
columns 1/L, N^-alpha/L, D^-beta/L, their slopes in the exponents, and 1.
Legend: S starts, m runs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from isofusion.laws.forms import Form, Scale
from isofusion.laws.solve.newton import solve_positive
from isofusion.laws.table import Array, Runs

GRID = 16  # exponents per axis of the variable-projection grid
BLOCK = 1 << 16  # elements of all columns worked on at once, so that they stay in cache
EXPONENTS = (0.05, 2.0)  # range of the grid
MET = 1e-3
"""Starts that come into one cell of exponents, of this side, go on as one: nearly always to where each would end alone
(of 1,536 starts on 3 x 3 runs 15 end elsewhere, none on 6 x 5), and the lowest end is the same."""


@dataclass(frozen=True)
class Projection:
    """E, A', B' [S, 3] at given exponents, relative squared error [S], and its slope and Gauss-Newton curvature."""

    coefficients: Array
    error: Array
    gradient: Array  # [S, 2] in the standardised exponents
    curvature: Array  # [S, 2, 2]


class Projector:
    """Variable projection for one table and form."""

    def __init__(self, runs: Runs, form: Form, scale: Scale) -> None:
        self.form, self.scale = form, scale
        self.x, self.y = scale.x(runs.n), scale.y(runs.d)
        # relative to the loss, so that least squares weighs relative errors as the objective does
        self.inverse = 1.0 / runs.loss
        self.target = np.ones(len(runs)) - (0.0 if form.fixed_e is None else form.fixed_e * self.inverse)
        self.wanted = form.free[[0, 1, 3]]
        self.low = float(runs.loss.min())

    def __call__(self, exponents: Array) -> Projection:
        """Solve for the coefficients at standardised exponents [S, 2]."""
        gram = np.empty((len(exponents), 6, 6))
        rows = max(1, BLOCK // (6 * len(self.x)))
        memory = np.empty((min(rows, len(exponents)), 6, len(self.x)))
        memory[:, 0], memory[:, 5] = self.inverse, self.target
        for start in range(0, len(exponents), rows):
            part = exponents[start : start + rows]
            q = memory[: len(part)]
            for at, slope, x, alpha in ((1, 3, self.x, part[:, 0:1]), (2, 4, self.y, part[:, 1:2])):
                np.exp(-alpha * x, out=q[:, at])
                q[:, at] *= self.inverse
                np.multiply(q[:, at], -x, out=q[:, slope])
            np.matmul(q, np.swapaxes(q, 1, 2), out=gram[start : start + rows])
        coefficients, error, active = self._non_negative(gram)
        # slopes of the residual: c times the derivative column, projected off the active columns
        scale = coefficients[:, 1:3]
        into = gram[:, 3:5, :3] * active[:, None, :]
        square = np.where(active[:, :, None] & active[:, None, :], gram[:, :3, :3], 0.0)
        square[:, range(3), range(3)] += np.where(active, 1e-13 * gram[:, range(3), range(3)], 1.0)
        off = gram[:, 3:5, 3:5] - np.matmul(into, np.linalg.solve(square, np.swapaxes(into, 1, 2)))
        residual = gram[:, 3:5, 5] - np.matmul(gram[:, 3:5, :3], coefficients[..., None])[..., 0]
        return Projection(coefficients, error, -residual * scale, off * scale[:, :, None] * scale[:, None, :])

    def _non_negative(self, gram: Array) -> tuple[Array, Array, np.ndarray]:
        """Exact non-negative least squares over every active set: coefficients, error, which are active [S, 3]."""
        square, right = gram[:, :3, :3].copy(), gram[:, :3, 5]
        square[:, range(3), range(3)] *= 1.0 + 1e-13
        total = float(self.target @ self.target)
        coefficients, active = np.zeros((len(gram), 3)), np.zeros((len(gram), 3), dtype=bool)
        error = np.full(len(gram), np.inf)
        left = np.arange(len(gram))
        if self.wanted.all():
            solved, positive = solve_positive(np.ascontiguousarray(np.moveaxis(square, 0, 2)), right.T.copy())
            ok = positive & (solved >= 0).all(axis=0)
            coefficients[ok], active[ok] = solved.T[ok], True
            error[ok] = total - np.sum(solved.T[ok] * right[ok], axis=1)
            left = left[~ok]  # where all three are positive no smaller set is better
        if not len(left):
            return coefficients, error, active
        square, right = square[left], right[left]
        on = np.concatenate([np.eye(3, dtype=bool), np.zeros((3, 3), dtype=bool)])
        sets = np.zeros((len(left), 6, 3))  # of one coefficient each, of two each
        for i in range(3):
            sets[:, i, i] = right[:, i] / square[:, i, i]
        for at, (i, j) in enumerate(((0, 1), (0, 2), (1, 2)), start=3):
            on[at, [i, j]] = True
            det = square[:, i, i] * square[:, j, j] - square[:, i, j] ** 2
            det = np.where(det > 1e-14 * square[:, i, i] * square[:, j, j], det, np.nan)
            sets[:, at, i] = (right[:, i] * square[:, j, j] - right[:, j] * square[:, i, j]) / det
            sets[:, at, j] = (right[:, j] * square[:, i, i] - right[:, i] * square[:, i, j]) / det
        errors = total - np.matmul(sets, right[..., None])[..., 0]
        errors[~(sets >= 0).all(axis=2)] = np.inf
        errors[:, (on & ~self.wanted).any(axis=1)] = np.inf
        best = np.argmin(errors, axis=1)
        rows = np.arange(len(left))
        found = np.isfinite(errors[rows, best])
        coefficients[left] = np.where(found[:, None], sets[rows, best], 0.0)
        active[left] = on[best] & found[:, None]
        error[left] = errors[rows, best]
        return coefficients, error, active

    def theta(self, exponents: Array, coefficients: Array) -> Array:
        """Solver coordinates [S, 5]; a term projected away starts small, not at zero, where its gradient vanishes."""
        log = np.log(np.maximum(coefficients, 1e-3 * self.low))
        theta = np.stack([log[:, 0], log[:, 1], exponents[:, 0], log[:, 2], exponents[:, 1]], axis=1)
        return pin(theta, self.form)


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


def exponent_grid(form: Form, scale: Scale, bounds: tuple[float, float], grid: int = GRID) -> Array:
    """Standardised exponent pairs [S, 2] of the grid; one value where the form has no such term."""
    values = np.geomspace(max(bounds[0], EXPONENTS[0]), min(bounds[1], EXPONENTS[1]), grid)
    if bounds[1] <= EXPONENTS[0] or bounds[0] >= EXPONENTS[1]:
        values = np.geomspace(*bounds, grid)
    axes = [
        values * spread if used else np.zeros(1)
        for used, spread in ((form.n_term, scale.spread_n), (form.d_term, scale.spread_d))
    ]
    alpha, beta = np.meshgrid(*axes, indexing="ij")
    return np.stack([alpha.ravel(), beta.ravel()], axis=1)


def projection_starts(
    runs: Runs, form: Form, scale: Scale, bounds: tuple[float, float], grid: int = GRID
) -> tuple[Array, Array]:
    """theta [S, 5] and its relative squared error [S] per exponent pair; coefficients by non-negative least squares."""
    projector = Projector(runs, form, scale)
    exponents = exponent_grid(form, scale, bounds, grid)
    found = projector(exponents)
    return projector.theta(exponents, found.coefficients), found.error


def descend(
    projector: Projector, exponents: Array, first: Projection, bounds: tuple[float, float], iterations: int = 40
) -> tuple[Array, Array, Array]:
    """Follow every start to its projected minimum: exponents [S, 2], coefficients [S, 3], error [S].

    Levenberg-Marquardt in the two exponents, inside the bounds, each start with its own damping; starts that meet on
    the way go on as one.
    """
    scale = projector.scale
    spread = np.array([scale.spread_n, scale.spread_d])
    lower, upper = bounds[0] * spread, bounds[1] * spread
    z, coefficients, error = exponents.copy(), first.coefficients.copy(), first.error.copy()
    gradient, curvature = first.gradient.copy(), first.curvature.copy()
    damp = np.full(len(z), 1e-3)
    live = np.arange(len(z))
    owner = np.arange(len(z))  # the start that goes on for each
    for _ in range(iterations):
        g, h = gradient[live], curvature[live]
        held = ((z[live] <= lower) & (g > 0)) | ((z[live] >= upper) & (g < 0))
        # an exponent whose term is absent (from the form, or projected away) has no slope and stays
        held |= ~(h[:, (0, 1), (0, 1)] > 1e-100)
        g = np.where(held, 0.0, g)
        a, d = (np.where(held[:, k], 1.0, h[:, k, k] * (1 + damp[live])) for k in (0, 1))
        b = np.where(held.any(axis=1), 0.0, h[:, 0, 1])
        det = a * d - b * b
        flat = ~(det > 0)
        step = (
            -np.stack([d * g[:, 0] - b * g[:, 1], a * g[:, 1] - b * g[:, 0]], axis=1)
            / np.where(flat, 1.0, det)[:, None]
        )
        step = np.where(flat[:, None] | ~np.isfinite(step), 0.0, step)
        # at most a factor 2 and a fixed length: far out the projected surface is flat
        step = np.clip(step, -0.5 * z[live] - 1e-3, np.maximum(z[live], 0.05))
        trial = np.clip(z[live] + step, lower, upper)
        moved = np.abs(trial - z[live]).max(axis=1) > 1e-5
        live, trial = live[moved], trial[moved]
        if not len(live):
            break
        new = projector(trial)
        better = new.error < error[live]
        damp[live] = np.where(better, damp[live] * 0.2, np.maximum(damp[live], 1e-4) * 5.0)
        rows = live[better]
        z[rows], coefficients[rows], error[rows] = trial[better], new.coefficients[better], new.error[better]
        gradient[rows], curvature[rows] = new.gradient[better], new.curvature[better]
        live = live[damp[live] < 1e6]
        cell = np.round(z[live] / MET).astype(np.int64)
        _, first_of, of = np.unique(cell[:, 0] * (1 << 31) + cell[:, 1], return_index=True, return_inverse=True)
        owner[live] = live[first_of][of]
        live = live[first_of]
    while (owner != owner[owner]).any():
        owner = owner[owner]
    return z[owner], coefficients[owner], error[owner]


def merge(points: Array, resolution: float = 2e-3) -> tuple[np.ndarray, Array]:
    """(index of one representative per group, how many points it stands for) of points [S, k] that coincide.

    Two points coincide when they agree within `resolution` in every coordinate with the group's first member.
    """
    left = np.arange(len(points))
    representatives, counts = [], []
    while len(left):
        same = (np.abs(points[left] - points[left[0]]) <= resolution).all(axis=1)
        representatives.append(int(left[0]))
        counts.append(float(same.sum()))
        left = left[~same]
    return np.array(representatives), np.array(counts)
