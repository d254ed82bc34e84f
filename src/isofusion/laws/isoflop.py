"""IsoFLOP analysis: the best size per compute budget from runs at (nearly) equal compute, three ways, and its bias.

Per budget: a parabola of the loss in log N (Hoffmann et al. 2203.15556, approach 2), interpolation without a shape
(Akima and PCHIP), and the fitted law. A parabola is the wrong shape for A/N^alpha + B/D^beta, so its minimum is biased
even without noise, and more so on wider or off-centre grids (arXiv 2603.22339): the bias is measured here by putting
the fitted law's own losses on the same design, and stated with every result. N*(C) = exp(intercept) C^a follows over
the budgets whose minimum is bracketed, with an interval from simulated studies. Units: C in FLOPs, N parameters, D
tokens.
Legend: S draws, b budgets, m runs of a budget.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from isofusion.errors import InputError
from isofusion.laws.cost import Cost
from isofusion.laws.fit import LawFit, fit_law
from isofusion.laws.frontier import compute_optimal
from isofusion.laws.interpolate import through
from isofusion.laws.interval import interval
from isofusion.laws.noise import simulate_deviations
from isofusion.laws.table import Array, Runs, clusters
from isofusion.laws.warn import FitWarning

Method = Literal["parabola", "akima", "pchip", "law"]
SHAPES: tuple[Method, ...] = ("parabola", "akima", "pchip")  # those that need no law
METHODS: tuple[Method, ...] = ("parabola", "akima", "pchip", "law")
SAME_BUDGET = 1.25  # runs whose compute spans at most this factor are one budget
LEAST = 4  # different sizes a budget needs: a parabola through three points has no residual
GRID = 401  # points in log N on which an interpolated curve is searched


@dataclass(frozen=True)
class IsoFlop:
    """One budget. `best`: N* per method, NaN where the budget does not bracket it (see `why`)."""

    c: float  # geometric mean compute, FLOPs
    n: Array  # sizes, ascending, runs of one size averaged
    loss: Array  # loss at c: each run's loss moved to c along the law where its compute differs
    best: dict[Method, float]
    bias: dict[Method, float]  # N* of the method over the law's, minus one, on the law's own noiseless losses
    bracketed: bool
    why: str  # why not, or ""
    runs: int

    def to_dict(self) -> dict[str, Any]:
        return {
            "c": self.c,
            "n": self.n.tolist(),
            "loss": self.loss.tolist(),
            "best": {k: _plain(v) for k, v in self.best.items()},
            "bias": {k: _plain(v) for k, v in self.bias.items()},
            "bracketed": self.bracketed,
            "why": self.why,
            "runs": self.runs,
        }


@dataclass(frozen=True)
class PowerLaw:
    """N*(C) = exp(intercept) C^a over the bracketed budgets; `interval` of a, or None without draws or a law."""

    a: float
    intercept: float
    budgets: int
    bias: float | None  # of a: what the method makes of the law's own noiseless losses, less the law's a
    interval: tuple[float, float] | None  # bias removed
    level: float

    def size(self, c: Array | float) -> Array:
        """N* at c FLOPs."""
        return np.exp(self.intercept + self.a * np.log(np.asarray(c, dtype=np.float64)))

    def to_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "interval": None if self.interval is None else list(self.interval)}


@dataclass(frozen=True)
class IsoFlops:
    """Every budget, the power law per method, warnings, and the law the bias was measured with (None: see `no_law`)."""

    budgets: tuple[IsoFlop, ...]
    power: dict[Method, PowerLaw | None]
    warnings: tuple[FitWarning, ...]
    fit: LawFit | None
    no_law: str
    skipped: tuple[str, ...]  # budgets with too few sizes

    @property
    def bias_sentence(self) -> str:
        """How biased the parabola is on this design if the fitted law is true."""
        shift = [b.bias["parabola"] for b in self.budgets if np.isfinite(b.bias["parabola"])]
        law = self.power["parabola"]
        if not shift:
            return f"the parabola's bias is not known: {self.no_law or 'no budget is bracketed'}"
        worst = max(shift, key=abs)
        exponent = "" if law is None or law.bias is None else f", and its exponent a is off by {law.bias:+.4f}"
        return (
            f"on this design, if the fitted law is true, the parabola's N* is off by {100 * np.median(shift):+.1f} % "
            f"(median of {len(shift)} budgets; worst {100 * worst:+.1f} %){exponent}"
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "budgets": [b.to_dict() for b in self.budgets],
            "power": {k: None if v is None else v.to_dict() for k, v in self.power.items()},
            "warnings": [{"code": w.code, "message": w.message} for w in self.warnings],
            "bias": self.bias_sentence,
            "skipped": list(self.skipped),
        }


@dataclass(frozen=True)
class Budget:
    """Rows of one budget: each run's log N, x log N of each distinct size, and which size a run belongs to."""

    c: float
    rows: np.ndarray
    log_n: Array
    x: Array
    member: np.ndarray

    def mean(self, values: Array) -> Array:
        """Values [..., m] averaged per size, [..., sizes]."""
        count = np.bincount(self.member, minlength=len(self.x))
        hot = (self.member[:, None] == np.arange(len(self.x))) / count
        return values @ hot

    def lowest(self, method: Method, loss: Array) -> Array:
        """log N at the minimum of the losses [..., m] by a method: every run counts in the parabola, as published."""
        if method == "parabola":
            return parabola(self.log_n, loss)
        return interpolated("akima" if method == "akima" else "pchip", self.x, self.mean(loss))


def budgets_of(c_m: Array, n_m: Array, same: float = SAME_BUDGET, least: int = LEAST) -> tuple[list[Budget], list[str]]:
    """Group runs of compute c and size n; (budgets with at least `least` sizes, sentences on those without)."""
    if same <= 1:
        raise InputError(f"same = {same}: give a factor above 1 within which compute counts as one budget")
    cluster = clusters(c_m, same)
    out, skipped = [], []
    for k in range(int(cluster.max()) + 1):
        rows = np.flatnonzero(cluster == k)
        c = float(np.exp(np.log(c_m[rows]).mean()))
        member = clusters(n_m[rows])
        sizes = int(member.max()) + 1
        if sizes < least:
            skipped.append(f"{c:.3g} FLOPs: {sizes} size{'s' * (sizes != 1)}, {least} are needed")
            continue
        x = np.array([np.log(n_m[rows[member == s]]).mean() for s in range(sizes)])
        out.append(Budget(c, rows, np.log(n_m[rows]), x, member))
    return out, skipped


def parabola(x: Array, y: Array) -> Array:
    """log N at the minimum of the least-squares parabola through (x [k], y [..., k]); NaN if it opens downwards."""
    middle, width = x.mean(), max(float(np.ptp(x)), 1e-9)
    z = (x - middle) / width
    design = np.column_stack([np.ones_like(z), z, z * z])
    coefficients = np.einsum("pk,...k->...p", np.linalg.pinv(design), y)
    with np.errstate(divide="ignore", invalid="ignore"):
        at = -0.5 * coefficients[..., 1] / coefficients[..., 2]
    return np.where(coefficients[..., 2] > 0, middle + width * at, np.nan)


def interpolated(kind: Literal["akima", "pchip"], x: Array, y: Array) -> Array:
    """log N at the lowest point of the interpolating curve through (x [k], y [..., k]), on a grid refined once."""
    values = np.moveaxis(np.atleast_2d(y), -1, 0)
    grid = np.linspace(x[0], x[-1], GRID)
    on = through(kind, x, values, grid)
    i = np.clip(np.argmin(on, axis=0), 1, GRID - 2)
    j = np.arange(on.shape[1])
    left, mid, right = (on[i + s, j] for s in (-1, 0, 1))
    bend = left - 2.0 * mid + right
    shift = np.where(bend > 0, 0.5 * (left - right) / np.where(bend > 0, bend, 1.0), 0.0)
    out = grid[i] + np.clip(shift, -1.0, 1.0) * (grid[1] - grid[0])
    return out.reshape(np.shape(y)[:-1])


def isoflops(
    runs: Runs,
    *,
    fit: LawFit | None = None,
    cost: Cost | None = None,
    same: float = SAME_BUDGET,
    least: int = LEAST,
    draws: int = 400,
    level: float = 0.95,
    seed: int = 0,
) -> IsoFlops:
    """Best size per budget and N*(C), with bias and intervals.

    fit: the law of these runs, where it is there already; without one that can be fitted, bias and intervals are
    missing and `no_law` says why. cost: FLOPs per token. same: factor within which compute is one budget. draws:
    simulated studies for the interval of a (0: none). Raises InputError where no budget has `least` sizes.
    """
    groups, skipped = budgets_of(runs.c, runs.n, same, least)
    if not groups:
        raise InputError(
            f"{runs.label or 'runs'}: no compute budget with {least} sizes (runs within {same:g}x in FLOPs are one "
            "budget); train at least four sizes at equal compute, on both sides of the best"
        )
    cost = cost or Cost.of(runs)
    no_law = ""
    if fit is None:
        try:
            fit = fit_law(runs)
        except InputError as error:
            no_law = str(error)
    if fit is not None and not (fit.form.n_term and fit.form.d_term):
        no_law, fit = f"{fit.form.formula} has no optimum in N", None
    loss = runs.loss.copy()
    if fit is not None:
        for g in groups:
            loss[g.rows] *= moved(runs, g.rows, g.c, fit, cost)
    rng = np.random.Generator(np.random.Philox(key=seed))
    luck = simulate_deviations(rng, fit, draws) if fit is not None and draws else None
    out, warnings = [], []
    simulated: dict[Method, list[Array]] = {name: [] for name in SHAPES}  # per bracketed budget log N* [S]
    clean: dict[Method, list[float]] = {name: [] for name in SHAPES}  # the same of the law's own losses
    for g in groups:
        why = not_bracketed(g, loss[g.rows])
        best: dict[Method, float] = {k: float("nan") for k in METHODS}
        bias: dict[Method, float] = {k: float("nan") for k in METHODS}
        every = [loss[g.rows][None]]
        known = False
        if fit is not None:
            best["law"], bias["law"] = float(compute_optimal(fit, g.c, cost=cost).n[0]), 0.0
            own = _clean(g, fit, cost)
            known = bool(np.isfinite(best["law"])) and not not_bracketed(g, own)
            every.append(own[None])
            if luck is not None and not why:
                every.append(own * np.exp(luck[:, g.rows]))
        if known or not why:
            for name in SHAPES:
                at = g.lowest(name, np.concatenate(every))
                if known:
                    bias[name] = float(np.exp(at[1]) / best["law"] - 1.0)
                if not why:
                    best[name] = float(np.exp(at[0]))
                    clean[name].append(float(at[1]) if fit is not None else float("nan"))
                    # a minimum outside the sizes is one at their edge, as an analyst would read it
                    drawn = np.nan_to_num(at[2:], nan=clean[name][-1])
                    simulated[name].append(np.clip(drawn, g.x[0], g.x[-1]))
        if why:
            warnings.append(FitWarning("isoflop-not-bracketed", f"{g.c:.3g} FLOPs: {why}"))
        out.append(IsoFlop(g.c, np.exp(g.x), g.mean(loss[g.rows]), best, bias, not why, why, len(g.rows)))
    power: dict[Method, PowerLaw | None] = {k: _power(out, fit, cost, k, clean[k], simulated[k], level) for k in SHAPES}
    power["law"] = _power(out, fit, cost, "law", [], [], level)
    return IsoFlops(tuple(out), power, tuple(warnings), fit, no_law, tuple(skipped))


def moved(runs: Runs, rows: np.ndarray, c: float, fit: LawFit, cost: Cost) -> Array:
    """The factor, says the law, from the loss of each of these runs to that of its size at c FLOPs, [m]."""
    n = runs.n[rows]
    return np.asarray(fit.predict(n, cost.tokens(c, n)) / fit.predict(n, runs.d[rows]))


def _clean(g: Budget, fit: LawFit, cost: Cost) -> Array:
    """The law's own loss at the budget's runs, all at its compute, without noise."""
    n = np.exp(g.log_n)
    return fit.predict(n, cost.tokens(g.c, n))


def not_bracketed(g: Budget, loss: Array) -> str:
    """Why these losses [m] do not bracket a minimum in N, or ""."""
    y = g.mean(loss)
    k = int(np.argmin(y))
    if k in (0, len(y) - 1):
        end, more = ("smallest", "smaller") if k == 0 else ("largest", "larger")
        return f"the {end} of {len(y)} sizes ({np.exp(g.x[k]):.3g}) has the lowest loss; train {more} ones"
    at = float(parabola(g.log_n, loss))
    if not g.x[0] < at < g.x[-1]:
        return f"a parabola through the {len(y)} sizes has no minimum between them; train sizes further from the best"
    return ""


def _power(
    found: list[IsoFlop],
    fit: LawFit | None,
    cost: Cost,
    method: Method,
    clean: list[float],
    simulated: list[Array],
    level: float,
) -> PowerLaw | None:
    """Regress log N* on log C over the bracketed budgets; None with fewer than three.

    clean, simulated: log N* by the method per bracketed budget, of the law's own losses and of simulated studies [S].
    """
    bracketed = [b for b in found if b.bracketed]
    use = [i for i, b in enumerate(bracketed) if np.isfinite(b.best[method])]
    if len(use) < 3:
        return None
    x = np.log([bracketed[i].c for i in use])
    a, intercept = np.polyfit(x, np.log([bracketed[i].best[method] for i in use]), 1)
    line = PowerLaw(float(a), float(intercept), len(use), None, None, level)
    if fit is None or method == "law":
        return line if fit is None else replace(line, bias=0.0)
    weights = (x - x.mean()) / np.sum((x - x.mean()) ** 2)
    true_a = float(weights @ np.log(compute_optimal(fit, np.exp(x), cost=cost).n))
    bias = float(weights @ np.array([clean[i] for i in use])) - true_a
    span = None
    drawn = np.stack([simulated[i] for i in use], axis=1)
    if len(drawn) and np.isfinite(bias):
        error = drawn @ weights - true_a
        low, high = interval(error, level)
        span = float(a - high), float(a - low)
    return PowerLaw(float(a), float(intercept), len(use), bias if np.isfinite(bias) else None, span, level)


def _plain(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
