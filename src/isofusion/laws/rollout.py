"""Rollout: would the law have predicted each next step of the ladder from everything below it?

Growing N: train on all smaller sizes, predict the next. Growing C: train on all runs with less compute, predict the
next factor of compute. One hold-out at the top of a ladder is one number, and lucky or not; a rollout is several, and
shows whether the law earns its keep as runs come in. Errors, baselines and intervals are those of
`isofusion.laws.holdout`. Legend: h held-out rows of all steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from isofusion.errors import InputError
from isofusion.laws.fit import LawFit, fit_law
from isofusion.laws.holdout import Accuracy, Beside, HoldOut, accuracy, hold_out
from isofusion.laws.table import SAME, Array, Runs, clusters
from isofusion.laws.warn import percent

STEPS = 6
BAND = 2.0  # compute that one step of a rollout over C spans
BASELINES = {"carry_over": "carry over", "power_law": "k C^c", "nearest": "nearest run"}  # and how they are printed


@dataclass(frozen=True)
class Rollout:
    """Every step that could be predicted, and those that could not with the reason."""

    by: Literal["n", "c"]
    steps: tuple[HoldOut, ...]
    refused: tuple[tuple[str, str], ...]
    floor: str  # what is subtracted for reducible loss

    def pooled(self, name: str | None = None) -> Array:
        """Predictions of the law (None) or of a baseline over all steps, [h]."""
        return np.concatenate([s.predicted if name is None else s.baselines[name] for s in self.steps])

    @property
    def observed(self) -> Array:
        """Held-out losses over all steps, [h]."""
        return np.concatenate([s.held.loss for s in self.steps])

    def errors(self, name: str | None = None, reducible: bool = True) -> Array:
        """|predicted - observed| relative to (reducible) loss per held-out run, [h]; NaN without a prediction."""
        floor = np.concatenate([s.floor for s in self.steps]) if reducible else 0.0
        return np.abs(self.pooled(name) - self.observed) / (self.observed - floor)

    def error(self, name: str | None = None, reducible: bool = True) -> float:
        """Mean of `errors`, over the runs with a prediction; NaN if there are none."""
        e = self.errors(name, reducible)
        return float(np.mean(e[np.isfinite(e)])) if np.isfinite(e).any() else float("nan")

    def ratio(self, name: str) -> float | None:
        """The law's mean error over a baseline's, on the runs that the baseline predicts; below 1 the law is better."""
        other, own = self.errors(name, reducible=False), self.errors(None, reducible=False)
        ok = np.isfinite(other)
        return float(own[ok].mean() / other[ok].mean()) if ok.any() and other[ok].mean() > 0 else None

    def beside(self, name: str, reducible: bool = True) -> Beside:
        """The law on the runs of all steps that a baseline predicts."""
        other, own = self.errors(name, reducible), self.errors(None, reducible)
        ok = np.isfinite(other)
        means = (float(e[ok].mean()) if ok.any() else float("nan") for e in (other, own))
        return Beside(int(ok.sum()), *means)

    @property
    def accuracy(self) -> Accuracy:
        """MSE, R2 and MAE % over all held-out runs of all steps."""
        return accuracy(self.observed, self.pooled())

    @property
    def hit_rate(self) -> float | None:
        """Share of held-out runs inside their prediction interval, over the steps that have one; None without any."""
        parts = [(s.hit_rate, len(s.held)) for s in self.steps if s.hit_rate is not None]
        return sum(r * m for r, m in parts) / sum(m for _, m in parts) if parts else None

    def to_dict(self) -> dict[str, Any]:
        return {
            "by": self.by,
            "reducible_floor": self.floor,
            "mae_loss": self.error(reducible=False),
            "mae_reducible": _plain(self.error()),
            "accuracy": self.accuracy.to_dict(),
            "hit_rate": self.hit_rate,
            "baselines": {
                k: {
                    "mae_loss": _plain(self.error(k, reducible=False)),
                    "mae_reducible": _plain(self.error(k)),
                    "ratio_of_law": self.ratio(k),
                    "runs": self.beside(k).runs,
                    "law_mae_reducible": _plain(self.beside(k).law),
                }
                for k in BASELINES
            },
            "steps": [_step(s) for s in self.steps],
            "refused": [{"held_out": what, "reason": why} for what, why in self.refused],
        }


def _step(s: HoldOut) -> dict[str, Any]:
    found = {k: v for k, v in s.to_dict().items() if k not in ("table", "reducible_floor")}
    found["mae_reducible"] = _plain(found["mae_reducible"])
    return found


def rollout(
    runs: Runs,
    by: Literal["n", "c"] = "n",
    *,
    steps: int = STEPS,
    band: float | None = None,
    oracle: float | Array | None = None,
    draws: int = 200,
    seed: int = 0,
    fit: LawFit | None = None,
    last_step: HoldOut | None = None,
    **options: Any,
) -> Rollout:
    """Predict each of the last `steps` sizes (by "n") or bands of compute (by "c") from everything below it.

    band: factor in N or C that counts as one step (default: one size; 2x in compute). oracle: entropy of the data, else
    the irreducible loss fitted to all runs is subtracted for reducible loss. draws: of each step's interval (0: none).
    fit, last_step: the law fitted to all runs and the hold-out of the last step, where they are there already; other
    options go to fit_law. Raises InputError where no step can be predicted, with the last one's reason.
    """
    if by not in ("n", "c"):
        raise InputError(f"by = {by!r}: choose 'n' (growing size) or 'c' (growing compute)")
    if steps < 1:
        raise InputError(f"steps = {steps}: give at least 1")
    band = band or (SAME if by == "n" else BAND)
    cluster = clusters(runs.n if by == "n" else runs.c, band)
    last = int(cluster.max())
    floor, name = _floor(runs, oracle, fit, options)
    found: list[HoldOut] = []
    refused: list[tuple[str, str]] = []
    for k in range(max(1, last - steps + 1), last + 1):
        use = cluster <= k
        rows, held = runs.select(use), cluster[use] == k
        part = rows.select(held)
        what = (
            f"size {part.size[0]} (N = {part.n.mean():.3g})"
            if by == "n"
            else f"{part.c.min():.3g} to {part.c.max():.3g} FLOPs"
        )
        try:
            if last_step is not None and k == last:
                step = replace(last_step, what=what, floor=floor[use][held])
            else:
                step = hold_out(rows, held, what=what, oracle=floor[use], draws=draws, seed=seed, **options)
        except InputError as error:
            refused.append((what, str(error)))
            continue
        if name != "oracle":
            held_floor = step.floor if name else np.full(len(part), np.nan)
            step = replace(step, floor_is_oracle=False, floor=held_floor)
        found.append(step)
    if not found:
        why = refused[-1][1] if refused else "there is one step only"
        raise InputError(f"{runs.label or 'runs'}: no step of the rollout can be predicted ({why})")
    return Rollout(by, tuple(found), tuple(refused), name or "none: the fitted E is above a loss")


def _floor(runs: Runs, oracle: float | Array | None, fit: LawFit | None, options: dict[str, Any]) -> tuple[Array, str]:
    """(what to subtract per run, its name); zeros and "" where the irreducible loss of all runs is above a loss.

    One floor for all steps: a step's own fitted E may lie above the loss to come, and that must show as an error of the
    law, not as a step left out.
    """
    truth = runs.oracle_value(oracle)
    if truth is not None:
        return truth, "oracle"
    try:
        e = (fit or fit_law(runs, **options)).E
    except InputError:
        e = float("inf")
    return (np.full(len(runs), e), "fitted E of all runs") if e < runs.loss.min() else (np.zeros(len(runs)), "")


def beaten(tests: Mapping[str, HoldOut | Rollout]) -> str:
    """Where a baseline without a law predicts held-out runs better than the law does, on the same runs; "" if nowhere.

    Of each test (by name) the baseline that is furthest ahead. Errors are of the reducible loss, or of the loss where
    there is no floor to subtract.
    """
    told = []
    for what, test in tests.items():
        pairs = {key: test.beside(key) for key in BASELINES}
        ahead = furthest_ahead(
            {k: p if np.isfinite(p.baseline) else test.beside(k, reducible=False) for k, p in pairs.items()}
        )
        if ahead:
            name, pair = BASELINES[ahead[0]], ahead[1]
            errors = "{} is off by {} %, the law by {} %".format(name, *percent(pair.baseline, pair.law))
            told.append(f"{what}, {errors} on the same {pair.runs} run{'s' * (pair.runs > 1)}")
    return f"held-out runs are predicted better without the law: {'; '.join(told)}" if told else ""


def furthest_ahead(pairs: Mapping[str, Beside]) -> tuple[str, Beside] | None:
    """(name, errors) of the baseline that is furthest ahead of the law on the same runs, or None where none is."""
    found = [(pair.baseline / pair.law, name, pair) for name, pair in pairs.items() if pair.law > pair.baseline]
    return min(found)[1:] if found else None


def _plain(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
