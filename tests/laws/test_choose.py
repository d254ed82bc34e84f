"""Rows of several arms in one table: pooled only with a word about it, chosen with --where and --arm."""

from __future__ import annotations

import io
import itertools
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isofusion.errors import InputError
from isofusion.laws.tables.choose import pooled
from isofusion.laws.tables.readers import read_runs

PAIRS = list(itertools.product((1e8, 2e8, 4e8), (1e9, 4e9)))
ARMS = ("early", "late")
TABLE: dict[str, list[Any]] = {
    "n": [n for _ in ARMS for n, _ in PAIRS],
    "d": [d for _ in ARMS for _, d in PAIRS],
    "loss": [2.0 + 0.1 * k + n**-0.1 + d**-0.1 for k in range(2) for n, d in PAIRS],
    "architecture": [arm for arm in ARMS for _ in PAIRS],
    "seed": [0.0, 1.0] * 6,
}


def test_arms_that_are_pooled_are_told_with_the_options_that_choose() -> None:
    runs, notes = read_runs(TABLE)
    assert len(runs) == 12
    assert notes == [
        "rows that may follow different laws are fitted together as one: 'architecture': early (6), late (6); choose "
        "with --where architecture=VALUE or --arm VALUE"
    ]
    two = TABLE | {"dataset": ["c4", "pile"] * 6}
    (told,) = read_runs(two)[1]
    assert "'architecture': early (6), late (6); 'dataset': c4 (6), pile (6)" in told
    assert told.endswith("choose with --where architecture=VALUE")  # --arm could mean either column


def test_columns_that_name_sizes_runs_or_one_arm_are_no_arms() -> None:
    sizes = TABLE | {"architecture": ["early"] * 12, "model": [f"m{n:g}" for n in TABLE["n"]]}
    assert read_runs(sizes)[1] == []
    few = TABLE | {"architecture": ["early"] * 9 + ["late"] * 3}
    assert read_runs(few)[1] == []
    assert read_runs(TABLE, columns={"group": "architecture"})[1] == []


def test_a_column_of_ever_new_names_costs_no_square_of_the_rows() -> None:
    rows = 20_000
    started = time.process_time()
    assert pooled({"experiment": [f"experiment {i}" for i in range(rows)]}, np.geomspace(1e7, 1e9, rows)) is None
    assert time.process_time() - started < 1.0


def test_rows_are_chosen_by_column_and_value() -> None:
    for options in (
        {"where": ["architecture=late"]},
        {"where": "architecture=late"},
        {"where": {"architecture": "late"}},
        {"arm": "late"},
    ):
        runs, notes = read_runs(TABLE, **options)
        assert runs.loss.tolist() == TABLE["loss"][6:]
        assert notes == ["--where architecture=late: 6 of 12 rows"]
    both, notes = read_runs(TABLE, where=["architecture=late", "seed=1"])
    assert (len(both), notes) == (3, ["--where architecture=late, --where seed=1: 3 of 12 rows"])
    either, notes = read_runs(TABLE, where=["architecture=late", "architecture=early"])
    assert len(either) == 12
    assert any("fitted together" in note for note in notes)
    text = io.StringIO("n,d,loss,lr=max\n1e8,1e9,3,a\n2e8,1e9,2.9,b\n")
    assert read_runs(text, where=["lr=max=b"])[0].n.tolist() == [2e8]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"where": ["architecture"]}, "--where architecture: write COLUMN=VALUE"),
        ({"where": ["arch=late"]}, r"no column 'arch' \(for --where\). Columns: n, d, loss, architecture, seed"),
        ({"where": ["architecture=moe"]}, r"no row has architecture=moe; 'architecture' holds early \(6\), late \(6\)"),
        ({"where": ["architecture=late", "seed=2"]}, "no row has architecture=late, seed=2"),
        ({"arm": "moe"}, "no row has architecture=moe"),
        ({"domain": "text"}, "choose from a study's"),
    ],
)
def test_a_choice_that_fits_no_row_says_what_there_is(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        read_runs(TABLE, **options)


def test_arm_is_refused_where_two_columns_could_name_it() -> None:
    with pytest.raises(InputError, match="'architecture', 'dataset' could each name the arm; choose with --where"):
        read_runs(TABLE | {"dataset": ["c4", "pile"] * 6}, arm="late")
    arm = TABLE | {"arm": ["a", "b"] * 6}
    assert len(read_runs(arm, arm="a")[0]) == 6
    with pytest.raises(InputError, match="--arm choose from a study's"):
        read_runs({k: TABLE[k] for k in ("n", "d", "loss")}, arm="late")


def test_rows_of_other_arms_may_be_bad() -> None:
    text = "n,d,loss,arm\n1e8,1e9,3,a\n2e8,1e9,nan,b\n2e8,2e9,2.9,a\n"
    assert read_runs(io.StringIO(text), arm="a")[0].loss.tolist() == [3.0, 2.9]
    with pytest.raises(InputError, match="line 3"):
        read_runs(io.StringIO(text))


def test_training_curves_of_several_arms() -> None:
    curves = {
        "run": [f"{arm}-{i}" for arm in ARMS for i in range(6) for _ in range(2)],
        "_step": [1, 2] * 12,
        "config.arm": [arm for arm in ARMS for _ in range(12)],
    } | {k: [v for v in TABLE[k] for _ in range(2)] for k in ("n", "d", "loss")}
    runs, notes = read_runs(curves, final="last")
    assert len(runs) == 12
    assert any("'config.arm': early (6), late (6)" in note for note in notes)
    runs, notes = read_runs(curves, final="last", where=["config.arm=early"])
    assert len(runs) == 6
    assert not any("fitted together" in note for note in notes)


def test_published_tables_of_many_experiments(fitdata: Path) -> None:
    path = fitdata / "open_athena_isoflops/extract/isoflops.csv"
    _, notes = read_runs(path, drop_bad=True)
    assert any("'model': llama_3 (266)" in note and "'dataset'" in note for note in notes)
    runs, notes = read_runs(path, where=["dataset=comma"], drop_bad=True)
    assert len(runs) == 85
    assert not any("fitted together" in note for note in notes)
    _, notes = read_runs(fitdata / "misfitting/scaling_results_last_ckpt_only.csv", drop_bad=True)
    assert not any("fitted together" in note for note in notes)  # its column `model` names sizes
