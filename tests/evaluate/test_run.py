"""What stands beside a loss: the learner's bound and the entropy of the text alone, by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="training needs the [train] extra")

from isofusion.config import WorldConfig  # noqa: E402
from isofusion.data.world import World  # noqa: E402
from isofusion.evaluate.losses import DomainLosses  # noqa: E402
from isofusion.evaluate.run import learner_bound, text_entropy  # noqa: E402

LOOKUPS = [3, 3, 40]  # entities that the stream asks for
TARGETS = 8


def losses(oracle: float) -> DomainLosses:
    zeros = np.zeros(TARGETS, np.int32)
    every = np.full(TARGETS, oracle, np.float32)
    return DomainLosses({"true": every}, zeros, zeros, every, zeros, ("d",), TARGETS, 0, None)


def test_the_bound_is_the_oracle_and_the_names_never_seen_over_all_targets() -> None:
    """A name that n draws by frequency missed is uniform over those not yet taken; one they met costs nothing."""
    world, n = World(WorldConfig(entity_bits=6)), 37 * 5
    train = SimpleNamespace(sources=[SimpleNamespace(), SimpleNamespace(world=world)], exposures=lambda step: 37 * step)
    val = SimpleNamespace(val_lookups=lambda domain: np.array(LOOKUPS), val_text_nats=lambda domain: 20.0)
    p = np.arange(1, 65) ** -world.cfg.zipf
    p /= p.sum()
    missed = (1 - p) ** n
    names_left = 128**3 - sum(1 - missed)
    excess = sum(missed[k] * math.log(names_left) for k in LOOKUPS) / TARGETS
    assert excess > 0.1
    assert learner_bound(losses(0.25), "caption", train, val, 5) == pytest.approx(0.25 + excess)
    assert text_entropy(losses(0.25), "caption", val) == pytest.approx(20.0 / TARGETS)
    for unknown in (
        learner_bound(losses(math.nan), "caption", train, val, 5),
        text_entropy(losses(math.nan), "c", val),
    ):
        assert unknown is None  # real data
    assert learner_bound(losses(0.25), "caption", SimpleNamespace(sources=[SimpleNamespace()]), val, 5) is None
