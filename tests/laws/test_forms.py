"""Every law's derivatives against finite differences and complex steps; refusals; a user's own law."""

from __future__ import annotations

import doctest
from collections.abc import Mapping

import numpy as np
import pytest

from isofusion.errors import InputError
from isofusion.laws.catalogue import law as law_module
from isofusion.laws.catalogue.law import coefficient, exponent
from isofusion.laws.forms import FORMS, Law, find, register
from isofusion.laws.table import Array

RNG = np.random.default_rng(0)
M = 40


def columns_of(law: Law) -> dict[str, Array]:
    shares = RNG.dirichlet([2.0, 2.0, 1.0], M)
    everything = {
        "n": np.exp(RNG.uniform(17, 23, M)),
        "n_total": np.exp(RNG.uniform(17, 23, M)),
        "d": np.exp(RNG.uniform(21, 26, M)),
        "d_1": np.exp(RNG.uniform(21, 26, M)),
        "d_2": np.exp(RNG.uniform(21, 26, M)),
        "c": np.exp(RNG.uniform(42, 50, M)),
        "width": RNG.uniform(128, 4096, M),
        "depth": RNG.uniform(4, 48, M),
        "sparsity": RNG.uniform(0, 0.98, M),
        "experts": np.exp(RNG.uniform(0, 6, M)),
        "unique": np.exp(RNG.uniform(19, 24, M)),
        "unimodal": RNG.uniform(3, 4, M),
        "loss": RNG.uniform(2, 4, M),
        "h_caption": shares[:, 0],
        "h_interleaved": shares[:, 1],
        "h_text": shares[:, 2],
    }
    return {k: everything[k] for k in law.columns}


POINTS: Mapping[str, dict[str, float]] = {
    "error-from-loss": {"eps": 0.9, "k": 1.5, "g": 0.7},
    "two-modalities": {"C": 0.3, "A": 50.0, "alpha": 0.3, "B": 500.0, "beta": 0.35},
    "routed-experts": {"a": -0.08, "b": -0.11, "c": 0.004, "d": 2.6, "E_start": 1.8, "E_max": 300.0},
    "data-constrained": {"E": 1.87, "A": 521.0, "alpha": 0.34, "B": 1488.0, "beta": 0.36, "R_D": 15.4, "R_N": 5.3},
    "power": {"k": 29.574, "c": -0.0492},
    "power-floor": {"E": 1.5, "k": 300.0, "c": -0.15},
}


def point(law: Law) -> Array:
    """Two parameter vectors where every term counts, [2, P]."""
    if law.name in POINTS:
        base = law.theta(POINTS[law.name])
    else:
        guess = {}
        for p in law.parameters:
            guess[p.name] = {
                "E": 1.5,
                "A": 300.0,
                "B": 1500.0,
                "C": 0.7,
                "d": 40.0,
                "a": 60.0,
                "b": 80.0,
                "p": 1.7,
            }.get(p.name, 0.4 if not p.log else 1.3)
        guess |= {k: 40.0 for k in law.names if k.startswith("A_")} | {k: 90.0 for k in law.names if k.startswith("B_")}
        base = law.theta(guess)
    return np.stack([base, base + 0.02 * RNG.standard_normal(len(base))])


@pytest.mark.parametrize("name", sorted(FORMS))
def test_derivatives_equal_complex_steps_and_finite_differences(name: str) -> None:
    law = FORMS[name]
    x, theta = columns_of(law), point(law)
    made = law.expand(theta, x)
    assert np.isfinite(made.log_prediction).all()
    u = RNG.standard_normal(made.log_prediction.shape)
    hess = made.curvature(u)
    size = float(np.einsum("sm,spm->sp", np.abs(u), made.jacobian**2).max())  # of the sums that cancel in hess
    for i in range(theta.shape[1]):
        bump = np.zeros(theta.shape[1])
        bump[i] = 1.0
        turned = law.expand(theta + 1e-30j * bump, x)
        # a complex step has no cancellation: equal to rounding
        exact = turned.log_prediction.imag / 1e-30
        np.testing.assert_allclose(made.jacobian[:, i], exact, rtol=1e-10, atol=1e-12)
        row = np.einsum("sm,spm->sp", u, turned.jacobian.imag) / 1e-30
        np.testing.assert_allclose(hess[:, i], row, rtol=1e-9, atol=1e-12 * size)
        up, down = law.expand(theta + 1e-5 * bump, x), law.expand(theta - 1e-5 * bump, x)
        np.testing.assert_allclose(
            made.jacobian[:, i], (up.log_prediction - down.log_prediction) / 2e-5, rtol=1e-5, atol=1e-8
        )
        numeric = np.einsum("sm,spm->sp", u, up.jacobian - down.jacobian) / 2e-5
        np.testing.assert_allclose(hess[:, i], numeric, rtol=1e-4, atol=1e-6 * size)


@pytest.mark.parametrize("name", sorted(FORMS))
def test_every_law_says_what_it_is(name: str) -> None:
    law = FORMS[name]
    assert law.name == name
    assert law.formula
    assert law.source
    assert law.identified_by
    assert len(set(law.names)) == len(law.names)
    natural = {k: float(v) for k, v in law.natural(point(law)[0]).items()}
    np.testing.assert_allclose(law.theta(natural), point_like(law, natural), rtol=1e-12)


def point_like(law: Law, natural: Mapping[str, float]) -> Array:
    return np.array([np.log(natural[p.name]) if p.log else natural[p.name] for p in law.parameters])


def test_predictions_equal_the_formulas_by_hand() -> None:
    n, d = np.array([1e9, 3e9]), np.array([2e10, 1e11])
    c = FORMS["chinchilla"].predict({"E": 1.7, "A": 400.0, "alpha": 0.34, "B": 410.0, "beta": 0.28}, {"n": n, "d": d})
    np.testing.assert_allclose(c, 1.7 + 400 / n**0.34 + 410 / d**0.28)
    p = FORMS["p-norm"].predict(
        {"E": 1.7, "A": 400.0, "alpha": 0.34, "B": 410.0, "beta": 0.28, "p": 2.0}, {"n": n, "d": d}
    )
    np.testing.assert_allclose(p, 1.7 + np.hypot(400 / n**0.34, 410 / d**0.28))
    s = np.array([0.5, 0.875])
    values = {"E": 0.94, "A": 16612.5, "alpha": 0.5962, "B": 5455.67, "beta": 0.3954}
    values |= {"C": 0.4598, "lam": -0.1666, "d": 17.26, "delta": 0.1603, "gamma": 0.1595}  # Abnar et al.
    made = FORMS["sparsity-total"].predict(values, {"n_total": n, "d": d, "sparsity": s})
    by_hand = 16612.5 / n**0.5962 + 5455.67 / d**0.3954 + 0.4598 / (1 - s) ** -0.1666
    np.testing.assert_allclose(made, by_hand + 17.26 / ((1 - s) ** 0.1603 * n**0.1595) + 0.94)
    m = d / n
    over = FORMS["over-training"].predict(
        {"E": 1.8, "a": 100.0, "b": 200.0, "eta": 0.12}, {"c": 6 * n * d, "n": n, "d": d}
    )
    np.testing.assert_allclose(over, 1.8 + (100 * m**0.12 + 200 * m**-0.12) * (6 * n * d) ** -0.12)
    error = FORMS["error-from-loss"].predict({"eps": 0.87, "k": 2.0, "g": 0.7}, {"loss": np.array([2.5, 3.0])})
    np.testing.assert_allclose(error, 0.87 - 2 * np.exp(-0.7 * np.array([2.5, 3.0])))
    e_hat = 1 / (1 / (64 - 1 + 1 / (1 / 1.5 - 1 / 400)) + 1 / 400)
    routed = FORMS["routed-experts"].predict(
        {"a": -0.08, "b": -0.1, "c": 0.003, "d": 2.5, "E_start": 1.5, "E_max": 400.0},
        {"n": n, "experts": np.array([64.0, 64.0])},
    )
    np.testing.assert_allclose(
        routed, np.exp(-0.08 * np.log(n) - 0.1 * np.log(e_hat) + 0.003 * np.log(n) * np.log(e_hat) + 2.5)
    )
    # the authors' own worked example (README of huggingface/datablations)
    law = FORMS["data-constrained"]
    made = law.predict(
        law.published, {"n": np.array([6.34e9, 8.67e9]), "d": np.array([242e9, 178e9]), "unique": np.full(2, 25e9)}
    )
    np.testing.assert_allclose(made, [2.2256440889984477, 2.2269634075087867], rtol=1e-12)
    h = {"h_caption": np.array([0.45, 0.2]), "h_interleaved": np.array([0.45, 0.4]), "h_text": np.array([0.1, 0.4])}
    scale = {"E": 1.0, "alpha": 0.3, "beta": 0.35} | {f"C_{k[2:]}": 0.5 + i for i, k in enumerate(h)}
    scale |= {f"g_{k[2:]}": 0.3 + 0.1 * i for i, k in enumerate(h)}
    value = 1 / sum((0.5 + i) * v ** (0.3 + 0.1 * i) for i, v in enumerate(h.values()))
    additive = FORMS["mixture-additive"].predict(scale | {"A": 200.0, "B": 900.0}, {"n": n, "d": d, **h})
    np.testing.assert_allclose(additive, 1 + value + 200 / n**0.3 + 900 / d**0.35)
    joint_values = scale | {"g_A": 0.8, "g_B": 1.1}
    joint_values |= {f"{f}_{k[2:]}": 50.0 * (i + 1) for f in "AB" for i, k in enumerate(h)}
    joint = FORMS["mixture-joint"].predict(joint_values, {"n": n, "d": d, **h})
    mix = sum(50.0 * (i + 1) * v for i, v in enumerate(h.values()))
    np.testing.assert_allclose(joint, 1 + value + mix**0.8 / n**0.3 + mix**1.1 / d**0.35)


def test_what_the_data_cannot_identify_is_refused_with_the_runs_that_would_help() -> None:
    law = FORMS["sparsity"]
    x = columns_of(law)
    free = frozenset(law.names)
    law.identified(x, free, "runs")
    with pytest.raises(InputError, match=r"1 sparsity \(S = 0.875\).*Add runs at 2 or more other sparsities"):
        law.identified({**x, "sparsity": np.full(M, 0.875)}, free, "runs")
    law = FORMS["data-constrained"]
    x = columns_of(law)
    with pytest.raises(InputError, match="no run repeats its data"):
        law.identified({**x, "unique": x["d"]}, frozenset(law.names), "runs")
    law = FORMS["mixture-additive"]
    x = columns_of(law)
    few = {k: v if k in "nd" else v[np.arange(M) % 6] for k, v in x.items()}
    with pytest.raises(InputError, match=r"6 mixtures of 3 domains.*4 or more other mixtures"):
        law.identified(few, frozenset(law.names), "runs")
    with pytest.raises(InputError, match="sum to"):
        law.valid({**x, "h_text": x["h_text"] * 0.5}, "runs")
    law = FORMS["two-modalities"]
    with pytest.raises(InputError, match="1 value of 'n'"):
        law.identified({**columns_of(law), "n": np.full(M, 1e9)}, frozenset(law.names), "runs")
    law = FORMS["routed-experts"]
    with pytest.raises(InputError, match="'experts'"):
        law.identified({**columns_of(law), "experts": np.repeat([1.0, 8.0], M // 2)}, frozenset(law.names), "runs")
    with pytest.raises(InputError, match="follows 'n' exactly"):
        FORMS["p-norm"].identified({"n": x["n"], "d": 20 * x["n"]}, frozenset(), "runs")
    with pytest.raises(InputError, match="must be positive"):
        FORMS["chinchilla"].valid({"n": -x["n"], "d": x["d"]}, "runs")


def test_a_law_of_your_own_takes_ten_lines() -> None:
    outcome = doctest.testmod(law_module)
    assert outcome.attempted >= 5
    assert outcome.failed == 0

    class Mine(Law):
        name, formula, source = "mine", "E + A/N^alpha", "a test"
        columns, levels = ("n",), {"n": 3}
        parameters = (coefficient("E"), coefficient("A"), exponent("alpha"))

        def terms(self, t, x):  # type: ignore[no-untyped-def]
            return [t.power("E"), t.power("A", alpha=-np.log(x["n"]))]

    register(Mine())
    try:
        assert find("mine").formula == "E + A/N^alpha"
        with pytest.raises(InputError, match="already"):
            register(Mine())
    finally:
        del FORMS["mine"]
    with pytest.raises(InputError, match=r"no law 'mine'.*chinchilla"):
        find("mine")
