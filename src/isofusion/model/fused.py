"""Hand-written forward and backward of what a block is made of beside products: RMSNorm, attention, SwiGLU.

At the widths of the miniature studies (16-128 features) a block's matrix products take less time than its element-wise
operations, so their number is what sets tokens/s on a CPU. There `native.py` runs each in one pass; where it cannot be
had, the functions below take the passes that PyTorch's operations need, and inside torch.compile they are the plain
formulas: there the compiler fuses, and decides what to keep for the backward pass. Maths: RMSNorm (arXiv 1910.07467),
SwiGLU (arXiv 2002.05202), RoPE (arXiv 2104.09864, adjacent features form a pair, so that a rotation is one complex
product).

T slots, D width, H heads, K head_dim, F feed-forward hidden
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from isofusion.model import native


def compute_dtype(device: torch.device) -> torch.dtype:
    """The precision matrix products run in: autocast's where it is on, else float32."""
    kind = device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return torch.float32


def exactly(device: torch.device) -> AbstractContextManager:
    """No autocast on this kind of device: the operations inside run in the precision of their inputs."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def by_onednn(dtype: torch.dtype) -> bool:
    """Whether PyTorch's products go through oneDNN, which compiles a kernel for every new shape (`memory.ROUND`)."""
    return dtype == torch.bfloat16 or torch.backends.mkldnn.matmul.fp32_precision == "bf16"  # type: ignore[attr-defined]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x_TD, weight)
        return native.linear(x_TD, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor]:
        x_TD, weight = ctx.saved_tensors
        of_x = ctx.needs_input_grad[0]
        to_x, to_weight = native.linear_backward(grad, x_TD, weight, of_x)
        return to_x if of_x else None, to_weight


def multiplies(x: Tensor, weight: Tensor) -> bool:
    """Whether native.py multiplies rows in bf16 with this float32 weight: its last two sizes must be even."""
    even = weight.shape[-1] % 2 == weight.shape[-2] % 2 == 0
    return even and weight.dtype == torch.float32 and native.serves(x, weight) and native.multiplies()


def linear(x_TD: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight.T` [T, D] -> [T, out] in the precision of products; weight [out, D]."""
    fits = x_TD.dim() == 2 and x_TD.shape[1] == weight.shape[1]
    if fits and compute_dtype(x_TD.device) == torch.bfloat16 and multiplies(x_TD, weight):
        return _Linear.apply(x_TD.to(torch.bfloat16), weight)  # no copy of the weight in bf16, none of its gradient
    return torch.nn.functional.linear(x_TD, weight)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, gain_D: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        if x_TD.dtype == gain_D.dtype == torch.float32 and dtype in native.SUFFIX and native.serves(x_TD, gain_D):
            out_TD, scale_T = native.rms_norm(x_TD, gain_D, eps, dtype)
        else:
            scale_T = _scale(x_TD, eps)
            out_TD = torch.mul(x_TD * scale_T[:, None], gain_D, out=torch.empty_like(x_TD, dtype=dtype))
        ctx.save_for_backward(x_TD, scale_T, gain_D)
        return out_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, scale_T, gain_D = ctx.saved_tensors
        if native.serves(grad_TD, x_TD):
            return *native.rms_norm_backward(grad_TD, x_TD, gain_D, scale_T), None, None
        unit_TD, grad_TD = x_TD * scale_T[:, None], grad_TD.float()
        product_TD = grad_TD * unit_TD
        along_T1 = (product_TD @ gain_D).div_(-unit_TD.shape[-1]).unsqueeze(-1)
        grad_x_TD = (grad_TD * gain_D).addcmul_(unit_TD, along_T1).mul_(scale_T[:, None])
        return grad_x_TD, product_TD.sum(0), None, None


def _scale(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) over the last axis."""
    return torch.linalg.vector_norm(x, dim=-1).square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def rms_norm(x_TD: Tensor, gain_D: Tensor, eps: float) -> Tensor:
    """`gain * x / sqrt(mean(x^2) + eps)` of float32 x, written in the precision of the product that follows."""
    dtype = compute_dtype(x_TD.device)
    if torch.compiler.is_compiling() and not native.serves(x_TD):
        return _normalised(x_TD, gain_D, eps).to(dtype)
    return _RMSNorm.apply(x_TD, gain_D, eps, dtype)


def _normalised(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * gain


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up_TF: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up_TF)
        if native.serves(gate_up_TF):
            return native.swiglu(gate_up_TF)
        gate, up = gate_up_TF.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TF: Tensor) -> Tensor:
        (gate_up_TF,) = ctx.saved_tensors
        if native.serves(grad_TF, gate_up_TF):
            return native.swiglu_backward(grad_TF, gate_up_TF)
        gate, up = gate_up_TF.chunk(2, dim=-1)
        grad = torch.empty_like(gate_up_TF)
        grad_gate, grad_up = grad.chunk(2, dim=-1)
        torch.mul(grad_TF, torch.nn.functional.silu(gate), out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad_TF * up, gate, grad_input=grad_gate)
        return grad


def swiglu(gate_up_TF: Tensor) -> Tensor:
    """`silu(gate) * up` of [T, 2F] holding the gate, then the up projection -> [T, F]."""
    if torch.compiler.is_compiling() and not native.serves(gate_up_TF):
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


def _unit(qkv: Tensor, head: int, eps: float) -> tuple[Tensor, Tensor]:
    """q and k of a projection [T, 3D], normalised, float32 [T, 2H, K], and the scale of each, [T, 2H, 1]."""
    qk = qkv[:, : qkv.shape[1] // 3 * 2].float().unflatten(-1, (-1, head))
    scale = _scale(qk, eps)[..., None]
    return qk * scale, scale


def _gains(gain_q: Tensor, gain_k: Tensor, heads: int) -> Tensor:
    """[2HK]: the gain of q for each of its heads, then that of k."""
    return torch.cat((gain_q.repeat(heads), gain_k.repeat(heads)))


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
        ctx.save_for_backward(qkv, gain_q, gain_k, phase, inverse)
        ctx.eps = eps
        head = gain_q.shape[0]
        unit, _ = _unit(qkv, head, eps)
        heads = unit.shape[1] // 2
        turned = _rotate((unit.flatten(1) * _gains(gain_q, gain_k, heads)).view(unit.shape), phase, 1.0).to(dtype)
        value = qkv[:, 2 * heads * head :].unflatten(-1, (heads, head)).to(dtype)
        parts = (turned[:, :heads], turned[:, heads:], value)
        if gather is None:
            return tuple(part.contiguous() for part in parts)  # type: ignore[return-value]
        return tuple(part.index_select(0, gather) for part in parts)  # type: ignore[return-value]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        qkv, gain_q, gain_k, phase, inverse = ctx.saved_tensors
        if inverse is not None:
            grads = tuple(grad.index_select(0, inverse) for grad in grads)
        grad_q, grad_k, grad_v = grads
        _, heads, head = grad_v.shape
        unit, scale = _unit(qkv, head, ctx.eps)
        grad = _rotate(torch.cat((grad_q, grad_k), 1).float(), phase, -1.0)
        product = grad * unit
        to_q, to_k = product.sum(0).view(2, heads, head).sum(1)
        weight = _gains(gain_q, gain_k, heads).view(2 * heads, head)
        along = product.mul_(weight).sum(-1, keepdim=True).div_(-head)
        out = torch.empty_like(qkv)
        out[:, : 2 * heads * head] = (grad * weight).addcmul_(unit, along).mul_(scale).flatten(1)
        out[:, 2 * heads * head :] = grad_v.flatten(1)
        return out, to_q, to_k, None, None, None, None, None


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
    q, k, v = qkv.unflatten(-1, (3, -1, gain_q.shape[0])).unbind(1)
    phase = phase[:, :1]  # the same angles for every head: read once
    # complex products are no part of what a compiler fuses, and on a CPU still faster than what it makes of pairs
    q, k = (_rotate(_normalised(x, gain, eps), phase, 1.0) for x, gain in ((q, gain_q), (k, gain_k)))
    if gather is None:
        return q.to(dtype), k.to(dtype), v.to(dtype)
    assert inverse is not None
    return tuple(regroup(x.to(dtype), gather, inverse) for x in (q, k, v))  # type: ignore[return-value]


class _DocumentAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, gain_q: Tensor, gain_k: Tensor, phase: Tensor, edges: Tensor, last: Tensor, eps: float
    ) -> Tensor:
        out, logsumexp = native.attention(qkv, gain_q, gain_k, phase, edges, last, eps)
        ctx.save_for_backward(qkv, gain_q, gain_k, phase, edges, last, logsumexp)
        ctx.eps = eps
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *native.attention_backward(grad, *ctx.saved_tensors, ctx.eps), None, None, None, None


def document_attention(
    qkv: Tensor, gain_q: Tensor, gain_k: Tensor, phase: Tensor, edges: Tensor, last: Tensor, eps: float
) -> Tensor:
    """QK-norm, RoPE and attention of a fused projection [T, 3D] -> [T, D], by native.py alone; see `native.attention`.

    Scores, softmax and sums are float32 whatever the precision of the projection; of a bf16 one the weights and their
    gradients may be rounded to bf16 before they are multiplied. Nothing but the logsumexp is kept beside it.
    """
    return _DocumentAttention.apply(qkv, gain_q * gain_q.shape[0] ** -0.5, gain_k, phase, edges, last, eps)


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
