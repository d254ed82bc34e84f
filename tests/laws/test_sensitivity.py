"""What one choice or another does to the answer, on data where that is known."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from isofusion.errors import InputError
from isofusion.laws.alternatives import fit_alternative
from isofusion.laws.cost import Cost
from isofusion.laws.fit import fit_law
from isofusion.laws.forms import Params
from isofusion.laws.frontier import closed_form
from isofusion.laws.sensitivity import Choice, Sensitivity, sensitivity
from isofusion.laws.table import Runs

GOPHER = 5.76e23  # FLOPs: Hoffmann et al.'s example


def row(found: Sensitivity, group: str, change: str = "") -> Choice:
    return next(r for r in found.rows if r.group == group and change in r.change)


def test_five_outliers_move_tokens_per_parameter_on_epochs_points(epoch: Runs) -> None:
    """The known answers for 245 points, 240 points and least squares, and the verdict nobody prints."""
    found = sensitivity(epoch, GOPHER)
    assert found.rows[0].tokens_per_parameter == pytest.approx(6.8, abs=0.05)
    assert row(found, "outliers", "highest losses").tokens_per_parameter == pytest.approx(17.921, rel=1e-3)
    assert row(found, "outliers", "largest residuals").tokens_per_parameter > 17
    assert found.undetermined
    assert found.sentence.startswith("undetermined: at 5.76e+23 FLOPs")
    assert found.spread > 2
    assert found.sentence in str(found)
    assert len([r for r in found.rows if r.group == "size left out"]) == epoch.n_sizes
    assert str(found).count("size left out") == 2  # only the extremes are printed
    assert len([r for r in found.rows if r.group == "law"]) >= 4
    json.dumps(found.to_dict(), allow_nan=False)


def test_deltas_on_epochs_240_points(epoch240: Runs) -> None:
    found = sensitivity(epoch240, GOPHER)
    ratio = {r.change.split()[0]: r.tokens_per_parameter for r in found.rows if r.group == "delta"}
    assert ratio["0.0001"] == pytest.approx(18.3, abs=0.05)
    assert ratio["10"] == pytest.approx(14.3, abs=0.05)
    assert row(found, "delta", "10").alpha == pytest.approx(0.360253, abs=1e-5)
    assert not found.undetermined
    assert "within 1." in found.sentence


def test_noiseless_runs_of_the_law_are_insensitive(simulate: Callable[..., Runs], truth: Params) -> None:
    runs = simulate(np.random.default_rng(0), trunk=1e-5, branch=1e-5)
    found = sensitivity(runs, 1e21)
    want = float(closed_form(truth, np.array(1e21))[0])
    for r in found.rows:
        if r.group in ("default", "delta", "outliers", "size left out"):
            assert r.n == pytest.approx(want, rel=0.03), r
    assert row(found, "law", "E = 1.9 (the oracle").n == pytest.approx(want, rel=0.01)
    for change in ("alpha = beta", "(none)"):  # a wrong law on runs this clean is seen to be wrong
        assert row(found, "law", change).note == "ruled out by the runs"
        assert not row(found, "law", change).counts
    assert row(found, "law", "p-norm").n == pytest.approx(want, rel=0.1)


def test_few_noisy_runs_are_undetermined(simulate: Callable[..., Runs]) -> None:
    runs = simulate(np.random.default_rng(3), sizes=4, budgets=3, seeds=(1,) * 4, trunk=0.02, branch=0.01)
    found = sensitivity(runs, 1e23)
    assert found.undetermined
    assert "over choices that these runs do not decide" in found.sentence


def test_counting_rows_only_where_the_table_has_both(simulate: Callable[..., Runs]) -> None:
    runs = simulate(np.random.default_rng(0), trunk=1e-5, branch=1e-5)
    assert not [r for r in sensitivity(runs, 1e21).rows if r.group == "counting"]
    embeddings = 50_000 * np.sqrt(runs.n / 300)
    exact = replace(runs, c=6 * (runs.n + 3 * embeddings) * runs.d, compute="exact")
    found = sensitivity(exact, 1e21, other_n=runs.n - embeddings)
    six = row(found, "counting", "C = 6 N D")
    assert six.tokens_per_parameter > 1.1 * found.rows[0].tokens_per_parameter  # 6ND hides what small models pay
    other = row(found, "counting", "without embeddings")
    assert other.n == pytest.approx(found.rows[0].n, rel=0.25)  # translated back to the table's own count
    assert other.alpha < found.rows[0].alpha
    wrong = row(sensitivity(exact, 1e21, other_n=-runs.n), "counting", "without")
    assert "positive" in wrong.note
    assert np.isnan(wrong.n)


def test_without_a_size_that_the_law_needs(simulate: Callable[..., Runs]) -> None:
    runs = simulate(np.random.default_rng(0), sizes=3, seeds=(1,) * 3)
    found = sensitivity(runs)
    assert found.compute == pytest.approx(10 * runs.c.max())
    assert {r.note for r in found.rows if r.group == "size left out"} == {"the rest cannot identify the law"}
    assert "frontier" in row(found, "law", "frontier").change
    assert row(found, "law", "isoFLOP").note  # no equal budgets here


def test_a_fixed_floor_is_compared_with_a_free_one(simulate: Callable[..., Runs]) -> None:
    runs = simulate(np.random.default_rng(0), trunk=1e-5, branch=1e-5)
    found = sensitivity(runs, 1e21, fit=fit_law(runs, fixed_e=1.904))
    assert row(found, "law", "E free").n == pytest.approx(found.rows[0].n, rel=0.02)
    assert "E free (fitted 1.9" in str(found)
    assert len([r for r in found.rows if r.change.startswith("E = ")]) == 3  # the floor that is held is not repeated


def test_refusals(simulate: Callable[..., Runs]) -> None:
    runs = simulate(np.random.default_rng(0))
    with pytest.raises(InputError, match="positive FLOPs"):
        sensitivity(runs, -1.0)
    with pytest.raises(InputError, match="no compute-optimal"):
        sensitivity(runs, 1e21, fit=fit_law(runs, d_term=False))


def test_neighbours_contain_the_additive_law(simulate: Callable[..., Runs], truth: Params) -> None:
    """p = 1 is the additive law, so the p-norm never fits worse; and a planted tie and a planted p are found."""
    runs = simulate(np.random.default_rng(1))
    fit = fit_law(runs)
    assert fit_alternative(fit, "p-norm").objective <= fit.objective * (1 + 1e-6)
    assert fit_alternative(fit, "tied").objective >= fit.objective
    tied = Params.of(1.9, 300.0, 0.31, 900.0, 0.31)
    found = fit_alternative(fit_law(runs.with_loss(tied.predict(runs.n, runs.d))), "tied")
    assert (found.alpha, found.E) == (pytest.approx(0.31, abs=2e-4), pytest.approx(1.9, abs=2e-3))
    p, t_a, t_b = 2.0, 260.0 * runs.n**-0.301, 1850.0 * runs.d**-0.335
    bent = runs.with_loss(1.9 + (t_a**p + t_b**p) ** (1 / p))
    found = fit_alternative(fit_law(bent), "p-norm")
    assert found.p == pytest.approx(2.0, abs=0.1)
    np.testing.assert_allclose(found.predict(runs.n, runs.d), bent.loss, rtol=2e-4)
    n, d, loss = found.optimum(Cost.six_nd(), np.array([1e20]), bent)
    grid = np.geomspace(n[0] / 10, n[0] * 10, 4001)
    assert loss[0] == pytest.approx(float(found.predict(grid, 1e20 / 6 / grid).min()), rel=1e-7)
    assert 6 * n[0] * d[0] == pytest.approx(1e20)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("smallest", [0.0, 1e-300, 2e-9])
def test_an_optimum_that_is_no_size_breaks_neither_sentence_nor_json(
    smallest: float, simulate: Callable[..., Runs]
) -> None:
    found = sensitivity(simulate(np.random.default_rng(0)), 1e21)
    odd = replace(found.rows[1], n=smallest, tokens_per_parameter=float("inf"))
    high = replace(found.rows[2], n=1e12 if smallest else found.rows[2].n)
    strange = Sensitivity(found.compute, (found.rows[0], odd, high))
    said = json.loads(json.dumps(strange.to_dict(), allow_nan=False))
    assert "inf" not in strange.sentence
    assert not [word for word in strange.sentence.split() if len(word) > 20]
    if smallest:
        assert "over 1000x" in strange.sentence
        assert "no finite number of tokens per parameter" in strange.sentence
        assert said["undetermined"]
    if smallest == 1e-300:
        assert said["spread"] is None


def test_a_best_size_of_zero_is_no_numpy_warning() -> None:
    """Losses that rise with N and D: with E = 0 the best size is too small for a number."""
    n, d = np.repeat([1e8, 2e8, 3e8, 4e8], 3), np.tile([1e9, 2e9, 3e9], 4)
    found = sensitivity(Runs.of(n, d, 3.0 + n / 1e9 + d / 1e11), 7.2e19)
    zero = next(row for row in found.rows if row.change == "E = 0 (none)")
    assert (zero.n, np.isnan(zero.a)) == (0.0, True)
