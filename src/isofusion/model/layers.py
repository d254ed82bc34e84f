"""The layers everything is made of: a matrix product without bias, an embedding, RMSNorm with gain only."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isofusion.model.fused import linear, rms_norm


def unset(*shape: int) -> nn.Parameter:
    """A parameter of NaN: a model whose `init_weights` was forgotten fails at its first step."""
    return nn.Parameter(torch.full(shape, float("nan")))


class Linear(nn.Module):
    """`x @ weight.T` without a bias; weight [out, in]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = unset(outputs, inputs)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


class Embedding(nn.Module):
    """Rows of `weight` [vocabulary, width]."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.weight = unset(vocabulary, width)

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)


class RMSNorm(nn.Module):
    """Gain only."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.gain = unset(width)
        self.eps = eps

    def forward(self, x_TD: Tensor) -> Tensor:
        return rms_norm(x_TD, self.gain, self.eps)
