"""Packing: documents -> pieces -> rows -> one PackedBatch.

A document is BOS, its segments, EOS. One longer than a row is cut into pieces: each opens with BOS, only the last has
EOS, an image is never split. Each text token and EOS is a target once at most: at the slot before it, when that slot is
in the same piece. So a slot before an image predicts nothing, and an image's last patch predicts the text after it.

# R rows, L slots per row, T = R * L, n patches per image, P patch slots, D pieces ("documents" of the batch)
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from isofusion.data.batch import IGNORE, PackedBatch

WINDOW = 512  # pieces that the best-fit search sees at once
IMAGE = -1  # a segment of this "length" is an image


def cut(segments: Sequence[int], n: int, row_len: int) -> list[int]:
    """Ends of the pieces of a document, in content slots (BOS and EOS not counted).

    `segments`: length of each text in tokens, IMAGE for an image of `n` slots. A piece holds at most row_len slots with
    its BOS and, if last, its EOS.
    """
    room = row_len - 1
    ends: list[int] = []
    at = used = 0
    for length in segments:
        if length == IMAGE:
            if used + n > room:
                ends.append(at)
                used = 0
            at, used = at + n, used + n
            continue
        while length:
            if used == room:
                ends.append(at)
                used = 0
            take = min(length, room - used)
            at, used, length = at + take, used + take, length - take
    if used == room:  # no slot left for EOS: its predecessor moves with it, so that EOS is predicted from content
        last = next(length for length in reversed(segments) if length)
        ends.append(at - (n if last == IMAGE else 1))
    return [*ends, at]


def best_fit(lengths: np.ndarray, row_len: int, window: int = WINDOW) -> tuple[np.ndarray, np.ndarray]:
    """Plan of one epoch: pieces in arrival order -> (row_ptr i64[R+1], piece i64[N]); row r is piece[row_ptr[r]:...].

    Every row opens with the oldest waiting piece and takes, again and again, the longest of the `window` oldest that
    still fits. Nothing is dropped. O(N log window).
    """
    sizes = lengths.tolist()
    pool: list[tuple[int, int]] = []
    waiting = [False] * len(sizes)
    order: list[int] = []
    row_ptr = [0]
    arrived = oldest = 0
    while len(order) < len(sizes):
        free, opening = row_len, True
        while True:
            while arrived < len(sizes) and len(pool) < window:
                insort(pool, (sizes[arrived], arrived))
                waiting[arrived] = True
                arrived += 1
            if opening:
                while not waiting[oldest]:
                    oldest += 1
            key = (sizes[oldest], oldest) if opening else (free, len(sizes))
            place = bisect_right(pool, key) - 1
            if place < 0:
                break
            size, piece = pool.pop(place)
            waiting[piece], opening = False, False
            order.append(piece)
            free -= size
        row_ptr.append(len(order))
    return np.array(row_ptr, np.int64), np.array(order, np.int64)


def largest_prefix(lengths: Sequence[int], rows: int, row_len: int) -> list[list[int]]:
    """The longest prefix of the documents that best-fit decreasing places in `rows` rows: document numbers per row."""

    def place(count: int) -> list[list[int]] | None:
        free = [(row_len, r) for r in range(rows)]  # sorted
        out: list[list[int]] = [[] for _ in range(rows)]
        for i in sorted(range(count), key=lambda i: (-lengths[i], i)):
            at = bisect_right(free, (lengths[i], -1))
            if at == len(free):
                return None
            room, r = free.pop(at)
            out[r].append(i)
            insort(free, (room - lengths[i], r))
        return out

    best: list[list[int]] = [[] for _ in range(rows)]
    low, high = 0, len(lengths)
    while low < high:  # packing a longer prefix can only fail sooner, but for oddities of best fit that do no harm
        middle = (low + high + 1) // 2
        if (found := place(middle)) is None:
            high = middle - 1
        else:
            low, best = middle, found
    return best


@dataclass(frozen=True)
class Piece:
    """A piece ready for a row. L slots with BOS and perhaps EOS, m images."""

    key: str
    ids: np.ndarray  # i32[L]
    image: np.ndarray  # i32[L]: 0 .. m-1 within the piece, -1 text
    patches: np.ndarray  # u8[m*n, p*p*3]
    token_class: np.ndarray | None = None  # u8[L], of the token at the slot
    oracle: np.ndarray | None = None  # f32[L], of the token at the slot
    exposures: int = 0  # entity lookups a learner sees (world)
    text_nats: float = 0.0  # -log p of all its targets given the text alone (world)
    lookups: np.ndarray | None = None  # i64[...] entities asked for (world)


@dataclass(frozen=True)
class Rows:
    """A block of packed rows with the pointers that let single rows be taken out of it."""

    batch: PackedBatch
    patch_ptr: np.ndarray  # i64[R+1]
    doc_ptr: np.ndarray  # i64[R+1]
    exposures: np.ndarray  # i64[R]
    text_nats: np.ndarray  # f64[R]
    lookups: list[np.ndarray] = field(default_factory=list)  # R arrays of entities

    @property
    def n_rows(self) -> int:
        return self.batch.rows

    def statistics(self) -> dict[str, list[Any]]:
        """Per row: documents, text slots (BOS and EOS included), image slots, targets, exposures, nats of the text."""
        b, shape = self.batch, (self.n_rows, self.batch.row_len)
        text = ((b.doc_id >= 0) & (b.modality == 0)).reshape(shape).sum(1)
        return {
            "documents": np.diff(self.doc_ptr).tolist(),
            "text_tokens": text.tolist(),
            "image_tokens": (b.modality == 1).reshape(shape).sum(1).tolist(),
            "targets": (b.targets != IGNORE).reshape(shape).sum(1).tolist(),
            "exposures": self.exposures.tolist(),
            "text_nats": self.text_nats.tolist(),
        }


def finish(
    *,
    rows: int,
    row_len: int,
    n: int,
    token_ids: np.ndarray,
    doc_id: np.ndarray,
    image_id: np.ndarray,
    token_class: np.ndarray,
    oracle: np.ndarray,
    domain: np.ndarray,
    patches: np.ndarray,
    keys: tuple[str, ...],
) -> PackedBatch:
    """Derive modality, position, targets and patch slots, and move class and oracle onto the slot that predicts.

    `token_class` u8[T] and `oracle` f32[T] come in per token and leave per target.
    """
    total = len(token_ids)
    modality = (image_id >= 0).astype(np.uint8)
    new = np.empty(total, bool)
    new[:1] = True
    new[1:] = doc_id[1:] != doc_id[:-1]
    slot = np.arange(total, dtype=np.int32)
    position = slot - np.maximum.accumulate(np.where(new, slot, 0))
    position[doc_id < 0] = 0
    predicts = np.zeros(total, bool)
    predicts[:-1] = (doc_id[1:] >= 0) & ~new[1:] & (modality[1:] == 0)
    following = np.minimum(slot + 1, total - 1)
    return PackedBatch(
        rows=rows,
        row_len=row_len,
        patches_per_image=n,
        token_ids=token_ids,
        modality=modality,
        doc_id=doc_id,
        image_id=image_id,
        position=position.astype(np.int32),
        targets=np.where(predicts, token_ids[following], IGNORE).astype(np.int32),
        domain=domain,
        patches=patches,
        patch_slot=np.flatnonzero(modality).astype(np.int32),
        token_class=np.where(predicts, token_class[following], 0).astype(np.uint8),
        oracle=np.where(predicts, oracle[following], np.nan).astype(np.float32),
        keys=keys,
    )


def build(rows: Sequence[Sequence[Piece]], row_len: int, n: int, patch_dim: int, domain: int, pad_id: int) -> Rows:
    """Lay pieces into rows. `rows[r]` fits in row_len slots; domain code of all of them; image ids count up."""
    total = len(rows) * row_len
    token_ids = np.full(total, pad_id, np.int32)
    doc_id, image_id = np.full(total, -1, np.int32), np.full(total, -1, np.int32)
    token_class, oracle = np.zeros(total, np.uint8), np.full(total, np.nan, np.float32)
    keys: list[str] = []
    patches: list[np.ndarray] = [np.zeros((0, patch_dim), np.uint8)]
    patch_ptr, doc_ptr = [0], [0]
    images = patch_rows = 0
    for r, row in enumerate(rows):
        at = r * row_len
        for piece in row:
            end = at + len(piece.ids)
            if end > (r + 1) * row_len:
                raise ValueError(f"row {r} holds {end - r * row_len} slots, it has {row_len}")
            token_ids[at:end] = piece.ids
            doc_id[at:end] = len(keys)
            if len(piece.patches):
                image_id[at:end] = np.where(piece.image >= 0, piece.image + images, -1)
                images += len(piece.patches) // n
                patches.append(piece.patches)
                patch_rows += len(piece.patches)
            if piece.token_class is not None:
                token_class[at:end] = piece.token_class
            if piece.oracle is not None:
                oracle[at:end] = piece.oracle
            keys.append(piece.key)
            at = end
        patch_ptr.append(patch_rows)
        doc_ptr.append(len(keys))
    batch = finish(
        rows=len(rows), row_len=row_len, n=n, token_ids=token_ids, doc_id=doc_id, image_id=image_id,
        token_class=token_class, oracle=oracle, domain=np.full(total, domain, np.uint8),
        patches=np.concatenate(patches), keys=tuple(keys),
    )  # fmt: skip
    none = np.zeros(0, np.int64)
    lookups = [np.concatenate([none, *(p.lookups for p in row if p.lookups is not None)]) for row in rows]
    exposures = np.array([sum(p.exposures for p in row) for row in rows], np.int64)
    text_nats = np.array([sum(p.text_nats for p in row) for row in rows], np.float64)
    return Rows(batch, np.array(patch_ptr, np.int64), np.array(doc_ptr, np.int64), exposures, text_nats, lookups)


_SLOT_VECTORS = ("token_ids", "modality", "position", "targets", "domain", "token_class", "oracle")


def take(parts: Sequence[tuple[Rows, int]]) -> PackedBatch:
    """Rows out of blocks -> one batch, document and image ids renumbered in order of appearance."""
    first = parts[0][0].batch
    length, n = first.row_len, first.patches_per_image
    columns: dict[str, list[np.ndarray]] = {
        name: [] for name in (*_SLOT_VECTORS, "doc_id", "image_id", "patches", "patch_slot")
    }
    keys: list[str] = []
    images = 0
    for i, (block, r) in enumerate(parts):
        b, at = block.batch, slice(r * length, (r + 1) * length)
        for name in _SLOT_VECTORS:
            columns[name].append(getattr(b, name)[at])
        d0, d1 = int(block.doc_ptr[r]), int(block.doc_ptr[r + 1])
        p0, p1 = int(block.patch_ptr[r]), int(block.patch_ptr[r + 1])
        doc, image = b.doc_id[at], b.image_id[at]
        columns["doc_id"].append(np.where(doc >= 0, doc + np.int32(len(keys) - d0), np.int32(-1)))
        columns["image_id"].append(np.where(image >= 0, image + np.int32(images - p0 // n), np.int32(-1)))
        columns["patches"].append(b.patches[p0:p1])
        columns["patch_slot"].append(b.patch_slot[p0:p1] + np.int32((i - r) * length))
        keys.extend(b.keys[d0:d1])
        images += (p1 - p0) // n
    joined = {name: np.concatenate(values) for name, values in columns.items()}
    return PackedBatch(rows=len(parts), row_len=length, patches_per_image=n, keys=tuple(keys), **joined)
