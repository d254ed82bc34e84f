"""Tokenizers of real text: any `tokenizer.json`, or a byte-level BPE trained on the study's own training text.

Both need four reserved tokens: padding, begin, end, image. Text never becomes one of them, whether the file calls them
special or not: a literal "<eos>" in a document is spelled out.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from isofusion.data import cache
from isofusion.data.slow import Slow
from isofusion.errors import InputError

RESERVED: dict[str, tuple[str, ...]] = {
    "pad": ("<pad>", "<|pad|>", "<|padding|>", "[PAD]"),
    "bos": ("<bos>", "<s>", "<|bos|>", "<|begin_of_text|>", "<|startoftext|>"),
    "eos": ("<eos>", "</s>", "<|eos|>", "<|end_of_text|>", "<|endoftext|>"),
    "image": ("<image>", "<|image|>"),
}
TRAIN_BYTES = 256 << 20  # a tokenizer learns nothing more from more text
VERSION = 1


class AnyTokenizer(Protocol):
    """What packing and evaluation need of a tokenizer; the world has its own."""

    vocab_size: int
    pad_id: int
    bos_id: int
    eos_id: int
    image_id: int
    digest: str

    def encode(self, text: str) -> np.ndarray: ...

    def decode(self, ids: np.ndarray) -> str: ...

    def n_bytes(self, ids: np.ndarray) -> int | None: ...


class JsonTokenizer:
    """A Hugging Face `tokenizers` model. Raises InputError where a reserved token is missing."""

    def __init__(self, content: str, name: str = "tokenizer.json") -> None:
        from tokenizers import Tokenizer

        try:
            tok = Tokenizer.from_str(content)
        except Exception as error:  # the binding raises a bare Exception
            raise InputError(f"{name} is not a tokenizer.json: {str(error)[:200]}") from error
        tok.no_padding()
        tok.no_truncation()
        tok.encode_special_tokens = True
        vocabulary = tok.get_vocab(with_added_tokens=True)
        found = {role: next((t for t in names if t in vocabulary), None) for role, names in RESERVED.items()}
        missing = {role: RESERVED[role] for role, token in found.items() if token is None}
        if missing:
            wanted = "; ".join(f"{role} ({' or '.join(names[:3])})" for role, names in missing.items())
            adding = ", ".join(repr(names[0]) for names in missing.values())
            raise InputError(
                f"{name} lacks reserved tokens: {wanted}. Add them with the tokenizers library: "
                f"t = Tokenizer.from_file(FILE); t.add_special_tokens([{adding}]); t.save(NEW_FILE)"
            )
        self._tok = tok
        self.name = name
        self.pad_id, self.bos_id, self.eos_id, self.image_id = (vocabulary[str(found[r])] for r in RESERVED)
        self._reserved = {self.pad_id, self.bos_id, self.eos_id, self.image_id}
        self.vocab_size = max(vocabulary.values()) + 1
        spec = json.loads(tok.to_str())
        self.digest = hashlib.sha256(tok.to_str().encode()).hexdigest()
        self.content = content
        unknown = _unknown(spec["model"], vocabulary)
        # a file may give both the same token (<|endoftext|>); text becomes no reserved token, so there it is the end
        self._unknown = None if unknown in self._reserved else unknown
        self._bytes = _byte_lengths(spec, vocabulary, self.vocab_size)
        if self._bytes is not None:
            self._bytes[list(self._reserved)] = 0

    def encode(self, text: str) -> np.ndarray:
        """Text -> i32[L], no reserved token in it."""
        return self.encode_many([text])[0]

    def encode_many(self, texts: list[str]) -> list[np.ndarray]:
        # fast: without the places of the tokens in the text
        found = [e.ids for e in self._tok.encode_batch_fast(texts, add_special_tokens=False)]
        clean = self._reserved.isdisjoint
        return [
            np.array(ids if clean(ids) else self._apart(text), np.int32) for text, ids in zip(texts, found, strict=True)
        ]

    def _apart(self, text: str) -> list[int]:
        """Tokens of a text that spells reserved ones, which are cut behind their first character."""
        found = self._tok.encode(text, add_special_tokens=False)
        places = [place for i, place in zip(found.ids, found.offsets, strict=True) if i in self._reserved]
        if not places:
            return list(found.ids)
        if short := next((text[a:b] for a, b in places if b - a < 2), None):
            raise InputError(f"{self.name} takes the text {short!r} for a reserved token; choose another tokenizer")
        cuts = [0, *(a + 1 for a, _ in places), len(text)]
        return [i for a, b in pairwise(cuts) for i in self._apart(text[a:b])]

    def decode(self, ids: np.ndarray) -> str:
        """i32[L] -> text; reserved tokens vanish."""
        kept = [i for i in np.asarray(ids).tolist() if i not in self._reserved]
        return self._tok.decode(kept, skip_special_tokens=True)

    def n_bytes(self, ids: np.ndarray) -> int | None:
        """UTF-8 bytes that the tokens spell, reserved tokens 0: the denominator of bits per byte.

        None where one is the unknown token, which does not tell what it stands for.
        """
        ids = np.asarray(ids)
        if self._unknown is not None and (ids == self._unknown).any():
            return None
        if self._bytes is not None:
            return int(self._bytes[ids].sum())
        return len(self.decode(ids).encode())


def _unknown(model: dict[str, Any], vocabulary: dict[str, int]) -> int | None:
    """Id of the token that stands for what the model has no token for; None where every text has tokens."""
    if model.get("unk_id") is not None:  # Unigram
        return int(model["unk_id"])
    return vocabulary.get(model.get("unk_token") or "")


def _byte_lengths(spec: dict[str, Any], vocabulary: dict[str, int], size: int) -> np.ndarray | None:
    """i64[V] for byte-level models, whose tokens spell one byte per character; None for others."""
    decoder = spec.get("decoder") or {}
    kinds = {decoder.get("type"), *(d.get("type") for d in decoder.get("decoders", []))}
    if "ByteLevel" not in kinds:
        return None
    lengths = np.zeros(size, np.int64)
    special = {t["id"] for t in spec.get("added_tokens", []) if t.get("special")}
    added = {t["id"]: len(t["content"].encode()) for t in spec.get("added_tokens", [])}
    for token, i in vocabulary.items():
        lengths[i] = 0 if i in special else added.get(i, len(token))
    return lengths


def load(path: Path) -> JsonTokenizer:
    """A tokenizer.json from disk. Raises InputError."""
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        hub = (
            "; a tokenizer is train:VOCAB or the path of a tokenizer.json, no name on a hub" if not path.suffix else ""
        )
        raise InputError(f"cannot read the tokenizer {path}: {reason}{hub}") from error
    return JsonTokenizer(content, str(path))


def train(size: int, texts: Callable[[], Iterable[str]], corpus: str) -> JsonTokenizer:
    """Byte-level BPE of at most `size` tokens on `texts()`, cached by `corpus` (a digest of them) and `size`.

    Deterministic. A small corpus may give fewer tokens: read `.vocab_size`. Raises InputError for size < 260.
    """
    smallest = 256 + len(RESERVED)
    if size < smallest:
        raise InputError(
            f"tokenizer train:{size} is too small: 256 bytes and {len(RESERVED)} reserved tokens need {smallest}"
        )
    place = cache.root() / "tokenizers" / f"v{VERSION}" / f"{cache.digest(corpus, size)}.json"
    with contextlib.suppress(OSError, ValueError):  # not there, or damaged
        return JsonTokenizer(place.read_text(encoding="utf-8"), f"train:{size}")
    content = _train(size, _bounded(texts()))
    cache.write_bytes(place, content.encode())
    return JsonTokenizer(content, f"train:{size}")


def _bounded(texts: Iterable[str]) -> Iterator[str]:
    left, slow = TRAIN_BYTES, Slow("training the tokenizer")
    for text in texts:
        yield text
        left -= len(text)
        slow.at("{:.0f} MB of text read", (TRAIN_BYTES - left) / 1e6)
        if left < 0:
            break
    slow.at("learning its tokens")


def _train(size: int, texts: Iterable[str]) -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[names[0] for names in RESERVED.values()],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tok.train_from_iterator(texts, trainer)
    return tok.to_str()


def parse(spec: str) -> int | Path | None:
    """`data.tokenizer`: None for the world, an int for train:V, a path otherwise. Raises InputError."""
    if spec == "world":
        return None
    if not spec.startswith("train:"):
        return Path(spec)
    try:
        return int(spec.removeprefix("train:").replace("_", ""))
    except ValueError:
        raise InputError(f"tokenizer {spec!r}: write train:VOCAB with a whole number, for example train:4096") from None
