"""Simulated studies with a known law, shared by the tests of laws/."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from isofusion.laws.forms import Params
from isofusion.laws.table import Runs

FITDATA = Path(os.environ.get("ISOFUSION_FITDATA", Path(__file__).parents[2] / "../shared/fitdata"))


@pytest.fixture(scope="session")
def truth() -> Params:
    """Plausible constants for early fusion at the paper's scale (E, alpha, beta of Table 2)."""
    return Params.of(1.904, 260.0, 0.301, 1850.0, 0.335)


@pytest.fixture(scope="session")
def simulate(truth: Params) -> Callable[..., Runs]:
    """simulate(rng, sizes, budgets, seeds per size, trunk spread, branch spread) -> Runs of `truth` with noise."""

    def make(
        rng: np.random.Generator,
        sizes: int = 6,
        budgets: int = 5,
        seeds: tuple[int, ...] = (1,) * 6,
        trunk: float = 0.002,
        branch: float = 0.001,
        gain: float = 1.0,
        label: str = "",
        law: Params | None = None,
    ) -> Runs:
        rows = [
            (n, d, str(i), f"{i}-{s}", s)
            for i, n in enumerate(np.geomspace(1e8, 3e9, sizes))
            for s in range(seeds[i])
            for d in 2e9 * 2.0 ** np.arange(budgets)
        ]
        n, d = np.array([r[0] for r in rows]), np.array([r[1] for r in rows])
        group = [r[3] for r in rows]
        luck = {g: trunk * rng.standard_normal() for g in dict.fromkeys(group)}
        noise = np.array([luck[g] for g in group]) + branch * rng.standard_normal(len(rows))
        loss = (law or truth).predict(n * gain, d) * np.exp(noise)
        oracle = float((law or truth).E)
        return Runs.of(
            n, d, loss, size=[r[2] for r in rows], group=group, seed=[r[4] for r in rows], oracle=oracle, label=label
        )

    return make


@pytest.fixture(scope="session")
def fitdata() -> Path:
    """The folder of reference data with exact answers, which is not part of the project."""
    if not FITDATA.is_dir():
        pytest.skip("the reference data is not beside this checkout (shared/fitdata, or ISOFUSION_FITDATA)")
    return FITDATA


@pytest.fixture(scope="session")
def epoch() -> Runs:
    """Epoch's 245 points read off Hoffmann et al. fig. 4."""
    path = FITDATA / "epoch_chinchilla/svg_extracted_data.csv"
    if not path.is_file():
        pytest.skip("the Chinchilla points are not beside this checkout (shared/fitdata)")
    return Runs.from_csv(path, n="Model Size", c="Training FLOP", loss="loss")


@pytest.fixture(scope="session")
def epoch240(epoch: Runs) -> Runs:
    """Without the five largest losses, as published."""
    return epoch.select(np.sort(np.argsort(epoch.loss)[:-5]))
