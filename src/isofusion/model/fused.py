"""Hand-written forward and backward of the element-wise parts of a block: RMSNorm, QK-norm + RoPE, SwiGLU, permutation.

At the widths of the miniature studies (16-128 features) a block's matrix products take less time than its element-wise
operations, so their number is what sets tokens/s on a CPU. Each function below replaces 5-15 recorded operations by
the passes it really needs. Inside torch.compile they are the plain formulas: there the compiler fuses, and decides what
to keep for the backward pass. Maths: RMSNorm (arXiv 1910.07467), SwiGLU (arXiv 2002.05202), RoPE (arXiv 2104.09864,
adjacent features form a pair, so that a rotation is one complex product).

T slots, D width, H heads, K head_dim, F feed-forward hidden
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def compute_dtype(device: torch.device) -> torch.dtype:
    """The precision matrix products run in: autocast's where it is on, else float32."""
    kind = device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return torch.float32


def exactly(device: torch.device) -> AbstractContextManager:
    """No autocast on this kind of device: the operations inside run in the precision of their inputs."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, gain_D: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        width = x_TD.shape[-1]
        inverse_T1 = torch.linalg.vector_norm(x_TD, dim=-1, keepdim=True).square_().div_(width).add_(eps).rsqrt_()
        unit_TD = x_TD * inverse_T1
        ctx.save_for_backward(unit_TD, inverse_T1, gain_D)
        return torch.mul(unit_TD, gain_D, out=torch.empty_like(unit_TD, dtype=dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        unit_TD, inverse_T1, gain_D = ctx.saved_tensors
        grad_TD = grad_TD.float()
        product_TD = grad_TD * unit_TD
        along_T1 = (product_TD @ gain_D).div_(-unit_TD.shape[-1]).unsqueeze(-1)
        grad_x_TD = (grad_TD * gain_D).addcmul_(unit_TD, along_T1).mul_(inverse_T1)
        return grad_x_TD, product_TD.sum(0), None, None


def rms_norm(x_TD: Tensor, gain_D: Tensor, eps: float) -> Tensor:
    """`gain * x / sqrt(mean(x^2) + eps)` of float32 x, written in the precision of the product that follows."""
    dtype = compute_dtype(x_TD.device)
    if torch.compiler.is_compiling():
        return _normalised(x_TD, gain_D, eps).to(dtype)
    return _RMSNorm.apply(x_TD, gain_D, eps, dtype)


def _normalised(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * gain


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up_TF: Tensor) -> Tensor:
        gate, up = gate_up_TF.chunk(2, dim=-1)
        silu = torch.nn.functional.silu(gate)
        # on a CPU the exponential costs more than the memory; on a GPU it is the other way round
        ctx.save_for_backward(gate_up_TF, silu if gate.device.type == "cpu" else None)
        return silu * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TF: Tensor) -> Tensor:
        gate_up_TF, silu = ctx.saved_tensors
        gate, up = gate_up_TF.chunk(2, dim=-1)
        grad = torch.empty_like(gate_up_TF)
        grad_gate, grad_up = grad.chunk(2, dim=-1)
        torch.mul(grad_TF, torch.nn.functional.silu(gate) if silu is None else silu, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad_TF * up, gate, grad_input=grad_gate)
        return grad


def swiglu(gate_up_TF: Tensor) -> Tensor:
    """`silu(gate) * up` of [T, 2F] holding the gate, then the up projection -> [T, F]."""
    if torch.compiler.is_compiling():
        gate, up = gate_up_TF.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up
    return _SwiGLU.apply(gate_up_TF)


def _rotate(x_THK: Tensor, phase: Tensor, sign: float) -> Tensor:
    """Turn each pair of adjacent features by `sign` times its angle; float32. `phase`: see `attention.rope_phase`."""
    if phase.is_complex():
        turn = phase if sign > 0 else phase.conj()
        return torch.view_as_real(torch.view_as_complex(x_THK.unflatten(-1, (-1, 2))) * turn).flatten(-2)
    cos, sin = phase.unbind(-1)
    even, odd = x_THK.unflatten(-1, (-1, 2)).unbind(-1)
    sin = sin * sign
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2)


def _normalise_and_turn(
    qkv: Tensor, gain_q: Tensor, gain_k: Tensor, phase: Tensor, eps: float
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """q and k of a projection [T, 3D], normalised and rotated: float32 [T, 2H, K], and what `_turn_back` needs."""
    head = gain_q.shape[0]
    slots, heads = qkv.shape[0], qkv.shape[1] // (3 * head)
    qk = qkv[:, : 2 * heads * head].float().unflatten(-1, (2 * heads, head))
    scale = torch.linalg.vector_norm(qk, dim=-1, keepdim=True).square_().div_(head).add_(eps).rsqrt_()
    unit = qk * scale
    gain = torch.cat((gain_q.repeat(heads), gain_k.repeat(heads)))
    return _rotate((unit.flatten(1) * gain).view(slots, 2 * heads, head), phase, 1.0), (unit, scale, gain)


def _turn_back(grad: Tensor, saved: Sequence[Tensor], phase: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """From the gradient of the rotated q and k, [T, 2H, K]: of what was projected, float32, and of the two gains."""
    unit, scale, gain = saved
    _, twice, head = unit.shape
    grad = _rotate(grad.float(), phase, -1.0)
    product = grad * unit
    of_q, of_k = product.sum(0).view(2, twice // 2, head).sum(1)
    weight = gain.view(twice, head)
    along = (product.mul_(weight)).sum(-1, keepdim=True).div_(-head)
    return (grad * weight).addcmul_(unit, along).mul_(scale), (of_q, of_k)


def _joined(grad_qk: Tensor, grad_v: Tensor, dtype: torch.dtype) -> Tensor:
    """[T, 2H, K] and [T, H, K] -> the gradient of the fused projection, [T, 3D]."""
    slots, heads, head = grad_v.shape
    split = 2 * heads * head
    grad_qkv = torch.empty(slots, 3 * heads * head, dtype=dtype, device=grad_qk.device)
    grad_qkv[:, :split] = grad_qk.flatten(1)
    grad_qkv[:, split:] = grad_v.flatten(1)
    return grad_qkv


class _HeadsOf(torch.autograd.Function):
    """[T, 3D] of the fused projection -> normalised, rotated, regrouped q, k and regrouped v, each [T', H, K]."""

    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        gain_q: Tensor,
        gain_k: Tensor,
        phase: Tensor,
        gather: Tensor | None,
        inverse: Tensor | None,
        eps: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor]:
        turned, saved = _normalise_and_turn(qkv, gain_q, gain_k, phase, eps)
        heads, head = turned.shape[1] // 2, turned.shape[2]
        turned = turned.to(dtype)
        value = qkv[:, 2 * heads * head :].unflatten(-1, (heads, head)).to(dtype)
        parts = (turned[:, :heads], turned[:, heads:], value)
        ctx.save_for_backward(*saved, phase, inverse)
        ctx.dtype = qkv.dtype
        if gather is None:
            return tuple(part.contiguous() for part in parts)  # type: ignore[return-value]
        return tuple(part.index_select(0, gather) for part in parts)  # type: ignore[return-value]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *saved, phase, inverse = ctx.saved_tensors
        if inverse is not None:
            grads = tuple(grad.index_select(0, inverse) for grad in grads)
        grad_q, grad_k, grad_v = grads
        grad_qk, of_gains = _turn_back(torch.cat((grad_q, grad_k), 1), saved, phase)
        return _joined(grad_qk, grad_v, ctx.dtype), *of_gains, None, None, None, None, None


class _RowsOf(torch.autograd.Function):
    """The same, but each head's row is gathered by itself, and v keeps its precision: [R, K]."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, gain_q: Tensor, gain_k: Tensor, phase: Tensor, take: Tensor, give: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        turned, saved = _normalise_and_turn(qkv, gain_q, gain_k, phase, eps)
        heads, head = turned.shape[1] // 2, turned.shape[2]
        ctx.save_for_backward(*saved, phase, give)
        slot, turned = take // heads, turned.view(-1, head)
        at_q, at_v = take + slot * heads, take + slot * (2 * heads) + 2 * heads
        q, k = turned.index_select(0, at_q), turned.index_select(0, at_q + heads)
        return q, k, qkv.view(-1, head).index_select(0, at_v)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *saved, phase, give = ctx.saved_tensors
        slots, head = saved[0].shape[0], saved[0].shape[2]
        grad_q, grad_k, grad_v = (grad.index_select(0, give).view(slots, -1, head) for grad in grads)
        grad_qk, of_gains = _turn_back(torch.cat((grad_q, grad_k), 1), saved, phase)
        return _joined(grad_qk, grad_v, grad_v.dtype), *of_gains, None, None, None, None


def heads_of(
    qkv: Tensor,
    gain_q: Tensor,
    gain_k: Tensor,
    phase: Tensor,
    gather: Tensor | None,
    inverse: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """QK-norm per head and RoPE on a fused projection; see `attention.AttentionPlan` for the two index vectors.

    qkv [T, 3D] (q, k, v, head after head), gains [K], phase complex [T, 2H, K/2] (or broadcastable; off the CPU also
    float32 [T, 1, K/2, 2] of cosine and sine).
    Returns q, k, v of shape [T', H, K] in `dtype`; T' = len(gather), or T where there is none. `inverse` must point
    every slot to its own place in `gather`: rows that `gather` merely repeats are dropped by the gradient.
    """
    if not torch.compiler.is_compiling():
        return _HeadsOf.apply(qkv, gain_q, gain_k, phase, gather, inverse, eps, dtype)
    parts = _formula(qkv, gain_q, gain_k, phase, eps)
    if gather is None:
        return tuple(part.to(dtype) for part in parts)  # type: ignore[return-value]
    assert inverse is not None
    return tuple(regroup(part.to(dtype), gather, inverse) for part in parts)  # type: ignore[return-value]


def rows_of(
    qkv: Tensor, gain_q: Tensor, gain_k: Tensor, phase: Tensor, take: Tensor, give: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The same for `bf16.Rows`: rows of single heads, float32 q and k and v as projected, each [R, K]."""
    if not torch.compiler.is_compiling():
        return _RowsOf.apply(qkv, gain_q, gain_k, phase, take, give, eps)
    return tuple(regroup(x.flatten(0, 1), take, give) for x in _formula(qkv, gain_q, gain_k, phase, eps))  # type: ignore[return-value]


def _formula(qkv: Tensor, gain_q: Tensor, gain_k: Tensor, phase: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """What both are inside torch.compile, before rows move: [T, H, K]."""
    q, k, v = qkv.unflatten(-1, (3, -1, gain_q.shape[0])).unbind(1)
    phase = phase[:, :1]  # the same angles for every head: read once
    # complex products are no part of what a compiler fuses, and on a CPU still faster than what it makes of pairs
    return _rotate(_normalised(q, gain_q, eps), phase, 1.0), _rotate(_normalised(k, gain_k, eps), phase, 1.0), v


class _Regroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, take: Tensor, give: Tensor) -> Tensor:
        ctx.save_for_backward(give)
        return x.index_select(0, take)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad.index_select(0, ctx.saved_tensors[0]), None, None


def regroup(x: Tensor, take: Tensor, give: Tensor) -> Tensor:
    """`x[take]`, whose gradient is `grad[give]`: a gather both ways instead of a scatter.

    Right only where rows of x that `take` leaves out influence nothing but themselves (padding of a document's block).
    """
    return _Regroup.apply(x, take, give)
