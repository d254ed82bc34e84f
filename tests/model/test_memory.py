"""The predicted peak of a training step against what the allocator saw."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="training needs the [train] extra")

from isofusion.config import DataConfig, ModelConfig, TrainConfig  # noqa: E402
from isofusion.data.batch import PackedBatch  # noqa: E402
from isofusion.data.stream import Stream  # noqa: E402
from isofusion.model import native  # noqa: E402
from isofusion.model.count import BatchShape, batch_shape, count_parameters  # noqa: E402
from isofusion.model.decoder import Decoder  # noqa: E402
from isofusion.model.init import init_weights  # noqa: E402
from isofusion.model.memory import memory_bytes  # noqa: E402
from isofusion.model.paper import PAPER_MODELS  # noqa: E402
from isofusion.train.memory import peak_bytes, resident_bytes  # noqa: E402
from isofusion.train.optimizer import build_optimizer  # noqa: E402
from isofusion.train.step import choose_precision, train_step  # noqa: E402

needs_native = pytest.mark.skipif(not native.available(), reason=f"kernels: {native.describe()}")
DOMAINS = (("caption", 45), ("interleaved", 45), ("text", 10))
DATA = DataConfig(
    sources=[{"name": d, "domain": d, "format": "world", "weight": w} for d, w in DOMAINS],
    row_len=256,
    image_size=48,
    patch_size=8,
)


def config(**changes: Any) -> ModelConfig:
    settings = {"width": 64, "depth": 4, "head_dim": 16, "ffn_multiple": 16, "vocab_size": 512, "patch_size": 8}
    return ModelConfig(**(settings | changes))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ISOFUSION_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def measure(cfg: ModelConfig, batch: PackedBatch, precision: str) -> tuple[int, int]:
    """Bytes that stay between steps, and the peak of a step with them."""
    if precision == "bf16" != choose_precision("auto"):
        pytest.skip("this CPU has no bf16 products: its steps would take minutes")
    model = Decoder(cfg)
    init_weights(model, cfg, 0)
    optimizer, tensors = build_optimizer(model, cfg, TrainConfig()), batch.torch()

    def step() -> None:
        balance = 0.01 * bool(cfg.n_experts)
        train_step(model, optimizer, tensors, precision=precision, clip=1.0, balance_weight=balance)

    step()
    optimizer.zero_grad()
    peak = resident_bytes(model, optimizer) + peak_bytes(step)
    return resident_bytes(model, optimizer), peak


@pytest.mark.parametrize(
    ("rows", "changes"),
    [
        (2, {}),
        (2, {"vocab_size": 4096, "depth": 2}),  # the head's softmax is the worst moment
        (2, {"fusion": "late", "encoder_width": 32, "depth": 2}),
        (2, {"n_experts": 4, "top_k": 2, "depth": 2}),
        *(
            pytest.param(rows, changes, marks=pytest.mark.slow)
            for rows, changes in (
                (8, {"width": 128}),
                (4, {"depth": 8}),
                (4, {"vocab_size": 50432, "depth": 2}),  # the head's logits come in chunks
                (4, {"n_experts": 8}),
                (1, {"n_experts": 64}),  # a few tokens for each
                (4, {"n_experts": 2, "routing": "modality-routed"}),
                (1, {"width": 256, "n_experts": 8}),  # weights and gradients, hardly any activations
            )
        ),
    ],
)
@pytest.mark.parametrize("kernels", [False, pytest.param(True, marks=needs_native)])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_peak_of_a_step_is_within_ten_percent(
    rows: int, changes: dict[str, Any], kernels: bool, precision: str, cache: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "available", lambda: kernels)
    cfg = config(**changes)
    batch = Stream(DATA, 0, "train", rows).batch(0)
    resident, measured = measure(cfg, batch, precision)
    parts = memory_bytes(cfg, batch.n_slots, precision, batch_shape(batch), native=kernels)
    assert parts["weights"] + parts["adam"] == pytest.approx(resident * 12 / 16, rel=1e-3)
    assert parts["total"] == pytest.approx(measured, rel=0.1)
    # what knows nothing of the batch is still a plan: of its tokens near, of full rows not lower than the bound allows
    real = int((batch.doc_id >= 0).sum())
    assert memory_bytes(cfg, real, precision, native=kernels)["total"] == pytest.approx(measured, rel=0.25)
    assert memory_bytes(cfg, batch.n_slots, precision, native=kernels)["total"] > 0.9 * measured


@pytest.mark.parametrize("kernels", [False, pytest.param(True, marks=needs_native)])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_peak_with_long_documents(
    precision: str, kernels: bool, build_batch: Callable[..., PackedBatch], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "available", lambda: kernels)
    cfg = config(patch_size=2, head_dim=8)
    batch = build_batch(["t" * 500 + "|" + "t" * 524] * 2)
    _, measured = measure(cfg, batch, precision)
    predicted = memory_bytes(cfg, batch.n_slots, precision, batch_shape(batch), native=kernels)["total"]
    assert predicted == pytest.approx(measured, rel=0.1)


def test_the_allocator_is_read_right() -> None:
    def three() -> None:
        a = torch.ones(1000)
        b = torch.ones(500)
        del a
        c = torch.ones(800)
        del b, c

    assert peak_bytes(three) == 6000


def test_parts_add_up_and_grow_as_they_should() -> None:
    cfg = config()
    parts = memory_bytes(cfg, 1024)
    assert parts["total"] == sum(size for role, size in parts.items() if role != "total")
    assert parts["weights"] + parts["adam"] == 12 * count_parameters(cfg).n_total
    more = memory_bytes(cfg, 2048)
    assert more["activations"] == pytest.approx(2 * parts["activations"], rel=1e-6)
    for device in ("cpu", "cuda"):
        totals = [memory_bytes(cfg, 8192, "bf16", device=device, recompute=k)["total"] for k in (0, 2, 4)]
        assert totals[0] > totals[1] > totals[2]
    eager, compiled = (memory_bytes(cfg, 8192, "bf16", device="cuda", compiled=c)["total"] for c in (False, True))
    assert compiled < eager < memory_bytes(cfg, 8192, device="cuda", compiled=False)["total"]


def test_a_rank_holds_its_share_and_what_it_gathers() -> None:
    cfg = ModelConfig(width=2048, depth=24, head_dim=128)
    one, eight = (memory_bytes(cfg, 8 * 1024, "bf16", device="cuda", shards=shards) for shards in (1, 8))
    assert "whole" not in one
    for name in ("weights", "adam"):
        assert eight[name] == one[name] / 8
    assert eight["activations"] == one["activations"]
    ends = 2 * cfg.vocab_size * cfg.width
    assert 4 * ends < eight["whole"] < 4 * (ends + count_parameters(cfg).n_total / 8)
    assert eight["total"] < one["total"] - 0.6 * 12 * count_parameters(cfg).n_total
    assert eight["total"] == sum(size for role, size in eight.items() if role != "total")


@pytest.mark.parametrize("ranks", [1, 8])
def test_the_prediction_for_a_gpu_holds_what_its_compiled_code_kept_alive(ranks: int) -> None:
    """Peaks of real steps of the paper's models, every buffer counted (benchmarks/gpu_offline.py)."""
    results = Path(__file__).parents[2] / "benchmarks" / "results"
    rows = [row for path in results.glob("gpu_offline*.json") for row in json.loads(path.read_text())["rows"]]
    rows = [row for row in rows if row["ranks"] == ranks]
    assert {row["name"].partition("-")[0] for row in rows} == {"early", "late", "moe"}
    for row in rows:
        cfg, how = PAPER_MODELS[row["name"]], {"recompute": row["recompute"], "shards": ranks}
        predicted = memory_bytes(cfg, row["slots"], "bf16", BatchShape(**row["shape"]), "cuda", **how)["total"]
        assert predicted == pytest.approx(row["memory_tracked"], rel=0.05), row["name"]
