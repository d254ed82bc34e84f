"""Variable projection, bootstrap restarts and the batched Newton solver."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from scipy.optimize import nnls

from isofusion.errors import InputError
from isofusion.laws.fit import fine_continuation, fit_law
from isofusion.laws.forms import Form, Params, Scale
from isofusion.laws.objective import Problem, minimise
from isofusion.laws.solve import paperstart
from isofusion.laws.solve.newton import newton, newton_step, solve_positive
from isofusion.laws.solve.restart import joined, restart
from isofusion.laws.solve.start import Projection, Projector, descend, exponent_grid, merge
from isofusion.laws.table import Array, Runs

BOUNDS = (0.01, 3.0)


@pytest.fixture
def runs(simulate: Callable[..., Runs]) -> Runs:
    return simulate(np.random.default_rng(0), trunk=0.01, branch=0.01)


@pytest.mark.parametrize("form", [Form(), Form(n_term=False), Form(d_term=False), Form(fixed_e=1.5), Form(fixed_e=0.0)])
def test_projection_is_non_negative_least_squares(runs: Runs, form: Form) -> None:
    scale = Scale.of(runs)
    projector = Projector(runs, form, scale)
    exponents = exponent_grid(form, scale, BOUNDS, 6)
    found = projector(exponents)
    wanted = form.free[[0, 1, 3]]
    for (alpha, beta), coefficients, error in zip(exponents, found.coefficients, found.error, strict=True):
        columns = np.stack(
            [np.ones(len(runs)), np.exp(-alpha * scale.x(runs.n)), np.exp(-beta * scale.y(runs.d))], axis=1
        )
        peer, distance = nnls(columns[:, wanted] / runs.loss[:, None], projector.target)
        np.testing.assert_allclose(coefficients[wanted], peer, rtol=1e-5, atol=1e-7)
        assert (coefficients[~wanted] == 0).all()
        assert error == pytest.approx(distance**2, rel=1e-6, abs=1e-12)


def test_slope_of_the_projection_equals_finite_differences(runs: Runs) -> None:
    scale = Scale.of(runs)
    projector = Projector(runs, Form(), scale)
    exponents = np.array([[0.3, 0.5], [0.6, 0.3], [1.0, 1.0]])
    found = projector(exponents)
    for k in range(2):
        bump = np.zeros(2)
        bump[k] = 1e-5
        up, down = projector(exponents + bump), projector(exponents - bump)
        np.testing.assert_allclose(found.gradient[:, k], 0.5 * (up.error - down.error) / 2e-5, rtol=1e-4, atol=1e-9)


def test_every_start_descends_and_most_meet(runs: Runs) -> None:
    scale = Scale.of(runs)
    projector = Projector(runs, Form(), scale)
    exponents = exponent_grid(Form(), scale, BOUNDS)
    first = projector(exponents)
    end, _, error = descend(projector, exponents, first, BOUNDS)
    assert (error <= first.error).all()
    index, count = merge(end)
    assert count.sum() == 256
    assert count.max() > 243
    assert len(index) == len(count)


def test_starts_that_meet_end_where_each_would_alone(runs: Runs) -> None:
    scale = Scale.of(runs)
    projector = Projector(runs, Form(), scale)
    exponents = exponent_grid(Form(), scale, BOUNDS, 8)
    end, _, error = descend(projector, exponents, projector(exponents), BOUNDS)
    work = []

    class Counted(Projector):
        def __call__(self, exponents: Array) -> Projection:
            work.append(len(exponents))
            return super().__call__(exponents)

    alone = []
    counted = Counted(runs, Form(), scale)
    for one in exponents:
        alone.append(descend(counted, one[None], projector(one[None]), BOUNDS))
    apart, work = sum(work), []
    descend(counted, exponents, projector(exponents), BOUNDS)
    assert sum(work) < 0.8 * apart  # they do meet
    np.testing.assert_allclose(error, [float(a[2][0]) for a in alone], rtol=1e-5)
    np.testing.assert_allclose(end, [a[0][0] for a in alone], rtol=1e-2)


def test_restarts_leave_a_small_basin(simulate: Callable[..., Runs]) -> None:
    """A start in a poor basin of a few noisy runs ends as low as its neighbours once it is restarted."""
    runs = simulate(np.random.default_rng(3), sizes=4, budgets=4, seeds=(1,) * 4, trunk=0.03, branch=0.03)
    scale = Scale.of(runs)
    problem = Problem.of(runs, Form(), scale, BOUNDS)
    rng = np.random.default_rng(0)
    base = scale.to_theta(Params.of(1.5, 300.0, 0.3, 1500.0, 0.33))
    ends = minimise(base + 0.5 * rng.standard_normal((40, 5)), problem, 1e-4)
    worst = int(np.argmax(ends.objective))
    assert ends.objective[worst] > ends.objective.min() * 1.001  # there are basins to leave
    alone = type(ends)(*(getattr(ends, k)[[worst]] for k in ("theta", "objective", "gradient", "converged")))
    beside = base + 0.1 * rng.standard_normal((3, 5))
    better, met = restart(alone, problem, 1e-4, beside=beside)
    again, _ = restart(alone, problem, 1e-4, beside=beside)
    assert better.objective[0] < ends.objective[worst] * 0.999
    assert better.objective[0] <= joined(met).objective.min() * (1 + 1e-6)
    np.testing.assert_array_equal(better.theta, again.theta)
    np.testing.assert_allclose(met[0].objective[-3:], minimise(beside, problem, 1e-4).objective, rtol=1e-9)
    assert len(met) > 1  # a lower end was found, and looked for again, without those beside
    assert len(met[1].objective) == len(met[0].objective) - 3


def test_fit_ends_no_higher_than_many_random_starts(simulate: Callable[..., Runs]) -> None:
    for seed in range(4):
        runs = simulate(np.random.default_rng(seed), trunk=0.01, branch=0.01)
        fit = fit_law(runs)
        problem = Problem.of(runs, Form(), fit.scale, BOUNDS)
        rng = np.random.default_rng(1)
        ends = minimise(fit.theta + rng.standard_normal((100, 5)), problem, 1e-3)
        assert fit.objective <= ends.objective.min() * (1 + 1e-6)


def test_the_papers_search_on_a_small_grid(
    simulate: Callable[..., Runs], truth: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, values in (("EXPONENTS", (0.0, 0.5)), ("LOG_COEFFICIENTS", (5.0, 10.0)), ("LOG_FLOORS", (0.5,))):
        monkeypatch.setattr(paperstart, name, values)
    runs = simulate(np.random.default_rng(0))
    fit, ours = fit_law(runs, starts="paper"), fit_law(runs)
    assert fit.starts == 16
    assert ours.objective <= fit.objective
    assert fit.objective < 20 * ours.objective  # 5 here: its tolerance is relative to 1, the objective 2e-5
    np.testing.assert_allclose(fit.predict(runs.n, runs.d), truth.predict(runs.n, runs.d), rtol=0.02)
    with pytest.raises(InputError, match="the published fit of the full law"):
        fit_law(runs, starts="paper", fixed_e=1.5)
    with pytest.raises(InputError, match="choose 'projection' or 'paper'"):
        fit_law(runs, starts="random")  # type: ignore[arg-type]


def test_deltas_shrink_in_fine_steps() -> None:
    for delta in (1e-3, 1e-2, 0.07, 1e-6):
        steps = fine_continuation(delta)
        assert steps[0] == 0.1
        assert steps[-1] == pytest.approx(delta, rel=1e-12)
        assert all(b >= 0.73 * a for a, b in pairwise(steps[1:]))
    assert fine_continuation(1.0) == [1.0]


def test_closed_solve_says_where_it_is_valid() -> None:
    rng = np.random.default_rng(0)
    roots = rng.standard_normal((50, 5, 5))
    hess = roots @ np.swapaxes(roots, 1, 2)
    hess[::5] -= 20.0 * np.eye(5)  # indefinite
    rhs = rng.standard_normal((50, 5))
    x, positive = solve_positive(np.moveaxis(hess, 0, 2).copy(), rhs.T.copy())
    assert positive.tolist() == (np.linalg.eigvalsh(hess)[:, 0] > 0).tolist()
    np.testing.assert_allclose(
        x.T[positive], np.linalg.solve(hess[positive], rhs[positive][..., None])[..., 0], rtol=1e-6
    )
    step = newton_step(rhs, hess, np.zeros(50))
    assert (np.sum(step * rhs, axis=1) < 0).all()  # downhill everywhere


def test_newton_step_with_a_metric_does_not_depend_on_units() -> None:
    rng = np.random.default_rng(1)
    roots = rng.standard_normal((6, 4, 4))
    hess, metric = roots - 0.5 * np.swapaxes(roots, 1, 2), roots @ np.swapaxes(roots, 1, 2)
    hess = hess + np.swapaxes(hess, 1, 2)
    grad, damp = rng.standard_normal((6, 4)), np.full(6, 0.1)
    scale = np.array([1.0, 1e3, 1e-4, 10.0])
    plain = newton_step(grad, hess, damp, metric)
    scaled = newton_step(grad * scale, hess * np.outer(scale, scale), damp, metric * np.outer(scale, scale))
    np.testing.assert_allclose(scaled * scale, plain, rtol=1e-6)


def test_newton_refills_its_slots_and_reports_lost_starts() -> None:
    def bowl(theta: Array, which: np.ndarray) -> tuple[Array, Array, Array]:
        centre = which[:, None] * np.array([1.0, -1.0])
        gap = theta - centre
        f = 1.0 + np.sum(gap**2, axis=1)
        f = np.where(which == 7, np.nan, f)
        return f, 2 * gap, np.broadcast_to(2 * np.eye(2), (len(theta), 2, 2)).copy()

    box = np.full(2, 5.0)
    end = newton(np.zeros((20, 2)), bowl, -box, box, np.array([True, True]), slots=3)
    expected = np.clip(np.arange(20)[:, None] * np.array([1.0, -1.0]), -5, 5)
    keep = np.arange(20) != 7
    np.testing.assert_allclose(end.theta[keep], expected[keep], atol=1e-8)
    assert end.converged[keep].all()
    assert not end.converged[7]
    assert np.isinf(end.objective[7])
