"""The table every fit starts from: one row per finished run, checked once so that no fit sees a bad number.

Units: n in parameters, d in tokens, c in FLOPs, loss in nats per token. `size` labels runs of one model size, `group`
labels the trunk (runs of one group share its luck: docs/study-file.md), `seed` tells repeated trunks apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from isofusion.errors import InputError
from isofusion.laws.tables.cells import parse

Array = npt.NDArray[np.float64]
Labels = npt.NDArray[np.str_]

SAME = 1.05  # two values closer than this factor count as one model size or one token budget
MAX_LISTED = 5  # bad rows named in one message
ROW = "row "  # with its number: the trunk of a run without a group
LEDGER = frozenset(("arm", "run", "parent", "n", "tokens", "flops"))  # and loss_<domain>: a study's results.csv
DOMAINS = ("caption", "interleaved", "text", "mean")


def counted(row: Mapping[str, Any]) -> bool:
    """Whether a row of a study's results.csv counts in a law: tuning runs (variants) and excluded runs do not."""
    return not row.get("variant") and str(row.get("excluded") or "0") in ("0", "0.0", "False")


def clusters(values: Array, same: float = SAME) -> npt.NDArray[np.int64]:
    """Index of each value's cluster (ascending), a cluster spanning at most a factor `same`. Positive values."""
    order = np.argsort(values, kind="stable")
    out = np.zeros(len(values), dtype=np.int64)
    k, start = -1, -math.inf
    for i in order:
        if values[i] > start * same or k < 0:
            k, start = k + 1, float(values[i])
        out[i] = k
    return out


def distinct(values: Array, same: float = SAME) -> int:
    """How many different values there are, counting those within a factor `same` as one."""
    return int(clusters(values, same).max()) + 1 if len(values) else 0


def cell_means(first: npt.NDArray[np.int64], second: npt.NDArray[np.int64], *values: Array) -> tuple[Any, ...]:
    """(first [k], second [k], mean of each of `values` [k]) over the rows of every pair of indices that has any, in
    order of the pairs: seeds averaged, so that luck does not choose."""
    width = int(second.max()) + 1
    cells, member = np.unique(first * width + second, return_inverse=True)
    count = np.bincount(member)
    return cells // width, cells % width, *(np.bincount(member, v) / count for v in values)


@dataclass(frozen=True)
class Runs:
    """Finished runs, as parallel arrays of one length."""

    n: Array
    d: Array
    loss: Array
    c: Array
    size: Labels
    group: Labels
    seed: Labels
    se: Array | None = None  # standard error of the loss over validation documents
    oracle: Array | None = None  # entropy of the data in nats/token, where it is known (the world)
    compute: str = "6nd"  # which FLOPs `c` holds: "6nd", "exact" (the ledger) or "given"
    label: str = ""  # e.g. "early / caption"

    @classmethod
    def of(
        cls,
        n: Sequence[float] | Array,
        d: Sequence[float] | Array,
        loss: Sequence[float] | Array,
        *,
        c: Sequence[float] | Array | None = None,
        size: Sequence[str] | None = None,
        group: Sequence[str] | None = None,
        seed: Sequence[Any] | None = None,
        se: Sequence[float] | Array | None = None,
        oracle: Sequence[float] | Array | float | None = None,
        compute: str | None = None,
        label: str = "",
        where: str = "runs",
    ) -> Runs:
        """Check and build. Without `c`: 6·N·D. Without `size`: from N. Without `group`: every run is its own trunk.

        Raises InputError naming the rows that hold NaN, infinite, zero or negative values.
        """
        n_, d_, loss_ = (np.asarray(v, dtype=np.float64).ravel() for v in (n, d, loss))
        rows = len(n_)
        if not len(d_) == len(loss_) == rows:
            raise InputError(f"{where}: n, d and loss have {rows}, {len(d_)} and {len(loss_)} rows; they must be equal")
        if rows == 0:
            raise InputError(f"{where}: no rows; a fit needs at least 3 sizes x 3 token budgets")
        c_ = 6.0 * n_ * d_ if c is None else np.asarray(c, dtype=np.float64).ravel()
        for name, column in (("n", n_), ("d", d_), ("loss", loss_), ("c", c_)):
            bad = np.flatnonzero(~(np.isfinite(column) & (column > 0)))
            if len(column) != rows or len(bad):
                listed = ", ".join(f"row {i}: {column[i]:g}" for i in bad[:MAX_LISTED])
                raise InputError(
                    f"{where}: {name} must be {rows} positive finite numbers ({listed}); drop or mend those rows"
                )
        sizes = np.asarray([f"{v:.3g}" for v in n_] if size is None else [str(s) for s in size], dtype=np.str_)
        groups = np.asarray(
            [f"{ROW}{i}" for i in range(rows)] if group is None else [str(g) for g in group], dtype=np.str_
        )
        seeds = np.asarray(["0"] * rows if seed is None else [str(s) for s in seed], dtype=np.str_)
        for name, label_column in (("size", sizes), ("group", groups), ("seed", seeds)):
            if len(label_column) != rows:
                raise InputError(f"{where}: {name} has {len(label_column)} labels for {rows} rows; they must be equal")
        truth = None if oracle is None else np.broadcast_to(np.asarray(oracle, dtype=np.float64), (rows,)).copy()
        errors = None if se is None else np.asarray(se, dtype=np.float64).ravel()
        if errors is not None and not (len(errors) == rows and np.all(np.isfinite(errors) & (errors > 0))):
            raise InputError(f"{where}: se must be {rows} positive finite standard errors; leave se out where unknown")
        kind = compute or ("6nd" if c is None else "given")
        return cls(n_, d_, loss_, c_, sizes, groups, seeds, errors, truth, kind, label)

    @classmethod
    def from_csv(cls, path: str | Path, *, drop_bad: bool = False, **columns: str | None) -> Runs:
        """Read a table with a header line; columns (n=, d=, loss=, c=, group=, ...) left out are found by usual names.

        The notes of `readers.read_runs`, which reads everything else too, are not returned here. Raises InputError
        naming file, line, column and reason.
        """
        from isofusion.laws.tables.readers import read_runs

        return read_runs(path, columns=columns, drop_bad=drop_bad)[0]

    @classmethod
    def from_results(
        cls, rows: Iterable[Mapping[str, Any]], arm: str | None = None, domain: str = "mean", compute: str = "exact"
    ) -> Runs:
        """One arm and domain of a study's results (study.ledger.results, or the rows of results.csv).

        domain: caption, interleaved, text or mean. compute: "exact" (the FLOP ledger) or "6nd" (column flops_6nd).
        """
        if compute not in ("exact", "6nd"):
            raise InputError(f"compute = {compute!r}: choose 'exact' (the FLOP ledger) or '6nd'")
        table = list(rows)
        arms = sorted({str(r.get("arm")) for r in table})
        chosen = [r for r in table if arm is None or r.get("arm") == arm]
        where = f"results, arm {arm}, domain {domain}"
        if not chosen:
            raise InputError(f"{where}: no finished runs; arms with runs: {', '.join(arms) or 'none'}")
        loss = f"loss_{domain}"
        flops = "flops" if compute == "exact" else "flops_6nd"
        for column in ("n", "tokens", loss, flops):
            if column not in chosen[0]:
                raise InputError(f"{where}: no column '{column}'. Columns: {', '.join(chosen[0])}")

        roles = {"n": "n", "tokens": "d", loss: "loss", flops: "c"}

        def numbers(column: str) -> list[float]:
            out = []
            for r in chosen:
                value, reason = parse(r.get(column), roles[column])
                if reason:
                    raise InputError(f"{where}: run {r.get('run')}, column '{column}': {reason}")
                out.append(value)
            return out

        return cls.of(
            numbers("n"),
            numbers("tokens"),
            numbers(loss),
            c=numbers(flops),
            size=[str(r.get("size", "")) for r in chosen],
            group=[str(r.get("parent") or r.get("run")) for r in chosen],
            seed=[str(r.get("seed", 0)) for r in chosen],
            oracle=_oracle(chosen, domain),
            compute=compute,
            label=f"{arm or 'all'} / {domain}",
            where=where,
        )

    def __len__(self) -> int:
        return len(self.n)

    def select(self, rows: npt.NDArray[Any]) -> Runs:
        """The given rows (boolean mask or indices)."""
        pick = {k: getattr(self, k)[rows] for k in ("n", "d", "loss", "c", "size", "group", "seed")}
        se = None if self.se is None else self.se[rows]
        return replace(self, **pick, se=se, oracle=None if self.oracle is None else self.oracle[rows])

    def canonical(self, *more: Array) -> tuple[Runs, npt.NDArray[np.int64]]:
        """(the runs in an order that the table's own order does not change, indices that give it); more: columns [m].

        Simulated noise and digests go by row, so that whoever shuffles a table would get other intervals. Trunks that
        were numbered by row (runs without a group) are numbered anew.
        """
        numbers = [
            np.asarray(v) for v in (self.n, self.d, self.loss, self.c, self.se, self.oracle, *more) if v is not None
        ]
        own = np.char.startswith(self.group, ROW)
        if len(np.unique(self.group[own])) < own.sum():  # somebody calls shared trunks so
            own[:] = False
        order = np.lexsort([np.where(own, ROW, self.group), self.size, self.seed, *numbers[::-1]])
        runs = self.select(order)
        numbered = [f"{ROW}{i}" if own[k] else str(runs.group[i]) for i, k in enumerate(order)]
        return replace(runs, group=np.asarray(numbered, dtype=np.str_)), order

    def with_loss(self, loss: Array) -> Runs:
        """The same runs with other losses (simulations)."""
        return replace(self, loss=np.asarray(loss, dtype=np.float64))

    @property
    def n_sizes(self) -> int:
        return distinct(self.n)

    @property
    def n_budgets(self) -> int:
        return distinct(self.d)

    def oracle_value(self, oracle: float | Array | None = None) -> Array | None:
        """Per-row oracle entropy: the argument (scalar or per row) if given, else the table's own."""
        if oracle is None:
            return self.oracle
        return np.broadcast_to(np.asarray(oracle, dtype=np.float64), (len(self),)).copy()


def _oracle(rows: list[Mapping[str, Any]], domain: str) -> list[float] | None:
    """Oracle entropies of the rows, or None where a row has none (real data)."""
    out = []
    for r in rows:
        value = r.get(f"oracle_{domain}")
        if value in (None, "") and domain == "mean":
            parts = [r.get(f"oracle_{k[5:]}") for k in r if k.startswith("loss_") and k != "loss_mean"]
            if parts and all(p not in (None, "") for p in parts):
                value = float(np.mean([float(p) for p in parts if p is not None]))
        try:
            number = float(value) if value not in (None, "") else math.nan
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            return None
        out.append(number)
    return out
