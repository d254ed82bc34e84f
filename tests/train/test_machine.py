"""What belongs to the machine: read from the environment, chosen by memory, and without effect on a run's identity."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="training needs the [train] extra")

from isofusion.config import ModelConfig, RunConfig  # noqa: E402
from isofusion.errors import InputError  # noqa: E402
from isofusion.model import native  # noqa: E402
from isofusion.model.memory import memory_bytes  # noqa: E402
from isofusion.train import process  # noqa: E402
from isofusion.train.loop import build_decoder, train_run  # noqa: E402
from isofusion.train.machine import Machine, fit_memory  # noqa: E402
from isofusion.train.metrics import read_metrics  # noqa: E402
from isofusion.train.process import environment, onednn_is_exact, reproducible  # noqa: E402
from isofusion.train.speed import datasheet_peak, measured_peak  # noqa: E402

SOURCES = [{"name": d, "domain": d, "format": "world", "weight": w} for d, w in (("caption", 2), ("text", 1))]


def config(**model: Any) -> RunConfig:
    settings = {"width": 16, "depth": 2, "head_dim": 8, "ffn_multiple": 16, "vocab_size": 512, "patch_size": 8}
    return RunConfig.model_validate(
        {
            "study": "t", "arm": "a", "size": "s", "seed": 0, "kind": "trunk", "end_step": 3, "forks": [3],
            "model": settings | model,
            "data": {"sources": SOURCES, "row_len": 256, "image_size": 48, "patch_size": 8, "val_rows": 6},
            "train": {"lr": 0.01, "warmup_steps": 2, "rows_per_step": 4},
        }
    )  # fmt: skip


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Machine.here() == Machine()
    for name, value in (("DEVICE", "cpu"), ("INPUT_WORKERS", "3"), ("MICRO_ROWS", "2"), ("MEMORY_GB", "0.5")):
        monkeypatch.setenv(f"ISOFUSION_{name}", value)
    monkeypatch.setenv("ISOFUSION_COMPILE", "0")
    assert Machine.here() == Machine("cpu", 3, 2, 5e8, False)
    assert Machine(input_workers=3).workers("cpu", 1) == 3
    assert Machine().workers("cpu", 4) == 0  # the cores of a CPU all train
    assert Machine().workers("cuda", 4) == 3
    for name, value, message in (
        ("DEVICE", "tpu", "choose one of auto, cpu, cuda"),
        ("INPUT_WORKERS", "many", "must be a number"),
        ("MICRO_ROWS", "0", "whole number >= 1"),
    ):
        with monkeypatch.context() as patch:
            patch.setenv(f"ISOFUSION_{name}", value)
            with pytest.raises(InputError, match=message):
                Machine.here()


@pytest.mark.skipif(not onednn_is_exact(), reason="not an AMD processor with AVX-512: PyTorch's own products are used")
def test_float32_products_of_a_run_are_onednns_and_float32_still() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(300, 200), torch.randn(200, 100)
    exact, before = x.double() @ w.double(), torch.backends.mkldnn.matmul.fp32_precision
    with reproducible(1):
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
        error = ((x @ w).double() - exact).abs().max()
    assert error < 2e-6 * exact.abs().max()  # products of bf16 are off by 2e-3
    assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_where_onednn_would_round_it_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_vendor", lambda: "GenuineIntel")
    assert not onednn_is_exact.__wrapped__()
    before = torch.backends.mkldnn.matmul.fp32_precision
    monkeypatch.setattr(process, "onednn_is_exact", lambda: False)
    with reproducible(1):
        assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_what_a_run_was_made_with_names_its_kernels_on_a_cpu_alone() -> None:
    here = environment(2)
    assert here["threads"] == 2
    assert here["kernels"] == native.describe()
    assert here["float32_products"] in ("onednn", "torch")
    assert not {"kernels", "float32_products"} & environment(2, "cuda").keys()


def test_a_missing_gpu_is_an_error_only_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert Machine().resolve() == Machine("cpu").resolve() == "cpu"
    with pytest.raises(InputError, match="torch finds no GPU"):
        Machine("cuda").resolve()


def test_memory_chooses_micro_batches_then_blocks_to_recompute() -> None:
    dense = ModelConfig(width=800, head_dim=80)
    experts = ModelConfig(width=800, head_dim=80, n_experts=8)

    def peak(cfg: ModelConfig, rows: int, recompute: int) -> float:
        return memory_bytes(cfg, rows * 1024, "bf16", device="cuda", recompute=recompute)["total"]

    def chosen(cfg: ModelConfig, budget: float) -> tuple[int, int]:
        rows, recompute = fit_memory(cfg, 64, 1024, "bf16", "cuda", budget)
        assert peak(cfg, rows, recompute) <= budget
        return rows, recompute

    assert chosen(dense, 1e12) == chosen(experts, 1e12) == (64, 0)
    assert chosen(dense, peak(dense, 16, 0)) == (16, 0)
    rows, recompute = chosen(dense, peak(dense, 16, 0) * 0.95)  # smaller ones would leave the GPU idle
    assert rows == 64
    assert 0 < recompute <= 24
    assert chosen(experts, peak(experts, 64, 7)) == (64, 7)
    assert peak(experts, 64, 6) > peak(experts, 64, 7)
    rows, recompute = chosen(dense, peak(dense, 64, 24) * 0.9)
    assert rows < 64
    with pytest.raises(InputError, match=r"1 row of 1024 slots .* every block recomputed, and 1\.00 GB"):
        fit_memory(dense, 64, 1024, "bf16", "cuda", 1e9)


@pytest.mark.parametrize("model", [{}, {"fusion": "late", "encoder_width": 16}, {"n_experts": 4}])
def test_recomputed_blocks_give_the_same_gradients(model: dict[str, Any], tmp_path: Path) -> None:
    from isofusion.data.stream import Stream

    run = config(**model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ISOFUSION_CACHE", str(tmp_path))
        batch = Stream(run.data, 0, "train", 2).batch(0).torch()
    results = []
    for recompute in (0, 1, 4):
        decoder = build_decoder(run)
        decoder.recompute = recompute
        nll, output = decoder.token_losses(batch)
        (nll.mean() + output.balance_loss).backward()
        results.append([nll.detach(), *(p.grad for p in decoder.parameters())])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_experts_are_not_compiled_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    for device in ("cpu", "cuda"):
        with pytest.raises(InputError, match="experts cannot be compiled in fp32"):
            Machine(compile=True).prepare(None, config(n_experts=2), device, "fp32")
    compiled: list[str] = []
    model = SimpleNamespace(recompute=0, compile_blocks=lambda: compiled.append("yes"))
    for precision in ("fp32", "bf16"):  # and where nobody asked, a GPU does without
        Machine(memory=1e12).prepare(model, config(n_experts=2), "cuda", precision)
        compiled.append(precision)
    assert compiled == ["fp32", "yes", "bf16"]


def test_a_run_with_workers_and_micro_batches_is_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISOFUSION_CACHE", str(tmp_path / "cache"))
    run, losses = config(n_experts=4), []
    # the gradient is exact; how bf16 rounds it depends on how many rows a product has
    run = run.model_copy(update={"train": run.train.model_copy(update={"precision": "fp32"})})
    for settings in ({}, {"INPUT_WORKERS": "1"}, {"INPUT_WORKERS": "1", "MICRO_ROWS": "2"}):
        root = tmp_path / "-".join(settings or ["plain"])
        for name, value in settings.items():
            monkeypatch.setenv(f"ISOFUSION_{name}", value)
        assert train_run(run, root / run.name, root, threads=1) == "done"
        losses.append([record["loss"] for record in read_metrics(root / run.name / "metrics.jsonl")])
    assert losses[0] == losses[1]  # to the bit
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)


def test_peaks_of_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert datasheet_peak("NVIDIA H100 80GB HBM3") == datasheet_peak("NVIDIA H200") == 989e12
    assert datasheet_peak("NVIDIA H100 PCIe") == 756e12
    assert datasheet_peak("NVIDIA A100-SXM4-80GB") == 312e12
    assert datasheet_peak("Some CPU") is None
    monkeypatch.setenv("ISOFUSION_CACHE", str(tmp_path))
    rate = measured_peak("cpu", "fp32", 1)
    assert 1e8 < rate < 1e13
    assert measured_peak("cpu", "fp32", 1) == rate  # kept
