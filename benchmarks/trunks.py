"""Trunk and branch against independent runs: FLOPs, wall time and the bias of the loss, all from real runs.

    python benchmarks/trunks.py [--jobs 2] [--seeds 3] [--smallest 36] [--out FILE]

5 sizes x 8 budgets spaced by 1.5 on the built-in world. Trunk and branch: one trunk at constant learning rate, and a
cool-down over the last 20 % of each budget. Independent: each budget trained from the same weights on the same data in
the same order, with the warm-up that the study's rule (10 % of the smallest budget) gives to this budget alone; a trunk
must use the one of its smallest budget for all. So at the smallest budget both must agree to the bit (checked), and at
the others the difference is what sharing a trunk does to the loss.

Floor: (0.8 D_max + 0.2 sum D) / sum D = 47.7 %. Wall time is that of the calls: start, data, updates, checkpoints,
evaluation. An independent run is executed in two parts (the loop has no other way to cool down), and what the handover
between them cost is measured and taken off. Cells (size, seed) run in `--jobs` processes of one thread, and every
second one starts with the independent runs. Bias: branch minus independent validation loss (mean over domains, nats per
target) over all budgets but the smallest; its 95 % interval is Student's t over cells, since the branches of a cell
share its luck. Targets: at most 50 % of the FLOPs and 55 % of the wall time. Exit status 1 where one is missed.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from scipy import stats

sys.path.insert(0, str(Path(__file__).parent))
from common import RESULTS, as_worker, save

from isofusion.config import DataConfig, ModelConfig, RunConfig, SourceConfig, TrainConfig
from isofusion.data.stream import Stream
from isofusion.train.loop import train_run

SPACING, WARMUP_SHARE, COOLDOWN = 1.5, 0.1, 0.2
TARGET_FLOPS, TARGET_WALL = 0.50, 0.55


@dataclass(frozen=True)
class Ladder:
    """What is trained: widths, budgets in steps, seeds."""

    widths: tuple[int, ...] = (16, 24, 32, 40, 48)
    budgets: int = 8
    smallest: int = 36  # steps of the smallest budget
    seeds: int = 3
    depth: int = 2
    rows: int = 4  # a step
    row_len: int = 256
    val_rows: int = 16  # of each domain

    def steps(self) -> list[tuple[int, int]]:
        """(fork, end) of each budget, as the study rounds them."""
        ends = [round(self.smallest * SPACING**k) for k in range(self.budgets)]
        return [(round((1 - COOLDOWN) * end), end) for end in ends]

    def floor(self) -> float:
        """Share of the updates of independent runs that trunk and branches make."""
        steps = self.steps()
        return (steps[-1][0] + sum(end - fork for fork, end in steps)) / sum(end for _, end in steps)

    def data(self) -> DataConfig:
        weights = {"caption": 45, "interleaved": 45, "text": 10}
        sources = tuple(SourceConfig(name=d, domain=d, format="world", weight=w) for d, w in weights.items())
        return DataConfig(
            sources=sources, row_len=self.row_len, image_size=48, patch_size=8, val_rows=self.val_rows, val_seed=1
        )

    def runs(self, width: int, seed: int, name: str, points: list[tuple[int, int]]) -> list[RunConfig]:
        """A trunk and a branch for each (fork, end) of `points`; the warm-up follows from the first of them."""
        common: dict[str, Any] = {
            "study": "trunks",
            "arm": "early",
            "size": f"w{width}",
            "seed": seed,
            "variant": name,
            "data": self.data(),
            "model": ModelConfig(
                width=width, depth=self.depth, head_dim=width // 2, ffn_multiple=16, vocab_size=512, patch_size=8,
                base_width=32,
            ),
            "train": TrainConfig(
                lr=6e-3, warmup_steps=max(1, int(WARMUP_SHARE * points[0][1])), rows_per_step=self.rows,
                cooldown_share=COOLDOWN, checkpoint_every=10**6, log_every=1, precision="fp32",
            ),
        }  # fmt: skip
        forks = tuple(fork for fork, _ in points)
        trunk = RunConfig(**common, kind="trunk", end_step=forks[-1], forks=forks)
        tail = {"kind": "branch", "parent": trunk.name}
        return [trunk] + [RunConfig(**common, **tail, start_step=fork, end_step=end) for fork, end in points]


@dataclass
class Timed:
    """One call of train_run: seconds, and those before its first and after its last update."""

    seconds: float
    before: float
    after: float


def timed(config: RunConfig, root: Path) -> Timed:
    """Train a run to its end."""
    updates: list[float] = []

    def event(record: dict[str, Any]) -> None:
        if record["phase"] == "train":
            updates.append(time.perf_counter())

    begin = time.perf_counter()
    status = train_run(config, root / config.name, root, threads=1, on_event=event)
    end = time.perf_counter()
    if status != "done":
        raise RuntimeError(f"{config.name} ended as {status}")
    first = json.loads((root / config.name / "metrics.jsonl").read_text().split("\n", 1)[0])["wall"]
    return Timed(end - begin, updates[0] - first - begin, end - updates[-1])


def loss_and_flops(root: Path, config: RunConfig) -> tuple[float, float]:
    """Validation loss (mean over domains; nan for a trunk), and training FLOPs since step 0."""
    folder = root / config.name
    flops = float(json.loads((folder / "flops.json").read_text())["flops"]["total"])
    path = folder / "eval.json"
    return (float(json.loads(path.read_text())["mean"]) if path.exists() else math.nan), flops


def shared(ladder: Ladder, width: int, seed: int, root: Path) -> dict[str, Any]:
    """One trunk with all its branches."""
    runs = ladder.runs(width, seed, "", ladder.steps())
    times = [timed(run, root).seconds for run in runs]
    ends = [loss_and_flops(root, run) for run in runs]
    return {"seconds": sum(times), "trunk_flops": ends[0][1], "ends": ends[1:]}


def alone(ladder: Ladder, width: int, seed: int, root: Path) -> dict[str, Any]:
    """One run for each budget. `forks`: FLOPs from step 0 to each fork."""
    seconds = handover = 0.0
    ends, forks = [], []
    for k, point in enumerate(ladder.steps()):
        trunk, branch = ladder.runs(width, seed, f"alone{k}", [point])
        first, second = timed(trunk, root), timed(branch, root)
        seconds += first.seconds + second.seconds
        handover += first.after + second.before
        ends.append(loss_and_flops(root, branch))
        forks.append(loss_and_flops(root, trunk)[1])
    return {"seconds": seconds - handover, "handover_seconds": handover, "ends": ends, "forks": forks}


def cell(ladder: Ladder, width: int, seed: int, alone_first: bool) -> dict[str, Any]:
    """Both ways for one size and seed, in a folder that is thrown away."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for run in ladder.runs(width, seed, "warm", [(1, 2)]):  # what a process pays once (the world, torch) is no cost
            timed(run, root)
        order = (alone, shared) if alone_first else (shared, alone)
        results = {way.__name__: way(ladder, width, seed, root) for way in order}
    one, many = results["shared"], results["alone"]
    own = [end - fork for (_, end), fork in zip(one["ends"], many["forks"], strict=True)]
    return {
        "width": width,
        "seed": seed,
        "seconds_shared": one["seconds"],
        "seconds_alone": many["seconds"],
        "handover_seconds": many["handover_seconds"],
        "flops_shared": one["trunk_flops"] + sum(own),
        "flops_alone": sum(end for _, end in many["ends"]),
        "loss_shared": [loss for loss, _ in one["ends"]],
        "loss_alone": [loss for loss, _ in many["ends"]],
    }


def bias(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean of branch minus independent loss over the budgets above the smallest, in nats, with its interval."""
    differences = [
        [a - b for a, b in zip(c["loss_shared"], c["loss_alone"], strict=True)] for c in cells
    ]  # [cell][budget]
    means = [statistics.mean(row[1:]) for row in differences]
    out: dict[str, Any] = {
        "nats": statistics.mean(means),
        "by_budget": [statistics.mean(column) for column in zip(*differences, strict=True)],
        "largest_at_smallest_budget": max(abs(row[0]) for row in differences),
    }
    if len(means) > 1:
        half = stats.t.ppf(0.975, len(means) - 1) * statistics.stdev(means) / math.sqrt(len(means))
        out["interval"] = [out["nats"] - half, out["nats"] + half]
    # over seeds at equal size and budget, pooled
    by_size: dict[tuple[int, int], list[float]] = {}
    for c in cells:
        for k, loss in enumerate(c["loss_alone"]):
            by_size.setdefault((c["width"], k), []).append(loss)
    variances = [statistics.variance(losses) for losses in by_size.values() if len(losses) > 1]
    out["seed_deviation"] = math.sqrt(statistics.mean(variances)) if variances else None
    return out


def summary(ladder: Ladder, cells: list[dict[str, Any]]) -> dict[str, Any]:
    def share(what: str, chosen: list[dict[str, Any]]) -> float:
        return sum(c[f"{what}_shared"] for c in chosen) / sum(c[f"{what}_alone"] for c in chosen)

    by_width = {w: [c for c in cells if c["width"] == w] for w in ladder.widths}
    out: dict[str, Any] = {
        "floor": ladder.floor(),
        "flops_share": share("flops", cells),
        "wall_share": share("seconds", cells),
        "wall_share_by_width": {w: share("seconds", chosen) for w, chosen in by_width.items()},
        "bias": bias(cells),
    }
    out["met"] = out["flops_share"] <= TARGET_FLOPS and out["wall_share"] <= TARGET_WALL
    return out


def show(ladder: Ladder, result: dict[str, Any]) -> None:
    print(f"{'':24s} {'share':>7s} {'floor':>7s} {'over it':>8s} {'target':>7s}")
    for name, key, target in (("FLOPs", "flops_share", TARGET_FLOPS), ("wall time", "wall_share", TARGET_WALL)):
        over = result[key] / result["floor"] - 1
        print(f"{name:24s} {result[key]:7.1%} {result['floor']:7.1%} {over:8.1%} {target:7.0%}")
    for width, share in result["wall_share_by_width"].items():
        print(f"{f'  wall time, width {width}':24s} {share:7.1%}")
    b = result["bias"]
    low, high = b.get("interval", (math.nan, math.nan))
    print(f"branch minus independent: {b['nats']:+.5f} nats (95 % {low:+.5f} to {high:+.5f})")
    print("  by budget: " + " ".join(f"{value:+.5f}" for value in b["by_budget"]))
    print(f"  same schedule (smallest budget): at most {b['largest_at_smallest_budget']:g}")
    if b["seed_deviation"] is not None:
        print(f"  standard deviation over seeds, for comparison: {b['seed_deviation']:.5f} nats")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", default=",".join(map(str, Ladder().widths)))
    for name in ("budgets", "smallest", "seeds", "depth", "val-rows"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Ladder(), name.replace("-", "_")))
    parser.add_argument("--jobs", type=int, default=2, help="processes of one thread; at most the cores")
    parser.add_argument("--out", type=Path, default=RESULTS / "trunks.json")
    args = parser.parse_args(argv)
    widths = tuple(int(text) for text in args.widths.split(","))
    ladder = Ladder(widths, args.budgets, args.smallest, args.seeds, args.depth, val_rows=args.val_rows)
    begin = time.perf_counter()
    for seed in range(ladder.seeds):  # the world's blocks are generated before anything is timed
        stream = Stream(ladder.data(), seed, "train", ladder.rows)
        for step in range(0, ladder.steps()[-1][1], max(1, 64 // ladder.rows)):
            stream.batch(step)
    print(f"data: {time.perf_counter() - begin:.0f} s", file=sys.stderr)
    todo = [(width, seed) for seed in range(ladder.seeds) for width in reversed(widths)]  # longest first
    jobs = [(ladder, width, seed, bool(i % 2)) for i, (width, seed) in enumerate(todo)]
    cells = []
    if args.jobs == 1:
        cells = [cell(*job) for job in jobs]
    else:
        with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
            for future in [pool.submit(cell, *job) for job in jobs]:
                cells.append(done := future.result())
                print(
                    f"width {done['width']} seed {done['seed']}: {done['seconds_shared']:.1f} s shared, "
                    f"{done['seconds_alone']:.1f} s alone",
                    file=sys.stderr,
                )
    result = summary(ladder, cells)
    show(ladder, result)
    settings = {**vars(ladder), "widths": list(widths), "jobs": args.jobs}
    save(args.out, 1, settings, **result, cells=cells, total_seconds=time.perf_counter() - begin)
    return 0 if result["met"] else 1


if __name__ == "__main__":
    as_worker()
    sys.exit(main())
