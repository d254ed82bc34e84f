"""Hand-written gradients against autograd of the plain formulas."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from isofusion.model.attention import rope_phase
from isofusion.model.fused import _rotate, heads_of, regroup, rms_norm, swiglu


def same(one: Callable[..., Tensor], other: Callable[..., Tensor], *inputs: Tensor) -> None:
    results = []
    for function in (one, other):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = function(*leaves)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(9))
        results.append([out.detach(), *torch.autograd.grad((out * weight).sum(), leaves)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.usefixtures("kernels")
def test_rms_norm() -> None:
    def plain(x: Tensor, gain: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-2).rsqrt() * gain

    same(lambda x, g: rms_norm(x, g, 1e-2), plain, noise(11, 6), noise(6, seed=1))
    torch.testing.assert_close(rms_norm(noise(3, 8), torch.ones(8), 1e-6), F.rms_norm(noise(3, 8), (8,), eps=1e-6))


@pytest.mark.usefixtures("kernels")
def test_swiglu() -> None:
    same(swiglu, lambda x: F.silu(x[:, :5]) * x[:, 5:], noise(7, 10))


@pytest.mark.parametrize("regrouped", [False, True])
def test_heads_of(regrouped: bool) -> None:
    slots, heads, head = 5, 3, 4
    position = torch.arange(slots)
    phase = rope_phase(position, head, heads, 100.0)
    order = torch.tensor([3, 1, 4, 0, 2]) if regrouped else None
    inverse = torch.argsort(order) if order is not None else None

    def rotate(x: Tensor) -> Tensor:  # x [T, H, K]; pair j turns by position * theta^(-2j/K)
        angle = position[:, None] * 100.0 ** (-torch.arange(0, head, 2) / head)
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        even, odd = x[..., 0::2], x[..., 1::2]
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)

    def plain(qkv: Tensor, gain_q: Tensor, gain_k: Tensor) -> Tensor:
        q, k, v = qkv.view(slots, 3, heads, head).unbind(1)
        out = torch.stack(
            (rotate(F.rms_norm(q, (head,), gain_q, 1e-3)), rotate(F.rms_norm(k, (head,), gain_k, 1e-3)), v)
        )
        return out if order is None else out[:, order]

    def fused(qkv: Tensor, gain_q: Tensor, gain_k: Tensor) -> Tensor:
        return torch.stack(heads_of(qkv, gain_q, gain_k, phase, order, inverse, 1e-3, torch.float32))

    same(fused, plain, noise(slots, 3 * heads * head), noise(head, seed=1), noise(head, seed=2))


def test_rotation_is_the_same_with_and_without_complex_numbers() -> None:
    phase = rope_phase(torch.arange(6), 8, 2, 10000.0)
    x = noise(6, 4, 8)
    real = torch.view_as_real(phase)
    even, odd, cos, sin = x[..., 0::2], x[..., 1::2], real[..., 0], real[..., 1]
    for sign in (1.0, -1.0):
        pairs = torch.stack((even * cos - odd * sin * sign, odd * cos + even * sin * sign), -1)
        torch.testing.assert_close(_rotate(x, phase, sign), pairs.flatten(-2))
        torch.testing.assert_close(_rotate(x, real[:, :1], sign), pairs.flatten(-2))  # what a GPU runs
    assert _rotate(x.to("meta"), phase.to("meta"), 1.0).shape == x.shape


def test_scores_depend_on_relative_position_only() -> None:
    q, k = noise(1, 8).expand(10, 8), noise(1, 8, seed=1).expand(10, 8)
    phase = rope_phase(torch.arange(10), 8, 1, 10000.0)
    turned = _rotate(torch.stack((q, k), 1).contiguous(), phase, 1.0)
    scores = turned[:, 0] @ turned[:, 1].T
    for offset in (-3, 0, 4):
        diagonal = scores.diagonal(offset)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-4)
    assert (scores[0, 1:] - scores[0, 0]).abs().min() > 1e-3


def test_regroup_gathers_both_ways() -> None:
    order = torch.tensor([2, 0, 3, 1])
    same(lambda x: regroup(x, order, torch.argsort(order)), lambda x: x[order], noise(4, 3))
