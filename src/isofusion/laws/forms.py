"""The law L(N, D) = E + A/N^alpha + B/D^beta and its nested forms (one term dropped, or E fixed); `FORMS`: all laws.

`Form`, `Params` and `Scale` serve the default law, which has its own fast solver (fit.py). Every law by name, the
default one among them, is in FORMS and fitted by `fit_form` (formfit.py); law.py shows how to add one.

Source: Hoffmann et al. 2203.15556 eq. 2; arXiv 2504.07951 eq. 1. Units: L, E in nats/token, N in parameters, D in
tokens. The solver works on theta = (log E, log A', alpha', log B', beta') where log N and log D are centred and
scaled by the runs' own mean and spread; `Scale` converts. Legend: S starts or draws, m points.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from isofusion.errors import InputError
from isofusion.laws.catalogue.bends import DataConstrained, Mixture, PNorm, RoutedExperts
from isofusion.laws.catalogue.law import Law
from isofusion.laws.catalogue.sums import (
    Chinchilla,
    ErrorFromLoss,
    OverTraining,
    Power,
    PowerFloor,
    Sparsity,
    Terms,
    Tied,
    TwoModalities,
)
from isofusion.laws.table import Array, Runs

NAMES = ("E", "A", "alpha", "B", "beta")
DOMAINS = ("caption", "interleaved", "text")  # of the study's mixtures; Mixture(...) takes any others
FORMS: dict[str, Law] = {
    law.name: law
    for law in (
        Chinchilla(),
        Tied(),
        PNorm(),
        Terms("n", "d", "width", name="width"),
        Terms("width", "depth", "d", name="width-depth"),
        Power(),
        PowerFloor(),
        Sparsity(),
        Sparsity("n_total", name="sparsity-total"),
        RoutedExperts(),
        DataConstrained(),
        OverTraining(),
        ErrorFromLoss(),
        Mixture(*DOMAINS),
        Mixture(*DOMAINS, joint=True),
        TwoModalities(),
    )
}


def find(name: str) -> Law:
    """The law of that name; InputError naming all of them if there is none."""
    if name not in FORMS:
        raise InputError(f"no law '{name}'; the laws are {', '.join(FORMS)}")
    return FORMS[name]


def register(law: Law) -> Law:
    """Make a law known by its name to `find`, `fit_form` and the command line."""
    if not law.name or law.name in FORMS:
        raise InputError(f"a law named '{law.name}' is already known; choose another name")
    FORMS[law.name] = law
    return law


@dataclass(frozen=True)
class Form:
    """Which terms the law has. `fixed_e`: E is this value (0 = no irreducible loss) instead of a free parameter."""

    n_term: bool = True
    d_term: bool = True
    fixed_e: float | None = None

    def __post_init__(self) -> None:
        if not (self.n_term or self.d_term):
            raise InputError("a law needs the N term or the D term")
        if self.fixed_e is not None and not (np.isfinite(self.fixed_e) and self.fixed_e >= 0):
            raise InputError(f"fixed E = {self.fixed_e}: give a finite loss >= 0 in nats/token")

    @property
    def free(self) -> np.ndarray:
        """bool[5] over NAMES: which parameters are fitted."""
        return np.array([self.fixed_e is None, self.n_term, self.n_term, self.d_term, self.d_term])

    @property
    def formula(self) -> str:
        parts = ["E"] if self.fixed_e is None else ([f"{self.fixed_e:.6g}"] if self.fixed_e else [])
        return " + ".join(parts + ["A/N^alpha"] * self.n_term + ["B/D^beta"] * self.d_term)


@dataclass(frozen=True)
class Params:
    """Parameters of one law (scalars) or of S bootstrap draws (arrays S). A dropped term has coefficient 0."""

    E: Array
    A: Array
    alpha: Array
    B: Array
    beta: Array

    @classmethod
    def of(cls, E: float, A: float, alpha: float, B: float, beta: float) -> Params:
        return cls(*(np.asarray(v, dtype=np.float64) for v in (E, A, alpha, B, beta)))

    def predict(self, n: Array | float, d: Array | float) -> Array:
        """Loss at (n, d), which broadcast together: their shape, with the draws' axis S in front where there is one."""
        n_, d_ = np.broadcast_arrays(np.asarray(n, dtype=np.float64), np.asarray(d, dtype=np.float64))
        lift = (...,) + (None,) * n_.ndim
        out = np.asarray(self.E, dtype=np.float64)[lift] + np.zeros_like(n_)
        for coefficient, exponent, x in ((self.A, self.alpha, n_), (self.B, self.beta, d_)):
            coefficient, exponent = np.asarray(coefficient), np.asarray(exponent)
            if np.any(coefficient > 0):
                with np.errstate(divide="ignore"):  # log 0 = -inf: a vanished term
                    out = out + np.exp(np.log(coefficient)[lift] - exponent[lift] * np.log(x))
        return out

    def __len__(self) -> int:
        return int(np.size(self.E))


@dataclass(frozen=True)
class Scale:
    """Centre and spread of log N and log D: the standardised coordinates of the solver."""

    mean_n: float
    mean_d: float
    spread_n: float
    spread_d: float

    @classmethod
    def of(cls, runs: Runs) -> Scale:
        log_n, log_d = np.log(runs.n), np.log(runs.d)
        # a term whose variable never changes is refused (or dropped) before the solver; avoid 0/0 there
        return cls(float(log_n.mean()), float(log_d.mean()), float(log_n.std()) or 1.0, float(log_d.std()) or 1.0)

    def x(self, n: Array) -> Array:
        return (np.log(n) - self.mean_n) / self.spread_n

    def y(self, d: Array) -> Array:
        return (np.log(d) - self.mean_d) / self.spread_d

    def to_params(self, theta: Array) -> Params:
        """theta[..., 5] -> natural parameters of shape [...]."""
        alpha, beta = theta[..., 2] / self.spread_n, theta[..., 4] / self.spread_d
        return Params(
            np.exp(theta[..., 0]),
            np.exp(theta[..., 1] + alpha * self.mean_n),
            alpha,
            np.exp(theta[..., 3] + beta * self.mean_d),
            beta,
        )

    def to_theta(self, params: Params) -> Array:
        """Natural parameters -> theta[..., 5]; a zero coefficient becomes -inf."""
        with np.errstate(divide="ignore"):
            log_e, log_a, log_b = np.log(params.E), np.log(params.A), np.log(params.B)
        return np.stack(
            [
                log_e,
                log_a - params.alpha * self.mean_n,
                params.alpha * self.spread_n,
                log_b - params.beta * self.mean_d,
                params.beta * self.spread_d,
            ],
            axis=-1,
        )
