"""What machines with bf16 products run: the loss with its gradient kept in bf16, and whole models in that precision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from isofusion.data.batch import PackedBatch
from isofusion.model import decoder, native
from isofusion.model import head_loss as module
from isofusion.model.decoder import Decoder
from isofusion.model.head_loss import head_loss
from isofusion.model.init import init_weights


@pytest.fixture(params=["kernels", "pieces", "gpu", "gpu compiled"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How the loss is computed; what a GPU does runs on a CPU too."""
    if request.param == "kernels" and not native.available():
        pytest.skip(f"kernels: {native.describe()}")
    monkeypatch.setattr(native, "available", lambda: request.param == "kernels")
    if request.param.startswith("gpu"):
        monkeypatch.setattr(module, "_way", lambda *inputs: module._at_once)
    compiled = torch.compile(module._loss_and_gradient_, dynamic=True, fullgraph=True, backend="aot_eager")
    monkeypatch.setattr(module, "_compiled", lambda: compiled)
    return request.param


@pytest.mark.filterwarnings("ignore")  # of the compiler, about itself
def test_the_loss_of_the_head_and_its_gradient(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOGITS", "LOGITS_GPU"):
        monkeypatch.setattr(module, name, 90)  # pieces of three slots, the last of one
    make = torch.Generator().manual_seed(4)
    hidden = torch.randn(10, 16, generator=make).requires_grad_()
    weight = torch.randn(30, 16, generator=make).requires_grad_()
    targets = torch.randint(30, (10,), generator=make)
    by_slot = torch.rand(10, generator=make)
    ours = head_loss(hidden, weight, targets, way == "gpu compiled")
    logits = (hidden.bfloat16() @ weight.bfloat16().T).float()
    exact = F.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(ours, exact, rtol=1e-6, atol=1e-6)
    for got, wanted in zip(*(torch.autograd.grad(x, (hidden, weight), by_slot) for x in (ours, exact)), strict=True):
        assert (got - wanted).norm() < 0.006 * wanted.norm()


def test_on_a_gpu_it_asks_the_device_nothing() -> None:
    """Meta tensors have no values to ask for."""
    hidden, weight = (torch.empty(n, 16, device="meta", requires_grad=True) for n in (10, 30))
    loss = head_loss(hidden, weight, torch.empty(10, dtype=torch.int64, device="meta"))
    loss.sum().backward()
    assert loss.is_meta
    assert (hidden.grad.shape, weight.grad.shape) == (hidden.shape, weight.shape)


def test_shapes_come_in_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every new shape is a kernel that oneDNN compiles: targets go in sixteens."""
    monkeypatch.setattr(native, "available", lambda: False)
    weight = torch.randn(30, 16, requires_grad=True)
    for n, rows in ((1, 16), (16, 16), (17, 32)):
        loss = head_loss(torch.randn(n, 16), weight, torch.arange(n))
        assert loss.shape == (n,)
        assert [x.shape[0] for x in loss.grad_fn.saved_tensors] == [rows, 30, rows]


def test_the_loss_of_a_target_far_below_the_others_is_finite_and_right(way: str) -> None:
    weight = torch.tensor([[300.0], [0.0], [299.0]])
    nll = head_loss(torch.ones(2, 1), weight, torch.tensor([1, 0]), way == "gpu compiled")
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


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("rows", [None, ["tttttttt", "tttttttt"], LONG], ids=["mixed", "one length", "long"])
@pytest.mark.parametrize("kind", ["early", "late"])
def test_a_model_in_bf16_has_the_losses_and_gradients_of_float32(
    kind: str,
    rows: list[str] | None,
    batch: PackedBatch,
    build_batch: Callable[..., PackedBatch],
    make_config: Callable[..., Any],
) -> None:
    """Several stacks; one mask for all documents, in order; long documents."""
    cfg = make_config(kind)
    batch = build_batch(rows) if rows else batch
    losses, gradients = parts(cfg, batch, "auto", low=True)
    exact, wanted = parts(cfg, batch, "dense", low=False)
    assert exact.sum() > 1
    torch.testing.assert_close(losses, exact, rtol=0.05, atol=0.05)
    ours, theirs = (torch.cat([g[name].flatten() for name in sorted(wanted)]) for g in (gradients, wanted))
    assert (ours - theirs).norm() < 0.03 * theirs.norm()


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("kind", ["early", "late"])
def test_a_batch_of_padding_has_no_loss_and_no_gradient_that_is_not_finite(
    kind: str, build_batch: Callable[..., PackedBatch], make_config: Callable[..., Any]
) -> None:
    losses, gradients = parts(make_config(kind), build_batch(["........"]), "auto", low=True)
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
    wanted = head_loss(hidden * model.logit_scale, model.head.weight, targets)
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


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("kind", ["early", "late"])
def test_documents_do_not_meet_in_bf16(kind: str, batch: PackedBatch, make_config: Callable[..., Any]) -> None:
    document = batch.doc_id[2]
    patches = batch.patches.copy()
    patches[batch.patch_slot == 2] ^= 0xFF
    before, _ = parts(make_config(kind), batch, "auto", low=True)
    after, _ = parts(make_config(kind), replace(batch, patches=patches), "auto", low=True)
    changed = (before != after).numpy()
    assert changed.any()
    assert set(batch.doc_id[changed]) == {document}
