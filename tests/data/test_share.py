"""Rows of a step dealt out to ranks: the same rows on any number of ranks, equal in number, balanced in tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isofusion.config import DataConfig, SourceConfig
from isofusion.data.share import IMAGE_WEIGHT, share_rows
from isofusion.data.stream import Stream
from isofusion.errors import InputError

WORDS = [f"word{i}" for i in range(50)]


@given(st.lists(st.tuples(st.integers(0, 1024), st.integers(0, 1024)), min_size=8, max_size=40), st.integers(1, 8))
def test_every_row_once_and_equal_numbers(rows: list[tuple[int, int]], ranks: int) -> None:
    text, image = np.array(rows).T
    shares = share_rows(text, image, ranks)
    assert sorted(np.concatenate(shares).tolist()) == list(range(len(rows)))
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1
    assert all(np.all(np.diff(share) > 0) for share in shares)


def test_ranks_are_balanced_in_tokens() -> None:
    rng = np.random.default_rng(0)
    image = np.where(rng.random(64) < 0.45, rng.integers(1, 5, 64) * 196, 0)  # rows of 1,024 slots, some with images
    text = rng.integers(700, 1025, 64) - image
    work = text + IMAGE_WEIGHT * image

    def spread(shares: list[np.ndarray]) -> float:
        loads = np.array([work[share].sum() for share in shares])
        return float(loads.max() / loads.mean() - 1)

    assert spread(share_rows(text, image, 8)) < 0.005
    assert spread(np.split(np.arange(64), 8)) > 0.08  # what rows in order would give


def test_more_ranks_than_rows_is_refused() -> None:
    with pytest.raises(InputError, match=r"3 rows .*for 4 ranks; start at most 3 ranks"):
        share_rows(np.ones(3), np.ones(3), 4)


def test_parts_of_a_stream_are_its_step(files, tmp_path: Path) -> None:
    pairs = []
    for i in range(20):
        words = " ".join(np.random.default_rng(i).choice(WORDS, 4 + i % 9))
        pairs += [(f"{i:03}.png", files.image(i)), (f"{i:03}.txt", words.encode())]
    files.tar(tmp_path / "c.tar", pairs)
    files.jsonl(tmp_path / "t.jsonl", [{"text": " ".join(WORDS[: 3 + 2 * i])} for i in range(20)])
    sources = (
        SourceConfig(name="c", domain="caption", format="webdataset", weight=1, train=("c.tar",)),
        SourceConfig(name="t", domain="text", format="text", weight=1, train=("t.jsonl",)),
    )
    data = DataConfig(
        sources=sources, folder=str(tmp_path), row_len=64, image_size=16, patch_size=8, tokenizer="train:300"
    )
    stream = Stream(data, 1, "train", 6)
    for step in (0, 3):
        whole = stream.batch(step)
        for ranks in (2, 3):
            parts = [stream.batch(step, (rank, ranks)) for rank in range(ranks)]
            assert {part.rows for part in parts} == {6 // ranks}
            rows = sorted(row for part in parts for row in part.keys_by_row())
            assert [number for number, _ in rows] == list(range(6))
            assert tuple(key for _, keys in rows for key in keys) == whole.keys
            for part in parts:
                for r, number in enumerate(part.row_numbers):
                    here, there = (slice(i * 64, (i + 1) * 64) for i in (r, number))
                    for name in ("token_ids", "targets", "position", "modality", "domain"):
                        assert np.array_equal(getattr(part, name)[here], getattr(whole, name)[there])
            assert sum(len(part.patches) for part in parts) == len(whole.patches)
    tokens = [source.tokens(4) for source in stream.sources]
    for source, (text, image) in zip(stream.sources, tokens, strict=True):
        rows, r = source.row(4)
        assert rows.statistics()["text_tokens"][r] == text
        assert rows.statistics()["image_tokens"][r] == image
