"""Does the law predict runs it has not seen? Hold-outs against baselines that need no law.

Errors are relative, once to the loss and once to the *reducible* loss L - oracle: near the floor a law that is blind
looks good in plain loss (docs/world.md). Without an oracle the fitted E stands in and the result says so.
Baselines: the next smaller size's loss at equal D; k C^c through the training envelope; the nearest run in (log N,
log D). `accuracy` are the numbers of arXiv 2504.07951 Table 10. Growing N or C step by step: `isofusion.laws.rollout`.
Where seeds are repeated, `seeds_averaged` gives the same errors for the mean loss of a size's seeds at one D: run by
run, the luck of a seed counts as an error of the law and of every baseline, and draws all ratios to 1.
`study_report` gathers the numbers a study is judged by. Legend: h held-out rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from isofusion.errors import InputError
from isofusion.laws.bootstrap import bootstrap, estimate_noise
from isofusion.laws.fit import LawFit, fit_law
from isofusion.laws.frontier import envelope
from isofusion.laws.table import SAME, Array, Runs, cell_means, clusters


@dataclass(frozen=True)
class Accuracy:
    """Prediction error as arXiv 2504.07951 Table 10 prints it."""

    mse: float  # mean squared error of the loss, nats^2
    r2: float  # 1 - squared error over squared deviation from the observed mean; NaN for fewer than two losses
    mae_percent: float  # mean |predicted - observed| / observed, in per cent

    def to_dict(self) -> dict[str, float | None]:
        return {k: _plain(v) for k, v in self.__dict__.items()}


def accuracy(observed: Array, predicted: Array) -> Accuracy:
    """MSE, R2 and MAE % of predicted losses, over the rows with a prediction. NaN where there are none."""
    observed, predicted = np.asarray(observed, dtype=np.float64), np.asarray(predicted, dtype=np.float64)
    ok = np.isfinite(predicted)
    if not ok.any():
        return Accuracy(float("nan"), float("nan"), float("nan"))
    y, error = observed[ok], predicted[ok] - observed[ok]
    total = float(np.sum((y - y.mean()) ** 2))
    return Accuracy(
        float(np.mean(error**2)),
        1.0 - float(np.sum(error**2)) / total if total > 0 else float("nan"),
        100.0 * float(np.mean(np.abs(error) / y)),
    )


@dataclass(frozen=True)
class Beside:
    """A baseline and the law on the `runs` that it predicts: mean relative errors, NaN without any."""

    runs: int
    baseline: float
    law: float

    def cell(self, runs: int, percent: Callable[[float], str]) -> tuple[str, str]:
        """(The baseline's error, the law's on the same runs: "" where these are all the `runs` held out)."""
        if self.runs in (0, runs):
            return percent(self.baseline), ""
        return percent(self.baseline), f"law {percent(self.law)}, {self.runs} run{'s' * (self.runs > 1)}"

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> Beside:
        """From what `to_dict` made."""
        errors = (found[k] for k in ("mae_reducible", "law_mae_reducible"))
        return cls(found["runs"], *(float("nan") if e is None else e for e in errors))

    def to_dict(self) -> dict[str, float | int | None]:
        """Of errors in reducible loss."""
        return {"runs": self.runs, "mae_reducible": _plain(self.baseline), "law_mae_reducible": _plain(self.law)}


@dataclass(frozen=True)
class HoldOut:
    """Predictions for held-out runs, arrays [h], by the law and by each baseline (NaN where a baseline has none)."""

    what: str
    held: Runs
    fit: LawFit
    predicted: Array
    low: Array | None  # prediction interval (trunk and branch noise included)
    high: Array | None
    baselines: dict[str, Array]
    floor: Array  # what is subtracted for reducible loss
    floor_is_oracle: bool
    no_interval: str | None = None  # why low and high are None

    def error(self, predicted: Array, reducible: bool = True) -> float:
        """Mean absolute relative error, ignoring rows without a prediction; NaN if there are none."""
        ok = np.isfinite(predicted)
        scale = self.held.loss - self.floor if reducible else self.held.loss
        return float(np.mean(np.abs(predicted - self.held.loss)[ok] / scale[ok])) if ok.any() else float("nan")

    def beside(self, name: str, reducible: bool = True) -> Beside:
        """The law on the runs that a baseline predicts: what the baseline's own error is to be compared with."""
        ok = np.isfinite(self.baselines[name])
        both = (self.baselines[name], np.where(ok, self.predicted, np.nan))
        return Beside(int(ok.sum()), *(self.error(predicted, reducible) for predicted in both))

    def seeds_averaged(self) -> dict[str, float | int | None] | None:
        """Errors in reducible loss of the mean loss of each (N, D): the law's, carry-over's and the law's on the cells
        that carry-over predicts. None: nothing repeated."""
        size, at = clusters(self.held.n), clusters(self.held.d)
        baseline = self.baselines["carry_over"]
        *_, loss, floor, law, carry = cell_means(size, at, self.held.loss, self.floor, self.predicted, baseline)
        if len(loss) == len(self.held):
            return None
        own, other = (np.abs(predicted - loss) / (loss - floor) for predicted in (law, carry))
        both = np.isfinite(other)
        ratio = float(own[both].mean() / other[both].mean()) if both.any() and other[both].any() else None
        return {
            "cells": len(loss),
            "mae_reducible": _plain(float(own.mean())),  # None in a rollout without a floor
            "carry_over": float(other[both].mean()) if both.any() else None,
            "carried_cells": int(both.sum()),
            "law_on_carried": float(own[both].mean()) if both.any() else None,
            "ratio_to_carry_over": ratio,
        }

    @property
    def hit_rate(self) -> float | None:
        if self.low is None or self.high is None:
            return None
        return float(np.mean((self.low <= self.held.loss) & (self.held.loss <= self.high)))

    @property
    def accuracy(self) -> Accuracy:
        """MSE, R2 and MAE % on the held-out runs."""
        return accuracy(self.held.loss, self.predicted)

    def table(self) -> list[dict[str, Any]]:
        """Predicted against observed, one row per held-out run."""
        rows = []
        for i in range(len(self.held)):
            row: dict[str, Any] = {
                "size": str(self.held.size[i]),
                "n": float(self.held.n[i]),
                "d": float(self.held.d[i]),
                "c": float(self.held.c[i]),
                "observed": float(self.held.loss[i]),
                "predicted": float(self.predicted[i]),
                "low": None if self.low is None else float(self.low[i]),
                "high": None if self.high is None else float(self.high[i]),
            }
            for name, values in self.baselines.items():
                row[name] = float(values[i]) if np.isfinite(values[i]) else None
            rows.append(row)
        return rows

    def to_dict(self) -> dict[str, Any]:
        own = self.error(self.predicted)
        fair = self.beside("carry_over")
        return {
            "held_out": self.what,
            "runs": len(self.held),
            "reducible_floor": "oracle" if self.floor_is_oracle else "fitted E (no oracle known)",
            "mae_reducible": own,
            "mae_loss": self.error(self.predicted, reducible=False),
            "accuracy": self.accuracy.to_dict(),
            "baselines_reducible": {name: _plain(self.error(values)) for name, values in self.baselines.items()},
            "beside_baselines": {name: self.beside(name).to_dict() for name in self.baselines},
            "ratio_to_carry_over": _plain(fair.law / fair.baseline) if fair.baseline else None,
            "seeds_averaged": self.seeds_averaged(),
            "hit_rate": self.hit_rate,
            "level": None if self.low is None else 0.95,
            "no_interval": self.no_interval,
            "table": self.table(),
        }


def hold_out(
    runs: Runs,
    held: np.ndarray,
    *,
    what: str = "held-out runs",
    oracle: float | Array | None = None,
    draws: int = 400,
    seed: int = 0,
    **options: Any,
) -> HoldOut:
    """Fit on the runs outside `held` (bool[m]) and predict those inside. `options` go to fit_law; draws=0: no interval.

    Where the training runs cannot tell the luck of a trunk there is no interval either, and `no_interval` says so.
    Raises InputError if the training runs cannot identify the law.
    """
    held = np.asarray(held, dtype=bool)
    if not held.any() or held.all():
        raise InputError(
            f"{runs.label or 'runs'}: hold out some runs and keep some; {int(held.sum())} of {len(runs)} are held out"
        )
    train, test = runs.select(~held), runs.select(held)
    try:
        fit = fit_law(train, **options)
    except InputError as error:
        raise InputError(f"holding out {what}: {error}") from error
    low = high = None
    reason = None if draws else "no bootstrap draws asked for"
    if draws:
        noise = estimate_noise(fit)
        if noise.unknown:
            reason = f"interval not available: {noise.unknown} (trained on {train.n_sizes} sizes)"
        else:
            low, high = bootstrap(fit, draws, seed=seed, least=1).predictive(test.n, test.d, test.group)
    truth = runs.oracle_value(oracle)
    floor = np.full(len(test), fit.E) if truth is None else truth[held]
    if (floor >= test.loss).any():
        i = int(np.argmax(floor - test.loss))
        raise InputError(
            f"{runs.label or 'runs'}: loss {test.loss[i]:.6g} of size {test.size[i]} is at or below its floor "
            f"{floor[i]:.6g} ({'oracle entropy' if truth is not None else 'fitted E'}); "
            "reducible loss is not defined there"
        )
    baselines = {
        "carry_over": carry_over(train, test),
        "power_law": power_law(train, test),
        "nearest": nearest(train, test),
    }
    return HoldOut(what, test, fit, fit.predict(test.n, test.d), low, high, baselines, floor, truth is not None, reason)


def largest_size(runs: Runs) -> np.ndarray:
    """bool[m]: the runs of the largest model size."""
    cluster = clusters(runs.n)
    return cluster == cluster.max()


def carry_over(train: Runs, test: Runs) -> Array:
    """Loss of the next smaller training size at equal D (log-log interpolated, seeds averaged), or NaN."""
    out = np.full(len(test), np.nan)
    cluster = clusters(train.n)
    size, _, d, loss = cell_means(cluster, clusters(train.d), np.log(train.d), np.log(train.loss))
    means = np.bincount(cluster, train.n) / np.bincount(cluster)
    smaller = np.searchsorted(means, test.n / SAME) - 1  # the largest size clearly below each test run's, or -1
    at = np.log(test.d)
    for k in np.unique(smaller[smaller >= 0]):
        x, y = d[size == k], loss[size == k]
        rows = (smaller == k) & (at >= x[0] - np.log(1.05)) & (at <= x[-1] + np.log(1.05))
        out[rows] = np.exp(np.interp(at[rows], x, y))
    return out


def power_law(train: Runs, test: Runs) -> Array:
    """k C^c through the training envelope, at the test runs' compute; NaN if the envelope is too short to fit."""
    try:
        return envelope(train).predict(test.c)
    except InputError:
        return np.full(len(test), np.nan)


def nearest(train: Runs, test: Runs) -> Array:
    """Loss of the nearest training run in (log N, log D)."""
    gap = np.log(test.n[:, None] / train.n) ** 2 + np.log(test.d[:, None] / train.d) ** 2
    return train.loss[np.argmin(gap, axis=1)]


def leave_one_size_out(runs: Runs, *, oracle: float | Array | None = None, **options: Any) -> dict[str, Any]:
    """Mean absolute relative error in reducible loss, each size predicted from the others; full law, each term dropped.

    Ratios above 1 mean that the dropped term was needed. `seeds_averaged`: the same for the mean loss of each (N, D),
    None if no run is repeated. Raises InputError with fewer sizes than the law needs.
    """
    cluster = clusters(runs.n)
    truth = runs.oracle_value(oracle)
    floor = truth if truth is not None else np.full(len(runs), fit_law(runs, **options).E)
    if (floor >= runs.loss).any():
        raise InputError(
            f"{runs.label or 'runs'}: a loss is at or below its floor; reducible loss is not defined there"
        )
    forms: dict[str, dict[str, Any]] = {"full": {}, "without_n": {"n_term": False}, "without_d": {"d_term": False}}
    options = {"grid": 8, **options}  # 3 fits per size: a coarser grid of starts reaches the same ends
    out: dict[str, Any] = {"reducible_floor": "oracle" if truth is not None else "fitted E (no oracle known)"}
    averaged: dict[str, Any] = {}
    repeated = False
    for name, terms in forms.items():
        predicted = np.empty(len(runs))
        for k in range(int(cluster.max()) + 1):
            held = cluster == k
            predicted[held] = fit_law(runs.select(~held), **terms, **options).predict(runs.n[held], runs.d[held])
        error = np.abs(predicted - runs.loss) / (runs.loss - floor)
        out[name] = float(error.mean())
        *_, loss_k, floor_k, predicted_k = cell_means(cluster, clusters(runs.d), runs.loss, floor, predicted)
        averaged[name] = float(np.mean(np.abs(predicted_k - loss_k) / (loss_k - floor_k)))
        repeated = len(loss_k) < len(runs)
        if name == "full":
            out["by_size"] = {
                str(runs.size[cluster == k][0]): float(error[cluster == k].mean())
                for k in range(int(cluster.max()) + 1)
            }
    for errors, name in itertools.product((out, averaged), ("without_n", "without_d")):
        errors[f"ratio_{name}"] = errors[name] / errors["full"] if errors["full"] > 0 else None
    out["seeds_averaged"] = averaged if repeated else None
    return out


def study_report(
    runs: Runs,
    oracle: float | Array | None = None,
    *,
    draws: int = 1000,
    seed: int = 0,
    fixed_e: bool = True,
    **options: Any,
) -> dict[str, Any]:
    """The numbers a study is judged by, for one arm and domain, ready for JSON.

    Keys: law, bootstrap, hold_out (largest size), leave_one_size_out, spread (residual, seed, ratio), irreducible
    (fitted, oracle, bias, interval, covers), fixed_e (the same hold-out tests with E = oracle; null without oracle).
    A part that these runs cannot support is {"refused": reason}. Raises InputError if the law itself is unidentified.
    """
    truth = runs.oracle_value(oracle)
    level = None if truth is None else float(truth.mean())
    fit = fit_law(runs, **options)
    intervals = bootstrap(fit, draws, seed=seed)
    noise = intervals.noise
    seed_spread = noise.seed
    refused = intervals.refusal("E")
    span = None if refused else intervals.interval("E")
    irreducible: dict[str, Any] = {
        "fitted": fit.E,
        "interval": list(span) if span else None,
        "refused": refused,
        "oracle": level,
    }
    if level is not None:
        irreducible |= {
            "bias": fit.E - level,
            "relative_bias": (fit.E - level) / level if level else None,
            "covers": bool(span[0] <= level <= span[1]) if span else None,
        }
    report: dict[str, Any] = {
        "label": runs.label,
        "law": fit.to_dict(),
        "bootstrap": intervals.to_dict(),
        "share_at_bound": intervals.share_at_bound,
        **_tests(runs, oracle, min(draws, 400), seed, options),
        "spread": {
            "residual": fit.residual_spread,
            "seed": seed_spread,
            "seed_freedom": noise.seed_freedom,
            "ratio": fit.residual_spread / seed_spread if seed_spread else None,
        },
        "irreducible": irreducible,
        "fixed_e": None,
    }
    if fixed_e and level is not None and "fixed_e" not in options:
        try:
            pinned = fit_law(runs, fixed_e=level, **options)
            pinned_intervals = bootstrap(pinned, draws, seed=seed)
            report["fixed_e"] = {
                "law": pinned.to_dict(),
                "bootstrap": pinned_intervals.to_dict(),
                "share_at_bound": pinned_intervals.share_at_bound,
                "residual_over_seed": pinned.residual_spread / seed_spread if seed_spread else None,
                **_tests(runs, oracle, min(draws, 400), seed, {**options, "fixed_e": level}),
            }
        except InputError as error:
            report["fixed_e"] = {"refused": str(error)}
    return report


def _tests(runs: Runs, oracle: float | Array | None, draws: int, seed: int, options: dict[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    try:
        held = largest_size(runs)
        what = f"largest size ({runs.size[held][0]}, N = {runs.n[held].mean():.3g})"
        out["hold_out"] = hold_out(runs, held, what=what, oracle=oracle, draws=draws, seed=seed, **options).to_dict()
    except InputError as error:
        out["hold_out"] = {"refused": str(error)}
    try:
        out["leave_one_size_out"] = leave_one_size_out(runs, oracle=oracle, **options)
    except InputError as error:
        out["leave_one_size_out"] = {"refused": str(error)}
    return out


def _plain(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
