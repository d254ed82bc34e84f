"""The head's loss on CPUs in bf16 (meant for avx512_bf16, AMX).

The gradient of the logits is made while they are in the cache and kept in bf16, in place of float32 logits, their
softmax and two passes over both.

n slots with a target, D width, V vocabulary
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from isofusion.model import native
from isofusion.model.fused import exactly, multiplies
from isofusion.model.memory import LOGITS, ROUND


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_nD: Tensor, weight_VD: Tensor, targets_n: Tensor) -> Tensor:
        low = torch.bfloat16
        count, vocabulary = hidden_nD.shape[0], weight_VD.shape[0]
        if multiplies(hidden_nD, weight_VD):
            hidden, nll_n = hidden_nD.to(low), torch.empty(count)
            grad_nV = native.linear(hidden, weight_VD)
            native.head_loss_(grad_nV, targets_n, nll_n)
            ctx.save_for_backward(hidden, weight_VD, grad_nV)
            return nll_n
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
        ctx.save_for_backward(hidden, weight, grad_nV)
        return nll_n[:count]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_n: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, grad_nV = ctx.saved_tensors
        count = grad_n.shape[0]
        if multiplies(hidden, weight):
            scaled = (hidden * grad_n[:, None]).to(hidden.dtype)
            grad_hidden, grad_weight = native.linear_backward(grad_nV, scaled, weight, True)
            return grad_hidden * grad_n[:, None], grad_weight, None
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
