"""The numbers of the kernels in C++: against the formulas, at the edges, and that none depends on chance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, library
from torch.nn import functional as F

from isofusion.data.batch import PackedBatch
from isofusion.model import native
from isofusion.model.attention import NativePlan, image_plan, may_attend, rope_phase
from isofusion.model.fused import document_attention

needs_native = pytest.mark.skipif(not native.available(), reason=f"kernels: {native.describe()}")
EPS = 1e-6


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# attention


def plan_of(lengths: list[int], images: dict[int, int], head: int) -> NativePlan:
    """Documents of these lengths; `images`: first slot -> number of patches."""
    edges = np.concatenate([[0], np.cumsum(lengths)])
    last = np.arange(edges[-1])
    for start, patches in images.items():
        last[start : start + patches] = start + patches - 1
    position = np.concatenate([np.arange(n) for n in lengths])
    return NativePlan(rope_phase(torch.from_numpy(position), head, 0, 1e4), edges, last)


def by_hand(qkv: Tensor, gain_q: Tensor, gain_k: Tensor, plan: NativePlan) -> Tensor:
    """The formulas on one dense matrix of all slots, in the precision of `qkv`."""
    slots, head = qkv.shape[0], gain_q.shape[0]
    q, k, v = qkv.view(slots, 3, -1, head).unbind(1)
    phase = plan.phase.to(torch.complex128 if qkv.dtype == torch.float64 else torch.complex64)

    def turned(x: Tensor, gain: Tensor) -> Tensor:
        x = F.rms_norm(x, (head,), gain, EPS)
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * phase).flatten(-2)

    first = torch.repeat_interleave(plan.edges[:-1], plan.edges.diff())
    slot = torch.arange(slots)
    seen = (slot >= first[:, None]) & (slot <= plan.last[:, None])
    scores = torch.einsum("qhk,shk->hqs", turned(q, gain_q), turned(k, gain_k)) * head**-0.5
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("hqs,shk->qhk", weights, v).flatten(1)


@needs_native
@pytest.mark.parametrize("head", [2, 8, 12, 16, 24, 64, 80, 128])  # spelled out and not, whole vectors and not
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_and_its_gradient_are_those_of_the_formulas(head: int, dtype: torch.dtype) -> None:
    plan = plan_of([1, 37, 5, 70, 16], {1: 4, 20: 9, 60: 30}, head)
    qkv = noise(129, 3 * 2 * head, dtype=dtype).requires_grad_()
    gains = [(1 + 0.3 * noise(head, seed=seed)).requires_grad_() for seed in (1, 2)]
    out = document_attention(qkv, *gains, plan.phase, plan.edges, plan.last, EPS)
    assert out.dtype == dtype
    exact = [x.detach().double().requires_grad_() for x in (qkv, *gains)]
    wanted = by_hand(*exact, plan)
    weight = noise(*out.shape, seed=3, dtype=dtype)
    pairs = zip(
        [out, *torch.autograd.grad(out, (qkv, *gains), weight)],
        [wanted, *torch.autograd.grad(wanted, exact, weight.double())],
        strict=True,
    )
    for ours, theirs in pairs:
        error = (ours.detach().double() - theirs.detach()).abs().max() / theirs.detach().abs().max()
        assert error < (3e-6 if dtype == torch.float32 else 0.005)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_logsumexp_of_any_height_of_scores(dtype: torch.dtype) -> None:
    """Both passes use it: one shift of it would make every weight of the backward pass wrong."""
    plan, head = plan_of([1, 9, 40, 78], {}, 8), 8
    for height in (1e-3, 1.0, 60.0):
        qkv, gain = noise(128, 3 * head, dtype=dtype), torch.full((head,), height)
        _, logsumexp = native.attention(qkv, gain, torch.ones(head), plan.phase, plan.edges, plan.last, EPS)
        exact = qkv.double().view(128, 3, head)
        q, k = (F.rms_norm(exact[:, i], (head,), eps=EPS) for i in (0, 1))
        turned = [
            torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * plan.phase[:, 0]).flatten(-2)
            for x in (q, k)
        ]
        scores = height * turned[0] @ turned[1].T
        first = torch.repeat_interleave(plan.edges[:-1], plan.edges.diff())
        slot = torch.arange(128)
        wanted = scores.masked_fill((slot < first[:, None]) | (slot > plan.last[:, None]), float("-inf")).logsumexp(-1)
        torch.testing.assert_close(logsumexp[:, 0].double(), wanted, rtol=2e-6, atol=1e-5)


@needs_native
def test_scores_are_not_rounded_in_bf16() -> None:
    """One key is ahead of another by less than bf16 tells apart at that height (128 and 128.1: steps of 1)."""
    plan = plan_of([2], {}, 2)
    turn = torch.tensor([0.0, 0.04])  # of the second slot: cos 0.0400 = 0.9992
    plan.phase = torch.polar(torch.ones(2), turn).view(2, 1, 1)
    qkv = torch.tensor([[1.0, 0.0, 1.0, 0.0, 0.0, 0.0], [1.0, 0.0, 1.0, 0.0, 1.0, 1.0]]).bfloat16()
    gain = torch.full((2,), 8.0)
    out = document_attention(qkv, gain, gain, plan.phase, plan.edges, plan.last, EPS)
    height = 8 * 8 * 2 * 2**-0.5
    ahead = height * (1 - np.cos(0.04))
    assert 0.05 < ahead < 0.1
    assert float(out[1, 0]) == pytest.approx(1 / (1 + np.exp(-ahead)), abs=0.003)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head", [6, 8, 12, 80])
def test_a_document_leaves_nothing_behind_for_the_next(head: int, dtype: torch.dtype) -> None:
    """One thread's space is used again for every document: numbers that are none must stay where they were. Lengths
    around blocks of 6 queries, vectors of 16 keys and sums of 24 queries; a document may be empty.
    """
    lengths = [300, 0, 1, 5, 6, 7, 15, 16, 17, 23, 24, 25, 47, 48, 49]
    plan, slots = plan_of(lengths, {}, head), sum(lengths)
    gains, weight = [torch.ones(head)] * 2, noise(slots, head, seed=3, dtype=dtype)
    results, before = [], torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        for bad in (None, float("nan"), float("inf")):
            qkv = noise(slots, 3 * head, dtype=dtype)
            if bad is not None:
                qkv[:300] = bad
            qkv.requires_grad_()
            out = document_attention(qkv, *gains, plan.phase, plan.edges, plan.last, EPS)
            results.append((out.detach()[300:], torch.autograd.grad(out, qkv, weight)[0][300:]))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    exact = qkv.detach()[300:].double()
    alone = plan_of(lengths[1:], {}, head)
    wanted = by_hand(exact, *(gain.double() for gain in gains), alone)
    error = (results[0][0].double() - wanted).abs().max() / wanted.abs().max()
    assert error < (3e-6 if dtype == torch.float32 else 0.007)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_is_equal_to_the_bit_on_any_number_of_threads(dtype: torch.dtype) -> None:
    plan, head = plan_of([3, 300, 41, 90, 1, 200], {10: 36}, 16), 16
    qkv = noise(635, 3 * 4 * head, dtype=dtype).requires_grad_()
    gains = [(1 + 0.3 * noise(head, seed=seed)).requires_grad_() for seed in (1, 2)]
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            out = document_attention(qkv, *gains, plan.phase, plan.edges, plan.last, EPS)
            results.append([out.detach(), *torch.autograd.grad(out.float().sum(), (qkv, *gains))])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_the_plan_says_what_the_predicate_says(batch: PackedBatch, build_batch: Callable[..., PackedBatch]) -> None:
    for packed in (batch, build_batch(["........"]), build_batch(["iiiiiiii|t", "t|tiiii|..."])):
        tensors = packed.torch()
        plan = NativePlan.of(rope_phase(tensors.position, 8, 0, 1e4), tensors)
        side = {"doc": packed.doc_id, "image": packed.image_id, "slot": np.arange(packed.n_slots)}
        allowed = may_attend({n: v[:, None] for n, v in side.items()}, {n: v[None, :] for n, v in side.items()})
        first = torch.repeat_interleave(plan.edges[:-1], plan.edges.diff()).numpy()
        slot = np.arange(packed.n_slots)
        seen = (slot >= first[:, None]) & (slot <= plan.last.numpy()[:, None])
        np.testing.assert_array_equal(seen, allowed)
        assert plan.edges[-1] == packed.n_slots


@needs_native
def test_an_image_is_a_document_whose_patches_all_see_each_other() -> None:
    plan = image_plan(2, 3, 8, 2, 1e4, torch.device("cpu"))
    assert isinstance(plan, NativePlan)
    assert plan.edges.tolist() == [0, 3, 6]
    assert plan.last.tolist() == [2, 2, 2, 5, 5, 5]
    assert torch.equal(plan.phase[:3], plan.phase[3:])
    none = image_plan(0, 3, 8, 2, 1e4, torch.device("cpu"))
    assert none.mix(torch.zeros(0, 48), torch.ones(8), torch.ones(8), EPS).shape == (0, 16)


# products


needs_products = pytest.mark.skipif(not native.multiplies(), reason="no avx512_bf16, or no C++ compiler")


def close(ours: Tensor, exact: Tensor) -> None:
    """To the rounding of bf16, or of float32 sums."""
    limit = 0.004 if ours.dtype == torch.bfloat16 else 1e-5
    assert (ours.double() - exact).abs().max() <= limit * exact.abs().max() + 1e-30


@needs_products
@pytest.mark.parametrize(
    ("slots", "inputs", "outputs"),
    [(1, 2, 2), (7, 18, 70), (96, 64, 352), (300, 176, 64), (130, 256, 4096), (129, 2, 100), (0, 8, 8)],
)
def test_a_linear_layer_and_its_gradient(slots: int, inputs: int, outputs: int) -> None:
    """Tiles and panels that are cut; (130, 256, 4096) takes the gradient of its weight the other way round."""
    x = noise(slots, inputs, dtype=torch.bfloat16)
    weight, grad = noise(outputs, inputs, seed=1), noise(slots, outputs, seed=2, dtype=torch.bfloat16)
    low = weight.bfloat16().double()
    out = native.linear(x, weight)
    to_x, to_weight = native.linear_backward(grad, x, weight, True)
    assert out.dtype == to_x.dtype == torch.bfloat16
    assert to_weight.dtype == torch.float32
    if not slots:
        assert out.shape == (0, outputs)
        assert not to_weight.any()
        return
    close(out, x.double() @ low.T)
    close(to_x, grad.double() @ low)
    close(to_weight, grad.double().T @ x.double())
    nothing, again = native.linear_backward(grad, x, weight, False)
    assert nothing.numel() == 0
    assert torch.equal(again, to_weight)


@needs_products
@pytest.mark.parametrize("sizes", [[5, 0, 1, 33], [0, 0, 0], [200, 16, 100, 3]])
def test_groups_of_rows_meet_their_own_weights(sizes: list[int]) -> None:
    x, weight = noise(sum(sizes), 24, dtype=torch.bfloat16), noise(len(sizes), 24, 40, seed=1)
    grad, edges = noise(sum(sizes), 40, seed=2, dtype=torch.bfloat16), torch.tensor([0, *sizes]).cumsum(0)
    out = native.grouped(x, weight, edges)
    to_x, to_weight = native.grouped_backward(grad, x, weight, edges)
    groups = zip(
        *(t.double().split(sizes) for t in (x, grad, out, to_x)), weight.bfloat16().double(), to_weight, strict=True
    )
    for rows, of, got, back, w, to_w in groups:
        if len(rows):
            close(got.bfloat16(), rows @ w)
            close(back.bfloat16(), of @ w.T)
            close(to_w, rows.T @ of)
        else:
            assert not to_w.any()


@needs_products
def test_products_are_equal_to_the_bit_on_any_number_of_threads() -> None:
    x, weight = noise(500, 96, dtype=torch.bfloat16), noise(160, 96, seed=1)
    grad, results, before = noise(500, 160, seed=2, dtype=torch.bfloat16), [], torch.get_num_threads()
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            results.append([native.linear(x, weight), *native.linear_backward(grad, x, weight, True)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_products
def test_large_gradients_of_weights_that_go_past_the_caches_are_the_same() -> None:
    """8 x 512 x 576 numbers are above the limit, one group of them is below."""
    sizes = [40] * 8
    x, grad = noise(320, 512, dtype=torch.bfloat16), noise(320, 576, seed=2, dtype=torch.bfloat16)
    edges = torch.tensor([0, *sizes]).cumsum(0)
    _, together = native.grouped_backward(grad, x, noise(8, 512, 576), edges)
    _, alone = native.grouped_backward(grad[:40], x[:40], noise(1, 512, 576), edges[:2])
    assert together.numel() > 2**21 > alone.numel()
    assert torch.equal(together[0], alone[0])


# experts


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_router_is_a_softmax_in_float32(dtype: torch.dtype) -> None:
    x, router, weight = noise(700, 40, dtype=dtype), noise(5, 40, seed=1), noise(700, 5, seed=2)
    share = native.route(x, router)
    leaves = [t.double().requires_grad_() for t in (x, router)]
    exact = (leaves[0] @ leaves[1].T).softmax(-1)
    torch.testing.assert_close(share.double(), exact.detach(), rtol=1e-4, atol=1e-6)
    wanted = torch.autograd.grad(exact, leaves, weight.double())
    found = native.route_backward(weight, x, router, share)
    assert found[0].dtype == dtype
    for ours, theirs in zip(found, wanted, strict=True):
        limit = 0.005 if ours.dtype == torch.bfloat16 else 1e-5
        assert (ours.double() - theirs).abs().max() <= limit * theirs.abs().max()


@needs_native
@pytest.mark.parametrize("choices", [1, 3])
def test_choices_are_sorted_by_expert_and_then_by_slot(choices: int) -> None:
    make = torch.Generator().manual_seed(3)
    expert = torch.randint(5, (40, choices), generator=make)
    expert[expert == 2] = 4  # nobody takes this one
    real, modality = torch.rand(40, generator=make) < 0.8, torch.randint(2, (40,), generator=make)
    counts, edges, order, place = native.sort_choices(expert, real, modality, 5)
    key = expert.masked_fill(~real[:, None], 5).flatten()
    rows = int(real.sum()) * choices
    assert torch.equal(order, key.argsort(stable=True)[:rows])
    assert edges.tolist() == [0, *torch.bincount(key, minlength=6)[:5].cumsum(0).tolist()]
    for m in (0, 1):
        assert torch.equal(counts[m], torch.bincount(expert[real & (modality == m)].flatten(), minlength=5))
    assert (place[~real] == -1).all()
    assert torch.equal(order[place[real].flatten()], torch.arange(40 * choices).view(40, choices)[real].flatten())


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_come_back_to_their_slots(dtype: torch.dtype) -> None:
    """Slot 1 went nowhere, row 3 is filler that nobody names."""
    rows, gate = noise(6, 8, dtype=dtype), noise(3, 2, seed=1)
    place = torch.tensor([[0, 4], [-1, -1], [5, 2]])
    out = native.combine(rows, gate, place)
    torch.testing.assert_close(out[0], gate[0, 0] * rows[0].float() + gate[0, 1] * rows[4].float())
    assert not out[1].any()
    torch.testing.assert_close(out[2], gate[2, 0] * rows[5].float() + gate[2, 1] * rows[2].float())
    grad = noise(3, 8, seed=2)
    to_rows, to_gate = native.combine_backward(grad, rows, gate, place)
    assert not to_rows[[1, 3]].any()
    torch.testing.assert_close(to_rows[4], (gate[0, 1] * grad[0]).to(dtype))
    torch.testing.assert_close(to_gate[2], (rows[[5, 2]].float() @ grad[2]))
    assert not to_gate[1].any()
    collected = native.collect(rows, place)
    torch.testing.assert_close(collected[2], (rows[5].float() + rows[2].float()).to(dtype))
    assert not collected[1].any()


@needs_native
def test_the_norm_of_many_numbers_is_exact_and_the_same_on_any_number_of_threads() -> None:
    tensors, before = [noise(3_000_001), noise(5, seed=1), torch.zeros(0)], torch.get_num_threads()
    exact = sum(float(t.double().square().sum()) for t in tensors) ** 0.5
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(native.norm(tensors))
    finally:
        torch.set_num_threads(before)
    assert found == [found[0]] * 3
    assert found[0] == pytest.approx(exact, rel=2e-7)
    assert np.isnan(native.norm([torch.tensor([1.0, float("nan")])]))


# the others, at the edges


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu_over_the_whole_range(dtype: torch.dtype) -> None:
    gate = torch.cat((torch.linspace(-120, 120, 4001), torch.tensor([-1e30, 1e30, 0.0, -0.0, 1e-30]))).to(dtype)
    pair = torch.stack((gate, torch.ones_like(gate)), 1).requires_grad_()
    out = native.swiglu(pair.detach())
    exact = F.silu(gate.double())
    limit = 1e-6 if dtype == torch.float32 else 0.004
    assert ((out[:, 0].double() - exact).abs() <= limit * exact.abs() + 1e-36).all()
    grad = native.swiglu_backward(torch.ones(len(gate), 1, dtype=dtype), pair.detach()).double()
    leaf = gate.double().requires_grad_()
    F.silu(leaf).sum().backward()
    finite = leaf.grad.isfinite()  # torch's own has inf * 0 at 1e30
    assert finite.sum() >= 4001
    assert ((grad[:, 0] - leaf.grad).abs()[finite] <= limit * leaf.grad.abs()[finite] + 3e-6).all()


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_a_number_stays_none(dtype: torch.dtype) -> None:
    bad = torch.tensor([[float("nan"), 1.0], [1.0, float("nan")]])
    assert native.rms_norm(bad, torch.ones(2), EPS, dtype)[0].isnan().all()
    assert native.swiglu(bad.to(dtype)).isnan().all()
    logits, nll = bad.bfloat16(), torch.zeros(2)
    native.head_loss_(logits, torch.tensor([0, 0]), nll)
    assert nll.isnan().all()
    logits, nll = torch.zeros(3, 2).bfloat16(), torch.zeros(3)
    native.head_loss_(logits, torch.tensor([2, -1, 1]), nll)  # no words: nothing is read or written there
    assert nll.isnan().tolist() == [True, True, False]
    plan = plan_of([2], {}, 2)
    qkv = torch.ones(2, 6, dtype=dtype)
    qkv[0, 0] = float("nan")
    out, _ = native.attention(qkv, torch.ones(2), torch.ones(2), plan.phase, plan.edges, plan.last, EPS)
    assert out[0].isnan().all()
    assert out[1].isfinite().all()


@needs_native
def test_bf16_is_rounded_to_the_nearest_and_even() -> None:
    x = torch.tensor([[1.0 + k * 2.0**-9 for k in range(8)]])
    out, _ = native.rms_norm(x * 0 + x, torch.ones(8), 0.0, torch.float32)
    low, _ = native.rms_norm(x, torch.ones(8), 0.0, torch.bfloat16)
    assert torch.equal(low, out.bfloat16())
    ties = torch.tensor([[0.0, 1.0 + 2.0**-8, 0.0, 1.0 + 3 * 2.0**-8]])  # half way between two numbers of bf16
    logits = ties.bfloat16()
    assert logits[0, 1] == 1.0  # what PyTorch does
    same, _ = native.rms_norm(torch.ones(1, 4), ties[0], 0.0, torch.bfloat16)
    assert torch.equal(same[0], ties[0].bfloat16())


@needs_native
@pytest.mark.parametrize("slots", [1, 7, 3000])
def test_the_gain_of_a_norm_is_summed_over_all_slots(slots: int) -> None:
    """3,000 slots of 16 are shared by threads, 7 are not."""
    x, gain, grad = noise(slots, 16), 1 + noise(16, seed=1), noise(slots, 16, seed=2)
    _, scale = native.rms_norm(x, gain, EPS, torch.float32)
    found = native.rms_norm_backward(grad, x, gain, scale)
    leaves = [t.double().requires_grad_() for t in (x, gain)]
    F.rms_norm(leaves[0], (16,), leaves[1], EPS).backward(grad.double())
    for ours, leaf in zip(found, leaves, strict=True):
        torch.testing.assert_close(ours.double(), leaf.grad, rtol=1e-4, atol=1e-5)


@needs_native
@pytest.mark.parametrize("betas", [0.0, 0.95, 0.99999])
@pytest.mark.parametrize("numbers", [1, 7, 40_001])  # the last is shared by threads
def test_adamw_takes_the_steps_of_pytorchs_in_float64(numbers: int, betas: float) -> None:
    weight, moments = noise(numbers), torch.zeros(2, numbers)
    exact = torch.nn.Parameter(weight.double())
    settings: dict[str, Any] = {"lr": 0.02, "betas": (0.9, betas), "eps": 1e-8, "weight_decay": 0.3}
    optimizer, scale = torch.optim.AdamW([exact], **settings), 0.37
    for step in range(1, 9):
        grad = noise(numbers, seed=step) * 10.0**-step
        exact.grad = grad.double() * scale
        optimizer.step()
        native.adamw_(weight, grad, *moments, step=step, scale=scale, **settings)
        state = optimizer.state[exact]
        pairs = zip((weight, *moments), (exact.detach(), state["exp_avg"], state["exp_avg_sq"]), strict=True)
        for ours, theirs in pairs:
            torch.testing.assert_close(ours.double(), theirs, rtol=2e-6, atol=1e-6 * float(theirs.abs().max()))


@needs_native
def test_adamw_is_equal_to_the_bit_on_any_number_of_threads() -> None:
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            tensors = [noise(40_001, seed=seed).abs() for seed in range(4)]
            native.adamw_(*tensors, step=3, lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
            results.append(tensors)
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_native
@pytest.mark.filterwarnings("ignore")  # of the checker, about itself
def test_the_operators_are_what_torch_compile_believes() -> None:
    plan = plan_of([5, 9], {}, 8)
    qkv, gain = noise(14, 48), torch.ones(8)
    out, logsumexp = native.attention(qkv, gain, gain, plan.phase, plan.edges, plan.last, EPS)
    x, scale = noise(14, 8), torch.ones(14)
    both = (plan.phase, plan.edges, plan.last)
    low, weight = noise(14, 8, dtype=torch.bfloat16), noise(6, 8)
    checks: dict[str, tuple[Any, ...]] = {
        **({"linear": (low, weight)} if native.multiplies() else {}),
        **({"linear_backward": (low[:, :6].contiguous(), low, weight, True)} if native.multiplies() else {}),
        **({"linear_plus": (low, weight, noise(14, 6))} if native.multiplies() else {}),
        "attention": (qkv, gain, gain, *both, EPS),
        "attention_backward": (out, qkv, gain, gain, *both, logsumexp, EPS),
        "rms_norm": (x, gain, EPS, torch.bfloat16),
        "rms_norm_backward": (x, x, gain, scale, x),
        "swiglu": (x,),
        "swiglu_backward": (noise(14, 4), x),
    }
    for name, arguments in checks.items():
        operator = getattr(torch.ops.isofusion, name).default
        library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
