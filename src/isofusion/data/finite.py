"""A finite source as an endless row of rows: row j -> (epoch, row of its plan) -> packed slots, a pure function.

The text is tokenised once and the images are decoded once into stores in the cache, shared by all runs of a study:
4 bytes a token, 3 * image_size^2 bytes an image (files past patches.STORE_BYTES of a source: decoded on demand).

# n patches per image, S segments, D documents, N pieces
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from isofusion.config import DataConfig
from isofusion.data import cache, patches
from isofusion.data.images import BrokenImage, decode
from isofusion.data.index import SourceIndex
from isofusion.data.order import permutation
from isofusion.data.pack import IMAGE, Piece, Rows, best_fit, build, cut
from isofusion.data.readers import Reader, open_reader
from isofusion.data.sample import DOMAINS, BadSample, Segments
from isofusion.data.slow import Slow
from isofusion.data.tokenizer import JsonTokenizer
from isofusion.errors import InputError

VERSION = 2
BATCH = 512  # texts tokenised at once
EXACT_EPOCHS = 64  # of the ledger; what comes after is like these
OPEN = 64  # stores of patches of a source that are mapped at a time: each holds a file open


class Documents:
    """Random access to the samples of a source, as they lie in the files."""

    def __init__(self, index: SourceIndex) -> None:
        self.index = index
        self._first = index.first
        self._readers: dict[int, Reader] = {}

    def __len__(self) -> int:
        return int(self._first[-1])

    def place(self, d: int) -> tuple[int, int]:
        """(file, sample inside it) of document d."""
        f = int(np.searchsorted(self._first, d, side="right")) - 1
        return f, d - int(self._first[f])

    def key(self, d: int) -> str:
        f, i = self.place(d)
        return f"{self.index.files[f].path.name}/{self.index.files[f].keys[i]}"

    def raw(self, d: int) -> Segments:
        """Segments of document d. Raises InputError when its file changed since it was indexed."""
        f, i = self.place(d)
        file = self.index.files[f]
        file.check_unchanged()
        if f not in self._readers:
            self._readers[f] = open_reader(file.path, file.format)
        try:
            ref = tuple(file.ref[file.ref_ptr[i] : file.ref_ptr[i + 1]].tolist())
            return self._readers[f].raw(file.keys[i], ref)
        except (BadSample, OSError) as error:
            raise InputError(
                f"{file.path}: sample {file.keys[i]} was good when indexed, and is not now: {error}"
            ) from error


class TokenStore:
    """All text of a source as tokens. seg_ptr i64[D+1], seg_len i32[S] (IMAGE for an image), tokens i32."""

    def __init__(self, documents: Documents, tokenizer: JsonTokenizer) -> None:
        key = cache.digest("tokens", VERSION, documents.index.digest, tokenizer.digest)
        folder = cache.root() / "tokens" / f"v{VERSION}" / key
        if not self._load(folder):
            with cache.lock(folder):
                if not self._load(folder):  # nor was another process first
                    shutil.rmtree(folder, ignore_errors=True)
                    cache.write_folder(folder, lambda p: _tokenise(p, documents, tokenizer))
                    self._load(folder)

    def _load(self, folder: Path) -> bool:
        """Whether the arrays are there, and whole."""
        try:
            self.seg_ptr = np.load(folder / "seg_ptr.npy")
            self.seg_len = np.load(folder / "seg_len.npy")
            self.tokens = np.load(folder / "tokens.npy", mmap_mode="r" if self.seg_len.max(initial=0) > 0 else None)
        except (OSError, ValueError, EOFError):
            return False
        self.seg_at = np.concatenate([[0], np.cumsum(np.maximum(self.seg_len, 0), dtype=np.int64)])
        return True


def _tokenise(folder: Path, documents: Documents, tokenizer: JsonTokenizer) -> None:
    seg_ptr, seg_len, parts = [0], [], []
    slow = Slow(f"tokenising source {documents.index.name}")
    for start in range(0, len(documents), BATCH):
        slow.at("{:,} of {:,} documents", start, len(documents))
        batch = [documents.raw(d) for d in range(start, min(start + BATCH, len(documents)))]
        coded = iter(tokenizer.encode_many([s for segments in batch for s in segments if isinstance(s, str)]))
        for segments in batch:
            for segment in segments:
                if isinstance(segment, bytes):
                    seg_len.append(IMAGE)
                else:
                    parts.append(next(coded))
                    seg_len.append(len(parts[-1]))
            seg_ptr.append(len(seg_len))
    np.save(folder / "seg_ptr.npy", np.array(seg_ptr, np.int64))
    np.save(folder / "seg_len.npy", np.array(seg_len, np.int32))
    np.save(folder / "tokens.npy", np.concatenate([np.zeros(0, np.int32), *parts]))


class ImageStore:
    """Patches of all images of a source: `patches(d, first, last)` -> u8 [(last - first) * n, p*p*3]."""

    def __init__(self, documents: Documents, shape: patches.Shape) -> None:
        self.documents, self.shape = documents, shape
        self.n, self.patch_dim = shape.per_image
        self.image_ptr = documents.index.image_ptr()
        self._recent, self._open = cache.Recent(2048), cache.Recent(OPEN)
        files = documents.index.files
        self._start = np.cumsum([0] + [len(file.image_hash) for file in files])  # images before each file
        self._stores: list[Path | None] = [None] * len(files)
        budget, missing = patches.Budget(patches.STORE_BYTES), []
        for f, file in enumerate(files):  # those that are there first: another file must not displace them
            count = len(file.image_hash)
            path = patches.place(file.sha256, file.format, shape)
            if count and not patches.is_whole(path, count, shape):
                missing.append((f, count, path))
            elif count and budget.take(count * shape.bytes):
                self._stores[f] = path
        for f, count, path in missing:
            if budget.take(count * shape.bytes):
                patches.ensure(path, count, shape, lambda f=f: self._samples(f))  # type: ignore[misc]
                self._stores[f] = path

    def _samples(self, f: int) -> Iterator[list[np.ndarray]]:
        for d in range(int(self.documents.index.first[f]), int(self.documents.index.first[f + 1])):
            if self.image_ptr[d] < self.image_ptr[d + 1]:
                yield self._decode(d)

    def _decode(self, d: int) -> list[np.ndarray]:
        encoded = [s for s in self.documents.raw(d) if isinstance(s, bytes)]
        try:
            return [self.shape.cut(decode(e)) for e in encoded]
        except BrokenImage as error:
            raise InputError(
                f"an image of {self.documents.key(d)} was good when indexed, and is not now: {error}"
            ) from error

    def patches(self, d: int, first: int, last: int) -> np.ndarray:
        """Images first .. last-1 of document d -> u8 [(last-first)*n, p*p*3]."""
        if first == last:
            return np.zeros((0, self.patch_dim), np.uint8)
        f = self.documents.place(d)[0]
        if (path := self._stores[f]) is not None:
            count = int(self._start[f + 1] - self._start[f])
            store = self._open.get(f, lambda: patches.mapped(path, count, self.shape))
            at = int(self.image_ptr[d] - self._start[f])
            block = np.asarray(store[at + first : at + last])
        else:
            block = self._recent.get(d, lambda: np.stack(self._decode(d)))[first:last]
        return block.reshape(-1, self.patch_dim)


class FiniteSource:
    """Rows 0, 1, 2, ... of a source over its epochs, in the order of `seed`."""

    def __init__(
        self, name: str, domain: str, index: SourceIndex, data: DataConfig, tok: JsonTokenizer, seed: int
    ) -> None:
        self.name, self.domain, self.index, self.seed = name, domain, index, seed
        self.digest = index.digest
        self.n_samples: int | None = index.n
        self.tokenizer, self.row_len, self.n = tok, data.row_len, data.patches_per_image
        self.documents = Documents(index)
        self.text = TokenStore(self.documents, tok)
        self.images = ImageStore(self.documents, patches.Shape(data.image_size, data.patch_size))
        self._tabulate()
        self._plans = cache.Recent(4)
        self._ends = [0]  # rows before epoch 0, 1, 2, ...

    def _tabulate(self) -> None:
        """The piece table: document, content range [a, b), images [i, j) of each piece, and its length in slots."""
        seg_ptr, seg_len = self.text.seg_ptr, self.text.seg_len
        slots = np.where(seg_len == IMAGE, self.n, seg_len).astype(np.int64)
        total = np.concatenate([[0], np.cumsum(slots)])
        content = total[seg_ptr[1:]] - total[seg_ptr[:-1]]
        counts = np.ones(len(content), np.int64)
        pieces: dict[int, list[int]] = {}
        for d in np.flatnonzero(content + 2 > self.row_len).tolist():
            pieces[d] = cut(seg_len[seg_ptr[d] : seg_ptr[d + 1]].tolist(), self.n, self.row_len)
            counts[d] = len(pieces[d])
        self.piece_ptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self.doc = np.repeat(np.arange(len(content)), counts)
        self.b = np.repeat(content, counts)
        self.a = np.zeros(len(self.doc), np.int64)
        images = np.diff(self.images.image_ptr)
        self.i, self.j = np.zeros(len(self.doc), np.int64), np.repeat(images, counts)
        for d, ends in pieces.items():
            at = slice(int(self.piece_ptr[d]), int(self.piece_ptr[d + 1]))
            self.b[at] = ends
            self.a[at] = [0, *ends[:-1]]
            s = slice(int(seg_ptr[d]), int(seg_ptr[d + 1]))
            starts = (total[s] - total[seg_ptr[d]])[seg_len[s] == IMAGE]
            self.j[at] = np.searchsorted(starts, self.b[at])
            self.i[at] = np.searchsorted(starts, self.a[at])
        self.last = np.zeros(len(self.doc), bool)
        self.last[self.piece_ptr[1:] - 1] = True
        self.length = self.b - self.a + 1 + self.last
        self.image_slots = (self.j - self.i) * self.n
        self.n_cut = len(pieces)

    def plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(row_ptr i64[rows+1], piece i64[N]) of an epoch."""

        def make() -> tuple[np.ndarray, np.ndarray]:
            order = permutation(len(self.documents), self.seed, self.name, epoch)
            counts = self.piece_ptr[order + 1] - self.piece_ptr[order]
            start = np.repeat(self.piece_ptr[order] - (np.cumsum(counts) - counts), counts)
            arriving = start + np.arange(counts.sum())
            row_ptr, picked = best_fit(self.length[arriving], self.row_len)
            return row_ptr, arriving[picked]

        return self._plans.get(epoch, make)

    def rows_of(self, epoch: int) -> int:
        """Rows of an epoch (it differs a little from epoch to epoch)."""
        self._walk(epoch=epoch)
        return self._ends[epoch + 1] - self._ends[epoch]

    def _walk(self, *, epoch: int = -1, row: int = -1) -> None:
        while len(self._ends) <= epoch + 1 or self._ends[-1] <= row:
            self._ends.append(self._ends[-1] + len(self.plan(len(self._ends) - 1)[0]) - 1)

    def locate(self, j: int) -> tuple[int, int]:
        """Row j -> (epoch, row inside it)."""
        self._walk(row=j)
        epoch = int(np.searchsorted(self._ends, j, side="right")) - 1
        return epoch, j - self._ends[epoch]

    def row(self, j: int) -> tuple[Rows, int]:
        """Row j packed, as (block, row of the block)."""
        epoch, r = self.locate(j)
        row_ptr, order = self.plan(epoch)
        pieces = [self._piece(int(p), epoch) for p in order[row_ptr[r] : row_ptr[r + 1]]]
        domain = DOMAINS.index(self.domain)
        return build([pieces], self.row_len, self.n, self.images.patch_dim, domain, self.tokenizer.pad_id), 0

    def tokens(self, j: int) -> tuple[int, int]:
        """Text and image tokens of row j, from the plan alone."""
        epoch, r = self.locate(j)
        row_ptr, order = self.plan(epoch)
        pieces = order[row_ptr[r] : row_ptr[r + 1]]
        image = int(self.image_slots[pieces].sum())
        return int(self.length[pieces].sum()) - image, image

    def _piece(self, p: int, epoch: int) -> Piece:
        d, a, b = int(self.doc[p]), int(self.a[p]), int(self.b[p])
        size = b - a + 1 + bool(self.last[p])
        ids = np.full(size, self.tokenizer.image_id, np.int32)
        image = np.full(size, -1, np.int32)
        ids[0] = self.tokenizer.bos_id
        at = shown = 0
        for s in range(int(self.text.seg_ptr[d]), int(self.text.seg_ptr[d + 1])):
            length = int(self.text.seg_len[s])
            end = at + (self.n if length == IMAGE else length)
            low, high = max(at, a), min(end, b)
            if low < high and length == IMAGE:
                image[1 + low - a : 1 + high - a] = shown
                shown += 1
            elif low < high:
                begin = int(self.text.seg_at[s]) - at
                ids[1 + low - a : 1 + high - a] = self.text.tokens[begin + low : begin + high]
            at = end
        if self.last[p]:
            ids[-1] = self.tokenizer.eos_id
        sample = self.documents.key(d).replace("%", "%25").replace(":", "%3A")  # a colon opens the next part
        key = f"{self.name}:{epoch}:{sample}"
        if self.piece_ptr[d + 1] - self.piece_ptr[d] > 1:
            key += f":{p - int(self.piece_ptr[d])}"
        return Piece(key, ids, image, self.images.patches(d, int(self.i[p]), int(self.j[p])))

    def ledger(self, rows: int) -> dict[str, Any]:
        """What the first `rows` rows hold: see `Stream.report`. Exact up to EXACT_EPOCHS whole epochs."""
        totals = {"documents": 0, "text_tokens": 0, "image_tokens": 0}
        seen = np.zeros(len(self.doc), bool)
        epochs, left, epoch = 0.0, rows, 0
        while left > 0 and epoch < EXACT_EPOCHS:
            row_ptr, order = self.plan(epoch)
            there = min(left, len(row_ptr) - 1)
            picked = order[: row_ptr[there]]
            totals["documents"] += int(self.last[picked].sum())
            totals["image_tokens"] += int(self.image_slots[picked].sum())
            totals["text_tokens"] += int((self.length - self.image_slots)[picked].sum())
            seen[picked] = True
            epochs += there / (len(row_ptr) - 1)
            left, epoch = left - there, epoch + 1
        if left:  # each epoch holds everything once; only its rows differ a little
            epochs = epoch * rows / (rows - left)
            totals = {key: round(total * epochs / epoch) for key, total in totals.items()}
        hashes = self.index.column("image_hash")
        begin = self.images.image_ptr[self.doc[seen]]
        shown = np.zeros(len(hashes) + 1, np.int64)
        np.add.at(shown, begin + self.i[seen], 1)
        np.add.at(shown, begin + self.j[seen], -1)
        return {
            **totals,
            "unique_tokens": int((self.length - self.image_slots)[seen].sum()),
            "unique_images": len(np.unique(hashes[np.cumsum(shown)[:-1] > 0])),
            "epochs": round(epochs, 4),
            "estimated": left > 0,
            "samples": self.n_samples,
            "bad": self.index.bad,
            "bad_examples": self.index.examples,
            "cut": self.n_cut,
            "truncated": 0,
        }
