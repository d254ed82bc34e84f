"""What a law is: a signed sum of terms whose logarithms are smooth functions of its parameters.

    prediction = sum_k s_k exp(t_k(theta)),   s_k = +1 or -1

Almost every published law has this shape, most with t_k affine in theta (log A - alpha log N). With shares
p_k = s_k exp(t_k) / prediction, the log prediction has gradient g = sum p_k t_k' and Hessian
sum p_k (t_k'' + t_k' t_k'') - g g', so a law that states its terms gets exact derivatives, batched over starts.

Your own law takes ten lines:

    >>> import numpy as np
    >>> from isofusion.laws.fit import fit_form
    >>> from isofusion.laws.catalogue.law import Law, coefficient, exponent
    >>> class Depth(Law):
    ...     name = "depth"
    ...     formula = "E + A/N^alpha + G/Z^gamma"
    ...     source = "an example: parameters N and layers Z"
    ...     columns = ("n", "z")
    ...     levels = (("n", 3), ("z", 3))
    ...     parameters = (coefficient("E"), coefficient("A"), exponent("alpha"), coefficient("G"), exponent("gamma"))
    ...     def terms(self, t, x):
    ...         return [t.power("E"), t.power("A", alpha=-np.log(x["n"])), t.power("G", gamma=-np.log(x["z"]))]
    >>> n, z = (v.ravel() for v in np.meshgrid(np.geomspace(1e7, 1e9, 5), [4.0, 8.0, 16.0, 32.0]))
    >>> fit = fit_form({"n": n, "z": z, "loss": 2 + 300 / n**0.3 + 0.5 / z**0.7}, Depth())
    >>> {k: round(v, 4) for k, v in fit.params.items()}
    {'E': 2.0, 'A': 300.0, 'alpha': 0.3, 'G': 0.5, 'gamma': 0.7}

`isofusion.laws.forms.register(Depth())` makes it known by its name.
Legend: S starts, K terms, P parameters, m rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from isofusion.errors import InputError
from isofusion.laws.table import Array, distinct

Columns = Mapping[str, Array]


@dataclass(frozen=True)
class Parameter:
    """One parameter. `log`: the solver works on its logarithm. `linear`: it scales a term, so starts solve for it."""

    name: str
    unit: str
    lower: float
    upper: float
    start: tuple[float, float]  # starts are drawn from this range
    log: bool = True
    linear: bool = False
    meaning: str = ""

    def to_theta(self, value: Any) -> Any:
        with np.errstate(divide="ignore"):
            return np.log(value) if self.log else np.asarray(value, dtype=np.float64)

    def of_theta(self, theta: Any) -> Any:
        return np.exp(theta) if self.log else theta


def coefficient(name: str, unit: str = "nats/token", meaning: str = "") -> Parameter:
    """A positive factor of a term (E, A, B): solved for at every start. Unit: of the term where its columns are 1."""
    return Parameter(name, unit, 1e-30, 1e65, (1e-2, 1e2), linear=True, meaning=meaning)


def exponent(
    name: str, lower: float = 0.01, upper: float = 3.0, start: tuple[float, float] = (0.05, 1.2), meaning: str = ""
) -> Parameter:
    """A power, dimensionless, in [lower, upper]."""
    return Parameter(name, "", lower, upper, start, log=False, meaning=meaning)


def positive(
    name: str, unit: str, lower: float, upper: float, start: tuple[float, float], meaning: str = ""
) -> Parameter:
    """A positive number that is not a factor of a term (a scale, a saturation point): searched in its logarithm."""
    return Parameter(name, unit, lower, upper, start, meaning=meaning)


def real(name: str, unit: str, lower: float, upper: float, start: tuple[float, float], meaning: str = "") -> Parameter:
    """A number of either sign."""
    return Parameter(name, unit, lower, upper, start, log=False, meaning=meaning)


@dataclass
class Term:
    """log |term| [S, m] and its derivatives in theta, by parameter index; `shift`: how theta scales the term.

    Multiplying the term by s means theta[i] += shift[i] log s; empty for a term without a factor of its own.
    """

    value: Array
    first: dict[int, Array]
    second: dict[tuple[int, int], Array] = field(default_factory=dict)
    sign: float = 1.0
    shift: dict[int, Array] = field(default_factory=dict)


class Theta:
    """theta [S, P] by parameter name, and the usual terms made of it."""

    def __init__(self, law: Law, theta: Array) -> None:
        self.theta = theta
        self.index = {p.name: i for i, p in enumerate(law.parameters)}

    def __getitem__(self, name: str) -> Array:
        """[S, 1]: the parameter in the solver's coordinate (the logarithm of a positive one)."""
        i = self.index[name]
        return self.theta[:, i : i + 1]

    def power(self, factor: str, sign: Any = 1.0, offset: Any = 0.0, **slopes: Any) -> Term:
        """sign * factor * exp(offset + sum slope * parameter): E is power("E"), A/N^alpha power("A", alpha=-log N)."""
        value = self[factor] + offset
        first: dict[int, Array] = {self.index[factor]: np.ones((1, 1))}
        for name, slope in slopes.items():
            row = np.atleast_2d(slope)
            value = value + self[name] * row
            first[self.index[name]] = row
        return Term(value, first, sign=sign, shift={self.index[factor]: np.ones((len(self.theta), 1))})

    def term(
        self,
        value: Array,
        first: Mapping[str, Array],
        second: Mapping[tuple[str, str], Array] | None = None,
        sign: float = 1.0,
        shift: Mapping[str, Array] | None = None,
    ) -> Term:
        """Any other term, by names; give each pair in `second` once."""
        at = self.index
        pairs = {(min(at[a], at[b]), max(at[a], at[b])): v for (a, b), v in (second or {}).items()}
        return Term(
            value,
            {at[k]: v for k, v in first.items()},
            pairs,
            sign,
            {at[k]: v for k, v in (shift or {}).items()},
        )


@dataclass(frozen=True)
class Expansion:
    """Log prediction [S, m], its gradient [S, P, m], and `curvature(u)`: sum over rows of u times its Hessian."""

    log_prediction: Array
    jacobian: Array
    curvature: Callable[[Array], Array]


class Law:
    """Base of every law: set the class attributes and `terms`; see the module's example."""

    name: str = ""
    formula: str = ""
    source: str = ""
    columns: tuple[str, ...] = ()
    target: str = "loss"
    parameters: tuple[Parameter, ...] = ()
    levels: tuple[tuple[str, int], ...] = ()  # fewest distinct values of a column that identify what rests on it
    identified_by: str = ""

    def terms(self, t: Theta, x: Columns) -> list[Term]:
        """The law's terms at theta (by name: t["alpha"] is [S, 1]) for columns x, each [m]."""
        raise NotImplementedError(f"{type(self).__name__} states no terms")

    def valid(self, x: Columns, where: str) -> None:
        """Raise InputError where a column holds values the law is not defined for. Default: positive and finite."""
        for name in self.columns:
            self.require(x, name, where, np.asarray(x[name]) > 0, "positive")

    def identified(self, x: Columns, free: frozenset[str], where: str) -> None:
        """Raise InputError where rows x cannot determine the parameters in `free`, saying which runs would help."""
        for name, needed in self.levels:
            self.need_levels(x, name, needed, where)

    # ---- helpers for subclasses ----

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(p.name for p in self.parameters)

    def require(self, x: Columns, name: str, where: str, ok: np.ndarray, what: str) -> None:
        column = np.asarray(x[name], dtype=np.float64)
        bad = np.flatnonzero(~(np.isfinite(column) & ok))
        if len(bad):
            raise InputError(
                f"{where}: column '{name}' must be {what} for {self.name} (row {bad[0]}: {column[bad[0]]:g}); "
                "drop or mend those rows"
            )

    def need_levels(self, x: Columns, name: str, needed: int, where: str, why: str = "") -> None:
        values = np.asarray(x[name], dtype=np.float64)
        have = distinct(values) if (values > 0).all() else len(np.unique(np.round(values, 6)))
        if have < needed:
            raise InputError(
                f"{where}: {have} value{'s' * (have != 1)} of '{name}' ({values.min():.4g} to {values.max():.4g}) "
                f"cannot determine {why or f'the part of {self.formula} that rests on it'}; "
                f"add runs at {needed - have} or more other values of '{name}'"
            )

    # ---- numbers ----

    def natural(self, theta: Array) -> dict[str, Any]:
        """theta[..., P] -> parameters by name, each [...]."""
        return {p.name: p.of_theta(theta[..., i]) for i, p in enumerate(self.parameters)}

    def theta(self, params: Mapping[str, Any]) -> Array:
        """Parameters by name -> theta [..., P]."""
        missing = [n for n in self.names if n not in params]
        if missing:
            raise InputError(
                f"{self.name}: no value for {', '.join(missing)}; its parameters are {', '.join(self.names)}"
            )
        return np.stack([np.asarray(p.to_theta(params[p.name]), dtype=np.float64) for p in self.parameters], axis=-1)

    def log_prediction(self, theta: Array, x: Columns) -> Array:
        """Log of the law at theta [S, P] for m rows: [S, m]; NaN where the signed terms sum to nothing positive."""
        with np.errstate(all="ignore"):  # far from the data a law may overflow; the sum is NaN there
            return _shares(self.terms(Theta(self, theta), x))[0]

    def predict(self, params: Mapping[str, Any], x: Columns) -> Array:
        """The law at parameters by name: [m], or [S, m] for arrays of draws."""
        theta = self.theta(params)
        arrays = {k: np.atleast_1d(np.asarray(x[k], dtype=np.float64)) for k in self.columns}
        out = np.exp(self.log_prediction(np.atleast_2d(theta), arrays))
        return out if theta.ndim == 2 else out[0]

    def expand(self, theta: Array, x: Columns) -> Expansion:
        """Log prediction with its exact first and second derivatives."""
        with np.errstate(all="ignore"):
            terms = self.terms(Theta(self, theta), x)
            log_prediction, shares = _shares(terms)
            size = len(self.parameters)
            jacobian = np.zeros((len(theta), size, log_prediction.shape[1]), dtype=log_prediction.dtype)
            for term, share in zip(terms, shares, strict=True):
                for i, slope in term.first.items():
                    jacobian[:, i] += share * slope

        def curvature(u: Array) -> Array:
            out = -np.matmul(jacobian * u[:, None, :], np.swapaxes(jacobian, 1, 2))
            for term, share in zip(terms, shares, strict=True):
                weight = u * share
                for (i, j), bend in term.second.items():
                    part = np.sum(weight * bend, axis=-1)
                    out[:, i, j] += part
                    if i != j:
                        out[:, j, i] += part
                index = list(term.first)
                if not index:
                    continue
                slopes = np.stack([np.broadcast_to(term.first[i], weight.shape) for i in index], axis=1)
                outer = np.matmul(slopes * weight[:, None, :], np.swapaxes(slopes, 1, 2))
                out[:, np.array(index)[:, None], index] += outer
            return out

        return Expansion(log_prediction, jacobian, curvature)


def _shares(terms: list[Term]) -> tuple[Array, list[Array]]:
    """Log of the signed sum [S, m] and each term's share in it."""
    values = np.broadcast_arrays(*(t.value for t in terms)) if len(terms) > 1 else [terms[0].value]
    top = np.max([v.real for v in values], axis=0)
    parts = [t.sign * np.exp(v - top) for t, v in zip(terms, values, strict=True)]
    total = sum(parts[1:], parts[0])
    total = np.where(total.real > 0, total, np.nan)
    return top + np.log(total), [p / total for p in parts]
