"""What runs inside a SLURM job: one run of a locked study, or the report. submitit loads and calls these objects.

SIGTERM (preemption, cancel) and SIGUSR2 (the time limit is near) make the run checkpoint; then the job asks SLURM to
queue it again. A job that SLURM is cancelling, or is requeueing by itself, refuses that, so `scancel` stays a cancel.
Exit codes: 0 done; 2 bad input; 1 otherwise, so that a branch (`afterok`) never starts from an unfinished trunk.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console

from isofusion.config import RunConfig
from isofusion.errors import InputError, RunFailure
from isofusion.study.jobs import FAILURE, JOBS, append, events, now
from isofusion.study.ledger import progress_of
from isofusion.study.lock import locked_spec, read_lock, write_atomic
from isofusion.study.pool import fork_of, fork_ready, is_done
from isofusion.study.progress import Progress
from isofusion.study.worker import load

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
FORK_WAIT = 30  # seconds for a fork to show on this node: a shared disk may be late
MAX_IDLE = 3  # requeues in a row without one step trained: then the job's time is too short for it


def job_id() -> str:
    """This job as squeue names it: `123`, or `123_4` for a task of an array."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]


def locked_run(out: Path, name: str) -> RunConfig:
    """The run as the study's lock has it. Raises InputError where this node does not see the lock, or another one."""
    if not (out / "study.lock").is_file():
        raise InputError(
            f"{out}/study.lock is not there on {socket.gethostname()}: the study's folder must be on a file system "
            f"that every node sees; start the study with --out on a shared one"
        )
    config = next((run for run in locked_spec(out).runs() if run.name == name), None)
    if config is None or read_lock(out)["runs"].get(name) != config.digest():
        raise InputError(f"{out}/study.lock: run {name} is not the one that was submitted; submit the study again")
    return config


class RunJob:
    """One run of the study in `out`; `threads` per process. Called in every rank of its job."""

    def __init__(self, out: Path, run: str, threads: int, train: str) -> None:
        self.out, self.run, self.threads, self.train = str(out), run, threads, train

    def __call__(self) -> str:
        self.stopping = False
        for number in STOP_SIGNALS:
            signal.signal(number, self._stop)  # in place of submitit's, which would not let the step end
        out = Path(self.out)
        self.root, self.folder, self.job = out / "runs", out / "runs" / self.run, job_id()
        self.rank = int(os.environ.get("SLURM_PROCID", "0"))
        try:
            config = locked_run(out, self.run)
            self.progress = Progress({config.name: config}, set(), Console(width=200))
            status = self._train(config)
        except InputError as error:
            self._fail("input", str(error), 2)
        except RunFailure as error:
            kind = getattr(error, "kind", "failure")
            if kind == "fork" and self.rank == 0:  # damaged: `--resume` finds it gone and trains the trunk again
                shutil.rmtree(fork_of(self.root, config), ignore_errors=True)
            self._fail(kind, str(error), 1)
        except Exception as error:
            traceback.print_exc()
            self._fail("crash", f"{type(error).__name__}: {error}", 1)
        if status == "done":
            self._say("end")
        elif self.rank == 0:  # the other ranks end quietly: a bad exit of one would kill this one
            self._requeue()
        return status

    def _stop(self, signum: int, frame: Any) -> None:
        if not self.stopping:
            print(f"{signal.Signals(signum).name}: checkpointing", flush=True)
        self.stopping = True

    def _say(self, event: str, **more: Any) -> None:
        if self.rank == 0:
            append(self.folder / JOBS, {"event": event, "job": self.job, "at": now(), **more})

    def _train(self, config: RunConfig) -> str:
        if int(os.environ.get("SLURM_NTASKS", "1")) > 1:
            from submitit.helpers import TorchDistributedEnvironment

            TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        if self.rank == 0:
            (self.folder / FAILURE).unlink(missing_ok=True)
            self.progress.started(config.name)
        self._say("start", node=socket.gethostname(), step=progress_of(self.folder)[0])
        self._await_fork(config)
        train = load(self.train)
        status = train(
            config, self.folder, self.root, threads=self.threads, on_event=self._event, stop=lambda: self.stopping
        )
        if self.rank == 0:
            self.progress.finished(config.name, status)
        return status

    def _await_fork(self, config: RunConfig) -> None:
        """Ends the job where the trunk failed before the fork: no failure of this run, whose state is `blocked`."""
        trunk = self.root / str(config.parent)
        for _ in range(FORK_WAIT):
            if fork_ready(self.root, config) or (trunk / FAILURE).exists():
                break
            time.sleep(1)
        if not fork_ready(self.root, config) and not is_done(trunk):
            print(f"error: trunk {config.parent} did not reach step {config.start_step}", file=sys.stderr, flush=True)
            self._say("end", failed="blocked")
            sys.exit(1)

    def _event(self, event: dict[str, Any]) -> None:
        if self.rank == 0:
            self.progress.event({"event": "step", **event, "run": self.run})
            self.progress.tick()

    def _fail(self, kind: str, message: str, code: int) -> NoReturn:
        print(f"error: {message}", file=sys.stderr, flush=True)
        if (self.folder.parent.parent / "study.lock").is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            if not (self.folder / FAILURE).exists():  # with many ranks the first to fail names the cause
                write_atomic(self.folder / FAILURE, json.dumps({"kind": kind, "message": message}) + "\n")
            self._say("end", failed=kind)
        sys.exit(code)

    def _requeue(self) -> NoReturn:
        step = progress_of(self.folder)[0]
        before = [event["step"] for event in events(self.folder, self.job) if event["event"] == "requeue"]
        if len(before) >= MAX_IDLE and set(before[-MAX_IDLE:]) == {step}:
            self._fail(
                "idle",
                f"job {self.job} was stopped {MAX_IDLE + 1} times in a row without training a step; give it more "
                f"--time, or more warning with --grace",
                1,
            )
        self._say("requeue", step=step)
        try:
            asked = subprocess.run(["scontrol", "requeue", self.job], capture_output=True, text=True, timeout=60)
            refusal = (asked.stderr or asked.stdout).strip() if asked.returncode else ""
        except (OSError, subprocess.TimeoutExpired) as error:
            refusal = str(error)
        if refusal:
            print(f"checkpointed at step {step}; not requeued by this job: {refusal}", flush=True)
        else:
            print(f"checkpointed at step {step}; requeued", flush=True)
        sys.exit(1)


class ReportJob:
    """Fits the laws to what is done in `out` and writes its report."""

    def __init__(self, out: Path) -> None:
        self.out = str(out)

    def __call__(self) -> str:
        from isofusion.report.page import build_report

        try:
            page = str(build_report(Path(self.out)))
        except (InputError, RunFailure) as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            sys.exit(2 if isinstance(error, InputError) else 1)
        print(page, flush=True)
        return page
