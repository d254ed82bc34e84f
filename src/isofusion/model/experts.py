"""Sparse feed-forward: token-choice routing, dropless, top-k of E experts (arXiv 2504.07951, section 4).

Sort the slots by expert, run one grouped matrix product (on a CPU one product an expert), scatter back. The gate is the
softmax probability of the chosen experts, *not* renormalised: a renormalised top-1 gate is 1 and the task would give
the router no gradient.
`modality_mask[expert, modality]` says who may serve what; all ones is modality-agnostic, one expert per modality is
the paper's modality-aware baseline (section 4.3), which then needs no router.

T slots, D width, F feed-forward hidden, E experts, K experts per token, M modalities (0 text, 1 image), G chosen pairs
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from isofusion.config import ModelConfig
from isofusion.data.batch import PackedBatch
from isofusion.model import native
from isofusion.model.fused import by_onednn, compute_dtype, exactly, multiplies, regroup, swiglu
from isofusion.model.layers import unset
from isofusion.model.memory import ROUND


@dataclass(frozen=True)
class SlotPlan:
    """What every expert layer shares for one batch. Padding is neither routed nor counted."""

    modality_T: Tensor  # i64, 0 text, 1 image
    real_T: Tensor  # bool, False for padding
    n_real: int | None  # None: padding stays among the rows (it is not multiplied), so that shapes never change

    @classmethod
    def of(cls, batch: PackedBatch) -> SlotPlan:
        real = batch.doc_id >= 0
        if real.device.type == "cpu":
            return cls(batch.modality.long(), real, int(real.sum()))
        return cls(batch.modality.long(), real, None)


@dataclass(frozen=True)
class ExpertsOutput:
    """One layer's result: weighted expert outputs, and how many tokens each expert got with what probability."""

    out_TD: Tensor
    counts_ME: Tensor  # i64: (token, choice) pairs by modality
    probability_E: Tensor  # of the full softmax, summed over the tokens


def modality_mask(cfg: ModelConfig) -> np.ndarray:
    """bool [E, M]: may expert e serve modality m?"""
    if cfg.routing == "modality-routed":
        return np.eye(2, dtype=bool)
    return np.ones((cfg.n_experts, 2), dtype=bool)


def grouped_product(x_GD: Tensor, weight_EDF: Tensor, counts_E: Tensor) -> Tensor:
    """Rows sorted by expert times that expert's matrix: [G, D], [E, D, F], how many rows each expert has -> [G, F].

    Rows behind the last expert's are undefined. `F.grouped_mm` needs strides in multiples of 16 bytes; widths that do
    not fit go through a loop over experts, which asks the device for the counts.
    """
    step = 16 // x_GD.element_size()
    if x_GD.shape[1] % step == 0 and weight_EDF.shape[2] % step == 0 and x_GD.shape[0]:
        return F.grouped_mm(x_GD, weight_EDF, offs=counts_E.cumsum(0, dtype=torch.int32))
    sizes = counts_E.tolist()
    *groups, rest = x_GD.split([*sizes, x_GD.shape[0] - sum(sizes)])
    products = [rows @ w for rows, w in zip(groups, weight_EDF.unbind(), strict=True)]
    return torch.cat([*products, rest.new_zeros(rest.shape[0], weight_EDF.shape[2])])


class _Grouped(torch.autograd.Function):
    """`grouped_product` on a CPU with float32 weights, whose gradient is written in their layout.

    `F.grouped_mm` returns it transposed there, and turning it over costs as much as the products.
    """

    @staticmethod
    def forward(ctx: Any, x_GD: Tensor, weight_EDF: Tensor, edges: Tensor) -> Tensor:
        ctx.edges = edges
        if x_GD.dtype == torch.bfloat16 and multiplies(x_GD, weight_EDF):
            ctx.save_for_backward(x_GD, weight_EDF)
            return native.grouped(x_GD, weight_EDF, edges)
        weight, sizes = weight_EDF.to(x_GD.dtype), edges.diff().tolist()
        out_GF = x_GD.new_empty(x_GD.shape[0], weight.shape[2])
        for rows, w, out in zip(x_GD.split(sizes), weight.unbind(), out_GF.split(sizes), strict=True):
            torch.mm(rows, w, out=out)
        ctx.save_for_backward(x_GD, weight)
        return out_GF

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_GF: Tensor) -> tuple[Tensor | None, ...]:
        x_GD, weight = ctx.saved_tensors
        if x_GD.dtype == torch.bfloat16 and multiplies(x_GD, weight):
            return *native.grouped_backward(grad_GF, x_GD, weight, ctx.edges), None
        grad_x, sizes = torch.empty_like(x_GD), ctx.edges.diff().tolist()
        grad_weight = torch.empty(weight.shape)
        low = None if weight.dtype == torch.float32 else torch.empty(weight.shape[1:], dtype=weight.dtype)
        groups = zip(x_GD.split(sizes), grad_GF.split(sizes), grad_x.split(sizes), strict=True)
        for (x, grad, to), w, to_weight in zip(groups, weight.unbind(), grad_weight.unbind(), strict=True):
            torch.mm(grad, w.T, out=to)
            if low is None:
                torch.mm(x.T, grad, out=to_weight)
            else:
                to_weight.copy_(torch.mm(x.T, grad, out=low))
        return grad_x, grad_weight, None


def _filled(counts_E: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of each expert with their filler (none for the few of a small one), and by how much its first row moves."""
    size_E = ((counts_E + ROUND - 1) // ROUND * ROUND).where(counts_E > ROUND, counts_E)
    return size_E, (size_E - counts_E).cumsum(0) - (size_E - counts_E)


def _spread(x_G: Tensor, counts_E: Tensor, size_E: Tensor, shift_E: Tensor) -> Tensor:
    """Values of the rows without filler -> with filler, which holds 0."""
    place_G = torch.arange(x_G.shape[0]) + shift_E.repeat_interleave(counts_E)
    return x_G.new_zeros(int(size_E.sum())).index_copy(0, place_G, x_G)


class _Route(torch.autograd.Function):
    """Softmax of the router's logits; by native.py alone."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, router_ED: Tensor) -> Tensor:
        share_TE = native.route(x_TD, router_ED)
        ctx.save_for_backward(x_TD, router_ED, share_TE)
        return share_TE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TE: Tensor) -> tuple[Tensor, Tensor]:
        return native.route_backward(grad_TE, *ctx.saved_tensors)


class _Dispatch(torch.autograd.Function):
    """Rows of x for the experts; by native.py alone. `place_TK`: where each choice of a slot went, -1: nowhere."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, row_G: Tensor, place_TK: Tensor) -> Tensor:
        ctx.save_for_backward(place_TK)
        return x_TD.index_select(0, row_G)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_GD: Tensor) -> tuple[Tensor | None, ...]:
        return native.collect(grad_GD, ctx.saved_tensors[0]), None, None


class _Combine(torch.autograd.Function):
    """And back: the rows of a slot's choices, each times its gate, added up; float32 [T, D]."""

    @staticmethod
    def forward(ctx: Any, rows_GD: Tensor, gate_TK: Tensor, place_TK: Tensor) -> Tensor:
        ctx.save_for_backward(rows_GD, gate_TK, place_TK)
        return native.combine(rows_GD, gate_TK, place_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        return *native.combine_backward(grad_TD, *ctx.saved_tensors), None


class Experts(nn.Module):
    """E SwiGLU experts and their router. Weights are [E, in, out]; the router is float32 [E, D] (None if unneeded)."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.n_experts, self.top_k = cfg.n_experts, cfg.top_k
        hidden = cfg.hidden()
        self.gate_up = unset(cfg.n_experts, cfg.width, 2 * hidden)
        self.down = unset(cfg.n_experts, hidden, cfg.width)
        self.mask = mask = modality_mask(cfg)
        self.restricted = not bool(mask.all())
        # no buffer: a model that is made on the meta device must not lose its values
        self.forbidden_ME = torch.from_numpy(np.where(mask.T, 0.0, -np.inf).astype(np.float32))
        fixed = bool((mask.sum(0) == 1).all())
        self.router = None if fixed else unset(cfg.n_experts, cfg.width)

    def route(self, x_TD: Tensor, slots: SlotPlan) -> Tensor:
        """Probability of every expert for every slot, float32 [T, E]; forbidden experts have 0."""
        router = None if self.restricted or torch.compiler.is_compiling() else self.router
        if router is not None and router.dtype == torch.float32 and native.serves(x_TD, router):
            return _Route.apply(x_TD, router)
        with exactly(x_TD.device):
            if self.router is None:
                logits_TE = x_TD.new_zeros(x_TD.shape[0], self.n_experts, dtype=torch.float32)
            else:
                logits_TE = F.linear(x_TD.float(), self.router)
            if self.restricted:
                forbidden_ME = self.forbidden_ME.to(x_TD.device, non_blocking=True)
                logits_TE = logits_TE + forbidden_ME.index_select(0, slots.modality_T)
            return logits_TE.softmax(-1)

    def forward(self, x_TD: Tensor, slots: SlotPlan) -> ExpertsOutput:
        prob_TE = self.route(x_TD, slots)
        if self.top_k == 1:  # several times faster than topk on a CPU
            gate_TK, expert_TK = prob_TE.max(dim=-1, keepdim=True)
        else:
            gate_TK, expert_TK = prob_TE.topk(self.top_k, dim=-1)
        if slots.n_real is None or torch.compiler.is_compiling():  # what is compiled has fixed shapes
            counts_ME = self._count(expert_TK, slots)
            out_TD = self._serve_all(x_TD, gate_TK, expert_TK, counts_ME.sum(0), slots)
        elif native.serves(x_TD):
            counts_ME, out_TD = self._serve_native(x_TD, gate_TK, expert_TK, slots)
        else:
            counts_ME = self._count(expert_TK, slots)
            out_TD = self._serve_real(x_TD, gate_TK, expert_TK, counts_ME.sum(0), slots)
        return ExpertsOutput(out_TD, counts_ME, self._probability(prob_TE, slots))

    def _serve_native(self, x_TD: Tensor, gate_TK: Tensor, expert_TK: Tensor, slots: SlotPlan) -> tuple[Tensor, Tensor]:
        """`_serve_real` with the kernels of native.py; also counts."""
        counts_ME, edges, order_G, place_TK = native.sort_choices(
            expert_TK, slots.real_T, slots.modality_T, self.n_experts
        )
        x_TD, counts_E = x_TD.to(compute_dtype(x_TD.device)), counts_ME.sum(0)
        if self._fills_up(x_TD):
            size_E, shift_E = _filled(counts_E)
            place_TK = (place_TK + shift_E[expert_TK]).masked_fill(~slots.real_T[:, None], -1)
            order_G = _spread(order_G, counts_E, size_E, shift_E)
            edges = F.pad(size_E.cumsum(0), (1, 0))
        row_G = order_G if self.top_k == 1 else order_G // self.top_k
        rows_GD = _Dispatch.apply(x_TD, row_G, place_TK)
        return counts_ME, _Combine.apply(self._feed(rows_GD, edges), gate_TK, place_TK)

    def _serve_real(
        self, x_TD: Tensor, gate_TK: Tensor, expert_TK: Tensor, counts_E: Tensor, slots: SlotPlan
    ) -> Tensor:
        """CPU. Padding sorts behind the last expert and is cut off: the fewest rows, but their number must be known."""
        assert slots.n_real is not None
        key_G = expert_TK.masked_fill(~slots.real_T[:, None], self.n_experts).flatten()
        order_G = key_G.argsort(stable=True)[: slots.n_real * self.top_k]
        gate_G, x_TD = gate_TK.flatten().index_select(0, order_G), x_TD.to(compute_dtype(x_TD.device))
        if self._fills_up(x_TD):  # filler is choice 0 once more, with a weight of 0
            size_E, shift_E = _filled(counts_E)
            order_G, gate_G = (_spread(x, counts_E, size_E, shift_E) for x in (order_G, gate_G))
            counts_E = size_E
        row_G = order_G if self.top_k == 1 else order_G // self.top_k
        served_GD = self._feed(x_TD.index_select(0, row_G), F.pad(counts_E.cumsum(0), (1, 0)))
        weighted_GD = served_GD * gate_G[:, None]
        return torch.zeros(x_TD.shape, dtype=weighted_GD.dtype, device=x_TD.device).index_add(0, row_G, weighted_GD)

    def _fills_up(self, x_TD: Tensor) -> bool:
        """Whether the rows of an expert are filled up to sixteens: its products are oneDNN's."""
        return by_onednn(x_TD.dtype) and not (x_TD.dtype == torch.bfloat16 and multiplies(x_TD, self.gate_up))

    def _feed(self, rows_GD: Tensor, edges: Tensor) -> Tensor:
        """Rows sorted by expert, those of expert e from edges[e] to edges[e + 1], through their experts."""
        return _Grouped.apply(swiglu(_Grouped.apply(rows_GD, self.gate_up, edges)), self.down, edges)

    def _serve_all(self, x_TD: Tensor, gate_TK: Tensor, expert_TK: Tensor, counts_E: Tensor, slots: SlotPlan) -> Tensor:
        """The same with fixed shapes, no atomics and no question to the device: G = T * K, permuted there and back.

        Padding sorts last, behind the offsets: the grouped product skips those rows and leaves them undefined, so they
        are blanked on the way in (their gradient is undefined too) and on the way out.
        """
        real_T1, k = slots.real_T[:, None], self.top_k
        order_G = expert_TK.masked_fill(~real_T1, self.n_experts).flatten().argsort(stable=True)
        place_G = torch.empty_like(order_G).scatter_(0, order_G, torch.arange(order_G.shape[0], device=order_G.device))
        dtype = compute_dtype(x_TD.device)
        rows_GD = x_TD.to(dtype) if k == 1 else x_TD.to(dtype).repeat_interleave(k, 0)
        is_real_G1 = (real_T1 if k == 1 else real_T1.repeat_interleave(k, 0)).index_select(0, order_G)
        rows_GD = regroup(rows_GD, order_G, place_G).where(is_real_G1, 0.0)
        hidden_GF = swiglu(grouped_product(rows_GD, self.gate_up.to(dtype), counts_E).where(is_real_G1, 0.0))
        served_GD = grouped_product(hidden_GF, self.down.to(dtype), counts_E).where(is_real_G1, 0.0)
        served_TKD = regroup(served_GD, place_G, order_G).unflatten(0, (-1, k))
        return (served_TKD * gate_TK[:, :, None]).sum(1)

    def _count(self, expert_TK: Tensor, slots: SlotPlan) -> Tensor:
        size = 2 * self.n_experts
        bin_TK = (expert_TK + slots.modality_T[:, None] * self.n_experts).masked_fill(~slots.real_T[:, None], size)
        counts = torch.zeros(size + 1, dtype=torch.int64, device=expert_TK.device)
        bins = bin_TK.flatten()
        return counts.scatter_add_(0, bins, torch.ones_like(bins))[:size].view(2, self.n_experts)

    def _probability(self, prob_TE: Tensor, slots: SlotPlan) -> Tensor:
        """Probabilities summed over the tokens of both modalities, padding excluded: [E]."""
        return (prob_TE * slots.real_T[:, None]).sum(0)

    def balance(self, probability_E: Tensor, counts_ME: Tensor) -> Tensor:
        """E * sum_e f_e P_e (arXiv 1701.06538, 2101.03961), both modalities together; 1 when perfectly even.

        f_e: share of the (token, choice) pairs that went to e; P_e: its mean probability over the tokens (the full
        softmax, not the chosen ones). 0 where a fixed rule routes: there is nothing to balance. With `counts_ME` of a
        whole step and probabilities of one of its micro-batches this is that micro-batch's part of the step's loss.
        Both may have an axis of layers in front, and so has the result.
        """
        if self.router is None:
            return probability_E.new_zeros(probability_E.shape[:-1])
        pairs_E = counts_ME.sum(-2)
        n = pairs_E.sum(-1, keepdim=True).clamp(min=1)
        return self.n_experts * (pairs_E / n * (probability_E * (self.top_k / n))).sum(-1)
