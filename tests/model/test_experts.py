"""Routing and dispatch: against a loop over tokens and experts, and by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from isofusion.data.batch import PackedBatch
from isofusion.model import experts as experts_module
from isofusion.model import native
from isofusion.model.decoder import Decoder
from isofusion.model.experts import Experts, SlotPlan
from isofusion.model.init import init_weights


def layer(cfg: Any, seed: int = 0) -> Experts:
    experts = Experts(cfg)
    generator = torch.Generator().manual_seed(seed)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, 0, 0.3, generator=generator)
    return experts


def by_hand(experts: Experts, x: torch.Tensor, slots: SlotPlan) -> torch.Tensor:
    """One token and one expert at a time."""
    out = []
    for t in range(x.shape[0]):
        total = torch.zeros_like(x[0])
        if bool(slots.real_T[t]):
            allowed = torch.from_numpy(experts.mask[:, int(slots.modality_T[t])])
            logits = experts.router @ x[t] if experts.router is not None else torch.zeros(experts.n_experts)
            probability = logits.masked_fill(~allowed, float("-inf")).softmax(0)
            for e in probability.topk(experts.top_k).indices.tolist():
                gate, up = (x[t] @ experts.gate_up[e]).chunk(2)
                total = total + probability[e] * ((F.silu(gate) * up) @ experts.down[e])
        out.append(total)
    return torch.stack(out)


def undefined_behind_the_last_expert(real: Callable[..., Any]) -> Callable[..., Any]:
    """A grouped product whose rows behind the last offset are NaN, in the result and in the gradient."""

    def product(x: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
        served = (torch.arange(x.shape[0]) < offs[-1])[:, None]
        if x.requires_grad:
            x = x * 1.0
            x.register_hook(lambda grad: grad.where(served, float("nan")))
        return real(x, weight, offs=offs).where(served, float("nan"))

    return product


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("moe", {}),
        ("moe", {"top_k": 2}),
        ("moe", {"n_experts": 64}),
        ("moe", {"width": 6, "head_dim": 2, "ffn_multiple": 3}),  # widths that F.grouped_mm does not take
        ("routed", {}),
    ],
)
def test_dispatch_equals_a_loop_over_tokens_and_experts(
    kind: str,
    changes: dict,
    batch: PackedBatch,
    make_config: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    experts = layer(make_config(kind, **changes))
    slots = SlotPlan.of(batch.torch())
    fixed = replace(slots, n_real=None)  # shapes that never change, as on a GPU
    x = torch.randn(batch.n_slots, experts.down.shape[2], generator=torch.Generator().manual_seed(1))
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    monkeypatch.setattr(F, "grouped_mm", undefined_behind_the_last_expert(F.grouped_mm))
    results = []
    for run in (
        lambda v: experts(v, slots).out_TD,
        lambda v: by_hand(experts, v, slots),
        lambda v: experts(v, fixed).out_TD,
    ):
        experts.zero_grad()
        v = x.clone().requires_grad_()
        out = run(v)
        (out * weight).sum().backward()
        results.append([out.detach(), v.grad, *(p.grad.clone() for p in experts.parameters())])
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("top_k", [1, 2])
def test_dispatch_in_bf16_is_that_of_float32_within_its_rounding(
    top_k: int, batch: PackedBatch, make_config: Callable[..., Any]
) -> None:
    """Filler rows of an expert neither come out nor leave a gradient; one expert has no token at all."""
    experts = layer(make_config("moe", top_k=top_k))
    slots = SlotPlan.of(batch.torch())
    x = torch.randn(batch.n_slots, experts.down.shape[2], generator=torch.Generator().manual_seed(1))
    x[:, 0] = 1.0
    assert experts.router is not None
    with torch.no_grad():
        experts.router[2, 0] = -1000.0
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    results = []
    for low in (True, False):
        experts.zero_grad()
        v = x.bfloat16().float().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            output = experts(v, slots)
        (output.out_TD * weight).sum().backward()
        assert output.counts_ME.sum(0)[2] == 0
        results.append([output.out_TD.detach(), v.grad, *(p.grad.clone() for p in experts.parameters())])
    for ours, exact in zip(*results, strict=True):
        assert (ours - exact).norm() < 0.01 * exact.norm()
    *_, gate_up, down = results[0][:4]
    assert not gate_up[2].any()
    assert not down[2].any()


def test_balance_loss_of_a_hand_computed_case(make_config: Callable[..., Any]) -> None:
    experts = Experts(make_config("moe", n_experts=2))
    slots = SlotPlan(torch.tensor([0, 1, 0, 0]), torch.tensor([True, True, True, False]), 3)  # text and image alike
    probability = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.0, 1.0]])  # the last slot is padding
    counts = experts._count(probability.argmax(-1, keepdim=True), slots)
    assert counts.tolist() == [[1, 1], [1, 0]]
    # f = (2/3, 1/3), P = (1.7/3, 1.3/3): 2 * (2/3 * 1.7/3 + 1/3 * 1.3/3)
    balance = experts.balance(experts._probability(probability, slots), counts)
    assert float(balance) == pytest.approx(2 * (3.4 + 1.3) / 9)


def test_balance_loss_is_one_when_even_and_zero_when_nothing_can_be_balanced(
    batch: PackedBatch, make_config: Callable[..., Any]
) -> None:
    cfg = make_config("routed")
    model = Decoder(cfg)
    init_weights(model, cfg, 0)
    assert float(model(batch.torch()).balance_loss) == 0.0
    experts = Experts(make_config("moe"))
    slots = SlotPlan(torch.zeros(4, dtype=torch.long), torch.ones(4, dtype=torch.bool), 4)
    counts = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]])
    sums = experts._probability(torch.full((4, 4), 0.25), slots)
    assert float(experts.balance(sums, counts)) == pytest.approx(1.0)


@pytest.mark.parametrize("depth", [1, 3])
def test_balance_loss_is_the_mean_over_layers(depth: int, batch: PackedBatch, make_config: Callable[..., Any]) -> None:
    """A router of zeros gives every expert 1 / E: E * sum_e f_e / E = 1 in each layer, wherever the tokens go."""
    cfg = make_config("moe", depth=depth)
    model = Decoder(cfg)
    init_weights(model, cfg, 0)
    for block in model.blocks:
        torch.nn.init.zeros_(block.experts.router)
    with torch.no_grad():
        output = model(batch.torch())
    assert float(output.balance_loss) == pytest.approx(1.0)
    assert float(model.balance_loss(output, output.routing)) == pytest.approx(1.0)


def test_the_router_learns_from_the_task_at_top_1(batch: PackedBatch, make_config: Callable[..., Any]) -> None:
    cfg = make_config("moe", top_k=1)
    model = Decoder(cfg)
    init_weights(model, cfg, 0)
    nll, _ = model.token_losses(batch.torch())
    nll.sum().backward()  # the balance loss is left out
    for block in model.blocks:
        assert block.experts.router.grad.abs().max() > 1e-6


@pytest.mark.parametrize("top_k", [1, 2])
def test_routing_counts_exclude_padding(top_k: int, batch: PackedBatch, make_config: Callable[..., Any]) -> None:
    cfg = make_config("moe", top_k=top_k)
    model = Decoder(cfg)
    init_weights(model, cfg, 0)
    routing = model(batch.torch()).routing
    assert routing.shape == (2, 2, 4)
    text = int(((batch.modality == 0) & (batch.doc_id >= 0)).sum())
    image = int((batch.modality == 1).sum())
    assert routing.sum(-1).tolist() == [[top_k * text, top_k * image]] * 2
    assert text < batch.n_slots - image  # there is padding to exclude


def test_modality_routed_sends_each_modality_to_its_expert_with_gate_one(
    batch: PackedBatch, make_config: Callable[..., Any]
) -> None:
    experts = layer(make_config("routed"))
    slots = SlotPlan.of(batch.torch())
    x = torch.randn(batch.n_slots, 16)
    assert experts.router is None
    expected = np.eye(2)[batch.modality]
    np.testing.assert_array_equal(experts.route(x, slots).numpy(), expected)
    counts = experts(x, slots).counts_ME
    assert counts[0, 1] == counts[1, 0] == 0
    assert counts[1, 1] == (batch.modality == 1).sum()


@pytest.mark.skipif(not native.available(), reason=f"kernels: {native.describe()}")
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("filled", [False, True])
@pytest.mark.parametrize("low", [False, True])
def test_kernels_change_nothing_but_the_rounding(
    low: bool, filled: bool, top_k: int, make_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32 and bf16, with rows that are filled up to sixteens and without; a fifth of the slots is padding."""
    monkeypatch.setattr(experts_module, "by_onednn", lambda dtype: filled)
    make = torch.Generator().manual_seed(5)
    real = torch.rand(300, generator=make) < 0.8
    slots = SlotPlan(torch.randint(2, (300,), generator=make), real, int(real.sum()))
    x = torch.randn(300, 16, generator=make)
    results, counts = [], []
    for kernels in (False, True):
        monkeypatch.setattr(native, "available", lambda on=kernels: on)
        experts, leaf = (
            layer(make_config("moe", top_k=top_k)),
            x.to(torch.bfloat16 if low else x.dtype).requires_grad_(),
        )
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            routed = experts(leaf, slots)
        (routed.out_TD * x).sum().backward()
        gradients = [leaf.grad, *(p.grad for p in experts.parameters())]
        results.append([routed.out_TD.detach(), routed.probability_E.detach(), *gradients])
        assert not routed.out_TD[~real].any()
        counts.append(routed.counts_ME)
    assert torch.equal(*counts)
    for one, other in zip(*results, strict=True):
        limit = (0.02 if low else 1e-5) * float(one.float().abs().max())
        assert (one.float() - other.float()).abs().max() <= limit
