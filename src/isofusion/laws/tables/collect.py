"""Records of any source to checked `Runs`: side table, numbers out of names, bad and repeated rows, doubtful units."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from isofusion.errors import InputError
from isofusion.laws.table import MAX_LISTED, ROW, SAME, Array, Runs, clusters
from isofusion.laws.tables.cells import COUNTS, has, need, parse, resolve
from isofusion.laws.tables.choose import pooled
from isofusion.laws.tables.commas import settle_rows
from isofusion.laws.tables.sources import Row, Table, open_table

# ("line 3" or "run 'a'", raw cell by role ("@NAME": of a column that may name an arm), why it is broken or "")
Record = tuple[str, dict[str, Any], str]

LABELS = ("run", "group", "size", "seed")
SIDE = ("n", "d", "c", "se", "oracle", "group", "size", "seed")  # what a side table may tell of a run
MAX_ROWS = 100_000  # rows of a table of finished runs: a longer one holds something else (curves, samples)
REPEAT = "the same N, D, loss, seed and run as an earlier row"
MAX_NAMED = 20  # dropped rows named in a note
COST_RATIO = 10.0  # a median of C / 6ND beyond this factor is a doubt about units
FEW = 1e4  # N or D below this throughout, beside a large other: a doubt about units
TOTAL_OF = 6  # rows that a row of totals has above it at least
LEAST_RATIO = 0.01  # a median of tokens per parameter below: a doubt about D
RISES = 0.5  # rank correlation of loss with N D above which the "loss" rises
PERPLEXITY = 15.0  # nats/token; a uniform guess over 200,000 tokens costs 12.2


@dataclass
class Reading:
    """Records yet to be read from a source, the column behind each role, and what the user should know."""

    records: Iterable[Record]
    names: dict[str, str]
    notes: list[str]


def some(names: Sequence[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def limited(table: Table, names: Sequence[str]) -> Iterator[Row]:
    """The rows of a table of finished runs; raises InputError past MAX_ROWS, so that any file is refused in seconds."""
    for count, row in enumerate(table.rows(names)):
        if count >= MAX_ROWS:
            raise InputError(
                f"{table.where}: more than {MAX_ROWS:,} rows; a table of final losses has one row per finished run. "
                "Keep each run's last row, or read training curves with --final last (and --run, --step)"
            )
        yield row


def read_meta(
    source: Any, columns: Mapping[str, str | None], known: Mapping[str, str], notes: list[str]
) -> dict[str, dict[str, Any]]:
    """{run: raw cell by role} of a side table with a run column and any of n, d, c, group, size, seed, se, oracle.

    columns: role to column as the user named them, here or in the main table; known: those the main table has. A unit
    in a column's name is applied here. Raises InputError without a run column, with a run twice, or where a named
    column is in neither table.
    """
    table = open_table(source)
    try:
        named = columns.get("run")
        run, _ = resolve(table.where, table.header, "run", named if has(table.header, named) else None, notes)
        if run is None:
            raise need(table.where, table.header, "run")
        found: dict[str, tuple[str, float]] = {}
        for role in SIDE:
            given = columns.get(role)
            if given and role in known and not has(table.header, given):
                continue  # the user's column is the main table's
            column, scale = resolve(table.where, table.header, role, given, notes)
            if column is not None:
                found[role] = column, scale
        out: dict[str, dict[str, Any]] = {}
        numeric = [None, *(None if role in LABELS else (role, column) for role, (column, _) in found.items())]
        rows = limited(table, [run, *(column for column, _ in found.values())])
        for number, cells, fault in settle_rows(rows, numeric, notes):
            name = str(cells[0])
            if fault:
                raise InputError(f"{table.where}: {table.unit} {number}: {fault}")
            if name in out:
                raise InputError(
                    f"{table.where}: {table.unit} {number}: run '{name}' is there twice; keep one row per run"
                )
            out[name] = {}
            for (role, (_, scale)), cell in zip(found.items(), cells[1:], strict=True):
                value, reason = parse(cell, role, scale)
                out[name][role] = value if role in COUNTS and not reason else cell
        return out
    finally:
        table.close()


def join(records: Iterable[Record], meta: Mapping[str, Mapping[str, Any]], notes: list[str]) -> Iterator[Record]:
    """The records with the side table's cells; a run it lacks is broken, a run that has no curve is noted."""
    seen = set()
    for label, cells, fault in records:
        name = str(cells.get("run", ""))
        seen.add(name)
        if name not in meta:
            yield label, cells, fault or "not in the side table (--meta)"
        else:
            yield label, {**cells, **meta[name]}, fault
    unused = [name for name in meta if name not in seen]
    if unused:
        notes.append(f"the side table has {len(unused)} runs without losses here: {some(unused)}")


def from_name(pattern: str, flag: str) -> re.Pattern[str]:
    """A regular expression with one group holding the number, e.g. `n([0-9.]+[MB])`. Raises InputError otherwise."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise InputError(f"{flag} {pattern}: not a regular expression ({error})") from None
    if compiled.groups != 1:
        raise InputError(f"{flag} {pattern}: put the number in one pair of brackets, e.g. 'n([0-9.]+[MB])'")
    return compiled


@dataclass(frozen=True)
class Bad:
    """A row that cannot be used: where, why, and the reason in words that fit every row with the same fault."""

    label: str
    why: str
    kind: str = ""

    def __str__(self) -> str:
        if self.kind == REPEAT:
            return f"{self.label} {self.why}"
        return f"{self.label}{', ' if self.why.startswith(('column', 'run')) else ': '}{self.why}"


def report(bad: Sequence[Bad], rows: int, where: str, drop_bad: bool, notes: list[str]) -> None:
    """Raise InputError for bad rows, or note them where they may be dropped; raise too where none is left."""
    if not bad:
        return
    if not drop_bad or len(bad) == rows:
        listed = "; ".join(map(str, bad[:MAX_LISTED])) + (
            f" and {len(bad) - MAX_LISTED} more" * (len(bad) > MAX_LISTED)
        )
        if any(row.kind == REPEAT for row in bad[:MAX_LISTED]):
            listed += " (the same N, D, loss, seed and run: is one run there twice?)"
        if drop_bad:
            raise InputError(f"{where}: none of the {rows} rows is usable: {listed}")
        raise InputError(f"{where}: {listed}; mend or delete those rows, or leave them out with --drop-bad")
    kinds: dict[str, list[str]] = {}
    for row in bad:
        kinds.setdefault(row.kind or row.why, []).append(row.label)
    listed = "; ".join(f"{kind} ({some(labels, MAX_NAMED)})" for kind, labels in kinds.items())
    notes.append(f"dropped {len(bad)} of {rows} rows: {listed}")


def collect(
    reading: Reading,
    where: str,
    *,
    drop_bad: bool = False,
    meta: Any = None,
    columns: Mapping[str, str | None] | None = None,
    patterns: Mapping[str, str | None] | None = None,
) -> tuple[Runs, dict[str, Array], list[str]]:
    """(Runs, the user's own columns (roles "+name"), notes) from records; see readers.read_runs for the options.

    Raises InputError naming every bad row (the first few) unless drop_bad, and where no row is left.
    """
    records, notes = reading.records, reading.notes
    if meta is not None:
        records = join(records, read_meta(meta, columns or {}, reading.names, notes), notes)
    compiled = {role: from_name(text, f"--{role}-from-name") for role, text in (patterns or {}).items() if text}
    numbers: dict[str, list[float]] = {}
    labels: dict[str, list[str]] = {role: [] for role in LABELS}
    arms: dict[str, list[str]] = {}
    seen: dict[tuple[Any, ...], str] = {}
    bad: list[Bad] = []
    rows, last = 0, ""
    for label, cells, fault in records:
        rows += 1
        values, reason = _values(cells, reading.names, compiled)
        texts = {role: "" if cells.get(role) is None else str(cells[role]) for role in LABELS}
        key = (values.get("n"), values.get("d"), values.get("loss"), texts["run"], texts["group"], texts["seed"])
        if (
            reason
            and len(reading.names) > 1
            and all(str(cells[r]).strip() == name for r, name in reading.names.items())
        ):
            reason = "the header again"
        if fault or reason:
            bad.append(Bad(label, fault or reason))
            continue
        if key in seen:
            bad.append(Bad(label, f"repeats {seen[key]}", REPEAT))
            continue
        seen[key] = last = label
        for role, value in values.items():
            numbers.setdefault(role, []).append(value)
        for role in LABELS:
            labels[role].append(texts[role])
        for role in (role for role in cells if role[0] == "@"):
            arms.setdefault(role[1:], []).append("" if cells[role] is None else str(cells[role]))
    if not rows:
        raise InputError(f"{where}: a header and no rows; a fit needs at least 3 sizes x 3 token budgets")
    if total := _total(numbers):
        bad.append(Bad(last, f"N, D and loss are the {total} of those of the rows above: no run"))
        every: list[list[Any]] = [*numbers.values(), *labels.values(), *arms.values()]
        for column in every:
            column.pop()
    report(bad, rows, where, drop_bad, notes)
    whole = {column: texts for column, texts in arms.items() if len(texts) == len(numbers["n"])}
    if told := pooled(whole, np.asarray(numbers["n"])):
        notes.append(told)
    if "group" in reading.names and reading.names["group"] == reading.names.get("n"):
        # N read off a figure differs by its reading: runs of one size share their luck, not runs of one number
        labels["group"] = [
            f"size {k} {seed}" for k, seed in zip(clusters(np.asarray(numbers["n"])), labels["seed"], strict=True)
        ]
        notes.append(
            f"column '{reading.names['n']}' is N: runs of one size{' and seed' if any(labels['seed']) else ''} "
            f"({len(set(labels['group']))}) share their luck, a size being all N within {100 * (SAME - 1):.0f} %"
        )
    return _build(numbers, labels, where, notes)


def _total(numbers: Mapping[str, list[float]]) -> str:
    """ "sums" or "means" where the last row holds these of the rows above, as a spreadsheet appends them, else ""."""
    columns = np.array([numbers.get(role, []) for role in ("n", "d", "loss")])
    if columns.shape[1] < TOTAL_OF + 1:
        return ""
    above, last = columns[:, :-1], columns[:, -1]
    for word, value in (("sums", above.sum(axis=1)), ("means", above.mean(axis=1))):
        if np.allclose(last, value, rtol=1e-3, atol=0.0):
            return word
    return ""


def _values(
    cells: dict[str, Any], names: Mapping[str, str], patterns: Mapping[str, re.Pattern[str]]
) -> tuple[dict[str, float], str]:
    """({role: number}, why the record is bad or ""); N or D that is not given comes from C = 6 N D."""
    values: dict[str, float] = {}
    for role, pattern in patterns.items():
        match = pattern.search(str(cells.get("run", "")))
        if not match or match[1] is None:
            return values, f"--{role}-from-name finds no number in '{cells.get('run', '')}'"
        cells[role] = match[1]
    for role in [role for role in dict.fromkeys((*names, *cells)) if role not in LABELS and role[0] != "@"]:
        values[role], reason = parse(cells.get(role), role)
        if reason:
            return values, f"column '{names.get(role, role)}': {reason}"
    for role, other in (("n", "d"), ("d", "n")):
        if role not in values:
            if not {"c", other} <= set(values):
                word, flag = ("parameters", "--n-from-name") if role == "n" else ("tokens", "--tokens-per-step")
                return values, f"no {word} known; give a column (--{role}), a side table (--meta) or {flag}"
            values[role] = values["c"] / (6.0 * values[other])
            values["derived"] = 1.0
    return values, ""


def _build(
    numbers: dict[str, list[float]], labels: dict[str, list[str]], where: str, notes: list[str]
) -> tuple[Runs, dict[str, Array], list[str]]:
    derived = "derived" in numbers
    given = {role: texts for role, texts in labels.items() if any(texts)}
    if "group" in given:  # a row without a group is its own trunk
        given["group"] = [text or f"{ROW}{i}" for i, text in enumerate(given["group"])]
    runs = Runs.of(
        *(numbers["n"], numbers["d"], numbers["loss"]),
        c=numbers.get("c"),
        group=given.get("group"),
        size=given.get("size"),
        seed=given.get("seed"),
        se=numbers.get("se"),
        oracle=numbers.get("oracle"),
        compute="6nd" if derived or "c" not in numbers else "given",
        label=re.split(r"[/\\]", where)[-1],
        where=where,
    )
    names = set(given.get("run", ()))
    if 1 < len(names) < len(runs) and "group" not in given:
        notes.append(
            f"{len(runs)} rows of {len(names)} runs by name: rows of one run share its luck; say so with --group"
        )
    notes += doubts(runs)
    extra = {role[1:]: np.asarray(values) for role, values in numbers.items() if role.startswith("+")}
    return runs, extra, notes


def doubts(runs: Runs) -> list[str]:
    """What looks like wrong units: counts in millions, a perplexity for a loss, C far from 6 N D."""
    out = []
    largest_n, largest_d = float(runs.n.max()), float(runs.d.max())
    if largest_n < FEW and largest_d > 1e3 * FEW:
        out.append(f"no run has more than {largest_n:g} parameters; if the column counts millions: --n COLUMN:M")
    if largest_n < FEW and largest_d < FEW:
        out.append(
            f"N is at most {largest_n:g} and D {largest_d:g}; for millions and billions: --n COLUMN:M --d COLUMN:B"
        )
    if largest_n > 1e2 * FEW and float(np.median(runs.d / runs.n)) < LEAST_RATIO:
        few = "; if the column counts billions: --d COLUMN:B" if largest_d < FEW else ""
        out.append(
            f"no run has more than {largest_d:g} tokens{few}; if it counts steps, tokens are these times the tokens of "
            "a step, and if tokens per parameter, these times N"
        )
    if float(np.median(runs.loss)) > PERPLEXITY:
        out.append(f"half the losses exceed {PERPLEXITY:g} nats/token; a perplexity is no loss: take its logarithm")
    if len(runs) >= TOTAL_OF and (rise := _rise(runs)) > RISES:
        out.append(
            f"the losses rise with N and D (rank correlation with N D {rise:+.2f}): accuracies and scores are no "
            "losses, which fall; for an accuracy take 1 - accuracy"
        )
    ratio = float(np.median(runs.c / (6.0 * runs.n * runs.d)))
    if not 1 / COST_RATIO < ratio < COST_RATIO:
        out.append(f"C is {ratio:.3g} x 6 N D (median); are N, D and C in parameters, tokens and FLOPs?")
    return out


def _rise(runs: Runs) -> float:
    """Spearman's correlation of the loss with N D; NaN where all losses are one."""
    ranks = [np.unique(v, return_inverse=True)[1] for v in (runs.loss, runs.n * runs.d)]
    return float(np.asarray(np.corrcoef(np.stack(ranks)))[0, 1]) if min(r.max() for r in ranks) else math.nan
