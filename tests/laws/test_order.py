"""The order of a table's rows changes nothing: digest, fit, seeded intervals, plan."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from isofusion.cli.columns import TableOptions
from isofusion.cli.plan import fitted
from isofusion.errors import InputError
from isofusion.laws.analysis import analyse, digest
from isofusion.laws.formanalysis import analyse_form
from isofusion.laws.table import Runs


def tables(simulate: Callable[..., Runs]) -> dict[str, Runs]:
    runs = simulate(np.random.default_rng(1), sizes=5, budgets=4)
    alone = Runs.of(runs.n, runs.d, runs.loss)
    some = [f"row {i}" if i % 3 else f"trunk {i // 9}" for i in range(len(runs))]
    return {"trunks": runs, "each its own trunk": alone, "some": Runs.of(runs.n, runs.d, runs.loss, group=some)}


@pytest.mark.parametrize("kind", ["trunks", "each its own trunk", "some"])
def test_a_shuffled_table_gives_the_same_bits(simulate: Callable[..., Runs], kind: str) -> None:
    runs = tables(simulate)[kind]
    order = np.random.default_rng(2).permutation(len(runs))
    shuffled = runs.select(order)
    if kind == "each its own trunk":  # as a reader numbers them
        shuffled = Runs.of(shuffled.n, shuffled.d, shuffled.loss)
    one, other = (analyse(r, [1e21], draws=40).to_dict() for r in (runs, shuffled))
    assert one == other
    assert len(one["digest"]) == 64
    changed = analyse(runs.with_loss(runs.loss * 1.0001), [1e21], draws=0)
    assert changed.digest != analyse(runs, [1e21], draws=0).digest


def test_another_law_with_a_column_of_its_own(simulate: Callable[..., Runs]) -> None:
    runs = tables(simulate)["trunks"]
    order = np.random.default_rng(2).permutation(len(runs))
    sparsity = np.resize([0.0, 0.5, 0.75], len(runs))
    one = analyse_form(runs, "sparsity", extra={"sparsity": sparsity}, draws=20)
    other = analyse_form(runs.select(order), "sparsity", extra={"sparsity": sparsity[order]}, draws=20)
    assert one.to_dict() == other.to_dict()
    assert one.digest == other.digest != digest(one.runs, one.options, {"sparsity": one.extra["sparsity"][::-1]})
    sparsity[7] = 1.5  # an error names the user's row, not the sorted one's
    with pytest.raises(InputError, match="row 7"):
        analyse_form(runs.select(order), "sparsity", extra={"sparsity": sparsity}, draws=0)


def test_a_plan_of_a_shuffled_file(simulate: Callable[..., Runs], tmp_path: Path) -> None:
    runs = tables(simulate)["trunks"]
    lines = [f"{float(n)},{float(d)},{float(loss)}\n" for n, d, loss in zip(runs.n, runs.d, runs.loss, strict=True)]
    found = []
    for rows in (lines, sorted(lines), lines[::-1]):
        (tmp_path / "runs.csv").write_text("n,d,loss\n" + "".join(rows))
        basis, _ = fitted(tmp_path / "runs.csv", TableOptions(), None, 40)
        found.append(np.concatenate([basis.surface.alpha, basis.draws.alpha, basis.draws.E]))
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])


def test_shared_trunks_that_are_called_rows_stay_shared(simulate: Callable[..., Runs]) -> None:
    runs = tables(simulate)["trunks"]
    named = dict(zip(np.unique(runs.group), [f"row {i}" for i in range(5)], strict=True))
    called = Runs.of(runs.n, runs.d, runs.loss, group=[named[g] for g in runs.group])
    found, order = called.canonical()
    assert found.group.tolist() == called.group[order].tolist()


@pytest.mark.parametrize("length", [5, 40])
def test_weights_of_another_length_are_refused(simulate: Callable[..., Runs], length: int) -> None:
    with pytest.raises(InputError, match="weights must be 20 finite numbers"):
        analyse_form(tables(simulate)["trunks"], "chinchilla", weights=np.ones(length), draws=0)
