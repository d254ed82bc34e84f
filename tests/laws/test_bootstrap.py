from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest

from isofusion.errors import InputError
from isofusion.laws.bootstrap import (
    Noise,
    Refusal,
    _counts,
    bootstrap,
    bootstrap_many,
    corrected_residuals,
    estimate_noise,
)
from isofusion.laws.coverage import Design, studies
from isofusion.laws.fit import fit_law
from isofusion.laws.refit import refit
from isofusion.laws.table import Runs


def test_row_bootstrap_gives_the_converged_standard_errors_of_epoch(epoch240: Runs) -> None:
    fit = fit_law(epoch240, grid=8)
    np.random.seed(42)  # the published draws
    picks = np.array([np.random.choice(np.arange(240), 240) for _ in range(4000)])
    params, objective, bound = refit(fit, weights=_counts(picks, 240))
    spread = [float(np.std(getattr(params, k), ddof=1)) for k in ("A", "B", "E", "alpha", "beta")]
    assert spread == pytest.approx([124.494, 1293.169, 0.025657, 0.015397, 0.020594], rel=1e-4)
    assert not bound.any()
    assert np.isfinite(objective).all()


def test_draws_equal_fits_from_scratch(simulate: Callable[..., Runs]) -> None:
    runs = simulate(np.random.default_rng(3))
    fit = fit_law(runs)
    log_loss = np.log(runs.loss) + 0.002 * np.random.default_rng(4).standard_normal((4, len(runs)))
    params, objective, _ = refit(fit, log_loss=log_loss)
    for i in range(4):
        scratch = fit_law(runs.with_loss(np.exp(log_loss[i])), grid=8)
        assert objective[i] == pytest.approx(scratch.objective, rel=1e-6)
        assert params.alpha[i] == pytest.approx(scratch.alpha, rel=1e-3)


def test_a_thousand_draws_are_fast_and_reproducible(simulate: Callable[..., Runs]) -> None:
    fit = fit_law(simulate(np.random.default_rng(0)))
    start = time.process_time()
    intervals = bootstrap(fit, 1000)
    assert time.process_time() - start < 2.0  # 0.12 s alone
    low, high = intervals.interval("alpha")
    assert low < fit.alpha < high
    assert bootstrap(fit, 1000).interval("alpha") == (low, high)
    assert intervals.share_at_bound <= 0.05
    curve = intervals.of(lambda p: p.predict(np.array([1e9, 1e10]), np.array([1e10, 1e11])))
    assert curve[0].shape == (2,)


def test_noise_is_found_from_repeated_seeds_and_without(simulate: Callable[..., Runs]) -> None:
    rng = np.random.default_rng(0)
    estimates = [estimate_noise(fit_law(simulate(rng, seeds=(3, 2, 2, 2, 2, 3)), grid=6)) for _ in range(12)]
    assert np.mean([e.trunk for e in estimates]) == pytest.approx(0.002, rel=0.35)
    assert np.mean([e.branch for e in estimates]) == pytest.approx(0.001, rel=0.2)
    assert np.mean([e.seed for e in estimates if e.seed]) == pytest.approx(np.hypot(0.002, 0.001), rel=0.3)
    assert "repeated seeds (8 degrees of freedom)" in estimates[0].source
    alone = [estimate_noise(fit_law(simulate(rng), grid=6)) for _ in range(12)]
    assert "no seed is repeated" in alone[0].source
    assert alone[0].seed is None
    assert np.mean([e.trunk for e in alone]) == pytest.approx(0.002, rel=0.5)
    loose = fit_law(Runs.of(*(getattr(simulate(rng), k) for k in ("n", "d", "loss"))), grid=6)
    assert "each run is its own trunk" in estimate_noise(loose).source


def test_trunk_method_needs_trunks(simulate: Callable[..., Runs]) -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(InputError, match="resampling 6 trunks"):
        bootstrap(fit_law(simulate(rng), grid=6), 100, method="trunk")
    many = fit_law(simulate(rng, sizes=12, seeds=(1,) * 12), grid=6)
    assert bootstrap(many, 100, method="trunk").note == "12 trunks resampled"


def test_bad_settings(simulate: Callable[..., Runs]) -> None:
    fit = fit_law(simulate(np.random.default_rng(0)), grid=6)
    with pytest.raises(InputError, match="5 bootstrap draws"):
        bootstrap(fit, 5)
    with pytest.raises(InputError, match="level"):
        bootstrap(fit, 100, level=95)
    with pytest.raises(InputError, match="choose hierarchical"):
        bootstrap(fit, 100, method="jackknife")  # type: ignore[arg-type]


def test_predictive_interval_is_wider_than_the_fits(simulate: Callable[..., Runs]) -> None:
    fit = fit_law(simulate(np.random.default_rng(0)), grid=6)
    intervals = bootstrap(fit, 400)
    n, d = np.array([1e9]), np.array([1e10])
    low, high = intervals.predictive(n, d)
    inner_low, inner_high = intervals.of(lambda p: p.predict(n, d))
    assert low[0] < inner_low[0] < inner_high[0] < high[0]


def test_degrees_of_freedom_are_counted(simulate: Callable[..., Runs]) -> None:
    rng = np.random.default_rng(0)

    def noise(**settings: object) -> Noise:
        return estimate_noise(fit_law(simulate(rng, **settings), grid=4))

    three = noise(sizes=3, seeds=(1,) * 3)
    assert (three.freedom, three.trunk) == (0, 0.0)
    assert "too narrow" in three.source
    assert noise(sizes=3, seeds=(2, 1, 1)).freedom == 1
    assert noise().freedom == 3
    assert noise().branch_freedom == 30 - 6 - 5 + 1  # trunks and parameters, which share the overall level


def test_no_prediction_interval_without_residual_freedom(simulate: Callable[..., Runs]) -> None:
    fit = fit_law(simulate(np.random.default_rng(0), sizes=3, seeds=(1,) * 3), grid=4)
    with pytest.raises(InputError, match="interval not available: no residual freedom"):
        bootstrap(fit, 20).predictive(np.array([4e9]), np.array([1e10]))


def test_corrected_residuals_have_the_variance_of_a_run() -> None:
    """Residuals of a fit are too small by their leverage; over many studies the corrected ones are not."""
    raw, corrected = [], []
    for fit in studies(Design(6, 1, 3, trunk=0.0, branch=0.003), 60, seed=2):
        pool = corrected_residuals(fit)
        assert pool.mean() == pytest.approx(0.0, abs=1e-12)
        raw.append(np.mean(fit.residuals**2))
        corrected.append(np.mean(pool**2))
    assert np.sqrt(np.mean(corrected)) == pytest.approx(0.003, rel=0.06)
    assert np.sqrt(np.mean(raw)) < 0.0028


def test_residual_bootstrap_keeps_the_design_and_ignores_trunks(simulate: Callable[..., Runs]) -> None:
    fit = fit_law(simulate(np.random.default_rng(0), seeds=(2,) * 6, trunk=0.005, branch=0.001), grid=6)
    plain, trunks = (bootstrap(fit, 200, method=m).interval("alpha") for m in ("residual", "hierarchical"))  # type: ignore[arg-type]
    assert plain[0] < fit.alpha < plain[1]
    assert plain[1] - plain[0] < 0.75 * (trunks[1] - trunks[0])


def test_a_batch_of_studies_draws_what_each_alone_draws(simulate: Callable[..., Runs]) -> None:
    rng = np.random.default_rng(0)
    fits = [fit_law(simulate(rng), grid=6) for _ in range(3)]
    for method in ("hierarchical", "row"):
        together = bootstrap_many(fits, 40, method=method, seeds=[1, 2, 3])  # type: ignore[arg-type]
        for fit, seed, found in zip(fits, (1, 2, 3), together, strict=True):
            alone = bootstrap(fit, 40, method=method, seed=seed)  # type: ignore[arg-type]
            assert found.note == alone.note
            assert found.interval("beta") == pytest.approx(alone.interval("beta"), rel=1e-6)


def test_no_interval_for_the_floor_where_noise_is_unknown(simulate: Callable[..., Runs]) -> None:
    rng = np.random.default_rng(0)
    few = bootstrap(fit_law(simulate(rng, sizes=4, seeds=(1,) * 4), grid=4), 40)
    with pytest.raises(Refusal, match=r"no interval for E: .* 1 degree of freedom \(4 trunks") as caught:
        few.interval("E")
    assert (caught.value.name, caught.value.reason) == ("E", few.refusal("E"))
    plain = few.to_dict()
    assert plain["intervals"]["E"] is None
    assert plain["intervals"]["alpha"] == list(few.interval("alpha"))
    assert "Add 1 or more trunks" in plain["refused"]["E"]
    enough = bootstrap(fit_law(simulate(rng), grid=4), 40)
    assert enough.refusal("E") is None
    assert enough.to_dict()["refused"] == {}
    pinned = bootstrap(fit_law(simulate(rng, sizes=4, seeds=(1,) * 4), fixed_e=1.9, grid=4), 40)
    assert pinned.refusal("E") is None
