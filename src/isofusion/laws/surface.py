"""Loss surfaces over (N, D) with draws, and training FLOPs per token: what a plan is computed on.

Sources: arXiv 2504.07951 eq. 1 and App. C.2 (cost of late fusion); Muennighoff et al. 2305.16264 eq. 5, 6.
Units: N parameters, D tokens, loss nats/token. Legend: S draws (1 for a law without uncertainty).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from isofusion.errors import InputError
from isofusion.laws import family

Array = npt.NDArray[np.float64]
Rate = Callable[[Array], Array]  # N -> training FLOPs per token


class Surface(Protocol):
    """A loss surface with S draws on the last axis."""

    @property
    def floor(self) -> Array:
        """Irreducible loss [S]."""

    def loss(self, n: Array, d: Array) -> Array:
        """Loss at n, d of shape [..., S]."""

    def tokens(self, loss: float | Array, n: Array) -> Array:
        """Tokens that reach `loss` at n parameters, inf where none do. Shape [..., S]."""


@dataclass(frozen=True)
class PowerSurface:
    """E + A/N^alpha + B/D^beta; parameters [S]."""

    E: Array
    A: Array
    alpha: Array
    B: Array
    beta: Array

    @classmethod
    def of(cls, params: Any) -> PowerSurface:
        """From anything with E, A, alpha, B, beta (a mapping or attributes), scalars or draws [S]."""
        get = params.__getitem__ if isinstance(params, Mapping) else lambda k: getattr(params, k)
        values = (np.atleast_1d(np.asarray(get(k), dtype=np.float64)) for k in ("E", "A", "alpha", "B", "beta"))
        return cls(*values)

    @property
    def floor(self) -> Array:
        return self.E

    def loss(self, n: Array, d: Array) -> Array:
        with np.errstate(divide="ignore", over="ignore"):
            first = np.exp(np.log(self.A) - self.alpha * np.log(n))
            return self.E + first + np.exp(np.log(self.B) - self.beta * np.log(d))

    def tokens(self, loss: float | Array, n: Array) -> Array:
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            gap = loss - self.E - np.exp(np.log(self.A) - self.alpha * np.log(n))
            return np.where(gap > 0, np.exp((np.log(self.B) - np.log(gap)) / self.beta), np.inf)


@dataclass(frozen=True)
class RepetitionSurface:
    """Muennighoff et al. 2305.16264 eq. 5, 6: `unique` tokens, the rest repeated. One law, no draws."""

    params: Mapping[str, float]
    unique: float

    @property
    def floor(self) -> Array:
        return np.array([self.params["E"]])

    def loss(self, n: Array, d: Array) -> Array:
        p = self.params
        with np.errstate(divide="ignore", over="ignore"):
            u = np.minimum(d, self.unique)
            d_eff = u * (1.0 - p["R_D"] * np.expm1(-(d / u - 1.0) / p["R_D"]))
            fit = (p["alpha"] * p["A"] / (p["beta"] * p["B"]) * u ** p["beta"]) ** (1.0 / p["alpha"])
            base = np.minimum(n, fit)
            n_eff = base * (1.0 - p["R_N"] * np.expm1(-(n / base - 1.0) / p["R_N"]))
            return p["E"] + p["A"] * n_eff ** -p["alpha"] + p["B"] * d_eff ** -p["beta"]

    def tokens(self, loss: float | Array, n: Array) -> Array:
        low, high = np.full(np.shape(n), math.log(1e3)), np.full(np.shape(n), math.log(1e22))
        never = self.loss(n, np.exp(high)) > loss
        for _ in range(80):
            mid = 0.5 * (low + high)
            short = self.loss(n, np.exp(mid)) > loss
            low, high = np.where(short, mid, low), np.where(short, high, mid)
        return np.where(never, np.inf, np.exp(0.5 * (low + high)))


def six_n(n: Array) -> Array:
    """Training FLOPs per token of a dense model: 6 N."""
    return 6.0 * n


def late_rate(image_share: float = family.IMAGE_SHARE) -> Rate:
    """Training FLOPs per token of late fusion, N = N_v + N_t: 6 (f N_v + N_t).

    N_v is regressed on N over the paper's six sizes (App. C.2). Raises InputError for a share outside [0, 1].
    """
    if not 0 <= image_share <= 1:
        raise InputError(f"--image-share {image_share:g}: give the share of image tokens, between 0 and 1")
    p, q = family.encoder_line()

    def rate(n: Array) -> Array:
        return 6.0 * (n - (1.0 - image_share) * np.clip(p + q * n, 0.0, n))

    return rate
