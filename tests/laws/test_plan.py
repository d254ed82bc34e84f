"""Plans: one optimum asked in five ways agrees with itself, with closed forms, and with printed examples."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from isofusion.errors import InputError
from isofusion.laws.analysis import analyse
from isofusion.laws.basis import of_fit, of_published
from isofusion.laws.bootstrap import bootstrap
from isofusion.laws.fit import fit_law
from isofusion.laws.formanalysis import analyse_form
from isofusion.laws.frontier import closed_form
from isofusion.laws.hardware import ACCELERATORS, accelerator, training_flops
from isofusion.laws.plan import Planner, make_plan
from isofusion.laws.published import laws
from isofusion.laws.surface import PowerSurface, late_rate
from isofusion.laws.table import Runs

PLANNABLE = [name for name, law in laws().items() if law.plannable]


def basis(name: str):
    return of_published(name, unique=2e10 if name == "muennighoff2023" else None)


@pytest.mark.parametrize("name", PLANNABLE)
def test_compute_and_loss_invert_each_other(name: str) -> None:
    there = make_plan(basis(name), compute=3e21)
    back = make_plan(basis(name), loss=there.answer["loss"])
    assert back.answer["total"] == pytest.approx(3e21, rel=1e-9)
    assert back.answer["n"] == pytest.approx(there.answer["n"], rel=1e-4)
    assert there.answer["tokens_per_parameter"] == pytest.approx(there.answer["d"] / there.answer["n"])


@pytest.mark.parametrize("name", [n for n in PLANNABLE if n != "muennighoff2023"])
def test_a_fixed_size_or_token_count_finds_its_budget(name: str) -> None:
    there = make_plan(basis(name), compute=3e21).answer
    assert make_plan(basis(name), n=there["n"]).answer["d"] == pytest.approx(there["d"], rel=1e-5)
    assert make_plan(basis(name), d=there["d"]).answer["n"] == pytest.approx(there["n"], rel=1e-5)


def test_the_optimum_is_the_closed_form() -> None:
    law = basis("chinchilla/refit")
    n, d, loss = closed_form(law.surface, np.array([1e19, 5.76e23]))
    for i, c in enumerate((1e19, 5.76e23)):
        best = Planner(law.surface).at_compute(c)
        assert best.n[0] == pytest.approx(n[0, i], rel=1e-6)
        assert best.d[0] == pytest.approx(d[0, i], rel=1e-6)
        assert best.loss[0] == pytest.approx(loss[0, i], rel=1e-12)


def test_nothing_on_the_budget_is_better() -> None:
    """Late fusion has no closed form: the answer beats 2,001 other sizes at the same FLOPs."""
    law = basis("shukor2025/late")
    best = make_plan(law, compute=1e22).answer
    sizes = np.geomspace(best["n"] / 5, best["n"] * 5, 2001)
    others = law.surface.loss(sizes, 1e22 / law.rate(sizes))
    assert best["loss"] <= others.min() + 1e-12
    assert best["compute"] == pytest.approx(1e22, rel=1e-12)


def test_inference_moves_to_smaller_models() -> None:
    law = basis("shukor2025/early")
    plans = [make_plan(law, loss=2.5, inference_tokens=t) for t in (0.0, 1e11, 1e12, 1e13)]
    sizes = [p.answer["n"] for p in plans]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[3] < 0.5 * sizes[0]
    for plan in plans[1:]:
        assert plan.inference is not None
        n, d, t = plan.answer["n"], plan.answer["d"], plan.inference["tokens"]
        assert plan.answer["total"] == pytest.approx(6 * n * d + 2 * n * t)
        assert plan.inference["share_of_total"] == pytest.approx(2 * n * t / plan.answer["total"])
        assert 0 < plan.inference["saved"] < 1
        assert plan.inference["training_optimal_n"] == pytest.approx(sizes[0], rel=1e-4)
    budget = make_plan(law, compute=1e22, inference_tokens=1e11)
    assert budget.answer["total"] == pytest.approx(1e22)
    assert budget.answer["compute"] < 1e22


def test_the_inference_example_of_sardana() -> None:
    """2401.00448 Fig. 1: a 13B model that serves 2T tokens; a 7B one saves 17 % and 1.7e22 FLOPs at the same loss."""
    surface = PowerSurface.of({"E": 1.69, "A": 406.4, "alpha": 0.336, "B": 410.7, "beta": 0.283})
    large = Planner(surface).at_size(13e9)
    served = Planner(surface, inference=2e12)
    small, whole = served.at_loss(large.loss), served.total(large.n, large.d)[0]
    assert small.n[0] == pytest.approx(7e9, rel=0.01)
    assert whole - small.total[0] == pytest.approx(1.7e22, rel=0.02)
    assert 1 - small.total[0] / whole == pytest.approx(0.17, abs=0.006)


def test_late_fusion_costs_less_per_parameter() -> None:
    n = np.array([3e8, 1e9, 3e9])
    assert (late_rate()(n) < 6 * n).all()
    assert late_rate(1.0)(n) == pytest.approx(6 * n)
    with pytest.raises(InputError, match="between 0 and 1"):
        late_rate(1.5)


def test_twice_off_costs_and_the_optimum_does_not() -> None:
    plan = make_plan(basis("shukor2025/moe"), compute=1e21)
    curve = {row["factor"]: row for row in plan.curve}
    assert curve[1.0]["above"] == 0
    assert curve[1.0]["extra"] == 0
    for factor in (0.5, 2.0):
        row = curve[factor]
        assert row["n"] == pytest.approx(factor * plan.answer["n"])
        assert row["above"] > 0
        again = Planner(plan.basis.surface)
        # with that much more compute the wrong size reaches the optimum's loss
        n = np.array([row["n"]])
        d = again.tokens_left(1e21 * (1 + row["extra"]), n)
        assert again.surface.loss(n, d)[0] == pytest.approx(plan.answer["loss"], rel=1e-9)


def test_a_size_that_can_never_reach_the_loss() -> None:
    plan = make_plan(basis("shukor2025/moe"), compute=1e22)
    eighth = plan.curve[-1]
    assert eighth["extra"] == float("inf")
    assert plan.to_dict()["curve"][-1]["extra"] is None
    json.dumps(plan.to_dict(), allow_nan=False)


def test_repeating_scarce_tokens_beats_nothing_but_not_fresh_ones() -> None:
    scarce = make_plan(of_published("muennighoff2023", unique=1e10), compute=1e22).answer
    plenty = make_plan(of_published("muennighoff2023", unique=1e15), compute=1e22).answer
    assert scarce["d"] > 1e10
    assert scarce["loss"] > plenty["loss"]
    assert scarce["n"] < plenty["n"]  # excess parameters decay faster than repeated tokens
    plain = PowerSurface.of(laws()["muennighoff2023"].chinchilla())
    assert plenty["loss"] == pytest.approx(Planner(plain).at_compute(1e22).loss[0], rel=1e-3)


def test_intervals_of_the_refit_hold_the_answer() -> None:
    plan = make_plan(basis("chinchilla/refit"), compute=5.76e23)
    assert plan.answer["tokens_per_parameter"] == pytest.approx(18.3, abs=0.1)
    low, high = plan.intervals["tokens_per_parameter"]
    assert 7 < low < 10 < 18.3 < 30 < high < 45  # the authors' bootstrap: 8 to 36
    assert "compute" not in plan.intervals
    assert make_plan(basis("chinchilla"), compute=1e22).intervals == {}
    assert "carry no uncertainty" in basis("chinchilla").interval
    assert "no interval on N*" in basis("shukor2025/early").interval


def test_what_the_reading_of_a_figure_is_worth() -> None:
    plan = make_plan(basis("shukor2025/early"), compute=1e21)
    assert plan.readings["tokens_per_parameter"] == pytest.approx((40.0, 63.0), rel=1e-3)
    low, high = plan.readings["n"]
    assert low < plan.answer["n"] < high < 1.3 * low
    assert plan.readings["loss"][1] - plan.readings["loss"][0] < 1e-3  # the loss at the optimum does not rest on it
    assert make_plan(basis("shukor2025/moe"), compute=1e21).readings == {}


def test_extrapolation_is_told() -> None:
    far = make_plan(basis("shukor2025/early"), compute=1e25)
    assert {w["code"] for w in far.warnings} == {"extrapolation"}
    assert any(w["message"].startswith("N = ") for w in far.warnings)
    near = make_plan(basis("shukor2025/early"), compute=1e21)
    assert near.warnings == []
    assert [w["code"] for w in make_plan(basis("shukor2025/early"), compute=1e22).warnings] == ["outside"]


@pytest.mark.parametrize("times", [1.0, 5.0, 10.0, 10.1, 20.0])
def test_a_plan_calls_extrapolation_what_a_fit_does(simulate: Callable[..., Runs], times: float) -> None:
    """One rule for N, D and C (laws/warn.py), with rounding on its boundary, for the default law and for others."""
    runs = simulate(np.random.default_rng(0))
    c = times * float(runs.c.max())
    planned = [w for w in make_plan(of_fit(fit_law(runs)), compute=c).warnings if w["code"] == "extrapolation"]
    fitted = analyse(runs, [c], draws=0).answers[0]["warnings"]
    other = analyse_form(runs, "p-norm", [c], draws=0).answers[0]["warnings"]
    assert bool(planned) == bool(fitted) == bool(other) == (times > 10.0)
    for found in (planned, fitted, other):
        assert any("C = " in w["message"] or "C is 1" in w["message"] for w in found) == (times > 10.0)


def law_of(*draws: tuple[float, float, float, float, float]) -> PowerSurface:
    return PowerSurface(*np.array(draws).T)


USUAL = (1.9, 260.0, 0.3, 1850.0, 0.335)


@pytest.mark.parametrize(
    ("law", "asked", "searched"),
    [
        ((1.9, 1e-9, 0.3, 1850.0, 0.335), {"compute": 1e21}, "N between 10000 and 1e\\+15"),
        ((1.9, 260.0, 0.3, 1e-9, 0.335), {"compute": 1e21}, "N between 10000 and 1e\\+15"),
        ((1.9, 260.0, 0.3, 1e12, 0.05), {"n": 1e9}, "D between 1000 and 1e\\+22"),
        ((1.9, 260.0, 0.3, 1e-9, 0.335), {"n": 1e9}, "D between 1000 and 1e\\+22"),
        ((1.9, 1e9, 0.05, 1850.0, 0.335), {"d": 1e11}, "N between 10000 and 1e\\+15"),
    ],
)
def test_the_edge_of_the_search_is_no_answer(law, asked: dict[str, float], searched: str) -> None:
    with pytest.raises(InputError, match=f"no optimum: {searched} was searched, and an edge"):
        make_plan(replace(basis("chinchilla"), surface=law_of(law)), **asked)


@pytest.mark.parametrize(
    ("odd", "asked", "open_ends"),
    [  # a term of the law is all but gone in some draws: N* runs away to one side
        ((1.9, 1e-9, 0.3, 1850.0, 0.335), {"compute": 1e21}, {"n": (True, False), "d": (False, True)}),
        ((1.9, 260.0, 0.3, 1e-9, 0.335), {"compute": 1e21}, {"n": (False, True), "d": (True, False)}),
        ((1.9, 260.0, 0.3, 1e12, 0.05), {"n": 1e9}, {"d": (False, True), "compute": (False, True)}),
        ((1.9, 1e-9, 0.3, 1850.0, 0.335), {"d": 1e11}, {"n": (True, False), "tokens_per_parameter": (False, True)}),
    ],
)
def test_an_interval_has_no_bound_where_draws_reach_the_edge(odd, asked, open_ends) -> None:
    """An end that the search set would look like an answer."""
    near = [(1.9, 260.0 * (1 + k / 100), 0.3, 1850.0, 0.335) for k in range(90)]
    law = replace(basis("chinchilla"), surface=law_of(USUAL), draws=law_of(*near, *[odd] * 10))
    plan = make_plan(law, **asked)
    for key, ends in open_ends.items():
        assert tuple(not np.isfinite(v) for v in plan.intervals[key]) == ends, key
    assert any("10.0 % of the draws have no optimum" in w["message"] for w in plan.warnings)
    assert all(row["above_interval"] == (-np.inf, np.inf) for row in plan.curve)
    few = replace(law, draws=law_of(*near * 5, odd))  # fewer than the tail: the interval stands
    assert all(np.isfinite(plan_end) for key in open_ends for plan_end in make_plan(few, **asked).intervals[key])


def test_draws_that_never_reach_the_loss_are_no_numpy_warning() -> None:
    draws = [(1.9 + e, 260.0, 0.3, 1850.0, 0.335) for e in (0.0, 0.01, 0.02, 0.5)]
    plan = make_plan(replace(basis("chinchilla"), surface=law_of(USUAL), draws=law_of(*draws)), loss=2.2)
    assert plan.intervals["n"][1] == np.inf
    assert [row["extra_interval"][1] for row in plan.curve if row["factor"] != 1] == [np.inf] * 5


def test_a_plan_from_runs_has_intervals(simulate: Callable[..., Runs], truth) -> None:
    runs = simulate(np.random.default_rng(0), seeds=(2, 1, 1, 1, 1, 2))
    fit = fit_law(runs)
    plan = make_plan(of_fit(fit, bootstrap(fit, 200)), compute=1e21)
    n, d, loss = (float(v) for v in closed_form(truth, 1e21))
    for key, value in (("n", n), ("d", d), ("loss", loss)):
        low, high = plan.intervals[key]
        assert low < plan.answer[key] < high
        assert low < value < high
    half = next(row for row in plan.curve if row["factor"] == 0.5)
    assert half["above_interval"][0] < half["above"] < half["above_interval"][1]
    assert 6 * plan.answer["n"] * plan.answer["d"] == pytest.approx(1e21)
    target = make_plan(of_fit(fit, bootstrap(fit, 200)), loss=plan.answer["loss"])
    assert target.intervals["total"][0] < 1e21 < target.intervals["total"][1]
    assert make_plan(of_fit(fit), compute=1e21).intervals == {}


def test_a_measured_cost_is_used(simulate: Callable[..., Runs]) -> None:
    runs = simulate(np.random.default_rng(0))
    dear = Runs.of(runs.n, runs.d, runs.loss, c=9 * runs.n * runs.d, size=list(runs.size))
    plan = make_plan(of_fit(fit_law(dear)), compute=1e21)
    assert 9 * plan.answer["n"] * plan.answer["d"] == pytest.approx(1e21, rel=1e-6)
    assert "measured" in plan.basis.cost


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of compute, loss, n, d; got none"),
        ({"compute": 1e21, "n": 1e9}, "got compute, n"),
        ({"compute": -1.0}, "positive"),
        ({"loss": 1.9}, r"not above the irreducible loss 1\.904"),
        ({"n": 1e9, "inference_tokens": 1e12}, "not with a fixed n"),
        ({"compute": 1e21, "inference_tokens": float("nan")}, "0 or more"),
        ({"compute": 1e10, "inference_tokens": 1e15}, "inference alone"),
    ],
)
def test_impossible_questions_are_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_plan(basis("shukor2025/early"), **arguments)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("shukor2025/late/text", {}, "not N or D"),
        ("abnar2025", {}, "active parameters"),
        ("clark2022/hash", {}, "one token budget"),
        ("shukor2025mix/additive", {}, "fit your own"),
        ("muennighoff2023", {}, "give the unique tokens"),
        ("chinchilla", {"unique": 1e9}, "data-constrained"),
        ("shukor2025/early", {"image_share": 0.5}, "late fusion"),
    ],
)
def test_laws_that_cannot_plan_say_why(name: str, options: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        of_published(name, **options)


def test_gpu_hours() -> None:
    assert training_flops(1000.0, accelerator("H100"), 0.4) == pytest.approx(1000 * 3600 * 989e12 * 0.4)
    assert accelerator("tpu v5p") is ACCELERATORS["tpu-v5p"]
    assert accelerator("NVIDIA_H100-SXM") is ACCELERATORS["h100"]
    for device in ACCELERATORS.values():
        assert 1e14 < device.peak < 1e16
        assert device.source
    with pytest.raises(InputError, match="Did you mean h100"):
        accelerator("h10")
    with pytest.raises(InputError, match="--mfu 40"):
        training_flops(1.0, accelerator("a100"), 40.0)
    with pytest.raises(InputError, match="--gpu-hours 0"):
        training_flops(0.0, accelerator("a100"), 0.4)
