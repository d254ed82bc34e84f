"""Intervals for a fitted law and for anything computed from it.

Default: hierarchical parametric bootstrap (docs/laws.md). Branches of one trunk share its luck, so a simulated
study is  log L* = log L_fit + u_trunk + e_branch  with the spreads of noise.py, drawn too, and it is refitted with the
objective of the fit; odd runs are resampled instead (noise.py). Options: resampled residuals (leverage-corrected),
rows, or trunks (clusters); rows of one trunk are not independent, so row and residual intervals are too narrow where
trunks have luck. What the options cost in coverage and width is measured by benchmarks/coverage.py.
Legend: S draws, m runs, q trunks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from isofusion.errors import InputError
from isofusion.laws.fit import LEAST, LawFit
from isofusion.laws.forms import Params
from isofusion.laws.interval import interval
from isofusion.laws.noise import Noise, estimate_noise, simulate_noise, tangent
from isofusion.laws.refit import refit, without
from isofusion.laws.table import Array

__all__ = ["LEAST", "Intervals", "Noise", "Refusal", "bootstrap", "bootstrap_many", "estimate_noise"]

Method = Literal["hierarchical", "residual", "row", "trunk"]
METHODS: tuple[Method, ...] = get_args(Method)
# Least degrees of freedom behind an interval for E. Of 120 simulated studies each (benchmarks/coverage.py, "floor"):
# 4 sizes x 1 seed (1 degree) covers E in 88 %, 5 x 1 (2) and 3 x 2 (3) in 93 %, 4 x 2 (5) in 96 %.
FLOOR_FREEDOM = 2


class Refusal(InputError):
    """An interval that these runs cannot support; `reason` says why and which runs would support it."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"no interval for {name}: {reason}")
        self.name, self.reason = name, reason


@dataclass(frozen=True)
class Intervals:
    """Bootstrap draws of a fit. `interval` for a parameter, `of` for any function of the parameters."""

    fit: LawFit
    draws: Params  # arrays [S]
    noise: Noise
    method: Method
    level: float
    objective: Array  # [S]
    bound: np.ndarray  # bool[S]: an exponent at a bound, or a term gone
    note: str
    seed: int
    least: int = LEAST

    @property
    def share_at_bound(self) -> float:
        return float(self.bound.mean())

    @property
    def share_without_floor(self) -> float:
        """Share of draws whose irreducible loss went to zero (below 0.1 % of the lowest loss)."""
        return float(np.mean(1e-3 * self.fit.runs.loss.min() > self.draws.E)) if self.fit.form.fixed_e is None else 0.0

    def refusal(self, name: str) -> str | None:
        """Why there is no interval for this parameter, or None: E needs FLOOR_FREEDOM degrees of freedom.

        Whether the runs see a floor is a matter of how noisy they are, and with fewer the noise is not known.
        """
        noise = self.noise
        if name != "E" or self.fit.form.fixed_e is not None or noise.freedom >= FLOOR_FREEDOM:
            return None
        trunks, plural = len(np.unique(np.delete(self.fit.runs.group, noise.odd))), "s" * (noise.freedom != 1)
        return (
            f"the noise between trunks rests on {noise.freedom} degree{plural} of freedom ({trunks} trunks, 3 of them "
            f"fix the law's level); below {FLOOR_FREEDOM} intervals for the irreducible loss miss it far too often. "
            f"Add {FLOOR_FREEDOM - noise.freedom} or more trunks: other model sizes, or second seeds"
        )

    def interval(self, name: str) -> tuple[float, float]:
        """Percentile interval of E, A, alpha, B or beta. Raises Refusal where these runs cannot support one for E."""
        reason = self.refusal(name)
        if reason:
            raise Refusal(name, reason)
        return self.of(lambda p: getattr(p, name))

    def of(self, quantity: Callable[[Params], Array]) -> Any:
        """Percentile interval (low, high) of quantity(draws), along its first axis; arrays if it has more axes."""
        return self.quantiles(quantity(self.draws))

    def quantiles(self, values: Array) -> Any:
        """Percentile interval of values already computed on the draws, along their first axis: interval.py's rule."""
        low, high = interval(values, self.level)
        return (float(low), float(high)) if np.ndim(low) == 0 else (low, high)

    def predictive(self, n: Array, d: Array, group: np.ndarray | None = None) -> tuple[Array, Array]:
        """Interval for the loss a new run at (n, d), no odd one, would show: fit uncertainty, trunk and branch noise.

        Raises InputError where the runs cannot tell how lucky a trunk is (`Noise.unknown`).
        """
        if self.noise.unknown:
            raise InputError(f"interval not available: {self.noise.unknown}")
        rng = np.random.Generator(np.random.Philox(key=self.seed + 1))
        log_loss = np.log(self.draws.predict(n, d))
        log_loss = log_loss + simulate_noise(
            rng, self.noise, np.arange(len(n)).astype(str) if group is None else group, len(self.draws), self.least
        )
        low, high = interval(log_loss, self.level)
        return np.exp(low), np.exp(high)

    def to_dict(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "draws": len(self.draws),
            "level": self.level,
            "note": self.note,
            "noise": self.noise.to_dict(),
            "share_at_bound": self.share_at_bound,
            "share_without_floor": self.share_without_floor,
            "intervals": {n: None if self.refusal(n) else list(self.interval(n)) for n in self.fit.names},
            "refused": {n: reason for n in self.fit.names if (reason := self.refusal(n))},
        }


def bootstrap(
    fit: LawFit,
    draws: int = 1000,
    *,
    method: Method = "hierarchical",
    level: float = 0.95,
    seed: int = 0,
    least: int = LEAST,
) -> Intervals:
    """Draw `draws` simulated or resampled studies and refit each.

    method: "hierarchical" (default), "residual" (leverage-corrected residuals put back on the law at random; keeps the
    design, ignores trunks), "row" (resample runs; the literature's, ignores trunks) or "trunk" (resample trunks; needs
    many). least: a drawn variance has at least so many degrees of freedom; 1 for honest predictions from
    few trunks. Raises InputError for fewer than 20 draws, a level outside (0, 1) or too few trunks.
    """
    return bootstrap_many([fit], draws, method=method, level=level, seeds=[seed], least=least)[0]


def bootstrap_many(
    fits: Sequence[LawFit],
    draws: int,
    *,
    method: Method = "hierarchical",
    level: float = 0.95,
    seeds: Sequence[int],
    least: int = LEAST,
) -> list[Intervals]:
    """`bootstrap` of several studies with the same runs and form but other losses (simulated), solved as one batch."""
    if draws < 20:
        raise InputError(f"{draws} bootstrap draws say nothing about a tail; use 200 or more")
    if not 0 < level < 1:
        raise InputError(f"level = {level}: give a coverage between 0 and 1, e.g. 0.95")
    noises = [estimate_noise(fit) for fit in fits]
    parts = [
        _draw(fit, noise, method, draws, seed, least) for fit, noise, seed in zip(fits, noises, seeds, strict=True)
    ]
    log_loss = np.concatenate([part[0] for part in parts])
    weights = None
    if any(part[1] is not None for part in parts):
        weights = np.concatenate([np.ones_like(part[0]) if part[1] is None else part[1] for part in parts])
    start = np.repeat(np.stack([fit.theta for fit in fits]), draws, axis=0)
    params, objective, bound = refit(fits[0], log_loss, weights, start)
    out = []
    for k, (fit, noise, part) in enumerate(zip(fits, noises, parts, strict=True)):
        own = slice(k * draws, (k + 1) * draws)
        drawn = Params(params.E[own], params.A[own], params.alpha[own], params.B[own], params.beta[own])
        out.append(Intervals(fit, drawn, noise, method, level, objective[own], bound[own], part[2], seeds[k], least))
    return out


def _draw(
    fit: LawFit, noise: Noise, method: Method, draws: int, seed: int, least: int
) -> tuple[Array, Array | None, str]:
    """(log losses [S, m], row weights [S, m] or None, what was done) of the studies to refit."""
    rng = np.random.Generator(np.random.Philox(key=seed))
    runs = fit.runs
    centre = np.log(fit.predict(runs.n, runs.d))
    if method == "hierarchical":
        log_loss = simulate_noise(rng, noise, runs.group, draws, least)
        note = f"simulated studies; noise from {noise.source}"
        if not len(noise.odd):
            return centre + log_loss, None, note
        others = without(fit, noise.odd)
        log_loss += np.log(others.predict(runs.n, runs.d))
        log_loss[:, noise.odd] = np.log(runs.loss[noise.odd])
        weights = np.ones_like(log_loss)
        of = np.searchsorted(np.unique(runs.group), runs.group[noise.odd])
        for trunk in np.unique(of):  # a stream for each trunk: the same weights in every domain where it is odd
            own = np.random.Generator(np.random.Philox(key=[seed, 1 + trunk]))
            weights[:, noise.odd[of == trunk]] = own.poisson(1.0, (draws, 1))
        plural = "s" * (len(noise.odd) > 1)
        return log_loss, weights, f"{note}; {len(noise.odd)} odd run{plural} resampled instead"
    if method == "residual":
        log_loss = centre + corrected_residuals(fit)[rng.integers(0, len(runs), size=(draws, len(runs)))]
        note = "residuals resampled (leverage-corrected); runs of one trunk are treated as independent"
        return log_loss, None, note
    observed = np.broadcast_to(np.log(runs.loss), (draws, len(runs)))
    if method == "row":
        counts = _counts(rng.integers(0, len(runs), size=(draws, len(runs))), len(runs))
        note = (
            "rows resampled; runs of one trunk are treated as independent, so intervals are too narrow if they are not"
        )
        return observed, counts, note
    if method == "trunk":
        trunks, member = np.unique(runs.group, return_inverse=True)
        if len(trunks) < 8:
            raise InputError(
                f"resampling {len(trunks)} trunks leaves draws that identify nothing; use method 'hierarchical'"
            )
        counts = _counts(rng.integers(0, len(trunks), size=(draws, len(trunks))), len(trunks))[:, member]
        return observed, counts, f"{len(trunks)} trunks resampled"
    raise InputError(f"bootstrap method {method!r}: choose hierarchical, residual, row or trunk")


def corrected_residuals(fit: LawFit) -> Array:
    """Log residuals [m] with the law's tangent space projected out, each over sqrt(1 - leverage), centred.

    The correction gives every residual the variance of a run (Davison and Hinkley 1997, section 6.3). A run that alone
    decides a parameter (leverage 1) has no residual to give; it counts with leverage at most 1 - 1/m.
    """
    basis, r = tangent(fit)
    left = np.maximum(1.0 - np.sum(basis**2, axis=1), 1.0 / len(r))
    r = r / np.sqrt(left)
    return r - r.mean()


def _counts(picks: np.ndarray, size: int) -> Array:
    """How often each of `size` items is in each row of picks: [S, size]."""
    rows = np.arange(len(picks))[:, None] * size
    return np.bincount((picks + rows).ravel(), minlength=len(picks) * size).reshape(len(picks), size).astype(np.float64)
