"""Arms at equal compute, run by run: loss against size at budgets where runs of several sizes cost the same (isoFLOP).

The laws serve only to move a run's loss by the few per cent that its FLOPs are off the budget; the lowest point is a
parabola's in log N (Hoffmann et al., arXiv 2203.15556, approach 2; its bias: laws/isoflop.py). Losses are the mean over
domains. Units: C in FLOPs, N parameters, nats per target token. m runs of a budget.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from isofusion.laws.isoflop import budgets_of, moved, not_bracketed, parabola
from isofusion.laws.table import Array
from isofusion.report.lawside import ArmLaws

NEAR = 1.3
"""Budgets of different arms within this factor are compared, at their geometric mean."""
CURVE = 33  # points of a drawn parabola


def common_budgets(points: list[dict[str, Any]], arms: list[str]) -> list[float]:
    """FLOPs of the budgets at which every arm that has any has one, ascending; none where only one of several has."""
    centres = []
    for arm in arms:
        c, n = (np.array([p[key] for p in points if p["arm"] == arm]) for key in ("c", "n"))
        if len(c) and (groups := budgets_of(c, n)[0]):
            centres.append(np.array([group.c for group in groups]))
    if not centres or len(centres) < min(2, len(arms)):
        return []
    shared = []
    for c in centres[0]:
        twins = [own[_nearest(own, c)] for own in centres]
        mutual = all(centres[0][_nearest(centres[0], twin)] == c for twin in twins)
        if mutual and max(twins) < NEAR * min(twins):
            shared.append(float(np.exp(np.log(twins).mean())))
    return sorted(shared)


def _nearest(c_b: Array, c: float) -> int:
    return int(np.abs(np.log(c_b / c)).argmin())


def at_budgets(laws: ArmLaws, domains: list[str], budgets: list[float]) -> list[dict[str, Any]]:
    """One arm at each of the budgets: its sizes, their losses there, the parabola and its lowest point.

    `moved` is the largest share of its loss that a run was moved by; `lowest` N or None, `why` then says why not.
    Empty where a domain has no law.
    """
    if not budgets or any(domain not in laws.fits for domain in domains):
        return []
    ref = laws.runs[domains[0]]
    groups, _ = budgets_of(ref.c, ref.n)
    centres = np.array([group.c for group in groups])
    found = []
    for c in budgets:
        if not groups or abs(np.log(centres[_nearest(centres, c)] / c)) > np.log(NEAR):
            continue
        group = groups[_nearest(centres, c)]
        factor = {d: moved(laws.runs[d], group.rows, c, laws.fits[d], laws.cost) for d in domains}
        loss_m = np.mean([laws.runs[d].loss[group.rows] * factor[d] for d in domains], axis=0)
        why = not_bracketed(group, loss_m)
        x = np.linspace(group.x[0], group.x[-1], CURVE)
        fitted, lowest = np.polynomial.Polynomial.fit(group.log_n, loss_m, 2), parabola(group.log_n, loss_m)
        found.append(
            {
                "c": c,
                "n": np.exp(group.x).tolist(),
                "loss": group.mean(loss_m).tolist(),
                "runs": len(group.rows),
                "moved": float(max(np.abs(f - 1).max() for f in factor.values())),
                "lowest": None if why else float(np.exp(lowest)),
                "lowest_loss": None if why else float(fitted(lowest)),
                "why": why,
                "curve": {"n": np.exp(x).tolist(), "loss": fitted(x).tolist()},
            }
        )
    return found
