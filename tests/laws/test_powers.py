"""The series behind a batched fit against the exponentials it stands for."""

from __future__ import annotations

import numpy as np
import pytest

from isofusion.laws.solve.powers import FEWEST, Powers


def _direct(pairs: np.ndarray, x: np.ndarray) -> np.ndarray:
    return np.exp(pairs[:, :1] - pairs[:, 1:] * x)


def _relative(powers: Powers, pairs: np.ndarray, x: np.ndarray) -> float:
    found = powers(pairs, np.empty((len(pairs), len(x))))
    return float(np.abs(found / _direct(pairs, x) - 1.0).max())


@pytest.mark.parametrize("sizes", [1, 2, 7, 240], ids=["one size", "two", "a ladder", "each its own"])
@pytest.mark.parametrize("rows", [1, FEWEST - 1, FEWEST, 500])
@pytest.mark.parametrize("spread", [0.0, 0.02, 0.3, 3.0], ids=["equal", "draws", "wide", "starts"])
def test_is_the_exponential(sizes: int, rows: int, spread: float) -> None:
    rng = np.random.default_rng(0)
    x = rng.permutation(np.resize(np.linspace(-2.1, 1.7, sizes) if sizes > 1 else np.array([0.4]), 240))
    pairs = np.stack([rng.uniform(-6, 2, rows), 0.7 + spread * rng.standard_normal(rows)], axis=1)
    powers = Powers(x)
    for shift in (0.0, 0.05, 1.5):  # as a fit moves on, near the centre and away from it
        pairs[:, 1] += shift
        assert _relative(powers, pairs, x) < 4e-15 * max(1.0, float(np.abs(pairs).max()) * 2)


def test_a_few_far_rows_do_not_cost_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows out of the series' reach are computed directly, the rest by the series."""
    rng = np.random.default_rng(1)
    x = rng.uniform(-2, 2, 100)
    pairs = np.stack([rng.uniform(-3, 0, 200), 0.5 + 0.01 * rng.standard_normal(200)], axis=1)
    pairs[[3, 77], 1] = [2.9, 0.02]
    powers = Powers(x)
    assert _relative(powers, pairs, x) < 2e-14
    elements = []
    exp = np.exp

    def counted(v: np.ndarray, *args: object, **kwargs: object) -> np.ndarray:
        elements.append(np.size(v))
        return exp(v, *args, **kwargs)

    monkeypatch.setattr("isofusion.laws.solve.powers.np.exp", counted)
    powers(pairs, np.empty((200, 100)))
    assert sum(elements) == 200 + 2 * 100


def test_a_result_depends_on_the_calls_since_anew_alone() -> None:
    rng = np.random.default_rng(2)
    x = rng.uniform(-2, 2, 50)
    pairs = np.stack([rng.uniform(-3, 0, 60), 0.5 + 0.05 * rng.standard_normal(60)], axis=1)
    first = Powers(x)(pairs, np.empty((60, 50)))
    used = Powers(x)
    used(pairs + [0.0, 0.04], np.empty((60, 50)))
    assert not np.array_equal(used(pairs, np.empty((60, 50))), first)  # the centre is the other call's
    np.testing.assert_array_equal(used.anew()(pairs, np.empty((60, 50))), first)
