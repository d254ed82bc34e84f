from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="training needs the [train] extra")

import torch.distributed as dist  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from isofusion.config import DataConfig, ModelConfig, TrainConfig  # noqa: E402
from isofusion.data.batch import PackedBatch  # noqa: E402
from isofusion.data.stream import Stream  # noqa: E402
from isofusion.model.decoder import Decoder  # noqa: E402
from isofusion.model.init import init_weights  # noqa: E402
from isofusion.train.optimizer import AdamW, build_optimizer, is_shared, own_part  # noqa: E402
from isofusion.train.parallel import Parallel  # noqa: E402
from isofusion.train.step import (  # noqa: E402
    StepResult,
    choose_precision,
    clip_and_step,
    step_on_device,
    total_norm,
    train_step,
)


class Table(torch.nn.Module):
    """nll of a slot = its weight; 0 where there is no target."""

    def __init__(self, values: list[float], balance: float = 0.0) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor(values))
        self.balance = balance

    def token_losses(self, batch):
        nll = torch.where(batch.targets >= 0, self.w, 0.0)
        return nll, SimpleNamespace(balance_loss=self.balance * self.w.sum())


def step(model: Table, targets: list[int], domain: list[int], **kw):
    batch = SimpleNamespace(targets=torch.tensor(targets), domain=torch.tensor(domain, dtype=torch.uint8))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    return train_step(model, optimizer, batch, precision="fp32", **{"clip": 100.0, **kw})


def test_loss_is_the_mean_over_all_targets_and_sums_are_per_domain() -> None:
    model = Table([1.0, 2.0, 3.0, 6.0])
    result = step(model, [5, 5, -100, 5], [0, 0, 0, 2])
    assert result.loss == pytest.approx(3.0)
    assert result.nll == {"caption": 3.0, "interleaved": 0.0, "text": 6.0}
    assert result.targets == {"caption": 2, "interleaved": 0, "text": 1}
    assert result.grad_norm == pytest.approx(math.sqrt(3) / 3)
    assert model.w.tolist() == pytest.approx([2 / 3, 5 / 3, 3.0, 17 / 3])


def test_no_target_is_loss_zero_and_no_move() -> None:
    model = Table([1.0, 2.0])
    result = step(model, [-100, -100], [0, 0])
    assert (result.loss, result.grad_norm) == (0.0, 0.0)
    assert model.w.tolist() == [1.0, 2.0]


def test_balance_loss_is_added_with_its_weight() -> None:
    model = Table([1.0, 1.0], balance=1.0)
    result = step(model, [-100, -100], [0, 0], balance_weight=0.5)
    assert result.loss == 0.0
    assert result.balance == 2.0
    assert model.w.tolist() == [0.5, 0.5]


@pytest.mark.parametrize("kind", [torch.optim.SGD, AdamW])
def test_clip_scales_to_the_norm_of_all_gradients(kind: Any) -> None:
    """SGD's update is the gradient; AdamW's first moment is a tenth of it."""
    for clip, wanted in ((1.0, [0.6, 0.8]), (10.0, [3.0, 4.0])):
        parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
        for parameter, value in zip(parameters, (3.0, 4.0), strict=True):
            parameter.grad = torch.tensor([value])
        optimizer = kind([{"params": parameters}], lr=1.0)
        norm = total_norm(optimizer)
        assert float(norm) == pytest.approx(5.0)
        clip_and_step(optimizer, clip, norm)
        seen = [10 * optimizer.state[p]["exp_avg"] for p in parameters] if kind is AdamW else [-p for p in parameters]
        assert [x.item() for x in seen] == pytest.approx(wanted, rel=1e-5)
        assert getattr(optimizer, "grad_scale", None) is None  # a later plain step must not be scaled


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_loss_does_not_touch_the_weights(bad: float) -> None:
    model = Table([1.0, bad])
    result = step(model, [1, 1], [0, 0])
    assert not result.finite
    assert model.w[0].item() == 1.0


@pytest.mark.parametrize(
    ("avx512_bf16", "amx", "expected"), [(True, False, "bf16"), (False, True, "bf16"), (False, False, "fp32")]
)
def test_precision_is_the_machines_or_what_is_asked(avx512_bf16: bool, amx: bool, expected: str, monkeypatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert choose_precision() == choose_precision("auto", "cpu") == expected
    assert choose_precision("auto", "cuda") == "bf16"
    for asked in ("fp32", "bf16"):
        assert choose_precision(asked) == asked


# ---- several micro-batches, and a step that asks the device nothing -------------------------------------------------

WORLD = DataConfig(
    sources=[
        {"name": d, "domain": d, "format": "world", "weight": w}
        for d, w in (("caption", 45), ("interleaved", 45), ("text", 10))
    ],
    row_len=256,
    image_size=48,
    patch_size=8,
)


def tiny(kind: str, **changes: Any) -> ModelConfig:
    settings: dict[str, Any] = {"width": 16, "depth": 2, "head_dim": 8, "ffn_multiple": 16, "vocab_size": 512}
    settings |= {"patch_size": 8, "norm_eps": 1e-6}
    settings |= {
        "early": {},
        "late": {"fusion": "late", "encoder_width": 8},
        "moe": {"n_experts": 4, "top_k": 2},
        "routed": {"n_experts": 2, "routing": "modality-routed"},
    }[kind]
    return ModelConfig(**(settings | changes))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> PackedBatch:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ISOFUSION_CACHE", str(tmp_path_factory.mktemp("cache")))
        return Stream(WORLD, 0, "train", 4).batch(0)


def built(cfg: ModelConfig, attention: str = "auto") -> tuple[Decoder, torch.optim.Optimizer]:
    model = Decoder(cfg, attention)
    init_weights(model, cfg, 0)
    return model, build_optimizer(model, cfg, TrainConfig(lr=1e-2))


def gradients(kind: str, parts: Any, across: Any = None) -> tuple[StepResult, dict[str, torch.Tensor]]:
    model, optimizer = built(tiny(kind))
    result = train_step(model, optimizer, parts, precision="fp32", clip=1e9, balance_weight=0.5, across=across)
    return result, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("kind", ["late", "moe"])
def test_micro_batches_give_the_gradient_of_the_whole_step(kind: str, rows: PackedBatch) -> None:
    whole, expected = gradients(kind, rows.torch())
    parts = rows.split(1)
    counts = [int((part.targets >= 0).sum()) for part in parts]
    assert len(set(counts)) > 1  # a mean of means would be another loss
    for size in (1, 3):
        result, got = gradients(kind, [part.torch() for part in rows.split(size)])
        assert result.targets == whole.targets
        assert result.loss == pytest.approx(whole.loss, rel=1e-6)
        assert result.balance == pytest.approx(whole.balance, rel=1e-5)
        assert result.grad_norm == pytest.approx(whole.grad_norm, rel=1e-5)
        assert result.nll == pytest.approx(whole.nll, rel=1e-6)
        for name, gradient in expected.items():
            assert (got[name] - gradient).abs().max() <= 2e-5 * gradient.abs().max() + 1e-9, name


def test_balance_shares_are_those_of_the_whole_step(rows: PackedBatch) -> None:
    model, _ = built(tiny("moe"))
    parts = [part.torch() for part in rows.split(2)]
    outputs = [model(part) for part in parts]
    whole = model(rows.torch())
    routing = torch.stack([output.routing for output in outputs]).sum(0)
    assert torch.equal(routing, whole.routing)
    total = sum(float(model.balance_loss(output, routing).detach()) for output in outputs)
    assert total == pytest.approx(float(whole.balance_loss.detach()), rel=1e-5)
    apart = sum(float(output.balance_loss.detach()) for output in outputs) / len(outputs)
    assert abs(apart - total) > 1e-5  # the mean of the micro-batches' own losses is something else


@pytest.mark.parametrize("kind", ["moe"])
def test_ranks_that_sum_give_the_step_of_one_process(kind: str, rows: PackedBatch) -> None:
    whole, expected = gradients(kind, rows.torch())
    parts = [part.torch() for part in rows.split(2)]
    shared: list[Any] = [None, None]
    meet = threading.Barrier(2, timeout=60)

    def rank(me: int) -> tuple[StepResult, dict[str, torch.Tensor]]:
        def across(mine: torch.Tensor) -> torch.Tensor:
            shared[me] = mine
            meet.wait()
            total = shared[0] + shared[1]
            meet.wait()
            return total

        return gradients(kind, parts[me], across)

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(rank, (0, 1)))
    for result, _ in results:
        assert result.targets == whole.targets
        assert result.loss == pytest.approx(whole.loss, rel=1e-6)
        assert result.balance == pytest.approx(whole.balance, rel=1e-5)
    for name, gradient in expected.items():
        total = results[0][1][name] + results[1][1][name]
        assert (total - gradient).abs().max() <= 2e-5 * gradient.abs().max() + 1e-9, name


class NoIndices(TorchDispatchMode):
    """x[list] makes a tensor of indices on the host; its way to the device is a wait that meta tensors do not show."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket is not torch.ops.aten.index, "an index of the host's"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["early", "late", "moe", "routed"])
def test_the_step_off_the_cpu_never_asks_the_device(
    kind: str, rows: PackedBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Meta tensors have shapes and no values: any question to the device (a number, a mask's size) is an error."""
    monkeypatch.setattr("isofusion.train.step.StepResult", lambda numbers: numbers)
    # what only a compiler can run is left out: building the mask, and the attention itself
    monkeypatch.setattr("isofusion.model.attention.block_mask", lambda *a: None)
    monkeypatch.setattr("isofusion.model.attention.flex_attention_of", lambda kind: lambda q, k, v, **kw: q + k + v)
    monkeypatch.setattr("torch.nn.functional.grouped_mm", lambda x, w, offs: x @ w.sum(0))  # meta takes bf16 only
    cfg = tiny(kind)
    with torch.device("meta"):
        model = Decoder(cfg, "flex")

    class Fused(torch.optim.SGD):  # the fused kernel has no meta form: here it only shows what it was handed
        def step(self) -> None:
            assert self.found_inf.is_meta
            assert self.grad_scale.is_meta

    optimizer = Fused(model.parameters(), lr=1.0)
    host = rows.torch()
    batch = host.to("meta")
    for parts in (batch, [batch, batch]):
        with NoIndices():
            numbers = train_step(
                model, optimizer, parts, precision="fp32", clip=1.0, balance_weight=0.01, device="meta"
            )
        assert numbers.shape == (9,)
        assert numbers.is_meta
        assert all(p.grad is not None for p in model.parameters())
    with pytest.raises((RuntimeError, NotImplementedError)):  # the check itself: without the host's facts it asks
        train_step(model, optimizer, replace(batch, facts=None), precision="fp32", clip=1.0, device="meta")
    with pytest.raises((RuntimeError, NotImplementedError)):
        train_step(model, optimizer, replace(batch, target_slot=None), precision="fp32", clip=1.0, device="meta")


def test_the_gpu_path_takes_the_same_steps_and_refuses_bad_ones_for_good(rows: PackedBatch) -> None:
    batch, cfg = rows.torch(), tiny("early")
    ends, norms = [], []
    for on_device in (False, True):
        model, optimizer = built(cfg)
        for _ in range(3):
            optimizer.zero_grad()
            nll, _ = model.token_losses(batch)
            nll.mean().backward()
            if on_device:
                norms.append(float(step_on_device(optimizer, 1e-3, nll.detach().sum())))
            else:
                norm = total_norm(optimizer)
                norms.append(float(norm))
                clip_and_step(optimizer, 1e-3, norm)
        ends.append([p.detach().clone() for p in model.parameters()])
    assert norms[3:] == pytest.approx(norms[:3], rel=1e-4)
    start, _ = built(cfg)
    for one, other, first in zip(*ends, start.parameters(), strict=True):
        moved = (one - first).abs().max()
        assert moved > 0
        assert (one - other).abs().max() < 1e-3 * moved
    for bad in (math.nan, math.inf):
        step_on_device(optimizer, 1.0, torch.tensor([bad, 0.0]))
        after = [p.detach().clone() for p in model.parameters()]
        assert all(torch.equal(one, other) for one, other in zip(after, ends[1], strict=True))
    step_on_device(optimizer, 1.0, torch.zeros(2))  # a good step after a bad one: the caller has not looked yet
    assert all(torch.equal(p, other) for p, other in zip(model.parameters(), ends[1], strict=True))
    assert optimizer.found_inf.item() == 1.0


@pytest.fixture
def alone() -> Iterator[Parallel]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield Parallel(0, 1, "cpu", mesh=dist.init_device_mesh("cpu", (1,), mesh_dim_names=("shard",)))
    finally:
        dist.destroy_process_group()


def test_the_gpu_path_takes_the_same_steps_with_parameters_that_ranks_share(rows: PackedBatch, alone: Parallel) -> None:
    """One rank of one: FSDP2's parameters, all of each in its part."""
    batch, cfg = rows.torch(), tiny("early")
    ends = []
    for shared in (False, True):
        model, _ = built(cfg)
        if shared:
            alone.shard(model)
        optimizer = build_optimizer(model, cfg, TrainConfig(lr=1e-2))
        for _ in range(3):
            optimizer.zero_grad()
            nll, _ = model.token_losses(batch)
            nll.mean().backward()
            step_on_device(optimizer, 1e-3, nll.detach().sum())
        ends.append([own_part(p).detach().clone() for p in model.parameters()])
        assert any(is_shared(p) for p in model.parameters()) == shared
    assert all(torch.allclose(one, other, rtol=1e-5, atol=1e-7) for one, other in zip(*ends, strict=True))
    step_on_device(optimizer, 1.0, torch.tensor([math.nan, 0.0]))
    step_on_device(optimizer, 1.0, torch.zeros(2))
    assert all(torch.equal(own_part(p), end) for p, end in zip(model.parameters(), ends[1], strict=True))
    assert {state["step"].item() for state in optimizer.state.values()} == {3.0}
