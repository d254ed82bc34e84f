"""Training FLOPs per token against N: C = k(N) D, the x-axis every compute-optimal answer stands on.

Three ways to count (docs/models.md): C = 6 N D; late fusion, C = 6 D (f N_v + N_t), where only the share f of
tokens that are image patches passes the encoder and N_v is a linear function of N (arXiv 2504.07951 App. C.2:
embeddings break a fixed ratio); and any table's own FLOPs, e.g. the exact ledger. Units: C in FLOPs, N and N_v in
parameters, D in tokens; N = N_v + N_t is the total.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from isofusion.errors import InputError
from isofusion.laws.table import Array, Runs, clusters

REACH = 1e4  # N is looked for this far outside the sizes a measured cost was taken from
DISAGREE = 0.02  # relative misfit above which "these FLOPs were counted as 6 D (f N_v + N_t)" is not believed


@dataclass(frozen=True)
class Encoder:
    """N_v = slope N + intercept, kept inside [0, N]; `share`: image tokens over all tokens."""

    share: float
    slope: float
    intercept: float

    def size(self, n: Array | float) -> Array:
        """Encoder parameters N_v of a model with n parameters in all."""
        n_ = np.asarray(n, dtype=np.float64)
        return np.clip(self.slope * n_ + self.intercept, 0.0, n_)


@dataclass(frozen=True)
class Cost:
    """Training FLOPs per token as a function of N: C = k(N) D. `spread`: largest relative misfit of k at a run."""

    kind: Literal["6nd", "measured", "late"]
    log_n: Array
    log_k: Array
    slope: float
    spread: float
    encoder: Encoder | None = None

    @classmethod
    def six_nd(cls, constant: float = 6.0) -> Cost:
        """C = constant · N · D."""
        return cls("6nd", np.zeros(1), np.log(np.array([constant])), 1.0, 0.0)

    @classmethod
    def measured(cls, runs: Runs) -> Cost:
        """k(N) from the runs' own FLOPs: log-log interpolation between sizes, log-log regression outside them."""
        cluster = clusters(runs.n)
        ids = range(int(cluster.max()) + 1)
        log_k = np.log(runs.c / runs.d)
        at_n = np.array([np.log(runs.n[cluster == i]).mean() for i in ids])
        at_k = np.array([log_k[cluster == i].mean() for i in ids])
        spread = float(np.max(np.abs(np.exp(log_k - at_k[cluster]) - 1.0)))
        slope = float(np.polyfit(at_n, at_k, 1)[0]) if len(at_n) > 1 else 1.0
        if slope <= 0:
            raise InputError(
                f"{runs.label or 'runs'}: FLOPs per token fall as N grows (slope {slope:.2f}); check the FLOPs column"
            )
        return cls("measured", at_n, at_k, slope, spread)

    @classmethod
    def late(cls, share: float, slope: float, intercept: float = 0.0) -> Cost:
        """C = 6 D (f N_v + N - N_v) with f = share and N_v = slope N + intercept, N the total (App. C.2).

        share: image tokens over all tokens, in (0, 1]; the paper's mixture has 0.544. Raises InputError outside it, or
        where the encoder would be all of a large model (slope outside [0, 1)).
        """
        if not 0.0 < share <= 1.0:
            raise InputError(f"share = {share}: give image tokens / all tokens, above 0 and at most 1 (paper: 0.544)")
        if not (0.0 <= slope < 1.0 and np.isfinite(intercept)):
            raise InputError(f"N_v = {slope:g} N + {intercept:g}: give 0 <= slope < 1 and a finite intercept")
        return cls("late", np.zeros(1), np.log(np.array([6.0])), 1.0, 0.0, Encoder(share, slope, intercept))

    @classmethod
    def late_of(
        cls,
        n_total: Sequence[float] | Array | Runs,
        n_encoder: Sequence[float] | Array,
        share: float | None = None,
    ) -> Cost:
        """Late fusion with N_v regressed on N over the given models; `spread` is the largest misfit of k at one.

        n_total: parameters of the models [m], or their `Runs`; n_encoder: encoder parameters [m]. share: image tokens
        over all tokens. With `Runs` it may be left out: it is then measured from their FLOPs, which must have been
        counted as 6 D (f N_v + N_t) (column flops_6nd of a study). Raises InputError where these disagree.
        """
        runs = n_total if isinstance(n_total, Runs) else None
        n = np.asarray(n_total.n if isinstance(n_total, Runs) else n_total, dtype=np.float64).ravel()
        n_v = np.asarray(n_encoder, dtype=np.float64).ravel()
        if len(n) != len(n_v) or not len(n):
            raise InputError(f"{len(n)} totals and {len(n_v)} encoders; give both for every model")
        if (~np.isfinite(n_v) | (n_v <= 0) | (n_v >= n)).any():
            i = int(np.argmax(~np.isfinite(n_v) | (n_v <= 0) | (n_v >= n)))
            raise InputError(f"model {i}: {n_v[i]:g} encoder parameters of {n[i]:g}; they must lie between 0 and N")
        if share is None:
            if runs is None:
                raise InputError("give share (image tokens / all tokens), or the runs to measure it from")
            share = image_share(runs, n_v)
        if np.ptp(np.log(n)) < 1e-9:
            slope, intercept = float(n_v[0] / n[0]), 0.0
        else:
            slope, intercept = (float(v) for v in np.polyfit(n, n_v, 1))
        cost = cls.late(share, slope, intercept)
        truth = 6.0 * (share * n_v + n - n_v)
        spread = float(np.max(np.abs(cost.per_token(n) / truth - 1.0)))
        return cls(cost.kind, cost.log_n, cost.log_k, cost.slope, spread, cost.encoder)

    @classmethod
    def of(cls, runs: Runs) -> Cost:
        """6ND where the table's compute is 6ND, else measured."""
        return cls.six_nd() if runs.compute == "6nd" else cls.measured(runs)

    def per_token(self, n: Array | float) -> Array:
        """FLOPs per token at N parameters."""
        if self.encoder is not None:
            n_ = np.asarray(n, dtype=np.float64)
            return 6.0 * (n_ - (1.0 - self.encoder.share) * self.encoder.size(n_))
        x = np.log(np.asarray(n, dtype=np.float64))
        inside = np.interp(x, self.log_n, self.log_k)
        outside = np.minimum(x - self.log_n[0], 0.0) + np.maximum(x - self.log_n[-1], 0.0)
        return np.exp(inside + self.slope * outside)

    def tokens(self, c: Array | float, n: Array | float) -> Array:
        """D = C / k(N)."""
        return np.asarray(c, dtype=np.float64) / self.per_token(n)

    def size(self, c: Array | float, d: Array | float) -> Array:
        """N with k(N) = C / D (a measured k is interpolated on a fine grid)."""
        if self.kind == "6nd":
            return np.asarray(c, dtype=np.float64) / np.asarray(d, dtype=np.float64) / np.exp(self.log_k[0])
        target = np.log(np.asarray(c, dtype=np.float64)) - np.log(np.asarray(d, dtype=np.float64))
        if self.encoder is not None:  # k is piecewise linear in N
            each, e = np.exp(target) / 6.0, self.encoder
            saved = 1.0 - e.share
            n = (each + saved * e.intercept) / (1.0 - saved * e.slope)
            n_v = e.slope * n + e.intercept
            return np.where(n_v < 0, each, np.where(n_v > n, each / e.share, n))
        grid = np.linspace(self.log_n[0] - np.log(REACH), self.log_n[-1] + np.log(REACH), 4001)
        return np.exp(np.interp(target, np.maximum.accumulate(np.log(self.per_token(np.exp(grid)))), grid))


def image_share(runs: Runs, n_encoder: Sequence[float] | Array) -> float:
    """The share f of image tokens that makes C = 6 D (f N_v + N_t) true for these runs.

    Raises InputError where no share does within 2 %: the FLOPs were then counted otherwise (the exact ledger).
    """
    n_v = np.asarray(n_encoder, dtype=np.float64).ravel()
    rest = runs.c / (6.0 * runs.d) - (runs.n - n_v)
    share = float(np.sum(rest * n_v) / np.sum(n_v * n_v))
    misfit = float(np.max(np.abs(6.0 * runs.d * (share * n_v + runs.n - n_v) / runs.c - 1.0)))
    if not 0.0 < share <= 1.0 or misfit > DISAGREE:
        raise InputError(
            f"{runs.label or 'runs'}: their FLOPs are not 6 D (f N_v + N_t) for any f (best f = {share:.3g}, off by "
            f"{100 * misfit:.2g} %); use the column counted that way (flops_6nd), or give the share of image tokens"
        )
    return share
