"""The local pool: runs on worker processes that share out the machine's threads.

Trunks first by the length of their whole chain, and a branch as soon as its fork checkpoint exists; among what is ready
the longest goes first, so that no long run is left alone at the end. A failed run does not stop the others. A finished
trunk whose fork checkpoint is damaged or gone while a branch needs it is trained again from the last good checkpoint
before it: the same bits.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from isofusion.config import RunConfig
from isofusion.errors import RunFailure
from isofusion.study.lock import write_atomic
from isofusion.study.progress import Progress
from isofusion.study.spec import cost_hint

TRAIN = "isofusion.train.loop:train_run"
FAILURE = "failure.json"  # in a run folder: why its last attempt ended; removed when it starts again
THREAD_VARIABLES = (
    *("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS"),
    "RAYON_NUM_THREADS",  # tokenizers
)
MALLOC = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "4000000000",
    "MALLOC_TOP_PAD_": "268435456",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
"""glibc keeps what a step frees for the next step, in pages of 2 MiB where the kernel has them (a step with 29M
parameters of experts: 5 to 8 % faster). By default each large tensor is a fresh mapping whose pages are cleared anew,
step after step. Other C libraries ignore these; a user's own setting wins."""
POLL = 0.2  # seconds between looks at checkpoints and the display
MAX_WORKER_DEATHS = 3  # in a row before the first event: then the machine, not a run, is the trouble


def is_done(folder: Path) -> bool:
    return (folder / "DONE").exists()


def fork_of(root: Path, branch: RunConfig) -> Path:
    """The checkpoint of its trunk that a branch starts from."""
    return root / str(branch.parent) / "checkpoints" / f"step_{branch.start_step}"


def fork_ready(root: Path, run: RunConfig) -> bool:
    """A trunk can always start; a branch when its trunk's checkpoint exists (it appears by an atomic rename)."""
    return run.parent is None or fork_of(root, run).is_dir()


def reopen(folder: Path, step: int) -> None:
    """Send a finished trunk back to its last checkpoint before `step`, whose checkpoint is lost.

    A kill anywhere in here is found by the next session: by a fork that is not there, or whose bytes do not check.
    """
    (folder / "DONE").unlink()
    for path in (folder / "checkpoints").glob("step_*"):
        number = path.name.removeprefix("step_")
        if number.isdigit() and int(number) >= step:  # else the trunk would go on behind the fork
            shutil.rmtree(path)


@dataclass
class Slot:
    """One worker process and the run it is at."""

    process: subprocess.Popen[bytes]
    log: IO[bytes]
    run: str | None = None
    ready: bool = False
    leaving: bool = False  # it was told to stop: it takes no other run and ends
    buffer: bytes = b""

    def send(self, request: dict[str, Any]) -> bool:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
        except (BrokenPipeError, OSError):
            return False
        return True

    def close(self) -> None:
        for stream in (self.process.stdin, self.process.stdout, self.log):
            if stream is not None:
                stream.close()


@dataclass
class Pool:
    """Runs `configs` under `root` on `jobs` workers of `threads` threads; see `go`."""

    configs: dict[str, RunConfig]
    root: Path
    logs: Path
    jobs: int
    threads: int
    progress: Progress
    train: str = TRAIN
    on_done: Callable[[str], None] = lambda run: None
    keep_open: int | None = None  # descriptor that the workers inherit: the study's lock
    waiting: deque[str] = field(default_factory=deque)
    slots: list[Slot] = field(default_factory=list)
    failed: dict[str, tuple[str, str]] = field(default_factory=dict)  # run -> (kind, message)
    interrupted: set[str] = field(default_factory=set)
    reopened: set[Path] = field(default_factory=set)  # forks that were trained again: once a session each
    signum: int | None = None
    started: int = 0
    early_deaths: int = 0

    def go(self) -> None:
        """Run everything that is not DONE. On return `failed` and `interrupted` say what is left; never raises for a
        run that failed. SIGINT and SIGTERM let every run checkpoint; a second one kills.
        """
        todo = [name for name, config in self.configs.items() if not is_done(self.root / config.name)]
        self.waiting = deque(sorted(todo, key=self.chain_cost, reverse=True))
        self.logs.mkdir(parents=True, exist_ok=True)
        previous = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        self.selector = selectors.DefaultSelector()
        self.progress.open()
        try:
            for _ in range(min(self.jobs, len(todo))):
                self._spawn()
            while self.slots and (any(slot.run for slot in self.slots) or (self.waiting and self.signum is None)):
                self._assign()
                if not any(slot.run for slot in self.slots) and all(s.ready and not s.leaving for s in self.slots):
                    break  # what still waits is blocked by a failed trunk
                for key, _ in self.selector.select(POLL):
                    self._read(key.data)
                self.progress.tick()
            self._block_the_rest()
        finally:
            self._shut_down()
            self.progress.close()
            self.selector.close()
            for number, handler in previous.items():
                signal.signal(number, handler)

    def chain_cost(self, name: str) -> float:
        """Work that cannot start before this run: a trunk carries its longest branch."""
        config = self.configs[name]
        branches = [cost_hint(other) for other in self.configs.values() if other.parent == name]
        return cost_hint(config) + max(branches, default=0.0)

    def _on_signal(self, signum: int, frame: Any) -> None:
        again, self.signum = self.signum is not None, self.signum or signum
        for slot in self.slots:
            if slot.process.poll() is None:
                slot.process.send_signal(signal.SIGKILL if again else signal.SIGTERM)

    def _spawn(self) -> None:
        threads = dict.fromkeys(THREAD_VARIABLES, str(self.threads))
        environment = {**MALLOC, **os.environ, **threads, "PYTHONUNBUFFERED": "1"}
        log = (self.logs / f"worker-{self.started}.log").open("ab")
        command = [
            sys.executable,
            "-m",
            "isofusion.study.worker",
            "--train",
            self.train,
            "--threads",
            str(self.threads),
        ]
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
            pass_fds=() if self.keep_open is None else (self.keep_open,),
        )
        slot = Slot(process, log)
        self.started += 1
        self.slots.append(slot)
        assert process.stdout is not None
        self.selector.register(process.stdout, selectors.EVENT_READ, slot)

    def _next(self) -> str | None:
        for name in self.waiting:
            if fork_ready(self.root, self.configs[name]):
                self.waiting.remove(name)
                return name
        return None

    def _assign(self) -> None:
        self._reopen_trunks()
        for slot in self.slots:
            if self.signum is not None or slot.run is not None or not slot.ready or slot.leaving:
                continue
            name = self._next()
            if name is None:
                return
            (self.root / name).mkdir(parents=True, exist_ok=True)
            (self.root / name / FAILURE).unlink(missing_ok=True)
            request = {"run": self.configs[name].model_dump(mode="json"), "runs_root": str(self.root)}
            if not slot.send(request):
                self.waiting.appendleft(name)  # the reader sees the death and replaces the worker
                continue
            slot.run = name
            self.progress.started(name)

    def _reopen_trunks(self) -> None:
        """A trunk that is DONE but lacks the fork of a waiting branch goes back to the checkpoint before that fork."""
        lost: dict[str, int] = {}
        for config in (self.configs[name] for name in self.waiting):
            trunk = config.parent
            if self.signum is not None or trunk is None or any(slot.run == trunk for slot in self.slots):
                continue
            fork = fork_of(self.root, config)
            if is_done(self.root / trunk) and not fork.is_dir() and fork not in self.reopened:
                lost[trunk] = min(config.start_step, lost.get(trunk, config.start_step))
        for trunk, step in lost.items():
            reopen(self.root / trunk, step)
            self.reopened.add(self.root / trunk / "checkpoints" / f"step_{step}")
            self.waiting.appendleft(trunk)
            self.progress.reopened(
                trunk,
                f"its checkpoint step_{step}, which an unfinished branch starts from, is damaged or missing; "
                f"training it again from the last good one before that, or from the start",
            )

    def _lost_fork(self, name: str) -> bool:
        """A branch found its fork damaged: drop that and wait for the trunk; False if that was done in vain before."""
        config = self.configs[name]
        fork = fork_of(self.root, config)
        if fork in self.reopened and is_done(self.root / str(config.parent)):
            return False
        if fork.is_dir():
            shutil.rmtree(fork)
        self.waiting.appendleft(name)
        self.progress.jobs.pop(name, None)
        return True

    def _read(self, slot: Slot) -> None:
        assert slot.process.stdout is not None
        data = os.read(slot.process.stdout.fileno(), 1 << 16)
        if not data:
            self._died(slot)
            return
        *lines, slot.buffer = (slot.buffer + data).split(b"\n")
        for line in lines:
            event = json.loads(line)
            if event["event"] == "ready":
                slot.ready, self.early_deaths = True, 0
            elif event["event"] == "finished":
                slot.leaving = event["status"] == "interrupted"
                self._finished(slot, event["status"], event.get("kind", ""), event.get("message", ""))
            else:
                self.progress.event(event)

    def _finished(self, slot: Slot, status: str, kind: str = "", message: str = "") -> None:
        name, slot.run = slot.run, None
        if name is None:
            return
        if status == "interrupted" and self.signum is None:
            status, kind, message = "failed", "stopped", "its worker was told to stop; the checkpoints are kept"
        if status == "failed":
            if kind == "fork" and self._lost_fork(name):
                return
            self._fail(name, kind, message)
        elif status == "interrupted":
            self.interrupted.add(name)
        self.progress.finished(name, status, message)
        if status == "done":
            self.on_done(name)

    def _fail(self, name: str, kind: str, message: str) -> None:
        self.failed[name] = (kind, message)
        with contextlib.suppress(OSError):  # a full disk must not hide the reason
            write_atomic(self.root / name / FAILURE, json.dumps({"kind": kind, "message": message}) + "\n")

    def _died(self, slot: Slot) -> None:
        """The worker's pipe closed: its run failed unless it was told to stop; a new worker takes the slot."""
        self.selector.unregister(slot.process.stdout)  # type: ignore[arg-type]
        code = slot.process.wait()
        slot.close()
        self.slots.remove(slot)
        log = Path(slot.log.name)
        if slot.run is not None:
            stopped = self.signum is not None and code <= 0
            how = f"killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
            message = "" if stopped else f"its worker was {how} (out of memory? see {log}); the checkpoints are kept"
            self._finished(slot, "interrupted" if stopped else "failed", "died", message)
        elif not slot.ready:
            self.early_deaths += 1
            if self.early_deaths >= MAX_WORKER_DEATHS and not self.slots:
                lines = log.read_text(errors="replace").strip().splitlines()
                raise RunFailure(f"workers do not start: {lines[-1] if lines else f'exit code {code}'} (see {log})")
        if self.signum is None and (self.waiting or any(other.run for other in self.slots)):
            self._spawn()

    def _block_the_rest(self) -> None:
        if self.signum is not None:
            self.interrupted |= set(self.waiting)
            return
        for name in self.waiting:
            message = f"its trunk {self.configs[name].parent} did not reach step {self.configs[name].start_step}"
            self.failed[name] = ("blocked", message)
            self.progress.finished(name, "failed", message)

    def _shut_down(self) -> None:
        for slot in self.slots:
            if slot.run is not None:  # only when the pool itself failed
                slot.process.send_signal(signal.SIGTERM)
            slot.process.stdin.close()  # type: ignore[union-attr]
        for slot in self.slots:
            try:
                slot.process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                slot.process.kill()
                slot.process.wait()
            slot.close()
        self.slots = []
