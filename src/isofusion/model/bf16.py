"""Attention and the head's loss on CPUs in bf16 (meant for avx512_bf16, AMX), where PyTorch's own are slow.

PyTorch's SDPA multiplies tiles that are too small for such a CPU, and in bf16 it is slower than in float32. Here
queries go in blocks of `QUERIES` against the keys that any of them may see (of 256 causal places 3/4 of the square, of
1,024 9/16), each as one batched product. Scores are float32 products of float32 queries and keys and the softmax is
float32; its weights and the gradients are bf16, as in FlashAttention (arXiv 2307.08691).
`head_loss` makes the gradient of the logits while they are in the cache and keeps it in bf16, in place of float32
logits, their softmax and two passes over both.

N documents of a block, L places of one, H heads, K head_dim, n slots with a target, D width, V vocabulary
"""

from __future__ import annotations

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


def _heads(x: Tensor, n: int, dtype: torch.dtype, scale: float | None = None) -> Tensor:
    """[N*L, H, K] -> contiguous [N*H, L, K] in `dtype`, times `scale`."""
    heads, head = x.shape[1:]
    out = torch.empty(n, heads, x.shape[0] // n, head, dtype=dtype)
    turned = x.view(n, -1, heads, head).transpose(1, 2)
    return (out.copy_(turned) if scale is None else torch.mul(turned, scale, out=out)).flatten(0, 1)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, n: int, keys: tuple[int, ...]
    ) -> Tensor:
        slots, heads, head = q.shape
        length = slots // n
        low = torch.bfloat16
        scale = head**-0.5
        scaled, k_, v_ = _heads(q, n, torch.float32, scale), _heads(k, n, torch.float32), _heads(v, n, low)
        kept, outs = [], []
        for at, end in zip(range(0, length, QUERIES), keys, strict=True):
            to = min(length, at + QUERIES)
            scores = torch.bmm(scaled[:, at:to], k_[:, :end].mT)
            if mask is not None:
                scores.view(n, heads, to - at, end).add_(mask[..., at:to, :end])
            weights = torch.softmax(scores, -1).to(low)
            outs.append(torch.bmm(weights, v_[:, :end]))
            kept.append(weights)
        out = outs[0] if len(outs) == 1 else torch.cat(outs, 1)
        ctx.save_for_backward(scaled.to(low), torch.mul(k_, scale, out=torch.empty_like(k_, dtype=low)), v_, *kept)
        ctx.n, ctx.keys = n, keys
        return out.view(n, heads, length, head).transpose(1, 2).reshape(slots, heads * head)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scaled, k, v, *kept = ctx.saved_tensors
        n, length, head = ctx.n, scaled.shape[1], scaled.shape[2]
        heads = scaled.shape[0] // n
        grad_o = _heads(grad.view(n * length, heads, head), n, v.dtype)
        if len(kept) == 1 and ctx.keys[0] == length:
            grad_q, grad_k, grad_v = _gradients(grad_o, scaled, k, v, kept[0])
        else:
            grad_q, grad_k, grad_v = torch.empty_like(scaled), torch.zeros(k.shape), torch.zeros(k.shape)
            for at, end, weights in zip(range(0, length, QUERIES), ctx.keys, kept, strict=True):
                rows = slice(at, min(length, at + QUERIES))
                grads = _gradients(grad_o[:, rows], scaled[:, rows], k[:, :end], v[:, :end], weights)
                grad_q[:, rows] = grads[0]
                grad_k[:, :end] += grads[1]
                grad_v[:, :end] += grads[2]

        def back(x: Tensor) -> Tensor:
            out = torch.empty(n, length, heads, head)
            return out.copy_(x.view(n, heads, length, head).transpose(1, 2)).view(-1, heads, head)

        return back(grad_q), back(grad_k), back(grad_v), None, None, None


def _gradients(
    grad_o: Tensor, scaled: Tensor, k: Tensor, v: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the queries, and of the keys and values through these queries, all in bf16."""
    grad_w = torch.bmm(grad_o, v.mT)
    grad_s = torch.ops.aten._softmax_backward_data(grad_w, weights, -1, weights.dtype)
    return torch.bmm(grad_s, k), torch.bmm(grad_s.mT, scaled), torch.bmm(weights.mT, grad_o)


def attention(q: Tensor, k: Tensor, v: Tensor, n: int, mask: Tensor | None, keys: tuple[int, ...]) -> Tensor:
    """Attention of n documents of one length: float32 q, k, v [N*L, H, K] -> bf16 [N*L, H*K].

    `mask`: float32 [N or 1, 1, L, L], 0 or -inf, added to the scores; `keys`: what `seen` says of it. Every place must
    see at least one.
    """
    with exactly(q.device):
        return _Attention.apply(q, k, v, mask, n, keys)


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
