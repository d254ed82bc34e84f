"""Tokenizers of real text: any `tokenizer.json`, or a byte-level BPE trained on the study's own training text.

Both need four reserved tokens: padding, begin, end, image. Text never becomes one of them: a literal "<eos>" in a
document is spelled out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from isofusion.data import cache
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
        self.vocab_size = max(vocabulary.values()) + 1
        self.digest = hashlib.sha256(tok.to_str().encode()).hexdigest()
        self.content = content
        self._bytes = _byte_lengths(tok, vocabulary, self.vocab_size)

    def encode(self, text: str) -> np.ndarray:
        """Text -> i32[L], no reserved token added."""
        return np.array(self._tok.encode(text, add_special_tokens=False).ids, np.int32)

    def encode_many(self, texts: list[str]) -> list[np.ndarray]:
        # fast: without the places of the tokens in the text
        found = self._tok.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(e.ids, np.int32) for e in found]

    def decode(self, ids: np.ndarray) -> str:
        """i32[L] -> text; reserved tokens vanish."""
        return self._tok.decode(np.asarray(ids).tolist(), skip_special_tokens=True)

    def n_bytes(self, ids: np.ndarray) -> int:
        """UTF-8 bytes that the tokens spell, reserved tokens 0: the denominator of bits per byte."""
        if self._bytes is not None:
            return int(self._bytes[np.asarray(ids)].sum())
        return len(self.decode(ids).encode())


def _byte_lengths(tok: Any, vocabulary: dict[str, int], size: int) -> np.ndarray | None:
    """i64[V] for byte-level models, whose tokens spell one byte per character; None for others."""
    spec = json.loads(tok.to_str())
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
        raise InputError(f"cannot read the tokenizer {path}: {reason}") from error
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
    if not place.exists():
        content = _train(size, _bounded(texts()))
        cache.write_bytes(place, content.encode())
    return JsonTokenizer(place.read_text(encoding="utf-8"), f"train:{size}")


def _bounded(texts: Iterable[str]) -> Iterator[str]:
    left = TRAIN_BYTES
    for text in texts:
        yield text
        left -= len(text)
        if left < 0:
            return


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
