"""A study as SLURM job arrays, through submitit: trunks first, the branches of each behind it.

The trunks are one array; the branches of each trunk are another that starts when their trunk has ended well
(`afterok`). The last fork of a trunk is its end, so with enough nodes this waits for nothing: the longest branch could
not start earlier, and the shorter ones run beside it. Branches whose fork is there already depend on nothing. A job
for the report comes after all of them, whether they went well or not.

SLURM limits the tasks of one array, not those of several. Under `array_limit` there are two arrays, one behind the
other (`afterany`): the trunks, then all branches. So the sum holds whatever is preempted and requeued, and a free place
goes to the next run, whichever that is. What waits in the queue from before counts as well.

Nothing here trains: the jobs do (`slurmjob`), and what became of them is read in `jobs`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import re
import shlex
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from isofusion.config import RunConfig
from isofusion.errors import InputError, RunFailure
from isofusion.study import jobs
from isofusion.study.holder import only_one
from isofusion.study.lock import record_session
from isofusion.study.pool import MALLOC, THREAD_VARIABLES, TRAIN, fork_ready, is_done, reopen
from isofusion.study.slurmjob import ReportJob, RunJob
from isofusion.study.spec import StudySpec, cost_hint

TRAIN_RANKS = "isofusion.train.launch:train_on_ranks"  # a run of several processes
TRUNKS = "TRUNKS"  # stands for a job id that only SLURM can give, in a dry run
OURS = ("array", "chdir", "dependency", "error", "job-name", "kill-on-invalid-dep", "open-mode", "output", "requeue")
REPORT_MINUTES = 60


def minutes(text: str) -> int:
    """A time as sbatch reads it, in whole minutes, rounded up: 90, 90:00, 1:30:00, 1-12, 1-12:30, 1-12:30:00."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text.strip())
    if not found:
        raise InputError(f"--time {text}: write minutes (90), HH:MM:SS (1:30:00) or DAYS-HH:MM:SS")
    days, first, second, third = (int(part or 0) for part in found.groups())
    if found[1] is not None:
        total = 3600 * (24 * days + first) + 60 * second + third
    elif found[4] is not None:
        total = 3600 * first + 60 * second + third
    else:  # "90" is minutes, "90:30" minutes and seconds
        total = 60 * first + second
    if total < 60:
        raise InputError(f"--time {text}: a job needs at least a minute")
    return -(-total // 60)


def bytes_of(mem: str) -> float:
    """Memory as sbatch reads it: 500 and 500M are megabytes, 16G. Raises InputError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", mem.strip(), re.IGNORECASE)
    if not found:
        raise InputError(f"--mem {mem}: write a number and a unit, e.g. 16G")
    return float(found[1]) * 1024 ** {"K": 1, "": 2, "M": 2, "G": 3, "T": 4}[found[2].upper()]


@dataclass(frozen=True)
class Request:
    """What each job asks SLURM for. `gpus` are per node; one process (rank) per GPU, or per node without GPUs."""

    partition: str
    time: str = "4:00:00"
    nodes: int = 1
    gpus: int = 0
    cpus_per_task: int = 1
    mem: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    array_limit: int | None = None
    grace: int = 120  # seconds of warning before the time limit
    setup: tuple[str, ...] = ()
    sbatch: tuple[str, ...] = ()

    @property
    def ranks(self) -> int:
        """Processes of each run."""
        return self.nodes * max(1, self.gpus)

    def check(self, threads: int) -> None:
        """Raises InputError for what SLURM could not know to refuse."""
        minutes(self.time)
        if self.mem:
            bytes_of(self.mem)
        for name, value, least in (
            ("nodes", self.nodes, 1),
            ("gpus", self.gpus, 0),
            ("cpus-per-task", self.cpus_per_task, 1),
            ("array-limit", 1 if self.array_limit is None else self.array_limit, 1),
            ("grace", self.grace, 1),
        ):
            if value < least:
                raise InputError(f"--{name} {value}: must be at least {least}")
        if self.cpus_per_task < threads:
            raise InputError(
                f"--cpus-per-task {self.cpus_per_task} is less than the {threads} threads of each run; raise it, or "
                f"in a new study lower --threads"
            )
        if self.grace >= 60 * minutes(self.time):
            raise InputError(f"--grace {self.grace} s leaves nothing of --time {self.time}")
        for text in self.sbatch:
            key = text.partition("=")[0]
            if not re.fullmatch(r"[a-z][a-z-]*", key):
                raise InputError(f"--sbatch {text}: write a long option of sbatch as KEY=VALUE, e.g. exclude=node7")
            if key in OURS:
                raise InputError(f"--sbatch {text}: isofusion sets {key} itself")

    def _common(self) -> dict[str, Any]:
        extra = dict.fromkeys(("requeue",), True) | {"chdir": os.getcwd(), "kill-on-invalid-dep": "yes"}
        for text in self.sbatch:
            key, sign, value = text.partition("=")
            extra[key] = value if sign else True
        named = {key: getattr(self, key) for key in ("partition", "account", "qos", "constraint")}
        return {
            **{key: value for key, value in named.items() if value},
            "wckey": None,  # submitit's own default would be refused where keys are checked
            "stderr_to_stdout": True,
            "additional_parameters": extra,
        }

    def for_runs(self, out: Path, threads: int) -> dict[str, Any]:
        """submitit's parameters of the jobs that train."""
        lock = shlex.quote(str(out / "study.lock"))
        message = f"error: {out}/study.lock is not there on $(hostname): start the study with --out on a shared disk"
        exports = [f"export {name}={threads}" for name in THREAD_VARIABLES]
        exports += [f'export {name}="${{{name}:-{value}}}"' for name, value in MALLOC.items()]
        parameters = self._common() | {
            "time": minutes(self.time),
            "nodes": self.nodes,
            "ntasks_per_node": max(1, self.gpus),
            "cpus_per_task": self.cpus_per_task,
            "signal_delay_s": self.grace,
            "setup": [
                f'test -r {lock} || {{ echo "{message}" >&2; exit 2; }}',
                *self.setup,
                *exports,
                "export PYTHONUNBUFFERED=1",
            ],
            # srun of SLURM 22.05 to 23.02 forgets how many CPUs the job has
            "srun_args": [f"--cpus-per-task={self.cpus_per_task}", "--kill-on-bad-exit=1"],
        }
        if self.gpus:
            parameters["gpus_per_node"] = self.gpus
        if self.mem:
            parameters["mem"] = self.mem
        return parameters

    def for_report(self) -> dict[str, Any]:
        """submitit's parameters of the job that writes the report: one CPU, no GPU."""
        alone = {"time": REPORT_MINUTES, "nodes": 1, "ntasks_per_node": 1, "cpus_per_task": 1, "mem": "4G"}
        return self._common() | alone | {"setup": list(self.setup) or None}


@dataclass
class Array:
    """Jobs that are submitted together: their runs, longest first, and the job ids or the trunk they wait for."""

    title: str
    runs: list[RunConfig]
    after: str | None = None  # "afterok:123_4", or, in a dry run, "afterok:TRUNKS_4"
    trunk: str | None = None  # the trunk of this same submission that `after` will name
    behind: bool = False  # `after` will name the array before this one as well
    limit: int | None = None  # tasks at a time
    ids: list[str] = field(default_factory=list)


def arrays(spec: StudySpec, root: Path, queued: dict[str, str], limit: int | None = None) -> list[Array]:
    """The arrays of a submission: every run that is neither DONE nor in `queued` (run -> job id).

    At most `limit` of these and of `queued` run at a time.
    """
    configs, lost = spec.runs(), lost_forks(spec, root, queued)
    todo = [run for run in configs if run.name in lost or not (is_done(root / run.name) or run.name in queued)]
    branches = [run for run in todo if run.parent is not None]

    def chain(trunk: RunConfig) -> float:
        return cost_hint(trunk) + max((cost_hint(run) for run in configs if run.parent == trunk.name), default=0.0)

    trunks = sorted((run for run in todo if run.parent is None), key=chain, reverse=True)
    free = [run for run in branches if fork_ready(root, run)]
    if limit is not None and limit < len(todo) + len(queued):
        return _within(limit, trunks, free, [run for run in branches if run not in free], queued)
    found = [Array("trunks", trunks)] if trunks else []
    if free:
        found.append(Array("branches whose fork is there", sorted(free, key=cost_hint, reverse=True)))
    for parent in [run.name for run in trunks] + list(queued):
        own = [run for run in branches if run.parent == parent and run not in free]
        if own:
            own.sort(key=cost_hint, reverse=True)
            after = f"afterok:{queued[parent]}" if parent in queued else None
            found.append(Array(f"branches of {parent}", own, after, None if after else parent))
    return found


def _within(
    limit: int, trunks: list[RunConfig], free: list[RunConfig], rest: list[RunConfig], queued: dict[str, str]
) -> list[Array]:
    """What can start, beside `queued` where that leaves room, else behind it; then the branches that cannot yet."""
    room, busy = limit - len(queued), _after_any(list(queued.values())) if queued else None
    found = []
    if trunks or free:
        title = " and ".join(["trunks"] * bool(trunks) + ["branches whose fork is there"] * bool(free))
        runs = trunks + sorted(free, key=cost_hint, reverse=True)
        found.append(Array(title, runs, None if room > 0 else busy, limit=room if room > 0 else limit))
    if rest:
        rest = sorted(rest, key=cost_hint, reverse=True)
        found.append(Array("branches", rest, busy, behind=bool(found), limit=limit))
    return found


def lost_forks(spec: StudySpec, root: Path, queued: dict[str, str]) -> dict[str, int]:
    """Finished trunks that lack a fork which an unfinished branch needs -> the first such step."""
    lost: dict[str, int] = {}
    for run in spec.runs():
        waits = run.parent is not None and run.name not in queued and not is_done(root / run.name)
        if waits and is_done(root / str(run.parent)) and not fork_ready(root, run):
            lost[str(run.parent)] = min(run.start_step, lost.get(str(run.parent), run.start_step))
    return lost


def _executor(out: Path, parameters: dict[str, Any], dry: bool = False) -> Any:
    """submitit's executor. Raises InputError without submitit."""
    if importlib.util.find_spec("submitit") is None:
        raise InputError("--on slurm needs the package submitit: pip install 'isofusion[slurm]'")
    from submitit import SlurmExecutor

    class Dry(SlurmExecutor):
        @classmethod
        def affinity(cls) -> int:
            return 1  # submitit insists on an srun, which a dry run does not need

    executor = (Dry if dry else SlurmExecutor)(out / jobs.FOLDER)
    executor.update_parameters(**parameters)
    return executor


def scripts(
    spec: StudySpec, out: Path, request: Request, threads: int, *, queued: dict[str, str] | None = None, report: bool
) -> list[tuple[str, list[str], str]]:
    """(title, runs, sbatch script) of every submission there would be; nothing is written and no SLURM is needed.

    The place of a job id that only SLURM can give is held by TRUNKS.
    """
    plan = arrays(spec, out / "runs", queued or {}, request.array_limit)
    order = [run.name for run in plan[0].runs] if plan and plan[0].title == "trunks" else []
    found = []
    for array in plan:
        after = array.after
        if array.trunk is not None:
            after = f"afterok:{TRUNKS}" + (f"_{order.index(array.trunk)}" if len(order) > 1 else "")
        elif array.behind:
            after = _after_any(["JOB1", *(queued or {}).values()])
        parameters = request.for_runs(out, threads) | _of_array(spec, array, after)
        found.append((array.title, [run.name for run in array.runs], _script(out, parameters, len(array.runs))))
    if report and found:
        names = [f"JOB{number}" for number in range(1, len(found) + 1)]
        parameters = request.for_report() | {"job_name": f"{spec.name}-report", "dependency": _after_any(names)}
        found.append(("the report", [], _script(out, parameters, 1)))
    return found


def _of_array(spec: StudySpec, array: Array, after: str | None) -> dict[str, Any]:
    kind = "branches" if array.title.startswith("branches") else "trunks"
    limit = array.limit or len(array.runs)
    return {"job_name": f"{spec.name}-{kind}", "dependency": after, "array_parallelism": limit}


def _after_any(ids: Sequence[str]) -> str:
    return ":".join(("afterany", *dict.fromkeys(job.partition("_")[0] for job in ids)))


def _script(out: Path, parameters: dict[str, Any], tasks: int) -> str:
    executor = _executor(out, parameters, dry=True)
    if tasks > 1:
        executor.parameters["map_count"] = tasks
    text: str = executor._make_submission_file_text(executor._submitit_command_str, "")
    return text


@dataclass
class Submission:
    """What became of a `study run --on slurm`."""

    arrays: list[Array]
    queued: dict[str, str]  # run -> job id: what was in the queue before
    done: int
    total: int
    report: str | None = None  # id of the job that will write the report
    note: str | None = None  # why there is none
    reopened: list[str] = field(default_factory=list)


def in_queue(spec: StudySpec, out: Path) -> tuple[dict[str, str], list[str]]:
    """(run -> job id of the study's runs that SLURM still has, ids of those whose trunk failed before their fork)."""
    known = jobs.submitted(out)
    if not known:
        return {}, []
    seen = jobs.queue()
    here = {run: line["job_id"] for run, line in known.items() if line["job_id"] in seen}
    root = out / "runs"
    lost = [
        run.name
        for run in spec.runs()
        if run.parent not in here and not (fork_ready(root, run) or is_done(root / str(run.parent)))
    ]
    never = [
        job
        for run, job in here.items()
        if seen[job].reason == jobs.NEVER or (run in lost and seen[job].state in jobs.WAITING)
    ]
    return {run: job for run, job in here.items() if job not in never}, never


def check_commands() -> None:
    """Raises InputError unless SLURM's commands are here."""
    for name in ("sbatch", "srun", "squeue", "scancel"):
        if shutil.which(name) is None:
            raise InputError(
                f"{name} is not on the PATH: run this on a login node of the cluster, or print the scripts with "
                f"--dry-run"
            )


def submit(
    spec: StudySpec,
    out: Path,
    request: Request,
    threads: int,
    *,
    resume: bool,
    report: bool = True,
    train: str | None = None,
    command: str = "",
) -> Submission:
    """Submit every run that is neither DONE nor queued; the caller has locked the study and prepared its data.

    `out` is absolute. Raises InputError: no SLURM, a refusal of sbatch, a study in use or begun and not `resume`.
    """
    check_commands()
    root = out / "runs"
    with only_one(out):
        configs = spec.runs()
        done = sum(is_done(root / run.name) for run in configs)
        known = jobs.submitted(out)
        if not resume and done < len(configs) and (known or any((root / run.name).is_dir() for run in configs)):
            raise InputError(
                f"{out}: this study was begun ({done} of {len(configs)} runs finished); add --resume to submit what is "
                f"neither finished nor queued, or choose another --out"
            )
        queued, never = in_queue(spec, out)
        if never:
            jobs.command("scancel", *never)
        queued = {run: job for run, job in queued.items() if not is_done(root / run)}
        submission = Submission([], queued, done, len(configs))
        for trunk, step in lost_forks(spec, root, queued).items():
            reopen(root / trunk, step)
            submission.reopened.append(trunk)
        plan = arrays(spec, root, queued, request.array_limit)
        if not plan:
            return submission
        record_session(out, jobs=request.array_limit or sum(len(array.runs) for array in plan), threads=threads)
        ids: dict[str, str] = {}
        for array in plan:
            if array.trunk is not None:
                array.after = f"afterok:{ids[array.trunk]}"
            elif array.behind:
                array.after = _after_any([*plan[0].ids, *queued.values()])
            parameters = request.for_runs(out, threads) | _of_array(spec, array, array.after)
            target = train or (TRAIN_RANKS if request.ranks > 1 else TRAIN)
            tasks = [RunJob(out, run.name, threads, target) for run in array.runs]
            array.ids = _send(out, parameters, tasks, submission, command)
            ids |= {run.name: job for run, job in zip(array.runs, array.ids, strict=True)}
            _record(out, array)
            submission.arrays.append(array)
        if report:
            try:
                submission.report = _send_report(spec, out, request, submission, command)
            except InputError as error:  # the runs are submitted; a page can be made by hand
                submission.note = f"no job for the report: {error}"
    return submission


def _record(out: Path, array: Array) -> None:
    """Write down which run is which job. Raises RunFailure (a full disk), these jobs cancelled: a run that SLURM has
    and nobody knows of would be submitted again.
    """
    after = array.after.split(":")[1:] if array.after else []
    try:
        for run, job in zip(array.runs, array.ids, strict=True):
            (out / "runs" / run.name / jobs.FAILURE).unlink(missing_ok=True)
            line = {"run": run.name, "job_id": job, "submitted_at": jobs.now(), "after": after}
            line["log"] = f"{jobs.FOLDER}/{job}_0_log.out"
            jobs.append(out / jobs.FOLDER / jobs.JOBS, line)
    except OSError as error:
        jobs.command("scancel", *array.ids)
        raise RunFailure(
            f"{out / jobs.FOLDER / jobs.JOBS}: {error.strerror or error}; the jobs {array.ids[0]} to {array.ids[-1]} "
            f"({array.title}) were cancelled again; mend this and add --resume"
        ) from None


def _send_report(spec: StudySpec, out: Path, request: Request, submission: Submission, command: str) -> str:
    """A report job behind everything that is queued, in place of one that waits already."""
    seen = jobs.queue() if (earlier := jobs.report_jobs(out)) else {}
    if earlier := [job for job in earlier if job in seen]:
        jobs.command("scancel", *earlier)
    ids = [job for array in submission.arrays for job in array.ids] + list(submission.queued.values())
    parameters = request.for_report() | {"job_name": f"{spec.name}-report", "dependency": _after_any(ids)}
    [job] = _send(out, parameters, [ReportJob(out)], submission, command)
    jobs.append(out / jobs.FOLDER / jobs.JOBS, {"report": job, "submitted_at": jobs.now()})
    return job


def _send(
    out: Path, parameters: dict[str, Any], tasks: Sequence[Callable[[], str]], submission: Submission, command: str
) -> list[str]:
    """Ids of the submitted jobs; a refusal says what SLURM said and what is submitted already."""
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    (out / jobs.FOLDER).mkdir(parents=True, exist_ok=True)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # submitit prints there what its error says as well
            return [str(job.job_id) for job in _executor(out, parameters).submit_array(tasks)]
    except (FailedJobError, FailedSubmissionError) as error:
        for left in (out / jobs.FOLDER).glob("?" * 32 + ".pkl"):  # of jobs that never came to be
            left.unlink(missing_ok=True)
        said = [line.removeprefix("sbatch: error: ") for line in str(error).strip().splitlines()]
        text = f"sbatch refused: {'; '.join(said) or 'it did not say why'}"
        if "partition" in text.lower():
            text += f" (asked for {parameters['partition']!r}; `sinfo -s` lists the partitions)"
        if before := sum(len(array.runs) for array in submission.arrays):
            text += f". {before} runs are submitted and stay so"
            text += f"; mend this and go on with: {command}" if command and isinstance(tasks[0], RunJob) else ""
        raise InputError(text) from None
    finally:
        for left in (out / jobs.FOLDER).glob(".submission_file_*.sh"):
            left.unlink(missing_ok=True)
