"""Trunk, branch and evaluation on the built-in world, with an early expert model and a late one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="training needs the [train] extra")

from isofusion.config import RunConfig  # noqa: E402
from isofusion.data.world.world import CHANCE  # noqa: E402
from isofusion.train.loop import train_run  # noqa: E402
from isofusion.train.metrics import read_metrics  # noqa: E402

SOURCES = [{"name": d, "domain": d, "format": "world", "weight": w} for d, w in (("caption", 2), ("text", 1))]


def config(arm: str, **changes: Any) -> RunConfig:
    model = {"width": 16, "depth": 2, "head_dim": 8, "ffn_multiple": 16, "vocab_size": 512, "patch_size": 8}
    model |= {"fusion": "late", "encoder_width": 8} if arm == "late" else {"n_experts": 4}
    return RunConfig.model_validate(
        {
            "study": "t", "arm": arm, "size": "s", "seed": 0, "kind": "trunk", "end_step": 4, "forks": [4],
            "model": model,
            "data": {"sources": SOURCES, "row_len": 256, "image_size": 48, "patch_size": 8, "val_rows": 6},
            "train": {"lr": 0.01, "warmup_steps": 2, "rows_per_step": 3},
            **changes,
        }
    )  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[RunConfig, Path]]:
    root = tmp_path_factory.mktemp("runs")
    out = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ISOFUSION_CACHE", str(tmp_path_factory.mktemp("cache")))
        for arm in ("late", "moe"):
            trunk = config(arm)
            branch = config(arm, kind="branch", parent=trunk.name, start_step=4, end_step=6, forks=[])
            for run in (trunk, branch):
                assert train_run(run, root / run.name, root, threads=1) == "done"
            out[arm] = (branch, root / branch.name)
    return out


def test_evaluation_stands_beside_the_truth(results: dict[str, tuple[RunConfig, Path]]) -> None:
    for _, folder in results.values():
        record = json.loads((folder / "eval.json").read_text())
        assert list(record["domains"]) == ["caption", "text"]
        for entry in record["domains"].values():
            assert 0 < entry["oracle"] <= entry["bound"] < entry["loss"] < entry["chance"] + 0.1
        caption, text = record["domains"]["caption"], record["domains"]["text"]
        assert record["mean"] == pytest.approx((caption["loss"] + text["loss"]) / 2)
        assert caption["bound"] > caption["oracle"]  # names never seen in training
        assert text["bound"] == text["oracle"]  # no name is read off a glyph
        assert caption["text_oracle"] > caption["oracle"] + 0.5  # names, colours, tones: the images tell much
        assert text["text_oracle"] == pytest.approx(text["oracle"], abs=1e-5)
        assert caption["blind"] > caption["text_oracle"]
        assert text["blind"] is text["shuffled"] is None
        asked = record["classes"]["caption/fusion-after"]
        assert asked["chance"] == pytest.approx(CHANCE["fusion-after"])
        assert asked["se"] > 0
        assert asked["blind_se"] > 0
        with np.load(folder / "eval_docs.npz") as docs:
            targets, true, blind = (docs[f"caption/fusion-after_{kind}"] for kind in ("targets", "true", "blind"))
            assert targets.shape == docs["caption/doc_targets"].shape
            assert not [name for name in docs.files if name.startswith("text/fusion")]
        assert targets.sum() == asked["targets"]
        assert true.sum() / targets.sum() == pytest.approx(asked["loss"])
        assert blind.sum() / targets.sum() == pytest.approx(asked["blind"])
        by_class = [c for name, c in record["classes"].items() if name.startswith("caption/")]
        assert sum(c["targets"] for c in by_class) == caption["targets"]
        total = sum(c["loss"] * c["targets"] for c in by_class)
        assert total / caption["targets"] == pytest.approx(caption["loss"])


def test_arms_are_judged_on_the_same_stream(results: dict[str, tuple[RunConfig, Path]]) -> None:
    late, moe = (json.loads((folder / "eval.json").read_text()) for _, folder in results.values())
    for domain in ("caption", "text"):
        for key in ("targets", "oracle", "bound", "chance", "documents"):
            assert late["domains"][domain][key] == moe["domains"][domain][key]
    digests = [[r["keys_digest"] for r in read_metrics(f / "metrics.jsonl")] for _, f in results.values()]
    assert digests[0] == digests[1]
    assert late["routing"] is None
    assert np.array(moe["routing"]["text"]["image"]).sum() == 0
    assert np.array(moe["routing"]["caption"]["image"]).sum() > 0


def test_tokens_agree_with_the_ledger_of_the_data(results: dict[str, tuple[RunConfig, Path]]) -> None:
    _, folder = results["late"]
    record, data = (json.loads((folder / name).read_text()) for name in ("eval.json", "data.json"))
    for key in ("tokens", "text_tokens", "image_tokens"):
        assert record[key] == data[key] > 0
    assert record["flops"] > 0
    assert len(read_metrics(folder / "metrics.jsonl")) == 2
