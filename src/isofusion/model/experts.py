"""Sparse feed-forward: token-choice routing, dropless, top-k of E experts (arXiv 2504.07951, section 4).

Sort the slots by expert, run one grouped matrix product, scatter back. The gate is the softmax probability of the
chosen experts, *not* renormalised: a renormalised top-1 gate is 1 and the task would give the router no gradient.
`modality_mask[expert, modality]` says who may serve what; all ones is modality-agnostic, one expert per modality is
the paper's modality-aware baseline (section 4.3), which then needs no router.

T slots, D width, F feed-forward hidden, E experts, K experts per token, M modalities (0 text, 1 image), G chosen pairs
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isofusion.config import ModelConfig
from isofusion.data.batch import PackedBatch
from isofusion.model.fused import compute_dtype, swiglu
from isofusion.model.layers import unset


@dataclass(frozen=True)
class SlotPlan:
    """What every expert layer shares for one batch. Padding is neither routed nor counted."""

    modality_T: Tensor  # i64, 0 text, 1 image
    real_T: Tensor  # bool, False for padding
    n_real: int

    @classmethod
    def of(cls, batch: PackedBatch) -> SlotPlan:
        real = batch.doc_id >= 0
        return cls(batch.modality.long(), real, int(real.sum()))


@dataclass(frozen=True)
class ExpertsOutput:
    """One layer's result: weighted expert outputs, its balance loss (scalar) and how many tokens each expert got."""

    out_TD: Tensor
    balance_loss: Tensor
    counts_ME: Tensor  # i64: (token, choice) pairs by modality


def modality_mask(cfg: ModelConfig) -> np.ndarray:
    """bool [E, M]: may expert e serve modality m?"""
    if cfg.routing == "modality-routed":
        return np.eye(2, dtype=bool)
    return np.ones((cfg.n_experts, 2), dtype=bool)


def grouped_product(x_GD: Tensor, weight_EDF: Tensor, counts_E: Tensor) -> Tensor:
    """Rows sorted by expert times that expert's matrix: [G, D], [E, D, F], how many rows each expert has -> [G, F].

    `F.grouped_mm` needs strides in multiples of 16 bytes; widths that do not fit go through a loop over experts.
    """
    step = 16 // x_GD.element_size()
    if x_GD.shape[1] % step == 0 and weight_EDF.shape[2] % step == 0 and x_GD.shape[0]:
        return F.grouped_mm(x_GD, weight_EDF, offs=counts_E.cumsum(0, dtype=torch.int32))
    return torch.cat([rows @ w for rows, w in zip(x_GD.split(counts_E.tolist()), weight_EDF.unbind(), strict=True)])


class Experts(nn.Module):
    """E SwiGLU experts and their router. Weights are [E, in, out]; the router is float32 [E, D] (None if unneeded)."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.n_experts, self.top_k = cfg.n_experts, cfg.top_k
        hidden = cfg.hidden()
        self.gate_up = unset(cfg.n_experts, cfg.width, 2 * hidden)
        self.down = unset(cfg.n_experts, hidden, cfg.width)
        self.mask = mask = modality_mask(cfg)
        fixed = bool((mask.sum(0) == 1).all())
        self.router = None if fixed else unset(cfg.n_experts, cfg.width)
        # modalities that share one set of experts are balanced together; a set of one expert needs no balancing
        shared = bool((mask[:, 0] == mask[:, 1]).all())
        groups = [((0, 1), int(mask[:, 0].sum()))] if shared else [((m,), int(mask[:, m].sum())) for m in (0, 1)]
        self.groups = [(members, size) for members, size in groups if size > 1]

    def route(self, x_TD: Tensor, slots: SlotPlan) -> Tensor:
        """Probability of every expert for every slot, float32 [T, E]; forbidden experts have 0."""
        with torch.autocast(x_TD.device.type, enabled=False):
            if self.router is None:
                logits_TE = x_TD.new_zeros(x_TD.shape[0], self.n_experts, dtype=torch.float32)
            else:
                logits_TE = F.linear(x_TD.float(), self.router)
            if not self.mask.all():
                forbidden_ME = torch.from_numpy(np.where(self.mask.T, 0.0, -np.inf).astype(np.float32))
                logits_TE = logits_TE + forbidden_ME.to(x_TD.device).index_select(0, slots.modality_T)
            return logits_TE.softmax(-1)

    def forward(self, x_TD: Tensor, slots: SlotPlan) -> ExpertsOutput:
        prob_TE = self.route(x_TD, slots)
        if self.top_k == 1:  # several times faster than topk on a CPU
            gate_TK, expert_TK = prob_TE.max(dim=-1, keepdim=True)
        else:
            gate_TK, expert_TK = prob_TE.topk(self.top_k, dim=-1)
        counts_ME = self._count(expert_TK, slots)
        # padding sorts behind the last expert and is cut off
        key_G = expert_TK.masked_fill(~slots.real_T[:, None], self.n_experts).flatten()
        order_G = key_G.argsort(stable=True)[: slots.n_real * self.top_k]
        row_G = order_G if self.top_k == 1 else order_G // self.top_k
        dtype = compute_dtype(x_TD.device)
        counts_E = counts_ME.sum(0)
        rows_GD = x_TD.index_select(0, row_G).to(dtype)
        hidden_GF = swiglu(grouped_product(rows_GD, self.gate_up.to(dtype), counts_E))
        served_GD = grouped_product(hidden_GF, self.down.to(dtype), counts_E)
        weighted_GD = served_GD * gate_TK.flatten().index_select(0, order_G)[:, None]
        out_TD = torch.zeros(x_TD.shape, dtype=weighted_GD.dtype, device=x_TD.device).index_add(0, row_G, weighted_GD)
        return ExpertsOutput(out_TD, self._balance(prob_TE, counts_ME, slots), counts_ME)

    def _count(self, expert_TK: Tensor, slots: SlotPlan) -> Tensor:
        size = 2 * self.n_experts
        bin_TK = (expert_TK + slots.modality_T[:, None] * self.n_experts).masked_fill(~slots.real_T[:, None], size)
        counts = torch.zeros(size + 1, dtype=torch.int64, device=expert_TK.device)
        bins = bin_TK.flatten()
        return counts.scatter_add_(0, bins, torch.ones_like(bins))[:size].view(2, self.n_experts)

    def _balance(self, prob_TE: Tensor, counts_ME: Tensor, slots: SlotPlan) -> Tensor:
        """Mean over modality groups of E_g * sum_e f_e P_e (arXiv 1701.06538, 2101.03961); 1 when perfectly even.

        f_e: share of the group's (token, choice) pairs that went to e; P_e: its mean probability over the group's
        tokens (the full softmax, not the chosen ones). 0 where there is nothing to balance.
        """
        loss = torch.zeros((), device=prob_TE.device)
        for members, size in self.groups:
            inside_T = slots.real_T if len(members) == 2 else slots.real_T & (slots.modality_T == members[0])
            pairs = counts_ME[list(members)].sum(0)
            n = pairs.sum().clamp(min=1)
            mean_E = (prob_TE * inside_T[:, None]).sum(0) * (self.top_k / n)
            loss = loss + size * (pairs / n * mean_E).sum() / len(self.groups)
        return loss
