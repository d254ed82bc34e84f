"""A plan of runs from a belief: one candidate after the other, then exchanges; and done runs the fit is better without.

Background: Fedorov (1972) for exchanges. A belief's first rows are the candidates, its last the done runs.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from isofusion.laws.candidates import Prices
from isofusion.laws.design import Belief, Points
from isofusion.laws.table import clusters

KEPT_RUNS, KEPT_LEVELS = 8, 4  # runs, and sizes and token budgets, that the fit keeps whatever leaves it
LEAST_OUT = 1e-3  # relative fall of the squared error that leaving a run, or a cell of runs, out must bring
SINGLY, CELL = 500, 0.25  # runs that are judged one by one; decades of N and of D that a cell spans
SWEEPS = 3  # of exchanges over a plan
LEAST = 1e-4  # relative fall of the squared error that an exchange must bring
FREE = 1e-9  # relative tolerance on the budget


def greedy(
    belief: Belief,
    prices: Prices,
    budget: float,
    free: np.ndarray,
    power: float,
    *,
    most: int | None = None,
    by: Literal["target", "information"] = "target",
    wanted: float = 0.0,
    least: float = 0.0,
) -> tuple[list[int], Belief, str]:
    """One candidate after the other by gain / cost^power: (picks, belief after them, why it stopped)."""
    belief, prices, free = belief.copy(), prices.copy(), free.copy()
    picks: list[int] = []
    pool = slice(0, len(free))
    left = whole = budget
    while True:
        if most is not None and len(picks) >= most:
            return picks, belief, f"{most} runs chosen"
        if wanted > 0 and belief.spread() <= wanted:
            return picks, belief, f"expected error at or below {100 * wanted:.3g} %"
        price = prices.now()
        can = free & (price <= left + FREE * whole)
        if not can.any():
            return picks, belief, "no candidate is left that the rest of the budget pays for"
        gain = (belief.gains(pool) if by == "target" else belief.information(pool)).mean(axis=0)
        # a squared error that falls by the share g falls by g / 2 itself
        share = gain / max(float(belief.variances().mean()), 1e-300) / 2.0
        worth = can & (gain > 0)
        if by == "target":
            worth &= share >= least * price / (0.01 * whole)
        if not worth.any():
            return picks, belief, "no further run is expected to help enough for its cost"
        pick = int(np.argmax(np.where(worth, gain / price**power, -np.inf)))
        belief.learn(pick)
        free[pick] = False
        left -= prices.take(pick)
        picks.append(pick)


def leave_out(belief: Belief, done: Points) -> list[int]:
    """Done runs that the fit is better without: their misfit bends it more than their number steadies it.

    One after the other while the expected squared error falls; of more than SINGLY runs one cell of (N, D) after the
    other. A single one of thousands changes next to nothing; and free to pick among thousands, a choice finds a few
    whose misfits cancel as the belief has them and not as they are. Enough stay for a fit. They are forgotten in
    `belief` (whose last rows they are). Returns their indices in `done`, ascending.
    """
    first = belief.slope.shape[2] - len(done)
    sizes, budgets = clusters(done.n), clusters(done.d)
    part = np.arange(len(done))
    if len(done) > SINGLY:
        place = np.round(np.log10([done.n, done.d]) / CELL)
        part = np.unique(place, axis=1, return_inverse=True)[1].ravel()
    kept = np.ones(len(done), dtype=bool)
    while True:
        loss = np.bincount(part, kept * belief.losses(slice(first, None)).mean(axis=0), minlength=1)
        out = kept & (part == np.argmin(loss))
        rest, before = kept & ~out, float(belief.variances().mean())
        levels = min(len(np.unique(sizes[rest])), len(np.unique(budgets[rest])))
        if loss.min() >= 0 or rest.sum() < KEPT_RUNS or levels < KEPT_LEVELS:
            break
        rows = first + np.flatnonzero(out)
        belief.forget(rows)
        if float(belief.variances().mean()) > (1.0 - LEAST_OUT) * before:
            belief.learn(rows)
            break
        kept = rest
    return [int(i) for i in np.flatnonzero(~kept)]


def exchange(
    belief: Belief, prices: Prices, budget: float, free: np.ndarray, picks: list[int], *, sweeps: int = SWEEPS
) -> tuple[list[int], Belief]:
    """Better plans by swaps (Fedorov 1972): each run leaves for whatever the money then buys best, or for nothing.

    Greedy choices are made one at a time; runs that were worth their price early may not be once others are there. The
    plan stays within the budget and never gets worse nor longer. Returns (picks, belief after them).
    """
    belief, picks = belief.copy(), list(picks)
    pool = slice(0, len(free))
    for _ in range(sweeps):
        changed = False
        loss = belief.losses(pool).mean(axis=0)
        for i in sorted(picks, key=loss.__getitem__):
            before = float(belief.variances().mean())
            rest = [j for j in picks if j != i]
            belief.forget(i)
            now = prices.after(rest)
            can = free & (now.now() <= budget - prices.total(rest) + FREE * budget)
            can[rest] = False
            gain = np.where(can, belief.gains(pool).mean(axis=0), -np.inf)
            j = int(np.argmax(gain))
            after = float(belief.variances().mean()) - max(0.0, float(gain[j]))
            if after >= before * (1.0 - LEAST):
                belief.learn(i)
                continue
            changed = True
            picks = rest
            if gain[j] > 0:
                belief.learn(j)
                picks.append(j)
        if not changed:
            break
    return picks, belief
