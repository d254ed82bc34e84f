"""Hand-made packed batches: documents are written as strings, one character per slot.

`t` is a text slot, `i` a patch (runs of `n` patches are one image each), `.` is padding, `|` starts the next document.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from isofusion.config import ModelConfig
from isofusion.data.batch import IGNORE, PackedBatch
from isofusion.model import native

VOCAB, PATCH = 24, 2
IMAGE_ID, PAD_ID, BOS_ID, EOS_ID = 0, 1, 2, 3


def build(rows: list[str], patches_per_image: int = 4, seed: int = 0, first_document: int = 0) -> PackedBatch:
    """A NumPy batch; contents of document number k depend on (seed, first_document + k) only, wherever it is packed."""
    n = patches_per_image
    length = len(rows[0].replace("|", ""))
    out: dict[str, list] = {name: [] for name in ("token_ids", "modality", "doc_id", "image_id", "position", "targets")}
    patches: list[np.ndarray] = []
    patch_slot: list[int] = []
    doc, images, keys = 0, 0, []
    for row in rows:
        assert len(row.replace("|", "")) == length, "rows must have one length"
        for text in row.split("|"):
            body = text.rstrip(".")
            if body:
                rng = np.random.default_rng([seed, first_document + doc])
                ids, in_image = [], 0
                for at, kind in enumerate(body):
                    out["modality"].append(int(kind == "i"))
                    out["doc_id"].append(doc)
                    out["position"].append(at)
                    if kind == "i":
                        ids.append(IMAGE_ID)
                        out["image_id"].append(images)
                        patches.append(rng.integers(0, 256, PATCH * PATCH * 3, dtype=np.uint8))
                        patch_slot.append(len(out["modality"]) - 1)
                        in_image += 1
                        if in_image == n:
                            images, in_image = images + 1, 0
                    else:
                        assert in_image == 0, "an image was cut"
                        ids.append(
                            BOS_ID if at == 0 else EOS_ID if at == len(body) - 1 else int(rng.integers(4, VOCAB))
                        )
                        out["image_id"].append(-1)
                for at in range(len(body)):
                    last_of_image = at + 1 < len(body) and body[at + 1] == "t"
                    if body[at] == "i" and last_of_image:
                        last_of_image = (at + 1 - body[:at].count("t")) % n == 0
                    out["targets"].append(ids[at + 1] if last_of_image else IGNORE)
                out["token_ids"] += ids
                keys.append(f"test:0:{doc}")
                doc += 1
            for _ in range(len(text) - len(body)):
                for name, value in (("token_ids", PAD_ID), ("modality", 0), ("doc_id", -1), ("image_id", -1)):
                    out[name].append(value)
                out["position"].append(0)
                out["targets"].append(IGNORE)
    total = len(rows) * length
    return PackedBatch(
        rows=len(rows),
        row_len=length,
        patches_per_image=n,
        token_ids=np.array(out["token_ids"], np.int32),
        modality=np.array(out["modality"], np.uint8),
        doc_id=np.array(out["doc_id"], np.int32),
        image_id=np.array(out["image_id"], np.int32),
        position=np.array(out["position"], np.int32),
        targets=np.array(out["targets"], np.int32),
        domain=np.zeros(total, np.uint8),
        patches=np.array(patches, np.uint8).reshape(-1, PATCH * PATCH * 3),
        patch_slot=np.array(patch_slot, np.int32),
        token_class=np.zeros(total, np.uint8),
        oracle=np.full(total, np.nan, np.float32),
        keys=tuple(keys),
    )


ROWS = ["tiiiittttt|ttiiiitiiiittt......", "ttttttttttttt|tiiiitt|ttttttt..."]
"""Five documents: a caption, two images in one document, text, a caption, text; and padding."""


@pytest.fixture
def batch() -> PackedBatch:
    return build(ROWS)


@pytest.fixture
def build_batch() -> Callable[..., PackedBatch]:
    return build


def config(kind: str = "early", **changes: object) -> ModelConfig:
    """A model of two blocks; kind is early, late, moe or routed."""
    settings: dict = {
        "width": 16,
        "depth": 2,
        "head_dim": 8,
        "ffn_multiple": 8,
        "vocab_size": VOCAB,
        "patch_size": PATCH,
    }
    if kind == "late":
        settings |= {"fusion": "late", "encoder_width": 8}
    if kind == "moe":
        settings |= {"n_experts": 4}
    if kind == "routed":
        settings |= {"n_experts": 2, "routing": "modality-routed"}
    return ModelConfig(**(settings | changes))


@pytest.fixture
def make_config() -> Callable[..., ModelConfig]:
    return config


@pytest.fixture(
    params=[
        "torch",
        pytest.param(
            "native",
            marks=pytest.mark.skipif(not native.available(), reason=f"kernels: {native.describe()}"),
        ),
    ]
)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The test runs with PyTorch's operations, then with the kernels in C++."""
    monkeypatch.setattr(native, "available", lambda: request.param == "native")
    return request.param
