"""The order of data: which source row t comes from, and which permutation an epoch has. No state but t.

Quota over sources: Tijdeman's chairman assignment (Discrete Mathematics 32, 1980, 323-330), which keeps every prefix
within 1 - 1/(2k-2) < 1 row of its share for k sources; it repeats with a period of at most 1000 rows, which makes the
count of rows before t a closed form. Permutations: raw Philox 4x64 output sorted, a counter-based stream that NumPy
fixes across versions (its shuffle is not).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from isofusion.errors import InputError

PERIOD = 1000


class Quota:
    """Row t -> (source, that source's own row number). `shares` are the exact shares, f64[k]."""

    def __init__(self, weights: Sequence[float]) -> None:
        """`weights`: positive, any scale. Raises InputError for one below half a row in 1000."""
        self.per_cycle = _whole_shares(weights)
        self.period = int(self.per_cycle.sum())
        self.shares = self.per_cycle / self.period
        self.cycle = _chairman(self.per_cycle)  # i64[period]
        self.rank = np.empty(self.period, np.int64)  # how many rows of the same source come earlier in the cycle
        for source in range(len(self.per_cycle)):
            where = np.flatnonzero(self.cycle == source)
            self.rank[where] = np.arange(len(where))

    def locate(self, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """i64[...] rows -> (source i64[...], row of that source i64[...])."""
        turn, at = np.divmod(np.asarray(t, np.int64), self.period)
        source = self.cycle[at]
        return source, turn * self.per_cycle[source] + self.rank[at]

    def before(self, t: int) -> np.ndarray:
        """i64[k]: rows of each source among rows 0 .. t-1."""
        turn, at = divmod(int(t), self.period)
        return turn * self.per_cycle + np.bincount(self.cycle[:at], minlength=len(self.per_cycle))


def _whole_shares(weights: Sequence[float]) -> np.ndarray:
    """Rows per cycle of each source: exact where a period <= PERIOD allows, else largest remainders of PERIOD rows."""
    parts = [Fraction(w).limit_denominator(10**6) for w in weights]
    total = sum(parts)
    if any(p <= 0 for p in parts):
        raise InputError(f"weights of sources must be at least 1e-6, got {list(weights)}; multiply all by one number")
    shares = [p / total for p in parts]
    period = math.lcm(*(s.denominator for s in shares))
    if period <= PERIOD:
        return np.array([int(s * period) for s in shares], np.int64)
    rows = [math.floor(s * PERIOD) for s in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: (rows[i] - shares[i] * PERIOD, i))
    for i in by_remainder[: PERIOD - sum(rows)]:
        rows[i] += 1
    if 0 in rows:
        share = float(shares[rows.index(0)])
        raise InputError(f"a source has {share:.2%} of the rows; the least is 0.1 %: raise its weight or leave it out")
    return np.array(rows, np.int64)


def _chairman(counts: np.ndarray) -> np.ndarray:
    """One cycle of sources, each `counts[i]` times, every prefix within one row of its share (exact integers)."""
    k, period = len(counts), int(counts.sum())
    if k == 1:
        return np.zeros(period, np.int64)
    want = [int(c) for c in counts]
    given, out, scale = [0] * k, [], 2 * k - 2
    for t in range(1, period + 1):
        # lag_i = scale * (period * share_i * t - period * given_i); due when lag >= period; the nearest deadline first
        lag = [scale * (want[i] * t - period * given[i]) for i in range(k)]
        due = [i for i in range(k) if lag[i] >= period]
        pick = min(due, key=lambda i: (Fraction((scale - 1) * period - lag[i], want[i]), i))
        given[pick] += 1
        out.append(pick)
    return np.array(out, np.int64)


def permutation(n: int, seed: int, name: str, epoch: int) -> np.ndarray:
    """i64[n]: the order of a source's samples in an epoch, a pure function of its arguments."""
    mask = (1 << 64) - 1
    stream = (zlib.crc32(name.encode()) << 32 | epoch) & mask
    bits = np.random.Philox(key=np.array([seed & mask, stream], np.uint64))
    return np.argsort(bits.random_raw(n), kind="stable").astype(np.int64)
