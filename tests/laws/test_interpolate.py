"""Our cubics against scipy's."""

import numpy as np
import pytest
from scipy.interpolate import Akima1DInterpolator, PchipInterpolator

from isofusion.laws.interpolate import through


@pytest.mark.parametrize("k", [3, 4, 5, 9])
def test_the_curves_are_those_of_scipy(k: int) -> None:
    rng = np.random.default_rng(k)
    x = np.cumsum(rng.uniform(0.2, 2.0, k))
    smooth = (x[:, None] - x.mean()) ** 2 * rng.uniform(0.5, 2, 7)
    y = np.concatenate([smooth, rng.standard_normal((k, 7)), np.ones((k, 1)), x[:, None]], axis=1)
    at = np.linspace(x[0], x[-1], 57)
    np.testing.assert_allclose(through("pchip", x, y, at), PchipInterpolator(x, y)(at), rtol=1e-12, atol=1e-12)
    for column in y.T:  # scipy's threshold for straight lines is shared by its columns
        want = Akima1DInterpolator(x, column)(at)
        np.testing.assert_allclose(through("akima", x, column[:, None], at)[:, 0], want, rtol=1e-12, atol=1e-12)
