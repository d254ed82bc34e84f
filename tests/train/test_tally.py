"""What a run has consumed: a branch's totals are its whole path's, its own part is its own steps' alone."""

from __future__ import annotations

import json
from typing import Any

import pytest

from isofusion.config import ModelConfig
from isofusion.model.count import BatchShape, count_parameters, flops
from isofusion.train.tally import Tally

SIZE: dict[str, Any] = {"width": 16, "depth": 2, "head_dim": 8, "ffn_multiple": 8, "vocab_size": 40, "patch_size": 4}
EARLY = ModelConfig(**SIZE)
LATE = ModelConfig(**SIZE, fusion="late", encoder_width=8)
PATCHES = 9  # of an image


def step(text: int, images: int, targets: int, pairs: int) -> dict[str, int]:
    return {
        "text_tokens": text,
        "image_tokens": images * PATCHES,
        "images": images,
        "targets": targets,
        "attention_pairs": pairs,
    }


TRUNK = [step(100, 3, 90, 4000), step(81, 5, 77, 3500)]
BRANCH = [step(120, 1, 110, 5000), step(64, 0, 60, 2100), step(70, 4, 66, 3900)]


def counted(tally: Tally, steps: list[dict[str, int]]) -> Tally:
    for shape in steps:
        tally.add_shape(shape)
    return Tally.from_json(json.loads(json.dumps(tally.to_json())))  # as a checkpoint carries it


@pytest.mark.parametrize("cfg", [EARLY, LATE], ids=["early", "late"])
def test_a_branch_counts_its_whole_path_and_apart_from_it_its_own_steps(cfg: ModelConfig) -> None:
    trunk = counted(Tally(wall_s=5.0, input_wait_s=1.0), TRUNK)
    branch = counted(trunk.child(), BRANCH)
    spent = {id(shape): flops(cfg, BatchShape(**shape))["total"] for shape in TRUNK + BRANCH}
    assert trunk.own_flops(cfg) == trunk.flops(cfg)["total"] == pytest.approx(sum(spent[id(s)] for s in TRUNK))
    assert branch.own_flops(cfg) == pytest.approx(sum(spent[id(s)] for s in BRANCH))
    assert branch.flops(cfg)["total"] == pytest.approx(sum(spent.values()))
    assert trunk.tokens == trunk.own_tokens == 181 + 8 * PATCHES
    assert branch.own_tokens == 254 + 5 * PATCHES
    assert (branch.text_tokens, branch.image_tokens) == (435, 13 * PATCHES)
    assert branch.tokens == trunk.tokens + branch.own_tokens
    assert (branch.wall_s, branch.input_wait_s) == (0.0, 0.0)
    assert trunk.wall_s == 5.0  # the parent's numbers are not the child's to change
    assert trunk.shape["targets"] == 167


def test_6nd_weighs_the_encoder_with_the_share_of_images() -> None:
    tally = counted(Tally(), TRUNK)
    n = count_parameters(LATE)
    assert tally.flops_6nd(LATE) == pytest.approx(6 * (n.n_encoder * tally.image_tokens + n.n_decoder * tally.tokens))
    assert tally.flops_6nd(EARLY) == pytest.approx(6 * count_parameters(EARLY).n_total * tally.tokens)
    assert Tally().flops_6nd(LATE) == 0.0
