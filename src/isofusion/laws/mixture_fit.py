"""Mixture laws from a table of runs: one law per target loss, the best shares, and how far the runs pin them down.

The laws and the search on the simplex are in `mixture.py`, the fit is `fit_form` (Huber loss of log residuals, delta
1e-3, as in Shukor et al. 2507.09404). Too few different mixtures are refused. Units: N parameters, D tokens, loss
nats/token. Legend: m runs, k domains, S draws.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from isofusion.errors import InputError
from isofusion.laws.mixture import Array, BestMixture, Kind, MixtureLaw, optimal_mixture
from isofusion.laws.warn import beyond, extrapolates

DRAWS = 100
STARTS = 128  # projected starts of a fit
LEVEL = 0.95


@dataclass(frozen=True)
class MixtureFit:
    """A fitted mixture law. `fit`: the FormFit behind it, with convergence, errors and warnings."""

    law: MixtureLaw
    fit: Any
    domains: tuple[str, ...]
    mre: float  # mean |predicted - observed| / observed on the fitted runs

    def to_dict(self) -> dict[str, Any]:
        return {"mre": self.mre, **self.fit.to_dict()}


def least_mixtures(k: int) -> int:
    """Different mixtures that a fit over k domains takes: 3k + 1 (2507.09404: about 10 for 3, about 20 for 6 to 8)."""
    return 3 * k + 1


def count_mixtures(h: Array) -> int:
    """Different rows of h [m, k], to three decimals."""
    return len(np.unique(np.round(h, 3), axis=0))


def fit_mixture(
    n: Array,
    d: Array,
    h: Array,
    loss: Array,
    *,
    kind: Kind = "additive",
    domains: Sequence[str] | None = None,
    label: str = "runs",
    starts: int = STARTS,
) -> MixtureFit:
    """Fit one target domain's law to losses [m] of runs at n, d [m] with shares h [m, k]; `starts` of the solver.

    Raises InputError below the least number of different mixtures, of runs, of sizes or of token counts, and for shares
    that do not sum to 1.
    """
    from isofusion.laws.catalogue.bends import Mixture
    from isofusion.laws.formfit import fit_form

    if kind not in ("additive", "joint"):
        raise InputError(f"--form {kind}: choose additive or joint")
    n, d, loss = (np.asarray(v, dtype=np.float64) for v in (n, d, loss))
    h = np.atleast_2d(np.asarray(h, dtype=np.float64))
    if not (len(n) == len(d) == len(loss) == len(h)):
        raise InputError(f"{label}: n, d, loss and h have {len(n)}, {len(d)}, {len(loss)} and {len(h)} rows")
    k = h.shape[1]
    names = tuple(domains or (f"domain{i + 1}" for i in range(k)))
    have, least = count_mixtures(h), least_mixtures(k)
    if have < least:
        raise InputError(
            f"{label}: {have} different mixtures of {k} domains cannot determine the {kind} law; at least {least} are "
            f"needed (arXiv 2507.09404: about 10 for 3 domains, about 20 for 6 to 8). Add {least - have} or more, "
            "spread over the simplex and trained at more than one size and token count"
        )
    columns = {"n": n, "d": d, "loss": loss} | {f"h_{name}": h[:, i] for i, name in enumerate(names)}
    fit = fit_form(columns, Mixture(*names, joint=kind == "joint"), label=label, starts=starts)
    law = MixtureLaw.of(fit.params, names)
    return MixtureFit(law, fit, names, float(np.mean(np.abs(law.predict(n, d, h) / loss - 1.0))))


@dataclass(frozen=True)
class MixtureTable:
    """Runs on several mixtures: shares [m, k] of the training domains and one or more target losses [m]."""

    where: str
    domains: tuple[str, ...]
    n: Array
    d: Array
    shares: Array
    losses: dict[str, Array]

    @property
    def rows(self) -> int:
        return len(self.n)

    @property
    def mixtures(self) -> int:
        return count_mixtures(self.shares)

    def fit(self, target: str, kind: Kind = "additive") -> MixtureFit:
        """The law of one of the losses. Raises InputError naming the file where the runs are too few."""
        where = f"{self.where}, loss {target}"
        args = self.n, self.d, self.shares, self.losses[target]
        return fit_mixture(*args, kind=kind, domains=self.domains, label=where)

    def warnings(self, shares: Array, n: float, d: float) -> list[str]:
        """What lies outside the table: shares beyond those tried, N or D more than a decade away."""
        out = []
        low, high = self.shares.min(axis=0), self.shares.max(axis=0)
        for i, name in enumerate(self.domains):
            if not low[i] - 1e-3 <= shares[i] <= high[i] + 1e-3:
                tried = f"{low[i]:.3f} to {high[i]:.3f}"
                out.append(f"share of {name} {shares[i]:.3f} is outside the mixtures tried ({tried})")
        for name, value, seen in (("N", n, self.n), ("D", d, self.d)):
            far, side = beyond(value, seen)
            if extrapolates(far):
                out.append(f"{name} = {value:.3g} is {far:.1f} decades {side} the runs")
        return out

    def share_draws(self, fits: Sequence[MixtureFit], best: BestMixture, draws: int = DRAWS, seed: int = 0) -> Array:
        """Best shares [S, k] with whole mixtures resampled: runs of one mixture share its luck and its misfit.

        Draws that keep fewer than three quarters of the least number of mixtures are drawn again.
        """
        rng = np.random.Generator(np.random.Philox(key=seed))
        _, member = np.unique(np.round(self.shares, 3), axis=0, return_inverse=True)
        member = member.ravel()
        q = self.mixtures
        fewest = min(0.75 * least_mixtures(len(self.domains)), 0.6 * q)
        weights = np.empty((draws, len(member)))
        for s in range(draws):
            counts = np.zeros(q)
            while np.count_nonzero(counts) < fewest:
                counts = np.bincount(rng.integers(0, q, q), minlength=q).astype(np.float64)
            weights[s] = counts[member]
        refits = [fit.fit.refit(weights=weights)[0] for fit in fits]
        out = np.empty((draws, len(self.domains)))
        for s in range(draws):
            laws = [MixtureLaw.of({k: v[s] for k, v in refit.items()}, self.domains) for refit in refits]
            found = optimal_mixture(laws, best.n, best.d, weights=best.weights.tolist(), near=best.shares)
            out[s] = found.shares
        return out


def read_mixtures(path: Path) -> MixtureTable:
    """Read a CSV with columns n, d, h_<domain> per training domain and loss or loss_<domain> per target.

    Shares may be fractions or per cent. Raises InputError naming file, line, column and reason.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; give a CSV with columns n, d, h_<domain>, loss_<domain>")
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as handle:
        reader = csv.DictReader(handle)
        header = [name for name in reader.fieldnames or [] if name]
        domains = tuple(name[2:] for name in header if name.startswith("h_"))
        targets = [name for name in header if name == "loss" or name.startswith("loss_")]
        wanted = ["n", "d", *(f"h_{name}" for name in domains), *targets]
        if len(domains) < 2 or not targets or not {"n", "d"} <= set(header):
            raise InputError(
                f"{path}: needs columns n, d, h_<domain> of two or more domains and loss or loss_<domain>; "
                f"it has {', '.join(header) or 'none'}"
            )
        columns: dict[str, list[float]] = {name: [] for name in wanted}
        for row in reader:
            for name in wanted:
                where = f"{path}: line {reader.line_num}, column '{name}'"
                try:
                    value = float(row[name])
                except (TypeError, ValueError):
                    raise InputError(f"{where}: '{row[name]}' is not a number") from None
                lowest = 0.0 if name.startswith("h_") else math.ulp(0.0)
                if not (math.isfinite(value) and value >= lowest):
                    raise InputError(f"{where}: {value:g}; give a {'share' if lowest == 0 else 'positive number'}")
                columns[name].append(value)
    table = {name: np.array(values, dtype=np.float64) for name, values in columns.items()}
    shares = np.stack([table[f"h_{name}"] for name in domains], axis=1)
    if not len(shares):
        raise InputError(f"{path}: a header and no rows; give at least {least_mixtures(len(domains))} mixtures")
    if np.all(np.abs(shares.sum(axis=1) - 100.0) < 0.5):
        shares = shares / 100.0
    losses = {name.removeprefix("loss_"): table[name] for name in targets}
    return MixtureTable(str(path), domains, table["n"], table["d"], shares, losses)
