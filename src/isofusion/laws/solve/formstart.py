"""Starts for any law: spread the searched parameters over their ranges, solve for those that scale a term.

A term with a factor of its own is linear in it, so for given exponents the factors follow from non-negative least
squares on relative errors (variable projection). The searched parameters come from a Halton sequence: even in any
number of dimensions, the same every time. Legend: S starts, K terms, P parameters, m rows.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from isofusion.laws.catalogue.law import Columns, Law, Theta
from isofusion.laws.table import Array

PRIMES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53)


def halton(count: int, dimensions: int) -> Array:
    """The first `count` points of the Halton sequence in (0, 1)^dimensions, [count, dimensions]."""
    out = np.zeros((count, dimensions))
    for k in range(dimensions):
        base = PRIMES[k % len(PRIMES)]
        # a second lap over the primes starts elsewhere in the sequence, so that no two columns agree
        index = np.arange(1, count + 1) + 409 * (k // len(PRIMES))
        scale = 1.0
        while index.any():
            scale /= base
            out[:, k] += scale * (index % base)
            index = index // base
    return out


def searched_ranges(law: Law, lower: Array, upper: Array) -> Array:
    """Range of each parameter's starts in theta, [P, 2], inside the bounds."""
    out = np.zeros((len(law.parameters), 2))
    for i, p in enumerate(law.parameters):
        low, high = (float(p.to_theta(v)) for v in p.start)
        low, high = max(low, lower[i]), min(high, upper[i])
        out[i] = (low, high) if low < high else (lower[i], upper[i])
    return out


def form_starts(
    law: Law, x: Columns, target: Array, fixed: Mapping[str, float], lower: Array, upper: Array, count: int
) -> tuple[Array, Array]:
    """theta [S, P] and its relative squared error [S]; without searched parameters a single start."""
    from scipy.optimize import nnls  # 0.1 s to import; the default law does not need it

    searched = [i for i, p in enumerate(law.parameters) if not p.linear and p.name not in fixed]
    count = count if searched else 1
    theta = np.zeros((count, len(law.parameters)))
    ranges = searched_ranges(law, lower, upper)
    theta[:, searched] = ranges[searched, 0] + halton(count, len(searched)) * np.diff(ranges[searched])[:, 0]
    for i, p in enumerate(law.parameters):
        if p.name in fixed:
            theta[:, i] = p.to_theta(fixed[p.name])
    given = {i for i, p in enumerate(law.parameters) if p.name in fixed}
    error = np.full(count, np.inf)
    for s in range(count):
        with np.errstate(all="ignore"):
            terms = law.terms(Theta(law, theta[s : s + 1]), x)
        columns = [t.sign * np.exp(np.minimum(np.broadcast_to(t.value, (1, len(target)))[0], 300.0)) for t in terms]
        solve = [k for k, t in enumerate(terms) if t.shift and not given & set(t.shift)]
        rest = [c for k, c in enumerate(columns) if k not in solve]
        right = np.ones(len(target)) - (sum(rest) / target if rest else 0.0)
        if not solve:
            error[s] = float(right @ right)
            continue
        matrix = np.stack([columns[k] / target for k in solve], axis=1)
        size = np.maximum(np.abs(matrix).mean(axis=0), 1e-300)
        if not np.isfinite(matrix).all():
            continue
        factors, distance = nnls(matrix / size, right)
        # a term projected away starts at a thousandth of the loss, not at zero, where its gradient vanishes
        shift = np.log(np.maximum(factors, 1e-3) / size)
        for k, log_s in zip(solve, shift, strict=True):
            for i, per in terms[k].shift.items():
                theta[s, i] += float(per[0, 0]) * log_s
        error[s] = distance**2
    return np.clip(theta, np.where(np.isin(range(len(lower)), list(given)), -np.inf, lower), upper), error
