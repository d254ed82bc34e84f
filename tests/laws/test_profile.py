from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy.optimize import minimize

from isofusion.errors import InputError
from isofusion.laws.bootstrap import bootstrap
from isofusion.laws.fit import LawFit, fit_law
from isofusion.laws.forms import Params
from isofusion.laws.frontier import closed_form
from isofusion.laws.objective import Problem, value
from isofusion.laws.profile import profile
from isofusion.laws.solve.constrained import Constraint, minimise_on
from isofusion.laws.table import Runs


@pytest.fixture(scope="module")
def fit(simulate: Callable[..., Runs]) -> LawFit:
    return fit_law(simulate(np.random.default_rng(3), seeds=(2,) * 6))


def test_a_point_of_the_profile_is_the_constrained_minimum(fit: LawFit) -> None:
    """alpha fixed by hand and the other four minimised by SciPy: the same objective, or ours is lower."""
    problem = Problem.of(fit.runs, fit.form, fit.scale, fit.bounds)
    for shift in (-0.06, 0.08):
        alpha = fit.alpha + shift
        ours = minimise_on(
            fit.theta[None], problem, fit.delta, Constraint.of(lambda p: p.alpha, fit), np.array([alpha])
        )
        assert fit.scale.to_params(ours.theta).alpha[0] == pytest.approx(alpha, rel=1e-8)

        def objective(rest: np.ndarray, alpha: float = alpha) -> float:
            theta = np.array([[rest[0], rest[1], alpha * fit.scale.spread_n, rest[2], rest[3]]])
            return 1e3 * float(value(theta, problem, fit.delta)[0])

        start = fit.theta[[0, 1, 3, 4]]
        for _ in range(3):
            start = minimize(objective, start, method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-12}).x
        theirs = objective(start) / 1e3
        assert ours.objective[0] > fit.objective * 1.01
        assert ours.objective[0] <= theirs * (1 + 1e-6)


def test_a_nonlinear_quantity_is_met_and_nothing_nearby_on_its_surface_is_better(fit: LawFit) -> None:
    c = 1e21

    def log_size(p: Params) -> np.ndarray:
        return np.log(closed_form(p, c)[0])

    problem = Problem.of(fit.runs, fit.form, fit.scale, fit.bounds)
    constraint = Constraint.of(log_size, fit)
    target = np.array([float(log_size(fit.params)) + 0.2])
    end = minimise_on(fit.theta[None], problem, fit.delta, constraint, target)
    assert constraint.value(end.theta)[0] == pytest.approx(target[0], abs=1e-7)
    assert end.gradient[0] < 1e-4
    rng = np.random.default_rng(0)
    slope = constraint.gradient(end.theta)[0]
    for _ in range(30):
        step = rng.standard_normal(5)
        step -= slope * (step @ slope) / (slope @ slope)
        other = end.theta[0] + 1e-3 * step / np.linalg.norm(step)
        gap = float(constraint.value(other[None])[0] - target[0])  # second order in the step
        assert abs(gap) < 1e-4
        assert value(other[None], problem, fit.delta)[0] > end.objective[0] - 1e-3 * abs(gap)


def test_profile_agrees_with_the_bootstrap_and_row_scale_is_too_narrow_for_alpha(fit: LawFit) -> None:
    drawn = bootstrap(fit, 400)
    found = profile(fit, "alpha")
    assert found.low is not None
    assert found.high is not None
    assert found.low < fit.alpha < found.high
    assert not found.warnings
    low, high = drawn.interval("alpha")
    assert 0.6 < (found.high - found.low) / (high - low) < 1.6
    rows = profile(fit, "alpha", scale="residual")
    assert rows.low is not None
    assert rows.high is not None
    assert rows.high - rows.low < 0.8 * (found.high - found.low)  # trunks have luck, rows know nothing of it
    # the ends are where the profile crosses the threshold, and it rises outwards
    inside = (found.values > found.low) & (found.values < found.high)
    assert (found.objective[inside] <= found.minimum + found.threshold * 1.001).all()
    assert found.objective[0] >= found.minimum + found.threshold
    assert (np.diff(found.objective[found.values >= fit.alpha]) > 0).all()
    assert found.to_dict()["interval"] == [found.low, found.high]


def test_every_named_quantity_brackets_its_estimate(fit: LawFit) -> None:
    n, d, loss = closed_form(fit.params, 1e21)
    truth = {"N*": n, "D*": d, "D/N": d / n, "loss": loss}
    for name, expected in truth.items():
        found = profile(fit, name, at=1e21, scale="residual")
        assert found.estimate == pytest.approx(float(expected))
        assert found.low is not None
        assert found.high is not None
        assert found.low < found.estimate < found.high
    for name in ("E", "A", "B", "beta"):
        found = profile(fit, name, scale="residual")
        assert found.values[0] < getattr(fit, name) < found.values[-1]


def test_a_flat_profile_is_said_to_be_flat(simulate: Callable[..., Runs]) -> None:
    """Three sizes within a factor of two say nothing about E from below: its profile has no lower end."""
    rng = np.random.default_rng(1)
    n, d = (v.ravel() for v in np.meshgrid([1e9, 1.5e9, 2e9], [2e9, 3e9, 4e9]))
    loss = Params.of(1.9, 260.0, 0.3, 1850.0, 0.33).predict(n, d) * np.exp(0.01 * rng.standard_normal(9))
    found = profile(fit_law(Runs.of(n, d, loss)), "E", scale="residual")
    assert found.low is None
    assert found.warnings[0].code == "flat"
    assert "no end below" in found.warnings[0].message


def test_bad_requests_are_refused(fit: LawFit) -> None:
    with pytest.raises(InputError, match="choose E, A, alpha"):
        profile(fit, "gamma")
    with pytest.raises(InputError, match="give the compute"):
        profile(fit, "N*")
    with pytest.raises(InputError, match="level"):
        profile(fit, "E", level=95)
    with pytest.raises(InputError, match="no threshold"):
        profile(fit, "E", draws=5)
    with pytest.raises(InputError, match="choose noise or residual"):
        profile(fit, "E", scale="rows")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="does not depend"):
        profile(fit, lambda p: np.ones(len(p)))
    pinned = fit_law(fit.runs, fixed_e=1.5)
    with pytest.raises(InputError, match="does not fit it"):
        profile(pinned, "E")
    assert profile(pinned, "alpha", scale="residual").low is not None
