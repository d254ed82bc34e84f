"""The contact sheet and the measured statistics."""

from __future__ import annotations

import math

import numpy as np
import pytest

from isofusion.config import WorldConfig
from isofusion.data.world import World
from isofusion.data.world.show import contact_sheet, statistics, written


@pytest.fixture(scope="module")
def world():
    return World(WorldConfig(entity_bits=8))


def test_contact_sheet_shows_every_image_it_names(world):
    pytest.importorskip("PIL")
    sheet = contact_sheet(world, n=3, seed=1)
    assert sheet.mode == "RGB"
    assert sheet.width > 900
    pixels = np.asarray(sheet)
    shown = world.sample(1, "caption", 0, 0)
    image = next(s.pixels for s in shown.segments if hasattr(s, "pixels"))
    big = image.repeat(5, 0).repeat(5, 1)
    windows = np.lib.stride_tricks.sliding_window_view(pixels[:120, :60, 0], (1, 3))[:, :, 0]
    starts = np.argwhere((windows == big[0, :3, 0]).all(-1))
    assert any((pixels[y : y + 240, x : x + 240] == big).all() for y, x in starts.tolist())


def test_statistics_add_up(world):
    stats = statistics(world, "caption", n=40)
    assert math.isclose(sum(c["share"] for c in stats["classes"].values()), 1.0)
    oracle = sum(c["share"] * c["oracle"] for c in stats["classes"].values())
    assert math.isclose(oracle, stats["oracle_per_target"], rel_tol=1e-9)
    assert math.isclose(stats["image_share"] * stats["slots_per_document"], 36)
    assert statistics(world, "text", n=5)["image_share"] == 0


def test_written_marks_images(world):
    assert written(world, world.sample(0, "interleaved", 0, 0)).count("[image]") >= 2
