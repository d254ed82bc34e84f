"""How good are suggested runs? Simulated pools of three laws, spent to 15 % of their cost by five strategies.

    python benchmarks/suggest.py [--pools "wide;narrow"] [--laws chinchilla,...] [--seeds 20] [--out FILE]

Pools: "wide", 10 sizes x 10 token budgets over three decades each (1e7..1e10 parameters, 2e8..2e11 tokens), and
"narrow", 9 x 7 over two (2e7..2e9, 4e8..4e10); branches of one trunk per size, so costs are shared as in a study
(docs/study-file.md); trunk luck 0.2 %, branch noise 0.1 % of the loss. "..., three seeds": the same, but each cell can
be trained up to three times (a trunk of its own each time); "the whole pool" is still every cell once, and the budget
15 % of what that costs. Target: nine points at 3, 10 and 30 times the largest run's compute, at 5, 20 and 80 tokens per
parameter. Laws: Chinchilla as refitted by Besiroglu et al.; strong beta and small alpha; and a p-norm sum (p = 1.25) of
Chinchilla's terms, which no E, A, alpha, B, beta fits.
Every strategy starts from nothing and sees the losses of the runs it chose. The runs it ends with go to `fit_law`; of
its own, `suggest` names those that the fit is better without, and they are left out. "other" is the same with the rows
chosen the other way: all of them for `suggest`, those that it would fit for the whole pool and the baselines.

Reported per law and strategy, mean over seeds:
  error     mean |log fitted - log true| over the target. "expected": also over fresh noise on the same runs, so that it
            measures the choice and not the luck of one draw; "realised": with the very losses that the strategy saw.
  R2        of fitted against noisy losses observed in the target, Li et al.'s measure (arXiv 2604.22753).
  ratio     expected error over that of the whole pool (all its rows); after the semicolon the same for "other".
The bound: "floor" is the ratio of the best plan found with the law and the noise known (linear theory, least squares).
It can be below 1: the fit weighs runs alike, which is not the best use of runs that share a trunk.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from isofusion.errors import InputError
from isofusion.laws.candidates import Candidates, Prices, Target, place
from isofusion.laws.design import Points, Spread, believe, calibrate, scale_of
from isofusion.laws.fit import fit_law
from isofusion.laws.refit import refit
from isofusion.laws.suggest import (
    POWERS,
    STRATEGIES,
    Situation,
    Strategy,
    campaign,
    exchange,
    greedy,
    guess,
    leave_out,
)
from isofusion.laws.table import Array, Runs

RESULTS = Path(__file__).parent / "results" / "suggest.json"
TRUNK, BRANCH = 0.002, 0.001
FIRST = 3000  # key of the first seed; the method was developed on 1000..1007
Law = Callable[[Array, Array], Array]


def law(e: float, a: float, alpha: float, b: float, beta: float, p: float = 1.0) -> Law:
    return lambda n, d: e + ((a / n**alpha) ** p + (b / d**beta) ** p) ** (1.0 / p)


LAWS: dict[str, Law] = {
    "chinchilla": law(1.8172, 482.0, 0.3478, 2085.0, 0.3658),
    "strong-beta": law(1.6, 12.0, 0.17, 1.2e5, 0.55),
    "p-norm": law(1.8172, 482.0, 0.3478, 2085.0, 0.3658, 1.25),
}


WIDE = np.geomspace(1e7, 1e10, 10), np.geomspace(2e8, 2e11, 10)
NARROW = np.geomspace(2e7, 2e9, 9), np.geomspace(4e8, 4e10, 7)
POOLS: dict[str, tuple[Array, Array, int]] = {
    "wide": (*WIDE, 1),
    "narrow": (*NARROW, 1),
    "wide, three seeds": (*WIDE, 3),
    "narrow, three seeds": (*NARROW, 3),
}


def pool(name: str) -> tuple[Candidates, Target]:
    """The candidates and the target region of the module docstring."""
    sizes, budgets, seeds = POOLS[name]
    runs = Candidates.grid(sizes, budgets, seeds=seeds, shared=True)
    c, ratio = (v.ravel() for v in np.meshgrid(runs.cost.max() * np.array([3.0, 10.0, 30.0]), [5.0, 20.0, 80.0]))
    n = np.sqrt(c / 6.0 / ratio)
    return runs, Target.points(n, c / 6.0 / n)


def noise(rng: np.random.Generator, trunk: np.ndarray, draws: int) -> Array:
    """Log-loss noise [draws, runs]: luck of trunks and of branches."""
    names, of = np.unique(trunk, return_inverse=True)
    luck = TRUNK * rng.standard_normal((draws, len(names)))
    return luck[:, of] + BRANCH * rng.standard_normal((draws, len(trunk)))


def cost_of(runs: Candidates, chosen: list[int]) -> float:
    """FLOPs of these runs, prefixes shared."""
    points = place(None, runs)[1]
    prices = Prices.of(runs.cost, points, points.select([]), runs.shared)
    return sum(prices.take(i) for i in chosen)


def rows_for_fit(runs: Candidates, target: Target, chosen: list[int], seen: Array, seed: int) -> list[int]:
    """Those of the chosen runs that `suggest` would fit."""
    done = place(None, runs)[1].select(chosen)
    scale = scale_of(place(None, runs)[1])
    spread = calibrate(done, seen, scale, guess(None, runs, None))
    out = leave_out(Situation(done, seen, done.select([]), target, scale, spread).belief(seed=seed), done)
    return [i for k, i in enumerate(chosen) if k not in set(out)]


def fitted_error(truth: Law, runs: Candidates, target: Target, chosen: Array, seen: Array) -> float:
    """Mean |log fitted - log true| over the target of a fit to these losses."""
    fit = fit_law(Runs.of(runs.n[chosen], runs.d[chosen], np.exp(seen)))
    return float(np.mean(np.abs(np.log(fit.predict(target.n, target.d)) - np.log(truth(target.n, target.d)))))


def expected(truth: Law, runs: Candidates, target: Target, chosen: Array, draws: int) -> tuple[float, float]:
    """(error, R2 against observed targets) of fits to the chosen runs, mean over fresh noise."""
    n, d = runs.n[chosen], runs.d[chosen]
    true, clean = np.log(truth(target.n, target.d)), np.log(truth(n, d))
    rng = np.random.Generator(np.random.Philox(key=7))
    fresh = clean + noise(rng, place(None, runs)[1].trunk, draws)[:, chosen]
    observed = np.exp(true + np.hypot(TRUNK, BRANCH) * rng.standard_normal((draws, len(true))))
    params = refit(fit_law(Runs.of(n, d, np.exp(clean))), log_loss=fresh)[0]
    fitted = params.predict(target.n, target.d)
    left = np.sum((observed - fitted) ** 2, axis=1)
    r2 = 1.0 - left / np.sum((observed - observed.mean(axis=1, keepdims=True)) ** 2, axis=1)
    return float(np.mean(np.abs(np.log(fitted) - true))), float(np.mean(r2))


def floor(truth: Law, runs: Candidates, target: Target, budget: float) -> float | None:
    """Error ratio to the whole pool of the best plan with the law and the noise known; None where no law is true."""
    points = place(None, runs)[1]
    clean = fit_law(Runs.of(runs.n, runs.d, truth(runs.n, runs.d)))
    if clean.residual_spread > 1e-6:
        return None
    scale = scale_of(points)
    phi = scale.to_theta(clean.params)[None]
    phi[:, [2, 4]] = np.log(phi[:, [2, 4]])
    none: Points = points.select([])
    belief = believe(phi, none, points, (target.n, target.d), target.weights, scale, Spread(TRUNK, BRANCH, 0.0))
    free, prices = np.ones(len(runs), dtype=bool), Prices.of(runs.cost, points, none, runs.shared)
    plans = [greedy(belief, prices, budget, free, q) for q in POWERS]
    best = min(exchange(after, prices, budget, free, picks)[1].spread() for picks, after, _ in plans)
    for i in np.flatnonzero(runs.seed == 0):
        belief.learn(int(i))
    return best / belief.spread()


def run(
    name: str, candidates: str, strategies: list[Strategy], seeds: int, share: float, draws: int, first: int = FIRST
) -> dict[str, Any]:
    """One law and pool: the whole pool, then every strategy, over the seeds."""
    truth, (runs, target) = LAWS[name], pool(candidates)
    trunk = place(None, runs)[1].trunk
    every = [int(i) for i in np.flatnonzero(runs.seed == 0)]
    budget = share * cost_of(runs, every)
    rows: dict[str, list[dict[str, float]]] = {}
    known: dict[tuple[int, ...], tuple[float, float]] = {}  # the same choice is scored once

    def error(chosen: list[int], loss: Array) -> tuple[float, float, float]:
        rows = np.array(sorted(chosen))
        try:
            realised = fitted_error(truth, runs, target, rows, loss[rows])
            if tuple(rows) not in known:
                known[tuple(rows)] = expected(truth, runs, target, rows, draws)
            return realised, *known[tuple(rows)]
        except InputError:  # the choice identifies no law: counted apart, not averaged away
            return np.nan, np.nan, np.nan

    def score(chosen: list[int], loss: Array, seed: int, whole: bool) -> dict[str, float]:
        fitted = rows_for_fit(runs, target, chosen, loss[chosen], seed)
        row = dict(zip(("realised", "expected", "r2"), error(chosen if whole else fitted, loss), strict=True))
        row["other_realised"], row["other_expected"], _ = error(fitted if whole else chosen, loss)
        return row | {"runs": float(len(chosen)), "fitted": float(len(chosen if whole else fitted))}

    for seed in range(seeds):
        rng = np.random.Generator(np.random.Philox(key=first + seed))
        loss = np.log(truth(runs.n, runs.d)) + noise(rng, trunk, 1)[0]
        rows.setdefault("whole pool", []).append(score(every, loss, seed, True) | {"share": 1.0})
        for strategy in strategies:
            begin = time.process_time()
            done = campaign(strategy, runs, target, budget, lambda i, o=loss: float(np.exp(o[i])), seed=seed)
            seconds = time.process_time() - begin
            assert cost_of(runs, list(done.chosen)) <= budget * (1 + 1e-6)
            row = score(list(done.chosen), loss, seed, strategy != "suggest") | {
                "share": done.spent / budget * share,
                "cpu_s": seconds,
            }
            rows.setdefault(strategy, []).append(row)
    out: dict[str, Any] = {"floor": floor(truth, runs, target, budget), "strategies": {}}
    whole = float(np.mean([r["expected"] for r in rows["whole pool"]]))
    for strategy, each in rows.items():
        table = {k: np.array([r[k] for r in each]) for k in each[0]}
        ok = np.isfinite(table["expected"])
        mean = {k: float(np.nanmean(v[ok])) for k, v in table.items()}
        mean |= {"ratio": mean["expected"] / whole, "other_ratio": mean["other_expected"] / whole}
        mean["unidentified"] = int((~ok).sum())
        mean["expected_se"] = (
            float(np.std(table["expected"][ok], ddof=1) / np.sqrt(max(1, ok.sum()))) if seeds > 1 else 0.0
        )
        out["strategies"][strategy] = mean | {
            f"{key}_by_seed": [float(v) for v in table[key]] for key in ("expected", "realised")
        }
    return out


def _write(args: argparse.Namespace, pools: dict[str, Any]) -> None:
    settings = {"seeds": args.seeds, "share": args.share, "draws": args.draws, "trunk": TRUNK, "branch": BRANCH}
    machine = {"processor": platform.processor() or platform.machine(), "python": platform.python_version()}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"machine": machine, "settings": settings, "pools": pools}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--share", type=float, default=0.15, help="of the pool's cost")
    parser.add_argument("--draws", type=int, default=256, help="fresh noise draws a choice is scored on")
    parser.add_argument("--pools", default=";".join(POOLS))
    parser.add_argument("--first", type=int, default=FIRST, help="key of the first seed")
    parser.add_argument("--laws", default=",".join(LAWS))
    parser.add_argument("--strategies", default=",".join(STRATEGIES))
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    pools: dict[str, Any] = {}
    for candidates, name in itertools.product(args.pools.split(";"), args.laws.split(",")):
        result = run(name, candidates, args.strategies.split(","), args.seeds, args.share, args.draws, first=args.first)
        pools.setdefault(candidates, {})[name] = result
        _write(args, pools)
        known = f"; floor {result['floor']:.2f}" if result["floor"] else "; no law of the form is true"
        print(f"{name}, {candidates} pool: {args.seeds} seeds at {args.share:.0%} of the pool's cost{known}")
        for strategy, m in result["strategies"].items():
            parts = [f"  {strategy:11s} error {100 * m['expected']:.3f} % +- {100 * m['expected_se']:.3f}"]
            parts += [f"(ratio {m['ratio']:.2f}; {m['other_ratio']:.2f})"]
            parts += [f" realised {100 * m['realised']:.3f} % ({100 * m['other_realised']:.3f})", f" R2 {m['r2']:.4f}"]
            parts += [f" {m['runs']:.0f} runs, {m['fitted']:.0f} fitted, {m['share']:.1%} of the cost"]
            parts += [f" {m.get('cpu_s', 0.0):.2f} s CPU"]
            parts += [f" identified no law in {m['unidentified']} seeds"] * bool(m["unidentified"])
            print(" ".join(parts), flush=True)
    print(args.out)


if __name__ == "__main__":
    main()
