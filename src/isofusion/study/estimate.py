"""What a study will cost, before it is paid: runs, N, D, FLOPs, epochs, time, memory, disk (docs/study-file.md).

FLOPs come from the ledger in `model.count`, at the realised shape of packed rows where the data is here, else at the
paper's image share. Time comes from a short probe (a few real steps of every arm at its smallest and largest size, as
many at once as the study will run, interpolated in log-log by FLOPs per step) or from an assumed throughput.
"""

from __future__ import annotations

import heapq
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from isofusion.config import RunConfig
from isofusion.errors import InputError, RunFailure
from isofusion.processors import cores
from isofusion.study.lock import versions, write_atomic
from isofusion.study.pool import TRAIN, Pool
from isofusion.study.progress import Progress, size
from isofusion.study.spec import StudySpec

NOMINAL_IMAGE_SHARE = 0.544  # of the tokens of the paper's mixture (arXiv 2504.07951)
ASSUMED_FLOPS = 2e10  # per second and thread, a small model on a CPU core, without a probe
GPU_FLOPS = 0.4 * 989e12  # one H100 at 40 % of its dense bf16 peak
GPU_STUDY = 1e18  # FLOPs of a study that no CPU will run: costed in H100 time
SHAPE_ROWS = 64  # rows whose realised shape stands for the stream
PROBE_STEPS = 8
PROBE_SKIP = 3  # the first steps pay for allocation
WORKER_BYTES = 450e6  # a worker with torch loaded, before any model
BF16_BYTES = 300e6  # more on a CPU in bf16: the kernels oneDNN compiled, a heap in more pieces (measured at width 256)
START_SECONDS = 4.0  # per worker: importing torch, opening the data
EVAL_PASSES = 3  # true, blind and shuffled image, forward only: a third of a training step each
BYTES_PER_PARAMETER = 12  # of a checkpoint: fp32 weights and two moments
EPOCHS_WARN = 4.0


@dataclass
class Estimate:
    """Rows are dicts with the columns of `RunRow` order; everything is JSON-able."""

    rows: list[dict[str, Any]]
    sources: list[dict[str, Any]]
    totals: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)  # why it does not fit here; empty = it fits
    data_here: bool = True

    def as_json(self) -> dict[str, Any]:
        return {
            "fits": not self.problems,
            "problems": self.problems,
            "totals": self.totals,
            "notes": self.notes,
            "sources": self.sources,
            "runs": self.rows,
        }


@dataclass(frozen=True)
class RowShape:
    """Mean of one packed row: text and image tokens, images, targets, attended pairs."""

    text_tokens: float
    image_tokens: float
    images: float
    targets: float
    attention_pairs: float

    @property
    def tokens(self) -> float:
        return self.text_tokens + self.image_tokens

    @property
    def image_share(self) -> float:
        return self.image_tokens / self.tokens


def data_is_here(spec: StudySpec) -> bool:
    """True when the study's data can be read: the world always, files when a folder is set."""
    return spec.data.folder is not None or all(source.format == "world" for source in spec.data.sources)


def nominal_shape(spec: StudySpec) -> RowShape:
    """A full row at the paper's image share, one document long (an upper bound for attention)."""
    slots = spec.data.row_len
    images = NOMINAL_IMAGE_SHARE * slots / spec.data.patches_per_image
    text = (1 - NOMINAL_IMAGE_SHARE) * slots
    return RowShape(text, NOMINAL_IMAGE_SHARE * slots, images, text, slots * (slots + 1) / 2)


def measured_shape(spec: StudySpec, stream: Any, rows_per_step: int) -> RowShape:
    """Mean shape over the first rows of the stream."""
    from isofusion.model.count import batch_shape

    steps = max(1, -(-SHAPE_ROWS // rows_per_step))
    shapes = [batch_shape(stream.batch(step)) for step in range(steps)]
    names = RowShape.__dataclass_fields__
    return RowShape(**{name: float(sum(getattr(s, name) for s in shapes)) / (steps * rows_per_step) for name in names})


def step_flops(run: RunConfig, shape: RowShape) -> float:
    """Training FLOPs of one optimizer step of a run, from the exact ledger."""
    from isofusion.model.count import BatchShape, flops

    rows = 1024 * run.train.rows_per_step  # rounding to whole images and tokens loses nothing at this size
    images = round(shape.images * rows)
    whole = BatchShape(
        text_tokens=round(shape.text_tokens * rows),
        image_tokens=images * run.data.patches_per_image,
        images=images,
        targets=round(shape.targets * rows),
        attention_pairs=round(shape.attention_pairs * rows),
    )
    total = flops(run.model, whole)
    return float(total["total"]) / 1024


def estimate(
    spec: StudySpec,
    *,
    out: Path,
    jobs: int,
    threads: int,
    probe: bool = True,
    console: Console | None = None,
    train: str = TRAIN,
) -> Estimate:
    """Cost of the whole study. Raises InputError for data that cannot be read."""
    from isofusion.model.count import count_parameters, six_nd

    runs, here = spec.runs(), data_is_here(spec)
    notes = spec.notes()
    longest = max(runs, key=lambda run: run.end_step * run.train.rows_per_step)
    if here:
        from isofusion.data import ahead
        from isofusion.data.stream import Stream

        ahead.index(spec.data, ("train",), cores())
        stream = Stream(spec.data, spec.seeds[0], "train", longest.train.rows_per_step)
        shape = measured_shape(spec, stream, longest.train.rows_per_step)
        sources = _sources(stream.report(longest.end_step))
    else:
        shape, sources = nominal_shape(spec), []
        notes.append(
            f"the data is not here (no --data): FLOPs at a nominal image share of {NOMINAL_IMAGE_SHARE}, "
            f"rows full, and no epochs"
        )
    off: dict[int, float] = {}  # worst rounding by slots of a step
    for run in runs:
        slots, wanted = spec.slots_per_step(run.train), run.budget_tokens
        if wanted is not None and run.end_step * slots != wanted:
            off[slots] = max(off.get(slots, 0.0), abs(run.end_step * slots / wanted - 1))
    if off:
        steps, worst = " or ".join(f"{slots:,}" for slots in sorted(off)), max(off.values())
        notes.append(f"budgets are rounded to whole steps of {steps} slots (by {100 * worst:.2g} % at most)")
    if spec.assumed:
        notes.append(f"assumed: {spec.assumed}")

    rows: list[dict[str, Any]] = []
    memory: list[float] = []
    disk = 0.0
    for run in runs:
        counts = count_parameters(run.model)
        per_step = run.train.rows_per_step
        own, whole = run.end_step - run.start_step, run.end_step
        tokens = whole * per_step * shape.tokens
        step = step_flops(run, shape)
        memory.append(_memory(run))
        kept = len(run.forks) + 2 if run.kind == "trunk" else 2
        disk += kept * BYTES_PER_PARAMETER * counts.n_total
        rows.append(
            {
                "run": run.name,
                "kind": run.kind,
                "arm": run.arm,
                "size": run.size,
                "n": counts.n_active if run.model.n_experts else counts.n_total,
                "n_total": counts.n_total,
                "budget": run.budget_tokens,
                "steps": own,
                "tokens": tokens,
                "flops": whole * step,
                "flops_6nd": float(six_nd(run.model, tokens, shape.image_share)),
                "own_flops": own * step,
                "memory": memory[-1],
            }
        )
    problems = _limits(memory, disk, out, jobs)
    per_step_seconds: Callable[[RunConfig, float], float]
    if probe and here and not problems and installed("torch"):
        per_step_seconds = _probed(spec, shape, jobs=jobs, threads=threads, console=console, train=train)
        basis = "from a probe"
    else:
        big = sum(row["own_flops"] for row in rows) > GPU_STUDY
        speed = GPU_FLOPS if big else ASSUMED_FLOPS * threads
        per_step_seconds = lambda run, step: step / speed  # noqa: E731
        basis = "one H100 at 40 % of its peak" if big else f"assuming {ASSUMED_FLOPS / 1e9:g} GFLOP/s a thread"
        why = "" if installed("torch") else " (it needs torch: pip install 'isofusion[train]')"
        notes.append(f"no probe was run{why}, so times are only FLOPs over an assumed speed")
        if big:
            jobs = 1
    for run, row in zip(runs, rows, strict=True):
        step = per_step_seconds(run, row["own_flops"] / row["steps"])
        evaluation = 0.0
        if run.kind == "branch":
            validated = {source.domain for source in spec.data.sources}.difference(spec.data.unvalidated)
            val_rows = spec.data.val_rows * len(validated)
            evaluation = step * EVAL_PASSES / 3 * val_rows / run.train.rows_per_step
        row["seconds"] = row["steps"] * step + evaluation
    branches = [row for row in rows if row["kind"] == "branch"]
    totals = {
        "runs": len(rows),
        "trunks": len(rows) - len(branches),
        "branches": len(branches),
        "slots_trained": sum(row["steps"] * run.train.rows_per_step for run, row in zip(runs, rows, strict=True))
        * spec.data.row_len,
        "slots_without_branching": sum(row["budget"] for row in branches),
        "flops": sum(row["own_flops"] for row in rows),
        "seconds_of_work": sum(row["seconds"] for row in rows),
        "seconds": schedule(runs, [row["seconds"] for row in rows], jobs),
        "seconds_basis": basis,
        "memory": sum(sorted(memory)[-jobs:]),
        "disk": disk,
        "jobs": jobs,
        "threads": threads,
        "image_share": shape.image_share,
        "row_fill": shape.tokens / spec.data.row_len,
    }
    notes += [
        f'source "{s["name"]}" is read {s["epochs"]:.1f} times by the longest run: beyond {EPOCHS_WARN:g} '
        f"epochs repeated data is worth less"
        for s in sources
        if s["epochs"] is not None and s["epochs"] > EPOCHS_WARN
    ]
    notes += [f"source {s['name']}: {leak}" for s in sources for leak in s.get("leaks", ())]
    return Estimate(rows, sources, totals, notes, problems, here)


def installed(package: str) -> bool:
    """Whether a package can be imported; a plan must do without those of the [train] extra."""
    return importlib.util.find_spec(package) is not None


def schedule(runs: list[RunConfig], seconds: list[float], jobs: int) -> float:
    """Wall time of the pool's own rule: the ready run with the longest chain goes to the first free job.

    A branch is ready when its trunk has reached the fork.
    """
    cost = {run.name: value for run, value in zip(runs, seconds, strict=True)}
    by_name = {run.name: run for run in runs}
    chain = {n: cost[n] + max((cost[o.name] for o in runs if o.parent == n), default=0.0) for n in cost}
    waiting = sorted(cost, key=lambda name: -chain[name])
    free = [START_SECONDS] * jobs
    heapq.heapify(free)
    begun: dict[str, float] = {}

    def ready_at(name: str) -> float:
        run = by_name[name]
        if run.parent is None:
            return 0.0
        if run.parent not in begun:
            return float("inf")
        return begun[run.parent] + cost[run.parent] * run.start_step / by_name[run.parent].end_step

    end = 0.0
    while waiting:
        now = heapq.heappop(free)
        ready = [name for name in waiting if ready_at(name) <= now]
        if not ready:
            heapq.heappush(free, max(now, min(ready_at(name) for name in waiting)))
            continue
        waiting.remove(ready[0])
        begun[ready[0]] = now
        heapq.heappush(free, now + cost[ready[0]])
        end = max(end, now + cost[ready[0]])
    return end


def _sources(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Name, epochs (None for the endless world), unique tokens and any leaks of each source, from a stream's report."""
    found = report["sources"]
    items = found.items() if isinstance(found, dict) else [(source["name"], source) for source in found]
    return [
        {"name": name, "epochs": source.get("epochs"), "unique_tokens": source.get("unique_tokens")}
        | ({"leaks": source["leaks"]} if source.get("leaks") else {})
        for name, source in items
    ]


def _memory(run: RunConfig) -> float:
    """Bytes of one job: its worker and the model with its activations; what is not known (precision "auto", whether
    there is a compiler for native.py) is counted as what needs more.
    """
    from isofusion.model.memory import memory_bytes
    from isofusion.study.gpu import HOST_BYTES, gpu_bytes

    if gpu_bytes() is not None:  # the model is on the GPU, whose memory gpu_split shares out
        return HOST_BYTES
    slots = run.train.rows_per_step * run.data.row_len
    asked = run.train.precision
    return WORKER_BYTES + max(
        memory_bytes(run.model, slots, precision, native=native)["total"] + (BF16_BYTES if precision == "bf16" else 0.0)
        for precision in (("fp32", "bf16") if asked == "auto" else (asked,))
        for native in (True, False)
    )


def _limits(memory: list[float], disk: float, out: Path, jobs: int) -> list[str]:
    problems = []
    have, need = available_memory(), sum(sorted(memory)[-jobs:])
    if need > have:
        problems.append(
            f"memory: {jobs} jobs need up to {size(need)} and {size(have)} are free; "
            f"use fewer --jobs, smaller sizes or fewer train.rows_per_step"
        )
    folder = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    free = shutil.disk_usage(folder).free
    if disk > free:
        problems.append(
            f"disk: checkpoints need up to {size(disk)} and {size(free)} are free in {folder}; choose another --out"
        )
    return problems


def fits(spec: StudySpec, out: Path, jobs: int, memory_of_a_job: float | None = None) -> list[str]:
    """Why the study cannot run here (memory of the largest jobs together, disk for its checkpoints); [] if it can.

    With `memory_of_a_job` (bytes; infinity if not known) each run has that much to itself, on another machine.
    """
    from isofusion.model.count import count_parameters

    memory, disk = [], 0.0
    for run in spec.runs():
        memory.append(_memory(run))
        kept = len(run.forks) + 2 if run.kind == "trunk" else 2
        disk += kept * BYTES_PER_PARAMETER * count_parameters(run.model).n_total
    if memory_of_a_job is None:
        return _limits(memory, disk, out, jobs)
    problems = _limits([], disk, out, jobs)
    if max(memory) > memory_of_a_job:
        problems.append(
            f"memory: the largest run needs up to {size(max(memory))} and a job gets "
            f"{size(memory_of_a_job)}; raise --mem, or use fewer train.rows_per_step"
        )
    return problems


def available_memory() -> float:
    """Free memory in bytes."""
    try:
        import psutil

        return float(psutil.virtual_memory().available)
    except ImportError:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def _probe_cache() -> Path:
    root = os.environ.get("ISOFUSION_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "isofusion") / "probes.json"


class _Quiet(Progress):
    """No output: a probe is not a study."""

    def line(self, text: str) -> None:
        pass


def _probed(
    spec: StudySpec, shape: RowShape, *, jobs: int, threads: int, console: Console | None, train: str
) -> Callable[[RunConfig, float], float]:
    """Seconds per step as a function of (run, FLOPs per step), from measured steps of each arm's end sizes."""
    probes: dict[str, RunConfig] = {}
    ends: dict[str, list[str]] = {}
    for arm in spec.arms:
        for end in {item.name: item for item in (arm.sizes[0], arm.sizes[-1])}.values():
            run = RunConfig(
                study=spec.name,
                arm=arm.name,
                size=end.name,
                seed=spec.seeds[0],
                variant="probe",
                kind="trunk",
                end_step=PROBE_STEPS,
                forks=(PROBE_STEPS,),
                model=end.model,
                data=spec.data.model_copy(update={"val_rows": 1}),
                train=end.train.model_copy(update={"checkpoint_every": 10 * PROBE_STEPS}),
            )
            probes[run.name] = run
            ends.setdefault(arm.name, []).append(run.name)
    machine = [jobs, threads, cores(), versions()["torch"], os.uname().machine]
    keys = {name: json.dumps([run.digest(), *machine]) for name, run in probes.items()}
    path = _probe_cache()
    try:
        known: dict[str, float] = json.loads(path.read_text())
    except (OSError, ValueError):
        known = {}
    missing = {name: run for name, run in probes.items() if keys[name] not in known}
    if missing:
        if console is not None:
            console.print(f"probing {len(missing)} models for {PROBE_STEPS} steps each …", highlight=False)
        with tempfile.TemporaryDirectory(prefix="isofusion-probe-") as folder:
            root = Path(folder)
            quiet = _Quiet(missing, set(), Console(quiet=True))
            pool = Pool(missing, root / "runs", root / "logs", jobs, threads, quiet, train=train)
            pool.go()
            if pool.signum is not None:
                raise KeyboardInterrupt
            for name, (kind, message) in pool.failed.items():
                raise (InputError if kind == "input" else RunFailure)(f"probe of {name}: {message}")
            for name in missing:
                lines = (root / "runs" / name / "metrics.jsonl").read_text().splitlines()
                walls = [json.loads(line)["wall"] for line in lines][PROBE_SKIP:]
                known[keys[name]] = float(np.median(walls))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(known, indent=1))

    def seconds(run: RunConfig, flops: float) -> float:
        points = sorted((step_flops(probes[name], shape), known[keys[name]]) for name in ends[run.arm])
        (small, t0), (large, t1) = points[0], points[-1]
        if large <= small:
            return t1
        slope = np.log(t1 / t0) / np.log(large / small)
        return float(t0 * (flops / small) ** max(0.0, slope))

    return seconds
