"""What a run has consumed so far, as exact integers that ride in every checkpoint; FLOPs are computed from them.

D counts text and image tokens, never padding (docs/models.md). A branch starts from its parent's tally, so its
totals are those of the whole path from step 0; `wall_s`, `input_wait_s` and what is called own are this run's alone.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from isofusion.config import ModelConfig, RunConfig
from isofusion.data.batch import PackedBatch


def shape_of(batch: PackedBatch) -> dict[str, int]:
    """The fields of count.BatchShape for one NumPy batch."""
    from isofusion.model.count import batch_shape

    return {name: int(value) for name, value in asdict(batch_shape(batch)).items()}


@dataclass
class Tally:
    """Totals up to a step. `shape` sums the fields of count.BatchShape, which the FLOP ledger is linear in."""

    shape: dict[str, int] = field(default_factory=dict)
    own_tokens: int = 0
    wall_s: float = 0.0
    input_wait_s: float = 0.0
    start_shape: dict[str, int] = field(default_factory=dict)  # the parent's totals at the fork

    @property
    def text_tokens(self) -> int:
        return self.shape.get("text_tokens", 0)

    @property
    def image_tokens(self) -> int:
        return self.shape.get("image_tokens", 0)

    @property
    def tokens(self) -> int:
        return self.text_tokens + self.image_tokens

    def add_shape(self, shape: dict[str, int]) -> None:
        """Count what `shape_of` says of a batch, or of a rank's part of it."""
        before = self.tokens
        for name, value in shape.items():
            self.shape[name] = self.shape.get(name, 0) + value
        self.own_tokens += self.tokens - before

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Tally:
        return cls(**{f.name: data[f.name] for f in fields(cls) if f.name in data})

    def child(self) -> Tally:
        """The tally a branch starts with: the parent's totals, its own time and tokens at zero."""
        return Tally(shape=dict(self.shape), start_shape=dict(self.shape))

    def flops(self, cfg: ModelConfig) -> dict[str, float]:
        """Exact training FLOPs by role and "total" (isofusion.model.count.flops on the summed shape)."""
        from isofusion.model.count import BatchShape, flops

        return flops(cfg, BatchShape(**self.shape), training=True)

    def own_flops(self, cfg: ModelConfig) -> float:
        """Exact training FLOPs of this run's own steps: of a branch, those after its fork."""
        from isofusion.model.count import BatchShape, flops

        before = flops(cfg, BatchShape(**self.start_shape))["total"] if self.start_shape else 0.0
        return self.flops(cfg)["total"] - before

    def flops_6nd(self, cfg: ModelConfig) -> float:
        """The paper's count: 6 N D, with the encoder's part weighted by the measured share of image tokens."""
        from isofusion.model.count import six_nd

        return float(six_nd(cfg, self.tokens, self.image_tokens / max(1, self.tokens)))

    def report(self, config: RunConfig, step: int) -> dict[str, Any]:
        """flops.json."""
        return {
            "step": step,
            "tokens": self.tokens,
            "text_tokens": self.text_tokens,
            "image_tokens": self.image_tokens,
            "flops": self.flops(config.model),
            "flops_6nd": self.flops_6nd(config.model),
            "shape": self.shape,
            "own_tokens": self.own_tokens,
            "own_flops": self.own_flops(config.model),
            "wall_s": round(self.wall_s, 3),
            "input_wait_s": round(self.input_wait_s, 3),
        }
