"""Weight decay is fully decoupled: at the peak a weight shrinks by the decay itself, whatever the learning rate."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="training needs the [train] extra")

from isofusion.config import ModelConfig, TrainConfig  # noqa: E402
from isofusion.model import native  # noqa: E402
from isofusion.train.optimizer import (  # noqa: E402
    GroupRules,
    build_optimizer,
    load_optimizer_tensors,
    optimizer_tensors,
    param_groups,
    set_lr_factor,
)

CFG = ModelConfig(width=16, head_dim=8, patch_size=8)
RULES = GroupRules(
    lr_multiplier=lambda name, cfg: 0.25 if "hidden" in name else 1.0,
    decays=lambda name: "norm" not in name,
    in_encoder=lambda name: name.startswith("encoder"),
)


class Tiny(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Parameter(torch.ones(4, 3, dtype=torch.float64))
        self.hidden = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
        self.norm = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
        self.encoder = torch.nn.Linear(3, 3, bias=False, dtype=torch.float64)
        torch.nn.init.ones_(self.encoder.weight)


@pytest.mark.parametrize("lr", [3e-5, 1e-3, 0.2])
def test_decay_per_step_is_1e_4_at_any_peak(lr: float) -> None:
    model = Tiny()
    optimizer = build_optimizer(model, CFG, TrainConfig(lr=lr, weight_decay=1e-4, encoder_lr_scale=0.01), RULES)
    set_lr_factor(optimizer, 1.0)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name in ("embed", "hidden", "encoder.weight"):
        shrink = 1 - model.get_parameter(name).detach()
        assert torch.allclose(shrink, torch.full_like(shrink, 1e-4), rtol=1e-10, atol=0), name
    assert torch.equal(model.norm.detach(), torch.ones(3, dtype=torch.float64))


def test_decay_follows_the_schedule() -> None:
    model = Tiny()
    optimizer = build_optimizer(model, CFG, TrainConfig(lr=1e-3, weight_decay=1e-4), RULES)
    set_lr_factor(optimizer, 0.5)
    model.embed.grad = torch.zeros_like(model.embed)
    optimizer.step()
    assert (1 - model.embed.detach()).max().item() == pytest.approx(5e-5, rel=1e-9)


def test_groups_carry_the_multipliers() -> None:
    groups = param_groups(Tiny(), CFG, 1e-2, 1e-4, 0.1, RULES)
    peak = {name: group["peak_lr"] for group in groups for name, _ in group["params"]}
    assert peak == pytest.approx({"embed": 1e-2, "hidden": 2.5e-3, "norm": 1e-2, "encoder.weight": 1e-3})
    decay = {name: group["weight_decay"] * group["lr"] for group in groups for name, _ in group["params"]}
    assert decay == pytest.approx({"embed": 1e-4, "hidden": 1e-4, "norm": 0.0, "encoder.weight": 1e-4})


def test_real_model_norms_do_not_decay_and_everything_has_a_group() -> None:
    from isofusion.model.decoder import Decoder

    cfg = ModelConfig(
        fusion="late", width=32, encoder_width=16, depth=2, head_dim=8, ffn_multiple=16, vocab_size=64, patch_size=4,
        base_width=16,
    )  # fmt: skip
    model = Decoder(cfg)
    groups = param_groups(model, cfg, 1e-2, 1e-4, 0.5)
    by_name = {name: group for group in groups for name, _ in group["params"]}
    assert by_name.keys() == dict(model.named_parameters()).keys()
    for name, group in by_name.items():
        assert (group["weight_decay"] == 0) == ("norm" in name or "gain" in name), name
    assert by_name["blocks.0.attention.qkv.weight"]["peak_lr"] == pytest.approx(1e-2 * 16 / 32)
    assert by_name["encoder.blocks.0.attention.qkv.weight"]["peak_lr"] == pytest.approx(0.5e-2)


def test_state_round_trip_continues_to_the_same_bits() -> None:
    def update(model: Tiny, optimizer: torch.optim.Optimizer, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        optimizer.step()

    first = Tiny()
    one = build_optimizer(first, CFG, TrainConfig(), RULES)
    update(first, one, 1)
    second = Tiny()
    second.load_state_dict(first.state_dict())
    two = build_optimizer(second, CFG, TrainConfig(), RULES)
    load_optimizer_tensors(two, optimizer_tensors(one))
    update(first, one, 2)
    update(second, two, 2)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(not native.available(), reason=f"kernels: {native.describe()}")
def test_a_run_may_change_between_the_kernels_and_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The state is the same state: steps by one, then by the other, are the steps of either, to rounding."""
    ends = []
    for by_kernels in ((False,) * 6, (True,) * 6, (True, True, False, False, True, False)):
        model = Tiny().float()
        optimizer = build_optimizer(model, CFG, TrainConfig(lr=0.01, weight_decay=0.1), RULES)
        for seed, kernels in enumerate(by_kernels):
            monkeypatch.setattr(native, "available", lambda kernels=kernels: kernels)
            set_lr_factor(optimizer, 1 - seed / 8)
            optimizer.grad_scale = torch.tensor(1.0 + seed)
            generator = torch.Generator().manual_seed(seed)
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()
        ends.append({**optimizer_tensors(optimizer), **dict(model.named_parameters())})
    for other in ends[1:]:
        assert other.keys() == ends[0].keys()
        for name, value in ends[0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.skipif(not native.available(), reason=f"kernels: {native.describe()}")
def test_a_graph_of_the_weights_before_the_step_is_refused() -> None:
    model = Tiny().float()
    optimizer = build_optimizer(model, CFG, TrainConfig(lr=0.01), RULES)
    loss = (model.embed * torch.ones(3, requires_grad=True)).sum()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
