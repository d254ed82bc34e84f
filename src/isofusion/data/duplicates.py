"""Near-duplicates between training and validation: equal texts, equal long paragraphs, pictures that look the same.

Counts only, nothing is removed. Pictures: 64-bit dHash at a Hamming distance of at most 2. Cost is bounded: above
PAIRS comparisons an even subset of the validation pictures is compared, and `images_checked` says how many.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence

import numpy as np

from isofusion.data import cache
from isofusion.data.index import SourceIndex

DISTANCE = 2
PAIRS = 200_000_000
STRAY = 0.01  # of validation: copies in training below this share are told in data.json only
_ONES = np.array([bin(i).count("1") for i in range(1 << 16)], np.uint8)


def near(train: np.ndarray, val: np.ndarray, distance: int = DISTANCE) -> np.ndarray:
    """bool[len(val)]: has a `train` hash within `distance` bits. Both u64; O(len(train) * len(val))."""
    train = np.unique(train)
    out = np.zeros(len(val), bool)
    if not len(train):
        return out
    chunk = max(1, 4_000_000 // len(train))
    for start in range(0, len(val), chunk):
        x = val[start : start + chunk, None] ^ train[None, :]
        bits = _ONES[x.view(np.uint16)].reshape(*x.shape, 4).sum(-1, dtype=np.uint8)
        out[start : start + chunk] = (bits <= distance).any(1)
    return out


def near_duplicates(train: Sequence[SourceIndex], val: SourceIndex) -> dict[str, int]:
    """How much of `val` is also in any of `train`; cached by the contents of both."""
    key = cache.digest("duplicates", 1, DISTANCE, PAIRS, sorted(t.digest for t in train), val.digest)
    place = cache.root() / "duplicates" / f"{key}.json"
    with contextlib.suppress(OSError, ValueError):  # not there, or damaged
        return json.loads(place.read_bytes())

    def both(column: str) -> tuple[np.ndarray, np.ndarray]:
        return np.concatenate([np.zeros(0, np.uint64), *(t.column(column) for t in train)]), val.column(column)

    def shared(column: str) -> int:
        there, here = both(column)
        return int(np.isin(here, there).sum())

    hashes, pictures = both("image_dhash")
    checked = pictures
    if len(hashes) * len(pictures) > PAIRS:
        checked = pictures[:: -(-len(hashes) * len(pictures) // PAIRS)]
    counts = {
        "documents": val.n,
        "same_text": shared("text_hash"),
        "paragraphs": len(val.column("paragraph")),
        "same_paragraph": shared("paragraph"),
        "images": len(pictures),
        "same_image": shared("image_hash"),
        "images_checked": len(checked),
        "near_image": int(near(hashes, checked).sum()),
    }
    cache.write_bytes(place, json.dumps(counts).encode())
    return counts


def leaks(counts: dict[str, int]) -> list[str]:
    """What of a source's validation was trained on, where it is more than a stray copy.

    Short texts of pictures repeat by chance ("a dog"): there the pictures count.
    """
    kinds = [
        ("near_image", "images_checked", "images, or their near-duplicates,"),
        ("same_paragraph", "paragraphs", "long paragraphs"),
    ]
    if not counts["images"]:
        kinds.append(("same_text", "documents", "whole texts"))
    return [
        f"{counts[one]:,} of {counts[many]:,} {what} of validation are in training too: its loss may be too low"
        for one, many, what in kinds
        if counts[one] > STRAY * counts[many]
    ]
