"""Attention over packed documents: one predicate, four executions of it, chosen once per batch.

A slot sees the earlier slots of its own document and, inside an image, every patch of that image (arXiv 2504.07951,
section 2.3: causal for text, bidirectional for image tokens). Padding sees itself only, so nothing is ever NaN.

- `dense`: explicit float32 softmax over rows; the reference the others are tested against.
- `native`: document by document in C++ (`native.py`), on CPUs: what the predicate lets a slot see is a stretch of its
  document from the first slot on, so nothing is masked, padded or moved. Scores, softmax and sums are float32.
- `sdpa`: documents of similar length are stacked into [documents, length] blocks, each one call of PyTorch's SDPA. On
  CPUs without a C++ compiler. Attention costs what the documents cost, not what the rows cost.
- `flex`: FlexAttention with a block mask over rows; GPU only (it has no CPU backward).

T slots, R rows, S slots per row, H heads, K head_dim, N documents of a block, L its padded length
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from isofusion.data.batch import PackedBatch
from isofusion.errors import InputError
from isofusion.model import native
from isofusion.model.fused import compute_dtype, document_attention, exactly, heads_of, regroup

EXECUTIONS = ("dense", "native", "sdpa", "flex")
WITHOUT_PADDING = ("native", "sdpa")
"""Those whose shapes follow the batch's documents, so that on a CPU padding slots are left out of the batch."""
FLEX_HEAD = 16
"""Fewest features of a head that FlexAttention's kernels take."""


def may_attend(query: dict[str, Any], key: dict[str, Any]) -> Any:
    """The predicate. `query` and `key` hold broadcastable `doc`, `slot` and `image` (as in PackedBatch) -> bool.

    Images of text slots are -1, and -1 == -1 would leak the future: an image must be >= 0 to be shared.
    """
    same_document = (query["doc"] == key["doc"]) & (query["doc"] >= 0)
    same_image = (query["image"] == key["image"]) & (query["image"] >= 0)
    return (same_document & ((key["slot"] <= query["slot"]) | same_image)) | (query["slot"] == key["slot"])


def rope_phase(position: Tensor, head_dim: int, heads: int, theta: float) -> Tensor:
    """exp(i * position * theta^(-2j/K)) (arXiv 2104.09864): on a CPU complex64 [T, 2H, K/2], spelled out for q and k
    heads (`heads` 0: [T, 1, K/2]); elsewhere float32 [T, 1, K/2, 2] of cosine and sine (no compiler takes complex
    products into its loops).
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position.device) / head_dim
    angle = position.float()[:, None] * theta**-exponent
    if position.device.type == "cpu":  # a full table lets the rotation run as one flat loop
        return torch.complex(angle.cos(), angle.sin())[:, None, :].expand(-1, max(1, 2 * heads), -1).contiguous()
    return torch.stack((angle.cos(), angle.sin()), -1)[:, None]


class AttentionPlan:
    """What every layer shares for one batch: RoPE phases, the mask, and where q, k, v of each slot are placed.

    `gather` i64[T'] says which slot fills each place; `inverse` i64[T] says where each slot went; None = in order.
    """

    gather: Tensor | None = None
    inverse: Tensor | None = None

    def __init__(self, phase: Tensor, dtype: torch.dtype) -> None:
        self.phase = phase
        self.dtype = dtype

    def mix(self, qkv: Tensor, gain_q: Tensor, gain_k: Tensor, eps: float) -> Tensor:
        """A fused projection [T, 3D] -> QK-norm, RoPE and attention -> [T, D], both in slot order."""
        q, k, v = heads_of(qkv, gain_q, gain_k, self.phase, self.gather, self.inverse, eps, self.dtype)
        return self.attend(q, k, v)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v [T', H, K] in the order of `gather` -> [T, H*K] in slot order."""
        raise NotImplementedError


def _flat(out_NHLK: Tensor) -> Tensor:
    """[N, H, L, K] -> [N*L, H*K]; a view of what SDPA returns."""
    n, heads, length, head = out_NHLK.shape
    return out_NHLK.transpose(1, 2).reshape(n * length, heads * head)


@dataclass(frozen=True)
class Stack:
    """Documents of one padded `length`. `mask`: [N or 1, 1, L, L], 0 or -inf; None: every place sees all of its L, or
    with `causal` the earlier ones.
    """

    length: int
    mask: Tensor | None = None
    causal: bool = False

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v [N*L, H, K] -> [N*L, H*K]."""
        q, k, v = (x.unflatten(0, (-1, self.length)).transpose(1, 2) for x in (q, k, v))
        with exactly(q.device):  # inputs have the plan's dtype already
            return _flat(F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, is_causal=self.causal))


class NativePlan(AttentionPlan):
    """Documents [edges[n], edges[n + 1]) of slots that see their document up to `last`, themselves included."""

    def __init__(self, phase: Tensor, edges: np.ndarray, last: np.ndarray) -> None:
        super().__init__(phase, torch.float32)
        self.edges, self.last = torch.from_numpy(edges.astype(np.int64)), torch.from_numpy(last.astype(np.int32))

    @classmethod
    def of(cls, phase: Tensor, batch: PackedBatch) -> NativePlan:
        """A padding slot is a document of its own."""
        doc, image = batch.doc_id.numpy(), batch.image_id.numpy()
        edge = _changes(doc, batch.row_len) | (doc < 0)
        starts = np.flatnonzero(edge | _changes(image, batch.row_len))
        run = np.append(starts, doc.shape[0])  # stretches of one image, or of text
        ends = np.repeat(run[1:] - 1, np.diff(run))
        last = np.where(image >= 0, ends, np.arange(doc.shape[0]))
        return cls(phase, np.append(np.flatnonzero(edge), doc.shape[0]), last)

    def mix(self, qkv: Tensor, gain_q: Tensor, gain_k: Tensor, eps: float) -> Tensor:
        return document_attention(qkv, gain_q, gain_k, self.phase, self.edges, self.last, eps)


class ImagePlan(AttentionPlan):
    """Bidirectional inside each image, for the late-fusion encoder: images of `patches` patches."""

    def __init__(self, phase: Tensor, dtype: torch.dtype, patches: int) -> None:
        super().__init__(phase, dtype)
        self.patches = patches

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.shape[0] == 0:  # no image in this batch: keep the graph whole without an attention call
            return (q + k + v).flatten(1)
        return Stack(self.patches).attend(q, k, v)


class DensePlan(AttentionPlan):
    """Rows with an explicit mask and a float32 softmax."""

    def __init__(self, phase: Tensor, dtype: torch.dtype, batch: PackedBatch) -> None:
        super().__init__(phase, dtype)
        self.rows = batch.rows
        rows = {name: vector.view(batch.rows, batch.row_len) for name, vector in _vectors(batch).items()}
        query = {name: vector[:, None, :, None] for name, vector in rows.items()}
        key = {name: vector[:, None, None, :] for name, vector in rows.items()}
        self.allowed_R1SS = may_attend(query, key)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.float().unflatten(0, (self.rows, -1)).transpose(1, 2) for x in (q, k, v))
        with exactly(q.device):
            scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
            return _flat(scores.masked_fill(~self.allowed_R1SS, float("-inf")).softmax(-1) @ v)


class DocumentPlan(AttentionPlan):
    """Documents stacked by length. Padding slots come last and return their own value."""

    def __init__(self, phase: Tensor, dtype: torch.dtype, batch: PackedBatch, heads: int) -> None:
        super().__init__(phase, dtype)
        image = batch.image_id.cpu().numpy()
        starts, lengths, padding = _documents(batch.doc_id.cpu().numpy(), batch.row_len)
        slots: list[np.ndarray] = []
        self.blocks: list[Stack] = []
        for members, longest in _blocks_by_length(lengths, heads):
            offset_L = np.arange(longest, dtype=np.int32)
            real_NL = offset_L < lengths[members][:, None]
            slot_NL = starts[members][:, None] + np.where(real_NL, offset_L, 0)
            slots.append(slot_NL)
            if real_NL.all() and not (image[slot_NL] >= 0).any():
                # plain text of one length: SDPA's own causal form skips half of the scores. Not with filler places,
                # which would then see documents and hand them a gradient (see `regroup`).
                self.blocks.append(Stack(longest, causal=True))
                continue
            side = {  # a filler place belongs to no document, so no real place sees it
                "doc": np.where(real_NL, 0, -1).astype(np.int8),
                "image": np.where(real_NL, image[slot_NL], -1),
                "slot": np.broadcast_to(offset_L, real_NL.shape),
            }
            allowed = may_attend(
                {name: vector[:, None, :, None] for name, vector in side.items()},
                {name: vector[:, None, None, :] for name, vector in side.items()},
            )
            # SDPA turns a bool mask into a float one at every call: do it once per batch
            mask = torch.from_numpy(np.where(allowed, np.float32(0), np.float32("-inf")))
            self.blocks.append(Stack(longest, mask.to(phase.device, dtype)))
        self.sizes = [slot_NL.size for slot_NL in slots]
        if len(slots) == 1 and not padding.size and self.sizes[0] == batch.n_slots:
            return  # documents of one length that fill the rows lie in order already
        self.sizes.append(int(padding.size))
        gather = np.concatenate([*(slot_NL.ravel() for slot_NL in slots), padding])
        inverse = np.empty(batch.n_slots, np.int64)
        inverse[gather[::-1]] = np.arange(gather.size)[::-1]  # of places with one slot the first is written last
        self.gather, self.inverse = (torch.from_numpy(x).to(phase.device) for x in (gather, inverse))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.gather is None:
            return self.blocks[0].attend(q, k, v)
        assert self.inverse is not None
        *values, own = v.split(self.sizes)
        parts = zip(self.blocks, q.split(self.sizes), k.split(self.sizes), values, strict=False)
        outs = [stack.attend(q_, k_, v_) for stack, q_, k_, v_ in parts]
        padding = own.flatten(1).to(outs[0].dtype) if outs else own.flatten(1)
        return regroup(torch.cat([*outs, padding]), self.inverse, self.gather)


class FlexPlan(AttentionPlan):
    """FlexAttention over rows, with a block mask built once per batch. Compiled on a GPU, mask and attention both; the
    eager form (forward only) is for tests on a CPU.
    """

    def __init__(self, phase: Tensor, dtype: torch.dtype, batch: PackedBatch) -> None:
        super().__init__(phase, dtype)
        self.rows = batch.rows
        self.block_mask = block_mask(batch.doc_id, batch.image_id, batch.rows, batch.row_len)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.unflatten(0, (self.rows, -1)).transpose(1, 2) for x in (q, k, v))
        return _flat(flex_attention_of(q.device.type)(q, k, v, block_mask=self.block_mask))


def block_mask(doc_T: Tensor, image_T: Tensor, rows: int, length: int) -> Any:
    """FlexAttention's BlockMask of the packed rows: which 128 x 128 blocks are empty, full or mixed, and the predicate.

    Made of comparisons alone, so that the device is never asked for anything.
    """
    from torch.nn.attention.flex_attention import create_block_mask

    doc_RS, image_RS = doc_T.view(rows, length), image_T.view(rows, length)

    def mask(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return may_attend(
            {"doc": doc_RS[row, query], "image": image_RS[row, query], "slot": query},
            {"doc": doc_RS[row, key], "image": image_RS[row, key], "slot": key},
        )

    build = _compiled_block_mask() if doc_T.device.type == "cuda" else create_block_mask
    return build(mask, rows, None, length, length, device=str(doc_T.device))


@lru_cache(maxsize=1)
def _compiled_block_mask() -> Callable[..., Any]:
    """Compiled, the mask over all slots is never written to memory (64 rows of 1,024: 64 MiB of booleans)."""
    from torch.nn.attention.flex_attention import create_block_mask

    return torch.compile(create_block_mask, dynamic=False)


def flex_attention_of(device: str) -> Callable[..., Tensor]:
    """FlexAttention for a kind of device; inside a compiled block it is traced with the rest of the block."""
    from torch.nn.attention.flex_attention import flex_attention

    attend: Any = flex_attention
    if device != "cuda" or torch.compiler.is_compiling():
        return attend
    return _flex_compiled()


@lru_cache(maxsize=1)
def _flex_compiled() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _vectors(batch: PackedBatch) -> dict[str, Tensor]:
    slot = torch.arange(batch.n_slots, device=batch.doc_id.device)
    return {"doc": batch.doc_id, "image": batch.image_id, "slot": slot}


def _changes(ids: np.ndarray, row_len: int) -> np.ndarray:
    """bool [T]: the slot differs from the one before it, or begins a row."""
    edge = np.ones(ids.shape[0], dtype=bool)
    edge[1:] = ids[1:] != ids[:-1]
    edge[::row_len] = True
    return edge


def _documents(doc: np.ndarray, row_len: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Start and length of each run of one document inside a row, and the padding slots."""
    starts = np.flatnonzero(_changes(doc, row_len))
    lengths = np.diff(np.append(starts, doc.shape[0]))
    real = doc[starts] >= 0
    return starts[real], lengths[real], np.flatnonzero(doc < 0)


def _blocks_by_length(lengths: np.ndarray, heads: int) -> list[tuple[np.ndarray, int]]:
    """Split documents into blocks of like length, cheapest in total -> [(document indices, padded length)].

    Cost of a block of n documents padded to L, in scores per head: n L (L + 90) + 60000 / heads, measured for a forward
    and backward of SDPA in float32 (90: what does not grow with L; 60000: one more call, about 0.2 ms). Exact by
    dynamic programming over lengths rounded up to 8.
    """
    if not lengths.size:
        return []
    rounded = -(-lengths // 8) * 8
    sizes, counts = np.unique(rounded, return_counts=True)
    total = np.concatenate([[0], np.cumsum(counts)])
    call = 60000.0 / heads
    best, cut = [0.0], [0]
    for end in range(1, sizes.size + 1):
        width = float(sizes[end - 1])
        costs = [best[s] + (total[end] - total[s]) * width * (width + 90.0) + call for s in range(end)]
        cut.append(int(np.argmin(costs)))
        best.append(float(min(costs)))
    blocks, end = [], int(sizes.size)
    while end > 0:
        start = cut[end]
        width = int(sizes[end - 1])
        members = np.flatnonzero((rounded > (sizes[start - 1] if start else 0)) & (rounded <= width))
        blocks.append((members, int(lengths[members].max())))
        end = start
    return blocks


def choose_execution(asked: str, device: torch.device, head_dim: int) -> str:
    """One of EXECUTIONS; "auto": on CUDA flex where heads are wide enough, on a CPU native where it can be had.

    Raises InputError: an unknown one, or native where there is none.
    """
    here = device.type == "cpu" and compute_dtype(device) in native.SUFFIX and native.available()
    if asked == "auto":
        if device.type == "cuda":
            return "flex" if head_dim >= FLEX_HEAD else "dense"
        return "native" if here else "sdpa"
    if asked not in EXECUTIONS:
        raise InputError(f'attention "{asked}" is unknown; choose one of {", ".join(EXECUTIONS)} or auto')
    if asked == "native" and not here:
        raise InputError(f'attention "native" runs in float32 or bf16 on a CPU ({native.describe()}); choose auto')
    return asked


def make_plan(execution: str, batch: PackedBatch, head_dim: int, heads: int, theta: float) -> AttentionPlan:
    """The plan of a torch batch; `execution` is one of EXECUTIONS."""
    phase = rope_phase(batch.position, head_dim, 0 if execution == "native" else heads, theta)
    dtype = _attention_dtype(batch.doc_id.device)
    if execution == "native":
        return NativePlan.of(phase, batch)
    if execution == "sdpa":
        return DocumentPlan(phase, dtype, batch, heads)
    return {"dense": DensePlan, "flex": FlexPlan}[execution](phase, dtype, batch)


def image_plan(
    images: int, patches: int, head_dim: int, heads: int, theta: float, device: torch.device
) -> AttentionPlan:
    """The encoder's plan: RoPE runs over the patch index inside each image."""
    if choose_execution("auto", device, head_dim) == "native":
        phase = rope_phase(torch.arange(patches), head_dim, 0, theta).repeat(images, 1, 1)
        edges = np.arange(images + 1) * patches
        return NativePlan(phase, edges, np.repeat(edges[1:] - 1, patches))
    phase = rope_phase(torch.arange(patches, device=device), head_dim, heads, theta)
    return ImagePlan(phase.repeat(images, *[1] * (phase.dim() - 1)), _attention_dtype(device), patches)


def _attention_dtype(device: torch.device) -> torch.dtype:
    """Of q, k, v. On CPUs float32: SDPA is 1.5-4x slower in bf16 there."""
    return torch.float32 if device.type == "cpu" else compute_dtype(device)
