"""The one batch every architecture reads: a flat packed axis with parallel vectors.

T = rows * row_len slots, P = patch slots, I = images, n = patches per image (P = I * n).
Early and late fusion read the same batch, so a difference in loss is never a difference in data.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

IGNORE = -100
"""Target of a slot that predicts nothing (torch's convention)."""


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

    def torch(self, device: str = "cpu") -> PackedBatch:
        """The same batch with torch tensors on `device` (index vectors become int64 where torch needs them)."""
        import torch

        changed: dict[str, Any] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, np.ndarray):
                tensor = torch.from_numpy(np.ascontiguousarray(value))
                if item.name in ("token_ids", "targets", "patch_slot", "position"):
                    tensor = tensor.long()
                changed[item.name] = tensor.to(device)
        return replace(self, **changed)
