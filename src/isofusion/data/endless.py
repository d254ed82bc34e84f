"""The built-in world as an endless source: blocks of 64 packed rows, each generated once and kept in the cache.

Block b of (seed, domain) holds as many of the documents i = 0, 1, 2, ... as best-fit decreasing packs into 64 rows: a
prefix, so no length is favoured, in rows of shuffled order. Every arm and size of a study reads the same files. A file
is a JSON head with the statistics of its rows and a zstd frame; measured 1.1 MB for 64 rows of 256 slots at 48 px.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np

from isofusion.config import DataConfig
from isofusion.data import cache, pack
from isofusion.data.batch import PackedBatch
from isofusion.data.images import to_patches
from isofusion.data.order import permutation
from isofusion.data.pack import Piece, Rows, finish, largest_prefix
from isofusion.data.sample import DOMAINS, Image, Sample
from isofusion.errors import InputError

BLOCK = 64  # rows
MAGIC = b"isoblk1\n"
STORED = ("token_ids", "doc_id", "image_id", "token_class", "oracle", "patches")


def split_seed(split: str, seed: int) -> int:
    """Training and validation never share a stream, whatever their seeds."""
    return 2 * seed + (split == "val")


class WorldSource:
    """Rows 0, 1, 2, ... of one domain of the world."""

    n_samples: int | None = None

    def __init__(self, name: str, domain: str, data: DataConfig, world: Any, seed: int) -> None:
        self.name, self.domain, self.world, self.seed, self.data = name, domain, world, seed, data
        identity = getattr(world, "digest", None) or data.world.digest()
        # the code is part of the digest, and so of the stream's fingerprint: a resume after an edit must be refused
        self.digest = cache.digest(
            "world", str(identity), _code(world), domain, data.image_size, data.patch_size, data.row_len, BLOCK
        )
        folder = cache.digest(self.digest, seed)
        self.folder = cache.root() / "world" / f"{domain}-{seed}-{folder[:24]}"
        self._recent = cache.Recent(4)
        self._heads: dict[int, dict[str, Any]] = {}

    def row(self, j: int) -> tuple[Rows, int]:
        """Row j, as (block, row of the block)."""
        return self.block(j // BLOCK), j % BLOCK

    def block(self, b: int) -> Rows:
        return self._recent.get(b, lambda: self._load_or_build(b))

    def _path(self, b: int) -> Path:
        return self.folder / f"{b // 1000:04d}" / f"{b:07d}.blk"

    def _load_or_build(self, b: int) -> Rows:
        if importlib.util.find_spec("zstandard") is None:  # planning without the [train] extra: nothing is kept
            return self._build(b)
        path = self._path(b)
        if (rows := self._load(path)) is not None:
            return rows
        with cache.lock(path):
            if (rows := self._load(path)) is not None:
                return rows
            rows = self._build(b)
            cache.write_bytes(path, _encode(rows))
        return rows

    def _load(self, path: Path) -> Rows | None:
        try:
            return _decode(path.read_bytes(), self.data, DOMAINS.index(self.domain))
        except FileNotFoundError:
            return None
        except ValueError:  # damaged: build it again
            return None

    def _build(self, b: int) -> Rows:
        pieces: list[Piece] = []
        slots = 0
        while slots <= BLOCK * self.data.row_len:  # no more than these can fit
            i = len(pieces)
            pieces.append(self._piece(self.world.sample(self.seed, self.domain, b, i), b, i))
            size = len(pieces[-1].ids)
            if size > self.data.row_len:
                raise InputError(
                    f"the world's {self.domain} document {b}.{i} has {size} slots, and data.row_len is "
                    f"{self.data.row_len}; raise row_len or patch_size, or lower image_size"
                )
            slots += size
        plan = largest_prefix([len(piece.ids) for piece in pieces], BLOCK, self.data.row_len)
        order = permutation(BLOCK, self.seed, f"{self.domain}:rows", b)  # else the longest documents open every block
        rows = [[pieces[i] for i in plan[r]] for r in order.tolist()]
        p = self.data.patch_size
        domain, pad = DOMAINS.index(self.domain), self.world.tokenizer.pad_id
        return pack.build(rows, self.data.row_len, self.data.patches_per_image, p * p * 3, domain, pad)

    def _piece(self, sample: Sample, b: int, i: int) -> Piece:
        tok, n, p = self.world.tokenizer, self.data.patches_per_image, self.data.patch_size
        ids: list[np.ndarray] = [np.array([tok.bos_id], np.int32)]
        image: list[np.ndarray] = [np.array([-1], np.int32)]
        classes: list[np.ndarray] = [np.zeros(1, np.uint8)]
        oracle: list[np.ndarray] = [np.full(1, np.nan, np.float32)]
        patches = [np.zeros((0, p * p * 3), np.uint8)]
        for segment in sample.segments:
            if isinstance(segment, Image):
                ids.append(np.full(n, tok.image_id, np.int32))
                image.append(np.full(n, len(patches) - 1, np.int32))
                classes.append(np.zeros(n, np.uint8))
                oracle.append(np.full(n, np.nan, np.float32))
                patches.append(to_patches(segment.pixels, self.data.image_size, p))
                continue
            words = tok.encode(segment.text) if segment.ids is None else np.asarray(segment.ids, np.int32)
            size = len(words)
            ids.append(words)
            image.append(np.full(size, -1, np.int32))
            classes.append(np.zeros(size, np.uint8) if segment.token_class is None else segment.token_class)
            oracle.append(np.full(size, np.nan, np.float32) if segment.oracle is None else segment.oracle)
        meta = sample.meta
        ids.append(np.array([tok.eos_id], np.int32))
        image.append(np.array([-1], np.int32))
        classes.append(np.array([meta.get("eos_class", 0)], np.uint8))
        oracle.append(np.array([meta.get("eos_oracle", np.nan)], np.float32))
        exposures = meta.get("exposures", 0)
        return Piece(
            key=f"{self.name}:{b}:{i}",
            ids=np.concatenate(ids).astype(np.int32),
            image=np.concatenate(image),
            patches=np.concatenate(patches),
            token_class=np.concatenate(classes).astype(np.uint8),
            oracle=np.concatenate(oracle).astype(np.float32),
            exposures=int(exposures) if np.ndim(exposures) == 0 else len(exposures),
            text_nats=float(np.sum(meta.get("text_nats", 0.0), dtype=np.float64)),
            lookups=np.asarray(meta.get("lookups", ()), np.int64).reshape(-1),
        )

    def _head(self, b: int) -> dict[str, Any] | None:
        """Row statistics of a block that was generated already; None for one that was not."""
        if b not in self._heads:
            try:
                with self._path(b).open("rb") as file:
                    if file.read(8) != MAGIC:
                        return None
                    head = json.loads(file.read(struct.unpack("<I", file.read(4))[0]))
            except (OSError, ValueError, struct.error):
                return None
            self._heads[b] = head["statistics"]
        return self._heads[b]

    def totals(self, rows: int) -> tuple[dict[str, float], bool]:
        """Sums of the row statistics over rows 0 .. rows-1, and whether they are exact.

        Blocks not generated yet count as the mean row of those that are; the first block is generated if none is.
        """
        heads = {b: h for b in range(-(-rows // BLOCK)) if (h := self._head(b)) is not None}
        if rows and not heads:
            heads[0] = self.block(0).statistics()
        known: dict[str, float] = {}
        counted = full = 0
        everything: dict[str, float] = {}
        for b, head in heads.items():
            inside = min(BLOCK, rows - b * BLOCK)
            counted, full = counted + inside, full + BLOCK
            for name, values in head.items():
                known[name] = known.get(name, 0) + sum(values[:inside])
                everything[name] = everything.get(name, 0) + sum(values)
        missing = rows - counted
        return {name: known[name] + missing * everything[name] / full for name in known}, missing == 0

    def ledger(self, rows: int) -> dict[str, Any]:
        """What the first `rows` rows hold: see `Stream.report`. Every document and image is new."""
        totals, exact = self.totals(rows)
        count = {name: round(totals.get(name, 0)) for name in ("documents", "text_tokens", "image_tokens", "exposures")}
        return {
            **count,
            "unique_tokens": count["text_tokens"],
            "unique_images": count["image_tokens"] // self.data.patches_per_image,
            "epochs": None,
            "estimated": not exact,
            "samples": None,
            "bad": {},
            "bad_examples": [],
            "cut": 0,
            "truncated": 0,
        }


def _code(world: Any) -> str:
    """sha256 over the generator's and the packer's source.

    An edit must never meet blocks or checkpoints of its former self.
    """
    folder = Path(inspect.getfile(type(world))).parent
    files = sorted(folder.glob("*.py")) + [Path(pack.__file__), Path(__file__)]
    return hashlib.sha256(b"".join(hashlib.sha256(f.read_bytes()).digest() for f in files)).hexdigest()


def _encode(rows: Rows) -> bytes:
    b = rows.batch
    flat = np.concatenate([np.zeros(0, np.int64), *rows.lookups])
    # class and oracle lie on the predicting slot in a batch; finish() wants them on the token, one slot later
    token_class, oracle = np.roll(b.token_class, 1), np.roll(b.oracle, 1)
    arrays = [b.token_ids, b.doc_id, b.image_id, token_class, oracle, b.patches]
    head = {
        "statistics": rows.statistics(),
        "patches": list(b.patches.shape),
        "patch_ptr": rows.patch_ptr.tolist(),
        "doc_ptr": rows.doc_ptr.tolist(),
        "lookups": [len(x) for x in rows.lookups],
        "keys": list(b.keys),
    }
    text = json.dumps(head).encode()
    payload = b"".join(np.ascontiguousarray(a).tobytes() for a in [*arrays, flat])
    import zstandard

    packed = zstandard.ZstdCompressor(level=1, write_checksum=True).compress(payload)
    return MAGIC + struct.pack("<I", len(text)) + text + packed


def _decode(data: bytes, config: DataConfig, domain: int) -> Rows:
    """Inverse of `_encode`. Raises ValueError for a damaged file."""
    import zstandard

    try:
        if data[:8] != MAGIC:
            raise ValueError("not a block")
        size = struct.unpack("<I", data[8:12])[0]
        head = json.loads(data[12 : 12 + size])
        payload = zstandard.ZstdDecompressor().decompress(data[12 + size :])
    except (zstandard.ZstdError, struct.error, json.JSONDecodeError) as error:
        raise ValueError(str(error)) from error
    total = BLOCK * config.row_len
    shapes: list[tuple[Any, tuple[int, ...]]] = [
        (np.int32, (total,)), (np.int32, (total,)), (np.int32, (total,)), (np.uint8, (total,)), (np.float32, (total,)),
        (np.uint8, tuple(head["patches"])), (np.int64, (sum(head["lookups"]),)),
    ]  # fmt: skip
    arrays, at = [], 0
    for dtype, shape in shapes:
        count = int(np.prod(shape))
        arrays.append(np.frombuffer(payload, dtype, count, at).reshape(shape))
        at += count * np.dtype(dtype).itemsize
    named: dict[str, Any] = dict(zip(STORED, arrays[:-1], strict=True))
    batch: PackedBatch = finish(
        rows=BLOCK, row_len=config.row_len, n=config.patches_per_image, keys=tuple(head["keys"]),
        domain=np.full(total, domain, np.uint8), **named,
    )  # fmt: skip
    exposures = np.array(head["statistics"]["exposures"], np.int64)
    text_nats = np.array(head["statistics"]["text_nats"], np.float64)
    lookups = np.split(arrays[-1], np.cumsum(head["lookups"])[:-1])
    return Rows(batch, np.array(head["patch_ptr"]), np.array(head["doc_ptr"]), exposures, text_nats, lookups)
