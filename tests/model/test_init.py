"""Roles, decay, muP's rule and its coordinate check; initial weights as a function of the seed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from isofusion.data.batch import PackedBatch
from isofusion.model.coordinate import coordinate_check
from isofusion.model.decoder import Decoder
from isofusion.model.init import EMBED_STD, decays, init_weights, initial_values, lr_multiplier, role_of


@pytest.mark.parametrize("kind", ["early", "late", "moe", "routed"])
def test_every_parameter_has_a_role_and_only_gains_do_not_decay(kind: str, make_config: Callable[..., Any]) -> None:
    model = Decoder(make_config(kind))
    for name, parameter in model.named_parameters():
        assert role_of(name)
        assert decays(name) == (parameter.ndim > 1), name
    with pytest.raises(KeyError, match="mystery"):
        role_of("mystery.weight")


def test_init_depends_on_the_seed_only_and_leaves_the_global_generator_alone(make_config: Callable[..., Any]) -> None:
    cfg = make_config("late")
    states = []
    before = torch.get_rng_state()
    for seed in (3, 3, 4):
        model = Decoder(cfg)
        init_weights(model, cfg, seed)
        states.append(torch.cat([p.flatten() for p in model.parameters()]).detach())
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])
    assert torch.isfinite(states[0]).all()
    assert torch.equal(before, torch.get_rng_state())


def test_standard_deviations_follow_fan_in_and_depth(make_config: Callable[..., Any]) -> None:
    cfg = make_config("moe", width=128, depth=8)
    model = Decoder(cfg).requires_grad_(False)
    init_weights(model, cfg, 0)
    block = model.blocks[0]
    cut = 0.9866  # of a normal cut at three standard deviations
    assert block.attention.qkv.weight.std() == pytest.approx(cut * 128**-0.5, rel=0.03)
    assert block.attention.out.weight.std() == pytest.approx(cut * 128**-0.5 / 4, rel=0.03)
    assert block.experts.gate_up.std() == pytest.approx(cut * 128**-0.5, rel=0.03)
    assert block.experts.down.std() == pytest.approx(cut * cfg.hidden() ** -0.5 / 4, rel=0.03)
    assert block.attention.qkv.weight.abs().max() <= 3 * 128**-0.5 * 1.0001


def test_what_enters_and_leaves_the_blocks_starts_at_the_size_the_rules_say(make_config: Callable[..., Any]) -> None:
    """Images enter as large as words; residual outputs shrink with their own stack's depth; muP's head keeps its size
    when the model is widened, and the router, which has no output multiplier, falls as 1 / width."""

    def std(name: str, shape: tuple[int, ...], cfg: Any) -> float:
        ((_, value),) = initial_values([(name, torch.Size(shape))], cfg, 0)
        return float(value.std()) / 0.9866  # of a normal cut at three standard deviations

    late = make_config("late", width=64, encoder_width=32, encoder_depth=18, depth=2)
    words = std("embed.weight", (512, 64), late)
    assert words == pytest.approx(EMBED_STD, rel=0.02)
    for name, fan_in in (("patch.weight", 192), ("encoder.patch.weight", 192), ("connector.weight", 48)):
        assert std(name, (512, fan_in), late) * fan_in**0.5 == pytest.approx(words, rel=0.03), name
    for name in ("attention.out.weight", "ffn.down.weight"):
        assert std(f"encoder.blocks.1.{name}", (256, 96), late) == pytest.approx(96**-0.5 / 6, rel=0.02)
        assert std(f"blocks.1.{name}", (256, 96), late) == pytest.approx(96**-0.5 / 2, rel=0.02)
    for width, router in ((16, 0.025), (64, 0.025 / 4)):
        cfg = make_config("moe", width=width, base_width=16)
        assert std("head.weight", (512, width), cfg) == pytest.approx(0.025, rel=0.02)
        assert std("blocks.0.experts.router", (512, width), cfg) == pytest.approx(router, rel=0.02)


def test_mup_multipliers(make_config: Callable[..., Any]) -> None:
    cfg = make_config("late", width=64, encoder_width=32, base_width=16)
    expected = {
        "embed.weight": 1.0,
        "head.weight": 1.0,
        "final_norm.gain": 1.0,
        "connector.weight": 0.5,
        "encoder.patch.weight": 1.0,
        "encoder.blocks.0.ffn.down.weight": 0.5,
        "blocks.1.attention.qkv.weight": 0.25,
        "blocks.1.attention.q_gain": 1.0,
        "blocks.1.ffn.gate_up.weight": 0.25,
        "blocks.1.experts.router": 0.25,
    }
    assert {name: lr_multiplier(name, cfg) for name in expected} == expected
    assert Decoder(cfg).logit_scale == 0.25
    plain = make_config(width=64)
    assert {lr_multiplier(name, plain) for name in expected} == {1.0}
    assert Decoder(plain).logit_scale == 1.0


def test_coordinate_check_is_flat_with_mup_and_rises_without(
    batch: PackedBatch, make_config: Callable[..., Any]
) -> None:
    def slopes(base: int | None) -> dict[str, float]:
        widths = (16, 32, 64, 128)
        return coordinate_check(
            lambda width: make_config(width=width, base_width=base), widths, batch.torch(), steps=4, lr=1e-2, seeds=1
        )

    with_rule, without = slopes(16), slopes(None)
    assert abs(with_rule["block"]) < 0.15
    assert abs(with_rule["logits"]) < 0.3
    assert without["block"] > 0.4
    assert without["logits"] > 0.4
