"""The covariance that is never held as a matrix, against the matrix."""

from __future__ import annotations

import numpy as np
import pytest

from isofusion.laws.covariance import LEAST_NOISE, RunCovariance, factor, log_likelihoods, smooth

RNG = np.random.default_rng(0)
M = 60
N, D = np.exp(RNG.uniform(np.log(1e6), np.log(1e10), M)), np.exp(RNG.uniform(np.log(1e8), np.log(1e12), M))
N[:5], D[:5] = N[5], D[5]  # repeated seeds: equal places
TRUNKS = {
    "each its own": np.array([f"t{i}" for i in range(M)]),
    "shared": np.array([f"t{i}" for i in RNG.integers(0, 9, M)]),
}
SPREADS = [(0.004, 0.001, 0.008), (0.0, 0.003, 0.05), (0.004, 1e-4, 0.0)]


def dense(where: RunCovariance, noise: float = 1.0, misfit: float = 1.0) -> np.ndarray:
    x, y = where.x, where.y
    same = where.trunk[:, None] == where.trunk
    out = (noise * where.trunk_spread) ** 2 * same + (misfit * where.misfit) ** 2 * smooth(x, y, x, y)
    return out + ((noise * where.branch) ** 2 + LEAST_NOISE) * np.eye(len(x))


def density(whole: np.ndarray, rest: np.ndarray) -> float:
    """Log normal density up to its constant, in long doubles: the matrix is all but singular."""
    root, z = whole.copy(), rest.astype(np.longdouble)
    for k in range(len(z)):
        root[k, k] = np.sqrt(root[k, k])
        root[k + 1 :, k] /= root[k, k]
        z[k] /= root[k, k]
        z[k + 1 :] -= root[k + 1 :, k] * z[k]
        root[k + 1 :, k + 1 :] -= root[k + 1 :, k, None] * root[k + 1 :, k]
    return float(-0.5 * np.sum(z * z) - np.sum(np.log(np.diagonal(root))))


@pytest.mark.parametrize("trunks", TRUNKS)
@pytest.mark.parametrize("spreads", SPREADS)
def test_rows_and_products(trunks: str, spreads: tuple[float, float, float]) -> None:
    where = RunCovariance.of(N, D, TRUNKS[trunks], spreads)
    whole = dense(where)
    np.testing.assert_allclose(where.diagonal, np.diagonal(whole), rtol=1e-14)
    for count in (0, 1, 8, 9, M):  # a few are computed one by one, many through the factor
        rows = RNG.permutation(M)[:count]
        left = RNG.standard_normal((3, 2, count))
        np.testing.assert_allclose(where.rows(rows), whole[rows], rtol=1e-13, atol=1e-18)
        np.testing.assert_allclose(where.times(left, rows), left @ whole[rows], rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("trunks", TRUNKS)
@pytest.mark.parametrize("spreads", SPREADS)
def test_log_likelihoods(trunks: str, spreads: tuple[float, float, float]) -> None:
    where = RunCovariance.of(N, D, TRUNKS[trunks], spreads)
    wide = RNG.standard_normal((M, 5)) * [1.0, 0.5, 0.2, 0.1, 0.05]
    rest = 0.01 * RNG.standard_normal(M) + wide @ (0.1 * RNG.standard_normal(5))
    noise, misfit = (v.ravel() for v in np.meshgrid(2.0 ** np.arange(-3.0, 4.0), 2.0 ** np.arange(-6.0, 4.0)))
    found = log_likelihoods(rest, wide, where, noise, misfit)
    for i in range(len(noise)):
        long = wide.astype(np.longdouble)  # a rounded matrix would be another one: noise of 1e-5 beside terms of 1
        whole = long @ long.T + dense(where, noise[i], misfit[i])
        assert found[i] == pytest.approx(density(whole, rest), rel=1e-8, abs=1e-6)


def test_the_smooth_part_has_few_dimensions() -> None:
    """About the same for a hundred times the runs; to rounding at every pair."""
    many = RNG.uniform(np.log(2e7), np.log(2e9), 4000), RNG.uniform(np.log(4e8), np.log(4e10), 4000)
    some = factor(many[0][:200], many[1][:200])
    every = factor(*many)
    assert some.shape[1] <= every.shape[1] < 200
    part = slice(0, 500)
    np.testing.assert_allclose(every[part] @ every.T, smooth(many[0][part], many[1][part], *many), atol=1e-13)
