"""The laws of the literature that are sums of powers, each a small class: formula, source, parameters, what it takes.

Columns everywhere: n parameters, d tokens, c FLOPs, sparsity S = inactive experts / all experts. Units: losses and
their terms in nats/token; exponents have none. Laws whose terms bend otherwise: bends.py.
"""

from __future__ import annotations

import numpy as np

from isofusion.errors import InputError
from isofusion.laws.catalogue.law import Columns, Law, Parameter, Term, Theta, coefficient, exponent, real


class Chinchilla(Law):
    """L(N, D) = E + A/N^alpha + B/D^beta."""

    name = "chinchilla"
    formula = "E + A/N^alpha + B/D^beta"
    source = "Hoffmann et al. arXiv 2203.15556 eq. 2; arXiv 2504.07951 eq. 1"
    columns = ("n", "d")
    parameters = (
        coefficient("E", meaning="irreducible loss"),
        coefficient("A"),
        exponent("alpha"),
        coefficient("B"),
        exponent("beta"),
    )
    levels = (("n", 3), ("d", 3))
    identified_by = "3 or more model sizes, each at 3 or more token budgets, tokens not in proportion to parameters"

    def terms(self, t: Theta, x: Columns) -> list[Term]:
        return [t.power("E"), t.power("A", alpha=-np.log(x["n"])), t.power("B", beta=-np.log(x["d"]))]

    def identified(self, x: Columns, free: frozenset[str], where: str) -> None:
        for name, column, pinned in (("n", "A", "alpha"), ("d", "B", "beta")):
            # with the exponent or the floor given, two levels do
            if {column, pinned} & free:
                fewer = (pinned not in free) + (column not in free) + ("E" not in free)
                self.need_levels(x, name, max(2, 3 - fewer), where, f"the {name.upper()} term of {self.formula}")
        if {"alpha", "beta"} <= free:
            apart(x, "n", "d", where)


class Tied(Law):
    """L = E + A/N^alpha + B/D^alpha: one exponent for both, so N* and D* keep their ratio at any compute."""

    name = "tied"
    formula = "E + A/N^alpha + B/D^alpha"
    source = "Hoffmann et al. eq. 2 with alpha = beta; the N* ~ C^0.5 that their approaches 1 and 2 find"
    columns = ("n", "d")
    parameters = (
        coefficient("E", meaning="irreducible loss"),
        coefficient("A"),
        exponent("alpha"),
        coefficient("B"),
    )
    levels = (("n", 2), ("d", 2))
    identified_by = "2 or more model sizes and 2 or more token budgets, tokens not in proportion to parameters"

    def terms(self, t: Theta, x: Columns) -> list[Term]:
        return [t.power("E"), t.power("A", alpha=-np.log(x["n"])), t.power("B", alpha=-np.log(x["d"]))]

    def identified(self, x: Columns, free: frozenset[str], where: str) -> None:
        super().identified(x, free, where)
        if {"A", "B"} <= free:
            apart(x, "n", "d", where)


class Terms(Law):
    """E plus one power of each of the given columns: L = E + sum_k A_k / x_k^alpha_k (width, depth, N, D, ...)."""

    source = "the k-term form of Hoffmann et al. eq. 2"

    def __init__(self, *columns: str, name: str = "") -> None:
        if not columns or len(set(columns)) != len(columns):
            raise InputError(f"terms over {columns}: name one or more different columns")
        self.columns = columns
        self.name = name or "terms-" + "-".join(columns)
        self.formula = " + ".join(["E", *(f"A_{c}/{c}^alpha_{c}" for c in columns)])
        parameters: list[Parameter] = [coefficient("E", meaning="irreducible loss")]
        for c in columns:
            parameters += [coefficient(f"A_{c}"), exponent(f"alpha_{c}")]
        self.parameters = tuple(parameters)
        self.levels = tuple((c, 3) for c in columns)
        self.identified_by = "3 or more values of each column, no two columns in proportion"

    def terms(self, t: Theta, x: Columns) -> list[Term]:
        return [t.power("E"), *(t.power(f"A_{c}", **{f"alpha_{c}": -np.log(x[c])}) for c in self.columns)]

    def identified(self, x: Columns, free: frozenset[str], where: str) -> None:
        super().identified(x, free, where)
        for i, first in enumerate(self.columns):
            for second in self.columns[i + 1 :]:
                apart(x, first, second, where)


class Power(Law):
    """L(C) = k C^c, no asymptote; the exponent is negative where compute helps."""

    name = "power"
    formula = "k C^c"
    source = "Kaplan et al. arXiv 2001.08361; through the lower envelope in arXiv 2504.07951 App. C.3"
    columns = ("c",)
    parameters = (coefficient("k", "nats/token at 1 FLOP"), real("c", "", -3.0, 0.5, (-1.2, -0.01)))
    levels = (("c", 2),)
    identified_by = "2 or more compute budgets on the lower envelope"

    def terms(self, t: Theta, x: Columns) -> list[Term]:
        return [t.power("k", c=np.log(x["c"]))]


class PowerFloor(Law):
    """L(C) = E + k C^c."""

    name = "power-floor"
    formula = "E + k C^c"
    source = "Henighan et al. arXiv 2010.14701 eq. 1.1; arXiv 2504.07951 App. C.3 with an asymptote"
    columns = ("c",)
    parameters = (
        coefficient("E", meaning="irreducible loss"),
        coefficient("k", "nats/token at 1 FLOP"),
        real("c", "", -3.0, -0.005, (-1.2, -0.02)),
    )
    levels = (("c", 3),)
    identified_by = "3 or more compute budgets on the lower envelope"

    def terms(self, t: Theta, x: Columns) -> list[Term]:
        return [t.power("E"), t.power("k", c=np.log(x["c"]))]


class Sparsity(Law):
    """L(N, D, S) = A/N^alpha + B/D^beta + C/(1-S)^lam + d/((1-S)^delta N^gamma) + E.

    arXiv 2504.07951 counts active parameters as N, Abnar et al. all of them: `n_column` says which column is meant.
    """

    source = "Abnar et al. arXiv 2501.12370 (all parameters); arXiv 2504.07951 App. C.7, Table 12 (active parameters)"
    formula = "A/N^alpha + B/D^beta + C/(1-S)^lam + d/((1-S)^delta N^gamma) + E"
    parameters = (
        coefficient("E", meaning="irreducible loss"),
        coefficient("A"),
        exponent("alpha"),
        coefficient("B"),
        exponent("beta"),
        coefficient("C"),
        # Abnar et al. fitted lam = -0.1666: the term may fall with sparsity
        real("lam", "", -2.0, 2.0, (-0.6, 0.6)),
        coefficient("d"),
        real("delta", "", -2.0, 2.0, (-0.6, 0.6)),
        exponent("gamma"),
    )
    identified_by = "3 or more sparsities, each at 3 or more sizes and token budgets"

    def __init__(self, n_column: str = "n", name: str = "sparsity") -> None:
        self.n_column, self.name = n_column, name
        self.columns = (n_column, "d", "sparsity")
        self.levels = ((n_column, 3), ("d", 3))

    def terms(self, t: Theta, x: Columns) -> list[Term]:
        log_n, dense = np.log(x[self.n_column]), np.log1p(-x["sparsity"])
        return [
            t.power("E"),
            t.power("A", alpha=-log_n),
            t.power("B", beta=-np.log(x["d"])),
            t.power("C", lam=-dense),
            t.power("d", delta=-dense, gamma=-log_n),
        ]

    def valid(self, x: Columns, where: str) -> None:
        for name in (self.n_column, "d"):
            self.require(x, name, where, np.asarray(x[name]) > 0, "positive")
        s = np.asarray(x["sparsity"])
        self.require(x, "sparsity", where, (s >= 0) & (s < 1), "in [0, 1), the share of inactive experts,")

    def identified(self, x: Columns, free: frozenset[str], where: str) -> None:
        super().identified(x, free, where)
        if not {"C", "lam", "d", "delta"} & free:
            return
        levels = np.unique(np.round(x["sparsity"], 6))
        sizes = len(np.unique(np.round(np.log(x[self.n_column]), 2)))
        if len(levels) < 3:
            others = [s for s in (0.0, 0.5, 0.75, 0.875, 0.9375) if not np.isclose(levels, s, atol=0.02).any()]
            seen = ", ".join(f"{s:g}" for s in levels)
            raise InputError(
                f"{where}: the sparsity-aware law cannot be fitted at {len(levels)} sparsit"
                f"{'y' if len(levels) == 1 else 'ies'} (S = {seen}): C/(1-S)^lam cannot be told from E, nor "
                f"d/((1-S)^delta N^gamma) from A/N^alpha. Add runs at {3 - len(levels)} or more other sparsities "
                f"(for instance S = {', '.join(f'{s:g}' for s in others[: 3 - len(levels) + 1])}) at the same "
                f"{sizes} sizes, or fit 'chinchilla' at each sparsity"
            )


class OverTraining(Law):
    """L(C, M) = E + (a M^eta + b M^-eta) C^-eta with M = D/N tokens per parameter; columns c, n, d."""

    name = "over-training"
    formula = "E + (a M^eta + b M^-eta) C^-eta, M = D/N"
    source = "Gadre et al. arXiv 2403.08540 eq. 4"
    columns = ("c", "n", "d")
    parameters = (
        coefficient("E", meaning="irreducible loss"),
        coefficient("a"),
        coefficient("b"),
        exponent("eta", 0.005, 1.5, (0.02, 0.8)),
    )
    levels = (("c", 2),)
    identified_by = "3 or more tokens-per-parameter ratios and 2 or more compute budgets"

    def terms(self, t: Theta, x: Columns) -> list[Term]:
        log_c, log_m = np.log(x["c"]), np.log(x["d"] / x["n"])
        return [t.power("E"), t.power("a", eta=log_m - log_c), t.power("b", eta=-log_m - log_c)]

    def identified(self, x: Columns, free: frozenset[str], where: str) -> None:
        super().identified(x, free, where)
        ratio = {**x, "D/N": np.asarray(x["d"]) / np.asarray(x["n"])}
        self.need_levels(ratio, "D/N", 2, where, "a and b apart")


class ErrorFromLoss(Law):
    """Err(L) = eps - k exp(-g L): downstream error from validation loss; column `loss`, target `error` (0 to 1)."""

    name = "error-from-loss"
    formula = "eps - k exp(-g L)"
    source = "Gadre et al. arXiv 2403.08540 eq. 5"
    columns = ("loss",)
    target = "error"
    parameters = (
        coefficient("eps", "error", "error of a model that knows nothing"),
        coefficient("k", "error"),
        exponent("g", 0.02, 20.0, (0.1, 5.0), "per nat/token"),
    )
    levels = (("loss", 3),)
    identified_by = "3 or more losses over a range in which the error moves"

    def terms(self, t: Theta, x: Columns) -> list[Term]:
        return [t.power("eps"), t.power("k", sign=-1.0, g=-np.asarray(x["loss"]))]


class TwoModalities(Law):
    """L = U - C + A/N^alpha + B/(D_1 + D_2)^beta: what training two modalities together adds to or takes from U.

    U (column `unimodal`) is the mean of the two single-modality laws at this N and D_1, D_2, fitted before. The
    synergy C is bought by competition for parameters and tokens: A/N^alpha + B/(D_1+D_2)^beta = C breaks even.
    """

    name = "two-modalities"
    formula = "U - C + A/N^alpha + B/(D_1+D_2)^beta, U = (L_1(N,D_1) + L_2(N,D_2))/2"
    source = "Aghajanyan et al. arXiv 2301.03728 eq. 3"
    columns = ("unimodal", "n", "d_1", "d_2")
    parameters = (
        coefficient("C", meaning="synergy"),
        coefficient("A"),
        exponent("alpha"),
        coefficient("B"),
        exponent("beta"),
    )
    levels = (("n", 3),)
    identified_by = (
        "3 or more sizes and 3 or more token budgets of both modalities together, and the single-modality fits"
    )

    def terms(self, t: Theta, x: Columns) -> list[Term]:
        base = np.zeros_like(t["C"]) + np.log(x["unimodal"])
        both = np.log(x["d_1"] + x["d_2"])
        return [
            Term(base, {}),
            t.power("C", sign=-1.0),
            t.power("A", alpha=-np.log(x["n"])),
            t.power("B", beta=-both),
        ]

    def identified(self, x: Columns, free: frozenset[str], where: str) -> None:
        super().identified(x, free, where)
        total = {**x, "d_1 + d_2": np.asarray(x["d_1"]) + np.asarray(x["d_2"])}
        self.need_levels(total, "d_1 + d_2", 3, where, "B/(D_1+D_2)^beta")
        apart(total, "n", "d_1 + d_2", where)


def apart(x: Columns, first: str, second: str, where: str) -> None:
    """Raise InputError where one column follows another exactly, so that their terms cannot be told apart."""
    a, b = np.log(x[first]), np.log(x[second])
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return
    if abs(float(np.corrcoef(a, b)[0, 1])) > 0.9999:
        slope = float(np.polyfit(a, b, 1)[0])
        raise InputError(
            f"{where}: '{second}' follows '{first}' exactly ({second} ~ {first}^{slope:.2f}), so their terms cannot be "
            f"told apart; add runs at two or more values of '{second}' at the smallest and at the largest '{first}'"
        )
