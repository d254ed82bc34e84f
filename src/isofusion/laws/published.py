"""Scaling laws from papers, as data with provenance: look-up by name, prediction, and how values were back-solved.

The rows themselves are in `papers/` (numbers as printed, with table or equation); this file says what a row is
and what can be computed from it. A value that no paper prints is in `Published.derived` with the way it was found.
Units: N parameters, D tokens, C FLOPs, loss nats/token. No NumPy at import, so that listing laws is instant.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

from isofusion.errors import InputError

Kind = Literal["chinchilla", "frontier", "repetition", "over-training", "sparsity", "routed", "mixture"]
Range = tuple[float, float]

FORMULAS: dict[str, str] = {
    "chinchilla": "L = E + A/N^alpha + B/D^beta",
    "frontier": "L = k C^c (through the lower envelope, no N or D)",
    "repetition": "L = E + A/N'^alpha + B/D'^beta with D' = U + U R_D (1 - exp(-(D/U - 1)/R_D)), N' alike with R_N",
    "over-training": "L = E + (a M^eta + b M^-eta) C^-eta with M = D/N",
    "sparsity": "L = E + A/N^alpha + B/D^beta + C/(1-S)^lambda + d/((1-S)^delta N^gamma)",
    "routed": "log10 L = a log10 N + b log10 Eh + c log10 N log10 Eh + d, "
    "1/Eh = 1/(X - 1 + 1/(1/E_start - 1/E_max)) + 1/E_max, X experts",
    "mixture": "L = E + 1/sum_i C_i h_i^gamma_i + A/N^alpha + B/D^beta (additive); A, B depend on h (joint)",
}
NEEDS: dict[str, tuple[str, ...]] = {
    "chinchilla": ("n", "d"),
    "frontier": ("c",),
    "repetition": ("n", "d", "u"),
    "over-training": ("n", "d"),
    "sparsity": ("n", "d", "s"),
    "routed": ("n", "x"),
    "mixture": (),
}
"""What `predict` takes: n parameters, d tokens, c FLOPs, u unique tokens, s sparsity in [0, 1), x experts."""


@dataclass(frozen=True)
class Published:
    """One law of one paper. `params` are its coefficients by the names of `FORMULAS[kind]`."""

    name: str
    what: str  # one line
    kind: Kind
    params: Mapping[str, float]
    loss: str  # the loss it predicts: which data, which average
    counts: str  # what N (and D) count
    source: str  # the paper
    where: str  # table, figure or equation
    rests_on: str  # runs behind it
    n_range: Range | None = None  # parameters of the runs behind it
    d_range: Range | None = None
    c_range: Range | None = None
    derived: Mapping[str, str] = field(default_factory=dict)  # parameter -> how it was back-solved; not in the paper
    errors: Mapping[str, float] = field(default_factory=dict)  # published standard errors
    errors_note: str = ""
    covariance: tuple[tuple[float, ...], ...] | None = None  # of (log E, log A, alpha, log B, beta)
    printed: Mapping[str, float] = field(default_factory=dict)  # other numbers the paper prints for this row
    caveats: tuple[str, ...] = ()
    checked: str = ""  # against what the numbers were checked
    fusion: Literal["early", "late", "experts", "text"] = "text"

    @property
    def formula(self) -> str:
        return FORMULAS[self.kind]

    @property
    def plannable(self) -> bool:
        """Whether N and D follow from a budget."""
        return self.kind in ("chinchilla", "over-training", "repetition") and bool(self.params)

    def predict(self, **at: float) -> float:
        """Loss in nats/token at the point, e.g. n=1e9, d=2e10 (see `NEEDS`). Raises InputError for a missing one."""
        return predict(self, at)

    def chinchilla(self) -> dict[str, float]:
        """E, A, alpha, B, beta where the law has that form (over-training: alpha = beta = 2 eta), else InputError."""
        if self.kind == "over-training":
            p = self.params  # (a M^eta + b M^-eta) (6 N D)^-eta = 6^-eta (a N^-2eta + b D^-2eta)
            scale = 6.0 ** -p["eta"]
            both = 2.0 * p["eta"]
            return {"E": p["E"], "A": p["a"] * scale, "alpha": both, "B": p["b"] * scale, "beta": both}
        if self.kind in ("chinchilla", "repetition"):
            return {k: self.params[k] for k in ("E", "A", "alpha", "B", "beta")}
        raise InputError(f"{self.name}: {self.formula} has no E, A, alpha, B, beta; {_plan_hint(self)}")

    def form(self) -> tuple[str, dict[str, float]]:
        """(name in `isofusion.laws.forms.FORMS`, parameters as that form names them), e.g. for `fixed` of a fit.

        Raises InputError for a law without published coefficients.
        """
        if not self.params:
            raise InputError(f"{self.name}: {_plan_hint(self)}")
        p = dict(self.params)
        if self.kind == "sparsity":
            p["lam"] = p.pop("lambda")
        if self.kind == "routed":  # printed for logarithms to base 10, the form's are natural
            p["c"], p["d"] = p["c"] / math.log(10.0), p["d"] * math.log(10.0)
        return _FORMS[self.kind], p

    def readings(self) -> list[dict[str, float]]:
        """E, A, alpha, B, beta at both ends of READ, where A and B rest on a D/N read off a figure; else empty."""
        if "A" not in self.derived:
            return []
        p, late = self.params, self.fusion == "late"
        out = []
        for ratio in READ:
            power = self.printed["k"], self.printed["c"]
            A, B = back_solve(p["E"], p["alpha"], p["beta"], *power, tokens_per_parameter=ratio, late=late)
            out.append({**p, "A": A, "B": B})
        return out

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain data for JSON."""
        out = {k: v for k, v in self.__dict__.items() if k != "covariance"}
        out |= {"formula": self.formula, "plannable": self.plannable}
        out |= {k: dict(out[k]) for k in ("params", "derived", "errors", "printed")}
        out |= {k: list(v) if (v := out[k]) else None for k in ("n_range", "d_range", "c_range")}
        return out | {"caveats": list(self.caveats), "has_covariance": self.covariance is not None}


def _plan_hint(law: Published) -> str:
    return {
        "frontier": "it gives the loss at a compute, not N or D",
        "sparsity": "C needs the active parameters, which N and the sparsity alone do not give; it only predicts",
        "routed": "it was fitted at one token budget, so D cannot be chosen; it only predicts",
        "mixture": "its coefficients are not published in what could be read; fit your own (isofusion plan --mixtures)",
    }.get(law.kind, "it only predicts")


def predict(law: Published, at: Mapping[str, float]) -> float:
    """Loss of a published law at a point; the keys of `at` are those of NEEDS[law.kind]."""
    if not law.params:
        raise InputError(f"{law.name}: {_plan_hint(law)}")
    needs = NEEDS[law.kind]
    missing, unknown = [k for k in needs if k not in at], [k for k in at if k not in needs]
    if missing or unknown:
        example = ",".join(f"{k}={_EXAMPLE[k]}" for k in needs)
        wrong = f"needs {', '.join(missing)}" if missing else f"has no {', '.join(unknown)}"
        raise InputError(f"{law.name}: the law {wrong}; give {example}")
    for key, value in at.items():
        low, high = (0.0, 1.0) if key == "s" else (0.0, math.inf)
        if not (math.isfinite(value) and low <= value < high and (value > 0 or key == "s")):
            raise InputError(f"{law.name}: {key} = {value:g}; give e.g. {key}={_EXAMPLE[key]}")
    return _PREDICT[law.kind](law.params, at)


_FORMS = {
    "chinchilla": "chinchilla",
    "frontier": "power",
    "repetition": "data-constrained",
    "over-training": "over-training",
    "sparsity": "sparsity",
    "routed": "routed-experts",
}
_EXAMPLE = {"n": "1e9", "d": "2e10", "c": "1e21", "u": "1e10", "s": "0.875", "x": "8"}


def _sparse(p: Mapping[str, float], at: Mapping[str, float]) -> float:
    active = 1.0 - at["s"]
    return float(
        p["E"]
        + p["A"] * at["n"] ** -p["alpha"]
        + p["B"] * at["d"] ** -p["beta"]
        + p["C"] * active ** -p["lambda"]
        + p["d"] * active ** -p["delta"] * at["n"] ** -p["gamma"]
    )


def _routed(p: Mapping[str, float], at: Mapping[str, float]) -> float:
    start = 1.0 / (1.0 / p["E_start"] - 1.0 / p["E_max"])
    experts = math.log10(1.0 / (1.0 / (at["x"] - 1.0 + start) + 1.0 / p["E_max"]))
    n = math.log10(at["n"])
    return float(10.0 ** (p["a"] * n + p["b"] * experts + p["c"] * n * experts + p["d"]))


def _over_training(p: Mapping[str, float], at: Mapping[str, float]) -> float:
    m, c = at["d"] / at["n"], 6.0 * at["n"] * at["d"]
    return float(p["E"] + (p["a"] * m ** p["eta"] + p["b"] * m ** -p["eta"]) * c ** -p["eta"])


def _chinchilla(p: Mapping[str, float], at: Mapping[str, float]) -> float:
    return float(p["E"] + p["A"] * at["n"] ** -p["alpha"] + p["B"] * at["d"] ** -p["beta"])


def _repetition(p: Mapping[str, float], at: Mapping[str, float]) -> float:
    n, d = effective(p, at["n"], at["d"], at["u"])
    return _chinchilla(p, {"n": n, "d": d})


_PREDICT = {
    "chinchilla": _chinchilla,
    "frontier": lambda p, at: float(p["k"] * at["c"] ** p["c"]),
    "repetition": _repetition,
    "over-training": _over_training,
    "sparsity": _sparse,
    "routed": _routed,
}


def optimal_for_unique(p: Mapping[str, float], u: float) -> float:
    """Muennighoff's U_N: the parameters that are compute-optimal for u unique tokens under E, A, alpha, B, beta."""
    return float((p["alpha"] * p["A"] / (p["beta"] * p["B"]) * u ** p["beta"]) ** (1.0 / p["alpha"]))


def effective(p: Mapping[str, float], n: float, d: float, u: float) -> tuple[float, float]:
    """Effective parameters and tokens (N', D') for d tokens, u of them unique (2305.16264 eq. 5, 6 and App. A)."""
    unique = min(d, u)
    d_eff = unique + unique * p["R_D"] * -math.expm1(-(d / unique - 1.0) / p["R_D"])
    base = min(n, optimal_for_unique(p, unique))
    n_eff = base + base * p["R_N"] * -math.expm1(-(n / base - 1.0) / p["R_N"])
    return n_eff, d_eff


def back_solve(
    E: float, alpha: float, beta: float, k: float, c: float, *, tokens_per_parameter: float, late: bool = False
) -> tuple[float, float]:
    """A and B of a law whose paper prints E, alpha, beta and L = k C^c but not A and B.

    Two conditions: at REFERENCE FLOPs the compute-optimal D/N is `tokens_per_parameter`, and the compute-optimal loss
    follows k C^c in least squares over BAND (41 budgets, log-spaced). Late fusion uses its own cost (`late_cost`).
    """
    from isofusion.laws.family import late_slope, per_token

    # the reference point: N with k(N) D = REFERENCE at the given D/N
    low, high = math.log(1e6), math.log(1e12)
    for _ in range(80):
        mid = 0.5 * (low + high)
        n = math.exp(mid)
        over = per_token(n, late) * tokens_per_parameter * n > REFERENCE
        low, high = (low, mid) if over else (mid, high)
    n = math.exp(0.5 * (low + high))
    d = tokens_per_parameter * n
    # stationarity there: alpha A N^-alpha = s beta B D^-beta with s = d log k / d log N; scale fixed by A := 1
    b = alpha * n**-alpha / (late_slope(n, late) * beta * d**-beta)
    top = bottom = 0.0
    for i in range(41):
        budget = BAND[0] * (BAND[1] / BAND[0]) ** (i / 40)
        low, high = math.log(1e6), math.log(1e13)
        for _ in range(80):  # the N that is optimal at this budget does not depend on the common scale of A and B
            mid = 0.5 * (low + high)
            x = math.exp(mid)
            tokens = budget / per_token(x, late)
            rising = late_slope(x, late) * beta * b * tokens**-beta > alpha * x**-alpha
            low, high = (low, mid) if rising else (mid, high)
        x = math.exp(0.5 * (low + high))
        unit = x**-alpha + b * (budget / per_token(x, late)) ** -beta
        top += unit * (k * budget**c - E)
        bottom += unit * unit
    scale = top / bottom
    return scale, scale * b


REFERENCE = 1e21  # FLOPs where D/N is read off the figures
BAND = (1e20, 1e22)  # FLOPs over which the printed k C^c is followed
READ = (40.0, 63.0)  # tokens per parameter that the ticks of the study's Fig. 1 and 22 allow


@cache
def laws() -> dict[str, Published]:
    """Every published law by name, in the order of `isofusion laws`."""
    from isofusion.laws.papers.multimodal import collect

    return {law.name: law for law in collect()}


def published(name: str) -> Published:
    """The law of this name. Raises InputError with the nearest names."""
    known = laws()
    if name in known:
        return known[name]
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    inside = [law for law in known if name and name.lower() in law.lower()][:5]
    hint = ", ".join(dict.fromkeys(inside + close)) or "chinchilla/refit"
    raise InputError(f"no published law '{name}'; did you mean {hint}? `isofusion laws` lists all {len(known)}")
