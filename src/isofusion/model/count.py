"""Counting: parameters by role and the FLOP ledger, the x-axis of every law (docs/models.md). No torch needed.

`count_parameters` is a closed form that tests hold against the real modules; `flops` is the exact ledger of the matrix
products a batch needs, with the attention pairs its mask really allows; `six_nd` is the paper's approximation.
FLOPs count a multiply-add as two. Padding is never counted, as it is never part of D.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from isofusion.config import ModelConfig
from isofusion.model.paper import PAPER_MODELS, PAPER_SIZES

if TYPE_CHECKING:
    from isofusion.data.batch import PackedBatch

__all__ = [
    "PAPER_MODELS",
    "PAPER_SIZES",
    "BatchShape",
    "ParameterCount",
    "batch_shape",
    "count_module",
    "count_parameters",
    "flops",
    "modules_on_meta",
    "six_nd",
]


@dataclass(frozen=True)
class ParameterCount:
    """Parameters. The connector counts as the decoder's, like the patch projection of early fusion: its image input.

    n_active: what one token meets (top-k experts of E); n_nonembedding: total without input embedding and head.
    """

    n_encoder: int
    n_decoder: int
    n_total: int
    n_active: int
    n_nonembedding: int
    by_role: Mapping[str, int]


@dataclass(frozen=True)
class BatchShape:
    """What sets the FLOPs of a batch, padding left out; `attention_pairs` are the (query, key) pairs of one layer."""

    text_tokens: int
    image_tokens: int
    images: int
    targets: int
    attention_pairs: int


def batch_shape(batch: PackedBatch) -> BatchShape:
    """The shape of a NumPy or torch batch; pairs follow attention's predicate: causal, and whole inside an image."""
    doc, image, modality, targets = (
        np.asarray(x) for x in (batch.doc_id, batch.image_id, batch.modality, batch.targets)
    )
    lengths = np.unique(doc[doc >= 0], return_counts=True)[1].astype(np.int64)
    patches = np.unique(image[image >= 0], return_counts=True)[1].astype(np.int64)
    pairs = (lengths * (lengths + 1) // 2).sum() + (patches * (patches - 1) // 2).sum()
    image_tokens = int((modality[doc >= 0] == 1).sum())
    return BatchShape(
        int((doc >= 0).sum()) - image_tokens, image_tokens, len(patches), int((targets >= 0).sum()), int(pairs)
    )


def _gains(width: int, head: int, depth: int) -> int:
    return depth * (2 * width + 2 * head) + width


def count_parameters(cfg: ModelConfig) -> ParameterCount:
    """Closed form; `count_module` of the real model gives the same numbers (tested)."""
    d, depth, ffn = cfg.width, cfg.depth, 3 * cfg.width * cfg.hidden()
    roles = {
        "embed": cfg.vocab_size * d,
        "head": cfg.vocab_size * d,
        "attention": depth * 4 * d * d,
        "norm": _gains(d, cfg.head_dim, depth),
    }
    if cfg.n_experts:
        roles["experts"] = depth * cfg.n_experts * ffn
        if cfg.routing == "agnostic":  # a fixed rule needs no router
            roles["router"] = depth * cfg.n_experts * d
    else:
        roles["ffn"] = depth * ffn
    if cfg.fusion == "late":
        assert cfg.encoder_width is not None
        e, layers = cfg.encoder_width, cfg.encoder_layers
        roles["connector"] = e * d
        roles["encoder-patch"] = cfg.patch_dim * e
        roles["encoder-attention"] = layers * 4 * e * e
        roles["encoder-ffn"] = layers * 3 * e * cfg.hidden(e)
        roles["encoder-norm"] = _gains(e, cfg.encoder_head, layers)
    else:
        roles["patch"] = cfg.patch_dim * d
    return _summary(cfg, roles)


def count_module(cfg: ModelConfig, parameters: Mapping[str, int]) -> ParameterCount:
    """The same summary from a real model: `{name: p.numel() for name, p in model.named_parameters()}`."""
    from isofusion.model.init import role_of

    roles: dict[str, int] = {}
    for name, size in parameters.items():
        roles[role_of(name)] = roles.get(role_of(name), 0) + size
    return _summary(cfg, roles)


def modules_on_meta(cfg: ModelConfig) -> ParameterCount:
    """Instantiate the real model on torch's meta device (no memory) and count it."""
    import torch

    from isofusion.model.decoder import Decoder

    with torch.device("meta"):
        model = Decoder(cfg)
    return count_module(cfg, {name: p.numel() for name, p in model.named_parameters()})


def _summary(cfg: ModelConfig, roles: dict[str, int]) -> ParameterCount:
    total = sum(roles.values())
    encoder = sum(n for role, n in roles.items() if role.startswith("encoder"))
    idle = roles.get("experts", 0) // cfg.n_experts * (cfg.n_experts - cfg.top_k) if cfg.n_experts else 0
    outside = roles["embed"] + roles["head"]
    return ParameterCount(encoder, total - encoder, total, total - idle, total - outside, dict(sorted(roles.items())))


def flops(cfg: ModelConfig, shape: BatchShape, training: bool = True) -> dict[str, float]:
    """FLOPs of a batch by role: "attention/text", "ffn/image", ... and "total" (their sum).

    "scores/…" are the two products of attention over realised pairs (split by share of tokens in the decoder). The
    embedding is a look-up: 0. The head runs at targets only. Training costs three forward passes (gradients of inputs
    and of weights), but two for a patch projection: no gradient flows into pixels.
    """
    tokens = {"text": shape.text_tokens, "image": shape.image_tokens}
    all_tokens = max(1, shape.text_tokens + shape.image_tokens)
    d, depth = cfg.width, cfg.depth
    ledger: dict[str, float] = {}

    def add(role: str, forward: float, passes: int = 3) -> None:
        if forward:
            ledger[role] = float(forward) * (passes if training else 1)

    for modality, n in tokens.items():
        add(f"attention/{modality}", 2 * 4 * d * d * depth * n)
        add(f"scores/{modality}", 4 * d * depth * shape.attention_pairs * n / all_tokens)
        ffn = 2 * 3 * d * cfg.hidden() * depth * n
        if cfg.n_experts:
            add(f"experts/{modality}", ffn * cfg.top_k)
            if cfg.routing == "agnostic":
                add(f"router/{modality}", 2 * d * cfg.n_experts * depth * n)
        else:
            add(f"ffn/{modality}", ffn)
    if cfg.fusion == "late":
        assert cfg.encoder_width is not None
        e, layers, n = cfg.encoder_width, cfg.encoder_layers, shape.image_tokens
        add("encoder-patch/image", 2 * cfg.patch_dim * e * n, 2)
        add("encoder-attention/image", 2 * 4 * e * e * layers * n)
        add("encoder-ffn/image", 2 * 3 * e * cfg.hidden(e) * layers * n)
        if shape.images:
            add("encoder-scores/image", 4 * e * layers * n * (n // shape.images))
        add("connector/image", 2 * e * d * n)
    else:
        add("patch/image", 2 * cfg.patch_dim * d * shape.image_tokens, 2)
    add("head/text", 2 * d * cfg.vocab_size * shape.targets)
    ledger["total"] = sum(ledger.values())
    return ledger


def six_nd(cfg: ModelConfig, tokens: float, image_share: float) -> float:
    """Training FLOPs as the paper counts them, for D = `tokens` of which `image_share` are patches.

    arXiv 2504.07951 section 2: early 6 N D; late 6 D (f N_v + N_t), f the share of image tokens; experts 6 N_active D.
    """
    n = count_parameters(cfg)
    return 6.0 * tokens * (image_share * n.n_encoder + (n.n_active - n.n_encoder))
