"""The learner's bound: what no learner can know after n exposures (docs/world.md; Good-Turing's missing mass).

An entity never named in training has, to anyone who does not know the bijection, a name that is uniform over the names
not yet taken. Every naming counts as an exposure, with a glyph or without, so n is never too small and the bound holds.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from isofusion.data.world.entities import N_SYLLABLES, Entities
from isofusion.errors import InputError


def unseen(p: np.ndarray, exposures: float) -> np.ndarray:
    """P(never drawn in n draws) = (1 - p_k)^n, f64 of p's shape."""
    if exposures < 0:
        raise InputError(f"exposures {exposures} is negative; give the number of entity draws named in training")
    with np.errstate(divide="ignore"):
        return np.exp(exposures * np.log1p(-p)) if exposures else np.ones_like(p)


def name_nats_unseen(entities: Entities, exposures: float) -> float:
    """Nats of a name that was never seen: log(128^3 - names already taken); names taken at their expected number."""
    taken = float(len(entities.p) - unseen(entities.p, exposures).sum())
    return float(np.log(N_SYLLABLES**3 - taken))


def learner_bound(entities: Entities, exposures: float, lookups: Iterable[int] | None = None) -> float:
    """Least excess loss over the oracle, in nats per name read off a glyph, after `exposures` entity draws.

    lookups None: expected, sum_k p_k (1 - p_k)^n log(...), for one entity drawn by frequency. Else: the mean over these
    entities (the first mentions of a validation stream, `Sample.meta["lookups"]`); multiply by their number and divide
    by the stream's targets for nats per target. Raises InputError for negative exposures.
    """
    nats = name_nats_unseen(entities, exposures)
    if lookups is None:
        return float((entities.p * unseen(entities.p, exposures)).sum()) * nats
    ids = np.fromiter(lookups, dtype=np.int64)
    return float(unseen(entities.p[ids], exposures).mean()) * nats if len(ids) else 0.0
