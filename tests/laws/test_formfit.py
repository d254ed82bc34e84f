"""Planted laws come back, whatever the measure; what a fit of any law reports."""

from __future__ import annotations

import json

import numpy as np
import pytest

from isofusion.errors import InputError
from isofusion.laws.catalogue.law import Law
from isofusion.laws.fit import fit_form, fit_law
from isofusion.laws.forms import FORMS
from isofusion.laws.solve.criterion import Criterion, se_weights
from isofusion.laws.solve.formstart import halton
from isofusion.laws.table import Array, Runs


def grid(**axes: Array) -> dict[str, Array]:
    return {k: v.ravel() for k, v in zip(axes, np.meshgrid(*axes.values(), indexing="ij"), strict=True)}


N = np.geomspace(1e8, 1e10, 6)
D = np.geomspace(2e9, 2e12, 6)


def table(
    law: Law, truth: dict[str, float], x: dict[str, Array], noise: float = 0.0, seed: int = 0
) -> dict[str, Array]:
    loss = law.predict(truth, x) * np.exp(
        noise * np.random.default_rng(seed).standard_normal(len(next(iter(x.values()))))
    )
    return {**x, law.target: loss}


PLANTED = {
    "chinchilla": ({"E": 1.7, "A": 400.0, "alpha": 0.34, "B": 1500.0, "beta": 0.36}, grid(n=N, d=D)),
    "p-norm": (
        {"E": 1.7, "A": 400.0, "alpha": 0.34, "B": 1500.0, "beta": 0.36, "p": 1.8},
        grid(n=np.geomspace(1e7, 1e11, 8), d=np.geomspace(1e9, 1e13, 8)),
    ),
    "tied": ({"E": 1.7, "A": 400.0, "alpha": 0.34, "B": 1500.0}, grid(n=N, d=D)),
    "width-depth": (
        {
            "E": 1.7,
            "A_width": 40.0,
            "alpha_width": 0.7,
            "A_depth": 0.8,
            "alpha_depth": 0.6,
            "A_d": 1500.0,
            "alpha_d": 0.36,
        },
        grid(width=np.geomspace(128, 4096, 5), depth=np.array([4.0, 8.0, 16.0, 32.0]), d=D[:4]),
    ),
    "power": ({"k": 29.574, "c": -0.0492}, {"c": np.geomspace(1e18, 1e24, 12)}),
    "power-floor": ({"E": 1.6, "k": 900.0, "c": -0.16}, {"c": np.geomspace(1e18, 1e24, 12)}),
    "over-training": (
        {"E": 1.7, "a": 60.0, "b": 700.0, "eta": 0.12},
        grid(n=N, d=D) | {"c": 6.0 * np.prod(list(grid(n=N, d=D).values()), axis=0)},
    ),
    "error-from-loss": ({"eps": 0.85, "k": 2.2, "g": 0.8}, {"loss": np.linspace(2.0, 4.0, 15)}),
    "two-modalities": (
        {"C": 0.25, "A": 60.0, "alpha": 0.3, "B": 900.0, "beta": 0.36},
        grid(n=N, d_1=D[:4], d_2=D[2:5]) | {"unimodal": np.linspace(2.5, 3.5, 72)},
    ),
    "data-constrained": (
        {"E": 1.87, "A": 521.0, "alpha": 0.35, "B": 1488.0, "beta": 0.36, "R_D": 15.0, "R_N": 5.0},
        grid(n=np.geomspace(2e7, 4e10, 7), d=np.geomspace(1e9, 1e12, 7), unique=np.array([2e8, 2e9, 2e10])),
    ),
    "routed-experts": (
        {"a": -0.09, "b": -0.12, "c": 0.0035, "d": 2.6, "E_start": 1.8, "E_max": 300.0},
        grid(n=N, experts=2.0 ** np.arange(0, 10)),
    ),
    "sparsity": (
        {
            "E": 0.9,
            "A": 16612.5,
            "alpha": 0.6,
            "B": 5455.7,
            "beta": 0.395,
            "C": 0.46,
            "lam": 0.3,
            "d": 17.3,
            "delta": -0.2,
            "gamma": 0.16,
        },
        grid(n=np.geomspace(1e7, 1e11, 6), d=D, sparsity=np.array([0.0, 0.5, 0.75, 0.875, 0.95, 0.98])),
    ),
}


@pytest.mark.parametrize("name", sorted(PLANTED))
def test_a_planted_law_comes_back(name: str) -> None:
    """Noiseless: the predictions to 1e-6, and the parameters where the design holds them."""
    law, (truth, x) = FORMS[name], PLANTED[name]
    fit = fit_form(table(law, truth, x), name)
    np.testing.assert_allclose(fit.predict(x), law.predict(truth, x), rtol=1e-5)
    if name not in ("sparsity",):  # ten parameters: predictions hold them only together
        assert fit.params == pytest.approx(truth, rel=2e-3)
    json.dumps(fit.to_dict(), allow_nan=False)


@pytest.mark.parametrize("joint", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_planted_mixture_law_comes_back(joint: bool) -> None:
    law = FORMS["mixture-joint" if joint else "mixture-additive"]
    rng = np.random.default_rng(1)
    shares = np.repeat(0.1 + 0.7 * rng.dirichlet([1.0] * 3, 12), 9, axis=0)
    n, d = np.tile(np.repeat([1e8, 4e8, 1.6e9], 3), 12), np.tile(np.geomspace(5e9, 2e11, 3), 36)
    x = {"n": n, "d": d, **{f"h_{k}": shares[:, i] for i, k in enumerate(("caption", "interleaved", "text"))}}
    truth = {"E": 1.2, "alpha": 0.3, "beta": 0.35}
    truth |= {
        "C_caption": 0.6,
        "C_interleaved": 1.4,
        "C_text": 0.9,
        "g_caption": 0.3,
        "g_interleaved": 0.6,
        "g_text": 0.4,
    }
    if joint:
        truth |= {"g_A": 0.8, "A_caption": 900.0, "A_interleaved": 500.0, "A_text": 200.0}
        truth |= {"g_B": 0.9, "B_caption": 1500.0, "B_interleaved": 3000.0, "B_text": 2500.0}
    else:
        truth |= {"A": 200.0, "B": 1200.0}
    fit = fit_form(table(law, truth, x), law, starts=256 if joint else 24)
    np.testing.assert_allclose(fit.predict(x), law.predict(truth, x), rtol=1e-4)


def test_the_default_law_agrees_with_its_own_solver(epoch240: Runs) -> None:
    special, general = fit_law(epoch240), fit_form(epoch240, "chinchilla")
    assert general.objective == pytest.approx(special.objective, rel=1e-12)
    assert [general.params[k] for k in special.names] == pytest.approx(
        [getattr(special, k) for k in special.names], rel=1e-6
    )
    assert general.share > 0.95
    assert general.gradient_norm < 1e-8
    draws = np.random.default_rng(0).multinomial(240, np.full(240, 1 / 240), size=3).astype(np.float64)
    params, objective = general.refit(weights=draws)
    for i in range(3):
        alone = fit_form(epoch240, "chinchilla", weights=draws[i])
        assert objective[i] == pytest.approx(alone.objective, rel=1e-9)
        assert params["alpha"][i] == pytest.approx(alone.params["alpha"], rel=1e-5)


@pytest.mark.parametrize("kind", ["l1", "asymmetric"])
def test_corners_are_found_exactly(kind: str) -> None:
    """At a corner's optimum no small step helps, and a few rows are fitted exactly."""
    law, (truth, x) = FORMS["chinchilla"], PLANTED["chinchilla"]
    fit = fit_form(table(law, truth, x, noise=0.01), law, objective=kind)  # type: ignore[arg-type]
    assert not [w for w in fit.warnings if w.code == "not-converged"]
    assert (np.abs(fit.residuals) < 1e-12).sum() in (4, 5)
    rng = np.random.default_rng(0)
    for size in (1e-7, 1e-5, 1e-3):
        other = fit.theta + size * rng.standard_normal((200, 5))
        gap = fit.criterion.value(law.log_prediction(other, x), np.log(fit.target)).sum(axis=1)
        assert (gap >= fit.objective).all()


def test_measures_and_their_derivatives() -> None:
    log_loss = np.log(np.array([2.0, 2.5, 3.0, 3.5]))
    log_prediction = log_loss + np.array([0.02, -0.02, 0.0004, -0.0003])
    for kind in ("huber", "log-squares", "squares", "l1", "asymmetric"):
        measure = Criterion(kind)  # type: ignore[arg-type]
        rho, slope, bend = measure.rounded(log_prediction, log_loss, 1e-3)
        up, down = (measure.rounded(log_prediction + h, log_loss, 1e-3) for h in (1e-6, -1e-6))
        np.testing.assert_allclose(slope, (up[0] - down[0]) / 2e-6, rtol=1e-4, atol=1e-9)
        np.testing.assert_allclose(bend, (up[1] - down[1]) / 2e-6, rtol=1e-4, atol=1e-6)
        assert (rho >= 0).all()
    z = np.exp(log_prediction) - np.exp(log_loss)
    np.testing.assert_allclose(
        Criterion("asymmetric").value(log_prediction, log_loss), np.where(z > 0, 10 * z, -z), rtol=1e-12
    )
    for bad in ({"kind": "mean"}, {"delta": 0.0}, {"w": -1.0}):
        with pytest.raises(InputError, match=r"choose|positive"):
            Criterion(**bad)  # type: ignore[arg-type]


def test_weights_from_standard_errors_help_where_errors_differ() -> None:
    law, (truth, x) = FORMS["chinchilla"], PLANTED["chinchilla"]
    se = np.where(np.arange(36) % 2 == 0, 2e-4, 2e-2) * law.predict(truth, x)
    gaps: dict[str, list[float]] = {"plain": [], "weighted": []}
    for seed in range(6):
        noise = np.random.default_rng(seed).standard_normal(36) * se
        columns = {**x, "loss": law.predict(truth, x) + noise, "se": se}
        for name, weights in (("plain", None), ("weighted", "se")):
            fit = fit_form(columns, law, objective="log-squares", weights=weights)  # type: ignore[arg-type]
            gaps[name].append(abs(fit.params["alpha"] - 0.34))
    assert np.mean(gaps["weighted"]) < 0.3 * np.mean(gaps["plain"])
    with pytest.raises(InputError, match="standard errors"):
        se_weights(np.zeros(3), np.ones(3))


def test_refusals_and_warnings() -> None:
    law, (truth, x) = FORMS["chinchilla"], PLANTED["chinchilla"]
    columns = table(law, truth, x, noise=0.001)
    with pytest.raises(InputError, match="no law 'kaplan'"):
        fit_form(columns, "kaplan")
    with pytest.raises(InputError, match="needs a column 'd'; the columns are n, loss"):
        fit_form({k: columns[k] for k in ("n", "loss")}, law)
    with pytest.raises(InputError, match=r"one sparsity|1 sparsity \(S = 0.875\)"):
        fit_form({**columns, "sparsity": np.full(36, 0.875)}, "sparsity")
    with pytest.raises(InputError, match="5 runs for the 5 parameters"):
        fit_form({k: v[:5] for k, v in columns.items()}, law)
    with pytest.raises(InputError, match="no parameter 'gamma'"):
        fit_form(columns, law, fixed={"gamma": 1.0})
    with pytest.raises(InputError, match="is not a number"):
        fit_form({**columns, "n": ["many"] * 36}, law)
    with pytest.raises(InputError, match="must be positive and finite"):
        fit_form({**columns, "loss": -columns["loss"]}, law)
    with pytest.raises(InputError, match="lowest < highest"):
        fit_form(columns, law, bounds={"alpha": (0.5, 0.1)})
    pinned = fit_form(columns, law, bounds={"alpha": (0.4, 3.0)})
    assert "exponent-at-bound" in [w.code for w in pinned.warnings]
    held = fit_form(columns, law, fixed={"E": 1.7, "alpha": 0.34})
    assert (held.params["E"], held.params["alpha"]) == (1.7, 0.34)
    assert set(held.errors) == {"A", "B", "beta"}
    assert held.params["beta"] == pytest.approx(0.36, abs=0.01)
    assert held.extrapolation({"n": 2e10, "d": 1e10}) is None
    far = held.extrapolation({"n": 1e12, "d": 1e10})
    assert far is not None
    assert "n is 2.0 decades above" in far.message
    narrow = grid(n=np.array([1e9, 1.2e9, 1.5e9]), d=D)
    flat = fit_form(table(law, truth, narrow, noise=0.01), law)
    assert {"flat", "exponent-at-bound", "unidentified", "term-vanished"} & {w.code for w in flat.warnings}


def test_starts_are_spread_evenly() -> None:
    points = halton(256, 7)
    assert ((points > 0) & (points < 1)).all()
    for k in range(7):
        assert np.abs(np.histogram(points[:, k], bins=8, range=(0, 1))[0] - 32).max() <= 6
