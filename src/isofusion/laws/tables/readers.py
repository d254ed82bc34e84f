"""Runs from whatever users have: a table, a study's folder, training curves; checked, and named by line where bad.

`read_runs` is the one entry: it finds out what the source is (sources.py opens tables, curves.py and events.py reduce
curves to final losses), maps columns to roles (cells.py), refuses or drops bad rows, and says what it assumed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from isofusion.errors import InputError
from isofusion.laws.table import DOMAINS, LEDGER, Array, Runs, counted
from isofusion.laws.tables import curves, events
from isofusion.laws.tables.cells import has, need, parse, resolve
from isofusion.laws.tables.choose import Chosen, arm_column, arm_columns, none_chosen, only
from isofusion.laws.tables.collect import LABELS, MAX_ROWS, Bad, Reading, Record, collect, limited, report
from isofusion.laws.tables.commas import settle_rows
from isofusion.laws.tables.curves import Final, Tails
from isofusion.laws.tables.sources import Table, open_table

STUDY = LEDGER | {"size", "seed", "flops_6nd", "variant", "excluded"}  # columns of results.csv that are read
REQUIRED = ("n", "d", "loss")
ROLES = ("n", "d", "loss", "c", "se", "oracle", "run", "group", "size", "seed")


@dataclass(frozen=True)
class How:
    """How to read: which columns, what of a study, how a curve ends; see read_runs."""

    columns: Mapping[str, str | None] = field(default_factory=dict)
    extra: Mapping[str, str] = field(default_factory=dict)
    arm: str | None = None
    domain: str | None = None
    compute_axis: str | None = None
    drop_bad: bool = False
    final: str | None = None
    step: str | None = None
    meta: Any = None
    n_from_name: str | None = None
    d_from_name: str | None = None
    tokens_per_step: float | str | None = None
    where: Sequence[str] | Mapping[str, Any] = ()

    def __post_init__(self) -> None:
        given = {"c" if role == "flops" else role: name for role, name in self.columns.items() if name}
        unknown = [role for role in given if role not in ROLES]
        if unknown:
            raise InputError(f"columns: no role {', '.join(map(repr, unknown))}; roles: {', '.join(ROLES)}")
        object.__setattr__(self, "columns", given)

    @property
    def of_study(self) -> list[str]:
        """Flags that choose from a study."""
        chosen = (("--arm", self.arm), ("--domain", self.domain), ("--compute-axis", self.compute_axis))
        return [flag for flag, value in chosen if value is not None]


def read_runs(
    source: Any,
    *,
    columns: Mapping[str, str | None] | None = None,
    arm: str | None = None,
    domain: str | None = None,
    compute_axis: str | None = None,
    drop_bad: bool = False,
    final: str | None = None,
    step: str | None = None,
    meta: Any = None,
    n_from_name: str | None = None,
    d_from_name: str | None = None,
    tokens_per_step: float | str | None = None,
    where: Sequence[str] | Mapping[str, Any] | None = None,
) -> tuple[Runs, list[str]]:
    """(Runs, notes on what was assumed, dropped or looks doubtful) of anything that holds finished runs.

    source: a path to CSV, TSV, JSONL, JSON (each also .gz) or parquet; "-" for standard input; an open file; a dict of
    columns, a list of dicts; a pandas, polars or pyarrow table; a study's folder or its results.csv; a folder of
    TensorBoard event files; a chart or history exported from Weights & Biases.
    columns: role (n parameters, d tokens, loss nats/token, c FLOPs, se and oracle nats/token, run, group, size, seed)
    to column name, `params:M` where its numbers are in millions; a role left out is found by its usual names (se and
    oracle never). Without d: D = C / (6 N); without n: N = C / (6 D); without c: C = 6 N D.
    where: rows to read, ["dataset=c4", "seed=0"] or {"dataset": "c4"}; one column's values are alternatives, several
    columns must all match. arm, domain, compute_axis ("exact" or "6nd") choose from a study, arm from another table's
    column that looks like it too. drop_bad: leave bad rows out and say so in a note
    instead of raising. final ("last", "mean:K", "ema:W") and step (the ordering column) reduce training curves, one
    group of rows per `run`; meta is a side table keyed by run name with n, d and the like; n_from_name and d_from_name
    are regular expressions with one group, applied to run names; tokens_per_step gives D from the last step.

    Raises InputError naming file, line, column and reason: no such column, no rows, text, NaN, zero or negative
    numbers, the same run twice, more than 100,000 rows (which cannot be finished runs).
    """
    how = How(
        *(columns or {}, {}, arm, domain, compute_axis, drop_bad, final, step, meta),
        *(n_from_name, d_from_name, tokens_per_step, where or ()),
    )
    runs, _, notes = read(source, how)
    return runs, notes


def read_columns(source: Any, extra: Mapping[str, str], **options: Any) -> tuple[Runs, dict[str, Array], list[str]]:
    """(Runs, {name: values of that column, row for row}, notes): read_runs with further columns of finite numbers.

    extra: name of a law's variable to column name, e.g. {"sparsity": "S"}; `params:M` units as in read_runs. Options
    as in read_runs. Not for training curves. Raises InputError as read_runs does.
    """
    return read(source, How(columns=options.pop("columns", None) or {}, extra=extra, **options))


def read(source: Any, how: How) -> tuple[Runs, dict[str, Array], list[str]]:
    """What read_columns returns, for options already gathered."""
    if isinstance(source, Runs):
        return source, {}, []
    if isinstance(source, (str, Path)) and str(source) != "-":
        path = Path(source)
        if path.is_dir() and (path / "results.csv").is_file():
            source = path / "results.csv"
        elif any(path.rglob(events.PATTERN)) if path.is_dir() else path.is_file() and "tfevents" in path.name:
            if how.of_study:
                raise InputError(
                    f"{path}: {', '.join(how.of_study)} choose from a study's results.csv, and this is a folder of "
                    "logs; choose its runs with --where COLUMN=VALUE"
                )
            return _collect(_events(path, how), str(path), how)
        elif path.is_dir():
            raise InputError(
                f"{path}: no results.csv and no event files; give a study folder with finished runs, "
                "a folder of TensorBoard logs, or a table"
            )
    table = open_table(source)
    try:
        ledger = set(table.header) >= LEDGER and any(name.startswith("loss_") for name in table.header)
        said: list[str] = []
        if how.where:
            table = only(table, Chosen.of(table.where, table.header, how.where), said)
        if ledger and (how.of_study or not how.columns):
            runs, extra, notes = _study(table, how)
            return runs, extra, said + notes
        if how.arm is not None and not ledger:
            column = arm_column(table.where, table.header, how.arm)
            if column is not None:
                table = only(table, Chosen({column: (how.arm,)}), said)
                how = replace(how, arm=None)
        if how.of_study:
            raise InputError(
                f"{table.where}: {', '.join(how.of_study)} choose from a study's results.csv (columns arm, run, "
                "parent, n, tokens, flops, loss_caption, ...), and this is another table; name its columns with --n, "
                "--d, --loss and choose rows with --where COLUMN=VALUE"
            )
        reading = _curves(table, how) or _rows(table, how, ledger)
        runs, extra, notes = _collect(reading, table.where, how)
        return runs, extra, said + notes
    finally:
        table.close()


def _collect(reading: Reading, where: str, how: How) -> tuple[Runs, dict[str, Array], list[str]]:
    patterns = {"n": how.n_from_name, "d": how.d_from_name}
    return collect(reading, where, drop_bad=how.drop_bad, meta=how.meta, columns=how.columns, patterns=patterns)


def _study(table: Table, how: How) -> tuple[Runs, dict[str, Array], list[str]]:
    """One arm and domain of a study's results.csv, without tuning and excluded runs."""
    where = table.where
    if how.columns:
        raise InputError(
            f"{where}: {', '.join(how.of_study)} fix the columns already; drop --n, --d, --loss and the like"
        )
    if how.domain is not None and how.domain not in DOMAINS:
        raise InputError(f"--domain {how.domain}: choose {', '.join(DOMAINS)}")
    if how.compute_axis not in (None, "exact", "6nd"):
        raise InputError(f"--compute-axis {how.compute_axis}: choose exact or 6nd")
    domain, axis = how.domain or "mean", how.compute_axis or "exact"
    used = [name for name in table.header if name in STUDY or name.startswith(("loss_", "oracle_"))]
    used += [column for column in how.extra.values() if column not in used and column in table.header]
    rows = []
    for number, cells, fault in limited(table, used):
        row = dict(zip(used, cells, strict=True))
        if counted(row):
            rows.append((f"{table.unit} {number}", row, fault))
    arms = sorted({str(row["arm"]) for _, row, _ in rows})
    if how.arm is None and len(arms) > 1:
        raise InputError(f"{where}: {len(arms)} arms; choose one with --arm: {', '.join(arms)}")
    arm = how.arm if how.arm is not None else (arms[0] if arms else None)
    chosen = [entry for entry in rows if entry[1]["arm"] == arm]
    if not chosen:
        return Runs.from_results([row for _, row, _ in rows], arm, domain, axis), {}, []  # it lists the arms
    notes = [] if how.domain else ["no --domain given: fitted to the mean loss over domains (loss_mean)"]
    asked = {"n": "n", "tokens": "d", f"loss_{domain}": "loss", "flops" if axis == "exact" else "flops_6nd": "c"}
    asked |= {column: name for name, column in how.extra.items()}
    for column in asked:
        if column not in table.header:
            raise InputError(f"{where}: no column '{column}'. Columns: {', '.join(table.header)}")
    bad, keep, seen = [], [], dict[str, str]()
    for label, row, fault in chosen:
        wrong = (f"column '{column}': {why}" for column, role in asked.items() if (why := parse(row[column], role)[1]))
        run = str(row["run"])
        reason = fault or (f"it is in {seen[run]} already" if run in seen else "") or next(wrong, "")
        seen.setdefault(run, label)
        if reason:
            bad.append(Bad(label, f"run {run}, {reason}", reason))
        else:
            keep.append(row)
    report(bad, len(chosen), where, how.drop_bad, notes)
    extra = {name: np.asarray([parse(row[column], name)[0] for row in keep]) for name, column in how.extra.items()}
    return Runs.from_results(keep, arm, domain, axis), extra, notes


def _resolve(
    where: str, header: Sequence[str], how: How, notes: list[str], roles: Sequence[str] = ROLES
) -> dict[str, tuple[str, float]]:
    """{role: (column, unit)} of the roles that have a column."""
    found = {}
    for role in roles:
        name = how.columns.get(role)
        if how.meta is not None and role != "run" and not has(header, name):
            name = None  # it names a column of the side table
        column, scale = resolve(where, header, role, name, notes)
        if column is not None:
            found[role] = column, scale
    if "size" not in how.columns and "size" in found and found["size"][0] == found.get("n", ("",))[0]:
        del found["size"]
    return found


def _check(table: Table, found: Mapping[str, Any], how: How) -> None:
    """Raise InputError, before any row is read, where N, D or the loss cannot become known."""
    given = {"n": how.n_from_name, "d": how.d_from_name or how.tokens_per_step}
    have = set(found) | {role for role, value in given.items() if value is not None or how.meta is not None}
    for role in REQUIRED:
        if role not in have and (role == "loss" or not {"n", "d", "c"} - {role} <= have):
            hint = " (or FLOPs with --c)" if role == "d" else ""
            raise need(table.where, table.header, role, hint)
    if "run" not in found and (how.meta is not None or how.n_from_name or how.d_from_name):
        raise need(table.where, table.header, "run")


def _rows(table: Table, how: How, ledger: bool) -> Reading:
    """One record per row of a plain table (of a study's results.csv: per counted run)."""
    notes: list[str] = []
    found = _resolve(table.where, table.header, how, notes)
    _check(table, found, how)
    for name, column in how.extra.items():
        found[f"+{name}"] = resolve(table.where, table.header, name, column, notes)  # type: ignore[assignment]
    hidden = [name for name in ("arm", "variant", "excluded") if ledger and name in table.header]
    beside = [] if ledger else arm_columns(table.header, [column for column, _ in found.values()])

    def records() -> Iterator[Record]:
        arms = set()
        columns = [column for column, _ in found.values()]
        numeric = [None if role in LABELS else (role, column) for role, (column, _) in found.items()]
        for number, cells, fault in settle_rows(limited(table, [*columns, *hidden, *beside]), numeric, notes):
            state = dict(zip([*hidden, *beside], cells[len(columns) :], strict=True))
            if ledger and not counted(state):
                continue
            arms.add(str(state.get("arm")))
            if ledger and len(arms) > 1:
                raise InputError(
                    f"{table.where}: the rows of several arms ({', '.join(sorted(arms))}) are no one law; "
                    "choose with --arm and --domain instead of naming columns"
                )
            pairs = zip(found.items(), cells[: len(columns)], strict=True)
            yield (
                f"{table.unit} {number}",
                {role: _scaled(cell, role, unit) for (role, (_, unit)), cell in pairs}
                | {f"@{name}": state[name] for name in beside},
                fault,
            )

    return Reading(records(), {role: column for role, (column, _) in found.items()}, notes)


def _scaled(cell: Any, role: str, scale: float) -> Any:
    """The cell in single parameters, tokens or FLOPs; as it is where it has no unit (or is no number)."""
    number, reason = parse(cell, role, scale) if scale != 1.0 else (0.0, "as it is")
    return cell if reason else number


def _curves(table: Table, how: How) -> Reading | None:
    """One record per run of a table of training curves, or None where the table is none."""
    notes: list[str] = []
    tails = Tails(table.where, Final.parse(how.final), MAX_ROWS)
    per_step = _tokens_per_step(how)
    if curves.wide_metrics(table.header):
        counts_tokens = curves.wide(table, how.columns.get("loss"), tails)
        return Reading(tails.records(1.0 if counts_tokens and per_step is None else per_step, notes), {}, notes)
    asked = any(value is not None for value in (how.final, how.step, how.tokens_per_step))
    if not asked and "_step" not in table.header:
        return None
    found = _resolve(table.where, table.header, how, notes)
    if "run" not in found and not asked:
        return None  # W&B's own `_step` in a table of one row per run
    if "run" not in found:
        raise need(table.where, table.header, "run", " (the rows of one run are one training curve)")
    _check(table, found, how)
    steps, _ = resolve(table.where, table.header, "step", how.step, notes)
    if per_step is not None and steps is None:
        raise InputError(f"{table.where}: --tokens-per-step needs the column that counts steps; name it with --step")
    beside = arm_columns(table.header, [column for column, _ in found.values()])
    read = {role: column for role, (column, _) in found.items()} | {f"@{name}": name for name in beside}
    curves.history(table, read, steps, tails)
    for tail in tails.runs.values():
        for cells in (tail.latest, tail.then):
            cells |= {role: _scaled(cell, role, found[role][1]) for role, cell in cells.items() if role in found}
    return Reading(tails.records(per_step, notes), {role: column for role, (column, _) in found.items()}, notes)


def _tokens_per_step(how: How) -> float | None:
    if how.tokens_per_step is None:
        return None
    number, reason = parse(how.tokens_per_step, "d")
    if reason:
        raise InputError(f"--tokens-per-step {how.tokens_per_step}: {reason}")
    return number


def _events(path: Path, how: How) -> Reading:
    """One record per run below a folder of TensorBoard logs; hyper-parameters and last scalars serve as columns."""
    notes: list[str] = []
    tails = Tails(str(path), Final.parse(how.final), MAX_ROWS)
    columns = curves.fill_from_events(path, how.columns.get("loss"), tails, notes)
    header = list(dict.fromkeys(name for cells in columns.values() for name in cells))
    if how.where:
        chosen = Chosen.of(str(path), header, how.where)
        seen = [Counter(str(cells.get(name, "")) for cells in columns.values()) for name in chosen.values]
        for name in [name for name, cells in columns.items() if not chosen.match(cells)]:
            del columns[name], tails.runs[name]
        if not columns:
            raise InputError(none_chosen(str(path), chosen, seen))
        notes.append(f"{chosen}: {len(columns)} of {sum(seen[0].values())} runs")
    found = _resolve(str(path), header, how, notes, [role for role in ROLES if role not in ("loss", "run")])
    for name, tail in tails.runs.items():
        for role, (column, unit) in found.items():
            tail.latest[role] = _scaled(columns[name].get(column), role, unit)
        tail.latest |= {f"@{arm}": columns[name].get(arm) for arm in arm_columns(header)}
    return Reading(
        tails.records(_tokens_per_step(how), notes), {role: column for role, (column, _) in found.items()}, notes
    )
