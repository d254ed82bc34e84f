"""Do the intervals hold what they promise? Simulated studies of one design, fitted and judged against the truth.

A `Design` is sizes x seeds x token budgets with trunk and branch spread; `cover` simulates it many times, fits every
study, forms its intervals and counts how often they contain the truth, on which side they miss, and how wide they are.
Width matters as much as coverage: an interval from zero to infinity covers always. Fits are warm-started at the
noiseless study and solved as one batch (equal to `fit_law` on each study: tests/laws/test_coverage.py).
Legend: K studies, S draws, m runs of a study.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal

import numpy as np

from isofusion.errors import InputError
from isofusion.laws.bootstrap import Intervals, Method, bootstrap_many
from isofusion.laws.fit import DELTA, LawFit, fit_law
from isofusion.laws.forms import Params
from isofusion.laws.frontier import closed_form
from isofusion.laws.refit import refit
from isofusion.laws.table import Array, Runs

LAW = Params.of(1.904, 260.0, 0.301, 1850.0, 0.335)  # early fusion's E, alpha, beta (arXiv 2504.07951 Table 2)
BATCH = 20  # studies whose draws are refitted together
NAMES = ("alpha", "beta", "N*(C)", "loss at 10x C", "E")
Quantity = Callable[[Params], Array]


@dataclass(frozen=True)
class Design:
    """A study to simulate: `sizes` model sizes times `seeds` trunks each, every trunk with `budgets` branches.

    n_range in parameters and d_range in tokens, both spaced evenly in the logarithm. trunk, branch: standard deviation
    of log loss (relative loss). branched=False: every run is trained from scratch, with luck of its own, and the table
    names no trunks. odd: one run of each study, drawn at random, has this times its loss. law: the truth.
    """

    sizes: int
    seeds: int = 1
    budgets: int = 5
    n_range: tuple[float, float] = (1e8, 3e9)
    d_range: tuple[float, float] = (2e9, 3.2e10)
    trunk: float = 0.005
    branch: float = 0.002
    branched: bool = True
    odd: float = 1.0
    law: Params = LAW

    def __post_init__(self) -> None:
        if min(self.sizes, self.seeds, self.budgets) < 1:
            raise InputError(
                f"{self.sizes} sizes x {self.seeds} seeds x {self.budgets} budgets: give 1 or more of each"
            )
        if min(self.trunk, self.branch) < 0:
            raise InputError(f"trunk spread {self.trunk}, branch spread {self.branch}: give spreads >= 0 of log loss")
        if not self.odd > 0:
            raise InputError(f"odd = {self.odd}: give a positive factor of one run's loss, 1 for none")

    @property
    def label(self) -> str:
        """Sizes x seeds x budgets, spans and spreads in one line."""
        span = f"N over {self.n_range[1] / self.n_range[0]:.3g}x, D over {self.d_range[1] / self.d_range[0]:.3g}x"
        runs = f"{self.sizes} sizes x {self.seeds} seeds x {self.budgets} budgets"
        noise = f"trunk {100 * self.trunk:.3g} %, branch {100 * self.branch:.3g} %"
        odd = "" if self.odd == 1.0 else f", one run x {self.odd:g}"
        return f"{runs}, {span}, {noise}" + ("" if self.branched else ", no branches") + odd

    def runs(self) -> Runs:
        """The study without noise."""
        rows = [
            (n, d, f"size {i}", f"trunk {i}-{s}", s)
            for i, n in enumerate(np.geomspace(*self.n_range, self.sizes))
            for s in range(self.seeds)
            for d in np.geomspace(*self.d_range, self.budgets)
        ]
        n, d, size, group, seed = (list(column) for column in zip(*rows, strict=True))
        loss = self.law.predict(np.array(n), np.array(d))
        return Runs.of(
            n,
            d,
            loss,
            size=size,
            group=group if self.branched else None,
            seed=seed,
            oracle=float(self.law.E),
            label=self.label,
        )

    def simulate(self, rng: np.random.Generator, studies: int) -> Array:
        """Log losses of `studies` studies, [K, m], rows as in `runs`."""
        runs = self.runs()
        trunks, member = np.unique(runs.group, return_inverse=True)  # without branches: one per run
        luck = self.trunk * rng.standard_normal((studies, len(trunks)))
        out = np.log(runs.loss) + luck[:, member] + self.branch * rng.standard_normal((studies, len(runs)))
        out[np.arange(studies), rng.integers(len(runs), size=studies)] += np.log(self.odd)
        return out

    def quantities(self) -> dict[str, Quantity]:
        """What is judged: alpha, beta, log N*(C) at the study's largest 6ND compute C, the frontier's loss at 10 C, E.

        The logarithm of N* has the same coverage as N*, and a width that means something: e^width is a factor.
        """
        c = float(self.runs().c.max())
        return {
            "alpha": lambda p: p.alpha,
            "beta": lambda p: p.beta,
            "N*(C)": lambda p: np.log(closed_form(p, c)[0]),
            "loss at 10x C": lambda p: closed_form(p, 10.0 * c)[2],
            "E": lambda p: p.E,
        }


@dataclass(frozen=True)
class Covered:
    """One quantity over K studies."""

    name: str
    cover: float  # share of studies whose interval contains the truth
    error: float  # binomial standard error of `cover`
    above: float  # share whose truth lies above the interval
    below: float
    width: float  # median width; log N*(C) in e-folds
    spread: float  # standard deviation of the estimates over studies, same unit
    bias: float  # median estimate minus truth
    refused: float  # share of studies that refused an interval; they are not counted in the rest

    def to_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)


@dataclass(frozen=True)
class Coverage:
    """What `cover` found for one design and method."""

    design: Design
    method: str
    level: float
    studies: int
    draws: int
    rows: tuple[Covered, ...]

    def __getitem__(self, name: str) -> Covered:
        return next(row for row in self.rows if row.name == name)

    def to_dict(self) -> dict[str, Any]:
        law = {k: float(getattr(self.design.law, k)) for k in ("E", "A", "alpha", "B", "beta")}
        return {
            "design": {**self.design.__dict__, "law": law},
            "label": self.design.label,
            "method": self.method,
            "level": self.level,
            "studies": self.studies,
            "draws": self.draws,
            "quantities": [row.to_dict() for row in self.rows],
        }


def studies(design: Design, count: int, seed: int = 0, *, delta: float = DELTA) -> Iterator[LawFit]:
    """`count` fitted simulated studies of the design. Raises InputError where the design cannot identify the law."""
    runs = design.runs()
    base = fit_law(runs, delta=delta, grid=8)
    log_loss = design.simulate(np.random.Generator(np.random.Philox(key=seed)), count)
    params, objective, _ = refit(base, log_loss=log_loss)
    theta = base.scale.to_theta(params)
    for k in range(count):
        yield replace(
            base,
            E=float(params.E[k]),
            A=float(params.A[k]),
            alpha=float(params.alpha[k]),
            B=float(params.B[k]),
            beta=float(params.beta[k]),
            runs=runs.with_loss(np.exp(log_loss[k])),
            theta=theta[k],
            objective=float(objective[k]),
            warnings=(),
        )


def cover(
    design: Design,
    count: int = 1000,
    *,
    draws: int = 1000,
    method: Method | Literal["profile"] = "hierarchical",
    level: float = 0.95,
    seed: int = 0,
    quantities: dict[str, Quantity] | None = None,
) -> Coverage:
    """Simulate `count` studies, interval each quantity by `method`, and count.

    quantities: name -> function of Params; default `design.quantities()`. E counts as refused where `Intervals` refuse
    it. Raises InputError for fewer than 10 studies or a design that cannot identify the law.
    """
    if count < 10:
        raise InputError(f"{count} simulated studies: use 1,000 to tell 93 % from 95 %")
    asked = quantities or design.quantities()
    truth = {name: float(of(design.law)) for name, of in asked.items()}
    estimates: dict[str, list[float]] = {name: [] for name in asked}
    spans: dict[str, list[tuple[float, float] | None]] = {name: [] for name in asked}
    for k, (fit, drawn) in enumerate(_intervals(design, count, draws, method, level, seed)):
        for name, of in asked.items():
            estimates[name].append(float(of(fit.params)))
            spans[name].append(_interval(fit, drawn, name, of, level, draws, seed + k + 1))
    rows = tuple(_count(name, truth[name], np.array(estimates[name]), spans[name]) for name in asked)
    return Coverage(design, method, level, count, draws, rows)


def _intervals(
    design: Design, count: int, draws: int, method: Method | Literal["profile"], level: float, seed: int
) -> Iterator[tuple[LawFit, Intervals | None]]:
    """Every fitted study with its draws, BATCH studies' draws solved together."""
    fits = studies(design, count, seed)
    for first in range(0, count, BATCH):
        some = list(islice(fits, BATCH))
        if method == "profile":
            yield from ((fit, None) for fit in some)
            continue
        seeds = [seed + first + k + 1 for k in range(len(some))]
        yield from zip(some, bootstrap_many(some, draws, method=method, level=level, seeds=seeds), strict=True)


def _interval(
    fit: LawFit, drawn: Intervals | None, name: str, of: Quantity, level: float, draws: int, seed: int
) -> tuple[float, float] | None:
    if drawn is None:
        from isofusion.laws.profile import profile

        found = profile(fit, of, level=level, draws=draws, seed=seed, name=name)
        low = -np.inf if found.low is None else found.low
        return low, np.inf if found.high is None else found.high
    if name == "E" and drawn.refusal("E"):
        return None
    low, high = drawn.of(of)
    return low, high


def _count(name: str, truth: float, estimates: Array, spans: list[tuple[float, float] | None]) -> Covered:
    kept = np.array([span for span in spans if span is not None]).reshape(-1, 2)
    refused = 1.0 - len(kept) / len(spans)
    spread, bias = float(estimates.std(ddof=1)), float(np.median(estimates) - truth)
    if not len(kept):
        return Covered(name, np.nan, np.nan, np.nan, np.nan, np.nan, spread, bias, refused)
    above, below = float(np.mean(kept[:, 1] < truth)), float(np.mean(kept[:, 0] > truth))
    inside = 1.0 - above - below
    width = float(np.median(kept[:, 1] - kept[:, 0]))
    error = float(np.sqrt(inside * (1.0 - inside) / len(kept)))
    return Covered(name, inside, error, above, below, width, spread, bias, refused)
