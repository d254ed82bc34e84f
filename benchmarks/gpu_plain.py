"""What isofusion's step on text is compared with on a GPU: a plain Llama step, and other people's models."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent))
from adapters import PEERS, Shape, linear_weights
from gpu_models import Peak, Row, Setting, speed, time_steps

from isofusion.config import ModelConfig
from isofusion.train.step import precision_context


class PlainBlock(nn.Module):
    """Llama's block as it is commonly written: RMSNorm, causal SDPA with rotary embedding, SwiGLU."""

    def __init__(self, width: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)

        def turn(y: Tensor) -> Tensor:
            a, b = y.chunk(2, -1)
            return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(v.dtype)

        y = F.scaled_dot_product_attention(turn(q), turn(k), v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(batch, length, width))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class PlainLlama(nn.Module):
    """A text decoder with a whole-batch cross-entropy, compiled as one: what a user would write first."""

    def __init__(self, cfg: ModelConfig, length: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(cfg.vocab_size, cfg.width)
        self.blocks = nn.ModuleList(PlainBlock(cfg.width, cfg.hidden(), cfg.n_heads) for _ in range(cfg.depth))
        self.norm = nn.RMSNorm(cfg.width)
        self.head = nn.Linear(cfg.width, cfg.vocab_size, bias=False)
        angle = torch.arange(length)[:, None] * 10000.0 ** -(torch.arange(0, cfg.head_dim, 2) / cfg.head_dim)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return F.cross_entropy(self.head(self.norm(x)).float().flatten(0, 1), targets.flatten())


def text_shape(s: Setting, cfg: ModelConfig, rows: int) -> Shape:
    """Full rows of text in the shape of a model of ours; its rule counts the FLOPs of every other model."""
    return Shape(
        width=cfg.width,
        depth=cfg.depth,
        head_dim=cfg.head_dim,
        context=s.row_len,
        rows=rows,
        vocabulary=cfg.vocab_size,
        ffn_multiple=cfg.ffn_multiple,
    )


def plain(s: Setting, name: str, peak: Peak, compiled: bool, rows: int) -> Row:
    """The plain step with the shape of the model `name`, full rows of text."""
    cfg = s.model(name)
    shape = text_shape(s, cfg, rows)
    with torch.device(s.device):
        model = PlainLlama(cfg, s.row_len)
        ids = torch.randint(4, cfg.vocab_size, (2, rows, s.row_len + 1))
    forward: Any = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(i: int) -> None:
        optimizer.zero_grad(set_to_none=True)
        with precision_context(s.precision, s.device):
            loss = forward(ids[i % 2, :, :-1], ids[i % 2, :, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    timing = time_steps(s, step)
    work = shape.flops(linear_weights(model))
    label = f"plain Llama {'compiled' if compiled else 'eager'}"
    return {"name": label, "text": True, "rows": rows, **speed(timing, shape.tokens, work, peak)}


def peer(s: Setting, peer_name: str, folder: Path, like: str, peak: Peak, rows: int) -> Row:
    """Somebody else's model and optimizer from a check-out, compiled, in the shape of our model `like`, on text."""
    cfg = s.model(like)
    shape = text_shape(s, cfg, rows)
    ids = torch.randint(4, cfg.vocab_size, (rows, s.row_len), device=s.device)
    built = PEERS[peer_name](folder, shape, s.precision, not s.smoke, (ids, ids.roll(-1, dims=1)))
    timing = time_steps(s, lambda i: built.step())
    return {
        "name": peer_name,
        "text": True,
        "rows": rows,
        "n_total": built.parameters,
        **speed(timing, shape.tokens, built.flops, peak),
    }
