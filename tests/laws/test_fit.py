from __future__ import annotations

import json
import time
from collections.abc import Callable

import numpy as np
import pytest

from isofusion.errors import InputError
from isofusion.laws.fit import evaluate, fit_law
from isofusion.laws.forms import Form, Params
from isofusion.laws.table import Runs


def codes(fit: object) -> list[str]:
    return [w.code for w in fit.warnings]  # type: ignore[attr-defined]


def test_epoch_240_points_reach_the_true_optimum(epoch240: Runs) -> None:
    assert len(epoch240) == 240
    start = time.process_time()
    fit = fit_law(epoch240)
    took = time.process_time() - start
    assert fit.objective <= 0.0010182740178006 + 1e-15
    expected = (1.8172181, 477.82587, 0.3473105, 2143.41736, 0.3671724)
    assert (fit.E, fit.A, fit.alpha, fit.B, fit.beta) == pytest.approx(expected, rel=1e-6)
    assert fit.share > 0.95
    assert took < 2.0  # 0.3 s alone; the bound leaves room for a busy machine


def test_epoch_245_points_and_other_deltas(epoch: Runs, epoch240: Runs) -> None:
    fit = fit_law(epoch)
    assert fit.objective == pytest.approx(1.826010523069e-3, rel=1e-11)
    assert (fit.E, fit.A, fit.alpha, fit.B, fit.beta) == pytest.approx(
        (1.891339, 495.726, 0.349313, 12845.61, 0.453049), rel=3e-6
    )
    for delta, objective in ((1e-4, 1.117787481640e-4), (1e-2, 4.696224882616e-3), (1.0, 5.730943495849e-3)):
        assert fit_law(epoch240, delta=delta, grid=8).objective == pytest.approx(objective, rel=1e-11)


def test_published_point_is_the_l1_limit_not_the_huber_minimum(epoch240: Runs) -> None:
    published = Params.of(1.816864, 482.0053, 0.347813, 2085.432, 0.365854)
    assert evaluate(epoch240, published) == pytest.approx(0.00101864471, rel=2e-6)  # rounded parameters
    fit = fit_law(epoch240, delta=1e-7, grid=8)
    assert pytest.approx((482.005, 2085.43, 1.81686), rel=5e-5) == (fit.A, fit.B, fit.E)
    assert float(np.abs(fit.residuals).sum()) == pytest.approx(1.1294946640, rel=1e-6)


@pytest.mark.parametrize(
    "law",
    [
        Params.of(1.9, 260.0, 0.3, 1850.0, 0.335),
        Params.of(0.6, 30.0, 0.2, 4e4, 0.5),
        Params.of(2.1, 4e5, 0.71, 4659.0, 0.372),
    ],
)
def test_noiseless_laws_are_recovered(simulate: Callable[..., Runs], law: Params) -> None:
    fit = fit_law(simulate(np.random.default_rng(0), trunk=0.0, branch=0.0, law=law))
    assert (fit.E, fit.A, fit.alpha, fit.B, fit.beta) == pytest.approx(
        tuple(float(getattr(law, k)) for k in ("E", "A", "alpha", "B", "beta")), rel=1e-5
    )


def test_nested_and_fixed_forms(simulate: Callable[..., Runs], truth: Params) -> None:
    runs = simulate(np.random.default_rng(0))
    full, fixed = fit_law(runs), fit_law(runs, fixed_e=float(truth.E))
    only_n, only_d = fit_law(runs, d_term=False), fit_law(runs, n_term=False)
    assert fixed.E == truth.E
    assert fixed.names == ("A", "alpha", "B", "beta")
    assert full.objective <= min(fixed.objective, only_n.objective, only_d.objective)
    assert only_n.B == 0.0
    assert np.isnan(only_n.beta)
    np.testing.assert_allclose(only_n.predict(1e9, np.array([1e9, 1e12])), only_n.E + only_n.A / 1e9**only_n.alpha)
    assert np.abs(fixed.alpha - truth.alpha) < 0.05
    assert fixed.to_dict()["law"].startswith("1.904 + A/N^alpha")
    with pytest.raises(InputError, match="not below the lowest loss"):
        fit_law(runs, fixed_e=10.0)
    with pytest.raises(InputError, match="needs the N term or the D term"):
        Form(False, False)


def test_unidentifiable_tables_are_refused_with_the_runs_that_would_fix_it(simulate: Callable[..., Runs]) -> None:
    runs = simulate(np.random.default_rng(0))
    with pytest.raises(InputError, match=r"2 model sizes .* add runs at 1 or more other model sizes"):
        fit_law(runs.select(np.isin(runs.size, ["0", "5"])))
    with pytest.raises(InputError, match="1 token budget "):
        fit_law(runs.select(runs.d == runs.d[0]))
    fit_law(runs.select(np.isin(runs.size, ["0", "5"])), n_term=False)  # the N term was the trouble
    diagonal = Runs.of(
        [1e8, 2e8, 4e8, 8e8, 1.6e9, 3.2e9, 6.4e9], 20 * np.geomspace(1e8, 6.4e9, 7), np.linspace(4, 2, 7)
    )
    with pytest.raises(InputError, match="tokens follow parameters exactly"):
        fit_law(diagonal)
    with pytest.raises(InputError, match="the same loss"):
        fit_law(runs.with_loss(np.full(len(runs), 3.0)))
    with pytest.raises(InputError, match="5 runs for 5 parameters"):
        fit_law(runs.select(np.array([0, 6, 12, 18, 24 - 5])))


def test_warnings_say_what_is_wrong(simulate: Callable[..., Runs], truth: Params) -> None:
    rng = np.random.default_rng(0)
    assert codes(fit_law(simulate(rng, trunk=0.0005, branch=0.0005))) == []
    no_floor = Params.of(1e-9, 50.0, 0.15, 100.0, 0.2)
    bent = simulate(rng, law=no_floor, trunk=0.0, branch=0.001)  # minus a constant: no floor, not even at zero
    assert "irreducible-loss-zero" in codes(fit_law(bent.with_loss(bent.loss - 0.5)))
    small = simulate(rng, sizes=4, budgets=3, seeds=(1,) * 4)
    assert {"too-few-sizes", "too-few-budgets"} <= set(codes(fit_law(small)))
    flat = simulate(rng, trunk=0.03, branch=0.03)
    assert set(codes(fit_law(flat))) & {"flat", "exponent-at-bound", "term-vanished"}
    pinned = fit_law(simulate(rng, trunk=0.0, branch=0.0), bounds=(0.32, 3.0))
    assert "exponent-at-bound" in codes(pinned)
    assert pinned.alpha == pytest.approx(0.32)


def test_extrapolation_beyond_a_decade_is_flagged(simulate: Callable[..., Runs]) -> None:
    fit = fit_law(simulate(np.random.default_rng(0)))
    assert fit.extrapolation(2e10, 1e10) is None
    assert fit.extrapolation(2e10, 1e10, 9.9 * fit.runs.c.max()) is None
    assert "C is 1.3 decades above" in fit.extrapolation(2e10, 1e10, 20 * fit.runs.c.max()).message
    warning = fit.extrapolation(1e12, 1e10)
    assert warning is not None
    assert "N is 2.5 decades above" in warning.message


def test_result_is_plain_json(simulate: Callable[..., Runs]) -> None:
    runs = simulate(np.random.default_rng(0))
    for options in ({}, {"n_term": False}, {"fixed_e": 1.8}):
        json.dumps(fit_law(runs, grid=6, **options).to_dict(), allow_nan=False)


def test_too_few_sizes_says_whether_a_hold_out_can_test_them(simulate: Callable[..., Runs]) -> None:
    def warned(sizes: int, fixed_e: float | None = None) -> str:
        runs = simulate(np.random.default_rng(0), sizes=sizes, seeds=(1,) * sizes)
        found = {w.code: w.message for w in fit_law(runs, grid=4, fixed_e=fixed_e).warnings}
        return found.get("too-few-sizes", "")

    assert "no hold-out can test it" in warned(3)
    assert "a hold-out then predicts from 2" in warned(3, fixed_e=1.904)
    assert "a hold-out then predicts from 3, a weak test" in warned(4)
    assert not warned(5)
