"""Which runs next? Under a budget, those that make the law's predictions in a target region best.

`suggest` plans a set of runs by expected reduction of the squared error of the fit in the target region (`design`),
averaged over plausible laws, with the cost entering as gain / cost^q. No single q suits every budget (q = 1 never buys
the expensive run that the target needs, a small q buys one and little else), so it plans once for each, keeps the plan
that ends best and betters it by exchanges. Cheap runs of the plan come first: run a few, then ask again with their
losses: `campaign`. With the losses it also says which done runs the fit is better without (`leave_out`).
The baselines are there to be compared with: random, cheapest, and D- and V-optimal designs at the single best fit with
independent noise, as in Li et al. arXiv 2604.22753 (who divide by cost^0.4 and cost^0.3 and begin with the cheapest
runs). Units: FLOPs; errors are relative (log loss).
Legend: M members, c candidates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from isofusion.errors import InputError
from isofusion.laws.candidates import Candidates, Prices, Target, place
from isofusion.laws.design import MEMBERS, Belief, Points, Spread, believe, calibrate, members, scale_of
from isofusion.laws.fit import LawFit, fit_law, spared
from isofusion.laws.forms import Scale
from isofusion.laws.greedy import FREE, exchange, greedy, leave_out
from isofusion.laws.table import Array, Runs

Strategy = Literal["suggest", "random", "cheapest", "d-optimal", "v-optimal"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)
POWERS = (1.0, 0.7, 0.4, 0.2)  # q of gain / cost^q; the plan that ends best is kept
LOCAL_POWER = {"d-optimal": 0.4, "v-optimal": 0.3}
PILOT = 12  # cheapest runs that the local designs begin with (2.5 per parameter)
BATCH = 3  # runs between refits of a campaign
SHARE = 0.2  # of the remaining budget that `suggest` spends before it plans anew
PILOT_SHARE = 0.03  # and before it has as many runs as a pilot: little, since nothing is known yet
ALONE = Spread(0.0, 0.003, 0.008)  # guesses before any run; `calibrate` moves them by factors
GROUPED = Spread(0.002, 0.001, 0.008)
WORTH_SAYING = 0.05  # and of the error that leaving them all out must bring before a user is told


@dataclass(frozen=True)
class Pick:
    """One suggested run. cost: FLOPs it adds; error: expected error of the target after it; cut: share it removes."""

    index: int
    name: str
    n: float
    d: float
    cost: float
    spent: float
    error: float
    cut: float
    why: str


@dataclass(frozen=True)
class Suggestion:
    """The next runs, in the order to run them. Errors are the expected relative error (of the loss, or of N*)."""

    strategy: Strategy
    picks: tuple[Pick, ...]
    before: float
    after: float
    budget: float
    spent: float
    stopped: str
    spread: Spread
    done: int
    candidates: int
    leave_out: tuple[int, ...]  # done runs without which the fit is expected to be better
    without: float  # the error `before`, if those are left out
    notes: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        return {
            **{k: getattr(self, k) for k in ("strategy", "before", "after", "budget", "spent", "stopped")},
            "noise": {"trunk": self.spread.trunk, "branch": self.spread.branch, "misfit": self.spread.misfit},
            "done": self.done,
            "candidates": self.candidates,
            "leave_out": list(self.leave_out),
            "without": self.without,
            "notes": list(self.notes),
            "runs": [dict(p.__dict__) for p in self.picks],
        }


@dataclass(frozen=True)
class Situation:
    """What is known when runs are chosen: done runs with log losses, the pool, the target, the noise."""

    done: Points
    log_loss: Array
    pool: Points
    target: Target
    scale: Scale
    spread: Spread

    def belief(self, *, local: bool = False, seed: int = 0, count: int = MEMBERS) -> Belief:
        """Averaged over members; local: at the best fit, with independent noise and a law that is exactly true."""
        spread = Spread(0.0, self.spread.run, 0.0) if local else self.spread
        best, drawn = members(self.done, self.log_loss, self.scale, spread, 1 if local else count, seed)
        phi = best[None] if local else drawn
        every = np.concatenate([self.done.n, self.pool.n, self.target.n])
        places = self.target.places(phi, self.scale, (float(every.min()) / 1e3, float(every.max()) * 1e3))
        return believe(
            phi,
            self.done,
            self.pool,
            places,
            self.target.weights,
            self.scale,
            spread,
            gradient=self.target.gradient(self.scale),
        )


def choose(
    strategy: Strategy,
    state: Situation,
    prices: Prices,
    budget: float,
    free: np.ndarray,
    *,
    most: int | None = None,
    wanted: float = 0.0,
    least: float = 0.0,
    seed: int = 0,
    belief: Belief | None = None,
) -> tuple[list[int], str]:
    """Candidates (indices into the pool, `free` ones) to run next, in order, and why there are not more.

    belief: `state.belief(seed=seed)`, where it is known already; it stays as it is.
    """
    if strategy == "suggest":
        belief = belief or state.belief(seed=seed)
        powers = POWERS if most is None else (*POWERS, 0.0)  # where runs are counted, cost may not matter
        plans = [greedy(belief, prices, budget, free, q, most=most, wanted=wanted, least=least) for q in powers]
        reached = [p for p in plans if wanted > 0 and p[1].spread() <= wanted]
        if reached:
            picks, _, why = min(reached, key=lambda p: _total(prices, p[0]))
        else:
            picks, after, why = min(plans, key=lambda p: p[1].spread())
            if not least:
                picks, after = exchange(after, prices, budget, free, picks)
        return sorted(picks, key=lambda i: float(prices.full[i])), why
    pilot = max(0, PILOT - len(state.done)) if strategy in LOCAL_POWER else 0
    if strategy in LOCAL_POWER and not pilot:
        by: Literal["target", "information"] = "information" if strategy == "d-optimal" else "target"
        local = state.belief(local=True, seed=seed)
        picks, _, why = greedy(local, prices, budget, free, LOCAL_POWER[strategy], most=most, by=by)
        return picks, why
    rng = np.random.Generator(np.random.Philox(key=seed))
    prices, free, left = prices.copy(), free.copy(), budget
    order = rng.permutation(len(free))
    limit = min(x for x in (most, pilot or None, len(free)) if x is not None)
    picks = []
    while len(picks) < limit:
        price = prices.now()
        can = free & (price <= left + FREE * budget)
        if not can.any():
            return picks, "no candidate is left that the rest of the budget pays for"
        i = (
            next(int(j) for j in order if can[j])
            if strategy == "random"
            else int(np.argmin(np.where(can, price, np.inf)))
        )
        free[i] = False
        left -= prices.take(i)
        picks.append(i)
    return picks, f"{limit} runs chosen" if limit < len(order) else "every candidate is chosen"


def _total(prices: Prices, picks: list[int]) -> float:
    prices = prices.copy()
    return float(sum(prices.take(i) for i in picks))


def guess(runs: Runs | None, candidates: Candidates, noise: float | None, fit: LawFit | None = None) -> Spread:
    """Where `calibrate` starts: the user's noise of one run, repeated seeds (seen by a fit), or plain guesses."""
    grouped = candidates.shared or (runs is not None and len(np.unique(runs.group)) < len(runs))
    out = GROUPED if grouped else ALONE
    if noise is not None:
        if not (np.isfinite(noise) and 0 < noise < 1):
            raise InputError(f"noise = {noise}: give the relative spread of equal runs' losses, e.g. 0.003")
        return Spread(out.trunk * noise / out.run, out.branch * noise / out.run, out.misfit)
    if fit is not None:
        from isofusion.laws.noise import estimate_noise

        seen = estimate_noise(fit)
        if seen.seed_freedom >= 2 and seen.seed:  # residuals alone cannot tell noise from misfit
            return Spread(out.trunk * seen.seed / out.run, out.branch * seen.seed / out.run, out.misfit)
    return out


def situation(
    runs: Runs | None, candidates: Candidates, target: Target, *, noise: float | None = None, fit: LawFit | None = None
) -> Situation:
    """Everything the strategies look at; the noise and misfit are calibrated on the done runs. fit: of them, if any."""
    done, pool = place(runs, candidates)
    log_loss = np.zeros(0) if runs is None else np.log(runs.loss)
    scale = scale_of(done, pool)
    spread = calibrate(done, log_loss, scale, guess(runs, candidates, noise, fit), noise_known=noise is not None)
    return Situation(done, log_loss, pool, target, scale, spread)


def suggest(
    runs: Runs | None,
    candidates: Candidates,
    target: Target,
    budget: float,
    *,
    most: int | None = None,
    wanted: float = 0.0,
    least: float = 0.0,
    noise: float | None = None,
    strategy: Strategy = "suggest",
    seed: int = 0,
) -> Suggestion:
    """The next runs under a budget of FLOPs, from done runs (None or any number of them: the prior carries the rest).

    most: at most so many runs. wanted: stop when the expected relative error of the target is this low. least: stop
    when 1 % of the budget would buy a smaller relative reduction of that error. noise: relative spread of equal runs,
    if known. The order of the done runs changes nothing; odd ones (residuals.py) count as not done, and `notes` says
    so. Raises InputError for a budget below the cheapest candidate, and settings out of range.
    """
    if strategy not in STRATEGIES:
        raise InputError(f"strategy {strategy!r}: choose {', '.join(STRATEGIES)}")
    if not (np.isfinite(budget) and budget > 0):
        raise InputError(f"budget = {budget:g}: give positive FLOPs, e.g. 1e20")
    if most is not None and most < 1:
        raise InputError(f"{most} runs: ask for at least one")
    for name, value in (("wanted", wanted), ("least", least)):
        if not (np.isfinite(value) and 0 <= value < 1):
            raise InputError(f"{name} = {value}: give a relative error between 0 and 1, e.g. 0.005 for 0.5 %")
    rows, done, fit = np.zeros(0, dtype=np.int64), 0, None
    notes: tuple[str, ...] = ()
    if runs is not None:
        runs, rows = runs.canonical()
        done, fit = len(runs), _fit(runs)
        # a robust fit all but ignores odd runs; the design, which squares deviations, would not
        odd = rows[:0] if fit is None else spared(fit)
        if len(odd):
            others = np.setdiff1d(np.arange(done), odd)
            notes = (_odd_note(runs, odd),)
            runs, rows = runs.select(others), rows[others]
    state = situation(runs, candidates, target, noise=noise, fit=fit)
    prices = Prices.of(candidates.cost, state.pool, state.done, candidates.shared)
    cheapest = int(np.argmin(prices.now()))
    if prices.now()[cheapest] > budget * (1 + FREE):
        raise InputError(
            f"a budget of {budget:.3g} FLOPs pays for none of {len(candidates)} candidates; the cheapest "
            f"({candidates.name[cheapest]}) costs {prices.now()[cheapest]:.3g}"
        )
    free = np.ones(len(candidates), dtype=bool)
    belief = state.belief(seed=seed)
    limits: dict[str, Any] = {"most": most, "wanted": wanted, "least": least}
    order, why = choose(strategy, state, prices, budget, free, **limits, seed=seed, belief=belief)
    fitted = belief.copy()
    out = tuple(sorted(int(rows[i]) for i in leave_out(fitted, state.done)))
    before = last = belief.spread()
    if fitted.spread() > (1.0 - WORTH_SAYING) * before:
        out, fitted = (), belief.copy()
    picks, spent = [], 0.0
    for i in order:
        reason = _why(state, candidates, order[: order.index(i)], i)
        belief.learn(i)
        price, error = prices.take(i), belief.spread()
        spent += price
        cut = 1.0 - error / last if last > 0 else 0.0
        n, d = float(candidates.n[i]), float(candidates.d[i])
        picks.append(Pick(i, str(candidates.name[i]), n, d, price, spent, error, cut, reason))
        last = error
    return Suggestion(
        strategy,
        tuple(picks),
        before,
        last,
        budget,
        spent,
        why,
        state.spread,
        done,
        len(candidates),
        out,
        fitted.spread(),
        notes,
    )


def _fit(runs: Runs) -> LawFit | None:
    try:
        return fit_law(runs)
    except InputError:  # too few for a law
        return None


def _odd_note(runs: Runs, odd: npt.NDArray[np.int64]) -> str:
    """Which runs are taken for not done, the farthest from the law by its numbers."""
    i = odd[0]
    first = f"N = {runs.n[i]:.4g}, D = {runs.d[i]:.4g}, loss {runs.loss[i]:.4g}"
    many = (
        f"{len(odd)} runs are many times the usual spread away from the law and count as not done, among them {first}"
    )
    one = f"the run {first} is many times the usual spread away from the law and counts as not done"
    return f"{many if len(odd) > 1 else one}; check such rows (`isofusion fit` names them)"


def _why(state: Situation, candidates: Candidates, earlier: list[int], i: int) -> str:
    """What the run adds to those before it, in words."""
    words = []
    for name, done, pool in (("N", state.done.n, candidates.n), ("D", state.done.d, candidates.d)):
        seen = np.concatenate([done, pool[earlier]])
        if not len(seen):
            continue
        if pool[i] > seen.max() * 1.05:
            words.append(f"largest {name} so far")
        elif pool[i] < seen.min() / 1.05:
            words.append(f"smallest {name} so far")
        elif np.abs(np.log(seen / pool[i])).min() > np.log(1.05):
            words.append(f"a new {name} in between")
    if not words:
        words = ["a first run"] if not earlier and not len(state.done) else ["a new pairing of known N and D"]
    if candidates.shared and state.pool.trunk[i] in set(state.done.trunk) | set(state.pool.trunk[earlier]):
        words.append("branches from a trunk that is there")
    return ", ".join(words)


@dataclass(frozen=True)
class Campaign:
    """A pool spent to the end of a budget: which candidates, in order, their log losses and what they cost."""

    chosen: tuple[int, ...]
    log_loss: Array
    spent: float
    rounds: int
    kept: tuple[int, ...]  # those that the fit should use


def campaign(
    strategy: Strategy,
    candidates: Candidates,
    target: Target,
    budget: float,
    observe: Callable[[int], float],
    *,
    noise: float | None = None,
    seed: int = 0,
) -> Campaign:
    """Choose, run, refit, choose again, from nothing until nothing more pays: observe(i) trains candidate i, its loss.

    `suggest` runs the cheapest of its plan, at least three, for at most a fifth of what is left (3 % of the whole up to
    the twelfth run), then plans anew, and says in the end which runs to fit. The local designs take three runs at a
    time; random and cheapest do not look at losses.
    """
    _, pool = place(None, candidates)
    prices = Prices.of(candidates.cost, pool, pool.select([]), candidates.shared)
    free, left = np.ones(len(candidates), dtype=bool), budget
    chosen: list[int] = []
    log_loss: list[float] = []
    rounds = 0
    scale, start = scale_of(pool), guess(None, candidates, noise)
    while True:
        done, seen = pool.select(chosen), np.array(log_loss)
        spread = calibrate(done, seen, scale, start, noise_known=noise is not None)
        state = Situation(done, seen, pool, target, scale, spread)
        few = BATCH if strategy in LOCAL_POWER and len(chosen) >= PILOT else None
        plan, _ = choose(strategy, state, prices, left, free, most=few, seed=seed)
        if not plan:
            out = leave_out(state.belief(seed=seed), done)
            kept = tuple(i for k, i in enumerate(chosen) if k not in set(out))
            return Campaign(tuple(chosen), seen, budget - left, rounds, kept)
        rounds += 1
        last = strategy != "suggest" or left < 0.1 * budget
        goal = left - (SHARE * left if len(chosen) >= PILOT else PILOT_SHARE * budget)
        for k, i in enumerate(plan):
            if not last and k >= BATCH and left - float(prices.now()[i]) < goal:
                break
            free[i] = False
            left -= prices.take(i)
            chosen.append(i)
            log_loss.append(float(np.log(observe(i))))
