"""One update: forward in the chosen precision, fp32 loss over the global count of targets, clip, AdamW.

Loss = (sum of nll over targets) / (count of targets) + balance_weight * balance loss (arXiv 2504.07951 section 2.3 and
section 4: weight 0.01). A batch with no target has loss 0 rather than 0 / 0.

One update may be made of several micro-batches and spread over several ranks: the count of targets and the shares of
tokens in the balance loss are those of the whole step, so the gradient is that of the one large batch.

On a GPU no line here waits for the device: counts come from the host, the clip is folded into the fused optimizer as
its gradient scale, and a step that is not finite is refused inside the optimizer's kernel. T slots.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from isofusion.data.batch import PackedBatch
from isofusion.data.sample import DOMAINS
from isofusion.model import native
from isofusion.train.optimizer import AdamW, is_shared, own_part

Across = Callable[[Tensor], Tensor]


class StepResult:
    """What one update did; losses in nats per target, sums in nats. Reading a number of a GPU step waits for it.

    loss: mean over all targets, balance loss not included, 0 without targets. grad_norm: before clipping. nll: domain
    -> sum of nll. targets: domain -> number of targets.
    """

    def __init__(self, numbers: Tensor) -> None:
        """`numbers` f64 [3 + 2 * domains]: loss, balance, gradient norm, nll by domain, targets by domain."""
        self._event: Any = None
        if numbers.device.type == "cuda":
            self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._numbers = numbers
        self._read: list[float] | None = None

    @property
    def values(self) -> list[float]:
        if self._read is None:
            if self._event is not None:
                self._event.synchronize()
            self._read = self._numbers.tolist()
        return self._read

    @property
    def loss(self) -> float:
        return self.values[0]

    @property
    def balance(self) -> float:
        return self.values[1]

    @property
    def grad_norm(self) -> float:
        return self.values[2]

    @property
    def nll(self) -> dict[str, float]:
        return dict(zip(DOMAINS, self.values[3 : 3 + len(DOMAINS)], strict=True))

    @property
    def targets(self) -> dict[str, int]:
        return {name: int(n) for name, n in zip(DOMAINS, self.values[3 + len(DOMAINS) :], strict=True)}

    @property
    def finite(self) -> bool:
        return all(math.isfinite(value) for value in self.values[:3])


def choose_precision(asked: str = "auto", device: str = "cpu") -> str:
    """The precision to train in. `auto`: bf16 on a GPU and on a CPU with bf16 products (avx512_bf16, AMX), else fp32.

    It depends on the machine alone: all sizes of a ladder run in one precision, or a law would mix two. On a core with
    avx512_bf16 it pays at every width (Zen 5, fp32 / bf16 ms of a step of 2,048 slots, depth 4, 1 thread: dense
    18.5/17.9 at width 32, 60/49 at 96; 8 experts 31/19 at 32, 73/52 at 96).
    """
    if asked != "auto":
        return asked
    fast = device != "cpu" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if fast else "fp32"


def precision_context(precision: str, device: str = "cpu") -> AbstractContextManager:
    """Autocast to bf16, or nothing for fp32."""
    return torch.autocast(device.split(":")[0], dtype=torch.bfloat16) if precision == "bf16" else nullcontext()


def domain_sums(nll_T: Tensor, batch: PackedBatch) -> Tensor:
    """f64 [2 * domains]: sum of nll (fp32) per domain, then number of targets; masked sums, no scatter order enters."""
    nll_T = nll_T.detach().float()
    has_T = batch.targets >= 0
    sums, counts = [], []
    for code in range(len(DOMAINS)):
        here_T = has_T & (batch.domain == code)
        counts.append(here_T.sum())
        # leaving slots out would ask the device for their number
        sums.append(nll_T[here_T].sum() if nll_T.device.type == "cpu" else nll_T.where(here_T, 0.0).sum())
    return torch.cat((torch.stack(sums).double(), torch.stack(counts).double()))


def target_count(batch: PackedBatch) -> int:
    """Number of targets, from the host where it knows."""
    facts = getattr(batch, "facts", None)
    return sum(facts.targets) if facts is not None else int((batch.targets >= 0).sum())


def total_norm(optimizer: torch.optim.Optimizer) -> Tensor:
    """Global gradient norm, fp32 scalar on the gradients' device."""
    parameters = _parameters(optimizer)
    grads = [p.grad for p in parameters if p.grad is not None]
    if not grads:
        return torch.zeros((), device=parameters[0].device)
    parts = [own_part(g) for g in grads]
    if all(type(x) is Tensor and x.dtype == torch.float32 for x in parts) and native.serves(*parts):
        # PyTorch's is twice as slow there, and off by 1e-5 from a million on
        return _norm_of_all(native.norm(parts), grads[0])
    norm = torch.nn.utils.get_total_norm(grads, foreach=not grads[0].is_meta)
    whole: Tensor = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of gradients sharded over ranks
    return whole


def _norm_of_all(norm: float, grad: Tensor) -> Tensor:
    """The norm of all ranks' parts from this rank's; `grad`: one of the gradients."""
    if not is_shared(grad):
        return torch.tensor(norm)
    mesh: Any = grad.device_mesh  # type: ignore[attr-defined]
    squares = torch.tensor(norm, dtype=torch.float64) ** 2
    dist.all_reduce(squares, group=mesh.get_group(mesh.ndim - 1))  # replicas, the axis before, have the same parts
    return squares.sqrt().float()


def clip_and_step(optimizer: torch.optim.Optimizer, clip: float, norm: Tensor) -> None:
    """Update with gradients scaled down to a global norm of `clip`; `norm`: what it is, finite, on their device."""
    if isinstance(optimizer, AdamW):
        optimizer.grad_scale = (norm.float() / clip).clamp(min=1.0)
        try:
            optimizer.step()
        finally:
            optimizer.grad_scale = None
        return
    if float(norm) > clip:
        torch.nn.utils.clip_grads_with_norm_(_parameters(optimizer), clip, norm, foreach=True)
    optimizer.step()


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def step_on_device(optimizer: torch.optim.Optimizer, clip: float, checked: Tensor) -> Tensor:
    """Clip and update by the fused optimizer without waiting for the device; returns the norm before clipping.

    The update is left out when the norm or any number of `checked` is not finite, and so is every later one: the
    caller learns of it late, and by then nothing may have moved. `optimizer.found_inf` keeps that, as float32 0 or 1.
    """
    fused: Any = optimizer
    norm = total_norm(optimizer)
    bad = ~(torch.isfinite(norm) & torch.isfinite(checked).all())
    before = getattr(fused, "found_inf", None)
    fused.found_inf = bad.float() if before is None else torch.maximum(before, bad.float())
    fused.grad_scale = (norm.float() / clip).clamp(min=1.0)  # the kernel divides gradients by it
    optimizer.step()
    return norm


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: PackedBatch | Sequence[PackedBatch],
    *,
    precision: str,
    clip: float,
    balance_weight: float = 0.0,
    device: str = "cpu",
    across: Across | None = None,
) -> StepResult:
    """One update on a batch of torch tensors, or on several micro-batches of it; the caller has set the learning rate.

    `across` sums a small tensor over ranks, each of which gives its own part of the step; gradients are then to be
    summed, not averaged. When the result is not `finite` the weights were *not* updated, and on a GPU no later step
    moves them either: the caller may read a result one step late and stops with them intact.
    """
    parts: list[Any] = list(batch) if isinstance(batch, (list, tuple)) else [batch]
    optimizer.zero_grad(set_to_none=True)
    count: Any = sum(target_count(part) for part in parts)
    if across is not None:
        count = across(torch.full((), float(count), device=device)).clamp(min=1.0)
    else:
        count = max(1, count)
    routing = step_routing(model, parts, precision, device, across) if balance_weight and len(parts) > 1 else None
    losses, balances, sums = [], [], []
    for part in parts:
        with precision_context(precision, device):
            nll_T, output = model.token_losses(part)  # type: ignore[operator]
        total = nll_T.float().sum() / count
        if balance_weight and across is not None and routing is None and output.routing is not None:
            routing = across(output.routing)
        balance = output.balance_loss if routing is None else model.balance_loss(output, routing)  # type: ignore[operator]
        loss = total + balance_weight * balance if balance_weight else total
        if loss.requires_grad:
            loss.backward()
        losses.append(total.detach())
        balances.append(balance.detach())
        sums.append(domain_sums(nll_T, part))
    numbers = torch.cat((torch.stack((_sum(losses), _sum(balances))).double(), _sum(sums)))
    if across is not None:
        numbers = across(numbers)
    on_cpu = device == "cpu"
    norm = total_norm(optimizer) if on_cpu else step_on_device(optimizer, clip, numbers[:2])
    result = StepResult(torch.cat((numbers[:2], norm.double().view(1), numbers[2:])))
    if on_cpu and result.finite:
        clip_and_step(optimizer, clip, norm)
    return result


def step_routing(
    model: nn.Module, parts: Sequence[PackedBatch], precision: str, device: str, across: Across | None
) -> Tensor | None:
    """(token, choice) pairs of the whole step, i64 [layers, 2, E], from a forward pass alone; None for a dense model.

    The balance loss multiplies shares of the whole step with probabilities of each micro-batch, so the shares must be
    known before the first backward pass. Dropless routing gives the same counts again: exact, for a third more FLOPs.
    """
    counts = []
    for part in parts:
        with torch.no_grad(), precision_context(precision, device):
            counts.append(model(part).routing)
    if counts[0] is None:
        return None
    total = _sum(counts)
    return across(total) if across is not None else total


def _sum(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.stack(tensors).sum(0)
