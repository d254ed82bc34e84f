"""Every setting of a run, as frozen pydantic models; canonical JSON -> sha256 is the identity of a run.

Defaults follow arXiv 2504.07951 (sections 2-3, Table 6); the tiny studies scale them down in their TOML.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, WrapValidator, model_validator

STORED = {"stored": True}  # context of reading what an earlier version may have written


def _of_new_studies(value: Any, check: Callable[[Any], Any], info: ValidationInfo) -> Any:
    """A bound that came after studies which it refuses: those can still be read."""
    return value if info.context == STORED and isinstance(value, (int, float)) else check(value)


OfNewStudies = WrapValidator(_of_new_studies)
PositiveInt = Annotated[int, Field(gt=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=1 << 32), OfNewStudies]


class Frozen(BaseModel):
    """Immutable, and an unknown key is an error rather than a silent default."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def stored(cls, tree: Any) -> Self:
        """What an earlier version may have written, without the bounds that have come since."""
        return cls.model_validate(tree, context=STORED)

    def canonical_json(self) -> str:
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))

    def digest(self) -> str:
        """sha256 of the canonical JSON, 64 hex digits."""
        return hashlib.sha256(self.canonical_json().encode()).hexdigest()


class ModelConfig(Frozen):
    """One model. Widths are in features, depths in blocks."""

    fusion: Literal["early", "late"] = "early"
    width: PositiveInt = 800
    depth: PositiveInt = 24
    head_dim: PositiveInt = 80
    ffn_multiple: PositiveInt = 256  # SwiGLU hidden = ffn_multiple * ceil(int(8 * width / 3) / ffn_multiple)
    vocab_size: PositiveInt = 50432
    patch_size: PositiveInt = 14
    encoder_width: PositiveInt | None = None  # late fusion only
    encoder_depth: PositiveInt | None = None  # late fusion only; default: depth
    encoder_head_dim: PositiveInt | None = None  # late fusion only; default: head_dim
    n_experts: Annotated[int, Field(ge=0, le=64)] = 0  # 0 = dense
    top_k: PositiveInt = 1
    routing: Literal["agnostic", "modality-routed"] = "agnostic"
    balance_weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.01
    rope_theta: Positive = 10000.0
    norm_eps: Positive = 1e-6
    base_width: PositiveInt | None = None  # muP: width at which the learning rate was tuned; None = no width rule

    @property
    def n_heads(self) -> int:
        return self.width // self.head_dim

    @property
    def patch_dim(self) -> int:
        return self.patch_size * self.patch_size * 3

    @property
    def encoder_head(self) -> int:
        return self.encoder_head_dim or self.head_dim

    @property
    def encoder_layers(self) -> int:
        return self.encoder_depth or self.depth

    def hidden(self, width: int | None = None) -> int:
        """SwiGLU hidden size h(d) = m * ceil(int(2 * 4d / 3) / m) (the rule of OpenLM; N then is the paper's)."""
        d = width or self.width
        return self.ffn_multiple * -(-int(2 * 4 * d / 3) // self.ffn_multiple)

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        def whole(name: str, width: int, head: int) -> None:
            if width % head or head % 2:
                raise ValueError(
                    f"{name} {width} is not a multiple of an even head_dim ({head}); "
                    f"choose {name} = {max(1, width // head) * head} or another head_dim"
                )

        whole("width", self.width, self.head_dim)
        if self.fusion == "late":
            if self.encoder_width is None:
                raise ValueError("late fusion needs encoder_width (the paper uses about half the decoder width)")
            whole("encoder_width", self.encoder_width, self.encoder_head)
        elif self.encoder_width is not None or self.encoder_depth is not None:
            raise ValueError("encoder_width and encoder_depth are for fusion = 'late' only")
        if self.n_experts == 1:
            raise ValueError("n_experts = 1 is a dense model; use 0 for dense or 2-64 experts")
        if self.n_experts and self.top_k > self.n_experts:
            raise ValueError(f"top_k {self.top_k} is more than n_experts {self.n_experts}")
        if self.n_experts and self.routing == "modality-routed" and (self.n_experts != 2 or self.top_k != 1):
            raise ValueError("modality-routed is one expert per modality: n_experts = 2, top_k = 1 (paper 4.3)")
        return self


class SourceConfig(Frozen):
    """One source of samples. `weight` is its share of rows (the paper's sampling probability)."""

    name: Annotated[str, Field(pattern=r"^[^:\s]+$")]  # a colon would end it in the keys of samples
    domain: Literal["caption", "interleaved", "text"]
    format: Literal["world", "webdataset", "interleaved", "text"]  # files tell parquet from tar, gz from zst
    weight: Positive
    train: tuple[str, ...] = ()  # file globs, relative to the data folder; unused by the world
    val: tuple[str, ...] = ()


class WorldConfig(Frozen):
    """The built-in world (docs/world.md)."""

    seed: Seed = 0
    entity_bits: Annotated[int, Field(ge=2, le=20)] = 20
    zipf: Positive = 1.35


class DataConfig(Frozen):
    """What a run reads and how it is packed."""

    sources: tuple[SourceConfig, ...]
    folder: str | None = None  # root of the globs
    row_len: PositiveInt = 1024
    image_size: PositiveInt = 224
    patch_size: PositiveInt = 14
    tokenizer: str = "world"  # "world" | "train:VOCAB" (byte-level BPE of the study's text) | path of a tokenizer.json
    max_bad_share: Annotated[float, Field(ge=0, le=1)] = 0.05
    val_rows: PositiveInt = 64  # rows per domain of the fixed validation stream
    val_seed: Seed = 1
    world: WorldConfig = WorldConfig()

    @property
    def patches_per_image(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def unvalidated(self) -> tuple[str, ...]:
        """Domains that are trained on and have no validation files: no loss and no law will be known of them."""
        measured = {s.domain for s in self.sources if s.val or s.format == "world"}
        return tuple(dict.fromkeys(s.domain for s in self.sources if s.domain not in measured))

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if not self.sources:
            raise ValueError("data needs at least one source")
        names = [s.name for s in self.sources]
        if len(set(names)) != len(names):
            raise ValueError(f"source names must differ: {names}")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if self.patches_per_image + 2 > self.row_len:
            raise ValueError(
                f"an image is {self.patches_per_image} patches and does not fit in a row of {self.row_len} slots; "
                f"raise row_len or patch_size"
            )
        return self


class TrainConfig(Frozen):
    """Optimisation of one run (paper Table 6 and App. A)."""

    lr: Positive = 1.5e-3  # peak, at base_width when muP is on
    encoder_lr_scale: Positive = 1.0  # learning-rate multiplier of the late-fusion image encoder (paper Table 8)
    warmup_steps: Annotated[int, Field(ge=0)] = 1000
    cooldown_share: Annotated[float, Field(gt=0, le=1)] = 0.2
    cooldown_shape: Literal["one-minus-sqrt", "inverse-sqrt", "linear"] = "one-minus-sqrt"
    betas: tuple[Share, Share] = (0.9, 0.95)
    eps: Positive = 1e-8
    weight_decay: Annotated[Share, OfNewStudies] = 1e-4  # shrink per step at peak, whatever the learning rate
    clip: Positive = 1.0
    rows_per_step: PositiveInt = 2048
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    checkpoint_every: PositiveInt = 500  # steps
    log_every: PositiveInt = 10  # steps


class RunConfig(Frozen):
    """One run: a trunk at constant learning rate, or a branch (cool-down) forked from it (docs/study-file.md)."""

    study: str
    arm: str
    size: str
    seed: Seed
    variant: str = ""  # a tuning run, e.g. "lr0.5x"; never mixed into a fit
    kind: Literal["trunk", "branch"]
    parent: str | None = None  # name of the trunk a branch starts from
    start_step: Annotated[int, Field(ge=0)] = 0
    end_step: PositiveInt
    forks: tuple[int, ...] = ()  # steps whose checkpoints a trunk keeps for its branches
    budget_tokens: PositiveInt | None = None  # branch: the budget D_k it stands for (slots; realised D is measured)
    model: ModelConfig
    data: DataConfig
    train: TrainConfig

    @property
    def name(self) -> str:
        """Folder name, for people; the identity is `digest()`, kept in run.json."""
        tail = "trunk" if self.kind == "trunk" else f"d{self.end_step}"
        variant = f"-{self.variant}" if self.variant else ""
        return f"{self.arm}-{self.size}-s{self.seed}{variant}-{tail}"

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        if self.end_step <= self.start_step:
            raise ValueError(f"end_step {self.end_step} must be after start_step {self.start_step}")
        if (self.kind == "branch") != (self.parent is not None):
            raise ValueError("a branch has a parent, a trunk has none")
        if self.model.patch_size != self.data.patch_size:
            raise ValueError(f"model.patch_size {self.model.patch_size} is not data.patch_size {self.data.patch_size}")
        return self
