"""Which sign is a column's decimal mark: `0,125` and `3,14` against `1,250,000`, settled by the column as a whole.

One cell like `1,300B` does not say whether it means 1.3 or 1,300 billion; other cells of its column may. Where one of
them can be read in one way only and none contradicts it, the column is read that way and a note says so; otherwise its
cells keep the rule of `cells.parse`, which refuses what is not clear.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from isofusion.laws.tables.cells import COUNTS, parse
from isofusion.laws.tables.sources import Row

SPACES = re.compile(r"[_ '\u00a0\u202f\u2009]")
HEAD = re.compile(r"[+-]?(?:[\d.,_ '\u00a0\u202f\u2009]*\d)")
Kind = Literal["", "comma", "dotted comma", "point", "grouped point", "either comma", "either point", "odd"]


def kind(text: str) -> Kind:
    """What a number's text says of decimal marks.

    "comma" and "point": that sign is one, without doubt ("dotted comma": and dots separate thousands, as in 1.250,5;
    "grouped point": and commas do, as in 1,250,000). "either ...": a single sign before three digits. "odd": neither
    convention writes so. "": no sign at all, or no number.
    """
    head = HEAD.match(text)
    digits = SPACES.sub("", head[0]).lstrip("+-") if head else ""
    if "," not in digits and "." not in digits:
        return ""
    if re.fullmatch(r"\d{1,3}(?:\.\d{3})+,\d+|[1-9]\d{0,2}(?:\.\d{3}){2,}", digits):
        return "dotted comma"
    if re.fullmatch(r"\d{1,3}(?:,\d{3})+\.\d+|[1-9]\d{0,2}(?:,\d{3}){2,}", digits):
        return "grouped point"
    single = re.fullmatch(r"(\d*)([.,])(\d+)", digits)
    if not single:
        return "odd"
    if re.fullmatch(r"[1-9]\d{0,2}", single[1]) and len(single[3]) == 3:
        return "either comma" if single[2] == "," else "either point"
    return "comma" if single[2] == "," else "point"


def settle(cells: Sequence[Any], role: str, column: str, notes: list[str]) -> Sequence[Any]:
    """The cells of one column of numbers with decimal points and without separators, where the column says how."""
    if not any(isinstance(cell, str) and ("," in cell or cell.count(".") > 1) for cell in cells):
        return cells
    kinds = [kind(cell.strip()) if isinstance(cell, str) else "" for cell in cells]
    witness: dict[str, str] = {}
    for cell, is_ in zip(cells, kinds, strict=True):
        witness.setdefault(is_, str(cell).strip())
    comma = witness.get("dotted comma") or witness.get("comma")
    grouped = witness.get("grouped point")
    if comma and not grouped and "point" not in witness:
        if "either point" in witness and not _dots_group(cells, kinds, role):
            return cells
        dots = ", dots separate thousands" if {"dotted comma", "either point"} & set(kinds) else ""
        notes.append(f"column '{column}': commas are decimal marks{dots}, as '{comma}' shows")
        return [
            _number(cell, ".", ",") if is_ not in ("", "odd") else cell for cell, is_ in zip(cells, kinds, strict=True)
        ]
    if grouped and not comma and role in COUNTS:
        doubtful = [cell for cell, is_ in zip(cells, kinds, strict=True) if is_ == "either comma"]
        if any(parse(cell, role)[1] for cell in doubtful):
            notes.append(f"column '{column}': commas separate thousands, as '{grouped}' shows")
        return [
            _number(cell, ",", ".") if is_ == "either comma" else cell for cell, is_ in zip(cells, kinds, strict=True)
        ]
    return cells


def settle_rows(
    rows: Iterable[Row], columns: Sequence[tuple[str, str] | None], notes: list[str]
) -> list[tuple[int, tuple[Any, ...], str]]:
    """Rows whose first cells are those of `columns`: (role, name) of a column of numbers, None of another."""
    out = list(rows)
    for i, column in enumerate(columns):
        if column is None:
            continue
        cells = [row[1][i] for row in out]
        found = settle(cells, *column, notes)
        if found is not cells:
            out = [
                (number, (*old[:i], cell, *old[i + 1 :]), fault)
                for (number, old, fault), cell in zip(out, found, strict=True)
            ]
    return out


def _dots_group(cells: Sequence[Any], kinds: Sequence[str], role: str) -> bool:
    """Whether `1.250` beside decimal commas is 1,250: another cell must show dots that separate, and no unit follow."""
    bare = all(HEAD.fullmatch(cell.strip()) for cell, is_ in zip(cells, kinds, strict=True) if is_ == "either point")
    return role in COUNTS and "dotted comma" in kinds and bare


def _number(cell: str, separator: str, mark: str) -> str:
    """The cell with its separators gone and its decimal mark a point; its unit stays."""
    text = cell.strip()
    head = HEAD.match(text)
    if head is None:
        return cell
    number = SPACES.sub("", head[0]).replace(separator, "").replace(mark, ".")
    return number + text[head.end() :]
