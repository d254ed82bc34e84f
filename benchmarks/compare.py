"""Comparisons of arms on simulated studies: is nothing found where nothing is, and 2x where 2x was planted?

    python benchmarks/compare.py [--studies 1000] [--draws 200] [--out FILE.json]

Each study has trunks with luck of their own (0.2 % of the loss) and branches (0.1 %), five token budgets, and three
arms of one law: two alike, one with the losses of twice its N, so that its frontier is theirs at twice the compute.
Bounds: two alike are told apart in at most 7 % of the studies at 95 %; the planted gain lies in its interval in at
least 93 %. Prints each rate with its Monte Carlo standard error; exit code 1 if a bound is missed. No torch.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from isofusion.laws.bootstrap import Intervals, bootstrap
from isofusion.laws.compare import compare, equal_inference, paired
from isofusion.laws.fit import fit_law
from isofusion.laws.forms import Params
from isofusion.laws.gain import effective_gain
from isofusion.laws.table import Runs

RESULTS = Path(__file__).parent / "results" / "compare.json"
LAW = Params.of(1.904, 260.0, 0.301, 1850.0, 0.335)  # E, alpha, beta of early fusion in arXiv 2504.07951 Table 2
DESIGNS = {"6 sizes x 2 seeds": (6, 2), "12 sizes x 1 seed": (12, 1)}
TRUNK, BRANCH, BUDGETS, PLANTED = 0.002, 0.001, 5, 2.0
MOST_SHOWN, LEAST_COVERED = 0.07, 0.93
NULLS = ("equal compute", "gain", "equal inference", "paired by size")


def study(rng: np.random.Generator, sizes: int, seeds: int, gain: float) -> Runs:
    """One arm's runs: a trunk per size and seed, five branches each."""
    rows = [(n, s) for n in np.geomspace(1e8, 3e9, sizes) for s in range(seeds)]
    n = np.repeat([r[0] for r in rows], BUDGETS)
    d = np.tile(2e9 * 2.0 ** np.arange(BUDGETS), len(rows))
    luck = np.repeat(TRUNK * rng.standard_normal(len(rows)), BUDGETS) + BRANCH * rng.standard_normal(len(n))
    group = np.repeat([f"{r[0]:.3g}-{r[1]}" for r in rows], BUDGETS)
    seed = np.repeat([str(r[1]) for r in rows], BUDGETS)
    return Runs.of(n, d, LAW.predict(gain * n, d) * np.exp(luck), group=list(group), seed=list(seed))


def drawn(runs: Runs, draws: int, seed: int) -> Intervals:
    return bootstrap(fit_law(runs), draws, seed=seed)


def one(rng: np.random.Generator, sizes: int, seeds: int, draws: int, seed: int) -> dict[str, float]:
    """1 or 0 for each question asked of one study, and the width of the planted gain's interval."""
    base, same, better = (study(rng, sizes, seeds, g) for g in (1.0, 1.0, PLANTED))
    b, s, p = (drawn(r, draws, 3 * seed + i) for i, r in enumerate((base, same, better)))
    pair = paired(same, base)[-1]
    assert pair.low is not None
    assert pair.high is not None
    null, planted = effective_gain(s, b, points=9), effective_gain(p, b, points=9)
    return {
        "null equal compute": float(compare(s, b, points=15).verdict != "no difference shown"),
        "null gain": float(null.verdict != "no gain shown"),
        "null equal inference": float(equal_inference(s, b, points=15).verdict != "no difference shown"),
        "null paired by size": float(not pair.low <= 0.0 <= pair.high),
        "covered": float(planted.mean_low <= PLANTED <= planted.mean_high),
        "covered pointwise": float(np.mean((planted.low <= PLANTED) & (planted.high >= PLANTED))),
        "found": float(planted.verdict == "saves compute"),
        "gain": planted.mean,
        "width": planted.mean_high - planted.mean_low,
    }


def rate(values: np.ndarray) -> dict[str, float]:
    """Mean and its Monte Carlo standard error."""
    return {"rate": float(values.mean()), "error": float(values.std(ddof=1) / np.sqrt(len(values)))}


def summarise(found: list[dict[str, float]]) -> dict[str, Any]:
    """Rates over the studies of one design."""
    column = {k: np.array([f[k] for f in found]) for k in found[0]}
    return {
        "studies": len(found),
        "null shown": {k: rate(column[f"null {k}"]) for k in NULLS},
        "planted": {
            **{k: rate(column[k]) for k in ("covered", "covered pointwise", "found")},
            "median gain": float(np.median(column["gain"])),
            "median interval width": float(np.median(column["width"])),
        },
    }


def show(name: str, entry: dict[str, Any]) -> list[str]:
    """Print one design's rates; the bounds it misses."""
    missed = []
    print(f"{name}, {entry['studies']} studies")
    for key, value in entry["null shown"].items():
        bad = value["rate"] > MOST_SHOWN
        missed += [f"{name}: {key}"] * bad
        told, error = 100 * value["rate"], 100 * value["error"]
        print(f"  alike, told apart ({key}): {told:.1f} % +- {error:.1f}{' MISSED' * bad}")
    planted = entry["planted"]
    bad = planted["covered"]["rate"] < LEAST_COVERED
    missed += [f"{name}: planted gain"] * bad
    print(
        f"  planted 2x in its interval: {100 * planted['covered']['rate']:.1f} % +- "
        f"{100 * planted['covered']['error']:.1f}{' MISSED' * bad} (pointwise "
        f"{100 * planted['covered pointwise']['rate']:.1f} %); median {planted['median gain']:.3f}, width "
        f"{planted['median interval width']:.3f}; shown in {100 * planted['found']['rate']:.1f} %"
    )
    return missed


def report(studies: dict[str, list[dict[str, float]]], draws: int, out: Path) -> int:
    """Print every design, write the JSON; 1 if a bound is missed."""
    entries = {name: summarise(found) for name, found in studies.items()}
    missed = [m for name, entry in entries.items() for m in show(name, entry)]
    result = {
        "draws": draws,
        "level": 0.95,
        "noise": {"trunk": TRUNK, "branch": BRANCH},
        "bounds": {"null shown at most": MOST_SHOWN, "planted covered at least": LEAST_COVERED},
        "designs": entries,
        "missed": missed,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
    return 1 if missed else 0


def main() -> int:
    parser = argparse.ArgumentParser(description="Null and planted comparisons on simulated studies.")
    parser.add_argument("--studies", type=int, default=1000)
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.studies < 2:
        parser.error("--studies: give 2 or more")
    studies = {}
    for name, (sizes, seeds) in DESIGNS.items():
        rng = np.random.Generator(np.random.Philox(key=sizes))
        studies[name] = [one(rng, sizes, seeds, options.draws, k) for k in range(options.studies)]
    return report(studies, options.draws, options.out)


if __name__ == "__main__":
    sys.exit(main())
