"""What a plan rests on: a published law, or a fit of one's own runs with its bootstrap.

Nothing heavy is imported for a published law, so that `isofusion plan --law NAME` answers in a fraction of a second.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from isofusion.errors import InputError
from isofusion.laws.family import IMAGE_SHARE
from isofusion.laws.published import Published, published
from isofusion.laws.surface import Array, PowerSurface, Rate, RepetitionSurface, Surface, late_rate, six_n

if TYPE_CHECKING:
    from isofusion.laws.bootstrap import Intervals
    from isofusion.laws.fit import LawFit

DRAWS = 2000  # of a published law with covariances


@dataclass(frozen=True)
class Basis:
    """What a plan rests on: the law, its draws if it has any, its cost, and what a reader must be told."""

    name: str
    loss_of: str  # which loss the law predicts
    surface: Surface
    draws: Surface | None  # the same law under its uncertainty
    rate: Rate
    cost: str  # in words
    n_range: tuple[float, float] | None
    d_range: tuple[float, float] | None
    c_range: tuple[float, float] | None
    interval: str  # where intervals come from, or why there are none
    facts: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    fusion: str = "early"
    level: float = 0.95
    readings: tuple[Surface, ...] = ()  # the law under other readings of a figure that its coefficients rest on


def of_published(
    name: str, *, unique: float | None = None, image_share: float | None = None, level: float = 0.95
) -> Basis:
    """The basis of a published law. `unique`: unique tokens (data-constrained laws only); `image_share`: late fusion.

    Raises InputError for an unknown law, one that cannot be planned with, or an option that does not belong to it.
    """
    law = published(name)
    if not law.plannable:
        law.chinchilla() if law.params else law.predict()  # raises, saying why
    if unique is not None and law.kind != "repetition":
        raise InputError(f"{name}: --unique-tokens belongs to a data-constrained law, e.g. --law muennighoff2023")
    if image_share is not None and law.fusion != "late":
        raise InputError(f"{name}: --image-share belongs to late fusion, where C = 6 D (f N_v + N_t)")
    surface: Surface
    if law.kind == "repetition":
        if unique is None or not unique > 0:
            raise InputError(f"{name}: give the unique tokens there are, e.g. --unique-tokens 100B")
        surface = RepetitionSurface(law.params, float(unique))
    else:
        surface = PowerSurface.of(law.chinchilla())
    rate: Rate = six_n
    cost = "C = 6 N D, N active parameters" if law.fusion == "experts" else "C = 6 N D"
    if law.fusion == "late":
        share = IMAGE_SHARE if image_share is None else image_share
        rate, cost = (
            late_rate(share),
            f"C = 6 D (f N_v + N_t), f = {share:g}, N_v regressed on N over the paper's sizes",
        )
    draws = _normal_draws(law)
    if draws is not None:
        interval = f"{100 * level:g} % from {law.errors_note}"
    elif law.errors:
        shown = ", ".join(f"{k} {v:g}" for k, v in law.errors.items())
        interval = f"none: standard errors only ({shown}); {law.errors_note}"
    else:
        interval = "none: the published coefficients carry no uncertainty"
    facts: dict[str, Any] = {
        "what": law.what,
        "formula": law.formula,
        "source": law.source,
        "where": law.where,
        "rests_on": law.rests_on,
        "counts": law.counts,
        "params": dict(law.params),
        "derived": sorted(law.derived),
    }
    if unique is not None:
        facts["unique_tokens"] = float(unique)
    return Basis(
        law.name,
        law.loss,
        surface,
        draws,
        rate,
        cost,
        law.n_range,
        law.d_range,
        law.c_range,
        interval,
        facts,
        law.caveats,
        law.fusion if law.fusion != "text" else "early",
        level,
        tuple(PowerSurface.of(p) for p in law.readings()),
    )


def _normal_draws(law: Published) -> PowerSurface | None:
    """Draws of a law whose covariances are known: normal in (log E, log A, alpha, log B, beta), exponents positive."""
    if law.covariance is None:
        return None
    p = law.chinchilla()
    centre = np.array([np.log(p["E"]), np.log(p["A"]), p["alpha"], np.log(p["B"]), p["beta"]])
    rng = np.random.Generator(np.random.Philox(key=0))
    factor = np.linalg.cholesky(np.array(law.covariance))
    z = centre + rng.standard_normal((DRAWS, 5)) @ factor.T
    z = z[(z[:, 2] > 0) & (z[:, 4] > 0)]
    return PowerSurface(np.exp(z[:, 0]), np.exp(z[:, 1]), z[:, 2], np.exp(z[:, 3]), z[:, 4])


def of_fit(fit: LawFit, intervals: Intervals | None = None) -> Basis:
    """The basis of a fit of one's own runs (`fit_law`), with its bootstrap for intervals.

    Raises InputError where the fitted law lacks a term: it then has no optimum.
    """
    from isofusion.laws.doubt import law_warnings
    from isofusion.laws.frontier import Cost

    if not (fit.form.n_term and fit.form.d_term):
        raise InputError(f"{fit.form.formula}: a law without both terms has no optimal size")
    runs = fit.runs
    cost = Cost.of(runs)

    def rate(n: Array) -> Array:
        return np.asarray(cost.per_token(n), dtype=np.float64)

    told = law_warnings(fit, intervals)
    words = "C = 6 N D" if cost.kind == "6nd" else "C = k(N) D, k measured on the runs"
    facts = {
        "formula": f"L = {fit.form.formula}",
        "source": runs.label or "runs",
        "rests_on": f"{len(runs)} runs, {runs.n_sizes} sizes, {runs.n_budgets} token budgets",
        "counts": "N and D as the table has them",
        "params": {k: float(getattr(fit, k)) for k in ("E", "A", "alpha", "B", "beta")},
        "derived": [],
        "fit_warnings": [{"code": w.code, "message": w.message} for w in told],
    }
    if intervals is None:
        interval = "none: no bootstrap draws asked for"
    else:
        interval = f"{100 * intervals.level:g} %, {len(intervals.draws)} draws: {intervals.note}"
    return Basis(
        runs.label or "runs",
        f"the loss of {runs.label}" if runs.label else "the loss column of the table",
        PowerSurface.of(fit.params),
        None if intervals is None else PowerSurface.of(intervals.draws),
        rate if cost.kind != "6nd" else six_n,
        words,
        (float(runs.n.min()), float(runs.n.max())),
        (float(runs.d.min()), float(runs.d.max())),
        (float(runs.c.min()), float(runs.c.max())),
        interval,
        facts,
        (),
        "early",
        0.95 if intervals is None else intervals.level,
    )
