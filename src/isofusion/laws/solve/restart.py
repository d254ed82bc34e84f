"""Out of small basins: bootstrap restarting (Wood 2001, Biometrics 57).

With a small delta the Huber objective of few runs has basins of its own, one for nearly every choice of the runs that
are fitted exactly. Refitting with the runs resampled moves the end out of such a basin; going on from there with all
runs again ends in the same basin or a lower one. It is part of following a start: what its restarts find is its end.
Legend: R restarts, m runs.
"""

from __future__ import annotations

import numpy as np

from isofusion.laws.objective import Problem, Solution, minimise
from isofusion.laws.table import Array

GROUPS = 3  # distinct ends, lowest first, that are restarted
ROUNDS = 3  # at most; a round without a lower end is the last
WORK = 6000  # runs x restarts of a round, roughly
FEWEST, MOST = 8, 32
LOWER = 1e-7  # relative decrease that counts as a lower end


def restart(
    ends: Solution, problem: Problem, delta: float, effort: float = 1.0, beside: Array | None = None
) -> tuple[Solution, list[Solution]]:
    """(the same ends, each as low as its restarts found, every other end met on the way). The same every time.

    effort: factor on the number of restarts, for callers with thousands of fits to make. beside: starts [S, 5] of
    another kind that are followed in the batch of the first round, whose ends are among the others.
    """
    m = problem.x.size
    tries = max(2, round(float(np.clip(WORK / m, FEWEST, MOST)) * effort))
    rng = np.random.Generator(np.random.Philox(key=2001))
    theta, objective = ends.theta.copy(), ends.objective.copy()
    gradient, converged = ends.gradient.copy(), ends.converged.copy()
    met: list[Solution] = []
    active = np.argsort(objective)[:GROUPS]
    for _ in range(ROUNDS):
        count = tries * len(active)
        draws = rng.multinomial(m, np.full(m, 1.0 / m), size=count).astype(np.float64)
        start = np.repeat(theta[active], tries, axis=0)
        away = minimise(start, problem.but(weights=draws * problem.weights), delta, 60, 1e-6).theta
        back = minimise(away if beside is None or met else np.concatenate([away, beside]), problem, delta)
        met.append(back)
        found = np.arange(len(active)) * tries + np.argmin(back.objective[:count].reshape(-1, tries), axis=1)
        lower = back.objective[found] < objective[active] * (1.0 - LOWER)
        active, found = active[lower], found[lower]
        if not len(active):
            break
        theta[active], objective[active] = back.theta[found], back.objective[found]
        gradient[active], converged[active] = back.gradient[found], back.converged[found]
    return Solution(theta, objective, gradient, converged), met


def joined(parts: list[Solution]) -> Solution:
    """Several sets of ends as one."""
    stacked: list[Array] = [
        np.concatenate([getattr(p, k) for p in parts]) for k in ("theta", "objective", "gradient", "converged")
    ]
    return Solution(*stacked)
