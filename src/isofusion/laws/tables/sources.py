"""Any table as a header and a stream of rows: CSV, TSV, JSONL, JSON, parquet, frames, dicts, a pipe; bounded memory.

A source says how it counts its rows (`line 3` of a file, `row 2` of a frame, from 0), so that every error can name one.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from isofusion.errors import InputError

MAX_LINE = 1 << 24  # bytes in one line; without a bound a file with no line end would be read whole
MAX_JSON = 1 << 26  # bytes of a JSON document that is not one object per line
PEEK_ROWS, PEEK_CHARS = 10_000, 1 << 25  # rows (and characters) of a JSONL file looked at to learn its keys
BATCH = 8_192  # rows of parquet or Arrow decoded at a time
HINT = "give a table with a header line and columns for parameters, tokens and loss"
GZIP_ERRORS = (EOFError, gzip.BadGzipFile, zlib.error)

Row = tuple[int, tuple[Any, ...], str]  # its number, the cells asked for, why it is broken as a whole (else "")
Lines = Iterator[tuple[int, str]]


@dataclass(frozen=True)
class Table:
    """A header and the rows after it, to be read once, then closed."""

    where: str  # the source's name, as the user gave it
    header: list[str]
    unit: str  # "line" or "row": what the numbers count
    rows: Callable[[Sequence[str]], Iterator[Row]]  # the cells of the named columns, row by row
    close: Callable[[], None] = lambda: None


def open_table(source: Any, name: str = "") -> Table:
    """The table in a path, "-" (standard input), an open file, a dict of columns, a list of dicts or a frame.

    pandas, polars, pyarrow and anything else with `__arrow_c_stream__` are read without being imported. Raises
    InputError where there is nothing to read or the format is none of these.
    """
    if isinstance(source, (str, Path)):
        return _file(source)
    if hasattr(source, "read"):
        inner = getattr(source, "buffer", source)
        binary = inner if hasattr(inner, "peek") else io.BufferedReader(_Recoded(source))
        found = getattr(source, "name", "")
        return _bytes(binary, name or (found if isinstance(found, str) and found else "stream"))
    if isinstance(source, Mapping):
        return _columns({str(key): values for key, values in source.items()}, name or "columns")
    if isinstance(source, (list, tuple)) and all(isinstance(row, Mapping) for row in source):
        return _keyed(((i, flatten(row)) for i, row in enumerate(source)), name or "rows", "row")
    if hasattr(source, "__arrow_c_stream__") and not hasattr(source, "iloc"):  # pandas needs pyarrow for it and
        return _arrow(source, name or "frame")  # refuses columns of mixed type, where one bad cell can be named
    if hasattr(source, "columns") and hasattr(source, "__getitem__"):
        return _columns({str(column): source[column] for column in source.columns}, name or "frame")
    raise InputError(
        f"{name or 'runs'}: cannot read a {type(source).__name__}; give a path, a pandas, polars or pyarrow table, "
        "a dict of columns or a list of dicts"
    )


def _file(source: str | Path) -> Table:
    if str(source) == "-":
        return _bytes(sys.stdin.buffer, "standard input")
    path = Path(source)
    if not path.exists():
        raise InputError(f"{path}: no such file; {HINT}")
    if path.is_dir():
        raise InputError(f"{path}: this is a folder; {HINT}")
    if path.suffix == ".toml":
        raise InputError(
            f"{path}: this is a study's file, no table; give the folder of the study, e.g. runs/{path.stem}"
        )
    handle = path.open("rb")
    try:
        return replace(_bytes(handle, str(path), path), close=handle.close)
    except BaseException:
        handle.close()
        raise


class _Recoded(io.RawIOBase):
    """UTF-8 bytes of anything that has `read(size)`, of text or bytes."""

    def __init__(self, source: Any) -> None:
        self.source, self.left = source, b""

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        if not self.left:
            found = self.source.read(len(target))
            self.left = found.encode("utf-8", "replace") if isinstance(found, str) else (found or b"")
        part, self.left = self.left[: len(target)], self.left[len(target) :]
        target[: len(part)] = part
        return len(part)


def _bytes(binary: Any, where: str, path: Path | None = None) -> Table:
    """Which format it is, from its first bytes (a name may lie, and a pipe has none)."""
    start = binary.peek(64)
    if start[:2] == b"\x1f\x8b":
        binary = io.BufferedReader(gzip.GzipFile(fileobj=binary))
        try:
            start = binary.peek(64)
        except GZIP_ERRORS as error:
            raise InputError(f"{where}: broken gzip file ({error})") from None
    if start[:4] == b"PAR1":
        if path is None or not path.is_file():
            raise InputError(f"{where}: parquet cannot be read from a pipe (its index is at the end); give the file")
        return _parquet(path)
    if start[:2] == b"PK":
        raise InputError(f"{where}: this is a spreadsheet or zip file; save the sheet as CSV")
    if start[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):  # "Unicode text" of spreadsheets
        binary = io.BufferedReader(_Recoded(codecs.getreader("utf-16")(binary, "replace")))
    elif b"\x00" in start:
        raise InputError(f"{where}: this is a binary file; {HINT}")
    lines = _lines(binary, where)
    first = next((line for line in lines if line[1].strip()), None)
    if first is None:
        raise InputError(f"{where}: the file is empty; {HINT}")
    if first[1].lstrip()[0] in "{[":
        return _json(binary, first, lines, where)
    rows = _returns(_chain(first, lines))
    first = next(line for line in rows if line[1].strip())
    return _delimited(_chain(first, rows), first, where)


def _lines(binary: Any, where: str) -> Lines:
    """(number from 1, line), refusing a line beyond MAX_LINE instead of reading it into memory."""
    number = 0
    try:
        while line := binary.readline(MAX_LINE):
            number += 1
            if len(line) == MAX_LINE:
                raise InputError(f"{where}: line {number} is longer than {MAX_LINE:,} bytes; {HINT}")
            yield number, line.decode("utf-8-sig" if number == 1 else "utf-8", "replace")
    except GZIP_ERRORS as error:
        raise InputError(f"{where}: broken gzip file after line {number} ({error})") from None


def _returns(lines: Lines) -> Lines:
    """Lines that may end in a carriage return alone, as old Macs wrote them."""
    more = 0
    for number, line in lines:
        if "\r" not in line.rstrip("\r\n"):
            yield number + more, line
            continue
        for i, part in enumerate(part for part in re.split(r"(?<=\r)(?!\n)", line) if part):
            more += i > 0
            yield number + more, part


def _chain(first: tuple[int, str], rest: Lines) -> Lines:
    yield first
    yield from rest


def _delimited(lines: Lines, first: tuple[int, str], where: str) -> Table:
    mark = max(",\t;|", key=first[1].count)  # of equals the first: the comma
    before = first[0] - 1
    reader = csv.reader((line for _, line in lines), delimiter=mark)

    def stream() -> Iterator[tuple[int, list[str]]]:
        try:
            for row in reader:
                if any(cell and not cell.isspace() for cell in row):  # blank lines, and the ",,," spreadsheets add
                    yield before + reader.line_num, row
        except csv.Error as error:
            raise InputError(f"{where}: line {before + reader.line_num}: {error}; does a quote never close?") from None

    header = [name.strip() for name in next(stream())[1]]

    def rows(names: Sequence[str]) -> Iterator[Row]:
        at = [header.index(name) for name in names]
        width = len(header)
        for number, row in stream():
            cells = tuple(row[i] if i < len(row) else None for i in at)
            fault = ""
            if len(row) > width and any(row[width:]):
                fault = f"{len(row)} cells under {width} columns (a number like 1,300,000 needs quotes)"
            yield number, cells, fault

    return Table(where, header, "line", rows)


def flatten(row: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys joined by dots: {"config": {"params": 1}} has the column `config.params`."""
    out: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, Mapping):
            out |= flatten(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value
    return out


def _json(binary: Any, first: tuple[int, str], lines: Lines, where: str) -> Table:
    """One object per line; else the whole document: a list of objects, or an object of columns."""

    def stream() -> Iterator[tuple[int, dict[str, Any]]]:
        for number, line in _chain(first, lines):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                raise InputError(f"{where}: line {number} is not JSON ({error})") from None
            if not isinstance(row, dict):
                raise InputError(f'{where}: line {number} is no object like {{"n": 1e9, "d": 2e10, "loss": 2.5}}')
            yield number, flatten(row)

    try:
        one = json.loads(first[1])
    except (json.JSONDecodeError, RecursionError):
        one = None
        if re.match(r'\{\s*"[^"]*"\s*:', first[1].lstrip()) and first[1].rstrip().endswith("}"):
            return _keyed(stream(), where, "line")  # a first line that is broken: let it be named
    if isinstance(one, dict) and not any(isinstance(value, list) and len(value) > 1 for value in one.values()):
        return _keyed(stream(), where, "line")
    body = first[1] + binary.read(MAX_JSON).decode("utf-8", "replace")
    if len(body) >= MAX_JSON:
        raise InputError(f"{where}: a JSON document beyond {MAX_JSON:,} bytes; write one object per line (JSONL)")
    try:
        document = json.loads(body)
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{where}: neither JSON nor one JSON object per line ({error})") from None
    if isinstance(document, (dict, list)) and document:
        return open_table(document, where)
    raise InputError(f"{where}: no rows; give a list of objects, or an object of columns")


def _keyed(source: Iterator[tuple[int, dict[str, Any]]], where: str, unit: str) -> Table:
    """Rows as mappings whose keys may come and go (an evaluation logged every hundredth step)."""
    ahead: list[tuple[int, dict[str, Any]]] = []
    keys: dict[str, None] = {}
    seen = 0
    for number, row in source:
        ahead.append((number, row))
        keys |= dict.fromkeys(row)
        seen += sum(16 + len(value) if isinstance(value, (str, list)) else 16 for value in row.values())
        if len(ahead) >= PEEK_ROWS or seen > PEEK_CHARS:
            break

    def rows(names: Sequence[str]) -> Iterator[Row]:
        ahead.reverse()
        while ahead:  # popped, so that the rows read ahead do not stay in memory
            number, row = ahead.pop()
            yield number, tuple(row.get(name) for name in names), ""
        for number, row in source:
            yield number, tuple(row.get(name) for name in names), ""

    return Table(where, list(keys), unit, rows)


def _columns(columns: Mapping[str, Any], where: str) -> Table:
    """A dict of columns (lists, arrays, Series); columns of dicts (a run's config and summary) are flattened."""
    for name, values in columns.items():
        if hasattr(values, "columns"):
            raise InputError(f"{where}: two columns are named '{name}'; rename all but one")
        if not hasattr(values, "__len__") or isinstance(values, (str, Mapping)):
            raise InputError(f"{where}: column '{name}' is no list of values")
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise InputError(f"{where}: columns of unequal length ({listed})")
    listed_columns = {name: _plain(values) for name, values in columns.items()}
    if any(len(values) and isinstance(values[0], Mapping) for values in listed_columns.values()):
        whole = zip(*listed_columns.values(), strict=True)
        return _keyed(((i, flatten(dict(zip(columns, row, strict=True)))) for i, row in enumerate(whole)), where, "row")

    def rows(names: Sequence[str]) -> Iterator[Row]:
        for number, row in enumerate(zip(*(listed_columns[name] for name in names), strict=True)):
            yield number, row, ""

    return Table(where, list(columns), "row", rows)


def _plain(values: Any) -> Sequence[Any]:
    """Plain Python values of a list, array or Series (NaN stays NaN)."""
    for method in ("tolist", "to_list"):
        if hasattr(values, method):
            found = getattr(values, method)()
            return found if isinstance(found, list) else [found]
    return list(values)


def _arrow(source: Any, where: str) -> Table:
    import pyarrow as pa

    reader = pa.RecordBatchReader.from_stream(source)
    return _batches(reader.schema, lambda names: reader, where)


def _parquet(path: Path) -> Table:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: broken parquet file ({error})") from None
    return _batches(file.schema_arrow, lambda names: file.iter_batches(BATCH, columns=names), str(path))


def _batches(schema: Any, batches: Callable[[list[str]], Iterable[Any]], where: str) -> Table:
    """Arrow batches, struct columns flattened to `config.params`; of a file only the asked columns are decoded."""
    import pyarrow as pa

    def flat(table: Any) -> Any:
        while any(pa.types.is_struct(field.type) for field in table.schema):
            table = table.flatten()
        return table

    header = list(flat(schema.empty_table()).schema.names)

    def rows(names: Sequence[str]) -> Iterator[Row]:
        number = 0
        fields = [field.name for field in schema]
        needed = [f for f in fields if any(name == f or name.startswith(f"{f}.") for name in names)]
        for batch in batches(needed):
            for start in range(0, batch.num_rows, BATCH):
                table = flat(pa.Table.from_batches([batch.slice(start, BATCH)]))
                for row in zip(*(table.column(name).to_pylist() for name in names), strict=True):
                    yield number, row, ""
                    number += 1

    return Table(where, header, "row", rows)
