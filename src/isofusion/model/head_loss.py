"""The head's loss in bf16.

The gradient of the logits is made in place of them and kept in bf16: float32 logits, their softmax, passes over both
and, on a GPU, a second product of the same logits in the backward pass are not needed.

n slots with a target, D width, V vocabulary
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from isofusion.model import native
from isofusion.model.fused import exactly, multiplies
from isofusion.model.memory import LOGITS, LOGITS_GPU, ROUND

Kept = tuple[Tensor, Tensor, Tensor, Tensor]
"""Hidden states (with filler), the weight, the gradient of the logits (bf16), and the losses (float32, without it)."""


def _by_kernels(hidden_nD: Tensor, weight_VD: Tensor, targets_n: Tensor, compiled: bool) -> Kept:
    hidden, nll_n = hidden_nD.bfloat16(), torch.empty(hidden_nD.shape[0])
    grad_nV = native.linear(hidden, weight_VD)
    native.head_loss_(grad_nV, targets_n, nll_n)
    return hidden, weight_VD, grad_nV, nll_n


def _by_pieces(hidden_nD: Tensor, weight_VD: Tensor, targets_n: Tensor, compiled: bool) -> Kept:
    """On a CPU: a piece of the logits is in the cache from its product to its gradient."""
    count, vocabulary, low = hidden_nD.shape[0], weight_VD.shape[0], torch.bfloat16
    filler = -count % ROUND  # rows of zeros with target 0, whose loss has no weight
    hidden, weight = F.pad(hidden_nD.to(low), (0, 0, 0, filler)), weight_VD.to(low)
    targets_n = F.pad(targets_n, (0, filler))
    n = count + filler
    nll_n = torch.empty(n)
    grad_nV = torch.empty(n, vocabulary, dtype=low)
    step = max(1, LOGITS // vocabulary)
    for at in range(0, n, step):
        rows = slice(at, at + step)
        if native.serves(grad_nV):
            torch.mm(hidden[rows], weight.T, out=grad_nV[rows])
            native.head_loss_(grad_nV[rows], targets_n[rows], nll_n[rows])
            continue
        logits = (hidden[rows] @ weight.T).float()
        target = targets_n[rows, None]
        own = logits.gather(1, target).squeeze(1)
        top = logits.amax(1)
        share = torch.softmax(logits, 1)
        # the largest share is 1 / sum(exp(logits - top)): no second exponential
        torch.sub(top, own, out=nll_n[rows]).sub_(share.amax(1).log_())
        grad_nV[rows] = share.scatter_add_(1, target, torch.full(target.shape, -1.0))
    return hidden, weight, grad_nV, nll_n[:count]


def _at_once(hidden_nD: Tensor, weight_VD: Tensor, targets_n: Tensor, compiled: bool) -> Kept:
    """On a GPU: one product, then one kernel in place of the logits (not compiled: pieces of LOGITS_GPU)."""
    hidden, weight = hidden_nD.bfloat16(), weight_VD.bfloat16()
    grad_nV = hidden @ weight.T
    if compiled:
        return hidden, weight, grad_nV, _compiled()(grad_nV, targets_n)
    step = max(1, LOGITS_GPU // weight.shape[0])
    pieces = zip(grad_nV.split(step), targets_n.split(step), strict=True)
    return hidden, weight, grad_nV, torch.cat([_loss_and_gradient_(logits, targets) for logits, targets in pieces])


def _loss_and_gradient_(logits_nV: Tensor, targets_n: Tensor) -> Tensor:
    """Losses; the logits become their gradient."""
    x_nV, target_n1 = logits_nV.float(), targets_n[:, None]
    top_n1, own_n1 = x_nV.amax(1, keepdim=True), x_nV.gather(1, target_n1)
    logsumexp_n1 = (x_nV - top_n1).exp().sum(1, keepdim=True).log() + top_n1
    share_nV = (x_nV - logsumexp_n1).exp()  # not the exponentials of the sum: a compiler would write those to memory
    hot_nV = torch.arange(x_nV.shape[1], device=x_nV.device) == target_n1
    logits_nV.copy_(torch.where(hot_nV, share_nV - 1.0, share_nV))
    return (logsumexp_n1 - own_n1).squeeze(1)


@lru_cache(maxsize=1)
def _compiled() -> Callable[[Tensor, Tensor], Tensor]:
    """For any number of targets."""
    return torch.compile(_loss_and_gradient_, dynamic=True, fullgraph=True)


def _way(hidden_nD: Tensor, weight_VD: Tensor) -> Callable[[Tensor, Tensor, Tensor, bool], Kept]:
    if hidden_nD.device.type != "cpu":
        return _at_once
    return _by_kernels if multiplies(hidden_nD, weight_VD) else _by_pieces


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_nD: Tensor, weight_VD: Tensor, targets_n: Tensor, compiled: bool) -> Tensor:
        *kept, nll_n = _way(hidden_nD, weight_VD)(hidden_nD, weight_VD, targets_n, compiled)
        ctx.save_for_backward(*kept)
        return nll_n

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_n: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, grad_nV = ctx.saved_tensors
        count = grad_n.shape[0]
        if multiplies(hidden, weight):
            scaled = (hidden * grad_n[:, None]).to(hidden.dtype)
            grad_hidden, grad_weight = native.linear_backward(grad_nV, scaled, weight, True)
            return grad_hidden * grad_n[:, None], grad_weight, None, None
        grad_n1 = F.pad(grad_n, (0, hidden.shape[0] - count))[:, None]
        # float32: a row's factor commutes with the product
        grad_hidden = (grad_nV @ weight)[:count] * grad_n1[:count]
        grad_weight = grad_nV.T @ (hidden * grad_n1).to(hidden.dtype)
        return grad_hidden, grad_weight.float(), None, None


def head_loss(hidden_nD: Tensor, weight_VD: Tensor, targets_n: Tensor, compiled: bool = False) -> Tensor:
    """Negative log-likelihood of `targets_n` i64 [n] under softmax(hidden @ weight.T), in nats, float32 [n].

    Products are bf16, so logits are rounded to it; loss and gradient are then computed in float32. `compiled`: on a GPU
    the kernel between the products is written by torch.compile.
    """
    with exactly(hidden_nD.device):
        return _HeadLoss.apply(hidden_nD, weight_VD, targets_n, compiled)
