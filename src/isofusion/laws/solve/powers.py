"""exp(c - a x) for many pairs (c, a) on one set of runs: where a batched fit spends its time.

Two shortcuts, both exact to rounding. Runs share their x (ladders have few sizes), so each distinct x is computed once.
And the rows of one call have nearly the same exponent (draws of one bootstrap), so exp(-a x) is a few terms of its
Taylor series in a, one matrix product, instead of an exponential per element: with |a - centre| |x - middle| at most
REACH the first term left out is below 3e-17.
Legend: S rows, m runs.
"""

from __future__ import annotations

from copy import copy

import numpy as np

from isofusion.laws.table import Array

TERMS = 15
REACH = 0.5
FEWEST = 24  # rows from which the series is sooner than the exponentials


class Powers:
    """exp(c - a x) on the runs' x [m]."""

    def __init__(self, x: Array) -> None:
        values, self.where = np.unique(x, return_inverse=True)
        self.few = len(values) <= 0.8 * len(x)
        if not self.few:
            values = x
        self.line = np.stack([np.ones_like(values), -values])
        self.middle = 0.5 * (float(values.min()) + float(values.max()))
        width = float(np.abs(values - self.middle).max())
        self.reach = REACH / width if width > 0 else np.inf
        self._centre, self._series = np.nan, np.empty((TERMS, len(values)))

    def anew(self) -> Powers:
        """The same without a centre, so that a result depends on the calls since then alone, to the last bit."""
        fresh = copy(self)
        fresh._centre, fresh._series = np.nan, np.empty_like(self._series)
        return fresh

    def __call__(self, pairs: Array, out: Array) -> Array:
        """[S, m] into out from pairs (c, a) [S, 2]."""
        if not self.few:
            return self._fill(pairs, out)
        values = self._fill(pairs, np.empty((len(pairs), self.line.shape[1])))
        return np.take(values, self.where, axis=1, out=out, mode="clip")

    def _fill(self, pairs: Array, out: Array) -> Array:
        if len(pairs) < FEWEST or not np.isfinite(self.reach):
            return np.exp(np.matmul(pairs, self.line, out=out), out=out)
        a = pairs[:, 1]
        t = a - self._centre
        far = np.flatnonzero(~(np.abs(t) <= self.reach))  # all of them before the first call
        if len(far) > len(a) // 8:
            self._move(float(np.median(a)))
            t = a - self._centre
            far = np.flatnonzero(np.abs(t) > self.reach)
            if len(far) > len(a) // 2:
                return np.exp(np.matmul(pairs, self.line, out=out), out=out)
        if len(far):
            t[far] = 0.0
        powers = np.empty((TERMS, len(a)))
        np.exp(pairs[:, 0] - a * self.middle, out=powers[0])
        for k in range(1, TERMS):
            np.multiply(powers[k - 1], t, out=powers[k])
        np.matmul(powers.T, self._series, out=out)
        if len(far):
            out[far] = np.exp(pairs[far] @ self.line)
        return out

    def _move(self, centre: float) -> None:
        """Expand about another exponent: term k is exp(-centre x) (-x)^k / k!, x from its middle."""
        self._centre = centre
        offset = self.line[1] + self.middle
        np.exp(centre * offset, out=self._series[0])
        for k in range(1, TERMS):
            np.multiply(self._series[k - 1], offset / k, out=self._series[k])
