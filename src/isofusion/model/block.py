"""One transformer block, the same in the decoder and in the late-fusion image encoder (arXiv 2504.07951, section 2.3).

Pre-norm RMSNorm, attention with QK-norm and RoPE, SwiGLU feed-forward or experts, no biases. The residual stream is
float32; matrix products follow autocast.

T slots, D width, H heads, K head_dim, F feed-forward hidden
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from isofusion.config import ModelConfig
from isofusion.model import halves
from isofusion.model.attention import AttentionPlan, NativePlan
from isofusion.model.experts import Experts, ExpertsOutput, SlotPlan
from isofusion.model.fused import swiglu
from isofusion.model.layers import Linear, RMSNorm, unset


class Attention(nn.Module):
    """Multi-head attention; the gains of QK-norm are shared by the heads."""

    def __init__(self, width: int, head_dim: int, eps: float) -> None:
        super().__init__()
        self.qkv = Linear(width, 3 * width)
        self.out = Linear(width, width)
        self.q_gain = unset(head_dim)
        self.k_gain = unset(head_dim)
        self.eps = eps

    def forward(self, x_TD: Tensor, plan: AttentionPlan) -> Tensor:
        return self.out(plan.mix(self.qkv(x_TD), self.q_gain, self.k_gain, self.eps))


class FeedForward(nn.Module):
    """SwiGLU with gate and up projections in one product."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = Linear(width, 2 * hidden)
        self.down = Linear(hidden, width)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.down(swiglu(self.gate_up(x_TD)))


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)); `experts=True` replaces the feed-forward by experts."""

    def __init__(self, cfg: ModelConfig, width: int, head_dim: int, experts: bool) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(width, cfg.norm_eps)
        self.attention = Attention(width, head_dim, cfg.norm_eps)
        self.ffn_norm = RMSNorm(width, cfg.norm_eps)
        self.ffn: FeedForward | None = None
        self.experts: Experts | None = None
        if experts:
            self.experts = Experts(cfg)
        else:
            self.ffn = FeedForward(width, cfg.hidden(width))

    def forward(
        self, x_TD: Tensor, plan: AttentionPlan, slots: SlotPlan | None = None
    ) -> tuple[Tensor, ExpertsOutput | None]:
        x_TD = self._attended(x_TD, plan)
        if self.ffn is not None and halves.fit(x_TD, self.ffn.gate_up.weight, self.ffn.down.weight):
            weights = (self.ffn.gate_up.weight, self.ffn.down.weight)
            return halves.feed_forward_half(x_TD, self.ffn_norm.gain, *weights, self.ffn_norm.eps), None
        normed_TD = self.ffn_norm(x_TD)
        if self.ffn is not None:
            return x_TD + self.ffn(normed_TD), None
        assert self.experts is not None
        assert slots is not None
        routed = self.experts(normed_TD, slots)
        return x_TD + routed.out_TD, routed

    def _attended(self, x_TD: Tensor, plan: AttentionPlan) -> Tensor:
        norm, mix = self.attention_norm, self.attention
        if isinstance(plan, NativePlan) and halves.fit(x_TD, mix.qkv.weight, mix.out.weight):
            weights = (mix.qkv.weight, mix.q_gain, mix.k_gain, mix.out.weight)
            return halves.attention_half(x_TD, norm.gain, *weights, plan.phase, plan.edges, plan.last, norm.eps)
        return x_TD + mix(norm(x_TD), plan)


def run_block(block: nn.Module, again: bool, *inputs: Any) -> Any:
    """`block(*inputs)`; `again`: keep only its input and compute the activations anew in the backward pass."""
    if again and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
    return block(*inputs)
