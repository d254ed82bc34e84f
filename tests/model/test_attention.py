"""Who sees whom: the predicate, its executions, and what a change in one place can move."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from isofusion.data.batch import SLOT_VECTORS, PackedBatch
from isofusion.errors import InputError
from isofusion.model import native
from isofusion.model.attention import _blocks_by_length, block_mask, choose_execution, may_attend
from isofusion.model.decoder import Decoder
from isofusion.model.experts import SlotPlan
from isofusion.model.init import init_weights

needs_native = pytest.mark.skipif(not native.available(), reason=f"kernels: {native.describe()}")


def model_of(cfg: Any, attention: str = "auto", seed: int = 0) -> Decoder:
    model = Decoder(cfg, attention)
    init_weights(model, cfg, seed)
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(5))
    return model


@torch.no_grad()
def logits_of(model: Decoder, batch: PackedBatch) -> torch.Tensor:
    output = model(batch.torch())
    logits = model.logits(output.hidden_TD)
    if output.place_T is None:
        return logits
    return logits[output.place_T].where(output.place_T[:, None] >= 0, 0.0)  # of padding that was left out


def change_token(batch: PackedBatch, slot: int) -> PackedBatch:
    ids = batch.token_ids.copy()
    ids[slot] = 4 + (ids[slot] - 3) % 20
    assert ids[slot] != batch.token_ids[slot]
    return replace(batch, token_ids=ids)


def change_patch(batch: PackedBatch, slot: int) -> PackedBatch:
    patches = batch.patches.copy()
    patches[np.flatnonzero(batch.patch_slot == slot)] ^= 0xFF
    return replace(batch, patches=patches)


def moved(model: Decoder, batch: PackedBatch, other: PackedBatch) -> set[int]:
    """Slots whose logits are not equal to the bit."""
    difference = logits_of(model, batch) != logits_of(model, other)
    return set(difference.any(-1).nonzero().flatten().tolist())


@pytest.mark.parametrize("attention", ["auto", "sdpa", "dense"])
@pytest.mark.parametrize("kind", ["early", "late"])
def test_a_change_in_document_a_leaves_document_b_equal_to_the_bit(
    kind: str, attention: str, batch: PackedBatch, make_config: Callable[..., Any]
) -> None:
    model = model_of(make_config(kind), attention)
    document = batch.doc_id[2]
    own = set(np.flatnonzero(batch.doc_id == document).tolist())
    for other in (change_patch(batch, 2), change_token(batch, 0), change_token(batch, 6)):
        changed = moved(model, batch, other)
        assert changed
        assert changed <= own


@pytest.mark.parametrize("kind", ["early", "late"])
def test_a_patch_sees_later_patches_of_its_own_image_and_no_later_text(
    kind: str, batch: PackedBatch, make_config: Callable[..., Any]
) -> None:
    model = model_of(make_config(kind))
    # row 0: t iiii ttttt | ...: slots 1-4 are one image
    assert moved(model, batch, change_patch(batch, 4)) >= {1, 2, 3, 4, 5}
    assert 0 not in moved(model, batch, change_patch(batch, 4))
    assert moved(model, batch, change_token(batch, 6)) == {6, 7, 8, 9}


@pytest.mark.parametrize("kind", ["early", "late"])
def test_images_of_one_document_do_not_see_later_images(
    kind: str, batch: PackedBatch, make_config: Callable[..., Any]
) -> None:
    model = model_of(make_config(kind))
    first, second = (np.flatnonzero(batch.image_id == i) for i in (1, 2))
    assert batch.doc_id[first[0]] == batch.doc_id[second[0]]
    changed = moved(model, batch, change_patch(batch, second[0]))
    assert not changed & set(first.tolist())
    assert set(second.tolist()) <= changed
    assert set(second.tolist()) <= moved(model, batch, change_patch(batch, first[3]))


def test_text_sees_no_later_text_though_all_text_has_image_id_minus_one(
    batch: PackedBatch, make_config: Callable[..., Any]
) -> None:
    start = int(np.flatnonzero(batch.doc_id == 2)[0])
    length = int((batch.doc_id == 2).sum())
    changed = moved(model_of(make_config()), batch, change_token(batch, start + 5))
    assert changed == set(range(start + 5, start + length))


def test_the_predicate_by_hand() -> None:
    #              t  i  i  t  pad pad
    side = {
        "doc": np.array([0, 0, 0, 0, -1, -1]),
        "image": np.array([-1, 7, 7, -1, -1, -1]),
        "slot": np.arange(6),
    }
    allowed = may_attend({n: v[:, None] for n, v in side.items()}, {n: v[None, :] for n, v in side.items()})
    expected = ["100000", "111000", "111000", "111100", "000010", "000001"]
    assert ["".join(str(int(x)) for x in row) for row in allowed] == expected


@pytest.mark.parametrize("rows", [None, ["tttttttt", "tttttttt"], ["tttttttt", "ttttttt."], ["tttt|tttt", "tttt|iiii"]])
@pytest.mark.parametrize("kind", ["early", "late", "moe"])
@pytest.mark.parametrize("attention", ["sdpa", pytest.param("native", marks=needs_native)])
def test_executions_agree_in_values_and_gradients(
    attention: str,
    kind: str,
    rows: list[str] | None,
    batch: PackedBatch,
    build_batch: Callable[..., PackedBatch],
    make_config: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each with the rest of the block as it comes with it. Text of one length takes SDPA's causal form."""
    cfg = make_config(kind)
    batch = build_batch(rows) if rows else batch
    losses, gradients = [], []
    for execution in ("dense", attention):
        monkeypatch.setattr(native, "available", lambda on=execution == "native": on)
        model = model_of(cfg, execution)
        nll, _ = model.token_losses(batch.torch())
        nll.sum().backward()
        losses.append(nll.detach())
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-5)
    assert losses[0].sum() > 1
    for name, gradient in gradients[0].items():
        assert gradient is not None, name
        largest = gradient.abs().max()
        assert (gradient - gradients[1][name]).abs().max() <= 1e-5 * largest, name
        assert largest > 0 or rows, name  # only rows without an image before a target may leave a parameter alone


@pytest.mark.filterwarnings("ignore")  # the eager form warns that it is not compiled
def test_flex_equals_dense_forward(batch: PackedBatch, make_config: Callable[..., Any]) -> None:
    cfg = make_config(head_dim=16)
    dense, flex = (logits_of(model_of(cfg, a), batch) for a in ("dense", "flex"))
    torch.testing.assert_close(dense, flex, rtol=1e-5, atol=1e-5)


def rolled(batch: PackedBatch) -> PackedBatch:
    """The rows of a batch of two rows, exchanged."""
    half = batch.row_len
    changed = {name: np.roll(getattr(batch, name), half) for name in SLOT_VECTORS}
    return replace(batch, patch_slot=np.flatnonzero(changed["modality"]).astype(np.int32), **changed)


@pytest.mark.filterwarnings("ignore")  # of the compiler, about itself
@pytest.mark.parametrize(
    ("kind", "attention"),
    [
        ("early", "flex"),
        ("moe", "flex"),
        pytest.param("routed", "flex", marks=pytest.mark.slow),
        pytest.param("early", "native", marks=needs_native),
        pytest.param("late", "native", marks=[needs_native, pytest.mark.slow]),
        pytest.param("moe", "native", marks=[needs_native, pytest.mark.slow]),
        pytest.param("early", "sdpa", marks=pytest.mark.slow),
        pytest.param("late", "sdpa", marks=pytest.mark.slow),
        pytest.param("moe", "sdpa", marks=pytest.mark.slow),
    ],
)
def test_blocks_compile_whole_and_once(
    kind: str, attention: str, batch: PackedBatch, make_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No graph break, one compilation for all blocks of a kind, and the plain formulas give the same numbers.

    Those of CPUs with gradients; FlexAttention has no backward pass there and stands for a GPU, whose shapes are fixed.
    Experts in bf16: no compiler takes their product in float32.
    """
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    plan_of = SlotPlan.of
    if attention == "flex":
        monkeypatch.setattr(SlotPlan, "of", lambda b: replace(plan_of(b), n_real=None))
    monkeypatch.setattr(native, "available", lambda: attention == "native")
    torch._dynamo.reset()
    results, experts = [], kind in ("moe", "routed")
    for compiled in (False, True):
        model = model_of(make_config(kind, head_dim=8 if kind == "late" else 16), attention)
        if compiled:
            for block in [*model.blocks, *(model.encoder.blocks if model.encoder else ())]:
                block._compiled_call_impl = torch.compile(block._call_impl, fullgraph=True)
        with torch.set_grad_enabled(attention != "flex"), torch.autocast("cpu", torch.bfloat16, enabled=experts):
            if attention == "flex":  # another batch, another mask: nothing is compiled again
                model.token_losses(rolled(batch).torch())
            nll, _ = model.token_losses(batch.torch())
            if attention != "flex":
                nll.sum().backward()
        results.append([nll.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    torch._dynamo.reset()
    for eager, other in zip(*results, strict=True):
        limit = (0.05 if experts else 1e-5) * float(eager.abs().max())
        assert (eager - other).abs().max() <= limit + 1e-7
    assert counter.frame_count == (2 if kind == "late" else 1)


@pytest.mark.filterwarnings("ignore")
def test_compiled_blocks_are_for_any_number_of_images_and_one_number_of_slots(
    batch: PackedBatch,
    build_batch: Callable[..., PackedBatch],
    make_config: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Late fusion as on a GPU: two compilations, whatever comes; the decoder's has no size that may vary."""
    varying: list[bool] = []

    def backend(module: Any, inputs: list[Any]) -> Any:
        varying.append(any(isinstance(x, torch.SymInt) for x in inputs))
        return module

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    monkeypatch.setattr(native, "available", lambda: False)
    torch._dynamo.reset()
    model = model_of(make_config("late", head_dim=8), "flex")
    model.compile_blocks()
    fewer = build_batch(["tiiiitttttttttttttttttttt.....", "ttttttttttttttt|tiiiitt|ttttt..."])
    assert fewer.n_slots == batch.n_slots
    assert fewer.patches.shape != batch.patches.shape
    with torch.no_grad():
        for packed in (batch, fewer, batch):
            model.token_losses(packed.torch())
    assert varying == [True, False]
    other = model_of(make_config("late", head_dim=8, depth=3), "flex")
    other.compile_blocks()  # of another model: what was compiled before is gone
    with torch.no_grad():
        other.token_losses(batch.torch())
    assert varying == [True, False] * 2
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")
def test_the_block_mask_is_compiled_once_for_all_batches(batch: PackedBatch) -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    counter = CompileCounterWithBackend("eager")
    build = torch.compile(create_block_mask, backend=counter, dynamic=False)
    documents = torch.from_numpy(batch.doc_id), torch.from_numpy(batch.image_id)
    for shift in range(3):
        doc, image = (x.roll(shift) for x in documents)
        expected = block_mask(doc, image, batch.rows, batch.row_len)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("torch.nn.attention.flex_attention.create_block_mask", build)
            got = block_mask(doc, image, batch.rows, batch.row_len)
        assert torch.equal(expected.to_dense(), got.to_dense())
    assert counter.frame_count == 1


def test_padding_is_finite_and_sees_itself_only(batch: PackedBatch, make_config: Callable[..., Any]) -> None:
    model = model_of(make_config())
    padding = np.flatnonzero(batch.doc_id < 0)
    logits = logits_of(model, batch)
    assert torch.isfinite(logits).all()
    torch.testing.assert_close(logits[padding], logits[padding[:1]].expand(len(padding), -1))
    assert not set(padding.tolist()) & moved(model, batch, change_token(batch, 6))


def test_a_batch_of_padding_runs(build_batch: Callable[..., PackedBatch], make_config: Callable[..., Any]) -> None:
    assert torch.isfinite(logits_of(model_of(make_config("moe")), build_batch(["........"]))).all()


def test_blocks_by_length_cover_every_document_once() -> None:
    lengths = np.random.default_rng(0).integers(1, 300, 200)
    blocks = _blocks_by_length(lengths, 4)
    assert sorted(np.concatenate([members for members, _ in blocks]).tolist()) == list(range(200))
    assert all((lengths[members] <= width).all() for members, width in blocks)
    assert 1 < len(blocks) <= 38  # multiples of 8


def test_an_unknown_execution_is_refused(batch: PackedBatch, make_config: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match='attention "fast" is unknown'):
        logits_of(model_of(make_config(), "fast"), batch)


def test_auto_is_flex_on_a_gpu_where_heads_are_wide_enough_and_native_on_a_cpu_that_has_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert [choose_execution("auto", torch.device("cuda"), head) for head in (8, 16, 64)] == ["dense", "flex", "flex"]
    for there in (True, False):
        monkeypatch.setattr(native, "available", lambda there=there: there)
        assert choose_execution("auto", torch.device("cpu"), 64) == ("native" if there else "sdpa")


def test_native_attention_is_refused_where_there_is_none(
    batch: PackedBatch, make_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "available", lambda: False)
    with pytest.raises(InputError, match='attention "native" runs in float32 or bf16 on a CPU'):
        logits_of(model_of(make_config(), "native"), batch)
    with torch.autocast("cpu", torch.float16), pytest.raises(InputError, match="choose auto"):
        logits_of(model_of(make_config(), "native"), batch)
