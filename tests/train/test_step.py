from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch", reason="training needs the [train] extra")

from isofusion.train.step import choose_precision, clip_gradients, train_step  # noqa: E402


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


def test_clip_scales_to_the_norm_and_returns_the_unclipped_one() -> None:
    a, b = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
    a.grad, b.grad = torch.tensor([3.0]), torch.tensor([4.0])
    assert clip_gradients([a, b], 1.0) == pytest.approx(5.0)
    assert [a.grad.item(), b.grad.item()] == pytest.approx([0.6, 0.8], rel=1e-5)
    assert clip_gradients([a, b], 10.0) == pytest.approx(1.0, rel=1e-5)
    assert [a.grad.item(), b.grad.item()] == pytest.approx([0.6, 0.8], rel=1e-5)


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
