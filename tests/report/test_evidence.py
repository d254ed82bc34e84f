"""What stands beside the laws in a report, by hand: seed spread, paired differences, sweeps, curves, bounds."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from isofusion.report import evidence
from isofusion.report.analysis import _below_bound, _noise, _pairs, _tiers

VALUES = [0.1, 0.4, -0.2, 0.3]


def test_seed_spread_is_pooled_over_equal_runs_and_set_beside_what_the_law_leaves() -> None:
    losses = {("a", "s", 1): [1.0, 1.2], ("a", "s", 2): [2.0, 2.0, 2.6], ("b", "s", 1): [9.0], ("a", "l", 1): [4.0]}
    points = [
        {"run": f"{key}{i}", "arm": key[0], "size": key[1], "steps": key[2], "n": 4.0, "d": 25.0}
        | {"loss": {"text": value, "mean": 2 * value}}
        for key, values in losses.items()
        for i, value in enumerate(values)
    ]
    found = evidence.noise(points, ["text", "caption"])
    sd = math.sqrt((0.02 + 0.24) / 3)
    assert set(found) == {"text", "mean"}
    assert found["text"] == pytest.approx({"sd": sd, "groups": 2, "freedom": 3})
    assert found["mean"]["sd"] == pytest.approx(2 * sd)
    law = {"ok": True, "E": 0.5, "A": 1.0, "alpha": 0.5, "B": 5.0, "beta": 0.5}  # 2.0 at these N and D
    a = {"points": points, "fit_curves": {"a": {"text": [1]}, "b": {}}, "fits": {"a": {"text": law}, "b": {}}}
    entry = _noise(a, ["text"])["text"]
    residual = math.sqrt((1.0 + 0.64 + 0.0 + 0.0 + 0.36 + 4.0) / (6 - 5))
    assert (entry["residual_sd"], entry["ratio"]) == pytest.approx((residual, residual / sd))


def test_a_run_is_below_its_bound_only_by_more_than_twice_the_spread_of_seeds() -> None:
    rows = [{"run": str(loss), "loss_text": loss, "bound_text": 1.0} for loss in (0.75, 0.85, 1.5)]
    rows.append({"run": "unknown", "loss_text": 0.1, "bound_text": None})
    found = _below_bound(rows, {"text": {"sd": 0.1}}, ["text"])
    assert found == [{"run": "0.75", "domain": "text", "loss": 0.75, "bound": 1.0}]
    assert [f["run"] for f in _below_bound(rows, {}, ["text"])] == ["0.75", "0.85"]


def test_intervals_are_students() -> None:
    mean, low, high = evidence.t_interval(np.array(VALUES))
    span = stats.ttest_1samp(VALUES, 0.0).confidence_interval(0.95)
    assert (mean, low, high) == pytest.approx((0.15, span.low, span.high))
    assert evidence.t_interval(np.array([3.0])) == (3.0, None, None)
    assert [evidence.verdict(*ends) for ends in ((-2, -1), (1, 2), (-1, 1), (0, 1), (None, None))] == [
        "lower", "higher", "cannot say", "cannot say", "cannot say"
    ]  # fmt: skip
    extra = [2.0, 7.0, math.nan, 1.0, -4.0, 6.0]
    found = evidence.paired(np.array([20, 20, 20, 0, 20, 20]), np.array(extra))
    assert found is not None
    even = np.array([2.0, 7.0, -4.0, 6.0]) / 20  # documents of one length: the t interval of a mean
    span = stats.ttest_1samp(even, 0.0).confidence_interval(0.95)
    assert found["docs"] == 4  # one has no target, one no number
    assert (found["diff"], found["lo"], found["hi"]) == pytest.approx((even.mean(), span.low, span.high))
    assert evidence.paired(np.array([20, 0]), np.array([1.0, 1.0])) is None


def test_the_largest_run_is_the_most_parameters_then_tokens_then_the_first_seed() -> None:
    rows = [
        {"run": f"{n}-{tokens}-{seed}", "arm": arm, "n": n, "tokens": tokens, "seed": seed}
        for arm, n, tokens, seed in (
            ("a", 5, 9, 0), ("a", 7, 2, 0), ("a", 7, 4, 3), ("a", 7, 4, 1), ("a", 7, 4, 2), ("b", 1, 1, 0)
        )
    ]  # fmt: skip
    assert {arm: row["run"] for arm, row in evidence.champions(rows).items()} == {"a": "7-4-1", "b": "1-1-0"}


def test_fusion_is_measured_from_chance() -> None:
    row = {"arm": "a", "run": "r", "domain": "caption", "class": "fusion-after", "targets": 9, "chance": 1.5}
    row |= {"loss": 1.2, "se": 0.1, "blind": 1.6, "blind_se": 0.05}
    (found,) = evidence.fusion([row, {**row, "class": "lookup"}, {**row, "class": None}])
    assert (found["margin"], found["z"]) == pytest.approx((0.3, 3.0))
    assert (found["blind_margin"], found["blind_z"]) == pytest.approx((-0.1, -2.0))


GAPS = {0: {10: 0.2, 20: 0.4}, 1: {10: 0.1, 20: 0.3}}  # by seed and steps: how much worse arm b is


@pytest.fixture
def folder(tmp_path: Path) -> tuple[Path, list[dict[str, Any]]]:
    """Two arms of one size, two seeds, two budgets; arm b has a third seed. Files of runs as training leaves them."""
    rows = []
    for arm, seed, steps in [(a, s, t) for a in "ab" for s in (0, 1, 2) for t in (10, 20) if (a, s) != ("a", 2)]:
        row = {"run": f"{arm}-{seed}-{steps}", "arm": arm, "n": 5.0, "tokens": steps, "seed": seed, "steps": steps}
        loss = 1.0 + 0.1 * seed + 0.01 * steps + (GAPS.get(seed, {}).get(steps, 7.0) if arm == "b" else 0.0)
        asked = {"loss": loss, "targets": 30, "se": 0.1, "chance": 1.5, "blind": 1.5, "blind_se": 0.2, "shuffled": 1.6}
        domains = {
            "caption": {"loss": 1.0, "shuffled": 1.5, "blind": 1.4, "targets": 90},
            "interleaved": {"loss": 1.0, "shuffled": 1.0, "blind": 1.0, "targets": 9},
            "text": {"loss": 2.0, "shuffled": None, "blind": None, "targets": 7},
        }
        classes = {
            "caption/fusion-after": asked,
            "caption/spatial": {"loss": None},
            "caption/count": {"loss": 1, "targets": 0},
        }
        classes |= {
            "text/unclassified": {"loss": 2.0, "targets": 7},
            "caption/unclassified": {"loss": 2.0, "targets": 7},
        }
        routing = {
            "caption": {"text": [[3, 1]], "image": [[0, 4]]},
            "text": {"text": [[1, 3]], "image": [[0, 0]]},
        }
        record = {"domains": domains, "classes": classes, "routing": routing if arm == "b" else None}
        (tmp_path / "runs" / row["run"]).mkdir(parents=True)
        (tmp_path / "runs" / row["run"] / "eval.json").write_text(json.dumps(record))
        targets, true = np.array([10.0, 20.0, 20.0]), np.array([11.0, 19.0, 20.0])
        worse = (0.5 * seed + 1.0) * np.array([1.0, 2.0, 3.0]) if arm == "b" else 0.0
        arrays = {"caption/doc_targets": targets, "caption/doc_true": true, "caption/doc_shuffled": true + [5, 11, 9]}
        arrays |= {"caption/doc_blind": true + 4, "caption/fusion-after_targets": targets}
        np.savez(
            tmp_path / "runs" / row["run"] / "eval_docs.npz", **arrays, **{"caption/fusion-after_true": true + worse}
        )
        rows.append(row)
    return tmp_path, rows


def test_fusion_is_compared_by_trunk_and_by_document(folder: tuple[Path, list[dict[str, Any]]]) -> None:
    out, rows = folder
    (found,) = evidence.fusion_compare(out, rows, [("a", "b")], {5.0: "s"})
    trunks = [-np.mean([*by_steps.values()]) for by_steps in GAPS.values()]
    span = stats.ttest_1samp(trunks, 0.0).confidence_interval(0.95)
    assert (found["diff"], found["lo"], found["hi"]) == pytest.approx((-0.25, span.low, span.high))
    assert (found["class"], found["trunks"], found["pairs"]) == ("caption/fusion-after", 2, 4)
    assert found["verdict"] == evidence.verdict(found["lo"], found["hi"])
    documents = found["documents"]
    assert (documents["size"], documents["steps"], documents["seeds"], documents["docs"]) == ("s", 20, 2, 3)
    assert documents["diff"] == pytest.approx(-1.25 * 6 / 50)  # the mean of both seeds' gaps


def test_use_of_the_image_and_classes_are_those_of_the_largest_run(folder: tuple[Path, list[dict[str, Any]]]) -> None:
    out, rows = folder
    found = {r["arm"]: r for r in evidence.image_use(out, rows)}  # text shows no image, interleaved no difference
    assert [(r["run"], r["domain"]) for r in found.values()] == [("a-0-20", "caption"), ("b-0-20", "caption")]
    assert (found["a"]["true"], found["a"]["shuffled"], found["a"]["blind"], found["a"]["docs"]) == (1.0, 1.5, 1.4, 3)
    assert found["a"]["d_shuffled"]["diff"] == pytest.approx(25 / 50)
    assert found["a"]["d_blind"]["diff"] == pytest.approx(12 / 50)
    labels = [(r["domain"], r["label"], r["class"]) for r in evidence.classes(out, rows) if r["arm"] == "b"]
    assert labels == [  # no class without a loss or a target; unclassified only where it is not the whole domain
        ("caption", "all targets", None),
        ("caption", "fusion-after", "fusion-after"),
        ("caption", "unclassified", "unclassified"),
        ("interleaved", "all targets", None),
        ("text", "all targets", None),
    ]


def test_experts_are_counted_over_all_domains(folder: tuple[Path, list[dict[str, Any]]]) -> None:
    """Text 4 and 4, image 0 and 4: all tokens of the first expert are text, half of the second's (balanced: a third).

    One of the domains has a modality's name: its own counts are not all of that modality's.
    """
    out, rows = folder
    found = evidence.experts(out, rows)
    assert list(found) == ["b"]
    assert found["b"]["shares"] == {"text": [[0.5, 0.5]], "image": [[0.0, 1.0]]}
    assert found["b"]["score"] == pytest.approx([0.5])
    third = -(math.log2(1 / 3) + 2 * math.log2(2 / 3)) / 3
    assert found["b"]["balanced"] == pytest.approx([(1 + 1 - third) / 2])


def sweep(losses: dict[tuple[str, int], dict[float, float]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(the study's own rows, those of the sweep); seed 1 of the study is much better and not the sweep's."""
    own, tried = [], []
    for (size, steps), by_factor in losses.items():
        for factor, loss in by_factor.items():
            row = {"arm": "a", "size": size, "steps": steps, "seed": 0, "loss_mean": loss}
            (own if factor == 1 else tried).append(row | ({} if factor == 1 else {"variant": f"lr{factor:g}x"}))
        own.append({"arm": "a", "size": size, "steps": steps, "seed": 1, "loss_mean": 0.0})
    return own, tried


def test_a_rate_is_tuned_where_every_corner_has_its_minimum_inside() -> None:
    inside = {("s", 10): {0.5: 2.3, 1: 2.0, 2: 2.1}, ("l", 10): {0.5: 1.9, 1: 1.7, 2: 1.66, 4: 1.8}}
    found = evidence.tuning(*sweep(inside), ["a"])["a"]
    assert found["verdict"] == "tuned"
    assert {c["size"]: (c["best"], c["interior"]) for c in found["corners"]} == {"s": (1.0, True), "l": (2.0, True)}
    assert [c["gain"] for c in found["corners"] if c["size"] == "l"] == [pytest.approx(0.04)]
    assert "all 2 corners; at most 0.040 nats/token left" in found["detail"]
    edge = evidence.tuning(*sweep(inside | {("s", 20): {0.5: 1.0, 1: 1.1, 2: 1.2}}), ["a"])["a"]
    assert edge["verdict"] == "untuned"
    assert edge["detail"] == "minimum at the edge of the sweep: s at 20 steps is best at 0.5×"
    alone = evidence.tuning([], sweep({("s", 10): {2: 1.0}})[1], ["a"])["a"]
    assert alone["detail"] == "the sweep has no finished corner"


def test_curves_are_means_of_bins_and_a_branch_begins_on_its_trunk(tmp_path: Path) -> None:
    for run, steps in (("t", range(1, 401)), ("b", range(321, 401))):
        (tmp_path / "runs" / run).mkdir(parents=True)
        lines = [json.dumps({"step": s, "tokens": 10 * s, "loss": 5 - 0.01 * s}) for s in steps]
        (tmp_path / "runs" / run / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 401, "tok']))
    row = {"arm": "a", "n": 7.0, "seed": 0, "run": "b", "parent": "t"}
    other = {**row, "seed": 1, "run": "x", "parent": "y"}
    found = {c["run"]: c for c in evidence.training_curves(tmp_path, [row, other], {7.0: "s"})}
    assert set(found) == {"t", "b"}
    for curve in found.values():
        np.testing.assert_allclose(curve["loss"], 5 - 0.001 * np.array(curve["tokens"]), atol=2e-3)
        assert np.all(np.diff(curve["tokens"]) > 0)
    trunk, branch = found["t"]["tokens"], found["b"]["tokens"]
    assert 25 < len(trunk) <= 40
    assert len(branch) == 9
    assert branch[0] == max(t for t in trunk if t < branch[1])
    assert 3210 <= branch[1] < branch[-1] <= 4000


def test_arms_are_paired_and_sizes_named() -> None:
    arms = {
        "early": {"fusion": "early", "n_experts": 0}, "late": {"fusion": "late", "n_experts": 0},
        "moe": {"fusion": "early", "n_experts": 8}, "routed": {"fusion": "early", "n_experts": 2},
        "late-moe": {"fusion": "late", "n_experts": 8},
    }  # fmt: skip
    assert [pair[:2] for pair in _pairs({"arms": arms})] == [
        ("early", "late"), ("moe", "early"), ("routed", "early"), ("late-moe", "late"), ("routed", "moe")
    ]  # fmt: skip
    rows = [{"n": n, "size": size} for n, size in ((1e6, "s"), (1.05e6, "s"), (4e6, "m"), (4.1e6, "l"))]
    assert _tiers(rows) == {1e6: "s (1.02M)", 1.05e6: "s (1.02M)", 4e6: "4.05M", 4.1e6: "4.05M"}
