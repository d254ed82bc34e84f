"""`isofusion study estimate | lock | run | status | report`: parsing and printing; the work is in `isofusion.study`."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import sys
import tomllib
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from isofusion.cli import slurm
from isofusion.cli.second import second_process
from isofusion.errors import InputError
from isofusion.study.progress import duration, make_progress, si, size

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode="rich", context_settings={"help_option_names": ["-h", "--help"]}
)

Toml = Annotated[Path, typer.Argument(metavar="STUDY.toml", help="The study's file; ready ones are in studies/.")]
Folder = Annotated[Path, typer.Argument(metavar="OUT", help="The study's folder (or its .toml).")]
Out = Annotated[Path | None, typer.Option(help="Folder of the study.", show_default="runs/NAME")]
Data = Annotated[Path | None, typer.Option(help="Folder that the study's file patterns start from.")]
Jobs = Annotated[int | None, typer.Option(help="Runs at a time.", show_default="cores / threads")]
Threads = Annotated[int | None, typer.Option(help="Threads of each run.", show_default="1, or as locked")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one setting: train.lr=0.01")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def _load(toml: Path, out: Path | None, data: Path | None, sets: list[str] | None) -> tuple[Any, Path, dict[str, Any]]:
    """(spec, out, data and overrides for the lock). On a locked study, --data and --set need not be given again."""
    from isofusion.study.lock import refused_since

    try:
        return _read(toml, out, data, sets)
    except InputError as error:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # a file that does not read as far as that
            out = out or Path("runs") / tomllib.loads(toml.read_text(encoding="utf-8-sig"))["study"]["name"]
        raise InputError(f"{error}{refused_since(out) if out else ''}") from None


def _read(toml: Path, out: Path | None, data: Path | None, sets: list[str] | None) -> tuple[Any, Path, dict[str, Any]]:
    from isofusion.study.lock import LOCK, given_folder, read_lock, spelled_as_locked
    from isofusion.study.spec import StudySpec

    overrides = list(sets or ())
    if out is None:
        out = Path("runs") / StudySpec.from_toml(toml, data=data, overrides=overrides).name
    if os.path.exists(out) and not out.is_dir():  # unlike Path.exists it is False, no error, in a closed folder
        raise InputError(f"--out {out}: this is a file, and a study needs a folder; choose another")
    lock = read_lock(out) if os.path.exists(out / LOCK) else None
    if lock is not None:
        overrides = overrides or list(lock.get("overrides", ()))
        data = data or given_folder(lock)
        if data == given_folder(lock) and data is not None and not data.is_dir():
            where = f" in {lock['cwd']}" if "cwd" in lock else ""
            raise InputError(
                f"{out}: the study was locked with data folder {data}{where}, and there is no such folder here: run "
                f"the command there, or put the data back"
            )
    given: dict[str, Any] = {"data": data, "overrides": overrides}
    spec = StudySpec.from_toml(toml, **given)
    return spec if lock is None else spelled_as_locked(lock, spec), out, given


def _refuse_unwritable(out: Path) -> None:
    """Before the data is read, which may take hours."""
    there = next(path for path in (out.absolute(), *out.absolute().parents) if os.path.exists(path))
    if not there.is_dir():
        raise InputError(f"--out {out}: {there} is a file, and a study needs a folder; choose another --out")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"--out {out}: no right to write in {there}; choose another --out")


def _folder(target: Path, out: Path | None) -> Path:
    """The study folder a verb means: --out, a folder, or the default folder of a .toml."""
    from isofusion.study.spec import StudySpec

    if out is not None or target.is_dir():
        return out or target
    if target.suffix == ".toml":
        return Path("runs") / StudySpec.from_toml(target).name
    raise InputError(f"{target}: no such study folder")


@app.command("estimate")
def estimate_command(
    toml: Toml,
    out: Out = None,
    data: Data = None,
    jobs: Jobs = None,
    threads: Threads = None,
    sets: Set = None,
    probe: Annotated[bool, typer.Option(help="Time a few real steps, or assume a throughput.")] = True,
    as_json: Json = False,
) -> None:
    """What a study will cost, run by run: N, D, FLOPs, time, memory. Exit code 2: probed, and it does not fit here."""
    from isofusion.study.estimate import estimate
    from isofusion.study.split import choose_split

    spec, out, _ = _load(toml, out, data, sets)
    console = Console(stderr=True)
    split = choose_split(spec, out, jobs=jobs, threads=threads, probe=probe, console=console)
    found = estimate(spec, out=out, jobs=split.jobs, threads=split.threads, probe=probe, console=console)
    found.notes += split.notes
    if as_json:
        print(json.dumps(found.as_json(), indent=1))
    else:
        _print_estimate(spec, found)
    if found.problems and probe and found.data_here:
        raise InputError("the study does not fit this machine: " + "; ".join(found.problems))


def _print_estimate(spec: Any, found: Any) -> None:
    totals, console = found.totals, Console()
    console.width = max(100, console.width)  # in a narrower terminal lines wrap; no column disappears
    table = Table(title=spec.title or spec.name, title_justify="left", box=None, padding=(0, 1))
    table.add_column("run", no_wrap=True)
    for column in ("N", "D", "steps", "C exact", "C 6ND", "time", "memory"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in found.rows:
        table.add_row(
            *(row["run"], si(row["n"]), si(row["tokens"]), f"{row['steps']:,}", f"{row['flops']:.2e}"),
            *(f"{row['flops_6nd']:.2e}", duration(row["seconds"]), size(row["memory"])),
            style="dim" if row["kind"] == "trunk" else None,
        )
    console.print(table)
    console.print("C is a run's whole training, trunk included; steps and time are its own.", style="dim")
    for source in found.sources:
        epochs = "endless" if source["epochs"] is None else f"{source['epochs']:.2f} epochs in the longest run"
        console.print(f"source {source['name']}: {epochs}", highlight=False)
    lines = [
        f"{totals['runs']} runs: {totals['trunks']} trunks and {totals['branches']} branches",
        f"{si(totals['slots_trained'])} token slots to train (each budget from scratch: "
        f"{si(totals['slots_without_branching'])})",
        f"{totals['flops']:.3e} FLOPs; image tokens {100 * totals['image_share']:.1f} %, rows "
        f"{100 * totals['row_fill']:.1f} % full",
        f"time: about {duration(totals['seconds'])} with {totals['jobs']} jobs x {totals['threads']} threads "
        f"({totals['seconds_basis']})",
        f"memory: up to {size(totals['memory'])}; disk: up to {size(totals['disk'])}",
    ]
    for line in lines + [f"note: {note}" for note in found.notes]:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    for problem in found.problems:
        console.print(f"does not fit here: {problem}", style="bold red", highlight=False, markup=False, soft_wrap=True)


@app.command("lock")
def lock_command(
    toml: Toml, out: Out = None, data: Data = None, jobs: Jobs = None, threads: Threads = None, sets: Set = None
) -> None:
    """Fix runs, hold-out, metric and exclusions before training, in OUT/study.lock."""
    from isofusion.study.lock import LOCK, write_lock
    from isofusion.study.split import choose_split

    spec, out, given = _load(toml, out, data, sets)
    _refuse_unwritable(out)
    for note in spec.notes():
        print(f"note: {note}", file=sys.stderr)
    split = choose_split(spec, out, jobs=jobs, threads=threads, console=Console(stderr=True))
    lock = write_lock(out, spec, toml=toml, jobs=split.jobs, threads=split.threads, **given)
    print(f"{out / LOCK}: {len(lock['runs'])} runs, digest {lock['digest'][:12]}, locked {lock['locked_at']}")


@app.command("run")
def run_command(
    toml: Toml,
    out: Out = None,
    data: Data = None,
    jobs: Jobs = None,
    threads: Threads = None,
    sets: Set = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a study that was begun.")] = False,
    on: slurm.On = slurm.Where.local,
    partition: slurm.Partition = None,
    time: slurm.Time = None,
    gpus: slurm.Gpus = None,
    cpus_per_task: slurm.CpusPerTask = None,
    mem: slurm.Mem = None,
    nodes: slurm.Nodes = None,
    array_limit: slurm.ArrayLimit = None,
    account: slurm.Account = None,
    qos: slurm.Qos = None,
    constraint: slurm.Constraint = None,
    grace: slurm.Grace = None,
    setup: slurm.Setup = None,
    sbatch: slurm.Sbatch = None,
    no_report: slurm.NoReport = False,
    dry_run: slurm.DryRun = False,
) -> None:
    """Train every run of a study, fit the laws and write the report (its path is the last line).

    With --on slurm the runs are submitted as jobs and this returns; `isofusion study status` follows them.
    """
    from isofusion.study.lock import LOCK, check_lock, read_lock, write_lock
    from isofusion.study.run import Interrupted, prepare, refuse_what_does_not_fit, run_study
    from isofusion.study.split import choose_split, thread_budget

    asked: dict[str, Any] = {
        "time": time,
        "gpus": gpus,
        "cpus_per_task": cpus_per_task,
        "mem": mem,
        "nodes": nodes,
        "qos": qos,
    }
    asked |= {"partition": partition, "array_limit": array_limit, "account": account, "constraint": constraint}
    asked |= {"grace": grace, "setup": setup, "sbatch": sbatch}
    spec, out, given = _load(toml, out, data, sets)
    if not dry_run:
        _refuse_unwritable(out)
    if on == slurm.Where.slurm:
        where = slurm.Study(spec, out, toml, given)
        if slurm.run(where, asked, jobs, threads, resume=resume, dry_run=dry_run, report=not no_report):
            report_command(out)
        return
    slurm.refuse_local(out, {**asked, "dry_run": dry_run or None, "no_report": no_report or None})
    console = Console(stderr=not sys.stdout.isatty() and sys.stderr.isatty())
    if (out / LOCK).exists():
        jobs, threads = thread_budget(jobs, read_lock(out)["threads"] if threads is None else threads)
        check_lock(out, spec)
    else:
        split = choose_split(spec, out, jobs=jobs, threads=threads, console=console)
        jobs, threads = split.jobs, split.threads
        for note in split.notes:
            print(f"note: {note}", file=sys.stderr)
    begun = (out / "runs").exists()
    if not begun:
        refuse_what_does_not_fit(spec, out, jobs)
    if not begun or not (out / LOCK).exists():
        # before the lock: data that cannot be read must not leave one behind that then refuses the mended study
        for note in prepare(spec):
            print(f"note: {note}", file=sys.stderr)
    write_lock(out, spec, toml=toml, jobs=jobs, threads=threads, **given)
    command = shlex.join(["isofusion", "study", "run", str(toml), "--out", str(out), "--resume"])
    console.print(
        f"{spec.name}: {len(spec.runs())} runs in {out}, {jobs} jobs x {threads} threads", highlight=False, markup=False
    )
    try:
        run_study(
            spec,
            out,
            jobs=jobs,
            threads=threads,
            resume=resume,
            make_progress=lambda configs, done: make_progress(configs, done, console),
            command=command,
        )
    except Interrupted as stop:
        print(str(stop), file=sys.stderr)
        raise typer.Exit(stop.code) from None
    report_command(out)


@app.command("status")
def status_command(
    target: Folder,
    out: Out = None,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Rebuild the ledger from the run folders first.")] = False,
    as_json: Json = False,
) -> None:
    """Where every run of a study stands, and what changed since it was locked."""
    from isofusion.study.jobs import failure
    from isofusion.study.ledger import Ledger, progress_of, state_of
    from isofusion.study.lock import later_changes, locked_spec

    out = _folder(target, out)
    spec = locked_spec(out)
    ledger = Ledger(out)
    if rebuild:
        ledger.rebuild()
    jobs, note = slurm.job_states(out, spec, ledger)
    rows: list[dict[str, Any]] = []
    for run in spec.runs():
        folder = out / "runs" / run.name
        step, loss = progress_of(folder)
        state = state_of(folder)
        row: dict[str, Any] = {"run": run.name, "state": state, "step": step}
        row |= {"end_step": run.end_step, "loss": loss}
        if state == "failed":
            row["message"] = failure(folder) or f"{folder / 'failure.json'} cannot be read; see {out / 'logs'}"
        slurm.add_job(row, jobs.get(run.name))
        rows.append(row)
    changes = later_changes(out)
    counts = {
        state: sum(row["state"] == state for row in rows) for state in ("done", "unfinished", "failed", "waiting")
    }
    counts |= {state: count for state in slurm.STATES if (count := sum(row["state"] == state for row in rows))}
    if as_json:
        found = {"study": spec.name, "counts": counts, "later_changes": changes, "runs": rows}
        print(json.dumps(found | ({"note": note} if note else {}), indent=1))
        return
    table = Table()
    for column in ("run", "state", "step", "training loss", *(("job",) if jobs else ())):
        table.add_column(column, justify="left" if column in ("run", "state") else "right", overflow="fold")
    styles = {"done": "green", "failed": "bold red", "unfinished": "yellow", "waiting": "dim", **slurm.STATES}
    for row in rows:
        shown = f"{row['loss']:.4f}" if row["loss"] is not None else ""
        steps = "" if row["step"] is None and row["state"] not in ("done", "unfinished", "failed") else "{}/{}"
        steps = steps.format(row["step"] or 0, row["end_step"])
        job = (row.get("job", ""),) if jobs else ()
        table.add_row(row["run"], row["state"], steps, shown, *job, style=styles[row["state"]])
    console = Console()
    console.print(table)
    for row in rows:
        if row.get("message"):
            console.print(f"{row['run']}: {row['message']}", highlight=False, markup=False, soft_wrap=True)
    console.print(", ".join(f"{count} {state}" for state, count in counts.items() if count), highlight=False)
    for line in [*([note] if note else []), *(f"changed since the lock: {change}" for change in changes)]:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


@app.command("report")
def report_command(target: Folder, out: Out = None) -> None:
    """Fit the laws to what is done and write OUT/report.html; its path is the last line."""
    folder = _folder(target, out)
    print(f"fitting the laws of {folder} and drawing its page ...", file=sys.stderr)
    with second_process("isofusion.report.analysis") as pool:
        from isofusion.report.page import build_report  # while the other process imports its part

        print(build_report(folder, pool=pool))
