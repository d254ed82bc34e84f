"""What CPUs with bf16 products run: attention in blocks of queries, and the head's loss with its gradient in bf16."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from isofusion.data.batch import PackedBatch
from isofusion.model import bf16, decoder
from isofusion.model.attention import DocumentPlan, ImagePlan, Stack, may_attend, rope_phase
from isofusion.model.decoder import Decoder
from isofusion.model.init import init_weights


def layout(length: int, image: tuple[int, int] | None = None) -> np.ndarray:
    """bool [1, 1, L, L] of one document, with an image at [from, to)."""
    images = np.full(length, -1)
    if image:
        images[slice(*image)] = 0
    side = {"doc": np.zeros(length, int), "image": images, "slot": np.arange(length)}
    return may_attend({n: v[:, None] for n, v in side.items()}, {n: v[None, :] for n, v in side.items()})[None, None]


def additive(allowed: np.ndarray) -> Tensor:
    return torch.from_numpy(np.where(allowed, np.float32(0), np.float32("-inf")))


def test_how_far_a_block_of_queries_sees() -> None:
    assert bf16.QUERIES == 128
    assert bf16.seen(layout(100), 100) == (100,)
    assert bf16.seen(layout(300), 300) == (128, 256, 300)
    assert bf16.seen(layout(300, (120, 156)), 300) == (156, 256, 300)  # to the end of an image that the block has begun
    assert bf16.seen(np.concatenate([layout(300), layout(300, (250, 290))]), 300) == (128, 290, 300)
    assert bf16.seen(None, 300) == (300, 300, 300)


@pytest.mark.parametrize("allowed", [layout(200), layout(200, (100, 136)), layout(70), None])
def test_attention_is_that_of_float32_within_bf16s_rounding(allowed: np.ndarray | None) -> None:
    n, heads, head, length = 2, 2, 8, 200 if allowed is None else allowed.shape[-1]
    make = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(n * length, heads, head, generator=make).mul_(2).requires_grad_() for _ in range(3))
    weight = torch.randn(n * length, heads * head, generator=make)
    mask = None if allowed is None else additive(allowed)
    results = []
    for low in (True, False):
        out = blockwise(q, k, v, n, mask, bf16.seen(allowed, length)) if low else Stack(n, mask).attend(q, k, v)
        assert out.dtype == (torch.bfloat16 if low else torch.float32)
        results.append([out.float(), *torch.autograd.grad(out, (q, k, v), weight.to(out.dtype))])
    for name, ours, exact in zip("oqkv", *results, strict=True):
        assert (ours - exact).norm() < 0.006 * exact.norm(), name  # bf16 keeps 8 bits: 0.4 %


def blockwise(q: Tensor, k: Tensor, v: Tensor, n: int, mask: Tensor | None, keys: tuple[int, ...]) -> Tensor:
    """q, k, v [N*L, H, K] in the order of slots -> bf16 [N*L, H*K]."""
    slots, heads, head = q.shape
    stack = bf16.Stack(n, slots // n, keys, mask)
    rows = bf16.Rows.of([stack], [np.arange(slots).reshape(n, -1)], np.zeros(0, np.int64), heads)
    q, k, v = (x.flatten(0, 1).index_select(0, rows.take_R) for x in (q * head**-0.5, k, v.bfloat16()))
    return bf16.attention(q, k, v, rows).index_select(0, rows.give_TH).view(slots, -1)


def test_rows_lie_stack_after_stack_and_head_after_head() -> None:
    stacks = [bf16.Stack(1, 2, (2,)), bf16.Stack(2, 1, (1,))]
    # slot 2 is there twice: its second place fills a document up
    rows = bf16.Rows.of(stacks, [np.array([[2, 0]]), np.array([[1], [2]])], np.array([3]), 2)
    assert rows.take_R.tolist() == [4, 0, 5, 1, 2, 3, 4, 5, 6, 7]
    assert rows.give_TH.tolist() == [1, 3, 4, 5, 0, 2, 8, 9]
    assert rows.real == 8


def test_scores_are_not_rounded() -> None:
    """One key is ahead of another by less than bf16 tells apart at that height (64 and 64.2: steps of 0.5)."""
    q = torch.full((2, 1, 1), 8.0)
    k = torch.tensor([8.0, 8.025]).view(2, 1, 1)
    v = torch.tensor([0.0, 1.0]).view(2, 1, 1)
    out = blockwise(q, k, v, 1, None, (2,))
    assert float(out[0, 0]) == pytest.approx(1 / (1 + np.exp(-0.2)), abs=0.003)


def test_the_loss_of_the_head_and_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bf16, "LOGITS", 90)  # pieces of three slots, the last of one
    make = torch.Generator().manual_seed(4)
    hidden = torch.randn(10, 16, generator=make).requires_grad_()
    weight = torch.randn(30, 16, generator=make).requires_grad_()
    targets = torch.randint(30, (10,), generator=make)
    by_slot = torch.rand(10, generator=make)
    ours = bf16.head_loss(hidden, weight, targets)
    logits = (hidden.bfloat16() @ weight.bfloat16().T).float()
    exact = F.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(ours, exact, rtol=1e-6, atol=1e-6)
    for got, wanted in zip(*(torch.autograd.grad(x, (hidden, weight), by_slot) for x in (ours, exact)), strict=True):
        assert (got - wanted).norm() < 0.006 * wanted.norm()


def test_shapes_come_in_steps(build_batch: Callable[..., PackedBatch], make_config: Callable[..., Any]) -> None:
    """Every new shape is a kernel that oneDNN compiles: targets go in sixteens, stacked documents in eights."""
    weight = torch.randn(30, 16, requires_grad=True)
    for n, rows in ((1, 16), (16, 16), (17, 32)):
        loss = bf16.head_loss(torch.randn(n, 16), weight, torch.arange(n))
        assert loss.shape == (n,)
        assert [x.shape[0] for x in loss.grad_fn.saved_tensors] == [rows, 30, rows]
    batch = build_batch(["t" * 13 + "|" + "t" * 11, "t" * 21 + "..."]).torch()
    phase = rope_phase(batch.position, 8, 2, 1e4)
    with torch.autocast("cpu", torch.bfloat16):
        plan = DocumentPlan(phase, torch.float32, batch, 2)
    assert plan.placed is not None
    assert [(stack.n, stack.length) for stack in plan.placed.stacks] == [(3, 24)]


def test_the_loss_of_a_target_far_below_the_others_is_finite_and_right() -> None:
    weight = torch.tensor([[300.0], [0.0], [299.0]])
    nll = bf16.head_loss(torch.ones(2, 1), weight, torch.tensor([1, 0]))
    logits = weight.bfloat16().float()[:, 0]
    assert nll.tolist() == pytest.approx([float(logits.logsumexp(0)), float(logits.logsumexp(0) - 300)], abs=1e-3)


def parts(cfg: Any, batch: PackedBatch, attention: str, low: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses of the slots, and the gradients of their sum."""
    model = Decoder(cfg, attention)
    init_weights(model, cfg, 0)
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(5))
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        nll, _ = model.token_losses(batch.torch())
    nll.sum().backward()
    return nll.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


LONG = ["t" * 120 + "iiii" * 10 + "t" * 140, "t" * 150 + "|" + "t" * 100 + "." * 50]


@pytest.mark.parametrize("rows", [None, ["tttttttt", "tttttttt"], LONG], ids=["mixed", "one length", "long"])
@pytest.mark.parametrize("kind", ["early", "late"])
def test_a_model_in_bf16_has_the_losses_and_gradients_of_float32(
    kind: str,
    rows: list[str] | None,
    batch: PackedBatch,
    build_batch: Callable[..., PackedBatch],
    make_config: Callable[..., Any],
) -> None:
    """Several stacks; one mask for all documents, in order; documents longer than a block of queries."""
    cfg = make_config(kind)
    batch = build_batch(rows) if rows else batch
    losses, gradients = parts(cfg, batch, "sdpa", low=True)
    exact, wanted = parts(cfg, batch, "dense", low=False)
    assert exact.sum() > 1
    torch.testing.assert_close(losses, exact, rtol=0.05, atol=0.05)
    ours, theirs = (torch.cat([g[name].flatten() for name in sorted(wanted)]) for g in (gradients, wanted))
    assert (ours - theirs).norm() < 0.03 * theirs.norm()


@pytest.mark.parametrize("kind", ["early", "late"])
def test_a_batch_of_padding_has_no_loss_and_no_gradient_that_is_not_finite(
    kind: str, build_batch: Callable[..., PackedBatch], make_config: Callable[..., Any]
) -> None:
    losses, gradients = parts(make_config(kind), build_batch(["........"]), "sdpa", low=True)
    assert not losses.any()
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients.values())


def test_training_takes_the_loss_of_the_head_and_validation_float32_logits(
    batch: PackedBatch, make_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = make_config(base_width=8)
    model = Decoder(cfg)
    init_weights(model, cfg, 0)
    assert model.logit_scale != 1
    targets = torch.arange(6)
    hidden = torch.randn(6, cfg.width, generator=torch.Generator().manual_seed(6)).requires_grad_()
    wanted = bf16.head_loss(hidden * model.logit_scale, model.head.weight, targets)
    exact = F.cross_entropy(model.logits(hidden), targets, reduction="none")
    assert not torch.equal(wanted, exact)
    gradients = []
    for chunk in (2**24, 2 * cfg.vocab_size):  # all at once; two slots at a time, computed again
        monkeypatch.setattr(decoder, "HEAD_CHUNK", chunk)
        with torch.autocast("cpu", torch.bfloat16):
            found = model._nll(hidden, targets)
            with torch.no_grad():
                assert torch.equal(model._nll(hidden, targets), exact)
        torch.testing.assert_close(found, wanted, rtol=0, atol=0 if chunk == 2**24 else 0.02)
        gradients.append(torch.autograd.grad(found.sum(), hidden)[0])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("kind", ["early", "late"])
def test_documents_do_not_meet_in_bf16(kind: str, batch: PackedBatch, make_config: Callable[..., Any]) -> None:
    document = batch.doc_id[2]
    patches = batch.patches.copy()
    patches[batch.patch_slot == 2] ^= 0xFF
    before, _ = parts(make_config(kind), batch, "sdpa", low=True)
    after, _ = parts(make_config(kind), replace(batch, patches=patches), "sdpa", low=True)
    changed = (before != after).numpy()
    assert changed.any()
    assert set(batch.doc_id[changed]) == {document}


def test_the_plan_takes_blocks_of_queries_in_bf16_alone(batch: PackedBatch) -> None:
    torch_batch = batch.torch()
    phase = rope_phase(torch_batch.position, 8, 2, 1e4)
    for low in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            plan = DocumentPlan(phase, torch.float32, torch_batch, 2)
            images = ImagePlan(phase[:14], torch.float32, 7, 2)
        assert bool(plan.blocks) != low
        assert bool(plan.placed and plan.placed.stacks) == bool(images.placed) == low
        qkv, gain = torch.ones(14, 48, dtype=torch.bfloat16 if low else torch.float32), torch.ones(8)
        assert images.mix(qkv, gain, gain, 1e-6).dtype == qkv.dtype
