"""Piecewise cubics through a few points, for many curves at once: Akima and PCHIP.

Both are Hermite cubics that differ in the slope at the points; scipy has both, but importing them takes longer than a
whole fit. Legend: k points, S curves, g places.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from isofusion.laws.table import Array


def through(kind: Literal["akima", "pchip"], x: Array, y: Array, at: Array) -> Array:
    """The curves through (x [k] ascending, y [k, S]) at `at` [g] inside x: [g, S]. Needs k >= 3.

    akima: Akima, J. ACM 17 (1970) 589; pchip: Fritsch and Butland, SIAM J. Sci. Stat. Comput. 5 (1984) 300, which
    keeps the data's monotonicity.
    """
    h = np.diff(x)[:, None]
    secant = np.diff(y, axis=0) / h
    slope = _akima(secant) if kind == "akima" else _pchip(h, secant)
    i = np.clip(np.searchsorted(x, at, side="right") - 1, 0, len(x) - 2)
    t = (at[:, None] - x[i, None]) / h[i]
    rise = secant[i]
    bend, twist = 3 * rise - 2 * slope[i] - slope[i + 1], slope[i] + slope[i + 1] - 2 * rise
    return np.asarray(y[i] + h[i] * t * (slope[i] + t * (bend + t * twist)))


def _akima(secant: Array) -> Array:
    """Slopes [k, S] from the secants [k - 1, S]: neighbours weighted by how little the next ones turn."""
    before = [2 * secant[0] - secant[1], 3 * secant[0] - 2 * secant[1]]
    after = [2 * secant[-1] - secant[-2], 3 * secant[-1] - 2 * secant[-2]]
    m = np.stack([before[1], before[0], *secant, *after])
    turn = np.abs(np.diff(m, axis=0))
    left, right = turn[2:], turn[:-2]
    both = left + right
    straight = both <= 1e-9 * both.max(initial=0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        weighted = (left * m[1:-2] + right * m[2:-1]) / both
    return np.asarray(np.where(straight, 0.5 * (m[1:-2] + m[2:-1]), weighted))


def _pchip(h: Array, secant: Array) -> Array:
    """Slopes [k, S] from the steps [k - 1, 1] and secants [k - 1, S]: harmonic means, zero at an extremum."""
    first, second = secant[:-1], secant[1:]
    w1, w2 = 2 * h[1:] + h[:-1], h[1:] + 2 * h[:-1]
    with np.errstate(divide="ignore", invalid="ignore"):
        inner = np.where(first * second > 0, (w1 + w2) / (w1 / first + w2 / second), 0.0)
    ends = [
        _end(h[0], h[1], secant[0], secant[1]),
        _end(h[-1], h[-2], secant[-1], secant[-2]),
    ]
    return np.concatenate([ends[0][None], inner, ends[1][None]])


def _end(h0: Array, h1: Array, m0: Array, m1: Array) -> Array:
    """One-sided slope of three points, held to the data's shape (Moler, Numerical Computing with MATLAB, 3.6)."""
    d = ((2 * h0 + h1) * m0 - h0 * m1) / (h0 + h1)
    d = np.where(np.sign(d) != np.sign(m0), 0.0, d)
    return np.asarray(np.where((np.sign(m0) != np.sign(m1)) & (np.abs(d) > 3 * np.abs(m0)), 3 * m0, d))
