"""A peer that nobody has to fetch."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# nanoGPT's interface with the smallest possible model in it
STAND_IN = """
from dataclasses import dataclass
import torch
from torch import nn
from torch.nn import functional as F
ASKED = []
@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float
    bias: bool
class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.layers = nn.Sequential(*(nn.Linear(config.n_embd, 12 * config.n_embd, bias=False),
                                      nn.Linear(12 * config.n_embd, config.n_embd, bias=False)))
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
    def forward(self, ids, targets):
        logits = self.head(self.layers(self.embed(ids)))
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        ASKED.append(device_type)
        return torch.optim.AdamW(self.parameters(), lr=learning_rate, betas=betas, weight_decay=weight_decay)
"""


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """A benchmark silences the loggers of its whole process, which here runs other tests too."""
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture
def stand_in(tmp_path: Path) -> Iterator[Path]:
    """A folder like a check-out of nanoGPT."""
    folder = tmp_path / "nanoGPT"
    folder.mkdir()
    (folder / "model.py").write_text(STAND_IN)
    sys.modules.pop("model", None)
    yield folder
    sys.modules.pop("model", None)
