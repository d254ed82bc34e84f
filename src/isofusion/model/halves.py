"""Half a block as one operation: norm, product, attention or SwiGLU, product, and the sum with what came in.

On a CPU whose products are native (`native.multiplies`) a block is two of these instead of a dozen operations: sums
with the residual stream, and of the gradients that meet there, take no pass of their own, and what comes from the
second product is added in float32, not rounded first. Everything else takes the parts of block.py one by one.

T slots, D width, H heads, K head_dim, F feed-forward hidden
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from isofusion.model import native
from isofusion.model.fused import compute_dtype, multiplies

LOW = torch.bfloat16


def fit(x_TD: Tensor, *weights: Tensor) -> bool:
    """Whether a block with these weights can be computed in halves."""
    if x_TD.dtype != torch.float32 or compute_dtype(x_TD.device) != LOW:
        return False
    return all(multiplies(x_TD, weight) for weight in weights)


class _AttentionHalf(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        norm_D: Tensor,
        qkv_weight: Tensor,
        gain_q: Tensor,
        gain_k: Tensor,
        out_weight: Tensor,
        phase: Tensor,
        edges: Tensor,
        last: Tensor,
        eps: float,
    ) -> Tensor:
        gain_q = gain_q * gain_q.shape[0] ** -0.5
        normed_TD, scale_T = native.rms_norm(x_TD, norm_D, eps, LOW)
        qkv = native.linear(normed_TD, qkv_weight)
        mixed_TD, logsumexp = native.attention(qkv, gain_q, gain_k, phase, edges, last, eps)
        norm, attention = (x_TD, norm_D, scale_T), (qkv, gain_q, gain_k, phase, edges, last, logsumexp)
        ctx.save_for_backward(*norm, normed_TD, qkv_weight, mixed_TD, out_weight, *attention)
        ctx.eps = eps
        return native.linear_plus(mixed_TD, out_weight, x_TD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, norm_D, scale_T, normed_TD, qkv_weight, mixed_TD, out_weight, *attention = ctx.saved_tensors
        to_mixed, to_out_weight = native.linear_backward(grad_TD.to(LOW), mixed_TD, out_weight, True)
        to_qkv, to_gain_q, to_gain_k = native.attention_backward(to_mixed, *attention, ctx.eps)
        del to_mixed  # not kept until the last line
        to_normed, to_qkv_weight = native.linear_backward(to_qkv, normed_TD, qkv_weight, True)
        del to_qkv
        to_x, to_norm = native.rms_norm_backward(to_normed, x_TD, norm_D, scale_T, grad_TD)
        to_gain_q = to_gain_q * to_gain_q.shape[0] ** -0.5
        return to_x, to_norm, to_qkv_weight, to_gain_q, to_gain_k, to_out_weight, None, None, None, None


def attention_half(
    x_TD: Tensor,
    norm_D: Tensor,
    qkv_weight: Tensor,
    gain_q: Tensor,
    gain_k: Tensor,
    out_weight: Tensor,
    phase: Tensor,
    edges: Tensor,
    last: Tensor,
    eps: float,
) -> Tensor:
    """`x + attention(norm(x) @ qkv.T) @ out.T`, float32 [T, D]; phase, edges and last as in `native.attention`."""
    return _AttentionHalf.apply(x_TD, norm_D, qkv_weight, gain_q, gain_k, out_weight, phase, edges, last, eps)


class _FeedForwardHalf(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, norm_D: Tensor, up_weight: Tensor, down_weight: Tensor, eps: float) -> Tensor:
        normed_TD, scale_T = native.rms_norm(x_TD, norm_D, eps, LOW)
        gate_up_TF = native.linear(normed_TD, up_weight)
        hidden_TF = native.swiglu(gate_up_TF)
        ctx.save_for_backward(x_TD, norm_D, scale_T, normed_TD, up_weight, gate_up_TF, hidden_TF, down_weight)
        return native.linear_plus(hidden_TF, down_weight, x_TD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, norm_D, scale_T, normed_TD, up_weight, gate_up_TF, hidden_TF, down_weight = ctx.saved_tensors
        to_hidden, to_down = native.linear_backward(grad_TD.to(LOW), hidden_TF, down_weight, True)
        to_gate_up = native.swiglu_backward(to_hidden, gate_up_TF)
        del to_hidden  # as large as anything of a block: not kept until the last line
        to_normed, to_up = native.linear_backward(to_gate_up, normed_TD, up_weight, True)
        del to_gate_up
        to_x, to_norm = native.rms_norm_backward(to_normed, x_TD, norm_D, scale_T, grad_TD)
        return to_x, to_norm, to_up, to_down, None


def feed_forward_half(x_TD: Tensor, norm_D: Tensor, up_weight: Tensor, down_weight: Tensor, eps: float) -> Tensor:
    """`x + swiglu(norm(x) @ up.T) @ down.T`, float32 [T, D]; up [2F, D] (gate, then up), down [D, F]."""
    return _FeedForwardHalf.apply(x_TD, norm_D, up_weight, down_weight, eps)
