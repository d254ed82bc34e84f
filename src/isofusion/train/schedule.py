"""Learning-rate factor of one update: linear warm-up, constant trunk, cool-down of a branch.

Sources: the shapes are 1 - sqrt(t) of Haegele et al. (arXiv 2405.18392, the schedule arXiv 2504.07951 cites) and the
inverse square root of the authors' library (reference facts: lr(t) = ((o + t) / o)^-1/2 with o set by the end value).

Conventions. `step` counts from 0 and names the update that makes step + 1 updates in all.
- Warm-up: (step + 1) / warmup_steps, so the first update is not wasted on a zero rate and update `warmup_steps` is the
  first at the peak.
- Cool-down of a branch: t = (step - start_step) / (end_step - start_step). The first update of a branch is at the peak
  and the shape reaches its end value at `end_step`, one update after the last, so that no update is wasted on a zero.
"""

from __future__ import annotations

import math

from isofusion.config import RunConfig, TrainConfig

INVERSE_SQRT_END = 0.1
"""Value of the inverse-sqrt shape at t = 1: the form needs one above 0, the paper states none, this is ours."""


def warmup_factor(step: int, warmup_steps: int) -> float:
    """Linear warm-up, in (0, 1]; 1 everywhere when there is no warm-up."""
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0


def cooldown_factor(t: float, shape: str) -> float:
    """Shape of a cool-down at t in [0, 1]: 1 at t = 0; 0 at t = 1, or INVERSE_SQRT_END for "inverse-sqrt"."""
    if shape == "one-minus-sqrt":
        return 1.0 - math.sqrt(t)
    if shape == "linear":
        return 1.0 - t
    if shape == "inverse-sqrt":
        offset = 1.0 / (INVERSE_SQRT_END**-2 - 1.0)
        return ((offset + t) / offset) ** -0.5
    raise ValueError(f"unknown cool-down shape {shape!r}")


def lr_factor(step: int, config: RunConfig) -> float:
    """Factor of the peak learning rate for the update at 0-based `step`; a pure function.

    A branch follows its trunk before `start_step`; should its cool-down start inside the warm-up, the two multiply.
    """
    train: TrainConfig = config.train
    factor = warmup_factor(step, train.warmup_steps)
    if config.kind == "branch" and step >= config.start_step:
        t = (step - config.start_step) / (config.end_step - config.start_step)
        factor *= cooldown_factor(min(t, 1.0), train.cooldown_shape)
    return factor
