"""What a reader yields: one sample is a sequence of text and image segments, in reading order."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

DOMAINS = ("caption", "interleaved", "text")
"""The three domains of the study (arXiv 2504.07951, Table 5); `domain` codes index this tuple."""


class BadSample(Exception):
    """One sample that cannot be used, or (`unread` > 0 bytes) the rest of a file that cannot be read."""

    def __init__(self, key: str, reason: str, detail: str = "", unread: int = 0, lost: int = 1) -> None:
        super().__init__(f"{key}: {reason} {detail}".strip())
        self.key, self.reason, self.detail, self.unread, self.lost = key, reason, detail, unread, lost


Ref = tuple[int, ...]
Segments = tuple[str | bytes, ...]
"""A sample as it lies in the file: str is text, bytes an encoded image."""


@dataclass(frozen=True)
class Found:
    """A sample that the scan of a file saw: its key and the integers that find it again."""

    key: str
    ref: Ref


@dataclass(frozen=True)
class Text:
    """A run of text. `ids`, when given, are its tokens already (the world writes words, not strings)."""

    text: str = ""
    ids: np.ndarray | None = None  # i32[L] or None
    token_class: np.ndarray | None = None  # u8[L]: class of each token as a target; 0 = unclassified
    oracle: np.ndarray | None = None  # f32[L]: -log p of each token under the true source, nats


@dataclass(frozen=True)
class Image:
    """A decoded image, uint8 [height, width, 3]."""

    pixels: np.ndarray


@dataclass(frozen=True)
class Sample:
    """One document. `key` names it in its source, for audits and error messages."""

    key: str
    segments: tuple[Text | Image, ...]
    meta: dict = field(default_factory=dict)
