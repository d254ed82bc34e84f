"""`isofusion study run --on slurm` and what `study status` shows of it: options and printing, for `cli/study.py`."""

from __future__ import annotations

import enum
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from isofusion.errors import InputError


class Where(enum.StrEnum):
    """What runs a study."""

    local = "local"
    slurm = "slurm"


def _option(help_: str, metavar: str | None = None, default: str | None = None, *names: str) -> Any:
    shown: Any = default if default else False
    return typer.Option(*names, help=help_, metavar=metavar, show_default=shown, rich_help_panel="With --on slurm")


On = Annotated[Where, typer.Option("--on", help="This machine, or the jobs of a SLURM cluster.")]
Partition = Annotated[str | None, _option("Partition of the cluster (needed).", "NAME")]
Time = Annotated[str | None, _option("Time of a job, as for sbatch; a run takes as many as it needs.", "T", "4:00:00")]
Gpus = Annotated[int | None, _option("GPUs of each node; one process per GPU.", "N", "0")]
CpusPerTask = Annotated[int | None, _option("CPUs of each process.", "N", "threads")]
Mem = Annotated[str | None, _option("Memory of each node, e.g. 16G.", "SIZE", "the partition's")]
Nodes = Annotated[int | None, _option("Nodes of each run.", "N", "1")]
ArrayLimit = Annotated[int | None, _option("Runs of the study at a time.", "N", "all")]
Account = Annotated[str | None, _option("Account to charge.", "NAME")]
Qos = Annotated[str | None, _option("Quality of service.", "NAME")]
Constraint = Annotated[str | None, _option("Features that nodes must have.", "LIST")]
Grace = Annotated[int | None, _option("Warning before the time limit, to checkpoint and requeue.", "SECONDS", "120")]
Setup = Annotated[
    list[str] | None, _option("A line of shell before each run, e.g. 'module load cuda'; may be repeated.", "LINE")
]
Sbatch = Annotated[list[str] | None, _option("Any other option of sbatch; may be repeated.", "KEY=VALUE")]
NoReport = Annotated[bool, _option("No last job for the report.", None, None, "--no-report")]
DryRun = Annotated[bool, _option("Print the sbatch scripts; submit and write nothing.", None, None, "--dry-run")]

STATES = {"running": "cyan", "pending": "dim", "requeued": "yellow", "blocked": "bold red", "unknown": "dim"}
"""States that only runs on SLURM have, and the style of their lines."""


@dataclass(frozen=True)
class Study:
    """A study as the command line gave it."""

    spec: Any
    out: Path
    toml: Path
    given: dict[str, Any]  # data and overrides, for the lock


def refuse_local(out: Path, asked: dict[str, Any]) -> None:
    """Raises InputError for SLURM's options without SLURM, and while jobs of this study are queued."""
    if given := [key for key, value in asked.items() if value]:
        raise InputError(f"--{given[0].replace('_', '-')} is for --on slurm")
    from isofusion.study import jobs

    if not jobs.submitted(out):
        return
    try:
        queued = jobs.queue()
    except InputError:  # no SLURM here, so nothing to ask; a run folder in use refuses a second process itself
        return
    if here := [line["job_id"] for line in jobs.submitted(out).values() if line["job_id"] in queued]:
        raise InputError(
            f"{out}: {len(here)} runs of this study are jobs in SLURM's queue ({here[0]}); wait for them, or cancel "
            f"them with scancel"
        )


def run(
    study: Study,
    asked: dict[str, Any],
    jobs: int | None,
    threads: int | None,
    *,
    resume: bool,
    dry_run: bool,
    report: bool,
) -> bool:
    """Submit the study, or print its scripts. True when every run is done already and the report can be made here."""
    from isofusion.study import slurm
    from isofusion.study.estimate import fits
    from isofusion.study.lock import LOCK, check_lock, read_lock, write_lock
    from isofusion.study.run import prepare

    spec, out = study.spec, study.out.absolute()
    locked = (out / LOCK).exists()
    if jobs is not None:
        raise InputError("--jobs is for this machine; on SLURM the number of runs at a time is --array-limit")
    if not asked.get("partition"):
        raise InputError("--on slurm needs --partition NAME; `sinfo -s` lists the partitions of the cluster")
    threads = threads or (read_lock(out)["threads"] if locked else asked["cpus_per_task"] or 1)
    values = {key: value for key, value in asked.items() if value is not None}
    lists = {key: tuple(values.pop(key, None) or ()) for key in ("setup", "sbatch")}
    request = slurm.Request(**{"cpus_per_task": threads, **values, **lists})
    request.check(threads)
    if not dry_run:
        slurm.check_commands()
    if locked:
        check_lock(out, spec)
    memory = slurm.bytes_of(request.mem) if request.mem and not request.gpus else float("inf")
    if not (out / "runs").exists() and (problems := fits(spec, out, 1, memory)):
        raise InputError(f"{spec.name} does not fit: " + "; ".join(problems))
    if dry_run:
        _print_scripts(slurm.scripts(spec, out, request, threads, queued=_queued(spec, out), report=report))
        return False
    if not locked or not (out / "runs").exists():
        for note in prepare(spec):
            print(f"note: {note}", file=sys.stderr)
    write_lock(
        out,
        spec,
        toml=study.toml,
        jobs=request.array_limit or len(spec.runs()),
        threads=threads,
        **study.given,
    )
    prepare(spec, out)  # all is read by now: holds the data to what the study began with
    words = ["isofusion", "study", "run", str(study.toml), "--out", str(study.out), "--on", "slurm"]
    for key, value in asked.items():
        for one in value if isinstance(value, list) else [] if value is None else [value]:
            words += [f"--{key.replace('_', '-')}", str(one)]
    words += ["--resume"] if report else ["--no-report", "--resume"]
    done = slurm.submit(spec, out, request, threads, resume=resume, report=report, command=shlex.join(words))
    return _print_submission(study, done)


def _queued(spec: Any, out: Path) -> dict[str, str]:
    """What a dry run leaves out: queued runs, as far as SLURM can be asked."""
    from isofusion.study import slurm

    try:
        return slurm.in_queue(spec, out)[0]
    except InputError as error:
        print(f"note: {error}; the scripts below leave out only what is done", file=sys.stderr)
        return {}


def _print_scripts(scripts: list[tuple[str, list[str], str]]) -> None:
    for number, (title, runs, text) in enumerate(scripts, 1):
        names = f": {', '.join(runs)}" if runs else ""
        print(f"# ---- {number} of {len(scripts)}: {title}{names}")
        print(text)
    print("# nothing was submitted; TRUNKS and JOBn stand for the ids of the first and the nth script", file=sys.stderr)


def _print_submission(study: Study, done: Any) -> bool:
    if done.done == done.total:
        return True
    for trunk in done.reopened:
        print(f"{trunk}: a checkpoint that an unfinished branch starts from is gone; it is trained again from there")
    for array in done.arrays:
        first, last = array.ids[0], array.ids[-1]
        ids = first if first == last else f"{first} to {last}"
        count = f"{len(array.runs)} run" + ("s" if len(array.runs) > 1 else "")
        print(f"{array.title}: {count}, job {ids}" + (f", {array.after}" if array.after else ""))
    if done.report:
        print(f"report: job {done.report}, after all of them")
    if done.note:
        print(f"note: {done.note}", file=sys.stderr)
    sent = sum(len(array.runs) for array in done.arrays)
    print(f"{sent} runs submitted, {len(done.queued)} were queued already, {done.done} of {done.total} are done")
    print(f"follow them: isofusion study status {shlex.quote(str(study.out))}")
    return False


def job_states(out: Path, spec: Any, ledger: Any) -> tuple[dict[str, dict[str, Any]], str | None]:
    """(run -> its row of the ledger's table `jobs`, brought up to date; a note for the reader)."""
    from isofusion.study import jobs

    rows, trouble = jobs.states(out, spec)
    if not rows:
        return {}, None
    ledger.write_jobs(rows)
    return {row["run"]: row for row in rows}, f"the queue could not be asked: {trouble}" if trouble else None


def add_job(row: dict[str, Any], job: dict[str, Any] | None) -> None:
    """Put a job's id and state into a row of `study status`; what the run folder says of an unknown job stays."""
    if job is None:
        return
    row["job"] = job["job_id"]
    if job["state"] != "unknown":
        row["state"] = job["state"]
        row.pop("message", None)
    if job["message"]:
        row["message"] = job["message"]
