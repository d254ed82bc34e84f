"""Rollout: each step predicted from what lies below it, by hand where that can be checked."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from isofusion.errors import InputError
from isofusion.laws.fit import fit_law
from isofusion.laws.holdout import accuracy
from isofusion.laws.rollout import BASELINES, beaten, rollout
from isofusion.laws.table import Runs


def test_accuracy_by_hand() -> None:
    found = accuracy(np.array([2.0, 4.0]), np.array([2.2, 3.8]))
    assert found.mse == pytest.approx(0.04)
    assert found.r2 == pytest.approx(1 - 0.08 / 2)
    assert found.mae_percent == pytest.approx(100 * (0.1 + 0.05) / 2)
    part = accuracy(np.array([2.0, 4.0]), np.array([np.nan, 3.8]))
    assert part.mse == pytest.approx(0.04)
    assert part.to_dict()["r2"] is None
    assert np.isnan(accuracy(np.array([2.0]), np.array([np.nan])).mae_percent)


def test_growing_sizes(simulate: Callable[..., Runs]) -> None:
    runs = simulate(np.random.default_rng(0), seeds=(2,) * 6)
    found = rollout(runs, "n", draws=100)
    assert [len(s.held) for s in found.steps] == [10, 10, 10]
    assert [w for w, _ in found.refused] == ["size 1 (N = 1.97e+08)", "size 2 (N = 3.9e+08)"]
    assert all("cannot determine" in why for _, why in found.refused)
    third = runs.select(runs.n < 5e8)
    by_hand = fit_law(third).predict(found.steps[0].held.n, found.steps[0].held.d)
    np.testing.assert_allclose(found.steps[0].predicted, by_hand)
    assert found.floor == "oracle"
    out = found.to_dict()
    json.dumps(out, allow_nan=False)
    assert out["mae_loss"] < 0.02
    assert out["mae_loss"] < out["mae_reducible"]
    assert out["mae_loss"] == pytest.approx(out["accuracy"]["mae_percent"] / 100)
    assert set(out["baselines"]) == {"carry_over", "power_law", "nearest"}
    assert all(b["ratio_of_law"] < 0.7 for b in out["baselines"].values())
    inside = [(s.low <= s.held.loss) & (s.held.loss <= s.high) for s in found.steps]
    assert found.hit_rate == pytest.approx(np.mean(inside))
    assert found.hit_rate > 0.6


def test_growing_compute(simulate: Callable[..., Runs]) -> None:
    runs = simulate(np.random.default_rng(0), seeds=(1,) * 6)
    found = rollout(runs, "c", draws=0, steps=4)
    assert len(found.steps) == 4
    assert found.hit_rate is None
    for step in found.steps:
        assert step.fit.runs.c.max() < step.held.c.min()
        assert step.held.c.max() <= 2.0 * step.held.c.min()
    assert found.steps[-1].held.c.max() == runs.c.max()


def test_without_an_oracle_one_floor_serves_all_steps(simulate: Callable[..., Runs]) -> None:
    runs = replace(simulate(np.random.default_rng(0), seeds=(1,) * 6), oracle=None)
    found = rollout(runs, draws=0)
    assert found.floor == "fitted E of all runs"
    assert len({float(v) for s in found.steps for v in s.floor}) == 1
    assert not found.steps[0].floor_is_oracle


def test_a_floor_above_a_loss_leaves_reducible_errors_out(simulate: Callable[..., Runs]) -> None:
    """Losses of the largest size are below the floor: none is reducible, and plain errors must still be there."""
    runs = simulate(np.random.default_rng(0), seeds=(1,) * 6)
    loss = np.where(runs.n == runs.n.max(), runs.loss * 0.6, runs.loss)
    found = rollout(replace(runs, oracle=None).with_loss(loss), draws=0, fit=fit_law(runs))
    assert found.floor.startswith("none")
    assert found.to_dict()["mae_reducible"] is None
    assert found.error(reducible=False) > 0.1  # the last step is missed by 40 %, and shows


def test_refusals(simulate: Callable[..., Runs]) -> None:
    runs = simulate(np.random.default_rng(0), sizes=3, seeds=(1,) * 3)
    with pytest.raises(InputError, match="no step of the rollout"):
        rollout(runs)
    with pytest.raises(InputError, match="by = 'd'"):
        rollout(runs, "d")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="steps = 0"):
        rollout(runs, steps=0)


def test_repeated_seeds_without_a_floor_are_no_broken_json(simulate: Callable[..., Runs]) -> None:
    runs = replace(simulate(np.random.default_rng(0), seeds=(2,) * 6), oracle=None)
    low = runs.loss.copy()
    low[0] = 0.3  # below the fitted E of all runs
    found = rollout(runs.with_loss(low), "n", draws=0).to_dict()
    assert found["reducible_floor"].startswith("none")
    assert [step["seeds_averaged"]["mae_reducible"] for step in found["steps"]] == [None] * len(found["steps"])
    json.dumps(found, allow_nan=False)


def test_where_a_baseline_wins_the_errors_are_written_out_and_differ(simulate: Callable[..., Runs]) -> None:
    step = rollout(simulate(np.random.default_rng(0), seeds=(1,) * 6), draws=0, steps=1).steps[0]

    def off(law: float, baseline: float) -> str:
        ours, theirs = (step.floor + (1 + e) * (step.held.loss - step.floor) for e in (law, baseline))
        return beaten({"each": replace(step, predicted=ours, baselines=dict.fromkeys(step.baselines, theirs))})

    assert "is off by 56 %, the law by 210 % on the same" in off(2.053, 0.56)
    assert "is off by 3.11 %, the law by 3.14 % on the same" in off(0.0314, 0.0311)
    assert "is off by 50 %, the law by 2.1e+302 % on the same" in off(2.1e300, 0.5)
    assert off(0.03, 0.031) == ""
    ahead = {
        name: step.floor + (1 + e) * (step.held.loss - step.floor)
        for name, e in zip(BASELINES, (1.2, 0.4, 0.9), strict=True)
    }
    law = step.floor + 3.0 * (step.held.loss - step.floor)
    told = beaten({"each": replace(step, predicted=law, baselines=ahead)})
    assert f"{[*BASELINES.values()][1]} is off by 40 %, the law by 200 %" in told  # the one furthest ahead
