"""The answers of the literature's own data sets (fitdata/README.md), to the digits they are known to.

The data is not part of the project; without it these tests skip.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from isofusion.laws.fit import evaluate, fit_form, fit_law
from isofusion.laws.forms import FORMS, Params
from isofusion.laws.solve.criterion import Criterion
from isofusion.laws.table import Array, Runs

DATA = Path(os.environ.get("ISOFUSION_FITDATA", Path(__file__).parents[2] / "../shared/fitdata"))
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="the reference data is not beside this checkout")


def rows_of(path: str) -> list[dict[str, str]]:
    with (DATA / path).open(newline="", encoding="utf-8-sig") as handle:
        return list(csv.DictReader(handle))


def column(rows: list[dict[str, str]], name: str) -> Array:
    return np.array([float(row[name]) for row in rows])


def chinchilla_points() -> Runs:
    rows = rows_of("epoch_chinchilla/svg_extracted_data.csv")
    n, c = column(rows, "Model Size"), column(rows, "Training FLOP")
    return Runs.of(n, c / (6 * n), column(rows, "loss"), label="epoch")


def kyo_takano() -> Runs:
    rows = rows_of("kyo_takano/df.csv")
    return Runs.of(column(rows, "N"), column(rows, "D"), column(rows, "loss"), label="kyo-takano")


def open_athena(clean: bool) -> Iterator[Runs]:
    rows = rows_of("open_athena_isoflops/isoflops_with_outlier_flags.csv")
    for name in sorted({row["experiment"] for row in rows}):
        some = [row for row in rows if row["experiment"] == name and not (clean and row["outlier"] == "True")]
        yield Runs.of(column(some, "params"), column(some, "tokens"), column(some, "loss"), label=name)


def ladder() -> Iterator[tuple[Runs, dict[str, str]]]:
    """Each metric's training points and the 13B model that was held out."""
    rows = rows_of("olmo_ladder/step1_points.csv")
    for name in sorted({row["metric"] for row in rows}):
        train = [row for row in rows if row["metric"] == name and row["mode"] == "train"]
        held = next(row for row in rows if row["metric"] == name and row["run"] == "13B-5T")
        yield Runs.of(column(train, "N"), column(train, "D"), column(train, "value"), label=name), held


def _positive(cell: str) -> bool:
    try:
        return float(cell.replace(",", "")) > 0
    except ValueError:
        return False


def every_table() -> list[Runs]:
    epoch = chinchilla_points()
    out = [epoch, without_outliers(epoch), kyo_takano(), *open_athena(False), *open_athena(True)]
    for name in ("all_runs", "fit182_outliers_removed"):
        rows = rows_of(f"datablations/{name}.csv")
        out.append(Runs.of(column(rows, "N"), column(rows, "D"), column(rows, "loss"), label=name))
    rows = rows_of("misfitting/scaling_results_last_ckpt_only.csv")
    out.append(Runs.of(column(rows, "N"), column(rows, "D"), column(rows, "loss"), label="misfitting"))
    rows = rows_of("misfitting/dense.csv")  # a spreadsheet with headings and empty lines between the runs
    names = ("N", "D", "C4 Eval Loss")
    rows = [{k: row[k].replace(",", "") for k in names} for row in rows if all(_positive(row[k]) for k in names)]
    out.append(Runs.of(*(column(rows, k) for k in names), label="misfitting dense"))
    return out + [runs for runs, _ in ladder()]


def without_outliers(runs: Runs) -> Runs:
    return runs.select(np.sort(np.argsort(runs.loss)[:-5]))


def test_nearly_every_start_ends_in_the_best_basin_on_every_table() -> None:
    tables = every_table()
    assert len(tables) == 32
    shares = {f"{runs.label} ({len(runs)})": fit_law(runs, grid=16).share for runs in tables}
    assert {k: v for k, v in shares.items() if v < 0.95} == {}


def test_epoch_optimum_delta_sweep_and_all_points() -> None:
    whole = chinchilla_points()
    runs = without_outliers(whole)
    known = {  # delta: objective, A, B, E, alpha, beta
        1e-3: (0.0010182740178006, 477.82587, 2143.41736, 1.8172181, 0.3473105, 0.3671724),
        1e-4: (1.117787481640e-4, 478.689, 2065.413, 1.815824, 0.347409, 0.365385),
        1e-2: (4.696224882616e-3, 538.752, 2905.600, 1.838079, 0.354416, 0.381538),
        1e-1: (5.730943495849e-3, 593.322, 4875.638, 1.864550, 0.360253, 0.405883),
        1.0: (5.730943495849e-3, 593.322, 4875.638, 1.864550, 0.360253, 0.405883),
    }
    for delta, (objective, *params) in known.items():
        fit = fit_law(runs, delta=delta)
        assert fit.objective == pytest.approx(objective, rel=1e-11)
        assert (fit.A, fit.B, fit.E, fit.alpha, fit.beta) == pytest.approx(params, rel=2e-6)
    fit = fit_law(whole)
    assert fit.objective == pytest.approx(1.826010523069e-3, rel=1e-11)
    assert (fit.A, fit.B, fit.E, fit.alpha, fit.beta) == pytest.approx(
        (495.726, 12845.61, 1.891339, 0.349313, 0.453049), rel=2e-6
    )


def test_epoch_never_above_a_published_objective() -> None:
    runs = without_outliers(chinchilla_points())
    ours = fit_law(runs).objective
    assert ours <= 0.0010182740346  # as the notebook printed it
    published = Params.of(1.816864, 482.0053, 0.347813, 2085.432, 0.365854)
    assert evaluate(runs, published) == pytest.approx(0.00101864471, rel=2e-6)
    assert ours < evaluate(runs, published)


def test_epoch_l1_limit_is_what_was_published() -> None:
    """Besiroglu et al.'s point: the exact corner is 1e-8 below the sum |r| measured for it, and 2e-6 away in A, B."""
    runs = without_outliers(chinchilla_points())
    fit = fit_form(runs, "chinchilla", objective="l1")
    assert fit.objective <= 1.1294946640
    assert fit.objective == pytest.approx(1.1294946640, rel=2e-8)
    assert [fit.params[k] for k in ("A", "B", "E", "alpha", "beta")] == pytest.approx(
        [482.0053, 2085.432, 1.816864, 0.347813, 0.365854], rel=3e-6
    )
    assert (np.abs(fit.residuals) < 1e-12).sum() == 5  # a corner: five points fitted exactly
    assert not [w for w in fit.warnings if w.code == "not-converged"]


def test_epoch_plain_least_squares() -> None:
    fit = fit_form(without_outliers(chinchilla_points()), "chinchilla", objective="squares")
    assert 2 * fit.objective == pytest.approx(0.0832038, rel=1e-6)
    assert [fit.params[k] for k in ("E", "A", "B", "alpha", "beta")] == pytest.approx(
        [1.88281, 567.805, 7581.852, 0.357615, 0.427620], rel=3e-6
    )


def test_kyo_takano_both_objectives() -> None:
    runs = kyo_takano()
    fit = fit_law(runs)
    assert fit.objective == pytest.approx(8.400931199574e-4, rel=1e-11)
    assert (fit.A, fit.B, fit.E, fit.alpha, fit.beta) == pytest.approx(
        (442.164, 1271.808, 1.783894, 0.342626, 0.342002), rel=2e-6
    )
    x = {"n": runs.n, "d": runs.d}
    printed = {"E": 1.70024083, "A": 184.691517, "B": 1633.478664, "alpha": 0.289007648, "beta": 0.355794066}
    measure = Criterion("asymmetric", w=10.0)
    law = FORMS["chinchilla"]
    theirs = measure.value(np.log(law.predict(printed, x)), np.log(runs.loss)).mean()
    assert theirs == pytest.approx(0.0227819003, rel=1e-8)  # the package's own mean at its own point
    asymmetric = fit_form(runs, "chinchilla", objective="asymmetric", w=10.0)
    assert asymmetric.objective / len(runs) < theirs
    assert asymmetric.params == pytest.approx(printed, rel=1e-4)


def test_open_athena_llama_3_surface() -> None:
    runs = next(r for r in open_athena(False) if r.label == "llama_3__raw_loss")
    fit = fit_form(runs, "chinchilla", objective="squares")
    assert [round(fit.params[k], 4) for k in ("E", "alpha", "beta")] == [0.6047, 0.31, 0.3136]
    assert [round(fit.params[k], 1) for k in ("A", "B")] == [59.1, 155.1]


def test_datablations_published_point_a_lower_one_and_the_flat_profile() -> None:
    rows = rows_of("datablations/fit182_outliers_removed.csv")
    x = {"n": column(rows, "N"), "d": column(rows, "D"), "unique": column(rows, "U"), "loss": column(rows, "loss")}
    law = FORMS["data-constrained"]
    gap = np.log(law.predict(law.published, x)) - np.log(x["loss"])
    published = float(np.sum(Criterion("huber").value(gap, np.zeros(len(gap)))))
    assert published == pytest.approx(0.0158259353, abs=1e-9)
    base = {k: law.published[k] for k in ("E", "A", "alpha", "B", "beta")}
    fit = fit_form(x, law, fixed=base)
    assert fit.objective == pytest.approx(0.0158046625, abs=1e-9)
    assert fit.objective < published
    assert (fit.params["R_D"], fit.params["R_N"]) == pytest.approx((95.365, 1.7059), rel=1e-4)
    assert [w for w in fit.warnings if w.code == "flat" and w.message.startswith("R_D")]
    profile = [fit_form(x, law, fixed={**base, "R_D": v}, starts=32).objective for v in (12.0, 40.0, 200.0)]
    assert max(profile) < fit.objective * 1.004


def test_olmo_ladder() -> None:
    known = {  # relative error of the prediction for 13B-5T
        "c4_ce": -0.038,
        "mmlu_avg_test_5shot_bpb": 0.002,
        "hellaswag_val_5shot_bpb": -0.012,
        "arc_challenge_test_5shot_bpb": 0.094,
        "arc_easy_test_5shot_bpb": 0.160,
        "piqa_val_5shot_bpb": -0.027,
        "csqa_val_5shot_bpb": -0.185,
        "socialiqa_val_5shot_bpb": 0.036,
        "openbookqa_test_5shot_bpb": 0.009,
    }
    seen = {}
    for runs, held in ladder():
        fit = fit_law(runs)
        predicted = float(fit.predict(float(held["N"]), float(held["D"])))
        seen[runs.label] = predicted / float(held["value"]) - 1.0
        if runs.label == "c4_ce":
            assert [round(v, 3) for v in (fit.alpha, fit.beta, fit.E)] == [0.104, 0.162, 0.934]
    assert {k: round(v, 3) for k, v in seen.items()} == known


@pytest.mark.slow
def test_the_papers_own_grid_and_l_bfgs() -> None:
    """As published: the lowest of 1,764 ends is the optimum to 1e-9, and most of the ends stop short of it."""
    runs = without_outliers(chinchilla_points())
    fit = fit_law(runs, starts="paper")
    assert fit.starts == 1764
    assert fit.objective == pytest.approx(0.0010182740178006, rel=1e-6)
    assert fit.objective > fit_law(runs).objective
    assert fit.share < 0.3
    assert pytest.approx((477.826, 2143.417), rel=1e-3) == (fit.A, fit.B)
