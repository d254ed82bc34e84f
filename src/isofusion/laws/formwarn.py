"""What a reader must know about a fit of any law: condition number, approximate standard errors, typed warnings."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from isofusion.laws.catalogue.law import Columns, Law, Theta
from isofusion.laws.solve.sandwich import sandwich
from isofusion.laws.table import Array
from isofusion.laws.warn import FitWarning

if TYPE_CHECKING:
    from isofusion.laws.formfit import FormFit

GONE = 1e-4  # a term under this share of every prediction has vanished
UNIDENTIFIED = 1e12  # condition number of the Gauss-Newton matrix
FLAT = 0.5  # a standard error above this share of the parameter is called flat
FLAT_SAYS = "has a standard error of about {:.2g}, were the runs independent: flat along it"


def condition_of(law: Law, theta: Array, x: Columns, weights: Array, free: np.ndarray) -> float:
    """Condition number of the Gauss-Newton matrix over the free parameters; inf where a combination does nothing.

    A coefficient and the exponent on its term are nearly collinear wherever the columns' logarithms are far from zero,
    which says nothing about the data; so each exponent's column is taken net of the coefficients of its terms.
    """
    rows = law.expand(theta[None], x).jacobian[0] * np.sqrt(weights)
    net = rows.copy()
    factors: dict[int, set[int]] = {}
    for term in law.terms(Theta(law, theta[None]), x):
        scale = {i for i in term.shift if free[i]}
        for i in term.first:
            if i not in term.shift:
                factors.setdefault(i, set()).update(scale)
    for i, scale in factors.items():
        if scale and free[i]:
            basis = rows[sorted(scale)].T
            net[i] = rows[i] - basis @ np.linalg.lstsq(basis, rows[i], rcond=None)[0]
    length = np.linalg.norm(net, axis=1)
    if (length[free] <= 1e-9 * np.linalg.norm(rows[free], axis=1)).any():
        return float("inf")
    singular = np.linalg.svd(net[free] / length[free, None], compute_uv=False)
    return float((singular[0] / singular[-1]) ** 2) if singular[-1] > 0 else float("inf")


def standard_errors(fit: FormFit) -> dict[str, float]:
    """Sandwich standard errors in natural units, rows taken for independent; NaN where the rows do not fix them."""
    free = np.flatnonzero(fit.free)
    made = fit.law.expand(fit.theta[None], fit.columns)
    deviation = sandwich(made.jacobian[0][free], made.log_prediction[0], np.log(fit.target), fit.criterion, fit.weights)
    out: dict[str, float] = {}
    for i, s in zip(free, deviation, strict=True):
        p = fit.law.parameters[i]
        out[p.name] = float(s * fit.params[p.name]) if p.log else float(s)
    return out


def form_warnings(fit: FormFit, converged: bool) -> list[FitWarning]:
    """Everything that casts doubt on the fit's parameters."""
    out: list[FitWarning] = []
    law, theta = fit.law, fit.theta
    if not converged:
        out.append(FitWarning("not-converged", f"the best start stopped at gradient norm {fit.gradient_norm:.1e}"))
    prediction = fit.law.log_prediction(theta[None], fit.columns)[0]
    gone: set[str] = set()
    for term in law.terms(Theta(law, theta[None]), fit.columns):
        names = [law.names[i] for i in term.first]
        if not any(n not in fit.fixed for n in names):
            continue
        if float(np.max(np.broadcast_to(term.value, (1, len(prediction)))[0] - prediction)) < np.log(GONE):
            gone.update(names)
            if names == ["E"]:
                message = f"E went to {fit.params['E']:.2g}; the runs do not reach low enough to see a floor"
                out.append(FitWarning("irreducible-loss-zero", message))
            else:
                message = (
                    f"the term of {', '.join(names)} is under 0.01 % of every prediction; widen its columns' range"
                )
                out.append(FitWarning("term-vanished", message))
    for i in np.flatnonzero(fit.free):
        p = law.parameters[i]
        if p.linear or p.name in gone:
            continue
        for edge in (fit.lower[i], fit.upper[i]):
            if abs(theta[i] - edge) < 1e-6 * (fit.upper[i] - fit.lower[i]):
                value = f"{p.name} sits at its bound {float(p.of_theta(edge)):g}"
                out.append(FitWarning("exponent-at-bound", f"{value}; the law does not describe these rows, or cannot"))
    if not fit.condition <= UNIDENTIFIED and not gone:
        message = (
            f"condition number {fit.condition:.1e}: some parameters trade off exactly. Needed: {law.identified_by}"
        )
        out.append(FitWarning("unidentified", message))
        return out
    for name, error in fit.errors.items():
        p = law.parameters[law.names.index(name)]
        if p.linear or name in gone:
            continue
        at = fit.params[name]
        # a parameter that may be zero is flat only against its own range
        size = abs(at) if p.log or p.lower > 0 else max(abs(at), 0.1 * (p.upper - p.lower))
        if not error <= FLAT * size:
            out.append(FitWarning("flat", f"{name} = {at:.3g} {FLAT_SAYS.format(error)}"))
    return out
