"""Every random choice of a document goes through one object: its probability is known, and a test can enumerate it.

A document is written left to right. `Chooser.choose` draws from an explicit distribution; `Writer` turns choices into
tokens with their -log p given what is visible so far. Two rules keep the oracle exact (docs/world.md):
- a choice is revealed by the next text token, whose nats it joins (`Writer.defer`);
- whether the next segment is an image is not scored, because a slot before an image has no target, so
  the text options at such a point are conditional on text coming next (`table(..., text=...)`).
Beside it each token carries its nats to a reader of the text alone, to whom images stay shut: H(text).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from isofusion.data.sample import Image, Sample, Text
from isofusion.data.world.vocab import GRAMMAR


class Table:
    """A distribution over 0..n-1: `probs`, their running sum without the last, and the nats each outcome costs."""

    __slots__ = ("cum", "nats", "probs")

    def __init__(self, probs: Any, cum: Any, nats: Any) -> None:
        self.probs, self.cum, self.nats = probs, cum, nats


@lru_cache(maxsize=4096)
def table(weights: tuple[float, ...], text: tuple[bool, ...] | None = None) -> Table:
    """Table from weights (zero = impossible). `text`: which outcomes are text; only those cost nats, given text."""
    total = math.fsum(weights)
    probs = [w / total for w in weights]
    scale = total if text is None else math.fsum(w for w, t in zip(weights, text, strict=True) if t)
    nats = [
        0.0 if text is not None and not text[i] else (-math.log(w / scale) if w else math.inf) + 0.0
        for i, w in enumerate(weights)
    ]
    last = max(i for i, w in enumerate(weights) if w)
    cum = [math.fsum(probs[: i + 1]) if i < last else 2.0 for i in range(len(weights) - 1)]
    return Table(probs, cum, nats)


@lru_cache(maxsize=64)
def uniform(n: int) -> Table:
    """All n outcomes alike."""
    return table((1.0,) * n)


EVEN = uniform(2)


class Chooser:
    """Draws outcomes from a counter-based generator; `hidden` gives bytes for noise that no text may depend on."""

    __slots__ = ("_at", "_bits", "_uniforms")
    _CHUNK = 192

    def __init__(self, bits: np.random.Philox) -> None:
        self._bits = bits
        self._uniforms: list[float] = []
        self._at = 0

    def choose(self, dist: Table, label: str) -> int:
        """An outcome of `dist`. `label` names the kind of choice (tests pin or enumerate by it)."""
        if self._at == len(self._uniforms):
            raw = self._bits.random_raw(self._CHUNK)
            self._uniforms = ((raw >> np.uint64(11)) * 2.0**-53).tolist()
            self._at = 0
        u = self._uniforms[self._at]
        self._at += 1
        return bisect_right(dist.cum, u)

    def hidden(self, n: int) -> np.ndarray:
        """u8[n], uniform; same on little- and big-endian machines."""
        raw: Any = self._bits.random_raw(-(-n // 8))
        return raw.astype("<u8", copy=False).view(np.uint8)[:n]


class Writer:
    """Collects the segments of one document. `used` counts its slots so far, BOS included."""

    def __init__(self, chooser: Chooser, max_len: int, patches_per_image: int) -> None:
        self.chooser = chooser
        self.patches_per_image = patches_per_image
        self.room = max_len - 2  # slots left for segments: BOS and EOS are taken
        self.ids: list[int] = []
        self.classes: list[int] = []
        self.nats: list[float] = []
        self.blind: list[float] = []  # of all segments: nats of each text token to a reader of the text alone
        self.segments: list[Text | Image] = []
        self.pending = self.pending_blind = 0.0
        self.lookups: list[int] = []
        self.exposures = 0

    def put(self, token: int, kind: int, nats: float = 0.0, blind: float = 0.0) -> None:
        """A token that the visible past gives away, but for `nats` and for what is pending.

        `blind`: what it costs a reader of the text alone on top, because an image shows it.
        """
        self.ids.append(token)
        self.classes.append(kind)
        self.nats.append(self.pending + nats)
        self.blind.append(self.pending_blind + nats + blind)
        self.pending = self.pending_blind = 0.0
        self.room -= 1

    def pick(self, tokens: Sequence[int], kind: int, label: str = "word", blind: float = 0.0) -> int:
        """Writes one of `tokens`, uniformly; returns its index. `blind` as in `put`."""
        dist = uniform(len(tokens))
        i = self.chooser.choose(dist, label)
        self.put(tokens[i], kind, dist.nats[i], blind)
        return i

    def defer(self, dist: Table, label: str = "plan") -> int:
        """A choice that the next token reveals: its nats join that token's."""
        i = self.chooser.choose(dist, label)
        self.pending += dist.nats[i]
        self.pending_blind += dist.nats[i]
        return i

    def image(self, pixels: np.ndarray) -> None:
        if self.pending or self.pending_blind:
            raise AssertionError("a scored choice is pending before an image, where no target can pay for it")
        self._flush()
        self.segments.append(Image(pixels))
        self.room -= self.patches_per_image

    def _flush(self) -> None:
        if self.ids:
            self.segments.append(
                Text(
                    ids=np.array(self.ids, dtype=np.int32),
                    token_class=np.array(self.classes, dtype=np.uint8),
                    oracle=np.array(self.nats, dtype=np.float32),
                )
            )
            self.ids, self.classes, self.nats = [], [], []

    def finish(self, key: str) -> Sample:
        """The document; what is pending is the price of EOS."""
        self._flush()
        meta = {
            "eos_oracle": self.pending,
            "text_nats": np.array([*self.blind, self.pending_blind], dtype=np.float32),
            "eos_class": GRAMMAR,
            "lookups": tuple(self.lookups),
            "exposures": self.exposures,
        }
        return Sample(key, tuple(self.segments), meta)
