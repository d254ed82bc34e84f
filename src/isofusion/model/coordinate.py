"""The coordinate check of muP (arXiv 2203.03466, appendix D.1): do activations keep their size as width grows?

After a few Adam steps at one learning rate, each model's change of hidden state and logits since initialisation is
measured. Under muP the change does not depend on width; without it, it grows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from isofusion.config import ModelConfig
from isofusion.data.batch import PackedBatch
from isofusion.model.decoder import Decoder
from isofusion.model.init import init_weights, lr_multiplier


def coordinate_check(
    make: Callable[[int], ModelConfig], widths: Sequence[int], batch: PackedBatch, steps: int, lr: float, seeds: int = 2
) -> dict[str, float]:
    """Slopes of log(size of change) against log(width): {"block": ..., "logits": ...}; near 0 under muP.

    make(width) gives the configuration, `batch` is a torch batch used at every step, lr is Adam's at base_width.
    """
    sizes: dict[str, list[list[float]]] = {"block": [], "logits": []}
    for width in widths:
        drift: dict[str, list[float]] = {"block": [], "logits": []}
        for seed in range(seeds):
            cfg = make(width)
            model = Decoder(cfg, "sdpa")
            init_weights(model, cfg, seed)
            groups = [{"params": [p], "lr": lr * lr_multiplier(n, cfg)} for n, p in model.named_parameters()]
            optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
            before = _coordinates(model, batch)
            for _ in range(steps):
                optimizer.zero_grad()
                nll, _ = model.token_losses(batch)
                nll.sum().div((batch.targets >= 0).sum()).backward()
                optimizer.step()
            for name, value in _coordinates(model, batch).items():
                drift[name].append(float((value - before[name]).square().mean().sqrt()))
        for name, values in drift.items():
            sizes[name].append(values)
    logs = np.log(np.asarray(widths, dtype=float))
    return {name: float(np.polyfit(logs, np.log(np.mean(v, axis=1)), 1)[0]) for name, v in sizes.items()}


@torch.no_grad()
def _coordinates(model: Decoder, batch: PackedBatch) -> dict[str, torch.Tensor]:
    seen: list[torch.Tensor] = []
    hook = model.final_norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    hidden = model(batch).hidden_TD
    hook.remove()
    return {"block": seen[0], "logits": model.logits(hidden)}
