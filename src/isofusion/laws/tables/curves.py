"""Training curves to one final loss per run: TensorBoard logs, Weights & Biases exports,
any table with a run and a step column.

Rows are read once and only the last few points of each run are kept, so a history of any length takes memory in
proportion to its runs. A run that was resumed from a checkpoint logs some steps twice: the later rows count.
"""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from isofusion.errors import InputError
from isofusion.laws.tables.cells import ALIASES, parse, plain, resolve
from isofusion.laws.tables.collect import Record, some
from isofusion.laws.tables.events import read_folder
from isofusion.laws.tables.sources import Table

EMA_FORGOTTEN = 1e-6  # weight of everything before the kept window of an exponential average
WIDE = re.compile(r"(.+) - (.+?)(__MIN|__MAX)?", re.DOTALL)  # the column names of a chart exported from W&B


@dataclass(frozen=True)
class Final:
    """How a curve becomes one loss: `last` value, `mean:K` of the last K, or `ema:W` with weight W on the past.

    `ema:W` is sum W^a x_a / sum W^a over ages a = 0 (the newest), 1, ...: bias-corrected, as TensorBoard smooths.
    """

    kind: str = "last"
    number: float = 1

    @classmethod
    def parse(cls, text: str | None) -> Final:
        """Raises InputError for anything but last, mean:K (K >= 1) and ema:W (0 < W < 1, at most 0.9999)."""
        kind, _, number = (text or "last").partition(":")
        try:
            value = float(number or 1)
        except ValueError:
            value = math.nan
        if kind == "last" and not number:
            return cls()
        if kind == "mean" and number and value >= 1 and value == int(value):
            return cls(kind, int(value))
        if kind == "ema" and 0 < value <= 0.9999:
            return cls(kind, value)
        raise InputError(f"--final {text}: give last, mean:K (the last K points) or ema:W (0 < W <= 0.9999)")

    @property
    def window(self) -> int:
        """Points of a curve that matter."""
        if self.kind == "ema":
            return math.ceil(math.log(EMA_FORGOTTEN) / math.log(self.number))
        return int(self.number)

    def value(self, losses: Sequence[float]) -> float:
        """The final loss of a curve's last points, oldest first (nats/token)."""
        newest = np.asarray(losses, dtype=np.float64)[::-1][: self.window]
        weights = self.number ** np.arange(len(newest)) if self.kind == "ema" else np.ones(len(newest))
        return float(newest @ weights / weights.sum())

    def __str__(self) -> str:
        return {
            "last": "the last logged value",
            "mean": f"the mean of the last {self.number:g} logged values",
            "ema": f"an exponential average of weight {self.number:g}",
        }[self.kind]


@dataclass
class Tail:
    """The end of one run's curve."""

    points: deque[tuple[float, float]]  # (step, loss), oldest first
    latest: dict[str, Any] = field(default_factory=dict)  # the newest cell of every other role
    then: dict[str, Any] = field(default_factory=dict)  # the same when the newest loss was logged
    count: int = 0
    furthest: float = -math.inf
    rewinds: int = 0
    diverged: float | None = None  # the step from which on the loss is not finite


class Tails:
    """The ends of all curves, by run, filled row by row."""

    def __init__(self, where: str, final: Final, limit: int) -> None:
        self.where, self.final, self.limit = where, final, limit
        self.runs: dict[str, Tail] = {}

    def add(self, run: str, step: float, loss: float) -> None:
        """One logged loss; a step at or before the last one replaces what was logged from there on."""
        tail = self.tail(run)
        if tail.points and step <= tail.points[-1][0]:
            tail.rewinds += 1
            while tail.points and tail.points[-1][0] >= step:
                tail.points.pop()
        tail.furthest = max(tail.furthest, step)
        tail.count += 1
        if math.isfinite(loss):
            tail.points.append((step, loss))
            tail.diverged = None
        elif tail.diverged is None:
            tail.diverged = step

    def tail(self, run: str) -> Tail:
        """The run's tail, new if need be. Raises InputError beyond the limit of runs."""
        found = self.runs.get(run)
        if found is None:
            if len(self.runs) >= self.limit:
                raise InputError(f"{self.where}: more than {self.limit:,} runs; does the column name runs? (--run)")
            found = self.runs[run] = Tail(deque(maxlen=self.final.window))
        return found

    def records(self, tokens_per_step: float | None, notes: list[str]) -> Iterator[Record]:
        """One record per run, in order of appearance, and notes on how its loss was read."""
        for name, tail in self.runs.items():
            cells = {**tail.latest, **tail.then, "run": name}
            label = f"run '{name}'"
            if tail.diverged is not None:
                yield label, cells, f"the loss is not finite from step {tail.diverged:g} on (diverged?)"
                continue
            if not tail.points:
                yield label, cells, "no loss was logged"
                continue
            last = tail.points[-1][0]
            if last < tail.furthest:
                reached = f"its rows end at step {last:g} after step {tail.furthest:g}"
                yield label, cells, f"{reached}; sort the table by run and step"
                continue
            cells["loss"] = self.final.value([loss for _, loss in tail.points])
            if tokens_per_step is not None:
                cells["d"] = last * tokens_per_step
            yield label, cells, ""
        counts = [tail.count for tail in self.runs.values()]
        if counts:
            span = f"{min(counts):,}" + (f" to {max(counts):,}" if max(counts) > min(counts) else "")
            notes.append(f"the final loss of each of {len(counts)} runs is {self.final} ({span} values logged)")
        short = [
            name for name, tail in self.runs.items() if self.final.kind == "mean" and tail.count < self.final.number
        ]
        if short:
            notes.append(
                f"fewer than {self.final.number:g} values were logged by {some(short)}: all of them are averaged"
            )
        resumed = [name for name, tail in self.runs.items() if tail.rewinds]
        if resumed:
            notes.append(f"steps go back in {some(resumed)} (resumed?): the later rows count")


def read_loss(value: Any, table_unit: str) -> tuple[float | None, str]:
    """(loss, "") of one logged cell, None where nothing was logged; a NaN that was logged stays NaN.

    Frames mark what was not logged with NaN, files with an empty cell: so NaN is missing in a frame (unit "row").
    """
    number, reason = parse(value, "logged")
    if reason == "empty" or (math.isnan(number) and not isinstance(value, str) and table_unit == "row"):
        return None, ""
    if "is not a number" in reason:
        return None, reason
    return number, ""


def history(table: Table, columns: Mapping[str, str], steps: str | None, tails: Tails) -> None:
    """Fill the tails from rows with a run, a step and a loss column; other roles take their cell at the last loss.

    columns: role to column, with run and loss. steps: the column that orders a run's rows, None for their order.
    """
    roles = [role for role in columns if role not in ("run", "loss")]
    names = [columns["run"], columns["loss"], *([steps] if steps else []), *(columns[role] for role in roles)]
    first = 3 if steps else 2
    for number, cells, fault in table.rows(names):
        where = f"{table.where}: {table.unit} {number}"
        run = str(cells[0]) if cells[0] not in (None, "") else ""
        if fault or not run:
            raise InputError(f"{where}: {fault or 'no run is named'}")
        loss, reason = read_loss(cells[1], table.unit)
        step = float(number)
        if steps:
            step, wrong = parse(cells[2], "logged")
            if wrong and loss is not None:
                reason = reason or f"column '{steps}': {wrong}"
        if reason:
            raise InputError(f"{where}: {reason}")
        tail = tails.tail(run)
        for role, cell in zip(roles, cells[first:], strict=True):
            if cell is not None and cell != "" and cell == cell:  # NaN is the one value unequal to itself
                tail.latest[role] = cell
        if loss is not None:
            tails.add(run, step, loss)
            tail.then = dict(tail.latest)


def wide_metrics(header: Sequence[str]) -> dict[str, dict[str, str]]:
    """{metric: {run: column}} of a chart exported from W&B (columns Step, run - metric, run - metric__MIN), or {}."""
    out: dict[str, dict[str, str]] = {}
    for name in header[1:]:
        found = WIDE.fullmatch(name)
        if not found:
            return {}
        if not found[3]:
            out.setdefault(found[2], {})[found[1]] = name
    return out


def wide(table: Table, metric: str | None, tails: Tails) -> bool:
    """Fill the tails from an exported chart. Returns whether its x axis counts tokens. Raises on several metrics."""
    metrics = wide_metrics(table.header)
    known = [name for name in metrics if plain(name.split("/")[-1]) in ALIASES["loss"]]
    if metric is None and len(metrics) > 1 and len(known) != 1:
        raise InputError(f"{table.where}: {len(metrics)} metrics ({some(list(metrics))}); choose one with --loss")
    chosen = metric or (known or list(metrics))[0]
    if chosen not in metrics:
        raise InputError(f"{table.where}: no metric '{chosen}' (for loss). Metrics: {some(list(metrics))}")
    runs = metrics[chosen]
    axis = table.header[0]
    for number, cells, fault in table.rows([axis, *runs.values()]):
        where = f"{table.where}: {table.unit} {number}"
        step, reason = parse(cells[0], "logged")
        if fault or reason:
            raise InputError(f"{where}: {fault or f'column {axis!r}: {reason}'}")
        for run, cell in zip(runs, cells[1:], strict=True):
            loss, reason = read_loss(cell, table.unit)
            if reason:
                raise InputError(f"{where}, column '{runs[run]}': {reason}")
            if loss is not None:
                tails.add(run, step, loss)
    for run in runs:
        tails.tail(run)  # a run that never logged the metric is a bad run, not a missing one
    return plain(axis.split("/")[-1]) in ALIASES["d"]


def fill_from_events(path: Path, tag: str | None, tails: Tails, notes: list[str]) -> dict[str, dict[str, Any]]:
    """Fill the tails from TensorBoard logs; returns per run its hyper-parameters and each tag at the last loss.

    tag: the scalar that is the loss, found by its usual names if None. A folder below a run that logs no loss gives
    that run its hyper-parameters (some writers put them there). Raises InputError where no run logs a loss.
    """
    columns: dict[str, dict[str, Any]] = {}
    below: dict[str, dict[str, Any]] = {}
    tags: dict[str, None] = {}
    found: list[str] = []
    for name, run in read_folder(path):
        tags |= dict.fromkeys(run.tags)
        loss = tag or resolve(str(path), list(run.tags), "loss", None, found)[0]
        if loss not in run.tags:
            below[name] = run.hparams
            continue
        for step, value in zip(*run.tags[loss], strict=True):
            tails.add(name, step, value)
        last = tails.tail(name).points[-1][0] if tails.tail(name).points else math.inf
        columns[name] = {other: _at(last, *logged) for other, logged in run.tags.items()} | run.hparams
        if run.cut:
            notes.append(f"run '{name}': its log ends inside a record (killed, or still running)")
    if not columns:
        raise InputError(
            f"{path}: no run logs {tag or 'a loss'}; name its tag with --loss. Tags: {', '.join(tags) or 'none'}"
        )
    for name, hparams in below.items():
        above = [run for run in columns if name.startswith(f"{run}/") or run == path.resolve().name]
        if above:
            parent = max(above, key=lambda run: (name.startswith(f"{run}/"), len(run)))
            columns[parent] = {**hparams, **columns[parent]}
        else:
            found.append(f"run '{name}' logs no {tag or 'loss'} and is left out")
    notes += dict.fromkeys(found)
    return columns


def _at(step: float, steps: Sequence[float], values: Sequence[float]) -> float:
    """The newest value logged up to a step, or the newest of all where none was."""
    upto = [value for at, value in zip(steps, values, strict=True) if at <= step]
    return (upto or list(values))[-1]
