"""Blocks that were generated ahead are the ones a run would have written."""

from __future__ import annotations

import numpy as np
import pytest

from isofusion.config import DataConfig
from isofusion.data.generate import generate, missing_blocks
from isofusion.data.stream import Stream

pytest.importorskip("zstandard", reason="blocks are kept with the [train] extra")

DATA = DataConfig(
    sources=[
        {"name": "c", "domain": "caption", "format": "world", "weight": 1},
        {"name": "t", "domain": "text", "format": "world", "weight": 1},
    ],
    row_len=256,
    image_size=48,
    patch_size=8,
)


def test_blocks_ahead_are_the_runs_own(tmp_path, monkeypatch) -> None:
    alone = Stream(DATA, 3, "train", 32)
    assert missing_blocks(alone, 5) == [(0, 0), (1, 0), (0, 1), (1, 1)]
    expected = [alone.batch(step) for step in range(5)]
    assert missing_blocks(alone, 5) == []
    monkeypatch.setenv("ISOFUSION_CACHE", str(tmp_path / "other"))
    assert generate(DATA, [3], 32, 5, processes=2) == 4
    ahead = Stream(DATA, 3, "train", 32)
    assert missing_blocks(ahead, 5) == []
    monkeypatch.setattr("isofusion.data.endless.WorldSource._build", None)  # it only reads now
    for step, batch in enumerate(expected):
        assert ahead.batch(step).keys == batch.keys
        np.testing.assert_array_equal(ahead.batch(step).token_ids, batch.token_ids)
        np.testing.assert_array_equal(ahead.batch(step).patches, batch.patches)
    assert generate(DATA, [3], 32, 5, processes=2) == 0
