"""Counting FLOPs per token: 6ND, late fusion as in the paper's App. C.2, and a table's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from isofusion.errors import InputError
from isofusion.laws.cost import Cost, image_share
from isofusion.laws.fit import fit_law
from isofusion.laws.frontier import compute_optimal, regress_allocation
from isofusion.laws.table import Runs

# the paper's six late-fusion models: encoder and decoder parameters
N_V = np.array([42.8e6, 82.2e6, 170.5e6, 309.1e6, 419.3e6, 680.8e6])
N_T = np.array([247.3e6, 411.6e6, 834.4e6, 1439.7e6, 2012.2e6, 3027.8e6])
SHARE = 0.544


def late(simulate: Callable[..., Runs]) -> tuple[Runs, np.ndarray]:
    """Runs at the paper's six late sizes on its law, with FLOPs 6 D (f N_v + N_t)."""
    base = simulate(np.random.default_rng(0), trunk=0.0, branch=0.0)
    k = base.size.astype(int)
    n_v, n = N_V[k], (N_V + N_T)[k]
    c = 6 * base.d * (SHARE * n_v + N_T[k])
    loss = 1.891 + 240.0 * n**-0.2903 + 1900.0 * base.d**-0.3383
    return replace(base, n=n, c=c, compute="given", oracle=None).with_loss(loss), n_v


def test_late_fusion_regressed_on_the_papers_six_models() -> None:
    n = N_V + N_T
    cost = Cost.late_of(n, N_V, SHARE)
    assert cost.kind == "late"
    truth = 6 * (SHARE * N_V + N_T)
    np.testing.assert_allclose(cost.per_token(n), truth, rtol=0.01)
    assert cost.spread == pytest.approx(float(np.abs(cost.per_token(n) / truth - 1).max()))
    assert cost.encoder is not None
    assert cost.encoder.slope == pytest.approx(0.184, abs=0.005)
    assert cost.encoder.intercept < 0  # embeddings: the encoder's share grows with size, no fixed ratio does
    # the paper's "N = C / (6 D) + (1 - f) N_v"
    np.testing.assert_allclose(cost.size(6e21, 1e12), 1e9 + (1 - SHARE) * cost.encoder.size(cost.size(6e21, 1e12)))


def test_size_and_tokens_invert_each_other() -> None:
    d = np.geomspace(1e9, 1e15, 50)
    for cost in (Cost.six_nd(), Cost.late(SHARE, 0.18, -1e7), Cost.late(0.3, 0.2, 5e7), Cost.late(1.0, 0.5)):
        n = cost.size(1e22, d)
        np.testing.assert_allclose(cost.per_token(n) * d, 1e22, rtol=1e-12)
        assert (np.diff(n) < 0).all()
        np.testing.assert_allclose(cost.tokens(1e22, n), d)
    np.testing.assert_allclose(Cost.late(1.0, 0.5).per_token(d), 6 * d)  # every token an image: nothing is saved


def test_the_image_share_is_measured_from_flops(simulate: Callable[..., Runs]) -> None:
    runs, n_v = late(simulate)
    assert image_share(runs, n_v) == pytest.approx(SHARE)
    cost = Cost.late_of(runs, n_v)
    assert cost.encoder is not None
    assert cost.encoder.share == pytest.approx(SHARE)
    attention = replace(runs, c=runs.c * (1 + 0.3 * (1e8 / runs.n)))
    with pytest.raises(InputError, match="flops_6nd"):
        Cost.late_of(attention, n_v)


def test_late_fusion_has_no_closed_form_and_the_regression_finds_its_optimum(simulate: Callable[..., Runs]) -> None:
    runs, n_v = late(simulate)
    cost = Cost.late_of(runs, n_v)
    fit = fit_law(runs)
    c = np.geomspace(runs.c.min(), runs.c.max(), 5)
    best = compute_optimal(fit, c, cost=cost)
    for i in range(5):  # brute force
        n = best.n[i] * np.geomspace(0.2, 5, 20001)
        losses = fit.predict(n, cost.tokens(c[i], n))
        assert best.loss[i] == pytest.approx(losses.min(), rel=1e-8)
        assert best.n[i] == pytest.approx(n[losses.argmin()], rel=0.01)
    slopes = regress_allocation(fit, cost=cost)
    assert slopes is not None
    assert slopes.a == pytest.approx(float(np.polyfit(np.log(c), np.log(best.n), 1)[0]), abs=0.005)
    six = compute_optimal(fit, c, cost=Cost.six_nd())
    assert (best.n > six.n).all()  # image tokens skip part of the model's price, so late fusion affords more
    assert (best.loss < six.loss).all()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Cost.late(0.0, 0.2), "share = 0"),
        (lambda: Cost.late(1.5, 0.2), "share = 1.5"),
        (lambda: Cost.late(0.5, 1.2), "slope"),
        (lambda: Cost.late_of([1e9], [2e9], 0.5), "model 0"),
        (lambda: Cost.late_of([1e9, 2e9], [1e8], 0.5), "2 totals and 1 encoders"),
        (lambda: Cost.late_of([1e9], [1e8]), "give share"),
    ],
)
def test_refusals(build: Callable[[], Cost], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build()


def test_one_model_gives_a_fixed_ratio() -> None:
    cost = Cost.late_of([1e9], [2e8], 0.5)
    assert cost.per_token(1e9) == pytest.approx(6 * 0.9e9)
    assert cost.spread == pytest.approx(0.0, abs=1e-12)
