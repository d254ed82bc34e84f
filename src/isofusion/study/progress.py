"""Live progress of a study: a rich display on a terminal, plain lines (one per finished run, one per 15 s) without.

Time left = work still to do / work done per second in this session, where work is `spec.cost_hint` (about FLOPs), so a
study whose long runs come first does not look finished at half time.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from isofusion.config import RunConfig
from isofusion.study.spec import cost_hint

PLAIN_INTERVAL = 15.0  # seconds between status lines without a terminal
REDRAW_INTERVAL = 0.5


def duration(seconds: float) -> str:
    """3723 -> '1 h 02 min'; 75 -> '1 min 15 s'."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 48 * 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    if whole < 3 * 365 * 86400:
        return f"{whole / 86400:,.1f} days"
    return f"{whole / 365 / 86400:,.1f} years"


def si(value: float) -> str:
    """1234567 -> '1.23M'; units K, M, B, T and scientific beyond."""
    for limit, unit in ((1e15, ""), (1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= limit:
            return f"{value:.2e}" if not unit else f"{value / limit:.3g}{unit}"
    return f"{value:.3g}"


def size(n_bytes: float) -> str:
    """1234567 -> '1.23 MB'; decimal units."""
    for limit, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if n_bytes >= limit:
            return f"{n_bytes / limit:.3g} {unit}"
    return f"{n_bytes:.0f} B"


@dataclass
class Job:
    """One running run as its events show it."""

    config: RunConfig
    first_step: int | None = None  # a resumed run starts later than start_step
    step: int = 0
    loss: float | None = None

    @property
    def share(self) -> float:
        """Done share of this run's own steps, 0 to 1."""
        start, end = self.config.start_step, self.config.end_step
        return min(1.0, max(0.0, (self.step - start) / (end - start)))


@dataclass
class Progress:
    """Plain lines; `RichProgress` draws. `configs` are all runs, `done` the names finished in earlier sessions."""

    configs: dict[str, RunConfig]
    done: set[str]
    console: Console
    jobs: dict[str, Job] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    started_at: float = field(default_factory=lambda: time.monotonic())
    session_work: float = 0.0
    session_slots: float = 0.0
    last_line: float = field(default_factory=lambda: time.monotonic())

    def open(self) -> None:
        if self.done:
            self.console.print(f"{len(self.done)} of {len(self.configs)} runs were finished before", highlight=False)

    def started(self, run: str) -> None:
        self.jobs[run] = Job(self.configs[run], step=self.configs[run].start_step)

    def event(self, event: dict[str, Any]) -> None:
        job = self.jobs.get(event.get("run", ""))
        if job is None:
            return
        if event.get("event") == "message":
            self.line(f"{event['run']}: {event.get('message')}")
        if "step" in event:
            job.step = int(event["step"])
            if job.first_step is None:
                job.first_step = job.step
        if event.get("loss") is not None:
            job.loss = float(event["loss"])

    def finished(self, run: str, status: str, message: str = "") -> None:
        job = self.jobs.pop(run, None)
        if job is not None:
            self.session_work += self._work(job, 1.0 if status == "done" else job.share)
            self.session_slots += self._slots(job, job.config.end_step if status == "done" else job.step)
        if status == "done":
            self.done.add(run)
        elif status == "failed":
            self.failed[run] = message
        self.line(self._finished_line(run, status, job, message))

    def reopened(self, run: str, why: str) -> None:
        """A finished run has to be trained again in part."""
        self.done.discard(run)
        self.line(f"{run}: {why}")

    def _finished_line(self, run: str, status: str, job: Job | None, message: str) -> str:
        loss = f", training loss {job.loss:.4f}" if job is not None and job.loss is not None else ""
        tail = f": {message}" if message else ""
        return f"[{len(self.done)}/{len(self.configs)}] {run} {status}{loss}{tail}"

    def line(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)
        self.last_line = time.monotonic()

    def tick(self) -> None:
        if time.monotonic() - self.last_line >= PLAIN_INTERVAL:
            running = ", ".join(
                f"{name} {100 * job.share:.0f}%" + (f" loss {job.loss:.3f}" if job.loss is not None else "")
                for name, job in self.jobs.items()
            )
            self.line(f"[{self.summary()}] {running}")

    def close(self) -> None:
        pass

    def summary(self) -> str:
        parts = [f"{len(self.done)}/{len(self.configs)} runs"]
        if self.failed:
            parts.append(f"{len(self.failed)} failed")
        rate = self.slots_per_second()
        if rate:
            parts.append(f"{si(rate)} tokens/s")
        left = self.seconds_left()
        parts.append(f"about {duration(left)} left" if left is not None else "time left not known yet")
        return ", ".join(parts)

    def slots_per_second(self) -> float:
        """Token slots per second of all jobs together, averaged over this session."""
        live = sum(self._slots(job, job.step) for job in self.jobs.values())
        return (self.session_slots + live) / max(1e-9, time.monotonic() - self.started_at)

    def seconds_left(self) -> float | None:
        live = sum(self._work(job, job.share) for job in self.jobs.values())
        elapsed, worked = time.monotonic() - self.started_at, self.session_work + live
        if elapsed < 2 or worked <= 0:
            return None
        missing = sum(
            cost_hint(config) * (1 - (self.jobs[name].share if name in self.jobs else 0.0))
            for name, config in self.configs.items()
            if name not in self.done and name not in self.failed
        )
        return missing * elapsed / worked

    @staticmethod
    def _work(job: Job, share: float) -> float:
        start, end = job.config.start_step, job.config.end_step
        begun = ((job.first_step or start) - start) / (end - start)
        return cost_hint(job.config) * max(0.0, share - begun)

    @staticmethod
    def _slots(job: Job, step: int) -> float:
        begun = job.first_step if job.first_step is not None else job.config.start_step
        return max(0, step - begun) * job.config.train.rows_per_step * job.config.data.row_len


@dataclass
class RichProgress(Progress):
    """The same numbers as a table that stays in place, finished runs scrolling above it."""

    live: Live | None = None
    last_draw: float = 0.0

    def open(self) -> None:
        super().open()
        self.live = Live(self.render(), console=self.console, auto_refresh=False, transient=True)
        self.live.start(refresh=True)

    def tick(self) -> None:
        if self.live is not None and time.monotonic() - self.last_draw >= REDRAW_INTERVAL:
            self.live.update(self.render(), refresh=True)
            self.last_draw = time.monotonic()

    def close(self) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = None

    def render(self) -> Group:
        table = Table(box=None, padding=(0, 1), show_header=bool(self.jobs))
        for title, justify in (("run", "left"), ("", "left"), ("step", "right"), ("loss", "right")):
            table.add_column(title, justify=justify)  # type: ignore[arg-type]
        for name, job in self.jobs.items():
            loss = f"{job.loss:.4f}" if job.loss is not None else "…"
            bar = ProgressBar(total=1.0, completed=job.share, width=24)
            table.add_row(name, bar, f"{job.step}/{job.config.end_step}", loss)
        total = sum(cost_hint(config) for config in self.configs.values())
        done = sum(cost_hint(self.configs[name]) for name in self.done)
        done += sum(cost_hint(job.config) * job.share for job in self.jobs.values())
        whole = Table.grid()  # a bar ends no line of its own
        whole.add_row(ProgressBar(total=total, completed=done, width=60))
        return Group(table, whole, Text(self.summary()))


def make_progress(configs: dict[str, RunConfig], done: set[str], console: Console) -> Progress:
    """The display that suits the console: live on a terminal, plain lines in a log or a pipe."""
    return (RichProgress if console.is_terminal else Progress)(configs, set(done), console)
