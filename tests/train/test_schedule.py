from __future__ import annotations

import itertools
import math

import pytest

from isofusion.config import DataConfig, ModelConfig, RunConfig, SourceConfig, TrainConfig
from isofusion.train.schedule import INVERSE_SQRT_END, cooldown_factor, lr_factor


def run(
    kind: str = "branch", shape: str = "one-minus-sqrt", warmup: int = 10, start: int = 80, end: int = 100
) -> RunConfig:
    return RunConfig.model_validate(
        {
            "study": "s",
            "arm": "early",
            "size": "s",
            "seed": 0,
            "kind": kind,
            "parent": "t" if kind == "branch" else None,
            "start_step": start if kind == "branch" else 0,
            "end_step": end,
            "model": ModelConfig(width=16, head_dim=8, patch_size=8),
            "data": DataConfig(
                sources=(SourceConfig(name="c", domain="caption", format="world", weight=1),),
                image_size=16,
                patch_size=8,
            ),
            "train": TrainConfig(warmup_steps=warmup, cooldown_shape=shape),
        }
    )


def test_trunk_warms_up_linearly_then_stays_at_the_peak() -> None:
    factors = [lr_factor(s, run("trunk")) for s in range(100)]
    assert factors[:10] == pytest.approx([0.1 * k for k in range(1, 11)])
    assert factors[0] > 0
    assert set(factors[9:]) == {1.0}


def test_no_warm_up_starts_at_the_peak() -> None:
    assert lr_factor(0, run("trunk", warmup=0)) == 1.0


@pytest.mark.parametrize(
    ("shape", "formula"),
    [
        ("one-minus-sqrt", lambda t: 1 - math.sqrt(t)),
        ("linear", lambda t: 1 - t),
        ("inverse-sqrt", lambda t: (1 + t * (1 / INVERSE_SQRT_END**2 - 1)) ** -0.5),
    ],
)
def test_branch_follows_the_formula(shape: str, formula) -> None:
    config = run(shape=shape)
    got = [lr_factor(s, config) for s in range(80, 100)]
    assert got == pytest.approx([formula((s - 80) / 20) for s in range(80, 100)])
    assert got[0] == 1.0  # the first update of a branch is at the peak
    assert all(a > b > 0 for a, b in itertools.pairwise(got))  # and no update is wasted on a zero
    assert [lr_factor(s, config) for s in range(80)] == [lr_factor(s, run("trunk")) for s in range(80)]


@pytest.mark.parametrize(
    ("shape", "end"), [("one-minus-sqrt", 0.0), ("linear", 0.0), ("inverse-sqrt", INVERSE_SQRT_END)]
)
def test_cooldown_runs_from_one_to_its_end_value(shape: str, end: float) -> None:
    assert cooldown_factor(0.0, shape) == 1.0
    assert cooldown_factor(1.0, shape) == pytest.approx(end)


def test_cooldown_inside_the_warm_up_multiplies() -> None:
    config = run(shape="linear", warmup=100, start=40, end=60)
    assert lr_factor(50, config) == pytest.approx(51 / 100 * 0.5)
