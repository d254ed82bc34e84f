"""Losses of one model on the fixed validation stream: true, blind and shuffled image, by domain, class and document.

The stream is the same for every arm, size and seed, so losses of two models can be paired document by document.
- blind: every patch is mid-grey (128), so the model still sees where an image is but not what it shows.
- shuffled: the patches of image i are those of image i + k (cyclic inside the domain's stream), k the smallest shift
  that never lands in the same document. One fixed permutation of images, a function of the stream alone.
- loss: mean over text targets (nats per target); se: over documents, of that ratio of sums.
N targets, T slots, D documents, I images, n patches per image, C features of a patch (p * p * 3).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from isofusion.data.batch import PackedBatch
from isofusion.train.step import precision_context

GREY = 128
"""Value of every byte of a blind image."""
VARIANTS = ("true", "blind", "shuffled")


@dataclass
class DomainLosses:
    """Every text target of one domain's validation stream, in stream order."""

    nll: dict[str, np.ndarray]  # variant -> f32[N] nats; a variant is absent where the stream has no image to change
    document: np.ndarray  # i64[N]: index into `documents`
    token_class: np.ndarray  # u8[N]
    oracle: np.ndarray  # f32[N] nats, NaN where unknown
    target_ids: np.ndarray  # i32[N]
    documents: tuple[str, ...]
    text_tokens: int
    image_tokens: int
    routing: np.ndarray | None  # i64[layers, 2, experts]: (token, choice) pairs of text, of image; None: dense


def document_of(key: str) -> str:
    """The document a batch key "source:epoch:sample[:piece]" names: the pieces of a cut document are one document."""
    return ":".join(key.split(":")[:3])


def image_documents(batches: Sequence[PackedBatch]) -> list[str]:
    """The document of each image of a stream, in the order of `patches`."""
    out = []
    for batch in batches:
        first_slot_I = batch.patch_slot[:: batch.patches_per_image]
        out += [document_of(batch.keys[d]) for d in batch.doc_id[first_slot_I]]
    return out


def image_shift(documents: Sequence[str]) -> int | None:
    """Smallest k > 0 such that no image i and image (i + k) mod I are of one document; None if there is no such k."""
    _, ids = np.unique(np.asarray(documents, dtype=object).astype(str), return_inverse=True)
    for k in range(1, len(ids)):
        if not np.any(ids == np.roll(ids, -k)):
            return k
    return None


def with_patches(batch: PackedBatch, patches: np.ndarray) -> PackedBatch:
    """The batch with other pixels in the same slots; everything else is shared, not copied."""
    return replace(batch, patches=patches)


def evaluate_domain(
    model: nn.Module, batches: Sequence[PackedBatch], *, precision: str, device: str = "cpu"
) -> DomainLosses:
    """Losses of `model` on every target of one domain's stream of NumPy batches."""
    shift = image_shift(image_documents(batches))
    images_InC = [b.patches.reshape(-1, b.patches_per_image, b.patches.shape[-1]) for b in batches]
    pool_InC = np.concatenate(images_InC) if shift else None
    parts: dict[str, list[np.ndarray]] = {v: [] for v in VARIANTS}
    rows: list[tuple[np.ndarray, ...]] = []
    names: dict[str, int] = {}
    routing: np.ndarray | None = None
    first = 0
    training = model.training
    model.eval()
    try:
        for batch, own_InC in zip(batches, images_InC, strict=True):
            has_T = batch.targets >= 0
            count = len(own_InC)
            pixels: dict[str, np.ndarray] = {"true": batch.patches}
            if count:
                pixels["blind"] = np.full_like(batch.patches, GREY)
                if pool_InC is not None and shift:
                    donors = (np.arange(first, first + count) + shift) % len(pool_InC)
                    pixels["shuffled"] = pool_InC[donors].reshape(batch.patches.shape)
            first += count
            true_N = None
            for variant in VARIANTS:
                if variant in pixels:
                    nll_T, output = _forward(model, with_patches(batch, pixels[variant]), precision, device)
                    nll_N = nll_T[has_T]
                    if variant == "true":
                        true_N = nll_N
                        if output.routing is not None:
                            counts = output.routing.cpu().numpy()
                            routing = counts if routing is None else routing + counts
                else:
                    nll_N = true_N  # this batch has no image: nothing changes
                parts[variant].append(nll_N)
            document_N = np.array(
                [names.setdefault(document_of(key), len(names)) for key in batch.keys], dtype=np.int64
            )[batch.doc_id[has_T]]
            rows.append((document_N, batch.token_class[has_T], batch.oracle[has_T], batch.targets[has_T]))
    finally:
        model.train(training)
    columns = [np.concatenate(column) for column in zip(*rows, strict=True)]
    absent = set() if shift else {"shuffled"} if first else {"blind", "shuffled"}
    real = [(b.modality, b.doc_id >= 0) for b in batches]
    return DomainLosses(
        nll={v: np.concatenate(parts[v]) for v in VARIANTS if v not in absent},
        document=columns[0],
        token_class=columns[1],
        oracle=columns[2],
        target_ids=columns[3],
        documents=tuple(names),
        text_tokens=sum(int(((m == 0) & r).sum()) for m, r in real),
        image_tokens=sum(int(((m == 1) & r).sum()) for m, r in real),
        routing=routing,
    )


def _forward(model: nn.Module, batch: PackedBatch, precision: str, device: str) -> tuple[np.ndarray, Any]:
    with torch.inference_mode(), precision_context(precision, device):
        nll_T, output = model.token_losses(batch.torch(device))  # type: ignore[operator]
    return nll_T.float().cpu().numpy(), output


def ratio_se(sums_D: np.ndarray, counts_D: np.ndarray) -> float | None:
    """Standard error of sum(sums) / sum(counts) over documents (linearised ratio estimator); None below 2 documents."""
    n = len(counts_D)
    if n < 2:
        return None
    residual_D = sums_D - sums_D.sum() / counts_D.sum() * counts_D
    return float(math.sqrt(n / (n - 1) * float((residual_D**2).sum())) / counts_D.sum())


def paired_difference(a_D: np.ndarray, b_D: np.ndarray, targets_D: np.ndarray) -> tuple[float, float | None]:
    """(mean, se) of loss a - loss b in nats per target from per-document sums, paired by document."""
    difference_D = a_D - b_D
    return float(difference_D.sum() / targets_D.sum()), ratio_se(difference_D, targets_D)


def document_sums(losses: DomainLosses) -> dict[str, np.ndarray]:
    """Per document with targets: doc_targets, doc_true, doc_blind, doc_shuffled (summed nats), f64.

    A variant that the stream has no image for equals doc_true.
    """
    every_N = np.ones(len(losses.document), bool)
    keep_D = _per_document(losses, every_N) > 0
    out = {"doc_targets": _per_document(losses, every_N)[keep_D]}
    for variant in VARIANTS:
        out[f"doc_{variant}"] = _per_document(losses, every_N, variant)[keep_D]
    return out


def class_sums(losses: DomainLosses, names: Sequence[str], wanted: Sequence[str]) -> dict[str, np.ndarray]:
    """Per wanted class that occurs: NAME_targets, NAME_true, NAME_blind, NAME_shuffled (summed nats), f64.

    One entry per document of `document_sums`, in its order, zero where a document has none of the class.
    """
    keep_D = _per_document(losses, np.ones(len(losses.document), bool)) > 0
    out = {}
    for name in wanted:
        here_N = losses.token_class == names.index(name)
        if here_N.any():
            out[f"{name}_targets"] = _per_document(losses, here_N)[keep_D]
            out |= {f"{name}_{v}": _per_document(losses, here_N, v)[keep_D] for v in VARIANTS}
    return out


def _per_document(losses: DomainLosses, here_N: np.ndarray, variant: str | None = None) -> np.ndarray:
    """f64[D]: number of the targets marked in bool[N], or their nats; a variant without images equals the true one."""
    weights_N = None if variant is None else losses.nll.get(variant, losses.nll["true"])[here_N]
    sums_D = np.bincount(losses.document[here_N], weights=weights_N, minlength=len(losses.documents))
    return sums_D.astype(float)


def summarise(
    losses: DomainLosses,
    *,
    chance: float,
    n_bytes: int | None = None,
    bound: float | None = None,
    text_oracle: float | None = None,
) -> dict[str, Any]:
    """The entry of one domain in eval.json. Nats per target: `bound`, the learner's bound with the oracle in it;
    `text_oracle`, the entropy of the text to a reader without images."""
    docs = document_sums(losses)
    loss = _mean(losses.nll["true"])
    return {
        "loss": loss,
        "targets": len(losses.document),
        "documents": len(docs["doc_targets"]),
        "se": ratio_se(docs["doc_true"], docs["doc_targets"]),
        "blind": _mean(losses.nll.get("blind")),
        "shuffled": _mean(losses.nll.get("shuffled")),
        "bits_per_byte": float(losses.nll["true"].sum(dtype=np.float64)) / math.log(2) / n_bytes if n_bytes else None,
        "oracle": _mean(losses.oracle),
        "text_oracle": text_oracle,
        "bound": bound,
        "chance": chance,
    }


def summarise_classes(
    losses: DomainLosses, names: Sequence[str], chances: Mapping[str, float | None] | None = None
) -> dict[str, dict[str, Any]]:
    """Per token class that occurs (0, unclassified, too): loss, targets, oracle, blind, shuffled, chance (or null).

    se, blind_se: standard errors of loss and blind over the documents that have the class.
    """
    out = {}
    for code in np.unique(losses.token_class):
        here_N = losses.token_class == code
        name = names[code] if code < len(names) else f"class-{code}"
        counts_D = _per_document(losses, here_N)
        some_D = counts_D > 0
        se, blind_se = (
            ratio_se(_per_document(losses, here_N, v)[some_D], counts_D[some_D]) if v in losses.nll else None
            for v in ("true", "blind")
        )
        out[name] = {
            "loss": _mean(losses.nll["true"][here_N]),
            "targets": int(here_N.sum()),
            "se": se,
            "oracle": _mean(losses.oracle[here_N]),
            "blind": _mean(losses.nll["blind"][here_N]) if "blind" in losses.nll else None,
            "blind_se": blind_se,
            "shuffled": _mean(losses.nll["shuffled"][here_N]) if "shuffled" in losses.nll else None,
            "chance": (chances or {}).get(name),
        }
    return out


def _mean(values_N: np.ndarray | None) -> float | None:
    """Mean in f64; None without values or where any is unknown (NaN)."""
    if values_N is None or not len(values_N):
        return None
    mean = float(values_N.mean(dtype=np.float64))
    return None if math.isnan(mean) else mean
