"""The one batch every architecture reads: a flat packed axis with parallel vectors.

T = rows * row_len slots, P = patch slots, I = images, n = patches per image (P = I * n).
Early and late fusion read the same batch, so a difference in loss is never a difference in data.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from isofusion.data.sample import DOMAINS

IGNORE = -100
"""Target of a slot that predicts nothing (torch's convention)."""
SLOT_VECTORS = ("token_ids", "modality", "doc_id", "image_id", "position", "targets", "domain", "token_class", "oracle")
"""The arrays of a batch with one entry per slot."""


@dataclass(frozen=True)
class Facts:
    """What the host knows about a batch: a training step that had to ask the device would wait for it."""

    real_slots: int  # not padding
    targets: tuple[int, ...]  # by code of sample.DOMAINS


@dataclass(frozen=True)
class PackedBatch:
    """Arrays are NumPy after packing and torch tensors after `.torch(device)`; names and shapes stay the same."""

    rows: int
    row_len: int
    patches_per_image: int
    token_ids: Any  # i32[T]; patch slots hold the tokenizer's image id, padding its pad id
    modality: Any  # u8[T]: 0 text, 1 image
    doc_id: Any  # i32[T]: unique inside the batch, -1 padding
    image_id: Any  # i32[T]: unique inside the batch, -1 text or padding
    position: Any  # i32[T]: 0, 1, 2, ... inside each document, one step per token, text or patch
    targets: Any  # i32[T]: next token of the same document where it is text, else IGNORE
    domain: Any  # u8[T]: index into sample.DOMAINS
    patches: Any  # u8[P, p*p*3], images one after another, row-major patches inside an image
    patch_slot: Any  # i32[P]: the slot of each patch, increasing; patches of one image are adjacent
    token_class: Any  # u8[T]: class of the *target* of this slot (world only), 0 = unclassified
    oracle: Any  # f32[T]: -log p of the target under the true source in nats; NaN where unknown
    keys: tuple[str, ...] = ()  # keys[doc_id]: "source:epoch:sample[:piece]", for audit and exact resume
    row_numbers: Any = ()  # tuple[int, ...]: which rows of its step these are, where a rank took a part of them
    target_slot: Any = None  # i64[n]: slots with a target, increasing; filled by `.torch()`
    facts: Any = None  # Facts, filled by `.torch()`

    @property
    def n_slots(self) -> int:
        return self.rows * self.row_len

    def keys_by_row(self) -> list[tuple[int, tuple[str, ...]]]:
        """(row number of the step, keys of its documents) of each row of a NumPy batch."""
        numbers = self.row_numbers or tuple(range(self.rows))
        out, first = [], 0
        for number, doc_L in zip(numbers, self.doc_id.reshape(self.rows, self.row_len), strict=True):
            after = max(first, int(doc_L.max()) + 1)
            out.append((number, self.keys[first:after]))
            first = after
        return out

    def torch(self, device: str = "cpu", pin: bool = False) -> PackedBatch:
        """The same batch with torch tensors on `device` (index vectors become int64 where torch needs them).

        `pin`: into page-locked memory instead, from where `.to(device)` copies while the host goes on.
        """
        import torch

        has_T = self.targets != IGNORE
        targets = np.bincount(self.domain[has_T], minlength=len(DOMAINS)).tolist()
        changed: dict[str, Any] = {"facts": Facts(int((self.doc_id >= 0).sum()), tuple(targets))}
        arrays = {item.name: getattr(self, item.name) for item in fields(self)} | {"target_slot": np.flatnonzero(has_T)}
        for name, value in arrays.items():
            if isinstance(value, np.ndarray):
                tensor = torch.from_numpy(np.ascontiguousarray(value))
                if name in ("token_ids", "targets", "patch_slot", "position"):
                    tensor = tensor.long()
                changed[name] = tensor.pin_memory() if pin else tensor.to(device)
        return replace(self, **changed)

    def to(self, device: str) -> PackedBatch:
        """A torch batch on another device; from page-locked memory the copy runs beside the host."""
        import torch

        moved = {item.name: getattr(self, item.name) for item in fields(self)}
        moved = {name: v.to(device, non_blocking=True) for name, v in moved.items() if isinstance(v, torch.Tensor)}
        return replace(self, **moved)

    def without_padding(self, multiple: int) -> tuple[PackedBatch, Any]:
        """A torch batch as one row: its real slots in order, then padding until their number is a multiple.

        Also returns where each slot went, i64[T] (-1: left out); None where nothing is left out and the batch is as it
        was. Keys, row numbers and facts stay.
        """
        import torch

        real_T = self.doc_id >= 0
        n = int(real_T.sum())
        size = max(1, -(-n // multiple)) * multiple
        if size >= self.n_slots:
            return self, None
        kept = torch.cat((real_T.nonzero(), (~real_T).nonzero()[: size - n])).squeeze(1)
        place_T = torch.full(real_T.shape, -1, dtype=torch.int64, device=real_T.device)
        place_T[kept] = torch.arange(size, device=real_T.device)
        changed = {name: getattr(self, name).index_select(0, kept) for name in SLOT_VECTORS}
        changed["patch_slot"] = place_T.index_select(0, self.patch_slot)
        if self.target_slot is not None:
            changed["target_slot"] = place_T.index_select(0, self.target_slot)
        return replace(self, rows=1, row_len=size, **changed), place_T

    def split(self, rows: int) -> list[PackedBatch]:
        """A NumPy batch as micro-batches of at most `rows` rows each, in order; ids keep their values."""
        if rows >= self.rows:
            return [self]
        out, n = [], self.patches_per_image
        for first in range(0, self.rows, rows):
            last = min(first + rows, self.rows)
            at = slice(first * self.row_len, last * self.row_len)
            begin, end = np.searchsorted(self.patch_slot, [at.start, at.stop]).tolist()
            assert (end - begin) % n == 0  # whole images: packing never cuts one
            changed = {name: getattr(self, name)[at] for name in SLOT_VECTORS}
            changed["patch_slot"] = self.patch_slot[begin:end] - np.int32(at.start)
            out.append(replace(self, rows=last - first, patches=self.patches[begin:end], **changed))
        return out
