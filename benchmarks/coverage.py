"""Coverage and width of the intervals, by design: do 95 % intervals contain the truth 95 % of the time?

    python benchmarks/coverage.py [--studies 1000] [--draws 400] [--part main] [--out FILE.json]

Simulated studies of a known law with trunk luck (isofusion.laws.coverage), each fitted, each with its intervals for
alpha, beta, N*(C) at the largest compute, the loss at 10x that compute, and E. Bound: the nominal 95 %. Parts:
main     6 sizes x 2 seeds and 12 x 1, 5 budgets, trunk 0.5 %, branch 0.2 % of the loss; default method
noisy    the same designs with twice that noise
methods  the same designs with rows, residuals and trunks resampled: what ignoring trunks costs
profile  the same designs, profile likelihood (a fifth of the studies)
odd      the same designs and 8 sizes x 6 budgets from scratch with 1 % noise, without and with one run x 1.5 and x 3
floor    which designs bound E: sizes, seeds, range of N and D (a third of the studies)
The result file keeps the parts that a run does not touch.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

from isofusion.laws.coverage import Coverage, Design, cover

RESULTS = Path(__file__).parent / "results" / "coverage.json"
TWO = (Design(6, 2), Design(12, 1))
NOISY = (Design(6, 2, trunk=0.01, branch=0.004), Design(12, 1, trunk=0.01, branch=0.004))
FLAT = Design(8, budgets=6, trunk=0.0, branch=0.01, branched=False)
ODD = (FLAT, *(replace(design, odd=factor) for design in (*TWO, FLAT) for factor in (1.5, 3.0)))
NARROW = (1e8, 4e8), (2e9, 8e9)
FLOOR = tuple(
    [Design(sizes, seeds) for sizes, seeds in ((3, 1), (4, 1), (5, 1), (3, 2), (6, 1), (4, 2), (8, 1))]
    + [Design(sizes, n_range=NARROW[0], d_range=NARROW[1]) for sizes in (3, 4, 5, 6)]
    + [Design(sizes, budgets=3, branched=False) for sizes in (3, 4)]
)
PARTS = ("main", "noisy", "odd", "methods", "profile", "floor")


def show(found: Coverage, seconds: float) -> None:
    print(f"{found.design.label}: {found.method}, {found.studies} studies x {found.draws} draws, {seconds:.0f} s CPU")
    for row in found.rows:
        print(
            f"  {row.name:14s} covers {100 * row.cover:5.1f} % (se {100 * row.error:.1f})  "
            f"misses above {100 * row.above:4.1f} % below {100 * row.below:4.1f} %  "
            f"width {row.width:.4g} = {row.width / row.spread:.2f} sd  refused {100 * row.refused:.0f} %",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=1000)
    parser.add_argument("--draws", type=int, default=400)
    parser.add_argument("--part", choices=PARTS, action="append", help="may be repeated; default: all")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    jobs = {
        "main": [(design, "hierarchical", args.studies) for design in TWO],
        "noisy": [(design, "hierarchical", args.studies) for design in NOISY],
        "odd": [(design, "hierarchical", args.studies) for design in ODD],
        "methods": [(design, method, args.studies) for method in ("row", "residual", "trunk") for design in TWO],
        "profile": [(design, "profile", max(20, args.studies // 5)) for design in TWO],
        "floor": [(design, "hierarchical", max(20, args.studies // 3)) for design in FLOOR],
    }
    out = json.loads(args.out.read_text()) if args.out.is_file() else {}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for part in args.part or PARTS:
        rows = []
        for design, method, studies in jobs[part]:
            begin = time.process_time()
            draws = min(args.draws, 200) if part in ("profile", "floor") else args.draws
            asked = design.quantities()
            if part == "floor":
                asked["E, were it given"] = asked["E"]  # what the refusal of E is judged by
            found = cover(design, studies, draws=draws, method=method, quantities=asked)
            show(found, time.process_time() - begin)
            rows.append(found.to_dict())
            out[part] = rows
            args.out.write_text(json.dumps(out, indent=1).replace("NaN", "null") + "\n")
    print(args.out)


if __name__ == "__main__":
    main()
