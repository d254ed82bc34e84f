"""How far the answer moves with choices nobody can justify: one table, always cheap, always printed.

The same runs are fitted again with another Huber threshold, without their outliers, without each size, with another
way of counting, and with other laws; N*, D* and loss at one compute stand beside the default's. If N* differs by more
than 2x between choices the runs do not rule out, the answer is undetermined, whatever its interval says: an interval
holds the choices fixed. Epoch's Chinchilla points are the reason: five rows of 245 move the optimal tokens per
parameter from 6.8 to 17.9, and no fit says so (Besiroglu et al. 2404.10102). Units: C in FLOPs, N parameters, D tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from isofusion.errors import InputError
from isofusion.laws.alternatives import Alternative, fit_alternative
from isofusion.laws.cost import Cost
from isofusion.laws.envelope import best_sizes, envelope
from isofusion.laws.fit import LawFit, check_identified, fit_law
from isofusion.laws.forms import Params
from isofusion.laws.frontier import compute_optimal
from isofusion.laws.isoflop import IsoFlops, isoflops
from isofusion.laws.refit import refit
from isofusion.laws.table import Array, Runs, clusters

DELTAS = (1e-4, 1e-2, 1e-1, 10.0)  # beside the fit's own; 10 is above every residual: least squares
OUTLIERS = 5
SPREAD = 2.0  # N* of the lowest and highest choice differ by more: undetermined
RULED_OUT = 5.0  # log-likelihood per trunk, summed, by which another law must fit worse to be left out of the spread
GRID = 4  # starts per exponent of the fits with E fixed, beside the default fit; the same ends, sooner
FLOORS = (0.0, 0.5, 0.9)  # irreducible losses tried, as shares of the lowest loss


@dataclass(frozen=True)
class Choice:
    """What one choice gives at the table's compute. NaN where it has no such number (`note` says why)."""

    group: str  # "default", "delta", "outliers", "size left out", "counting", "law"
    change: str
    alpha: float
    beta: float
    a: float  # d log N* / d log C there
    n: float
    d: float
    tokens_per_parameter: float
    loss: float
    misfit: float  # mean |log residual| over all the runs, also where some were left out of the fit
    counts: bool  # whether it enters the spread
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        return {k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in self.__dict__.items()}


@dataclass(frozen=True)
class Sensitivity:
    """N*, D*, D/N and loss at `compute` under every choice; rows[0] is the default fit."""

    compute: float
    rows: tuple[Choice, ...]

    @property
    def without(self) -> dict[str, list[str]]:
        """Choices that gave no number at all, by reason."""
        out: dict[str, list[str]] = {}
        for r in self.rows:
            if not r.counts and not np.isfinite([r.n, r.loss, r.misfit]).any():
                out.setdefault(r.note, []).append(f"{r.group}: {r.change}")
        return out

    @property
    def counted(self) -> list[Choice]:
        """The choices in the spread: those with an N* that the runs do not rule out."""
        return [r for r in self.rows if r.counts and np.isfinite(r.n) and r.n > 0]

    @property
    def spread(self) -> float:
        """Highest over lowest N* among the counted choices."""
        n = [r.n for r in self.counted]
        return float(max(n) / min(n))

    @property
    def undetermined(self) -> bool:
        """Whether N* moves by more than 2x."""
        return self.spread > SPREAD

    @property
    def sentence(self) -> str:
        """The verdict as one sentence."""
        low, high = (pick(self.counted, key=lambda r: r.n) for pick in (min, max))
        ends = (
            f"from {low.n:.3g} ({low.group}: {low.change}; {_ratio(low)} tokens per parameter) to "
            f"{high.n:.3g} parameters ({high.group}: {high.change}; {_ratio(high)})"
        )
        if self.undetermined:
            return (
                f"undetermined: at {self.compute:.3g} FLOPs the compute-optimal size runs {ends}, "
                f"{times(self.spread)}x, over choices that these runs do not decide"
            )
        return f"at {self.compute:.3g} FLOPs the compute-optimal size runs {ends}: within {times(self.spread)}x"

    def to_dict(self) -> dict[str, Any]:
        return {
            "compute": self.compute,
            "rows": [r.to_dict() for r in self.rows],
            "spread": self.spread if np.isfinite(self.spread) else None,
            "undetermined": self.undetermined,
            "sentence": self.sentence,
        }

    def shown(self) -> list[Choice]:
        """The rows to print: of a group of more than six only its extremes in N*."""
        out: list[Choice] = []
        for group in dict.fromkeys(r.group for r in self.rows):
            rows = [r for r in self.rows if r.group == group]
            if len(rows) > 6 and group != "law":
                rows = sorted((r for r in rows if np.isfinite(r.n)), key=lambda r: r.n)
                ends = rows[:1] + rows[-1:]
                of = f"of {len(rows)}: "
                rows = [replace(r, note=of + w) for r, w in zip(ends, ("lowest N*", "highest N*"), strict=True)]
            out += rows
        return out

    def __str__(self) -> str:
        """The table and its sentence, as plain text."""
        head = ("choice", "alpha", "beta", "a", "N*", "D*", "D/N", "loss", "misfit %", "")
        body = [
            (
                f"{r.group}: {r.change}" if r.group != "default" else r.change,
                *(_number(v, ".4f") for v in (r.alpha, r.beta, r.a)),
                *(_number(v, ".4g") for v in (r.n, r.d, r.tokens_per_parameter, r.loss)),
                _number(100 * r.misfit, ".3f"),
                r.note,
            )
            for r in self.shown()
        ]
        width = [max(len(row[k]) for row in (head, *body)) for k in range(len(head))]
        words = (0, len(head) - 1)
        lines = [
            "  ".join(v.ljust(width[k]) if k in words else v.rjust(width[k]) for k, v in enumerate(row))
            for row in (head, *body)
        ]
        return "\n".join([*(line.rstrip() for line in lines), self.sentence])


def sensitivity(
    runs: Runs,
    compute: float | None = None,
    *,
    fit: LawFit | None = None,
    cost: Cost | None = None,
    other_n: Sequence[float] | Array | None = None,
    other_name: str = "N without embeddings",
    budgets: IsoFlops | None = None,
) -> Sensitivity:
    """Fit the runs under every choice and compare what each says at `compute` (default: ten times their largest).

    fit: the default fit if it is there already. cost: FLOPs per token (default: what the table's `c` holds).
    other_n: parameters counted another way [m], e.g. without embeddings; N* is translated back to the table's count.
    budgets: the isoFLOP analysis if it is there already.
    Raises InputError where the default law is not identified or has no optimum at `compute`.
    """
    compute = 10.0 * float(runs.c.max()) if compute is None else float(compute)
    if not (np.isfinite(compute) and compute > 0):
        raise InputError(f"compute = {compute}: give positive FLOPs, e.g. 1e20")
    fit = fit or fit_law(runs)
    if not (fit.form.n_term and fit.form.d_term):
        raise InputError(f"{fit.form.formula}: a law without both terms has no compute-optimal size")
    table = _Table(runs, fit, cost or Cost.of(runs), compute)
    table.add("default", f"{fit.form.formula}, delta {fit.delta:g}", [fit.params])
    if not np.isfinite(table.rows[0].n):
        raise InputError(f"compute = {compute:g}: the fitted law has no interior optimum in N there")
    table.deltas()
    table.left_out()
    table.counting(other_n, other_name)
    table.laws()
    table.frontiers(budgets)
    return Sensitivity(compute, tuple(table.rows))


class _Table:
    """Collects the rows of one sensitivity table."""

    def __init__(self, runs: Runs, fit: LawFit, cost: Cost, compute: float) -> None:
        self.runs, self.fit, self.cost, self.compute = runs, fit, cost, compute
        self.rows: list[Choice] = []
        self.misfit = float(np.mean(np.abs(fit.residuals)))
        self.trunks = len(np.unique(runs.group))

    def add(
        self,
        group: str,
        change: str | list[str],
        params: list[Params],
        *,
        cost: Cost | None = None,
        free: int | None = None,
        note: str = "",
    ) -> None:
        """Rows for parameters of the additive law; `free`: its fitted parameters, where it is another law."""
        changes = [change] if isinstance(change, str) else change
        both = Params(*(np.array([float(np.asarray(getattr(p, k))) for p in params]) for k in _KEYS))
        c = self.compute * np.array([0.99, 1.0, 1.01])
        best = compute_optimal(self.fit, c, cost=cost or self.cost, params=both)
        residual = np.log(self.runs.loss) - np.log(both.predict(self.runs.n, self.runs.d))
        with np.errstate(over="ignore", divide="ignore"):  # an optimum that is no size a model can have
            ratio = best.d / best.n
        with np.errstate(invalid="ignore", divide="ignore"):
            slope = np.log(best.n[:, 2] / best.n[:, 0]) / np.log(c[2] / c[0])
        for i, name in enumerate(changes):
            n, d = (np.where(best.edge[i], np.nan, v[i]) for v in (best.n, best.d))
            misfit = float(np.mean(np.abs(residual[i])))
            out = free is not None and self.ruled_out(misfit, free)
            why = note or ("no interior optimum" if best.edge[i].any() else "ruled out by the runs" if out else "")
            self.rows.append(
                Choice(
                    group,
                    name,
                    float(both.alpha[i]),
                    float(both.beta[i]),
                    float(np.where(best.edge[i, [0, 2]].any(), np.nan, slope[i])),
                    float(n[1]),
                    float(d[1]),
                    float(np.where(best.edge[i, 1], np.nan, ratio[i, 1])),
                    float(best.loss[i, 1]),
                    misfit,
                    not out,
                    why,
                )
            )

    def missing(self, group: str, change: str, reason: str) -> None:
        """A row without numbers and the reason why."""
        self.rows.append(Choice(group, change, *(float("nan"),) * 8, counts=False, note=reason))

    def ruled_out(self, misfit: float, free: int) -> bool:
        """Whether a law with `free` parameters fits worse than the default by more than the runs' noise allows.

        Laplace likelihood with its scale fitted, a parameter counting 1 (Akaike); trunks, not runs, are independent.
        """
        worse = self.trunks * np.log(max(misfit, 1e-300) / max(self.misfit, 1e-300))
        return bool(worse + free - len(self.fit.names) > RULED_OUT)

    def deltas(self) -> None:
        """Other Huber thresholds, from near the L1 limit to least squares."""
        one = np.ones((1, len(self.runs)))
        for delta in DELTAS:
            if abs(np.log(delta / self.fit.delta)) < 1e-6:
                continue
            params = refit(replace(self.fit, delta=delta), weights=one)[0]
            self.add("delta", f"{delta:g}" + (" (least squares)" if delta == DELTAS[-1] else ""), [_take(params, 0)])

    def left_out(self) -> None:
        """Without the outliers, without the highest losses, without each size."""
        m = len(self.runs)
        spare = min(OUTLIERS, m - 1 - len(self.fit.names))
        plans: list[tuple[str, str, Array]] = []
        if spare > 0:
            for name, key in (("largest residuals", np.abs(self.fit.residuals)), ("highest losses", self.runs.loss)):
                drop = np.argsort(-key, kind="stable")[:spare]
                plans.append(("outliers", f"without the {spare} {name}", _without(m, drop)))
        cluster = clusters(self.runs.n)
        for k in range(int(cluster.max()) + 1):
            rows = np.flatnonzero(cluster == k)
            plans.append(("size left out", f"{self.runs.n[rows].mean():.3g}", _without(m, rows)))
        kept = []
        for group, change, weights in plans:
            try:
                check_identified(self.runs.select(weights > 0), self.fit.form)
                kept.append((group, change, weights))
            except InputError:
                self.missing(group, change, "the rest cannot identify the law")
        if kept:
            params = refit(self.fit, weights=np.stack([w for _, _, w in kept]))[0]
            for i, (group, change, _) in enumerate(kept):
                self.add(group, change, [_take(params, i)])

    def counting(self, other_n: Sequence[float] | Array | None, other_name: str) -> None:
        """6ND beside the table's own FLOPs, and another count of N."""
        if self.runs.compute != "6nd" and self.cost.kind != "6nd":
            self.add("counting", "C = 6 N D", [self.fit.params], cost=Cost.six_nd())
        if other_n is None:
            return
        other = np.asarray(other_n, dtype=np.float64).ravel()
        try:
            if len(other) != len(self.runs):
                raise InputError(f"{other_name}: {len(other)} values for {len(self.runs)} runs")
            runs = replace(self.runs, n=other, compute="given")
            Runs.of(other, runs.d, runs.loss, where=other_name)  # names NaN, zero and negative values
            fit = fit_law(runs, delta=self.fit.delta, bounds=self.fit.bounds)
            best = compute_optimal(fit, self.compute * np.array([0.99, 1.0, 1.01]), cost=Cost.measured(runs))
        except InputError as error:
            self.missing("counting", other_name, str(error))
            return
        slope, level = np.polyfit(np.log(other), np.log(self.runs.n), 1)
        order = np.argsort(other)
        x, y = np.log(other[order]), np.log(self.runs.n[order])
        at = np.log(best.n)
        n = np.exp(np.where((at < x[0]) | (at > x[-1]), level + slope * at, np.interp(at, x, y)))
        a = float(np.log(n[2] / n[0]) / np.log(1.01 / 0.99))
        misfit = float(np.mean(np.abs(fit.residuals)))
        ratio = float(best.d[1] / n[1])
        self.rows.append(
            Choice(
                "counting",
                other_name,
                fit.alpha,
                fit.beta,
                a,
                float(n[1]),
                float(best.d[1]),
                ratio,
                float(best.loss[1]),
                misfit,
                True,
            )
        )

    def laws(self) -> None:
        """Other laws: exponents tied, irreducible loss fixed, p-norm of the two terms, and two that need no law."""
        self.alternative(fit_alternative(self.fit, "tied"), "alpha = beta")
        self.alternative(fit_alternative(self.fit, "p-norm"), "p-norm of the N and D terms")
        if self.fit.form.fixed_e is not None:
            try:
                free = fit_law(self.runs, delta=self.fit.delta, bounds=self.fit.bounds)
                self.add("law", f"E free (fitted {free.E:.3g})", [free.params], free=5)
            except InputError as error:
                self.missing("law", "E free", str(error))
        lowest = float(self.runs.loss.min())
        floors = {share * lowest: f"E = {share * lowest:.3g}" + (" (none)" if share == 0 else "") for share in FLOORS}
        if self.runs.oracle is not None and float(self.runs.oracle.max()) < lowest:
            floors[float(self.runs.oracle.mean())] = f"E = {self.runs.oracle.mean():.3g} (the oracle entropy)"
        for floor, change in floors.items():
            if self.fit.form.fixed_e is not None and abs(floor - self.fit.form.fixed_e) < 1e-9:
                continue
            try:
                bounds = self.fit.bounds
                other = fit_law(self.runs, fixed_e=floor, delta=self.fit.delta, bounds=bounds, grid=GRID, near=self.fit)
                self.add("law", change, [other.params], free=4)
            except InputError as error:
                self.missing("law", change, str(error))

    def alternative(self, found: Alternative, change: str) -> None:
        """A row for a law whose optimum is looked for numerically."""
        c = self.compute * np.array([0.99, 1.0, 1.01])
        n, d, loss = found.optimum(self.cost, c, self.runs)
        misfit = float(np.mean(np.abs(np.log(self.runs.loss) - np.log(found.predict(self.runs.n, self.runs.d)))))
        out = self.ruled_out(misfit, found.free)
        note = "no interior optimum" if not np.isfinite(n[1]) else "ruled out by the runs" if out else found.note
        a = float(np.log(n[2] / n[0]) / np.log(c[2] / c[0]))
        numbers = (a, float(n[1]), float(d[1]), float(d[1] / n[1]), float(loss[1]), misfit)
        self.rows.append(Choice("law", change, found.alpha, found.beta, *numbers, not out, note))

    def frontiers(self, budgets: IsoFlops | None) -> None:
        """The frontier k C^c with the sizes on it, and isoFLOP parabolas: neither needs a law of N and D."""
        change = "frontier k C^c"
        try:
            hull, sizes = envelope(self.runs), best_sizes(self.runs)
            if sizes is None:
                raise InputError("fewer than three sizes are best at some compute")
            n = float(sizes.size(self.compute))
            d = float(self.cost.tokens(self.compute, n))
            loss = float(hull.predict(self.compute))
            nan = float("nan")
            self.rows.append(Choice("law", change, nan, nan, sizes.a, n, d, d / n, loss, nan, True))
        except InputError as error:
            self.missing("law", change, str(error))
        change = "isoFLOP parabolas"
        try:
            found = budgets or isoflops(self.runs, fit=self.fit, cost=self.cost, draws=0)
            law = found.power["parabola"]
            if law is None:
                raise InputError("fewer than three budgets with a bracketed minimum")
            n = float(law.size(self.compute))
            d = float(self.cost.tokens(self.compute, n))
            nan = float("nan")
            self.rows.append(Choice("law", change, nan, nan, law.a, n, d, d / n, nan, nan, True))
        except InputError as error:
            self.missing("law", change, str(error))


_KEYS = ("E", "A", "alpha", "B", "beta")


def _take(params: Params, i: int) -> Params:
    return Params(*(np.asarray(getattr(params, k))[i] for k in _KEYS))


def _without(m: int, rows: np.ndarray) -> Array:
    weights = np.ones(m)
    weights[rows] = 0.0
    return weights


def _ratio(row: Choice) -> str:
    return f"{row.tokens_per_parameter:.3g}" if np.isfinite(row.tokens_per_parameter) else "no finite number of"


def times(factor: float) -> str:
    """A factor to three digits; from a thousand on only that it is."""
    return f"{factor:#.3g}".rstrip(".") if factor < 999.5 else "over 1000"


def _number(value: float, form: str) -> str:
    return format(value, form) if np.isfinite(value) else "-"
