"""Other people's decoders as training steps of one shape, imported from check-outs beside the project.

No code of theirs is here: an adapter builds the peer's own model with the peer's own settings on the device of the
data, and the patches named below are made at run time. All get torch's fused AdamW (the fastest on a CPU, and what
nanoGPT builds for itself on a GPU) and torch's clip, so that what differs is the model. Precision: float32, or the
peer's own bf16 path, or bf16 autocast where it has none.

B rows, L slots per row
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from isofusion.errors import InputError
from isofusion.train.step import precision_context

Step = Callable[[], object]
LEARNING_RATE, BETAS, WEIGHT_DECAY = 1e-3, (0.9, 0.95), 0.1


@dataclass(frozen=True)
class Shape:
    """The text-only decoder that everybody trains."""

    width: int = 256
    depth: int = 6
    head_dim: int = 64
    context: int = 256
    rows: int = 8
    vocabulary: int = 4096
    ffn_multiple: int = 16

    @property
    def tokens(self) -> int:
        return self.rows * self.context

    def flops(self, weights: int, targets: float | None = None) -> float:
        """Training FLOPs of one step: 3 x 2 per weight of a linear layer and token, and the causal scores.

        The rule of isofusion's exact ledger (`isofusion.model.count.flops`): embeddings are look-ups, a multiply-add is
        two, causal attention counts the pairs it may see, forward and backward are three passes. `weights`: elements of
        all linear layers, the head among them, which runs at `targets` slots (default: at all).
        """
        head = self.vocabulary * self.width
        pairs = self.rows * self.context * (self.context + 1) / 2
        linear = (weights - head) * self.tokens + head * (self.tokens if targets is None else targets)
        return 3 * (2 * linear + 4 * self.width * self.depth * pairs)


@dataclass(frozen=True)
class Peer:
    """A model ready to train: `step()` makes one update and returns the loss before it (a tensor)."""

    step: Step
    flops: float  # of one step
    parameters: int


def linear_weights(model: nn.Module) -> int:
    """Elements of all weights that meet every token in a product; a tied head counts, its embedding does not."""
    return sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))


def nanogpt(folder: Path, shape: Shape, precision: str, compiled: bool, data: tuple[Tensor, Tensor]) -> Peer:
    """karpathy/nanoGPT without dropout and biases; `torch.compile(model)` as its train.py does.

    Its own `configure_optimizers`, told that the device is a GPU: there it chooses the fused AdamW, here on CPUs too.
    """
    module = _import("model", folder)
    config = module.GPTConfig(
        block_size=shape.context,
        vocab_size=shape.vocabulary,
        n_layer=shape.depth,
        n_head=shape.width // shape.head_dim,
        n_embd=shape.width,
        dropout=0.0,
        bias=False,
    )
    with contextlib.redirect_stdout(io.StringIO()), data[0].device:
        model = module.GPT(config)
        optimizer = model.configure_optimizers(WEIGHT_DECAY, LEARNING_RATE, BETAS, device_type="cuda")
    run = torch.compile(model) if compiled else model
    ids, targets = data
    return _peer(model, shape, lambda: run(ids, targets)[1], precision, ids.device, optimizer)


def nanochat(folder: Path, shape: Shape, precision: str, compiled: bool, data: tuple[Tensor, Tensor]) -> Peer:
    """karpathy/nanochat, full attention in every layer (its window would be a mask on CPUs); bf16 is its own switch.

    `torch.compile(model, dynamic=False)` as its base_train.py does. Its optimizer, Muon on the matrices, is left out:
    the products inside Muon are no FLOPs of the model, and would count against it. On a Hopper GPU it loads
    FlashAttention 3 from a hub if it can, and uses PyTorch's attention if not.
    """
    os.environ["NANOCHAT_DTYPE"] = "bfloat16" if precision == "bf16" else "float32"
    module = _import("nanochat.gpt", folder)
    heads = shape.width // shape.head_dim
    config = module.GPTConfig(
        sequence_len=shape.context,
        vocab_size=shape.vocabulary,
        n_layer=shape.depth,
        n_head=heads,
        n_kv_head=heads,
        n_embd=shape.width,
        window_pattern="L",
    )
    with torch.device("meta"):
        model = module.GPT(config)
    model.to_empty(device=data[0].device)
    model.init_weights()
    run = torch.compile(model, dynamic=False) if compiled else model
    ids, targets = data
    return _peer(model, shape, lambda: run(ids, targets), "fp32", ids.device)  # no autocast: it casts by itself


def olmo_core(folder: Path, shape: Shape, precision: str, compiled: bool, data: tuple[Tensor, Tensor]) -> Peer:
    """allenai/OLMo-core, the OLMo 2 block (reordered norm, QK-norm, SwiGLU); its own `apply_compile`.

    Packages that only its downloads and uploads use are replaced by empty modules where they are not installed.
    """
    with _stand_ins(
        "cached_path", "cached_path.schemes", "bettermap", "requests", "requests.adapters", "requests.exceptions"
    ):
        config = _import("olmo_core.nn.transformer.config", folder / "src")
    wanted = config.TransformerConfig.llama_like(
        d_model=shape.width,
        vocab_size=shape.vocabulary,
        n_layers=shape.depth,
        n_heads=shape.width // shape.head_dim,
        hidden_size_multiple_of=shape.ffn_multiple,
        block_name=config.TransformerBlockType.reordered_norm,
        qk_norm=True,
        layer_norm_eps=1e-6,
    )
    device = data[0].device
    model = wanted.build(init_device=str(device))
    model.init_weights(device=device, max_seq_len=shape.context)
    if compiled:
        model.apply_compile()
    ids, targets = data
    return _peer(model, shape, lambda: model(ids, labels=targets, return_logits=False).loss, precision, device)


PEERS = {"nanogpt": nanogpt, "nanochat": nanochat, "olmo-core": olmo_core}


def _peer(
    model: nn.Module,
    shape: Shape,
    loss_of: Callable[[], Tensor],
    precision: str,
    device: torch.device,
    own: torch.optim.Optimizer | None = None,
) -> Peer:
    """`own`: the peer's optimizer, where torch's fused AdamW would not be the same."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = own or torch.optim.AdamW(
        parameters, lr=LEARNING_RATE, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True
    )

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with precision_context(precision, device.type):
            loss = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return loss.detach()

    return Peer(step, shape.flops(linear_weights(model)), sum(p.numel() for p in parameters))


def _import(name: str, folder: Path) -> Any:
    """Import a module of a check-out. Raises InputError naming what is missing."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give the folder of a check-out")
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise InputError(f"{folder}: cannot import {name}: {error}; install that package, or mend the path") from None
    finally:
        sys.path.remove(str(folder))


class _Empty(types.ModuleType):
    """A module of the modules placed below it and of empty classes; `recoverable_errors` is what OLMo-core reads."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return sys.modules.get(f"{self.__name__}.{name}") or type(name, (), {"recoverable_errors": ()})


@contextlib.contextmanager
def _stand_ins(*names: str) -> Iterator[None]:
    """Empty modules for packages that cannot be imported whole, while a peer is imported."""
    placed = []
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError:
            sys.modules[name] = empty = _Empty(name)
            empty.__path__ = []  # a package, so that submodules may be looked up
            placed.append(name)
    try:
        yield
    finally:
        for name in placed:
            del sys.modules[name]
