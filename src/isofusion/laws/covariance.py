"""Covariance of runs' deviations from a law, never held as a matrix: trunk luck + misfit of the law's shape + noise.

    cov[i, j] = trunk^2 [same trunk] + misfit^2 smooth(i, j) + (branch^2 + 1e-12) [i = j]

A design needs single rows of it and products with it (`RunCovariance`), a calibration its log likelihood at many
spreads (`log_likelihoods`). The smooth part is a Gaussian in (log N, log D) a decade wide, so over the few decades of a
study it has some hundred dimensions, whatever the number of runs: a pivoted Cholesky factor stops there, with an error
at rounding (Harbrecht, Peters & Schneider 2012). Time and memory are linear in the runs.
Legend: m runs, p points, q columns, k rank, g trunks, s spreads.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from isofusion.laws.table import Array, Labels

REACH = np.log(10.0)  # the misfit's correlation length: one decade of N or of D
LEAST_NOISE = 1e-12  # variance that every run has
EXACT = 1e-15  # largest variance that the factor of the smooth part leaves out
FEW = 8  # rows whose covariances are computed one by one
Index = npt.NDArray[np.int64]


def smooth(x: Array, y: Array, to_x: Array, to_y: Array) -> Array:
    """Correlation of the misfit between log N = x, log D = y [k] and to_x, to_y [..., l]: [..., k, l]."""
    apart = (x[:, None] - to_x[..., None, :]) ** 2 + (y[:, None] - to_y[..., None, :]) ** 2
    return np.exp(-0.5 * apart / REACH**2)


def factor(x: Array, y: Array) -> Array:
    """F [m, k] with F F' = smooth(x, y, x, y) to EXACT: Cholesky with the largest rest as the next pivot."""
    rest = np.ones(len(x))
    rows, rank = np.zeros((len(x), 64)), 0
    while rank < len(x):
        pivot = int(np.argmax(rest))
        if rest[pivot] <= EXACT:
            break
        if rank == rows.shape[1]:
            rows = np.concatenate([rows, np.zeros_like(rows)], axis=1)
        own = smooth(x[pivot : pivot + 1], y[pivot : pivot + 1], x, y)[0] - rows[:, :rank] @ rows[pivot, :rank]
        rows[:, rank] = own / np.sqrt(rest[pivot])
        rest = np.maximum(rest - rows[:, rank] ** 2, 0.0)
        rest[pivot] = 0.0
        rank += 1
    return rows[:, :rank]


@dataclass(frozen=True)
class RunCovariance:
    """The covariance of points at log N = x, log D = y [p] in trunks [p]."""

    x: Array
    y: Array
    trunk: Index
    trunk_spread: float
    branch: float
    misfit: float

    @classmethod
    def of(cls, n: Array, d: Array, trunk: Labels, spreads: tuple[float, float, float]) -> RunCovariance:
        return cls(np.log(n), np.log(d), np.unique(trunk, return_inverse=True)[1], *spreads)

    @property
    def diagonal(self) -> Array:
        """[p]."""
        own = self.trunk_spread**2 + self.misfit**2 + self.branch**2 + LEAST_NOISE
        return np.full(len(self.x), own)

    def rows(self, rows: Index) -> Array:
        """[r, p]."""
        out = self.misfit**2 * smooth(self.x[rows], self.y[rows], self.x, self.y)
        out += self.trunk_spread**2 * (self.trunk[rows][:, None] == self.trunk)
        out[np.arange(len(rows)), rows] += self.branch**2 + LEAST_NOISE
        return out

    @cached_property
    def shape(self) -> Array:
        """The factor of the smooth part, [p, k]."""
        return factor(self.x, self.y)

    def times(self, left: Array, rows: Index) -> Array:
        """left [..., r] times the rows: [..., p]."""
        flat = left.reshape(int(np.prod(left.shape[:-1])), len(rows))
        if len(rows) <= FEW:
            out = flat @ self.rows(rows)
        else:
            out = self.misfit**2 * ((flat @ self.shape[rows]) @ self.shape.T)
            if self.trunk_spread:
                sums = np.zeros((len(flat), int(self.trunk.max()) + 1))
                np.add.at(sums.T, self.trunk[rows], flat.T)
                out += self.trunk_spread**2 * sums[:, self.trunk]
            out[:, rows] += (self.branch**2 + LEAST_NOISE) * flat
        return out.reshape(*left.shape[:-1], len(self.x))


def log_likelihoods(rest: Array, wide: Array, where: RunCovariance, noise: Array, misfit: Array) -> Array:
    """Log densities, up to a constant, of deviations rest [m] at covariance wide wide' + `where` with its spreads times
    noise [s] (trunk and branch) and misfit [s]: [s]. wide: [m, q].

    Inside a trunk the noise is a constant plus a diagonal (Sherman-Morrison); the rest has few columns (Woodbury).
    """
    count = np.bincount(where.trunk)
    few = wide.shape[1]
    # what `wide` explains of the deviations is taken out first and put back in the end: it is large, the rest is not
    along = np.linalg.lstsq(wide, rest, rcond=None)[0]
    columns = np.column_stack([wide, rest - wide @ along, where.misfit * where.shape])
    sums = np.zeros((len(count), columns.shape[1]))
    np.add.at(sums, where.trunk, columns)
    means = sums / count[:, None]
    inside = columns - means[where.trunk]
    inside = inside.T @ inside
    # trunks of as many runs weigh alike at any noise
    lengths, kind = np.unique(count, return_inverse=True)
    between = np.stack([means[kind == k].T @ means[kind == k] for k in range(len(lengths))])
    out = np.empty(len(noise))
    for a in np.unique(noise):
        own = (a * where.branch) ** 2 + LEAST_NOISE
        luck = (a * where.trunk_spread) ** 2
        gram = inside / own + np.tensordot(lengths / (own + lengths * luck), between, 1)
        base = len(rest) * np.log(own) + float(np.sum(np.log1p(count * luck / own)))
        value, turn = np.linalg.eigh(gram[few + 1 :, few + 1 :])
        beside = gram[: few + 1, few + 1 :] @ turn  # of wide and rest with the smooth part's own directions
        for i in np.flatnonzero(noise == a):
            bent = misfit[i] ** 2 / (1.0 + misfit[i] ** 2 * np.maximum(value, 0.0))
            small = gram[: few + 1, : few + 1] - (beside * bent) @ beside.T
            root = np.linalg.cholesky(np.eye(few) + small[:few, :few])
            half = np.linalg.solve(root, np.column_stack([small[:few, few], along]))
            left = float(small[few, few]) - float(half[:, 0] @ half[:, 0])
            left += 2.0 * float(half[:, 1] @ half[:, 0]) + float(along @ along) - float(half[:, 1] @ half[:, 1])
            size = base + float(np.sum(np.log1p(misfit[i] ** 2 * np.maximum(value, 0.0))))
            out[i] = -0.5 * left - 0.5 * size - float(np.log(np.diagonal(root)).sum())
    return out
