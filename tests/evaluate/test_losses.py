"""A model that predicts from pixels alone shows what true, blind and shuffled mean."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="training needs the [train] extra")

from isofusion.data.batch import IGNORE, PackedBatch  # noqa: E402
from isofusion.evaluate.losses import (  # noqa: E402
    GREY,
    class_sums,
    document_of,
    document_sums,
    evaluate_domain,
    image_documents,
    image_shift,
    paired_difference,
    ratio_se,
    summarise,
    summarise_classes,
)

N, L = 2, 8  # patches per image, slots per row


def document(images: int, tokens: list[int], value: int) -> dict[str, list]:
    """BOS, images, tokens: the last patch and every token but the last one have a target."""
    ids = [1] + [3] * (N * images) + tokens
    modality = [0] + [1] * (N * images) + [0] * len(tokens)
    targets = [IGNORE] * (N * images) + tokens + [IGNORE]
    return {"ids": ids, "modality": modality, "targets": targets, "values": [value] * (N * images)}


def batch_of(documents: list[dict[str, list]], first: int) -> PackedBatch:
    """One document per row."""
    T = L * len(documents)
    ids, modality, doc, targets = (
        np.zeros(T, np.int32),
        np.zeros(T, np.uint8),
        np.full(T, -1, np.int32),
        np.full(T, -100),
    )
    values: list[int] = []
    for r, d in enumerate(documents):
        at = slice(r * L, r * L + len(d["ids"]))
        ids[at], modality[at], doc[at], targets[at] = d["ids"], d["modality"], r, d["targets"]
        values += d["values"]
    patches = np.repeat(np.array(values, np.uint8)[:, None], 12, axis=1)
    return PackedBatch(
        rows=len(documents),
        row_len=L,
        patches_per_image=N,
        token_ids=ids,
        modality=modality,
        doc_id=doc,
        image_id=np.full(T, -1, np.int32),
        position=np.zeros(T, np.int32),
        targets=targets.astype(np.int32),
        domain=np.zeros(T, np.uint8),
        patches=patches.reshape(-1, 12),
        patch_slot=np.flatnonzero(modality).astype(np.int32),
        token_class=(targets % 2).astype(np.uint8),
        oracle=np.where(targets >= 0, 0.5, np.nan).astype(np.float32),
        keys=tuple(f"src:0:doc{first + r}" for r in range(len(documents))),
    )


class PixelModel(torch.nn.Module):
    """Loss of a target = distance of its document's mean pixel from 10 * target; grey pixels are seen as such."""

    def token_losses(self, batch):
        assert not self.training
        nll = torch.zeros(len(batch.targets))
        for t in range(len(nll)):
            if batch.targets[t] >= 0:
                mine = batch.patches[batch.doc_id[batch.patch_slot] == batch.doc_id[t]].float()
                seen = mine.mean() if len(mine) else torch.tensor(0.0)
                nll[t] = (seen - 10 * batch.targets[t]).abs() / 10
        return nll, type("Output", (), {"routing": None})()


@pytest.fixture
def batches() -> list[PackedBatch]:
    """Three documents in two batches, each with one image whose pixels say its target."""
    one = batch_of([document(1, [4, 4], 40), document(1, [6, 6, 6], 60)], 0)
    return [one, batch_of([document(1, [9], 90)], 2)]


def test_true_blind_and_shuffled(batches: list[PackedBatch]) -> None:
    losses = evaluate_domain(PixelModel(), batches, precision="fp32")
    assert losses.nll["true"] == pytest.approx([0] * 6)
    assert losses.nll["blind"] == pytest.approx([abs(GREY / 10 - t) for t in (4, 4, 6, 6, 6, 9)], rel=1e-6)
    # image 0 -> 1 -> 2 -> 0: targets 4 see 60, targets 6 see 90, target 9 sees 40
    assert losses.nll["shuffled"] == pytest.approx([2, 2, 3, 3, 3, 5])
    assert losses.target_ids.tolist() == [4, 4, 6, 6, 6, 9]
    assert (losses.text_tokens, losses.image_tokens) == (9, 6)
    docs = document_sums(losses)
    assert docs["doc_targets"].tolist() == [2, 3, 1]
    assert docs["doc_shuffled"] == pytest.approx([4, 9, 5])


def test_model_comes_back_in_training_mode(batches: list[PackedBatch]) -> None:
    model = PixelModel().train()
    evaluate_domain(model, batches, precision="fp32")
    assert model.training


def test_shuffle_never_stays_in_the_document() -> None:
    assert image_shift(["a", "b", "c"]) == 1
    assert image_shift(["a", "a", "b", "b", "c"]) == 2
    documents = ["a"] * 3 + ["b"] * 4 + ["c"] * 2 + ["d"] * 2
    k = image_shift(documents)
    assert k is not None
    moved = documents[k:] + documents[:k]
    assert all(x != y for x, y in zip(documents, moved, strict=True))
    assert image_shift(["a", "a"]) is None
    assert image_shift([]) is None


def test_pieces_of_a_document_are_one_document(batches: list[PackedBatch]) -> None:
    assert document_of("src:0:file.tar/7:2") == document_of("src:0:file.tar/7:0") == "src:0:file.tar/7"
    assert document_of("world:3:1") != document_of("world:4:1")
    first = replace(batches[0], keys=("src:0:x:0", "src:0:x:1"))
    assert image_documents([first]) == ["src:0:x", "src:0:x"]
    docs = document_sums(evaluate_domain(PixelModel(), [first, batches[1]], precision="fp32"))
    assert docs["doc_targets"].tolist() == [5, 1]


def test_without_images_there_is_nothing_to_blind_or_shuffle() -> None:
    losses = evaluate_domain(PixelModel(), [batch_of([document(0, [2, 3], 0)], 0)], precision="fp32")
    summary = summarise(losses, chance=1.0)
    assert summary["blind"] is summary["shuffled"] is None
    docs = document_sums(losses)
    assert docs["doc_blind"].tolist() == docs["doc_true"].tolist() == [5.0]


def test_summary(batches: list[PackedBatch]) -> None:
    losses = evaluate_domain(PixelModel(), batches, precision="fp32")
    summary = summarise(losses, chance=math.log(512), n_bytes=12, bound=0.6)
    assert summary["loss"] == 0
    assert summary["targets"] == 6
    assert summary["shuffled"] == pytest.approx(18 / 6)
    assert summary["oracle"] == pytest.approx(0.5)
    classes = summarise_classes(losses, ("even", "odd"), {"odd": 1.5})
    odd = classes["odd"]
    assert odd.pop("se") is odd.pop("blind_se") is None  # one document
    assert odd == pytest.approx({"loss": 0, "targets": 1, "oracle": 0.5, "blind": 3.8, "shuffled": 5.0, "chance": 1.5})
    assert classes["even"]["targets"] == 5
    assert classes["even"]["se"] == 0
    blind = [abs(GREY / 10 - t) for t in (4, 6)]
    assert classes["even"]["blind_se"] == pytest.approx(
        ratio_se(np.array([2 * blind[0], 3 * blind[1]]), np.array([2.0, 3.0]))
    )
    assert classes["even"]["chance"] is None


def test_a_document_without_a_target_is_no_document_of_the_sums(batches: list[PackedBatch]) -> None:
    silent = batch_of([{"ids": [1], "modality": [0], "targets": [IGNORE], "values": []}, document(1, [5], 20)], 3)
    losses = evaluate_domain(PixelModel(), [*batches, silent], precision="fp32")
    assert len(losses.documents) == 5
    assert document_sums(losses)["doc_targets"].tolist() == [2, 3, 1, 1]
    assert class_sums(losses, ("even", "odd"), ("odd",))["odd_true"].tolist() == [0, 0, 0, 3]
    assert summarise(losses, chance=0.0)["documents"] == 4


def test_class_sums_line_up_with_the_documents(batches: list[PackedBatch]) -> None:
    losses = evaluate_domain(PixelModel(), batches, precision="fp32")
    sums = class_sums(losses, ("even", "odd", "never"), ("odd", "never", "even"))
    assert list(sums) == [
        f"{name}_{kind}" for name in ("odd", "even") for kind in ("targets", "true", "blind", "shuffled")
    ]
    assert sums["odd_targets"].tolist() == [0, 0, 1]
    assert sums["even_targets"].tolist() == [2, 3, 0]
    assert sums["odd_shuffled"].tolist() == [0, 0, 5]
    docs = document_sums(losses)
    for kind in ("targets", "true", "blind", "shuffled"):
        np.testing.assert_allclose(sums[f"odd_{kind}"] + sums[f"even_{kind}"], docs[f"doc_{kind}"])


def test_bits_per_byte(batches: list[PackedBatch]) -> None:
    losses = evaluate_domain(PixelModel(), batches, precision="fp32")
    losses.nll["true"] = np.full(6, math.log(2), np.float32)
    assert summarise(losses, chance=0.0, n_bytes=3)["bits_per_byte"] == pytest.approx(2.0)


def test_unknown_oracle_is_null(batches: list[PackedBatch]) -> None:
    losses = evaluate_domain(PixelModel(), batches, precision="fp32")
    losses.oracle[2] = np.nan
    assert summarise(losses, chance=0.0)["oracle"] is None


def test_standard_error_agrees_with_resampling_documents() -> None:
    rng = np.random.default_rng(0)
    counts = rng.integers(5, 40, 300).astype(float)
    sums = counts * rng.normal(2.0, 0.3, 300)
    draws = rng.integers(0, 300, (2000, 300))
    resampled = sums[draws].sum(1) / counts[draws].sum(1)
    assert ratio_se(sums, counts) == pytest.approx(resampled.std(), rel=0.1)
    assert ratio_se(np.ones(1), np.ones(1)) is None
    few = np.array([1.0, 1.4, 2.7])  # documents of one length: the standard error of a mean
    assert ratio_se(4 * few, np.full(3, 4.0)) == pytest.approx(few.std(ddof=1) / math.sqrt(3))


def test_pairing_removes_what_two_losses_share() -> None:
    rng = np.random.default_rng(1)
    counts = np.full(200, 10.0)
    a = counts * rng.normal(2, 1, 200)
    mean, se = paired_difference(a + counts * 0.1, a, counts)
    assert mean == pytest.approx(0.1)
    assert se == pytest.approx(0, abs=1e-9)
