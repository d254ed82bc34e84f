from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from isofusion.errors import InputError
from isofusion.laws.bootstrap import bootstrap
from isofusion.laws.compare import compare, paired
from isofusion.laws.fit import fit_law
from isofusion.laws.table import Runs

SEEDS = (3, 1, 1, 1, 1, 3)


def test_an_arm_against_itself_is_null(simulate: Callable[..., Runs]) -> None:
    fit = fit_law(simulate(np.random.default_rng(0), seeds=SEEDS, label="a"), grid=6)
    result = compare(bootstrap(fit, 200, seed=0), bootstrap(fit, 200, seed=1))
    assert np.abs(result.difference).max() == 0.0
    assert result.verdict == "no difference shown"


def test_two_studies_of_one_law_are_rarely_told_apart(simulate: Callable[..., Runs]) -> None:
    rng = np.random.default_rng(1)
    shown = 0
    for k in range(8):
        a, b = (bootstrap(fit_law(simulate(rng, seeds=SEEDS), grid=4), 100, seed=2 * k + i) for i in range(2))
        shown += compare(a, b, points=8).verdict != "no difference shown"
    assert shown <= 2


def test_a_planted_gain_is_found_with_its_sign(simulate: Callable[..., Runs]) -> None:
    rng = np.random.default_rng(2)
    better = simulate(rng, seeds=SEEDS, gain=2.0, label="better")
    plain = simulate(rng, seeds=SEEDS, label="plain")
    a, b = (bootstrap(fit_law(r, grid=6), 200, seed=i) for i, r in enumerate((better, plain)))
    result = compare(a, b)
    assert result.verdict == "first better"
    assert compare(b, a).verdict == "second better"
    assert (result.band_low <= result.low + 0.01).all()
    assert result.c[0] == pytest.approx(max(better.c.min(), plain.c.min()))
    rows = paired(better, plain)
    assert [r.size for r in rows] == ["0", "1", "2", "3", "4", "5", "all sizes"]
    assert rows[-1].pairs == sum(SEEDS)
    assert rows[-1].high is not None
    assert rows[-1].high < 0
    assert rows[1].low is None  # one trunk pair has no spread


def test_no_overlap_is_refused(simulate: Callable[..., Runs]) -> None:
    runs = simulate(np.random.default_rng(0))
    far = replace(runs, n=runs.n * 1e4, c=runs.c * 1e4)
    a, b = (bootstrap(fit_law(r, grid=4), 50) for r in (runs, far))
    with pytest.raises(InputError, match="no overlap"):
        compare(a, b)
    assert paired(runs, replace(far, size=np.array(["other"] * len(far)))) == []
