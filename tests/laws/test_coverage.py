from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from isofusion.errors import InputError
from isofusion.laws.coverage import Design, _count, cover, studies
from isofusion.laws.fit import fit_law


def test_a_batch_of_studies_equals_fits_one_by_one() -> None:
    for fit in studies(Design(6, 1), 4, seed=2):
        alone = fit_law(fit.runs)
        assert fit.objective == pytest.approx(alone.objective, rel=2e-3)
        assert fit.predict(3e9, 3.2e10) == pytest.approx(alone.predict(3e9, 3.2e10), rel=2e-3)


def test_the_design_is_what_it_says() -> None:
    design = Design(4, 2, 3, n_range=(1e8, 8e8), d_range=(1e9, 4e9), trunk=0.01, branch=0.001)
    runs = design.runs()
    assert (len(runs), runs.n_sizes, runs.n_budgets, len(set(runs.group))) == (24, 4, 3, 8)
    assert runs.loss == pytest.approx(design.law.predict(runs.n, runs.d))
    noise = design.simulate(np.random.default_rng(0), 400) - np.log(runs.loss)
    trunk = noise.reshape(400, 8, 3)
    assert trunk.std() == pytest.approx(np.hypot(0.01, 0.001), rel=0.05)
    wrong = replace(design, odd=3.0).simulate(np.random.default_rng(0), 400) - np.log(runs.loss)
    assert (np.isclose(wrong, noise + np.log(3.0)).sum(axis=1) == 1).all()
    assert np.isclose(wrong, noise).sum() == 400 * 23
    assert (trunk - trunk.mean(axis=2, keepdims=True)).std() == pytest.approx(0.001 * np.sqrt(2 / 3), rel=0.05)


def test_counting() -> None:
    spans = [(0.0, 1.0), (2.0, 3.0), (-3.0, -1.0), (0.4, 0.6), None]
    row = _count("x", 0.5, np.array([0.5, 2.5, -2.0, 0.5, 0.5]), spans)
    assert (row.cover, row.above, row.below, row.refused) == pytest.approx((0.5, 0.25, 0.25, 0.2))
    assert row.width == 1.0
    assert row.bias == 0.0


def test_default_covers_where_rows_do_not() -> None:
    """60 studies: binomial tails put a true 95 % above 86 % with probability 0.997, and a true 65 % below 82 %."""
    design = Design(6, 2)
    good = cover(design, 60, draws=100)
    rows = cover(design, 60, draws=100, method="row")
    for name in ("alpha", "beta", "N*(C)", "loss at 10x C"):
        assert good[name].cover >= 0.86, name
        assert good[name].width < 8 * good[name].spread  # covers without being wide for it
    assert rows["alpha"].cover < 0.82
    assert rows["alpha"].width < 0.7 * good["alpha"].width
    assert good.to_dict()["quantities"][0]["name"] == "alpha"


def test_other_methods_run() -> None:
    design = Design(12, 1)
    found = {method: cover(design, 10, draws=40, method=method) for method in ("residual", "trunk")}  # type: ignore[arg-type]
    assert found["trunk"]["alpha"].width > 1.2 * found["residual"]["alpha"].width  # residuals ignore trunks


def test_bad_requests() -> None:
    with pytest.raises(InputError, match="use 1,000"):
        cover(Design(6), 5)
    with pytest.raises(InputError, match="give 1 or more"):
        Design(0)
    with pytest.raises(InputError, match="spreads >= 0"):
        Design(6, trunk=-0.1)
    with pytest.raises(InputError, match="positive factor of one run's loss"):
        Design(6, odd=0.0)
    with pytest.raises(InputError, match="cannot determine the N term"):
        cover(Design(2), 20)
