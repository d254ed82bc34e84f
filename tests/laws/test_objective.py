from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from isofusion.laws.forms import Form, Params, Scale
from isofusion.laws.objective import Kernel, Problem, derivatives, huber, jacobian, minimise, terms, value
from isofusion.laws.solve.newton import newton
from isofusion.laws.table import Runs


@pytest.fixture
def runs(simulate: Callable[..., Runs]) -> Runs:
    return simulate(np.random.default_rng(0), trunk=0.02)


@pytest.mark.parametrize("delta", [1e-3, 1e-2, 1.0])
@pytest.mark.parametrize("form", [Form(), Form(n_term=False), Form(d_term=False), Form(fixed_e=1.5), Form(fixed_e=0.0)])
def test_gradient_and_hessian_equal_finite_differences(runs: Runs, form: Form, delta: float) -> None:
    from isofusion.laws.fit import pin

    scale = Scale.of(runs)
    problem = Problem.of(runs, form, scale, (0.01, 3.0), weights=np.arange(1.0, len(runs) + 1))
    theta = pin(scale.to_theta(Params.of(1.7, 200.0, 0.28, 1500.0, 0.33))[None], form)
    _, grad, hess = derivatives(theta, problem, delta)
    h = 1e-6
    for i in np.flatnonzero(form.free):
        up, down = theta.copy(), theta.copy()
        up[0, i] += h
        down[0, i] -= h
        f_up, g_up, _ = derivatives(up, problem, delta)
        f_down, g_down, _ = derivatives(down, problem, delta)
        np.testing.assert_allclose((f_up - f_down) / (2 * h), grad[:, i], rtol=1e-6, atol=1e-9)
        # the gradient has kinks at |r| = delta; the random data keep them outside +-h
        np.testing.assert_allclose((g_up - g_down)[0, form.free] / (2 * h), hess[0, i, form.free], rtol=1e-5, atol=1e-7)
        numeric = (terms(up, problem.x, problem.y)[0] - terms(down, problem.x, problem.y)[0]) / (2 * h)
        np.testing.assert_allclose(numeric[0], jacobian(theta, problem)[0, i], atol=1e-8)


@pytest.mark.parametrize("form", [Form(), Form(n_term=False), Form(d_term=False), Form(fixed_e=1.5), Form(fixed_e=0.0)])
def test_rows_of_a_batch_have_the_derivatives_of_each_alone(runs: Runs, form: Form) -> None:
    from isofusion.laws.fit import pin

    scale, rng = Scale.of(runs), np.random.default_rng(0)
    problem = Problem.of(runs, form, scale, (0.01, 3.0), weights=rng.uniform(0.5, 2.0, (40, len(runs))))
    theta = scale.to_theta(Params.of(1.7, 200.0, 0.28, 1500.0, 0.33)) + 0.05 * rng.standard_normal((40, 5))
    theta = pin(theta, form)  # 40 rows take the series, one does not
    together = derivatives(theta, problem, 1e-2)
    for i in range(40):
        alone = derivatives(theta[i : i + 1], problem.but(weights=problem.weights[i]), 1e-2)
        for found, expected in zip(together, alone, strict=True):
            np.testing.assert_allclose(found[i], expected[0], rtol=1e-9, atol=1e-12 * np.abs(expected).max())


def test_objective_is_the_sum_of_huber_of_log_residuals(runs: Runs) -> None:
    params = Params.of(1.7, 200.0, 0.28, 1500.0, 0.33)
    scale = Scale.of(runs)
    problem = Problem.of(runs, Form(), scale, (0.01, 3.0))
    by_hand = 0.0
    for n, d, loss in zip(runs.n, runs.d, runs.loss, strict=True):
        r = abs(np.log(1.7 + 200.0 / n**0.28 + 1500.0 / d**0.33) - np.log(loss))
        by_hand += 0.5 * r * r if r <= 1e-3 else 1e-3 * (r - 0.5e-3)
    assert value(scale.to_theta(params)[None], problem, 1e-3)[0] == pytest.approx(by_hand, rel=1e-12)
    assert huber(np.array([2.0, -0.5]), 1.0).tolist() == [1.5, 0.125]


def test_newton_matches_scipy_and_stays_in_the_box(runs: Runs) -> None:
    from scipy.optimize import minimize as scipy_minimize

    scale = Scale.of(runs)
    problem = Problem.of(runs, Form(), scale, (0.32, 3.0))  # the true alpha, 0.301, is outside
    start = scale.to_theta(Params.of(1.5, 300.0, 0.4, 1500.0, 0.35))[None]
    end = minimise(start, problem, 0.1)
    peer = scipy_minimize(
        lambda t: 1e6 * value(t[None], problem, 0.1)[0],
        start[0],
        jac=lambda t: 1e6 * derivatives(t[None], problem, 0.1)[1][0],
        method="L-BFGS-B",
        bounds=list(zip(problem.lower, problem.upper, strict=True)),
        options={"maxiter": 5000, "maxfun": 20000, "ftol": 1e-15, "gtol": 1e-10},
    )
    assert end.converged.all()
    assert end.objective[0] <= peer.fun / 1e6 * (1 + 1e-9)
    assert (end.theta >= problem.lower).all()
    assert (end.theta <= problem.upper).all()


def test_the_bent_valleys_of_a_small_delta_are_followed_to_their_end() -> None:
    """Scatter of 5 % under delta = 0.1 %: a few rows stay fitted exactly, and E is free to go to nothing."""
    n, d = (v.ravel() for v in np.meshgrid(np.geomspace(3e4, 5e5, 6), np.geomspace(1.8e6, 9e6, 5)))
    truth = Params.of(0.3, 60.0, 0.45, 150.0, 0.42)
    runs = Runs.of(n, d, truth.predict(n, d))
    scale = Scale.of(runs)
    base = Problem.of(runs, Form(), scale, (0.01, 3.0))
    log_loss = base.log_loss + 0.05 * np.random.default_rng(3).standard_normal((100, len(runs)))
    problem = replace(base, log_loss=log_loss)
    start = minimise(np.repeat(scale.to_theta(truth)[None], 100, axis=0), problem, 1e-2, tolerance=1e-7).theta
    end = minimise(start, problem, 1e-3)
    assert end.converged.all()  # 5 in 100 do not where steps are straight in the logarithms
    straight = newton(start, Kernel(problem, 1e-3, 100), base.lower, base.upper, base.free, slots=100)
    assert end.objective.mean() < straight.objective.mean()


def test_batches_do_not_mix(runs: Runs) -> None:
    scale = Scale.of(runs)
    losses = np.log(runs.loss) + 0.01 * np.random.default_rng(1).standard_normal(
        (40, len(runs))
    )  # a batch takes the series
    base = Problem.of(runs, Form(), scale, (0.01, 3.0))
    start = scale.to_theta(Params.of(1.7, 200.0, 0.28, 1500.0, 0.33))[None]
    batch = base.but(log_loss=losses)
    together = minimise(np.repeat(start, 40, axis=0), batch, 1e-2)
    for i in range(0, 40, 7):
        one = base.but(log_loss=losses[i])
        assert minimise(start, one, 1e-2).objective[0] == pytest.approx(together.objective[i], rel=1e-10)
