"""The variance components, against the projections written out as matrices."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest

from isofusion.laws.fit import fit_law
from isofusion.laws.noise import estimate_noise, tangent
from isofusion.laws.table import Runs


@pytest.mark.parametrize("seeds", [(1,) * 6, (3, 1, 2, 1, 1, 4)])
@pytest.mark.parametrize("uneven", [False, True])
def test_henderson_3_as_matrices(simulate: Callable[..., Runs], seeds: tuple[int, ...], uneven: bool) -> None:
    runs = simulate(np.random.default_rng(0), seeds=seeds)
    if uneven:  # trunks of different lengths, some of one run
        runs = runs.select(np.random.default_rng(1).random(len(runs)) < 0.7)
    fit = fit_law(runs, grid=6)
    basis, r = tangent(fit)
    trunks, member = np.unique(runs.group, return_inverse=True)
    z = (member[:, None] == np.arange(len(trunks))).astype(float)
    left, singular, _ = np.linalg.svd(np.column_stack([z, basis]), full_matrices=False)
    both = left[:, singular > 1e-10 * singular[0]]
    within = float(np.sum((r - both @ (both.T @ r)) ** 2)) / (len(runs) - both.shape[1])
    weight = len(runs) - np.sum((z.T @ basis) ** 2)
    between = (float(r @ r) - within * (len(runs) - 5)) / weight
    found = estimate_noise(fit)
    assert found.branch_freedom == len(runs) - both.shape[1]
    assert between > 0
    assert (found.branch**2, found.trunk**2) == pytest.approx((within, between), rel=1e-10)


def test_ten_thousand_runs_take_little_memory(simulate: Callable[..., Runs]) -> None:
    """Indicators of their trunks as a matrix would be 800 MB."""
    rng = np.random.default_rng(0)
    n, d = np.exp(rng.uniform(18, 22, 10_000)), np.exp(rng.uniform(20, 25, 10_000))
    loss = (1.9 + 260 * n**-0.3 + 1850 * d**-0.335) * np.exp(0.003 * rng.standard_normal(10_000))
    for group in (None, [f"t{i // 2}" for i in range(10_000)]):
        fit = fit_law(Runs.of(n, d, loss, group=group), grid=4)
        tracemalloc.start()
        found = estimate_noise(fit)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2e7
        assert found.total == pytest.approx(0.003, rel=0.03)
