"""What can be run and what is wanted: candidate runs with their costs, and the target region of a design.

Costs are FLOPs of training. Branches of one trunk share its constant-rate prefix (docs/study-file.md), so with
`shared` a candidate is cheap beside a longer branch of the same size. Units: n parameters, d tokens, cost FLOPs.
Legend: c candidates, t target points, M members.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from isofusion.errors import InputError
from isofusion.laws.cost import Cost
from isofusion.laws.design import Gradient, Points, to_params
from isofusion.laws.forms import Scale
from isofusion.laws.frontier import closed_form
from isofusion.laws.table import SAME, Array, Labels, Runs, clusters
from isofusion.laws.tables.cells import parse, resolve

MOST = 600  # candidates: their covariance is quadratic in them
LISTED = 5
Seeds = npt.NDArray[np.int64]


@dataclass
class Prices:
    """What a run at each candidate costs now, in FLOPs. With `shared`, branches of one trunk share its prefix.

    A branch at D forks from its trunk at 0.8 D, so beside a trunk that is, or will be, trained for a branch at D' it
    costs full (1 - 0.8 min(D, D')/D): a fifth of its own where the trunk reaches, the difference beyond. That takes the
    trunk's checkpoints at the forks to be kept.
    """

    full: Array
    points: Points
    shared: bool
    longest: dict[str, float]  # trunk -> the largest D it is trained for
    share: float = 0.8

    @classmethod
    def of(cls, full: Array, points: Points, done: Points, shared: bool) -> Prices:
        longest: dict[str, float] = {}
        for trunk, d in zip(done.trunk.tolist(), done.d.tolist(), strict=True):
            longest[trunk] = max(d, longest.get(trunk, 0.0))
        return cls(full, points, shared, longest)

    def copy(self) -> Prices:
        return Prices(self.full, self.points, self.shared, dict(self.longest), self.share)

    def now(self) -> Array:
        if not self.shared:
            return self.full
        reach = np.array([self.longest.get(t, 0.0) for t in self.points.trunk.tolist()])
        return self.full * (1.0 - self.share * np.minimum(1.0, reach / self.points.d))

    def after(self, picks: Sequence[int]) -> Prices:
        """Prices once these are paid for."""
        out = self.copy()
        for i in picks:
            trunk = str(self.points.trunk[i])
            out.longest[trunk] = max(float(self.points.d[i]), out.longest.get(trunk, 0.0))
        return out

    def total(self, picks: Sequence[int]) -> float:
        """FLOPs of all of these, paid for from the cheapest on."""
        if not self.shared:
            return float(self.full[list(picks)].sum())
        prices = self.copy()
        return sum(prices.take(i) for i in sorted(picks, key=lambda i: float(self.full[i])))

    def take(self, candidate: int) -> float:
        """Pay for a candidate; later ones of its trunk get cheaper."""
        trunk, price = str(self.points.trunk[candidate]), float(self.full[candidate])
        if self.shared:
            price *= 1.0 - self.share * min(1.0, self.longest.get(trunk, 0.0) / float(self.points.d[candidate]))
        self.longest[trunk] = max(float(self.points.d[candidate]), self.longest.get(trunk, 0.0))
        return price


@dataclass(frozen=True)
class Candidates:
    """Runs that could be trained: n, d, full cost [c] and names; `shared`: equal sizes branch from one trunk.

    seed: 0, 1, ... tell repeats of one (n, d) apart, each with luck (and, shared, with a trunk) of its own.
    """

    n: Array
    d: Array
    cost: Array
    name: Labels
    seed: Seeds
    shared: bool = False

    @classmethod
    def of(
        cls,
        n: Sequence[float] | Array,
        d: Sequence[float] | Array,
        cost: Sequence[float] | Array | None = None,
        *,
        name: Sequence[str] | None = None,
        seeds: int = 1,
        shared: bool = False,
        per_token: Cost | None = None,
        where: str = "candidates",
    ) -> Candidates:
        """Check and build. Without `cost`: FLOPs by `per_token` (default 6 N D). seeds: each can be trained so often.

        Raises InputError naming bad rows.
        """
        n_, d_ = (np.asarray(v, dtype=np.float64).ravel() for v in (n, d))
        if not len(n_):
            raise InputError(
                f"{where}: no candidates; give runs that could be trained, as rows of n and d or two grids"
            )
        if len(n_) != len(d_):
            raise InputError(f"{where}: {len(n_)} values of n and {len(d_)} of d; they must be equal")
        if seeds < 1:
            raise InputError(f"{where}: {seeds} seeds: give how often each candidate can be trained, at least 1")
        if len(n_) * seeds > MOST:
            raise InputError(
                f"{where}: {len(n_) * seeds} candidates, at most {MOST} are compared; use coarser grids or fewer seeds"
            )
        if cost is None:
            safe = np.where(np.isfinite(n_) & (n_ > 0), n_, 1.0)
            c_ = (per_token or Cost.six_nd()).per_token(safe) * d_
        else:
            c_ = np.asarray(cost, dtype=np.float64).ravel()
        for what, column in (("n", n_), ("d", d_), ("cost", c_)):
            bad = np.flatnonzero(~(np.isfinite(column) & (column > 0))) if len(column) == len(n_) else np.arange(0)
            if len(bad) or len(column) != len(n_):
                listed = ", ".join(f"row {i + 1}: {column[i]:g}" for i in bad[:LISTED])
                raise InputError(f"{where}: {what} must be {len(n_)} positive finite numbers ({listed}); mend them")
        names = [f"N {a:.4g}, D {b:.4g}" for a, b in zip(n_, d_, strict=True)] if name is None else list(name)
        seed = np.repeat(np.arange(seeds), len(n_))
        names = [f"{a}, seed {s}" if s else a for a, s in zip(names * seeds, seed.tolist(), strict=True)]
        n_, d_, c_ = (np.tile(column, seeds) for column in (n_, d_, c_))
        return cls(n_, d_, c_, np.asarray(names, dtype=np.str_), seed, shared)

    @classmethod
    def grid(cls, n: Sequence[float] | Array, d: Sequence[float] | Array, **options: Any) -> Candidates:
        """Every n with every d; options as for `of`."""
        size, tokens = np.meshgrid(np.asarray(n, dtype=np.float64), np.asarray(d, dtype=np.float64), indexing="ij")
        return cls.of(size.ravel(), tokens.ravel(), **options)

    @classmethod
    def from_csv(cls, path: str | Path, **options: Any) -> Candidates:
        """A CSV with columns n (params, ...), d (tokens, ...) and, if it has one, cost (or flops) and name.

        Numbers may carry a unit (1.3B). Raises InputError naming file, line, column and reason.
        """
        path = Path(path)
        if not path.is_file():
            raise InputError(f"{path}: no such file; give a CSV of candidates with columns n, d and maybe cost")
        with path.open(newline="", encoding="utf-8-sig", errors="replace") as handle:
            rows = list(csv.reader(handle))
        if not rows:
            raise InputError(f"{path}: the file is empty; give a CSV of candidates with columns n, d and maybe cost")
        header = [column.strip() for column in rows[0]]
        where, columns = str(path), {}
        for role in ("n", "d", "c"):
            given = next((h for h in header if h.lower() == "cost"), None) if role == "c" else None
            column, scale = resolve(where, header, role, given, [])
            if column is not None:
                columns[role] = (header.index(column), column, scale)
            elif role != "c":
                raise InputError(f"{where}: no column for {role}. Columns: {', '.join(header)}")
        label = next((i for i, h in enumerate(header) if h.lower() in ("name", "run")), None)
        values: dict[str, list[float]] = {role: [] for role in columns}
        names, bad = [], []
        for line, row in enumerate(rows[1:], start=2):
            if not any(cell.strip() for cell in row):
                continue
            for role, (i, column, scale) in columns.items():
                number, reason = parse(row[i] if i < len(row) else "", role, scale)
                values[role].append(number)
                if reason:
                    bad.append(f"line {line}, column '{column}': {reason}")
            if label is not None:
                names.append(row[label].strip() if label < len(row) else f"line {line}")
        if bad:
            more = f" and {len(bad) - LISTED} more" if len(bad) > LISTED else ""
            raise InputError(f"{where}: {'; '.join(bad[:LISTED])}{more}; mend or delete those lines")
        return cls.of(
            values["n"], values["d"], values.get("c"), name=names if label is not None else None, where=where, **options
        )

    def __len__(self) -> int:
        return len(self.n)

    def select(self, rows: Any) -> Candidates:
        some = {k: getattr(self, k)[rows] for k in ("n", "d", "cost", "name", "seed")}
        return replace(self, **some)

    def not_in(self, runs: Runs) -> Candidates:
        """Those not done yet. Done is what has a run within 5 % in both N and D; of k repeats, the first so many.

        Shared: a repeat is done where its own trunk (`place`) has such a branch.
        """

        def near(a: Array, b: Array) -> np.ndarray:
            return np.asarray(np.abs(np.log(a[:, None] / b[None])) < np.log(SAME))

        same = near(self.n, runs.n) & near(self.d, runs.d)
        if self.shared and self.seed.any():
            done, new = place(runs, self)
            return self.select(~(same & (new.trunk[:, None] == done.trunk[None])).any(axis=1))
        return self.select(self.seed >= same.sum(axis=1))


def place(runs: Runs | None, candidates: Candidates) -> tuple[Points, Points]:
    """Done runs and candidates as points with trunks.

    Shared: a candidate joins the longest done trunk of its size, its repeats the next longest ones, then new ones.
    """
    none = np.zeros(0)
    done = Points(none, none, none.astype(np.str_)) if runs is None else Points(runs.n, runs.d, runs.group)
    if not candidates.shared:
        return done, Points(candidates.n, candidates.d, np.array([f"new {i}" for i in range(len(candidates))]))
    size = clusters(np.concatenate([done.n, candidates.n]))
    old, new = size[: len(done)], size[len(done) :]
    trunk = []
    for s, seed in zip(new.tolist(), candidates.seed.tolist(), strict=True):
        rows = np.flatnonzero(old == s)
        longest = list(dict.fromkeys(done.trunk[rows[np.argsort(-done.d[rows], kind="stable")]].tolist()))
        trunk.append(longest[seed] if seed < len(longest) else f"new size {s}, seed {seed}")
    return done, Points(candidates.n, candidates.d, np.array(trunk))


@dataclass(frozen=True)
class Target:
    """Where the law must be right: the loss at points (N, D), or the loss or the best N at given compute.

    `constant`: FLOPs per parameter and token (6) by which compute is shared out.
    """

    n: Array
    d: Array
    compute: Array
    weights: Array
    want: Literal["loss", "n"] = "loss"
    constant: float = 6.0

    @classmethod
    def points(
        cls, n: Sequence[float] | Array, d: Sequence[float] | Array, weights: Sequence[float] | None = None
    ) -> Target:
        """The loss at these points. Raises InputError for values that are not positive."""
        n_, d_ = (np.asarray(v, dtype=np.float64).ravel() for v in (n, d))
        if not len(n_) or len(n_) != len(d_) or not (np.isfinite(n_) & np.isfinite(d_) & (n_ > 0) & (d_ > 0)).all():
            raise InputError("target: give points as equally many positive N and D, e.g. N = 7e9 with D = 1.4e11")
        w = np.ones(len(n_)) if weights is None else np.asarray(weights, dtype=np.float64)
        if len(w) != len(n_) or not (np.isfinite(w) & (w > 0)).all():
            raise InputError(f"target: give {len(n_)} positive weights, one for each point")
        return cls(n_, d_, np.zeros(0), w / w.sum())

    @classmethod
    def at_compute(
        cls, compute: Sequence[float] | Array, want: Literal["loss", "n"] = "loss", constant: float = 6.0
    ) -> Target:
        """The loss of the compute-optimal model at these FLOPs (want="loss"), or its number of parameters ("n")."""
        c = np.asarray(compute, dtype=np.float64).ravel()
        if not len(c) or not (np.isfinite(c) & (c > 0)).all():
            raise InputError(f"target: compute {compute}: give positive FLOPs, e.g. 1e22")
        if want not in ("loss", "n"):
            raise InputError(f"target: want = {want!r}: choose 'loss' or 'n' (the best number of parameters)")
        return cls(np.zeros(0), np.zeros(0), c, np.full(len(c), 1.0 / len(c)), want, constant)

    def places(self, phi: Array, scale: Scale, inside: tuple[float, float]) -> tuple[Array, Array]:
        """(n, d), each [t] or, where members share compute out differently, [M, t]; N* kept `inside` this range."""
        if not len(self.compute):
            return self.n, self.d
        n = np.clip(closed_form(to_params(phi, scale), self.compute, self.constant)[0], *inside)
        return n, self.compute / self.constant / n

    def gradient(self, scale: Scale) -> Gradient | None:
        """d log N* / d phi as a function of phi [M, 5], where that is wanted."""
        if self.want == "loss":
            return None

        def slope(phi: Array) -> Array:
            step = 1e-5 * np.eye(5)

            def best(at: Array) -> Array:
                return np.log(closed_form(to_params(at, scale), self.compute, self.constant)[0])

            return np.stack([(best(phi + h) - best(phi - h)) / 2e-5 for h in step], axis=1)

        return slope
