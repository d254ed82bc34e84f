"""How far outside the runs a point lies."""

from __future__ import annotations

import numpy as np
import pytest

from isofusion.laws.warn import beyond, extrapolates


def test_decades_outside_the_runs() -> None:
    assert beyond([1e9, 1e11], [1e8, 1e10]) == (pytest.approx(1.0), "above")
    assert beyond(1e6, [1e8, 1e10]) == (pytest.approx(2.0), "below")
    assert [extrapolates(far) for far in (1.0, 1.1)] == [False, True]


def test_a_best_size_of_zero_is_infinitely_far_below_and_no_numpy_warning() -> None:
    far, side = beyond(0.0, [1e8, 1e10])
    assert (far, side, extrapolates(far)) == (np.inf, "below", True)
