"""The decoder's losses: packing, front ends, batches without images or targets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import isofusion.model.decoder as decoder
from isofusion.data.batch import SLOT_VECTORS, PackedBatch
from isofusion.errors import InputError
from isofusion.model.decoder import Decoder
from isofusion.model.init import init_weights

KINDS = ["early", "late", "moe", "routed"]


def model_of(cfg: Any, seed: int = 0) -> Decoder:
    model = Decoder(cfg, "sdpa")
    init_weights(model, cfg, seed)
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(5))
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_packed_loss_is_the_sum_of_single_document_losses(
    kind: str, batch: PackedBatch, build_batch: Callable[..., PackedBatch], make_config: Callable[..., Any]
) -> None:
    model = model_of(make_config(kind))
    nll, _ = model.token_losses(batch.torch())
    documents = ["tiiiittttt", "ttiiiitiiiittt", "ttttttttttttt", "tiiiitt", "ttttttt"]
    for k, text in enumerate(documents):
        single = build_batch([text], first_document=k)
        alone, _ = model.token_losses(single.torch())
        inside = nll[torch.from_numpy(batch.doc_id == k)]
        assert (alone > 0).sum() == (single.targets >= 0).sum() > 0
        torch.testing.assert_close(inside, alone, rtol=1e-5, atol=1e-5)


def test_late_and_early_read_identical_tokens(batch: PackedBatch, make_config: Callable[..., Any]) -> None:
    read: dict[str, list[tuple[torch.Tensor, ...]]] = {}
    for kind in ("early", "late"):
        model, seen = model_of(make_config(kind)), []
        inner = model.see

        def spy(b: PackedBatch, seen: list = seen, inner: Callable = inner) -> torch.Tensor:
            seen.append((b.token_ids, b.targets, b.patches, b.patch_slot, b.position))
            return inner(b)

        model.see = spy  # type: ignore[method-assign]
        nll, _ = model.token_losses(batch.torch())
        assert torch.equal(nll > 0, torch.from_numpy(batch.targets >= 0))
        read[kind] = seen
    assert len(read["early"]) == 1
    for one, other in zip(read["early"][0], read["late"][0], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_without_images_or_without_targets_has_finite_gradients(
    kind: str, build_batch: Callable[..., PackedBatch], make_config: Callable[..., Any]
) -> None:
    text_only = build_batch(["tttttt|tttt.."])
    no_targets = build_batch(["tiiii|tiiii.."])
    assert (no_targets.targets < 0).all()
    for batch in (text_only, no_targets):
        model = model_of(make_config(kind))
        nll, output = model.token_losses(batch.torch())
        assert bool(nll.sum() > 0) == bool((batch.targets >= 0).any())
        (nll.sum() + output.balance_loss).backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is None:  # only a fixed router's absence could explain it, and that has no parameter
                pytest.fail(f"{name} has no gradient")
            assert torch.isfinite(parameter.grad).all(), name


def test_the_loss_is_cross_entropy_in_nats(batch: PackedBatch, make_config: Callable[..., Any]) -> None:
    model = model_of(make_config())
    torch.nn.init.zeros_(model.head.weight)
    nll, _ = model.token_losses(batch.torch())
    expected = np.where(batch.targets >= 0, np.log(model.cfg.vocab_size), 0.0)
    np.testing.assert_allclose(nll.detach().numpy(), expected, rtol=1e-6)


def test_a_chunked_head_gives_the_same_loss_and_gradients(
    batch: PackedBatch, make_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    results, rows = [], []
    logits = Decoder.logits
    monkeypatch.setattr(Decoder, "logits", lambda self, hidden: rows.append(len(hidden)) or logits(self, hidden))
    monkeypatch.setattr(decoder, "by_onednn", lambda dtype: False)  # no filler among the rows
    targets = int((batch.targets >= 0).sum())
    for chunk, expected in ((decoder.HEAD_CHUNK, [targets]), (24 * 7 + 23, [7] * (targets // 7) + [targets % 7])):
        monkeypatch.setattr(decoder, "HEAD_CHUNK", chunk)
        model = model_of(make_config())
        rows.clear()
        nll, _ = model.token_losses(batch.torch())
        assert rows == expected  # no more than `chunk` logits at a time
        nll.sum().backward()
        results.append((nll.detach(), model.head.weight.grad, model.embed.weight.grad))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("trains", [False, True])
def test_mups_output_multiplier_is_in_every_loss(
    trains: bool, batch: PackedBatch, make_config: Callable[..., Any]
) -> None:
    """Logits of a model four times as wide as its base are a quarter of the head's product: training and validation."""
    scaled, plain = model_of(make_config(base_width=4)), model_of(make_config())
    plain.load_state_dict(scaled.state_dict())
    with torch.no_grad():
        plain.head.weight *= 0.25
    for precise in (True, False):
        with torch.set_grad_enabled(trains), torch.autocast("cpu", torch.bfloat16, enabled=not precise):
            ours, theirs = (model.token_losses(batch.torch())[0].detach() for model in (scaled, plain))
        assert ours.sum() > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("recompute", "twice"), [(0, []), (2, ["e0", "e1"]), (4, ["e0", "e1", "e2", "d0"])])
def test_recomputation_begins_with_the_encoder_and_reaches_so_many_blocks(
    recompute: int, twice: list[str], batch: PackedBatch, make_config: Callable[..., Any]
) -> None:
    model, ran = model_of(make_config("late", encoder_depth=3)), []
    assert model.encoder is not None
    for side, blocks in (("e", model.encoder.blocks), ("d", model.blocks)):
        for i, block in enumerate(blocks):
            block.register_forward_pre_hook(lambda *_, name=f"{side}{i}": ran.append(name))
    model.recompute = recompute
    model.token_losses(batch.torch())[0].sum().backward()
    assert sorted(name for name in set(ran) if ran.count(name) == 2) == sorted(twice)
    assert set(ran) == {"e0", "e1", "e2", "d0", "d1"}


def test_targets_that_are_filled_up_for_onednn_change_nothing(
    batch: PackedBatch, make_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    results, shapes = [], []
    logits = Decoder.logits
    monkeypatch.setattr(Decoder, "logits", lambda self, hidden: shapes.append(len(hidden)) or logits(self, hidden))
    for filled in (False, True):
        monkeypatch.setattr(decoder, "by_onednn", lambda dtype, filled=filled: filled)
        model = model_of(make_config())
        nll, _ = model.token_losses(batch.torch())
        nll.sum().backward()
        results.append((nll.detach(), model.head.weight.grad, model.embed.weight.grad))
    assert shapes[0] % 16 != 0
    assert shapes[1] == -(-shapes[0] // 16) * 16
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_bf16_autocast_stays_close_and_keeps_losses_in_fp32(
    batch: PackedBatch, make_config: Callable[..., Any]
) -> None:
    for kind in KINDS:
        model = model_of(make_config(kind))
        full, _ = model.token_losses(batch.torch())
        with torch.autocast("cpu", torch.bfloat16):
            half, output = model.token_losses(batch.torch())
        half.sum().backward()
        assert half.dtype == output.balance_loss.dtype == torch.float32
        assert not torch.equal(half, full)
        assert float((half.sum() / full.sum()).detach()) == pytest.approx(1, abs=0.02)


def test_one_optimiser_can_overfit_one_batch(batch: PackedBatch, make_config: Callable[..., Any]) -> None:
    cfg = make_config("early")
    model = Decoder(cfg)
    init_weights(model, cfg, 0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        nll, _ = model.token_losses(batch.torch())
        loss = nll.sum() / (batch.targets >= 0).sum()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(np.log(24), abs=0.1)
    assert losses[-1] < 0.3


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_repeat_to_the_bit_with_deterministic_kernels(
    kind: str, batch: PackedBatch, make_config: Callable[..., Any]
) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        results = []
        for _ in range(2):
            model = model_of(make_config(kind))
            nll, output = model.token_losses(batch.torch())
            (nll.sum() + output.balance_loss).backward()
            results.append([nll.detach(), *(p.grad for p in model.parameters())])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    with torch.inference_mode():
        assert torch.equal(model.token_losses(batch.torch())[0], results[0][0])


def test_patches_of_the_wrong_size_are_refused(batch: PackedBatch, make_config: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match="patch_size 4 needs 48"):
        model_of(make_config(patch_size=4)).token_losses(batch.torch())
    with pytest.raises(InputError, match="not whole images"):
        model_of(make_config("late")).token_losses(replace(batch, patches_per_image=5).torch())


def test_a_model_without_init_weights_fails_loudly(batch: PackedBatch, make_config: Callable[..., Any]) -> None:
    nll, _ = Decoder(make_config()).token_losses(batch.torch())
    assert torch.isnan(nll.sum())


def test_padding_is_left_out_on_a_cpu_and_changes_nothing(
    build_batch: Callable[..., PackedBatch], make_config: Callable[..., Any]
) -> None:
    """Rows of a few documents and much padding: as many slots as are real, filled up to a multiple of 16."""
    batch = build_batch(["tttiiiittt" + "." * 20, "." * 30, "tttt|ttt" + "." * 23])
    short, place_T = batch.torch().without_padding(16)
    assert (short.rows, short.row_len) == (1, 32)
    real = np.flatnonzero(batch.doc_id >= 0)
    assert place_T[real].tolist() == list(range(len(real)))
    assert int((place_T < 0).sum()) == batch.n_slots - 32
    for name in SLOT_VECTORS:
        assert np.array_equal(getattr(short, name)[: len(real)], getattr(batch, name)[real], equal_nan=name == "oracle")
    assert bool((short.doc_id[len(real) :] < 0).all())
    assert np.array_equal(np.flatnonzero(short.modality), short.patch_slot)
    assert np.array_equal(np.flatnonzero(short.targets >= 0), short.target_slot)
    whole, nothing = short.without_padding(16)
    assert whole is short
    assert nothing is None
    for kind in ("early", "late", "moe"):
        model = model_of(make_config(kind))
        seen = []
        model.final_norm.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0].shape[0]))
        nll, output = model.token_losses(batch.torch())
        assert seen == [32]
        assert nll.shape == (90,)
        dense = model_of(make_config(kind))
        dense.execution = "dense"
        exact, other = dense.token_losses(batch.torch())
        torch.testing.assert_close(nll, exact, rtol=1e-4, atol=1e-5)
        gradients = [torch.autograd.grad(x.sum(), [*m.parameters()]) for x, m in ((nll, model), (exact, dense))]
        for ours, theirs in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
        if kind == "moe":
            assert torch.equal(output.routing, other.routing)
