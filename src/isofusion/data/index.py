"""The index of a source: where every good sample lies, what is bad and why. Built once, kept outside the data folder.

Per file it is keyed by path, size and modification time. Building reads everything once: sha256 of the file, every
image decoded, every text parsed, so that training meets no surprise; hashes for the duplicate count come on the way,
and so do the patches that training will ask for.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from isofusion.config import SourceConfig
from isofusion.data import cache, patches
from isofusion.data.images import BrokenImage, decode, dhash
from isofusion.data.readers import Reader, open_reader
from isofusion.data.sample import BadSample, Found, Segments
from isofusion.data.slow import Slow
from isofusion.errors import InputError

VERSION = 1
RULES = 5  # by which a sample is good; an index made by earlier ones is made again
EXAMPLES = 10  # bad samples named per file, at most three per reason
LONG_PARAGRAPH = 80  # characters; shorter paragraphs repeat by chance


def hash64(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def text_hash(text: str) -> int:
    """64-bit hash of the text, blind to case and spacing."""
    return hash64(" ".join(text.lower().split()).encode())


@dataclass(frozen=True)
class FileIndex:
    """One file. n good samples, I images, Q long paragraphs."""

    path: Path
    format: str
    size: int  # bytes
    mtime_ns: int
    sha256: str
    keys: list[str]  # n
    ref: np.ndarray  # i64, concatenated refs
    ref_ptr: np.ndarray  # i64[n+1]
    image_ptr: np.ndarray  # i64[n+1]
    image_hash: np.ndarray  # u64[I], of the encoded bytes
    image_dhash: np.ndarray  # u64[I]
    image_size: np.ndarray  # i32[I, 2] height, width as stored
    text_hash: np.ndarray  # u64[n]
    text_bytes: np.ndarray  # i64[n] UTF-8
    paragraph: np.ndarray  # u64[Q]
    bad: dict[str, int]
    examples: list[list[str]]  # [key, reason, detail]
    unread: int  # bytes of the file that could not be read

    @property
    def n(self) -> int:
        return len(self.keys)

    def check_unchanged(self) -> None:
        """Raises InputError when the file is not the one that was indexed."""
        try:
            stat = self.path.stat()
        except OSError as error:
            raise InputError(f"{self.path} is gone since it was indexed: {error.strerror}") from error
        if (stat.st_size, stat.st_mtime_ns) != (self.size, self.mtime_ns):
            raise InputError(
                f"{self.path} changed since this run indexed it; a run must see one and the same data: "
                f"restore the file, or start a new run"
            )


_PLAIN = ("format", "size", "mtime_ns", "sha256", "keys", "bad", "examples", "unread")
_ARRAYS = (
    "ref", "ref_ptr", "image_ptr", "image_hash", "image_dhash", "image_size", "text_hash", "text_bytes", "paragraph",
)  # fmt: skip


def index_file(
    path: Path,
    format: str,
    shape: patches.Shape | None = None,
    budget: patches.Budget | None = None,
    progress: Callable[[int], None] = lambda samples: None,
) -> FileIndex:
    """Index of one file, from the cache when path, size and modification time are the same. Raises InputError.

    Where it is built, the patches of its images are stored on the way in this `shape`, if they fit the `budget`
    (default: patches.STORE_BYTES); where it is there, a store that is there too is taken from it. `progress` is told
    the number of samples before each is read.
    """
    budget = budget or patches.Budget(patches.STORE_BYTES)
    place, stat = _place(path, format)
    if (found := _load(place, path)) is not None:
        images = len(found.image_hash)
        if shape is not None and patches.is_whole(patches.place(found.sha256, format, shape), images, shape):
            budget.take(images * shape.bytes)
        return found
    reader = open_reader(path, format)
    prepare = getattr(reader, "plain", None)  # unpacks compressed lines under its own lock, before ours
    if prepare is not None:
        prepare()
    with cache.lock(place):
        if (found := _load(place, path)) is not None:
            return found
        with contextlib.ExitStack() as stack:
            writer = None
            if shape is not None:
                near = patches.place(place.stem, format, shape)  # the contents are not known yet
                writer = stack.enter_context(contextlib.closing(patches.Writer(near, budget)))
            index = _build(reader, path, format, stat.st_size, stat.st_mtime_ns, progress, shape, writer)
            if writer is not None and shape is not None and _place(path, format)[0] == place:  # it did not change
                writer.keep(patches.place(index.sha256, format, shape))
        plain, arrays = ({name: getattr(index, name) for name in names} for names in (_PLAIN, _ARRAYS))
        cache.write_arrays(place, plain, arrays)
    return index


def is_indexed(path: Path, format: str) -> bool:
    """Raises InputError when there is no such file."""
    return _place(path, format)[0].exists()


def _place(path: Path, format: str) -> tuple[Path, os.stat_result]:
    """Where the index of a file lies, or would. Raises InputError."""
    try:
        stat = path.stat()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    key = cache.digest("index", VERSION, RULES, str(path.resolve()), stat.st_size, stat.st_mtime_ns, format)
    return cache.root() / "index" / f"v{VERSION}" / f"{key}.index", stat


def _load(place: Path, path: Path) -> FileIndex | None:
    try:
        head, arrays = cache.read_arrays(place)
        values: dict[str, Any] = head | arrays
        return FileIndex(path=path, **values)
    except (OSError, ValueError, TypeError):
        return None  # absent or damaged: build it again


def _build(
    reader: Reader,
    path: Path,
    format: str,
    size: int,
    mtime_ns: int,
    progress: Callable[[int], None],
    shape: patches.Shape | None = None,
    writer: patches.Writer | None = None,
) -> FileIndex:
    bad: Counter[str] = Counter()
    named: Counter[str] = Counter()
    examples: list[list[str]] = []
    unread = 0

    def count(problem: BadSample) -> None:
        nonlocal unread
        bad[problem.reason] += problem.lost
        named[problem.reason] += 1
        unread += problem.unread
        if named[problem.reason] <= 3 and len(examples) < EXAMPLES:
            examples.append([problem.key, problem.reason, problem.detail])

    keys: list[str] = []
    ref: list[int] = []
    ref_ptr, image_ptr = [0], [0]
    image_hash: list[int] = []
    image_dhash: list[int] = []
    image_size: list[tuple[int, int]] = []
    texts: list[int] = []
    lengths: list[int] = []
    paragraphs: list[int] = []
    for item in reader.refs():
        progress(len(keys))
        if isinstance(item, BadSample):
            count(item)
            continue
        try:
            segments = reader.raw(item.key, item.ref)
            seen = _verify(item, segments, shape)
        except BadSample as problem:
            count(problem)
            continue
        keys.append(item.key)
        ref.extend(item.ref)
        ref_ptr.append(len(ref))
        for image in seen:
            image_hash.append(image.hash)
            image_dhash.append(image.dhash)
            image_size.append(image.size)
        if writer is not None:
            writer.add([image.patches for image in seen if image.patches is not None])
        image_ptr.append(len(image_hash))
        text = "\n".join(s for s in segments if isinstance(s, str))
        texts.append(text_hash(text))
        lengths.append(len(text.encode()))
        paragraphs.extend(text_hash(p) for p in text.split("\n") if len(p) >= LONG_PARAGRAPH)
    return FileIndex(
        path, format, size, mtime_ns, _sha256(path), keys,
        np.array(ref, np.int64), np.array(ref_ptr, np.int64), np.array(image_ptr, np.int64),
        np.array(image_hash, np.uint64), np.array(image_dhash, np.uint64),
        np.array(image_size, np.int32).reshape(-1, 2), np.array(texts, np.uint64), np.array(lengths, np.int64),
        np.array(paragraphs, np.uint64), dict(bad), examples, unread,
    )  # fmt: skip


@dataclass(frozen=True)
class _Image:
    hash: int  # of the encoded bytes
    dhash: int
    size: tuple[int, int]  # height, width
    patches: np.ndarray | None


def _verify(item: Found, segments: Segments, shape: patches.Shape | None) -> list[_Image]:
    """Decode every image of a sample, and cut it where a shape is given. Raises BadSample."""
    out = []
    for segment in segments:
        if isinstance(segment, str):
            try:
                segment.encode()
            except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair
                raise BadSample(item.key, "text is not UTF-8", str(error)[:120]) from error
        if isinstance(segment, bytes):
            try:
                pixels = decode(segment)
            except BrokenImage as error:
                raise BadSample(item.key, "broken image", str(error)) from error
            cut = shape.cut(pixels) if shape is not None else None
            out.append(_Image(hash64(segment), dhash(pixels), (pixels.shape[0], pixels.shape[1]), cut))
    return out


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class SourceIndex:
    """All files of a source, in sorted order. `first[f]` is the source-wide number of file f's first sample."""

    name: str
    format: str
    files: tuple[FileIndex, ...]

    @property
    def n(self) -> int:
        return sum(f.n for f in self.files)

    @property
    def n_images(self) -> int:
        return sum(len(f.image_hash) for f in self.files)

    @property
    def first(self) -> np.ndarray:
        return np.cumsum([0] + [f.n for f in self.files])

    @property
    def bad(self) -> dict[str, int]:
        total: Counter[str] = Counter()
        for f in self.files:
            total.update(f.bad)
        return dict(total)

    @property
    def examples(self) -> list[str]:
        """Readable lines `file: key: reason (detail)`."""
        lines = []
        for f in self.files:
            for key, reason, detail in f.examples:
                lines.append(f"{f.path.name}: {key}: {reason}" + (f" ({detail})" if detail else ""))
        return lines[:EXAMPLES]

    @property
    def bad_share(self) -> float:
        """Share of bad samples, or of bytes that could not be read: the larger, as lost bytes hide their samples."""
        bad, good = sum(self.bad.values()), self.n
        bytes_all = sum(f.size for f in self.files)
        unread = sum(min(f.unread, f.size) for f in self.files)
        return max(bad / max(1, bad + good), unread / max(1, bytes_all))

    @property
    def digest(self) -> str:
        """sha256 over the contents of the files and their format; paths and times do not enter."""
        return cache.digest("source", VERSION, self.format, [f.sha256 for f in self.files])

    def column(self, name: str) -> np.ndarray:
        """One per-sample, per-image or per-paragraph array over all files."""
        return np.concatenate([getattr(f, name) for f in self.files])

    def image_ptr(self) -> np.ndarray:
        """i64[n+1]: images of sample d are image_ptr[d] .. image_ptr[d+1]."""
        counts = np.concatenate([np.diff(f.image_ptr) for f in self.files])
        return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)

    def refuse_if_bad(self, max_bad_share: float) -> None:
        """Raises InputError listing counts and the first examples when too much of the source is bad, or all of it."""
        share, bad = self.bad_share, self.bad
        if self.n and share <= max_bad_share:
            return
        counts = ", ".join(f"{reason} {count}" for reason, count in sorted(bad.items(), key=lambda kv: -kv[1]))
        if not bad:
            names = ", ".join(f.path.name for f in self.files)
            raise InputError(f"source {self.name}: there is no sample in {names}")
        head = f"{share:.1%} is bad (limit {max_bad_share:.1%}; {self.n} good samples)"
        wrong = f", or correct format = {self.format!r} (docs/own-data.md lists the formats)"
        tail = ", or raise data.max_bad_share if the loss is acceptable" if self.n else wrong
        raise InputError(
            f"source {self.name}: {head if self.n else 'there is no good sample'}: {counts}\n  "
            + "\n  ".join(self.examples)
            + f"\nmend or remove these files{tail}"
        )


def find_files(folder: Path, globs: tuple[str, ...], name: str, key: str) -> list[Path]:
    """Sorted files of the globs, relative to `folder`. Raises InputError for a glob that matches nothing, and for a
    link to a file that is not there: without it the study would have less data than it seems to. And for a name that
    is no text, which no key of a sample can hold.
    """
    if not globs:
        raise InputError(f"source {name} has no files: set {key} = ['FOLDER/*.tar'] or the like")
    files: set[Path] = set()
    for pattern in globs:
        within = Path(glob.escape(str(folder))) / pattern  # the folder's own name is no pattern
        found = [Path(p) for p in glob.glob(str(within), recursive=True)] or [folder / pattern]
        hits = [path for path in found if path.is_file()]
        if lost := [path for path in found if path.is_symlink() and not path.exists()]:
            raise InputError(
                f"source {name}: {lost[0]} is a link to {os.readlink(lost[0])}, which is not there; put it back, or "
                f"take the link away"
            )
        if not hits:
            raise InputError(
                f"source {name}: no file matches {pattern!r} in {folder}; "
                f"check {key} and the data folder (--data FOLDER)"
            )
        files.update(hits)
    if odd := [path for path in files if printable(path) != str(path)]:
        raise InputError(f"source {name}: the file name {printable(min(odd))} is not UTF-8; rename it")
    return sorted(files)


def printable(path: Path) -> str:
    """The path with bytes that are not UTF-8 written as \\xNN."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def source_files(source: SourceConfig, folder: Path, split: str) -> list[Path]:
    """Sorted files of one split of a source. Raises InputError for a glob that matches nothing."""
    globs = source.train if split == "train" else source.val
    return find_files(folder, globs, source.name, f"{split} of source {source.name}")


def index_source(
    source: SourceConfig, folder: Path, split: str, max_bad_share: float, shape: patches.Shape | None = None
) -> SourceIndex:
    """Index of the files of one split of a source; `shape`: of the patches that are stored on the way.

    Raises InputError: no file, or too much of it bad.
    """
    budget = patches.Budget(patches.STORE_BYTES)
    paths = source_files(source, folder, split)
    slow = Slow(f"reading source {source.name} ({split})")
    files = []
    for number, path in enumerate(paths, 1):
        progress = partial(slow.at, "file {} of {}, {}, {:,} samples", number, len(paths), path.name)
        files.append(index_file(path, source.format, shape, budget, progress))
    index = SourceIndex(source.name, source.format, tuple(files))
    index.refuse_if_bad(max_bad_share)
    return index
