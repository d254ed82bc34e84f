"""Initial weights, and what each parameter is to the optimiser: its role, learning-rate multiplier and decay.

muP for Adam (arXiv 2203.03466, Table 8): hidden matrices have standard deviation 1/sqrt(fan_in) and a learning rate
that falls as base_width / width; vector-like parameters (embeddings, gains, the patch projection) keep theirs; the
head keeps its standard deviation and learning rate while its output is multiplied by base_width / width; the router,
an output of finite size without such a multiplier, has both falling as 1 / width. Head size stays fixed, so attention
needs no rule of its own (QK-norm fixes the scale of its scores).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from isofusion.config import ModelConfig

ROLES = ("embed", "head", "patch", "connector", "norm", "attention", "ffn", "router", "experts")
"""Roles of decoder parameters; those of the image encoder start with "encoder-" (patch, norm, attention, ffn)."""

EMBED_STD = 0.5
"""Of word embeddings; patch features start at the same size. On the built-in world (width 32, 120 steps, the better of
two learning rates) 0.02, 0.1, 0.5 and 1.0 ended at 2.47, 2.20, 2.06 and 2.06 nats."""


def role_of(name: str) -> str:
    """The role of a parameter of `Decoder` by its name; raises KeyError for a name that no rule covers."""
    parts = name.split(".")
    side = "encoder-" if parts[0] == "encoder" else ""
    if parts[-1] in ("gain", "q_gain", "k_gain"):
        return side + "norm"
    if parts[-1] == "router":
        return "router"
    for role in ("embed", "head", "patch", "connector", "attention", "ffn", "experts"):
        if role in parts:
            return side + role
    raise KeyError(f'parameter "{name}" has no role; add a rule to isofusion.model.init.role_of')


def decays(name: str) -> bool:
    """Weight decay acts on matrices, not on the gains of norms (arXiv 2504.07951 Table 6)."""
    return not role_of(name).endswith("norm")


def lr_multiplier(name: str, cfg: ModelConfig) -> float:
    """What muP multiplies the learning rate by; 1 where `base_width` is not set."""
    if cfg.base_width is None:
        return 1.0
    role = role_of(name)
    if role in ("encoder-attention", "encoder-ffn", "connector"):
        assert cfg.encoder_width is not None
        return cfg.base_width / cfg.encoder_width
    if role in ("attention", "ffn", "experts", "router"):
        return cfg.base_width / cfg.width
    return 1.0


def _std(name: str, shape: torch.Size, cfg: ModelConfig) -> float:
    """Standard deviation of a matrix. Residual outputs are divided by sqrt(2 depth), so the sum of all stays O(1)."""
    role = role_of(name)
    if role == "embed":
        return EMBED_STD
    if role in ("patch", "encoder-patch"):
        return EMBED_STD / math.sqrt(shape[1])
    if role == "connector":  # reads normalised features, writes what embeddings look like
        return EMBED_STD / math.sqrt(shape[1])
    base = cfg.base_width or cfg.width
    if role == "head":
        return 0.1 / math.sqrt(base)
    if role == "router":
        return 0.1 / math.sqrt(base) * base / cfg.width
    fan_in = shape[1]  # Linear is [out, in], experts are [E, in, out]
    depth = cfg.encoder_layers if role.startswith("encoder") else cfg.depth
    last = name.split(".")[-2] if name.endswith(".weight") else name.split(".")[-1]
    return 1 / math.sqrt(fan_in) / (math.sqrt(2 * depth) if last in ("out", "down") else 1.0)


def initial_values(
    shapes: Iterable[tuple[str, torch.Size]], cfg: ModelConfig, seed: int
) -> Iterator[tuple[str, Tensor]]:
    """(name, float32 value) of each parameter: gains 1, matrices normal, cut at three standard deviations.

    Depends on (cfg, seed) and the order of the parameters only; one value exists at a time.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, shape in shapes:
        value = torch.ones(shape)
        if not role_of(name).endswith("norm"):
            std = _std(name, shape, cfg)
            nn.init.trunc_normal_(value, 0.0, std, -3 * std, 3 * std, generator=generator)
        yield name, value


@torch.no_grad()
def init_weights(model: nn.Module, cfg: ModelConfig, seed: int) -> None:
    """Set every parameter to its `initial_values`."""
    parameters = dict(model.named_parameters())
    for name, value in initial_values([(name, p.shape) for name, p in parameters.items()], cfg, seed):
        parameters[name].copy_(value)
