"""One update: forward in the chosen precision, fp32 loss over the global count of targets, clip, AdamW.

Loss = (sum of nll over targets) / (count of targets) + balance_weight * balance loss (arXiv 2504.07951 section 2.3 and
section 4: weight 0.01). A batch with no target has loss 0 rather than 0 / 0. T slots.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import nn

from isofusion.data.batch import PackedBatch
from isofusion.data.sample import DOMAINS


@dataclass(frozen=True)
class StepResult:
    """What one update did; losses in nats per target, sums in nats."""

    loss: float  # mean over all targets, balance loss not included; 0 without targets
    balance: float
    grad_norm: float  # before clipping
    nll: dict[str, float]  # domain -> sum of nll
    targets: dict[str, int]  # domain -> number of targets

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.balance) and math.isfinite(self.grad_norm)


def choose_precision(asked: str = "auto", device: str = "cpu") -> str:
    """The precision to train in. `auto`: bf16 on a GPU and on a CPU with bf16 products (avx512_bf16, AMX), else fp32.

    It depends on the machine alone: all sizes of a ladder run in one precision, or a law would mix two. On an
    avx512_bf16 core that costs little where it does not pay (fp32 / bf16 ms of a step of 2,048 slots, depth 4, 1
    thread: dense 34/34 at width 16, 74/58 at 48, 169/118 at 96; 8 experts 122/142 at 64, 204/188 at 96).
    """
    if asked != "auto":
        return asked
    fast = device != "cpu" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if fast else "fp32"


def precision_context(precision: str, device: str = "cpu") -> AbstractContextManager:
    """Autocast to bf16, or nothing for fp32."""
    return torch.autocast(device.split(":")[0], dtype=torch.bfloat16, enabled=precision == "bf16")


def domain_sums(
    nll_T: torch.Tensor, targets_T: torch.Tensor, domain_T: torch.Tensor
) -> tuple[dict[str, float], dict[str, int]]:
    """Sum of nll (fp32) and number of targets per domain; masked sums, so no scatter order enters."""
    nll: dict[str, float] = {}
    counts: dict[str, int] = {}
    nll_T = nll_T.detach().float()
    has_T = targets_T >= 0
    for code, name in enumerate(DOMAINS):
        here_T = has_T & (domain_T == code)
        counts[name] = int(here_T.sum())
        nll[name] = float(nll_T[here_T].sum()) if counts[name] else 0.0
    return nll, counts


def clip_gradients(parameters: list[nn.Parameter], max_norm: float) -> float:
    """Global gradient norm before clipping; scales the gradients in place where it is finite and above `max_norm`."""
    with_grad = [p for p in parameters if p.grad is not None]
    if not with_grad:
        return 0.0
    norm = torch.nn.utils.get_total_norm([p.grad for p in with_grad if p.grad is not None], foreach=True)
    if hasattr(norm, "full_tensor"):  # sharded gradients
        norm = norm.full_tensor()
    value = float(norm)
    if math.isfinite(value) and value > max_norm:
        torch.nn.utils.clip_grads_with_norm_(with_grad, max_norm, norm, foreach=True)
    return value


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: PackedBatch,
    *,
    precision: str,
    clip: float,
    balance_weight: float = 0.0,
    device: str = "cpu",
    across: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> StepResult:
    """One update on a batch of torch tensors; the caller has set the learning rate.

    `across` sums a small tensor over ranks: the batch is then this rank's share of the step, the result that of all.

    When the result is not `finite` the weights were *not* updated: the caller stops with them intact.
    """
    optimizer.zero_grad(set_to_none=True)
    with precision_context(precision, device):
        nll_T, output = model.token_losses(batch)  # type: ignore[operator]
    n_targets = (batch.targets >= 0).sum()
    if across is not None:
        n_targets = across(n_targets)
    total = nll_T.float().sum() / max(1, int(n_targets))
    loss = total + balance_weight * output.balance_loss if balance_weight else total
    if loss.requires_grad:
        loss.backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = clip_gradients(parameters, clip)
    nll, counts = domain_sums(nll_T, batch.targets, batch.domain)
    value, balance = float(total.detach()), float(output.balance_loss.detach())
    if across is not None:
        sums = torch.tensor([value, balance, *nll.values(), *counts.values()], dtype=torch.float64)
        value, balance, *rest = across(sums).tolist()
        nll = dict(zip(nll, rest, strict=False))
        counts = {name: int(n) for name, n in zip(counts, rest[len(nll) :], strict=True)}
    result = StepResult(value, balance, norm, nll, counts)
    if result.finite:
        optimizer.step()
    return result
