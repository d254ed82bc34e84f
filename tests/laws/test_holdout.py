from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest

from isofusion.errors import InputError
from isofusion.laws.fit import fit_law
from isofusion.laws.forms import Params
from isofusion.laws.holdout import carry_over, hold_out, largest_size, leave_one_size_out, nearest, study_report
from isofusion.laws.table import Runs


@pytest.fixture(scope="module")
def runs(simulate: Callable[..., Runs]) -> Runs:
    return simulate(np.random.default_rng(0), seeds=(3, 1, 1, 1, 1, 3))


def test_baselines_by_hand() -> None:
    train = Runs.of([1e8, 1e8, 2e8, 2e8], [1e9, 4e9, 1e9, 4e9], [4.0, 3.0, 3.6, 2.5])
    test = Runs.of([4e8, 4e8, 4e8], [1e9, 2e9, 1e12], [3.0, 2.8, 2.0])
    carried = carry_over(train, test)
    assert carried[:2] == pytest.approx([3.6, np.sqrt(3.6 * 2.5)])
    assert np.isnan(carried[2])  # no run of the smaller size at that D
    between = carry_over(train, Runs.of([1.5e8, 1e8], [4e9, 4e9], [3.0, 3.0]))
    assert between[0] == pytest.approx(3.0)  # from the smallest size
    assert np.isnan(between[1])  # no size is smaller than that
    assert nearest(train, test).tolist() == [3.6, 3.6, 2.5] or nearest(train, test).tolist() == [3.6, 2.5, 2.5]


def test_the_law_beats_carrying_over_on_its_own_data(runs: Runs, truth: Params) -> None:
    result = hold_out(runs, largest_size(runs), oracle=float(truth.E), draws=200)
    out = result.to_dict()
    assert out["runs"] == 15
    assert out["mae_reducible"] < 0.05
    assert out["ratio_to_carry_over"] < 0.5
    by_hand = np.mean(np.abs(result.predicted - result.held.loss) / (result.held.loss - truth.E))
    assert out["mae_reducible"] == pytest.approx(by_hand)
    assert out["reducible_floor"] == "oracle"
    assert len(out["table"]) == 15


def test_errors_of_the_mean_over_seeds_by_hand(runs: Runs, simulate: Callable[..., Runs], truth: Params) -> None:
    """Three seeds at the largest size: what is left of the error when their luck is averaged, and no less."""
    result = hold_out(runs, largest_size(runs), oracle=float(truth.E), draws=0)
    mean = result.to_dict()["seeds_averaged"]
    assert mean["cells"] == 5
    budgets = np.array([round(np.log(d), 3) for d in result.held.d])
    errors = {"law": [], "carry": []}
    for d in np.unique(budgets):
        rows = budgets == d
        assert rows.sum() == 3
        loss = result.held.loss[rows].mean()
        for name, predicted in (("law", result.predicted), ("carry", result.baselines["carry_over"])):
            errors[name].append(abs(predicted[rows].mean() - loss) / (loss - truth.E))
    assert mean["mae_reducible"] == pytest.approx(np.mean(errors["law"]))
    assert mean["carry_over"] == pytest.approx(np.mean(errors["carry"]))
    assert mean["ratio_to_carry_over"] == pytest.approx(np.mean(errors["law"]) / np.mean(errors["carry"]))
    assert mean["mae_reducible"] < result.to_dict()["mae_reducible"]
    alone = simulate(np.random.default_rng(2), seeds=(1,) * 6)
    assert hold_out(alone, largest_size(alone), draws=0).to_dict()["seeds_averaged"] is None
    assert leave_one_size_out(alone)["seeds_averaged"] is None
    out = leave_one_size_out(runs)
    assert out["seeds_averaged"]["full"] < out["full"]
    assert out["seeds_averaged"]["ratio_without_n"] == pytest.approx(
        out["seeds_averaged"]["without_n"] / out["seeds_averaged"]["full"]
    )


def test_prediction_intervals_hit_about_as_often_as_they_say(simulate: Callable[..., Runs]) -> None:
    rng = np.random.default_rng(3)
    studies = [simulate(rng, seeds=(2,) * 6) for _ in range(12)]
    rates = [hold_out(s, largest_size(s), draws=100, seed=k).hit_rate for k, s in enumerate(studies)]
    assert float(np.mean([r for r in rates if r is not None])) >= 0.85


def test_three_sizes_predict_with_an_interval_only_where_a_seed_is_repeated(simulate: Callable[..., Runs]) -> None:
    rng = np.random.default_rng(11)
    alone = simulate(rng, sizes=4, budgets=4, seeds=(1,) * 4)
    out = hold_out(alone, largest_size(alone), draws=20).to_dict()
    assert out["no_interval"] == (
        "interval not available: no residual freedom left to estimate the luck of trunks (trained on 3 sizes)"
    )
    assert out["hit_rate"] is None
    assert out["table"][0]["low"] is None
    studies = [simulate(rng, sizes=4, budgets=4, seeds=(2, 1, 1, 1)) for _ in range(12)]  # one degree of freedom
    results = [hold_out(s, largest_size(s), draws=100, seed=k) for k, s in enumerate(studies)]
    assert all(r.no_interval is None for r in results)
    assert float(np.mean([r.hit_rate or 0.0 for r in results])) >= 0.8


def test_reducible_loss_without_oracle_says_so(runs: Runs) -> None:
    from dataclasses import replace

    plain = replace(runs, oracle=None)
    assert "no oracle" in hold_out(plain, largest_size(plain), draws=0).to_dict()["reducible_floor"]
    assert "no oracle" in leave_one_size_out(plain)["reducible_floor"]


def test_leaving_each_size_out_by_hand(runs: Runs, truth: Params) -> None:
    predicted = np.empty(len(runs))
    for size in np.unique(runs.size):
        held = runs.size == size
        predicted[held] = fit_law(runs.select(~held), grid=8).predict(runs.n[held], runs.d[held])
    reducible = runs.loss - truth.E
    out = leave_one_size_out(runs, oracle=float(truth.E))
    assert out["reducible_floor"] == "oracle"
    assert out["full"] == pytest.approx(np.mean(np.abs(predicted - runs.loss) / reducible))
    largest = runs.size == "5"
    assert out["by_size"]["5"] == pytest.approx(np.mean(np.abs(predicted - runs.loss)[largest] / reducible[largest]))
    cells = [(runs.size == size) & np.isclose(runs.d, d) for size in np.unique(runs.size) for d in np.unique(runs.d)]
    errors = [abs(predicted[c].mean() - runs.loss[c].mean()) / reducible[c].mean() for c in cells if c.any()]
    assert len(errors) == 30
    assert out["seeds_averaged"]["full"] == pytest.approx(np.mean(errors))


def test_dropping_a_needed_term_shows(runs: Runs) -> None:
    out = leave_one_size_out(runs)
    assert out["ratio_without_n"] > 2
    assert out["ratio_without_d"] > 2
    assert set(out["by_size"]) == {"0", "1", "2", "3", "4", "5"}


def test_dropping_an_unneeded_term_does_not(simulate: Callable[..., Runs]) -> None:
    flat_in_d = simulate(np.random.default_rng(1), law=Params.of(1.9, 260.0, 0.301, 1e-6, 0.3))
    assert leave_one_size_out(flat_in_d, oracle=1.9, fixed_e=1.9)["ratio_without_d"] < 2


def test_study_report_has_every_number(runs: Runs) -> None:
    report = study_report(runs, draws=200)
    json.dumps(report, allow_nan=False)
    assert report["irreducible"]["covers"]
    assert report["irreducible"]["bias"] == pytest.approx(report["law"]["E"] - 1.904)
    assert report["share_at_bound"] < 0.025
    assert report["spread"]["seed_freedom"] == 4
    assert 0.3 < report["spread"]["ratio"] < 4
    assert report["fixed_e"]["law"]["E"] == pytest.approx(1.904)
    assert report["fixed_e"]["hold_out"]["mae_reducible"] < 0.05


def test_small_studies_get_a_reason_instead_of_a_hold_out(simulate: Callable[..., Runs]) -> None:
    report = study_report(simulate(np.random.default_rng(0), sizes=3, seeds=(1,) * 3), draws=50)
    assert "holding out largest size" in report["hold_out"]["refused"]
    assert report["fixed_e"]["hold_out"]["mae_reducible"] < 0.2  # with E known, two sizes determine the rest
    assert report["spread"]["ratio"] is None


def test_a_loss_below_the_oracle_is_named(runs: Runs) -> None:
    with pytest.raises(InputError, match="at or below its floor"):
        hold_out(runs, largest_size(runs), oracle=5.0, draws=0)
    with pytest.raises(InputError, match="hold out some"):
        hold_out(runs, np.zeros(len(runs), dtype=bool))
