"""eval.json and eval_docs.npz of a finished branch: the model on the fixed validation stream of each of its domains.

Beside each loss stand the numbers that give it meaning: the oracle entropy (what N, D -> infinity can reach), the same
to a reader of the text alone (the difference is what the images tell), the learner's bound (what this many exposures
can reach: oracle plus the names never seen in training, docs/world.md), and chance (a uniform guess over the
vocabulary; per class, over the possible answers).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import nn

from isofusion.data.sample import DOMAINS
from isofusion.evaluate.losses import (
    DomainLosses,
    class_sums,
    document_sums,
    evaluate_domain,
    summarise,
    summarise_classes,
)

PAIRED_CLASSES = ("fusion-after", "fusion-before")
"""Token classes whose losses are kept document by document, so that two models can be compared on the same ones."""


def evaluate_run(
    model: nn.Module, train_stream: Any, val_stream: Any, step: int, precision: str, device: str = "cpu"
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(record, documents): "domains", "classes", "mean", "routing" of eval.json, and the arrays of eval_docs.npz.

    `step`: updates done, which decides the exposures behind the learner's bound. Losses in nats per target.
    """
    domains: dict[str, Any] = {}
    classes: dict[str, Any] = {}
    routing: dict[str, Any] = {}
    documents: dict[str, np.ndarray] = {}
    names, chances = world_classes()
    for domain in (d for d in DOMAINS if d in val_stream.domains):
        losses = evaluate_domain(model, val_stream.val_batches(domain), precision=precision, device=device)
        domains[domain] = summarise(
            losses,
            chance=math.log(val_stream.tokenizer.vocab_size),
            n_bytes=val_stream.tokenizer.n_bytes(losses.target_ids),
            bound=learner_bound(losses, domain, train_stream, val_stream, step),
            text_oracle=text_entropy(losses, domain, val_stream),
        )
        for name, entry in summarise_classes(losses, names, chances).items():
            classes[f"{domain}/{name}"] = entry
        for name, array in (document_sums(losses) | class_sums(losses, names, PAIRED_CLASSES)).items():
            documents[f"{domain}/{name}"] = array
        if losses.routing is not None:
            routing[domain] = {"text": losses.routing[:, 0].tolist(), "image": losses.routing[:, 1].tolist()}
    mean = sum(entry["loss"] for entry in domains.values()) / len(domains)
    return {"domains": domains, "classes": classes, "mean": mean, "routing": routing or None}, documents


def world_classes() -> tuple[tuple[str, ...], dict[str, float | None]]:
    """Names of the token classes by code, and chance level per class in nats (None where it means nothing)."""
    from isofusion.data.world.world import CHANCE, CLASSES

    return CLASSES, CHANCE


def text_entropy(losses: DomainLosses, domain: str, val_stream: Any) -> float | None:
    """H(text), nats per target: the entropy to a reader who sees no image; None where it is unknown (real data).

    Less the oracle, H(text | image), it is what the images tell. No blind model gets below it.
    """
    if math.isnan(float(losses.oracle.mean(dtype=np.float64))):
        return None
    return float(val_stream.val_text_nats(domain)) / len(losses.oracle)


def learner_bound(losses: DomainLosses, domain: str, train_stream: Any, val_stream: Any, step: int) -> float | None:
    """Nats per target that no learner gets below after `step` updates; None where the oracle is unknown (real data).

    Oracle mean + sum over the names this stream really asks for of (1 - p_k)^n log(names left), over all its targets.
    """
    world = next((s.world for s in train_stream.sources if getattr(s, "world", None) is not None), None)
    oracle = float(losses.oracle.mean(dtype=np.float64))
    if world is None or math.isnan(oracle):
        return None
    lookups = val_stream.val_lookups(domain)
    per_name = world.learner_bound(train_stream.exposures(step), lookups)
    return oracle + per_name * len(lookups) / len(losses.oracle)
