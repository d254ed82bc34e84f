"""Mixture laws: how the loss depends on the shares of the training domains, and which shares are best.

Source: Shukor et al. 2507.09404. For one target domain, shares h (sum 1) of k training domains:
  additive  L = E + 1 / sum_i C_i h_i^g_i + A / N^alpha + B / D^beta             (5 + 2k parameters)
  joint     the same with A = (sum_i P_i h_i)^gA and B = (sum_i Q_i h_i)^gB      (5 + 4k parameters)
The additive law's best mixture is the same at every scale; the joint law's moves with N and D. The best shares are
found by SLSQP from several starts with exact gradients, then checked against the optimality conditions.
Units: N parameters, D tokens, loss nats/token. Legend: m runs, k domains.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from isofusion.errors import InputError

Array = npt.NDArray[np.float64]
Kind = Literal["additive", "joint"]
SMALL = 1e-12  # shares below count as this: h^g has no derivative at 0


@dataclass(frozen=True)
class MixtureLaw:
    """One target domain's law. C, g [k]; joint: P, Q [k] and gA, gB, and then A and B are not used."""

    kind: Kind
    E: float
    C: Array
    g: Array
    alpha: float
    beta: float
    A: float = 0.0
    B: float = 0.0
    P: Array | None = None
    Q: Array | None = None
    gA: float = 1.0
    gB: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in ("additive", "joint"):
            raise InputError(f"mixture law {self.kind!r}: choose additive or joint")
        if len(self.C) != len(self.g) or not (np.asarray(self.C) >= 0).all() or not np.any(np.asarray(self.C) > 0):
            raise InputError("a mixture law needs C_i >= 0 (one above 0) and g_i, one of each per domain")
        if self.kind == "joint" and (self.P is None or self.Q is None or len(self.P) != self.k != len(self.Q)):
            raise InputError(f"a joint mixture law needs P and Q of {self.k} domains")

    @classmethod
    def of(cls, params: Mapping[str, float], domains: Sequence[str]) -> MixtureLaw:
        """From the parameters of a fit of `mixture-additive` or `mixture-joint` over these domains, by name."""

        def each(name: str) -> Array:
            return np.array([params[f"{name}_{k}"] for k in domains], dtype=np.float64)

        common = float(params["E"]), each("C"), each("g"), float(params["alpha"]), float(params["beta"])
        if "A" in params:
            return cls("additive", *common, A=float(params["A"]), B=float(params["B"]))
        return cls("joint", *common, P=each("A"), Q=each("B"), gA=float(params["g_A"]), gB=float(params["g_B"]))

    @property
    def k(self) -> int:
        return len(self.C)

    def predict(self, n: Array | float, d: Array | float, h: Array) -> Array:
        """Loss at n, d [...] and shares h [..., k]; they broadcast."""
        h = np.maximum(np.asarray(h, dtype=np.float64), SMALL)
        n_, d_ = np.asarray(n, dtype=np.float64), np.asarray(d, dtype=np.float64)
        a: Array | float = self.A
        b: Array | float = self.B
        if self.kind == "joint":
            assert self.P is not None
            assert self.Q is not None
            a, b = (h @ self.P) ** self.gA, (h @ self.Q) ** self.gB
        return np.asarray(
            self.E + 1.0 / np.sum(self.C * h**self.g, axis=-1) + a * n_**-self.alpha + b * d_**-self.beta,
            dtype=np.float64,
        )

    def gradient(self, n: float, d: float, h: Array) -> Array:
        """dL/dh [k] at one point (not projected on the simplex)."""
        h = np.maximum(np.asarray(h, dtype=np.float64), SMALL)
        total = float(np.sum(self.C * h**self.g))
        out = -self.C * self.g * h ** (self.g - 1.0) / total**2
        if self.kind == "joint":
            assert self.P is not None
            assert self.Q is not None
            out = out + self.gA * float(h @ self.P) ** (self.gA - 1.0) * self.P * n**-self.alpha
            out = out + self.gB * float(h @ self.Q) ** (self.gB - 1.0) * self.Q * d**-self.beta
        return np.asarray(out, dtype=np.float64)

    def to_dict(self) -> dict[str, Any]:
        return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in self.__dict__.items()}


@dataclass(frozen=True)
class BestMixture:
    """The shares that minimise a weighted sum of target losses at (n, d)."""

    shares: Array
    losses: Array  # of each law, at the best shares
    objective: float  # their weighted mean
    uniform: float  # the same at equal shares
    residual: float  # largest violation of the optimality conditions, nats/token per unit of share
    laws: tuple[MixtureLaw, ...]
    weights: Array
    n: float
    d: float

    def compare(self, shares: Array) -> float:
        """Lowest weighted mean loss over the given mixtures [q, k]."""
        losses = np.stack([law.predict(self.n, self.d, shares) for law in self.laws])
        return float(np.min(self.weights @ losses))


def optimal_mixture(
    laws: Sequence[MixtureLaw],
    n: float,
    d: float,
    *,
    weights: Sequence[float] | None = None,
    floor: float = 0.0,
    starts: int = 16,
    seed: int = 0,
    near: Array | None = None,
) -> BestMixture:
    """Shares on the simplex that minimise the weighted mean of the laws' losses at n parameters and d tokens.

    weights: of the laws (equal by default). floor: least share of every domain (the paper's grids keep 0.1). near:
    shares to start from instead of the usual starts. Raises InputError for laws of different domains, bad weights, or a
    floor that leaves no mixture.
    """
    from scipy.optimize import minimize

    if not laws or len({law.k for law in laws}) != 1:
        raise InputError("the best mixture needs laws over the same domains")
    k = laws[0].k
    w = np.ones(len(laws)) if weights is None else np.asarray(weights, dtype=np.float64)
    if len(w) != len(laws) or not (np.isfinite(w) & (w >= 0)).all() or w.sum() <= 0:
        raise InputError(f"weights {list(w)}: give one number of 0 or more per law, not all 0")
    w = w / w.sum()
    if not (n > 0 and d > 0):
        raise InputError(f"n = {n:g}, d = {d:g}: give positive parameters and tokens")
    if not 0 <= floor * k < 1:
        raise InputError(f"floor = {floor:g} for {k} domains leaves no mixture; it must be below {1 / k:.3g}")

    def value(h: Array) -> float:
        return float(w @ np.array([law.predict(n, d, h) for law in laws]))

    def slope(h: Array) -> Array:
        return np.asarray(w @ np.stack([law.gradient(n, d, h) for law in laws]), dtype=np.float64)

    rng = np.random.Generator(np.random.Philox(key=seed))
    corners = 0.7 * np.eye(k) + 0.3 / k
    points = np.concatenate([np.full((1, k), 1.0 / k), corners, rng.dirichlet(np.ones(k), max(0, starts - k - 1))])
    if near is not None:
        points = np.atleast_2d(near)
    low = max(floor, 1e-9)  # keeps h^g differentiable
    best, best_value = points[0], math.inf
    for start in points:
        h0 = low + (1.0 - k * low) * start
        found = minimize(
            value,
            h0,
            jac=slope,
            method="SLSQP",
            bounds=[(low, 1.0)] * k,
            constraints=[{"type": "eq", "fun": lambda h: h.sum() - 1.0, "jac": lambda h: np.ones(k)}],
            options={"ftol": 1e-15, "maxiter": 500},
        )
        h = np.maximum(found.x, low)
        h = h / h.sum()
        h = _polish(h, value, slope, low)
        if (at := value(h)) < best_value:
            best, best_value = h, at
    losses = np.array([float(law.predict(n, d, best)) for law in laws])
    shares = np.where(best <= 2e-9, floor, best)
    return BestMixture(
        shares / shares.sum(),
        losses,
        best_value,
        value(np.full(k, 1.0 / k)),
        _violation(best, slope(best), low),
        tuple(laws),
        w,
        float(n),
        float(d),
    )


def _polish(h: Array, value: Any, slope: Any, low: float) -> Array:
    """Newton steps inside the free shares with a numeric Hessian of the exact gradient: SLSQP stops at about 1e-8."""
    for _ in range(6):
        free = h > low * 1.5
        count = int(free.sum())
        if count < 2:
            return h
        step = 1e-5 * h[free]
        g = slope(h)
        hess = np.empty((count, count))
        for j, index in enumerate(np.flatnonzero(free)):
            up, down = h.copy(), h.copy()
            up[index], down[index] = up[index] + step[j], down[index] - step[j]
            hess[:, j] = (slope(up) - slope(down))[free] / (2 * step[j])
        system = np.zeros((count + 1, count + 1))
        system[:count, :count] = 0.5 * (hess + hess.T)
        system[:count, count] = system[count, :count] = 1.0
        try:
            move = np.linalg.solve(system, np.append(-g[free], 0.0))[:count]
        except np.linalg.LinAlgError:
            return h
        new = h.copy()
        new[free] += move
        if not (np.isfinite(new).all() and (new >= low).all() and value(new) <= value(h)):
            return h
        h = new
    return h


def _violation(h: Array, gradient: Array, low: float) -> float:
    """KKT: equal gradients where the share is free, none smaller at a bound."""
    free = h > low * 1.5
    level = float(gradient[free].mean())
    inside = float(np.max(np.abs(gradient[free] - level)))
    outside = float(np.max(np.maximum(level - gradient[~free], 0.0))) if (~free).any() else 0.0
    return max(inside, outside)
