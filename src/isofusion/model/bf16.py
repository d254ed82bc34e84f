"""Attention and the head's loss on CPUs in bf16 (meant for avx512_bf16, AMX), where PyTorch's own are slow.

PyTorch's SDPA multiplies tiles that are too small for such a CPU, and in bf16 it is slower than in float32. Here
queries go in blocks of `QUERIES` against the keys that any of them may see (of 256 causal places 3/4 of the square, of
1,024 9/16), each as one batched product. Scores are float32 products of float32 queries and keys and the softmax is
float32; its weights and the gradients are bf16, as in FlashAttention (arXiv 2307.08691).
q, k and v of every head are gathered once to where these products want them (`Rows`), and the result once back.
`head_loss` makes the gradient of the logits while they are in the cache and keeps it in bf16, in place of float32
logits, their softmax and two passes over both.

T slots, N documents of a stack, L places of one, H heads, K head_dim, R rows (places x heads), n slots with a target,
D width, V vocabulary
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from isofusion.model.fused import exactly
from isofusion.model.memory import LOGITS, QUERIES, ROUND


def seen(allowed_NLL: np.ndarray | None, length: int) -> tuple[int, ...]:
    """For each block of `QUERIES` queries, how many keys, from the first, any of them may see (None: all)."""
    starts = range(0, length, QUERIES)
    if allowed_NLL is None:
        return tuple(length for _ in starts)
    any_LL = np.any(allowed_NLL.reshape(-1, length, length), axis=0)
    return tuple(int(np.flatnonzero(any_LL[at : at + QUERIES].any(0))[-1]) + 1 for at in starts)


def first_places(index: np.ndarray) -> np.ndarray:
    """Where each of 0, 1, ... stands first in `index` (i64), which holds all of them."""
    out = np.empty(int(index.max(initial=-1)) + 1, np.int64)
    out[index[::-1]] = np.arange(index.size)[::-1]  # of equals the first is written last
    return out


@dataclass(frozen=True)
class Stack:
    """`n` documents of one padded length. `mask`: float32 [N or 1, 1, L, L], 0 or -inf, added to the scores (None:
    every place sees all of its L); `keys`: what `seen` says of it. Every place must see at least one.
    """

    n: int
    length: int
    keys: tuple[int, ...]
    mask: Tensor | None = None

    def blocks(self) -> Iterator[tuple[slice, int]]:
        """(queries, number of keys) of each product."""
        starts = range(0, self.length, QUERIES)
        return ((slice(at, min(self.length, at + QUERIES)), end) for at, end in zip(starts, self.keys, strict=True))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> list[Tensor]:
        """float32 q (scaled) and k, bf16 v and out, all [N*H, L, K]; fills out, returns the weights of each block."""
        kept = []
        for rows, end in self.blocks():
            scores = torch.bmm(q[:, rows], k[:, :end].mT)
            if self.mask is not None:
                by_head = scores.view(self.n, -1, *scores.shape[1:])
                by_head.add_(self.mask[..., rows, :end])
            weights = torch.softmax(scores, -1).to(v.dtype)
            if end == self.length == rows.stop - rows.start:
                torch.bmm(weights, v, out=out)
            else:
                out[:, rows] = torch.bmm(weights, v[:, :end])
            kept.append(weights)
        return kept

    def gradients(self, kept: Sequence[Tensor], saved: Sequence[Tensor], grad: Tensor, to: Sequence[Tensor]) -> None:
        """`saved`: bf16 q, k, v; `grad`: of the result; fills `to`, the gradients of q, k, v. All bf16 [N*H, L, K]."""
        q, k, v = saved
        if len(kept) == 1 and self.keys[0] == self.length:
            grad_s = _of_scores(grad, v, kept[0])
            torch.bmm(grad_s, k, out=to[0])
            torch.bmm(grad_s.mT, q, out=to[1])
            torch.bmm(kept[0].mT, grad, out=to[2])
            return
        grad_k, grad_v = torch.zeros(k.shape), torch.zeros(k.shape)
        for (rows, end), weights in zip(self.blocks(), kept, strict=True):
            grad_s = _of_scores(grad[:, rows], v[:, :end], weights)
            to[0][:, rows] = torch.bmm(grad_s, k[:, :end])
            grad_k[:, :end] += torch.bmm(grad_s.mT, q[:, rows])
            grad_v[:, :end] += torch.bmm(weights.mT, grad[:, rows])
        to[1].copy_(grad_k)
        to[2].copy_(grad_v)


def _of_scores(grad: Tensor, v: Tensor, weights: Tensor) -> Tensor:
    grad_w = torch.bmm(grad, v.mT)
    return torch.ops.aten._softmax_backward_data(grad_w, weights, -1, weights.dtype)


@dataclass(frozen=True)
class Rows:
    """Where the products want the rows (slot, head): stack after stack, in a stack document after document, in a
    document head after head; rows of padding come last. Rows that repeat a slot fill a document up: no real place sees
    them.
    """

    stacks: tuple[Stack, ...]
    heads: int
    take_R: Tensor  # i64: slot * H + head of each row
    give_TH: Tensor  # i64: the row of each (slot, head)

    @classmethod
    def of(cls, stacks: Sequence[Stack], slots: Sequence[np.ndarray], padding: np.ndarray, heads: int) -> Rows:
        """`slots`: for each stack the slot of each place, i64 [N, L]; one that is there twice belongs to its first."""
        head_H = np.arange(heads)[:, None]
        take_R = np.concatenate([(s[..., None, :] * heads + head_H).ravel() for s in [*slots, padding[:, None]]])
        return cls(tuple(stacks), heads, torch.from_numpy(take_R), torch.from_numpy(first_places(take_R)))

    def parts(self, *tensors: Tensor) -> Iterator[tuple[Stack, list[Tensor]]]:
        """Each stack with its share of [R, K] tensors, as [N*H, L, K]."""
        at = 0
        for stack in self.stacks:
            size = stack.n * self.heads * stack.length
            yield stack, [x[at : at + size].view(-1, stack.length, x.shape[-1]) for x in tensors]
            at += size

    @property
    def real(self) -> int:
        """Rows in front of those of padding."""
        return self.heads * sum(stack.n * stack.length for stack in self.stacks)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, rows: Rows) -> Tensor:
        out = torch.empty_like(v)
        kept = [w for stack, (q_, k_, v_, o_) in rows.parts(q, k, v, out) for w in stack.attend(q_, k_, v_, o_)]
        out[rows.real :] = v[rows.real :]  # padding sees itself
        ctx.save_for_backward(q.to(v.dtype), k.to(v.dtype), v, *kept)
        ctx.rows = rows
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows: Rows = ctx.rows
        q, k, v, *kept = ctx.saved_tensors
        grads = [torch.empty_like(x) for x in (q, k, v)]
        for stack, (q_, k_, v_, grad_, *to) in rows.parts(q, k, v, grad, *grads):
            stack.gradients(kept[: len(stack.keys)], (q_, k_, v_), grad_, to)
            kept = kept[len(stack.keys) :]
        of_q, of_k, of_v = grads
        of_q[rows.real :] = 0.0
        of_k[rows.real :] = 0.0
        of_v[rows.real :] = grad[rows.real :]
        return of_q, of_k, of_v, None


def attention(q: Tensor, k: Tensor, v: Tensor, rows: Rows) -> Tensor:
    """float32 q (times head_dim^-0.5) and k, bf16 v, in the order of `rows` -> bf16, all [R, K]."""
    with exactly(q.device):
        return _Attention.apply(q, k, v, rows)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_nD: Tensor, weight_VD: Tensor, targets_n: Tensor) -> Tensor:
        low = torch.bfloat16
        count, vocabulary = hidden_nD.shape[0], weight_VD.shape[0]
        filler = -count % ROUND  # rows of zeros with target 0, whose loss has no weight
        hidden, weight = F.pad(hidden_nD.to(low), (0, 0, 0, filler)), weight_VD.to(low)
        targets_n = F.pad(targets_n, (0, filler))
        n = count + filler
        nll_n = torch.empty(n)
        grad_nV = torch.empty(n, vocabulary, dtype=low)
        step = max(1, LOGITS // vocabulary)
        for at in range(0, n, step):
            rows = slice(at, at + step)
            logits = (hidden[rows] @ weight.T).float()
            target = targets_n[rows, None]
            own = logits.gather(1, target).squeeze(1)
            top = logits.amax(1)
            share = torch.softmax(logits, 1)
            # the largest share is 1 / sum(exp(logits - top)): no second exponential
            torch.sub(top, own, out=nll_n[rows]).sub_(share.amax(1).log_())
            grad_nV[rows] = share.scatter_add_(1, target, torch.full(target.shape, -1.0))
        ctx.save_for_backward(hidden, weight, grad_nV)
        return nll_n[:count]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_n: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, grad_nV = ctx.saved_tensors
        count = grad_n.shape[0]
        grad_n1 = F.pad(grad_n, (0, hidden.shape[0] - count))[:, None]
        # float32: a row's factor commutes with the product
        grad_hidden = (grad_nV @ weight)[:count] * grad_n1[:count]
        grad_weight = grad_nV.T @ (hidden * grad_n1).to(hidden.dtype)
        return grad_hidden, grad_weight.float(), None


def head_loss(hidden_nD: Tensor, weight_VD: Tensor, targets_n: Tensor) -> Tensor:
    """Negative log-likelihood of `targets_n` i64 [n] under softmax(hidden @ weight.T), in nats, float32 [n].

    Products are bf16, so logits are rounded to it, as on a GPU; loss and gradient are then computed in float32.
    """
    with exactly(hidden_nD.device):
        return _HeadLoss.apply(hidden_nD, weight_VD, targets_n)
