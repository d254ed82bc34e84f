"""The laws whose terms are not powers: p-norm sum, repeated data, routed experts, data mixtures. Derivatives by hand.

Columns: n parameters, d tokens, unique tokens in the data set, experts per layer, h_<domain> share of a domain.
"""

from __future__ import annotations

import itertools
from types import MappingProxyType

import numpy as np

from isofusion.errors import InputError
from isofusion.laws.catalogue.law import Columns, Law, Parameter, Term, Theta, coefficient, exponent, positive, real
from isofusion.laws.catalogue.sums import Chinchilla, apart
from isofusion.laws.table import Array

LEAST_SHARE = 1e-6  # a domain that is absent counts as this share, so that its logarithm exists


class PNorm(Law):
    """L = E + ((A/N^alpha)^p + (B/D^beta)^p)^(1/p): p = 1 is the usual sum, p -> infinity the larger term alone."""

    name = "p-norm"
    formula = "E + ((A/N^alpha)^p + (B/D^beta)^p)^(1/p)"
    source = "the sum of Hoffmann et al. eq. 2 generalised; Kaplan et al. 2001.08361 eq. 1.5 is E = 0, p = 1/alpha_D"
    columns = ("n", "d")
    parameters = (*Chinchilla.parameters, positive("p", "", 0.1, 20.0, (0.5, 3.0), "how sharply the larger term wins"))
    levels = (("n", 3), ("d", 3))
    identified_by = "3 or more sizes x 4 or more budgets, with runs where the N term and where the D term dominates"

    def terms(self, t: Theta, x: Columns) -> list[Term]:
        log_n, log_d = np.log(x["n"]), np.log(x["d"])
        t_a, t_b, p = t["A"] - t["alpha"] * log_n, t["B"] - t["beta"] * log_d, np.exp(t["p"])
        gap = t_a - t_b
        top = np.where(gap.real > 0, t_a, t_b)
        w_a, w_b = np.exp(p * (t_a - top)), np.exp(p * (t_b - top))
        value = top + np.log(w_a + w_b) / p
        q_a, q_b = w_a / (w_a + w_b), w_b / (w_a + w_b)
        entropy = p * (value - q_a * t_a - q_b * t_b)
        bend, turn = p * q_a * q_b, p * q_a * q_b * gap
        one = np.ones_like(log_n)
        sides = {"A": (q_a, one, 1.0), "alpha": (q_a, -log_n, 1.0), "B": (q_b, one, -1.0), "beta": (q_b, -log_d, -1.0)}
        first = {k: q * z for k, (q, z, _) in sides.items()} | {"p": -entropy / p}
        second = {
            (a, b): bend * (sides[a][2] * sides[b][2]) * sides[a][1] * sides[b][1]
            for a, b in itertools.combinations_with_replacement(sides, 2)
        }
        second |= {(k, "p"): turn * (s * z) for k, (_, z, s) in sides.items()}
        second["p", "p"] = entropy / p + turn * gap
        unit = np.ones((len(t.theta), 1))
        return [t.power("E"), t.term(value, first, second, shift={"A": unit, "B": unit})]

    def identified(self, x: Columns, free: frozenset[str], where: str) -> None:
        super().identified(x, free, where)
        apart(x, "n", "d", where)


class DataConstrained(Law):
    """L = E + A/N'^alpha + B/D'^beta: repeated tokens and excess parameters count for less and less.

    D' = U_D + U_D R_D (1 - exp(-(D/U_D - 1)/R_D)) with U_D = min(unique, D); N' likewise from U_N = min(N, the
    compute-optimal N for U_D tokens), which moves with A, B, alpha and beta. Published: R_D 15.387756, R_N 5.309743 at
    log A 6.255414, log B 7.3049974, log E 0.6254804, alpha = beta = 0.3526596 (pass them as `fixed`).
    """

    name = "data-constrained"
    formula = "E + A/N'^alpha + B/D'^beta, D' = U_D (1 + R_D (1 - exp(-(D/U_D - 1)/R_D))), N' likewise with R_N"
    source = "Muennighoff et al. arXiv 2305.16264 eq. 5 to 7"
    columns = ("n", "d", "unique")
    parameters = (
        *Chinchilla.parameters,
        positive("R_D", "epochs", 0.05, 1e4, (1.0, 100.0), "repetitions worth having"),
        positive("R_N", "", 0.05, 1e4, (1.0, 100.0), "excess of parameters worth having"),
    )
    levels = (("n", 3), ("d", 3))
    identified_by = (
        "runs that repeat their data (D > U) at 3 or more epoch counts, some far past 4; R_N: N well above N*(U)"
    )
    published = MappingProxyType(
        {
            "E": float(np.exp(0.6254804)),
            "A": float(np.exp(6.255414)),
            "alpha": 0.3526596,
            "B": float(np.exp(7.3049974)),
            "beta": 0.3526596,
            "R_D": 15.387756,
            "R_N": 5.309743,
        }
    )

    def terms(self, t: Theta, x: Columns) -> list[Term]:
        log_u = np.log(np.minimum(x["unique"], x["d"]))
        alpha, beta = t["alpha"], t["beta"]
        data, d_q, d_qq = _worth(t["R_D"], np.asarray(x["d"]) * np.exp(-log_u) - 1.0)[:3]
        log_data = log_u + data
        unit = np.ones((len(t.theta), 1))
        d_term = t.term(
            t["B"] - beta * log_data,
            {"B": np.ones((1, 1)), "beta": -log_data, "R_D": -beta * d_q},
            {("beta", "R_D"): -d_q, ("R_D", "R_D"): -beta * d_qq},
            shift={"B": unit},
        )
        # lam = log U_N where N exceeds the compute-optimal size for the unique tokens, with its derivatives
        lam, slope, bend = _log_optimal(t["A"], alpha, t["B"], beta, log_u)
        log_n = np.log(x["n"])
        excess = (lam.real < log_n).astype(np.float64)
        base = np.where(excess > 0, lam, log_n)
        r = np.where(excess > 0, np.exp(log_n - base) - 1.0, 0.0)
        gain, f_q, f_qq, h_r, h_rr, h_qr, h_q, total = _worth(t["R_N"], r)
        turn = -(r + 1.0)  # dr / dlam
        f = base + gain
        f_l = (1.0 + h_r * turn / total) * excess
        f_ll = ((h_rr * turn**2 + h_r * (r + 1.0)) / total - (h_r * turn / total) ** 2) * excess
        f_lq = (h_qr * turn / total - h_q * h_r * turn / total**2) * excess
        first = {k: -alpha * f_l * v for k, v in slope.items()}
        first["A"] = first["A"] + 1.0
        first["alpha"] = first["alpha"] - f
        first["R_N"] = -alpha * f_q
        second = {}
        for a, b in itertools.combinations_with_replacement(slope, 2):
            value = -alpha * (f_ll * slope[a] * slope[b] + f_l * bend[a, b])
            for one, other in ((a, b), (b, a)):
                if one == "alpha":
                    value = value - f_l * slope[other]
            second[a, b] = value
        for a in slope:
            second[a, "R_N"] = -alpha * f_lq * slope[a] - (f_q if a == "alpha" else 0.0)
        second["R_N", "R_N"] = -alpha * f_qq
        return [t.power("E"), t.term(t["A"] - alpha * f, first, second, shift={"A": unit}), d_term]

    def identified(self, x: Columns, free: frozenset[str], where: str) -> None:
        if "R_D" in free:
            epochs = np.asarray(x["d"]) / np.asarray(x["unique"])
            repeated = len(np.unique(np.round(np.log(epochs[epochs > 1.05]), 1)))
            if repeated < 2:
                seen = "all runs that repeat their data do so equally often" if repeated else "no run repeats its data"
                raise InputError(
                    f"{where}: {seen}, so R_D (what repetition is worth) is not determined; add runs with tokens d "
                    "of 4, 16 and 40 times their unique tokens, or fit 'chinchilla'"
                )
        if {"alpha", "beta"} & free:
            super().identified(x, free, where)


def _worth(log_r_star: Array, r: Array) -> tuple[Array, ...]:
    """log(1 + h) and its two derivatives in log R*, then h_r, h_rr, h_qr, h_q, 1 + h; h = R*(1 - e^(-r/R*))."""
    star = np.exp(log_r_star)
    e = np.exp(-r / star)
    h = star * -np.expm1(-r / star)
    h_q = h - r * e
    h_qq = h_q - r * r * e / star
    total = 1.0 + h
    return np.log(total), h_q / total, h_qq / total - (h_q / total) ** 2, e, -e / star, e * r / star, h_q, total


def _log_optimal(
    a: Array, alpha: Array, b: Array, beta: Array, log_u: Array
) -> tuple[Array, dict[str, Array], dict[tuple[str, str], Array]]:
    """log of the compute-optimal N for U tokens, (U G)^(beta/alpha) G, with derivatives in (A, alpha, B, beta)."""
    s, k = alpha + beta, beta / alpha
    g = (np.log(alpha) - np.log(beta) + a - b) / s
    g_1 = {"A": 1 / s, "alpha": 1 / (alpha * s) - g / s, "B": -1 / s, "beta": -1 / (beta * s) - g / s}
    both = g / s**2
    zero = np.zeros_like(s)
    g_2 = {
        ("A", "A"): zero,
        ("A", "alpha"): -1 / s**2,
        ("A", "B"): zero,
        ("A", "beta"): -1 / s**2,
        ("alpha", "alpha"): -1 / (alpha**2 * s) - 1 / (alpha * s**2) - g_1["alpha"] / s + both,
        ("alpha", "B"): 1 / s**2,
        ("alpha", "beta"): -1 / (alpha * s**2) - g_1["beta"] / s + both,
        ("B", "B"): zero,
        ("B", "beta"): 1 / s**2,
        ("beta", "beta"): 1 / (beta**2 * s) + 1 / (beta * s**2) - g_1["beta"] / s + both,
    }
    k_1 = {"A": zero, "alpha": -beta / alpha**2, "B": zero, "beta": 1 / alpha}
    k_2 = {("alpha", "alpha"): 2 * beta / alpha**3, ("alpha", "beta"): -1 / alpha**2}
    reach = log_u + g
    slope = {i: k_1[i] * reach + (k + 1) * g_1[i] for i in g_1}
    bend = {
        (i, j): k_2.get((i, j), zero) * reach + k_1[i] * g_1[j] + k_1[j] * g_1[i] + (k + 1) * g_2[i, j] for i, j in g_2
    }
    return k * reach + g, slope, bend


class RoutedExperts(Law):
    """log L = a log N + b log E^ + c log N log E^ + d; 1/E^ = 1/(E - 1 + 1/(1/E_start - 1/E_max)) + 1/E_max.

    Natural logarithms; N: parameters of the dense base model, column `experts`: E, 1 for a dense model.
    """

    name = "routed-experts"
    formula = "exp(a log N + b log E^ + c log N log E^ + d), E^ = E saturating between E_start and E_max"
    source = "Clark et al. arXiv 2202.01169 eq. 1 and 2"
    columns = ("n", "experts")
    parameters = (
        real("a", "", -2.0, 1.0, (-0.3, 0.0)),
        real("b", "", -2.0, 1.0, (-0.5, 0.0)),
        real("c", "", -0.5, 0.5, (0.0, 0.05)),
        Parameter("d", "log nats/token", -60.0, 60.0, (0.0, 5.0), log=False, linear=True),
        positive("E_start", "experts", 1.0, 16.0, (1.0, 3.0), "experts below which nothing is gained"),
        positive("E_max", "experts", 17.0, 1e6, (50.0, 2000.0), "experts beyond which nothing is gained"),
    )
    levels = (("n", 3), ("experts", 5))
    identified_by = (
        "3 or more base sizes, each at 5 or more expert counts from 1 to hundreds (2 with E_start, E_max fixed)"
    )

    def terms(self, t: Theta, x: Columns) -> list[Term]:
        log_n = np.log(x["n"])
        u, v = np.exp(-t["E_start"]), np.exp(-t["E_max"])
        w = u - v
        z = np.asarray(x["experts"]) - 1.0 + 1.0 / w
        z_u, z_uu = -1.0 / w**2, 2.0 / w**3  # z_v = -z_u, z_uv = -z_uu, z_vv = z_uu
        y = 1.0 / z + v
        y_u, y_v = -z_u / z**2, z_u / z**2 + 1.0
        y_uu = -z_uu / z**2 + 2.0 * z_u**2 / z**3  # and y_vv; y_uv = -y_uu
        s = -u * (-y_u / y)
        m = -v * (-y_v / y)
        ss = (-y_uu / y + (y_u / y) ** 2) * u**2 - y_u / y * u
        mm = (-y_uu / y + (y_v / y) ** 2) * v**2 - y_v / y * v
        sm = (y_uu / y + y_u * y_v / y**2) * u * v
        log_e = -np.log(y)
        push = t["b"] + t["c"] * log_n
        value = t["a"] * log_n + push * log_e + t["d"]
        one = np.ones((1, 1))
        first = {"a": log_n, "b": log_e, "c": log_n * log_e, "d": one, "E_start": push * s, "E_max": push * m}
        second = {
            ("b", "E_start"): s,
            ("b", "E_max"): m,
            ("c", "E_start"): log_n * s,
            ("c", "E_max"): log_n * m,
            ("E_start", "E_start"): push * ss,
            ("E_start", "E_max"): push * sm,
            ("E_max", "E_max"): push * mm,
        }
        return [t.term(value, first, second, shift={"d": np.ones((len(t.theta), 1))})]

    def valid(self, x: Columns, where: str) -> None:
        self.require(x, "n", where, np.asarray(x["n"]) > 0, "positive")
        self.require(x, "experts", where, np.asarray(x["experts"]) >= 1, "1 (dense) or more")

    def identified(self, x: Columns, free: frozenset[str], where: str) -> None:
        self.need_levels(x, "n", 3 if "c" in free else 2, where)
        fewer = 5 - ("E_start" not in free) - ("E_max" not in free)
        self.need_levels(x, "experts", fewer, where, "b, c and where the gain saturates")


class Mixture(Law):
    """Loss against the shares h of data domains (columns h_<domain>, summing to 1), N and D.

    Additive: L = E + 1/sum_i C_i h_i^g_i + A/N^alpha + B/D^beta (the best mixture does not depend on scale). Joint: A
    and B are (sum_i A_i h_i)^g_A and (sum_i B_i h_i)^g_B, so it does.
    """

    source = "Shukor et al. arXiv 2507.09404 eq. 3 (additive), eq. 4 (joint)"

    def __init__(self, *domains: str, joint: bool = False, name: str = "") -> None:
        if len(domains) < 2:
            raise InputError(f"a mixture of {len(domains)} domains; name two or more")
        self.domains, self.joint = domains, joint
        self.name = name or ("mixture-joint" if joint else "mixture-additive")
        self.columns = ("n", "d", *(f"h_{k}" for k in domains))
        scale = "A_h/N^alpha + B_h/D^beta, X_h = (sum X_i h_i)^g_X" if joint else "A/N^alpha + B/D^beta"
        self.formula = f"E + 1/sum C_i h_i^g_i + {scale}; i in {', '.join(domains)}"
        parameters: list[Parameter] = [coefficient("E", meaning="irreducible loss")]
        for k in domains:
            parameters.append(positive(f"C_{k}", "tokens/nat", 1e-9, 1e9, (0.2, 5.0), f"what {k} data is worth"))
            parameters.append(real(f"g_{k}", "", -3.0, 3.0, (0.05, 1.0)))
        for factor, power in (("A", "alpha"), ("B", "beta")):
            if joint:
                parameters += [
                    positive(f"{factor}_{k}", "(nats/token)^(1/g)", 1e-30, 1e65, (0.3, 3.0)) for k in domains
                ]
                parameters.append(real(f"g_{factor}", "", -5.0, 5.0, (-1.2, 1.2)))
            else:
                parameters.append(coefficient(factor))
            parameters.append(exponent(power))
        self.parameters = tuple(parameters)
        self.levels = (("n", 3), ("d", 3))
        self.fewest = 3 * len(domains) + 1
        self.identified_by = f"{self.fewest} or more mixtures, 3 or more sizes and token budgets"

    def terms(self, t: Theta, x: Columns) -> list[Term]:
        shares = [np.maximum(x[f"h_{k}"], LEAST_SHARE) for k in self.domains]
        out = [t.power("E"), self._value(t, [np.log(h) for h in shares])]
        for factor, power, column in (("A", "alpha", "n"), ("B", "beta", "d")):
            log_x = np.log(x[column])
            out.append(
                self._scale(t, factor, power, shares, log_x) if self.joint else t.power(factor, **{power: -log_x})
            )
        return out

    def _value(self, t: Theta, log_h: list[Array]) -> Term:
        logs = [t[f"C_{k}"] + t[f"g_{k}"] * z for k, z in zip(self.domains, log_h, strict=True)]
        total, q = _softmax(logs)
        first, second = {}, {}
        for i, (k, z) in enumerate(zip(self.domains, log_h, strict=True)):
            first[f"C_{k}"], first[f"g_{k}"] = -q[i], -q[i] * z
            for j in range(i, len(self.domains)):
                bend = -q[i] * (1.0 - q[i]) if i == j else q[i] * q[j]
                other, z_j = self.domains[j], log_h[j]
                second[f"C_{k}", f"C_{other}"] = bend
                second[f"C_{k}", f"g_{other}"] = bend * z_j
                second[f"g_{k}", f"g_{other}"] = bend * z * z_j
                if i != j:
                    second[f"g_{k}", f"C_{other}"] = bend * z
        unit = -np.ones((len(t.theta), 1))
        return t.term(-total, first, second, shift={f"C_{k}": unit for k in self.domains})

    def _scale(self, t: Theta, factor: str, power: str, shares: list[Array], log_x: Array) -> Term:
        names = [f"{factor}_{k}" for k in self.domains]
        total, q = _softmax([t[n] + np.log(h) for n, h in zip(names, shares, strict=True)])
        g = t[f"g_{factor}"]
        first = {f"g_{factor}": total, power: -log_x} | {n: g * q[i] for i, n in enumerate(names)}
        second = {(f"g_{factor}", n): q[i] for i, n in enumerate(names)}
        for i, j in itertools.combinations_with_replacement(range(len(names)), 2):
            second[names[i], names[j]] = g * ((q[i] if i == j else 0.0) - q[i] * q[j])
        shift = 1.0 / np.where(np.abs(g) < 0.1, np.where(g.real < 0, -0.1, 0.1), g)
        return t.term(g * total - t[power] * log_x, first, second, shift=dict.fromkeys(names, shift))

    def valid(self, x: Columns, where: str) -> None:
        for name in ("n", "d"):
            self.require(x, name, where, np.asarray(x[name]) > 0, "positive")
        total = np.sum([np.asarray(x[f"h_{k}"], dtype=np.float64) for k in self.domains], axis=0)
        for k in self.domains:
            h = np.asarray(x[f"h_{k}"])
            self.require(x, f"h_{k}", where, (h >= 0) & (h <= 1), "a share in [0, 1]")
        bad = np.flatnonzero(np.abs(total - 1.0) > 5e-3)
        if len(bad):
            raise InputError(
                f"{where}: the shares {', '.join(f'h_{k}' for k in self.domains)} of row {bad[0]} sum to "
                f"{total[bad[0]]:.4g}, not 1; give every domain's share"
            )

    def identified(self, x: Columns, free: frozenset[str], where: str) -> None:
        super().identified(x, free, where)
        shares = np.stack([np.asarray(x[f"h_{k}"]) for k in self.domains], axis=1)
        have = len(np.unique(np.round(shares, 3), axis=0))
        if have < self.fewest:
            raise InputError(
                f"{where}: {have} mixtures of {len(self.domains)} domains cannot determine {self.formula}; "
                f"add runs at {self.fewest - have} or more other mixtures, spread over the simplex"
            )
        apart(x, "n", "d", where)


def _softmax(logs: list[Array]) -> tuple[Array, list[Array]]:
    """(log sum of exp, shares) of arrays that broadcast together."""
    top = np.max([v.real for v in np.broadcast_arrays(*logs)], axis=0)
    parts = [np.exp(v - top) for v in logs]
    total = sum(parts[1:], parts[0])
    return top + np.log(total), [p / total for p in parts]
