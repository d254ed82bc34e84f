"""Speed of the arms, from the run folders alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from isofusion.report.speed import at_equal_flops, own_part, speeds


def write(out: Path, run: str, **fields: Any) -> None:
    (out / "runs" / run).mkdir(parents=True)
    (out / "runs" / run / "flops.json").write_text(json.dumps(fields))


def test_a_trunk_counts_once_and_ratios_are_at_equal_flops(tmp_path: Path) -> None:
    more = {"input_wait_s": 1.0, "peak_memory": 5e6, "peak_flops_measured": 1e9, "peak_flops_datasheet": None}
    write(tmp_path, "e-trunk", own_tokens=800, tokens=800, flops={"total": 8e9}, own_flops=8e9, wall_s=8.0, **more)
    smaller = more | {"peak_memory": 4e6}
    write(tmp_path, "e-d1", own_tokens=100, tokens=500, flops={"total": 5e9}, own_flops=1e9, wall_s=1.0, **smaller)
    write(tmp_path, "e-d2", own_tokens=200, tokens=1000, flops={"total": 1e10}, own_flops=3e9, wall_s=1.0, **more)
    write(tmp_path, "l-d1", own_tokens=500, tokens=500, flops=4e9, wall_s=8.0)  # older: no own FLOPs, no memory
    rows = [
        {"run": "e-d1", "arm": "early", "parent": "e-trunk", "n": 100},
        {"run": "e-d2", "arm": "early", "parent": "e-trunk", "n": 100},
        {"run": "l-d1", "arm": "late", "parent": "lost", "n": 102},
    ]
    early, late = speeds(tmp_path, rows, {100.0: "s", 102.0: "s"})
    assert early["tokens_per_s"] == pytest.approx(1100 / 10)
    assert early["flops_per_s"] == pytest.approx(12e9 / 10)
    assert (early["mfu_measured"], early["mfu_datasheet"]) == (pytest.approx(1.2), None)
    assert early["input_wait"] == pytest.approx(0.3)
    assert late["flops_per_s"] == pytest.approx(0.5e9)
    assert late["peak_memory"] is late["input_wait"] is None
    (pair,) = at_equal_flops([early, late], [("early", "late"), ("late-moe", "late")])
    assert pair["time_ratio"] == pytest.approx(0.5 / 1.2)
    assert pair["memory_difference"] is None
    assert early["peak_memory"] == 5e6  # the largest of its runs
    (pair,) = at_equal_flops([early, late | {"peak_memory": 7e6}], [("early", "late")])
    assert pair["memory_difference"] == -2e6


def test_without_a_time_there_is_no_speed() -> None:
    assert own_part({"own_tokens": 5, "tokens": 5, "flops": 1.0}) is None


def test_the_page_says_it_in_numbers(planted: Any) -> None:
    from isofusion.report.analysis import analyse
    from isofusion.report.text import speed

    out, rows = planted
    a = analyse(out, rows)
    ratios = [p["time_ratio"] for p in a["speed"]["pairs"] if p["label"] == "early / late"]
    assert ratios == pytest.approx([0.8 * 1.02] * 4)
    caption = speed(a)
    assert "2 runs at a time, 1 thread each" in caption
    assert "At equal FLOPs early / late takes 0.82 to 0.82 times as long." in caption
