"""What is known of a study's SLURM jobs, on any machine that sees its folder.

Three sources, none of them a database that many nodes write: `slurm/jobs.jsonl`, a line per submitted run, written by
`study run --on slurm`; `runs/RUN/jobs.jsonl`, a line per start, requeue and end, written by the job itself; and the
queue (`squeue`, then `sacct` for what has left it). The ledger's table `jobs` is an index over them.
"""

from __future__ import annotations

import datetime
import json
import os
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isofusion.errors import InputError
from isofusion.study.spec import StudySpec

FOLDER = "slurm"  # in the study folder: scripts, what submitit writes, and the logs
JOBS = "jobs.jsonl"
FAILURE = "failure.json"
NEVER = "DependencyNeverSatisfied"
WAITING = ("PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD")
RUNNING = ("RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "SIGNALING", "STAGE_OUT", "STOPPED", "RESIZING")
PATIENCE = 60  # seconds a command of SLURM may take


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def append(path: Path, line: dict[str, Any]) -> None:
    """Add a line to a .jsonl file; one that a kill cut short keeps its own line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        file.seek(-1 if file.seek(0, os.SEEK_END) else 0, os.SEEK_END)
        torn = file.read() not in (b"", b"\n")
        file.write(b"\n" * torn + json.dumps(line).encode() + b"\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a .jsonl file; a line that a kill cut short is left out."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    found = []
    for line in text.splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return [line for line in found if isinstance(line, dict)]


def submitted(out: Path) -> dict[str, dict[str, Any]]:
    """Each run's newest submission: job_id, submitted_at, after (job ids it waits for), log. Empty without SLURM."""
    return {line["run"]: line for line in read_lines(out / FOLDER / JOBS) if "run" in line}


def report_jobs(out: Path) -> list[str]:
    """Ids of the jobs that were to write the report."""
    return [line["report"] for line in read_lines(out / FOLDER / JOBS) if "report" in line]


def events(folder: Path, job_id: str) -> list[dict[str, Any]]:
    """What one job said of itself in a run folder, oldest first."""
    return [line for line in read_lines(folder / JOBS) if line.get("job") == job_id]


@dataclass(frozen=True)
class Queued:
    """A job as the queue or the accounting shows it: SLURM's own words."""

    state: str
    reason: str = ""


def command(*words: str) -> str:
    """Output of a command of SLURM. Raises InputError: not on the PATH, refused, or no answer."""
    if shutil.which(words[0]) is None:
        raise InputError(f"{words[0]} is not on the PATH: run this where SLURM's commands are, on a login node")
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        raise InputError(f"{words[0]} did not answer in {PATIENCE} s; SLURM may be down, try again later") from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise InputError(f"{words[0]} failed: {said[-1] if said else f'exit code {done.returncode}'}")
    return done.stdout


def queue() -> dict[str, Queued]:
    """This user's jobs in the queue by id, an array task as `123_4`. Raises InputError."""
    # all of the user's jobs: asked for an id that it has forgotten, squeue fails
    text = command("squeue", "--noheader", "--array", f"--user={os.getuid()}", "--format=%i|%T|%r")
    rows = (line.strip().split("|", 2) for line in text.splitlines() if line.count("|") >= 2)
    return {job: Queued(state, reason) for job, state, reason in rows}


def accounting(ids: Iterable[str]) -> dict[str, Queued]:
    """What sacct remembers of jobs that left the queue; {} where the cluster keeps no accounts."""
    bases = sorted({job.partition("_")[0] for job in ids})
    if not bases:
        return {}
    words = ("sacct", "--noheader", "--parsable2", "--allocations", "--format=JobID,State,ExitCode")
    try:
        text = command(*words, f"--jobs={','.join(bases)}")
    except InputError:
        return {}
    rows = (line.split("|") for line in text.splitlines() if line.count("|") == 2)
    return {job: Queued(state.split()[0], code) for jobs, state, code in rows if state.strip() for job in _each(jobs)}


def _each(job: str) -> list[str]:
    """The ids in `123`, `123_4` or `123_[0-2,7%3]`: tasks that never started share a line."""
    base, bracket, tasks = job.partition("_[")
    if not bracket:
        return [job]
    found = []
    for part in tasks.rstrip("]").partition("%")[0].split(","):
        first, _, last = part.partition("-")
        if first.isdecimal() and (not last or last.isdecimal()):
            found += [f"{base}_{task}" for task in range(int(first), int(last or first) + 1)]
    return found


def failure(folder: Path) -> str | None:
    try:
        return str(json.loads((folder / FAILURE).read_text())["message"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def states(out: Path, spec: StudySpec) -> tuple[list[dict[str, Any]], str | None]:
    """(one row of ledger.JOB_COLUMNS per submitted run, why the queue could not be asked or None).

    `state` is pending, requeued (pending again after a start), running, done, failed or blocked (its trunk failed);
    unknown where the queue could not be asked and the folder does not tell.
    """
    jobs, trouble = submitted(out), None
    if not jobs:
        return [], None
    try:
        queued = queue()
    except InputError as error:
        queued, trouble = {}, str(error)
    gone = [line["job_id"] for line in jobs.values() if line["job_id"] not in queued]
    remembered = {} if trouble else accounting(gone)
    rows: dict[str, dict[str, Any]] = {}
    for config in sorted(spec.runs(), key=lambda run: run.parent is not None):  # trunks first: branches look at them
        if config.name not in jobs:
            continue
        line, folder = jobs[config.name], out / "runs" / config.name
        said = events(folder, line["job_id"])
        starts = [event for event in said if event["event"] == "start"]
        job = queued.get(line["job_id"]) or remembered.get(line["job_id"])
        state, message = _state(folder, line, job, bool(starts), known=trouble is None)
        trunk = rows.get(str(config.parent))
        if state == "failed" and failure(folder) is None and trunk and trunk["state"] in ("failed", "blocked"):
            state, message = "blocked", f"its trunk {config.parent} failed; `study run --resume` submits both again"
        rows[config.name] = {
            "run": config.name,
            "job_id": line["job_id"],
            "state": state,
            "message": message,
            "submitted_at": line["submitted_at"],
            "after": " ".join(line["after"]) or None,
            "starts": len(starts),
            "node": starts[-1].get("node") if starts else None,
            "log": line["log"],
        }
    return list(rows.values()), trouble


def _state(folder: Path, line: dict[str, Any], job: Queued | None, begun: bool, known: bool) -> tuple[str, str | None]:
    job_id, see = line["job_id"], f"see {line['log']}"
    if (folder / "DONE").exists():
        return "done", None
    if job is not None and job.state in RUNNING:
        return "running", None
    if job is not None and job.state in WAITING:
        if job.reason == NEVER:
            return "failed", f"job {job_id} waits for a job that failed"
        return ("requeued" if begun else "pending"), None if job.reason in ("None", "") else job.reason
    why = failure(folder)
    if why is not None:
        return "failed", why
    if not known:
        return "unknown", None
    if job is None:
        return "failed", f"job {job_id} has left the queue and the run is not finished; {see}"
    if job.state == "COMPLETED":
        return "failed", f"job {job_id} ended without finishing the run; {see}"
    hint = " (raise --mem)" if job.state == "OUT_OF_MEMORY" else ""
    return "failed", f"job {job_id} ended as {job.state}{hint}, exit code {job.reason or '?'}; {see}"
