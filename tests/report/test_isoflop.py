"""Arms at equal compute, run by run."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from isofusion.laws.forms import Params
from isofusion.report import figures_isoflop, isoflop, lawside, text
from isofusion.report.style import NARROW, WIDE
from isofusion.report.words import si

LAWS = {"caption": Params.of(0.3, 70.0, 0.42, 900.0, 0.5), "text": Params.of(1.6, 30.0, 0.36, 300.0, 0.42)}
SIZES = np.array([2e4, 4e4, 8e4, 1.6e5, 3.2e5])
BUDGETS = (1e12, 2.5e12, 6e12)


def rows(arm: str = "early", budgets: tuple[float, ...] = BUDGETS) -> list[dict[str, Any]]:
    """Runs of the planted laws at some budgets; a run's FLOPs are 5 % beside its budget's."""
    found = []
    for b, c in enumerate(budgets):
        for i, n in enumerate(SIZES):
            spent = c * (1 + 0.05 * (-1) ** (i + b))
            d = spent / (6 * n)
            loss = {f"loss_{k}": float(law.predict(n, d)) for k, law in LAWS.items()}
            named = {"run": f"{arm}-{i}-{b}", "arm": arm, "size": f"s{i}", "seed": 0, "parent": f"{arm}-{i}"}
            found.append({**named, "n": n, "tokens": d, "flops": spent, "flops_6nd": 6 * n * d, **loss})
    return found


def points(table: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"arm": r["arm"], "n": r["n"], "c": r["flops"]} for r in table]


def test_losses_are_those_of_the_law_at_the_budget_and_the_parabola_lies_at_its_optimum() -> None:
    table = rows()
    laws = lawside.fit_arm(table, "early", list(LAWS), "exact")
    budgets = isoflop.common_budgets(points(table), ["early"])
    assert budgets == pytest.approx(BUDGETS, rel=0.02)
    for found, c in zip(isoflop.at_budgets(laws, list(LAWS), budgets), budgets, strict=True):
        d = c / (6 * SIZES)
        assert found["n"] == pytest.approx(SIZES)
        assert found["loss"] == pytest.approx(np.mean([law.predict(SIZES, d) for law in LAWS.values()], 0), rel=1e-4)
        assert 0.001 < found["moved"] < 0.03
        grid = np.geomspace(SIZES[0], SIZES[-1], 2001)
        mean = np.mean([law.predict(grid, c / (6 * grid)) for law in LAWS.values()], 0)
        assert found["lowest"] == pytest.approx(grid[mean.argmin()], rel=0.2)
        assert found["lowest_loss"] == pytest.approx(mean.min(), rel=0.01)


def test_a_budget_whose_best_size_is_at_the_edge_has_no_lowest_point() -> None:
    table = rows(budgets=(2e10, 1e11, 5e11))
    laws = lawside.fit_arm(table, "early", list(LAWS), "exact")
    budgets = isoflop.common_budgets(points(table), ["early"])
    first = isoflop.at_budgets(laws, list(LAWS), budgets)[0]
    assert first["lowest"] is None
    assert "smallest of 5 sizes" in first["why"]


def test_arms_are_compared_where_all_that_have_budgets_have_one() -> None:
    """At the geometric mean of theirs; an arm without budgets is no hindrance, a lone one no comparison."""
    early, late = rows(), [{**r, "flops": r["flops"] * 0.8} for r in rows("late")]
    both = isoflop.common_budgets(points(early + late), ["early", "late"])
    assert both == pytest.approx(np.array(BUDGETS) * 0.8**0.5, rel=0.02)
    far = [{**r, "flops": r["flops"] * 1.58} for r in rows("late")]
    assert isoflop.common_budgets(points(early + far), ["early", "late"]) == []
    few = [r for r in rows("few") if r["size"] in ("s0", "s1", "s2")]
    assert isoflop.common_budgets(points(early + few), ["early", "few"]) == []
    three = isoflop.common_budgets(points(early + late + few), ["early", "late", "few"])
    assert three == both
    assert isoflop.at_budgets(lawside.fit_arm(few, "few", list(LAWS), "exact"), list(LAWS), three) == []


def test_an_arm_without_a_law_in_a_domain_is_left_out() -> None:
    table = rows()
    laws = lawside.fit_arm(table, "early", list(LAWS), "exact")
    assert isoflop.at_budgets(laws, [*LAWS, "interleaved"], [BUDGETS[0]]) == []


def test_budgets_close_to_each_other_are_matched_with_the_nearest() -> None:
    """Spaced by 1.4, and a factor 0.8 apart between arms, a budget has two of the other arm within reach: 1.12 times
    as far up, and 0.8."""
    budgets = tuple(1e12 * 1.4**k for k in range(4))
    table = rows(budgets=budgets) + [{**r, "flops": r["flops"] * 0.8} for r in rows("late", budgets)]
    shared = isoflop.common_budgets(points(table), ["early", "late"])
    assert shared == pytest.approx(np.array(budgets[:3]) * 1.12**0.5, rel=0.02)
    for arm in ("early", "late"):
        laws = lawside.fit_arm(table, arm, list(LAWS), "exact")
        assert [b["c"] for b in isoflop.at_budgets(laws, list(LAWS), shared)] == shared


def test_the_figure_has_a_panel_for_each_budget_and_the_caption_its_numbers() -> None:
    table = rows() + rows("late")
    arms = ["early", "late", "few"]
    shared = isoflop.common_budgets(points(table), arms)
    laws = {arm: lawside.fit_arm(table, arm, list(LAWS), "exact") for arm in arms[:2]}
    found: dict[str, Any] = {arm: isoflop.at_budgets(law, list(LAWS), shared) for arm, law in laws.items()}
    found["late"][-1] |= {"lowest": None, "lowest_loss": None, "why": "the smallest"}
    a: dict[str, Any] = {"study": {"arms": arms, "domains": list(LAWS)}, "isoflop": found | {"few": []}}
    a["frontier"] = {"early": {"mean": {"c": [1e12, 1e13], "n": [5e4, 5e5]}}}
    for layout, columns in ((WIDE, 3), (NARROW, 1)):
        drawn = figures_isoflop.isoflops(a, layout)
        assert drawn is not None
        assert drawn.columns == columns
        assert len(drawn.panels) == 3
    caption = text.isoflops(a)
    lowest = found["early"][-1]
    assert (
        f"6.1·10¹² FLOPs: early {lowest['lowest_loss']:.3f} at N = {si(lowest['lowest'])} (its laws: 303K);" in caption
    )
    assert "late has none between its sizes." in caption
    assert "at one compute: few." in caption
    assert (
        figures_isoflop.isoflops(a | {"isoflop": found | {"late": []}}, WIDE) is None
    )  # one of three compares nothing
    alone = {"study": {"arms": ["early"], "domains": list(LAWS)}, "isoflop": {"early": found["early"]}}
    assert figures_isoflop.isoflops(alone, WIDE) is not None
