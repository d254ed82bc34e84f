"""Half a block in one operation against its parts, one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from isofusion.config import ModelConfig
from isofusion.model import halves, native
from isofusion.model.attention import NativePlan, rope_phase
from isofusion.model.block import Block
from isofusion.model.experts import SlotPlan
from isofusion.train.memory import peak_bytes

pytestmark = pytest.mark.skipif(not native.multiplies(), reason="no avx512_bf16, or no C++ compiler")
CONFIG = ModelConfig(width=32, depth=1, head_dim=8, ffn_multiple=16, vocab_size=64, patch_size=2)


def block(experts: int = 0) -> Block:
    cfg = CONFIG if not experts else CONFIG.model_copy(update={"n_experts": experts})
    made = Block(cfg, cfg.width, cfg.head_dim, experts > 0)
    random = torch.Generator().manual_seed(1)
    for parameter in made.parameters():
        matrix = parameter.dim() > 1
        nn.init.normal_(parameter, 0.0 if matrix else 1.0, 0.2 if matrix else 0.1, generator=random)
    return made


def plan() -> NativePlan:
    edges = np.array([0, 5, 75, 96])
    last = np.arange(96)
    last[20:56] = 55  # an image
    position = np.concatenate([np.arange(n) for n in np.diff(edges)])
    return NativePlan(rope_phase(torch.from_numpy(position), 8, 0, 1e4), edges, last)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def passed(made: Block, precision: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """What comes out of the block, and the gradients of its input and parameters."""
    x_TD = noise(96, 32).requires_grad_()
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        out_TD, _ = made(x_TD, plan())
    return [out_TD, *torch.autograd.grad((out_TD * noise(96, 32, seed=2)).sum(), [x_TD, *made.parameters()])]


def test_halves_are_as_close_to_float32_as_the_parts_of_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    made = block()
    exact, halved = passed(made, torch.float32), passed(made)
    monkeypatch.setattr(halves, "fit", lambda *inputs: False)
    apart = passed(made)
    assert halved[0].dtype == torch.float32
    assert not torch.equal(halved[0], apart[0])  # or both took one way

    def error(found: Tensor, wanted: Tensor) -> float:
        return float((found - wanted).detach().norm() / wanted.detach().norm())

    for ours, parts, wanted in zip(halved, apart, exact, strict=True):
        assert error(ours, wanted) < min(0.015, 1.3 * error(parts, wanted))


def test_halves_let_go_of_what_they_make_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a node of the graph saves and gives lives until it ends, that of two products here: 1.25 times what the
    parts hold at once. With the gradients between the products it would be 1.5 times.
    """
    made = block()

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            out_TD, _ = made(noise(96, 32).requires_grad_(), plan())
        out_TD.sum().backward()

    peaks = []
    for fit in (halves.fit, lambda *inputs: False):
        monkeypatch.setattr(halves, "fit", fit)
        step()  # gradients are there from here on
        peaks.append(peak_bytes(step))
    assert peaks[0] < 1.35 * peaks[1]


def test_what_the_products_add_to_the_residual_stream_is_not_rounded() -> None:
    """A sum in float32 keeps what bf16 would lose beside a large residual."""
    x, weight = torch.full((7, 4), 0.5).bfloat16(), torch.full((6, 4), 2.0**-9)
    plus = torch.full((7, 6), 1.0)
    assert torch.equal(native.linear_plus(x, weight, plus), torch.full((7, 6), 1 + 2.0**-8))
    x, weight, plus = noise(300, 70).bfloat16(), noise(90, 70, seed=1), noise(300, 90, seed=2)
    exact = plus.double() + x.double() @ weight.bfloat16().double().T
    assert float((native.linear_plus(x, weight, plus) - exact).abs().max() / exact.abs().max()) < 1e-6


def test_a_gradient_that_arrives_beside_the_norm_is_added() -> None:
    grad, x, gain, plus = noise(40, 24), noise(40, 24, seed=1), noise(24, seed=2), noise(40, 24, seed=3)
    scale = x.square().mean(-1).add(1e-6).rsqrt()
    alone, to_gain = native.rms_norm_backward(grad, x, gain, scale)
    beside, same = native.rms_norm_backward(grad, x, gain, scale, plus)
    torch.testing.assert_close(beside, alone + plus)
    assert torch.equal(to_gain, same)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_float32_rows_in_bf16_training_take_halves(dtype: torch.dtype) -> None:
    weight = noise(8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert halves.fit(noise(4, 8).to(dtype), weight) == (dtype == torch.float32)
        assert not halves.fit(noise(4, 8), weight, noise(7, 8))  # an odd size is not paired
        assert not halves.fit(noise(4, 8), weight.double())
    assert not halves.fit(noise(4, 8), weight)


def test_experts_follow_half_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their half is made of parts, attention's is not."""
    called = []
    half = halves.attention_half
    monkeypatch.setattr(halves, "attention_half", lambda *inputs: called.append(1) or half(*inputs))
    ones = torch.ones(96, dtype=torch.bool)
    slots = SlotPlan(torch.zeros(96, dtype=torch.int64), ones, 96)
    with torch.autocast("cpu", torch.bfloat16):
        out_TD, routed = block(4)(noise(96, 32), plan(), slots)
    assert called == [1]
    assert routed is not None
    assert out_TD.isfinite().all()
