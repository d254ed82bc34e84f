"""Arms at equal compute, run by run: loss against size at budgets where runs of several sizes cost the same (isoFLOP).

The laws serve only to move a run's loss by the few per cent that its FLOPs are off the budget; the lowest point is a
parabola's in log N (Hoffmann et al., arXiv 2203.15556, approach 2; its bias: laws/isoflop.py). Losses are the mean over
domains. Units: C in FLOPs, N parameters, nats per target token. m runs of a budget.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from isofusion.laws.isoflop import budgets_of, not_bracketed, parabola
from isofusion.laws.table import Array, clusters
from isofusion.report.lawside import ArmLaws

NEAR = 1.3
"""Budgets of different arms within this factor are compared, at their geometric mean."""
CURVE = 33  # points of a drawn parabola


def common_budgets(points: list[dict[str, Any]], arms: list[str]) -> list[float]:
    """FLOPs of the budgets at which every arm that has any has one, ascending; none where only one of several has."""
    found: list[tuple[str, float]] = []
    for arm in arms:
        c, n = (np.array([p[key] for p in points if p["arm"] == arm]) for key in ("c", "n"))
        found += [(arm, group.c) for group in budgets_of(c, n)[0]]
    having = {arm for arm, _ in found}
    if not found or len(having) < min(2, len(arms)):
        return []
    at = np.array([c for _, c in found])
    cluster = clusters(at, NEAR)
    members = [[i for i in range(len(found)) if cluster[i] == k] for k in range(int(cluster.max()) + 1)]
    shared = [m for m in members if {found[i][0] for i in m} == having and len(m) == len(having)]
    return sorted(float(np.exp(np.log(at[m]).mean())) for m in shared)


def at_budgets(laws: ArmLaws, domains: list[str], budgets: list[float]) -> list[dict[str, Any]]:
    """One arm at each of the budgets: its sizes, their losses there, the parabola and its lowest point.

    `moved` is the largest share of its loss that a run was moved by; `lowest` N or None, `why` then says why not.
    Empty where a domain has no law, or lacks runs that another has.
    """
    if any(domain not in laws.fits for domain in domains):
        return []
    ref = laws.runs[domains[0]]
    if any(not np.array_equal(laws.runs[domain].n, ref.n) for domain in domains):
        return []
    groups, _ = budgets_of(ref.c, ref.n)
    found = []
    for c in budgets:
        near = [g for g in groups if abs(np.log(g.c / c)) < np.log(NEAR)]
        if len(near) != 1:
            continue
        group = near[0]
        n_m = np.exp(group.log_n)
        owed = {d: _owed(laws, d, group.rows, n_m, c) for d in domains}
        loss_m = np.mean([laws.runs[d].loss[group.rows] * owed[d] for d in domains], axis=0)
        why = not_bracketed(group, loss_m)
        x = np.linspace(group.x[0], group.x[-1], CURVE)
        fitted = np.polynomial.Polynomial.fit(group.log_n, loss_m, 2)
        found.append(
            {
                "c": c,
                "n": np.exp(group.x).tolist(),
                "loss": group.mean(loss_m).tolist(),
                "runs": len(group.rows),
                "moved": float(max(np.abs(o - 1).max() for o in owed.values())),
                "lowest": None if why else float(np.exp(parabola(group.log_n, loss_m))),
                "lowest_loss": None if why else float(fitted(parabola(group.log_n, loss_m))),
                "why": why,
                "curve": {"n": np.exp(x).tolist(), "loss": fitted(x).tolist()},
            }
        )
    return found


def _owed(laws: ArmLaws, domain: str, rows: np.ndarray, n_m: Array, c: float) -> Array:
    """The factor, by the domain's law, from each run's loss to that of its size at c FLOPs, [m]."""
    fit, runs = laws.fits[domain], laws.runs[domain]
    return np.asarray(fit.predict(n_m, laws.cost.tokens(c, n_m)) / fit.predict(n_m, runs.d[rows]))
