"""Which rows of a table belong to the law: `--where COLUMN=VALUE`, `--arm VALUE`, and a note where arms are pooled.

Two architectures, or one on two data sets, do not follow one law. A table that holds several is fitted as one only if
nobody says otherwise, and then the reader is told.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from isofusion.errors import InputError
from isofusion.laws.table import Array, distinct
from isofusion.laws.tables.cells import plain
from isofusion.laws.tables.sources import Row, Table

ARMS = (
    *("arm", "architecture", "arch", "model", "model type", "model family", "family", "variant", "method", "dataset"),
    *("data", "corpus", "mixture", "domain", "setting", "condition", "experiment", "metric", "task", "split", "mode"),
)
"""Usual names of columns that tell one law's runs from another's; compared as `cells.ALIASES` are."""
ENOUGH_RUNS, ENOUGH_SIZES = 4, 2  # of one value: with fewer it may name a size or a run, and is no arm
MOST_VALUES = 5  # values of a column that a message lists


def arm_columns(header: Sequence[str], used: Sequence[str] = ()) -> list[str]:
    """The columns that look like arms, the likeliest first, without those that have a role already."""
    names = {name: {plain(name), re.split(r"[/.]", plain(name))[-1]} for name in header if name not in used}
    return list(dict.fromkeys(name for arm in ARMS for name, known in names.items() if arm in known))


def arm_column(where: str, header: Sequence[str], value: str) -> str | None:
    """The one column that --arm VALUE speaks of, None where no column looks like it; raises InputError between two."""
    found = arm_columns(header)
    exact = [name for name in found if plain(name) == "arm"]
    if len(exact or found) > 1:
        raise InputError(
            f"{where}: --arm {value}: {_listed(found)} could each name the arm; choose with --where {found[0]}={value}"
        )
    return next(iter(exact or found), None)


@dataclass(frozen=True)
class Chosen:
    """Rows to read: of each column, any of its values."""

    values: Mapping[str, tuple[str, ...]]

    @classmethod
    def of(cls, where: str, header: Sequence[str], pairs: Sequence[str] | Mapping[str, Any]) -> Chosen:
        """From `COLUMN=VALUE` texts (or one) or {column: value}; raises InputError for anything else."""
        pairs = [pairs] if isinstance(pairs, str) else pairs
        texts = [f"{k}={v}" for k, v in pairs.items()] if isinstance(pairs, Mapping) else list(pairs)
        out: dict[str, tuple[str, ...]] = {}
        for text in texts:
            cuts = [i for i, letter in enumerate(text) if letter == "="]
            if not cuts:
                raise InputError(f"--where {text}: write COLUMN=VALUE, e.g. --where dataset=c4")
            column, value = next(
                ((text[:i].strip(), text[i + 1 :].strip()) for i in cuts if text[:i].strip() in header), ("", "")
            )
            if not column:
                raise InputError(
                    f"{where}: no column '{text[: cuts[0]].strip()}' (for --where). Columns: {', '.join(header)}"
                )
            out[column] = (*out.get(column, ()), value)
        return cls(out)

    def match(self, cells: Mapping[str, Any]) -> bool:
        """Whether a row with these cells is chosen."""
        return all(any(_same(cells.get(column), v) for v in values) for column, values in self.values.items())

    def __str__(self) -> str:
        return ", ".join(f"--where {column}={v}" for column, values in self.values.items() for v in values)


def only(table: Table, chosen: Chosen, notes: list[str]) -> Table:
    """The table with the chosen rows alone; how many they were is noted, and none at all raises InputError."""
    columns = list(chosen.values)

    def rows(names: Sequence[str]) -> Iterator[Row]:
        seen: list[Counter[str]] = [Counter() for _ in columns]
        kept = every = 0
        for number, cells, fault in table.rows([*names, *columns]):
            every += 1
            own = cells[len(names) :]
            for counter, cell in zip(seen, own, strict=True):
                if len(counter) < 1000:
                    counter[_text(cell)] += 1
            if chosen.match(dict(zip(columns, own, strict=True))):
                kept += 1
                yield number, cells[: len(names)], fault
        if every and not kept:
            raise InputError(none_chosen(table.where, chosen, seen))
        notes.append(f"{chosen}: {kept} of {every} rows")

    return replace(table, rows=rows)


def none_chosen(where: str, chosen: Chosen, seen: Sequence[Counter[str]]) -> str:
    """What to say where no row is chosen: the values that the columns hold."""
    held = "; ".join(f"'{name}' holds {_counts(counter)}" for name, counter in zip(chosen.values, seen, strict=True))
    return f"{where}: no row has {str(chosen).replace('--where ', '')}; {held}"


def pooled(arms: Mapping[str, Sequence[str]], n: Array) -> str | None:
    """A note where rows of several arms are fitted as one. arms: column to its cells, row for row with n [m]."""
    found: dict[str, Counter[str]] = {}
    for column, cells in arms.items():
        _, value, count = np.unique(np.asarray(cells), return_inverse=True, return_counts=True)
        parts = np.split(n[np.argsort(value, kind="stable")], np.cumsum(count)[:-1])  # N of each value's runs
        if sum(len(part) >= ENOUGH_RUNS and distinct(part) >= ENOUGH_SIZES for part in parts) > 1:
            found[column] = Counter(cells)
    if not found:
        return None
    told = "; ".join(f"'{column}': {_counts(counter)}" for column, counter in list(found.items())[:3])
    first = next(iter(found))
    arm = " or --arm VALUE" if len(arms) == 1 or plain(first) == "arm" else ""
    return (
        f"rows that may follow different laws are fitted together as one: {told}; choose with "
        f"--where {first}=VALUE{arm}"
    )


def _text(cell: Any) -> str:
    return "" if cell is None else str(cell).strip()


def _same(cell: Any, value: str) -> bool:
    """Equal as texts, or as numbers (a frame may hold 1.0 where the user writes 1)."""
    text = _text(cell)
    if text == value:
        return True
    try:
        return float(text) == float(value)
    except ValueError:
        return False


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)


def _counts(counter: Counter[str]) -> str:
    more = f" and {len(counter) - MOST_VALUES} more" if len(counter) > MOST_VALUES else ""
    return ", ".join(f"{value or 'empty'} ({count})" for value, count in counter.most_common(MOST_VALUES)) + more
