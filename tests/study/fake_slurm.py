"""A SLURM for tests: `sbatch`, `srun`, `squeue`, `sacct`, `scancel` and `scontrol` as calls of this file, and the
cluster behind them, which really runs the jobs as processes of this machine, in the order of their dependencies.

The commands and the cluster share `$FAKE_SLURM/state.json`. The test plays the scheduler: nothing runs but in
`Cluster.run`. One partition, `cpu`. What it imitates is written beside each command; it checks no resources.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

COMMANDS = ("sbatch", "srun", "squeue", "sacct", "scancel", "scontrol")
HERE = Path(__file__).resolve()
ENDED = ("COMPLETED", "FAILED", "CANCELLED")


@contextlib.contextmanager
def state(folder: Path) -> Iterator[dict[str, Any]]:
    """The jobs, held for reading and changing."""
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        path = folder / "state.json"
        tree = json.loads(path.read_text()) if path.exists() else {"next": 101, "jobs": {}, "calls": []}
        yield tree
        path.write_text(json.dumps(tree))


def tasks(tree: dict[str, Any], wanted: str | None = None) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """(id, task, job) of every task, or of those of one id (`101` or `101_3`)."""
    for base, job in tree["jobs"].items():
        for index, task in job["tasks"].items():
            name = f"{base}_{index}" if index else base
            if wanted in (None, name, base):
                yield name, task, job


def stop(folder: Path, name: str, signum: int = signal.SIGTERM) -> None:
    """A signal to the processes of a job's step, as SLURM sends it: not to the batch script."""
    for pid in (folder / f"pids-{name}").read_text().split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signum)


# ---- the commands


def sbatch(folder: Path, words: list[str]) -> int:
    text = Path(words[-1]).read_text()
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=?'?([^'\n]*)'?$", text, re.MULTILINE))
    if options.get("partition") != "cpu":
        print("sbatch: error: invalid partition specified: " + options.get("partition", "(null)"), file=sys.stderr)
        print("sbatch: error: Batch job submission failed: Invalid partition name specified", file=sys.stderr)
        return 1
    with state(folder) as tree:
        most = int(os.environ.get("FAKE_SLURM_MOST", "1000"))
        if len(tree["jobs"]) >= most:
            print("sbatch: error: QOSMaxSubmitJobPerUserLimit", file=sys.stderr)
            print("sbatch: error: Batch job submission failed: Job violates accounting/QOS policy", file=sys.stderr)
            return 1
        base = str(tree["next"])
        tree["next"] += 10  # room for the numbers that tasks have of their own
        limit, indices = 1000, [""]
        if "array" in options:
            span, _, cap = options["array"].partition("%")
            limit, indices = int(cap or 1000), [str(n) for n in range(int(span.partition("-")[2]) + 1)]
        (folder / f"script-{base}.sh").write_text(text)
        new = {"state": "PENDING", "reason": "None", "exit": "0:0", "restarts": 0, "requeue": False}
        tree["jobs"][base] = {"options": options, "limit": limit, "tasks": {n: dict(new) for n in indices}}
    print(f"Submitted batch job {base}")
    return 0


def srun(folder: Path, words: list[str]) -> int:
    options: dict[str, str] = {}
    while words and words[0].startswith("--"):
        word = words.pop(0)
        key, sign, value = word.partition("=")
        options[key] = value if sign else words.pop(0) if key in ("--output", "--error") else ""
    base, index, name = (os.environ[f"FAKE_{key}"] for key in ("BASE", "INDEX", "NAME"))
    ranks, nodes = int(os.environ["SLURM_NTASKS"]), int(os.environ["SLURM_JOB_NUM_NODES"])
    processes = []
    for rank in range(ranks):
        path = options["--output"].replace("%A", base).replace("%a", index).replace("%j", base)
        environment = {
            "SLURM_PROCID": rank,
            "SLURM_LOCALID": rank % (ranks // nodes),
            "SLURM_NODEID": rank * nodes // ranks,
        }
        with Path(path.replace("%t", str(rank))).open("a") as log:
            environment = {**os.environ, **{key: str(value) for key, value in environment.items()}}
            processes.append(subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, env=environment))
    (folder / f"pids-{name}").write_text(" ".join(str(process.pid) for process in processes))
    while any(process.poll() is None for process in processes):
        if "--kill-on-bad-exit" in options and any(process.poll() for process in processes):
            time.sleep(2)  # SLURM waits longer (KillWait)
            for process in processes:
                process.kill()
        time.sleep(0.01)
    return max(process.returncode % 256 for process in processes)


def squeue(folder: Path, words: list[str]) -> int:
    if os.environ.get("FAKE_SLURM_DOWN"):
        print("slurm_load_jobs error: Unable to contact slurm controller", file=sys.stderr)
        return 1
    assert {"--noheader", "--array", "--format=%i|%T|%r"} < set(words), words
    with state(folder) as tree:
        for name, task, _ in tasks(tree):
            if task["state"] not in ENDED:
                print(f"{name}|{task['state']}|{task['reason']}")
    return 0


def sacct(folder: Path, words: list[str]) -> int:
    """Tasks that were cancelled before they started share a line, as SLURM shows them."""
    bases = next(word for word in words if word.startswith("--jobs=")).partition("=")[2].split(",")
    with state(folder) as tree:
        for base in bases:
            never = [n for n, task in tree["jobs"][base]["tasks"].items() if n and task["state"] == "CANCELLED"]
            if never:
                print(f"{base}_[{','.join(never)}]|CANCELLED by 1000|0:0")
            for name, task, _ in tasks(tree, base):
                if name.partition("_")[2] not in never or not never:
                    print(f"{name}|{task['state']}|{task['exit']}")
    return 0


def scancel(folder: Path, words: list[str]) -> int:
    with state(folder) as tree:
        for word in words:
            for name, task, _ in tasks(tree, word):
                if task["state"] == "RUNNING":
                    task["state"] = "COMPLETING"
                    stop(folder, name)
                elif task["state"] == "PENDING":
                    task["state"] = "CANCELLED"
    return 0


def scontrol(folder: Path, words: list[str]) -> int:
    """`requeue` of a running job only: one that is being cancelled or requeued is refused."""
    assert words[0] == "requeue", words
    with state(folder) as tree:
        tree["calls"].append(words)
        [(_, task, _)] = tasks(tree, words[1])
        if task["state"] != "RUNNING":
            print("Job is in transition state, requeue refused", file=sys.stderr)
            return 1
        task["requeue"] = True
    return 0


# ---- the cluster


class Cluster:
    """Runs what was submitted; `slots` jobs at a time."""

    def __init__(self, folder: Path, slots: int = 2) -> None:
        self.folder, self.slots = folder, slots
        self.timeout = 100.0  # seconds that `run` may take
        self.bin = folder / "bin"
        self.bin.mkdir(parents=True)
        for name in COMMANDS:
            path = self.bin / name
            path.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "{HERE}" {name} "$@"\n')
            path.chmod(0o755)
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.peak = 0  # most jobs at once

    def states(self) -> dict[str, str]:
        with state(self.folder) as tree:
            return {name: task["state"] for name, task, _ in tasks(tree)}

    def job(self, base: str) -> dict[str, Any]:
        with state(self.folder) as tree:
            found: dict[str, Any] = tree["jobs"][base]
            return found

    def run(self, until: Callable[[], bool] | None = None) -> None:
        """Schedule until `until()` holds, or until nothing runs and nothing could."""
        end = time.monotonic() + self.timeout
        while until is None or not until():
            assert time.monotonic() < end, f"the cluster did not come to an end: {self.states()}"
            if not self._step() and not self.running:
                assert until is None, f"nothing runs any more and the moment did not come: {self.states()}"
                return
            time.sleep(0.05)

    def preempt(self, name: str, *, grace: bool) -> None:
        """Take a job's node away: with time of grace the job must ask to be queued again, without SLURM does it."""
        with state(self.folder) as tree:
            [(_, task, _)] = tasks(tree, name)
            assert task["state"] == "RUNNING", task
            if not grace:
                task |= {"state": "COMPLETING", "requeue": True}
        stop(self.folder, name)

    def signal(self, name: str, signum: int) -> None:
        stop(self.folder, name, signum)

    def close(self) -> None:
        for process in self.running.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _step(self) -> bool:
        """Reap and start; whether anything changed."""
        changed = False
        with state(self.folder) as tree:
            for name, process in list(self.running.items()):
                if process.poll() is not None:
                    del self.running[name]
                    [(_, task, _)] = tasks(tree, name)
                    self._ended(task, process.returncode)
                    changed = True
            for name, task, job in tasks(tree):
                if task["state"] == "PENDING":
                    changed |= self._consider(tree, name, task, job)
        return changed

    @staticmethod
    def _ended(task: dict[str, Any], code: int) -> None:
        if task["requeue"]:
            task |= {"state": "PENDING", "requeue": False, "restarts": task["restarts"] + 1}
        elif task["state"] == "COMPLETING":
            task["state"] = "CANCELLED"
        else:
            task |= {"state": "FAILED" if code else "COMPLETED", "exit": f"{code}:0"}

    def _consider(self, tree: dict[str, Any], name: str, task: dict[str, Any], job: dict[str, Any]) -> bool:
        kind, *ids = job["options"].get("dependency", "").split(":")
        waits = [other["state"] for wanted in ids for _, other, _ in tasks(tree, wanted)]
        if kind == "afterok" and any(one in ("FAILED", "CANCELLED") for one in waits):
            if job["options"].get("kill-on-invalid-dep") == "yes":
                task["state"] = "CANCELLED"
                return True
            task["reason"] = "DependencyNeverSatisfied"
            return False
        if any(one not in ENDED for one in waits):
            task["reason"] = "Dependency"
            return False
        base, _, index = name.partition("_")
        busy = sum(other.partition("_")[0] == base for other in self.running)
        if len(self.running) >= self.slots or busy >= job["limit"]:
            task["reason"] = "Resources"
            return False
        self.peak = max(self.peak, len(self.running) + 1)
        self._start(name, base, index, task, job["options"])
        return True

    def _start(self, name: str, base: str, index: str, task: dict[str, Any], options: dict[str, str]) -> None:
        task |= {"state": "RUNNING", "reason": "None"}
        nodes = int(options["nodes"])
        environment = {
            "SLURM_JOB_ID": str(int(base) + int(index or 0)),
            "SLURM_JOB_NUM_NODES": str(nodes),
            "SLURM_NTASKS": str(nodes * int(options["ntasks-per-node"])),
            "SLURM_JOB_NODELIST": "localhost",
            **({"SLURM_ARRAY_JOB_ID": base, "SLURM_ARRAY_TASK_ID": index} if index else {}),
            **{"FAKE_BASE": base, "FAKE_INDEX": index, "FAKE_NAME": name},
        }
        output = options["output"].replace("%A", base).replace("%a", index).replace("%j", base)
        with open(output, "a") as log:
            self.running[name] = subprocess.Popen(
                ["bash", str(self.folder / f"script-{base}.sh")],
                cwd=options["chdir"],
                env={**os.environ, **environment},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )


if __name__ == "__main__":
    verb, *arguments = sys.argv[1:]
    sys.exit(globals()[verb](Path(os.environ["FAKE_SLURM"]), arguments))
