"""Readers of standard files. A reader lists where its samples lie (`refs`) and reads one of them (`raw`).

Schemas: webdataset tar as img2dataset and DataComp write it; interleaved documents in OBELICS layout (parquet) and as a
tar with KEY.json and KEY.N.jpg; text as jsonl, also gzip and zstd, in DCLM's and common older field names.
Whatever is wrong with a sample is a `BadSample` with a reason of a few words, for the index to count.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from isofusion.data import cache
from isofusion.data.compressed import Damaged, gunzip, unzstd
from isofusion.data.members import Pictures, exact, read_bytes
from isofusion.data.sample import BadSample, Found, Ref, Segments
from isofusion.errors import InputError

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif")
PARAGRAPH = "\n\n"  # between two adjacent texts of an interleaved document


class Reader(Protocol):
    def refs(self) -> Iterator[Found | BadSample]:
        """All samples in file order."""

    def raw(self, key: str, ref: Ref) -> Segments:
        """One sample. Raises BadSample."""


# ---- tar ------------------------------------------------------------------------------------------------------------


PACKED = (".tar.gz", ".tgz", ".tar.zst", ".tar.zstd", ".tar.bz2", ".tar.xz")
MAGIC = (b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"BZh", b"\xfd7zXZ")  # of what compresses them
PADDING = 1 << 20  # zeros at the end of a tar that may be padding: tools fill up to 10 KiB, some more


def _scan_tar(path: Path) -> Iterator[tuple[str, str, int, int] | BadSample]:
    """(key, suffix, offset, size) of every regular member, `key.suffix` its name as written.

    A tar that stops early ends with a BadSample.
    """
    size, end = path.stat().st_size, 0
    try:
        # names in another encoding stay apart and printable
        with tarfile.open(path, "r:", encoding="utf-8", errors="backslashreplace") as tar:
            while (member := tar.next()) is not None:
                if member.isdir():
                    end = member.offset_data
                    continue
                end = member.offset_data + -(-member.size // 512) * 512
                if member.offset_data + member.size > size:
                    detail = f"member {member.name} needs {member.size} bytes, {size - member.offset_data} are there"
                    yield BadSample(member.name, "truncated tar", detail, size - member.offset_data)
                    return
                folder, _, base = member.name.rpartition("/")
                stem, _, suffix = base.partition(".")
                if not member.isreg():
                    yield BadSample(member.name, "tar member is not a regular file")
                elif not stem or not suffix:
                    yield BadSample(member.name, "tar member without KEY.suffix")
                else:
                    key = f"{folder}/{stem}" if folder else stem
                    yield key, suffix, member.offset_data, member.size
    except tarfile.TarError as error:
        if end == 0 and read_bytes(path, 0, min(size, 6)).startswith(MAGIC):
            how = "samples are read out of order: unpack it first, for example with gunzip or unzstd"
            yield BadSample(path.name, "compressed tar", how, size)
        elif end == 0:
            yield BadSample(path.name, "not a tar file", str(error), size)
        else:
            yield BadSample(path.name, "truncated tar", str(error), max(0, size - end))
        return
    with path.open("rb") as file:  # tarfile takes a damaged header for the end of the archive; look for the real one
        file.seek(end)
        if file.read(512) != bytes(512):
            yield BadSample(path.name, "truncated tar", f"no end of archive after byte {end}", max(0, size - end))
            return
        while chunk := file.read(1 << 20):  # two archives in one file, or a hole in the middle of one
            if chunk.strip(b"\0"):
                yield BadSample(path.name, "data behind the end of the tar", f"after byte {end}", size - end)
                return
    if size - end > PADDING:  # a download that reserved its space and stopped
        yield BadSample(path.name, "truncated tar", f"nothing but zeros after byte {end}", size - end)


def _json(data: bytes, key: str) -> dict[str, Any]:
    try:
        value = json.loads(data.rstrip(b"\0 \r\n\t"))
    except (ValueError, RecursionError) as error:  # hostile nesting is broken too
        raise BadSample(key, "broken json", str(error)[:120]) from error
    if not isinstance(value, dict):
        raise BadSample(key, "wrong type", f"json holds {type(value).__name__}, not an object")
    return value


def _text(data: bytes, key: str) -> str:
    try:
        return data.rstrip(b"\0").decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadSample(key, "text is not UTF-8", str(error)[:120]) from error


class WebDataset:
    """KEY.jpg|png|webp + KEY.txt + KEY.json in a tar; KEY ends at the first dot. The caption is the txt, else json."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def refs(self) -> Iterator[Found | BadSample]:
        groups: dict[str, dict[str, tuple[int, int]]] = {}
        bad: list[BadSample] = []
        for item in _scan_tar(self.path):
            if isinstance(item, BadSample):
                bad.append(item)
                continue
            key, suffix, offset, size = item
            suffix = suffix.lower()
            slot = "image" if suffix in IMAGE_SUFFIXES else suffix
            parts = groups.setdefault(key, {})
            if slot in parts:
                bad.append(BadSample(key, "member twice", f"a second .{suffix}"))
            else:
                parts[slot] = (offset, size)
        for key, parts in groups.items():
            none = (-1, 0)
            if "image" not in parts:
                has = ", ".join("." + s for s in [*parts][:4]) + (", ..." if len(parts) > 4 else "")
                dots = "; a key ends at the first dot of a name" if any("." in s for s in parts) else ""
                yield BadSample(key, "missing image", f"has {has}{dots}")
            elif "txt" not in parts and "json" not in parts:
                yield BadSample(key, "missing caption", "neither .txt nor .json")
            else:
                yield Found(key, parts["image"] + parts.get("txt", none) + parts.get("json", none))
        yield from bad

    def raw(self, key: str, ref: Ref) -> Segments:
        if ref[2] >= 0:
            caption: Any = _text(read_bytes(self.path, ref[2], ref[3]), key)
        else:
            caption = _json(read_bytes(self.path, ref[4], ref[5]), key).get("caption")
            if caption is None:
                raise BadSample(key, "missing caption", "no .txt, and no caption in .json")
            if not isinstance(caption, str):
                raise BadSample(key, "wrong type", f"caption is {type(caption).__name__}, not text")
        if not caption.strip():
            raise BadSample(key, "empty caption")
        return read_bytes(self.path, ref[0], ref[1]), caption.strip()


def _interleave(key: str, images: Any, texts: Any) -> Iterator[tuple[str, Any]]:
    """Check an OBELICS pair of lists: equal length, exactly one non-null per index, texts are text."""
    if not isinstance(images, list) or not isinstance(texts, list):
        raise BadSample(key, "wrong type", f"images is {type(images).__name__}, texts is {type(texts).__name__}")
    if len(images) != len(texts):
        raise BadSample(key, "images and texts differ in length", f"{len(images)} and {len(texts)}")
    for i, (image, text) in enumerate(zip(images, texts, strict=True)):
        if (image is None) == (text is None):
            raise BadSample(key, "not exactly one of image and text", f"at index {i}")
        if text is not None and not isinstance(text, str):
            raise BadSample(key, "wrong type", f"texts[{i}] is {type(text).__name__}")
        yield ("text", text) if text is not None else ("image", image)


def _join(key: str, parts: list[str | bytes]) -> Segments:
    """Adjacent texts become one, empty ones vanish; a document without any text has nothing to predict."""
    out: list[str | bytes] = []
    for part in parts:
        if isinstance(part, str):
            if not (part := part.strip()):
                continue
            if out and isinstance(out[-1], str):
                out[-1] += PARAGRAPH + part
                continue
        out.append(part)
    if not any(isinstance(part, str) for part in out):
        raise BadSample(key, "document without text")
    return tuple(out)


class InterleavedTar:
    """KEY.json {"texts": [...], "images": [member name | null, ...]} + KEY.N.jpg."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def refs(self) -> Iterator[Found | BadSample]:
        pictures = Pictures(self.path)
        documents: dict[str, tuple[int, int]] = {}
        bad: list[BadSample] = []
        for item in _scan_tar(self.path):
            if isinstance(item, BadSample):
                bad.append(item)
                continue
            key, suffix, offset, size = item
            if suffix.lower() != "json":
                pictures.add(f"{key}.{suffix}", offset, size)
            elif key in documents:
                bad.append(BadSample(key, "member twice", f"a second .{suffix}"))
            else:
                documents[key] = (offset, size)
        pictures.documents = {exact(key) for key in documents}
        for key, place in documents.items():
            try:
                record = _json(read_bytes(self.path, *place), key)
                ref: Ref = place
                for kind, value in _interleave(key, record.get("images"), record.get("texts")):
                    if kind == "image":
                        ref += pictures.find(key, value)
                yield Found(key, ref)
            except BadSample as error:
                yield error
        yield from bad

    def raw(self, key: str, ref: Ref) -> Segments:
        record = _json(read_bytes(self.path, ref[0], ref[1]), key)
        parts: list[str | bytes] = []
        at = 2
        for kind, value in _interleave(key, record.get("images"), record.get("texts")):
            if kind == "image":
                parts.append(read_bytes(self.path, ref[at], ref[at + 1]))
                at += 2
            else:
                parts.append(value)
        return _join(key, parts)


# ---- parquet --------------------------------------------------------------------------------------------------------


class InterleavedParquet:
    """OBELICS layout: `images` list of struct<bytes, path> | binary | string | null, `texts` list of string | null."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._groups = cache.Recent(2)

    def refs(self) -> Iterator[Found | BadSample]:
        import pyarrow.parquet as pq

        size = self.path.stat().st_size
        try:
            with pq.ParquetFile(self.path) as file:
                names = set(file.schema_arrow.names)
                rows = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
        except Exception as error:  # Arrow raises several types on damaged files
            yield BadSample(self.path.name, "not a parquet file", str(error)[:160], size)
            return
        if missing := {"images", "texts"} - names:
            detail = f"columns are {', '.join(sorted(names))}"
            reason = f"no column {' and '.join(sorted(missing))}"
            yield BadSample(self.path.name, reason, detail, size, lost=max(1, sum(rows)))
            return
        for group, count in enumerate(rows):
            try:
                self._group(group)
            except Exception as error:
                yield BadSample(f"row group {group}", "broken row group", str(error)[:160], lost=count)
                continue
            for row in range(count):
                yield Found(f"{group}.{row}", (group, row))

    def _group(self, group: int) -> Any:
        import pyarrow.parquet as pq

        def load() -> Any:
            with pq.ParquetFile(self.path) as file:
                return file.read_row_group(group, columns=["images", "texts"])

        return self._groups.get(group, load)

    def raw(self, key: str, ref: Ref) -> Segments:
        try:
            row = self._group(ref[0]).slice(ref[1], 1).to_pylist()[0]
        except UnicodeDecodeError as error:  # Arrow does not check when it reads
            raise BadSample(key, "text is not UTF-8", str(error)[:120]) from error
        parts: list[str | bytes] = []
        for kind, value in _interleave(key, row["images"], row["texts"]):
            if kind == "text":
                parts.append(value)
                continue
            data = value.get("bytes") if isinstance(value, dict) else value
            if isinstance(value, str) or (data is None and isinstance(value, dict) and value.get("path")):
                raise BadSample(key, "image is only a link", "download the images into the file first")
            if not isinstance(data, bytes):
                raise BadSample(key, "wrong type", f"an image is {type(data).__name__}, not bytes")
            parts.append(data)
        return _join(key, parts)


# ---- text -----------------------------------------------------------------------------------------------------------


class TextLines:
    """One JSON object a line; the text is `text`, else `content`. Compressed files are unpacked once into the cache."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._plain: Path | None = None if path.suffix.lower() in (".gz", ".zst", ".zstd") else path
        self._trouble: BadSample | None = None

    def plain(self) -> Path:
        """The uncompressed lines: the file itself, or its copy in the cache."""
        if self._plain is None:
            stat = self.path.stat()
            key = cache.digest(str(self.path.resolve()), stat.st_size, stat.st_mtime_ns)
            place = cache.root() / "lines" / "v2" / f"{key}.jsonl"
            note = place.with_suffix(".bad")  # what was wrong with the compressed file, kept beside the copy
            with cache.lock(place):
                if not place.exists():
                    cache.write(place, self._unpack)
                    if self._trouble:
                        t = self._trouble
                        cache.write_bytes(note, json.dumps([t.key, t.reason, t.detail, t.unread]).encode())
                elif note.exists():
                    self._trouble = BadSample(*json.loads(note.read_bytes()))
            self._plain = place
        return self._plain

    def _unpack(self, target: Path) -> None:
        size = self.path.stat().st_size
        wanted = "gzip" if self.path.suffix.lower() == ".gz" else "zstd"
        with self.path.open("rb") as source, target.open("wb") as out:
            try:
                for chunk in gunzip(source) if wanted == "gzip" else unzstd(source):
                    out.write(chunk)
            except EOFError:
                self._trouble = BadSample(self.path.name, f"truncated {wanted} file", "ends inside a frame")
            except Damaged as error:
                unread = max(1, size - error.at)
                self._trouble = BadSample(self.path.name, f"broken {wanted} file", str(error)[:120], unread)

    def refs(self) -> Iterator[Found | BadSample]:
        with self.plain().open("rb") as file:
            offset = 0
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield Found(str(number), (offset, len(line)))
                offset += len(line)
        if self._trouble:
            yield self._trouble

    def raw(self, key: str, ref: Ref) -> Segments:
        record = _json(_text(read_bytes(self.plain(), *ref), key).encode(), key)
        text = record.get("text")
        if text is None:
            text = record.get("content")
        if text is None:
            raise BadSample(key, "no text field", f"has {', '.join(sorted(record))[:100]}; wanted text or content")
        if not isinstance(text, str):
            raise BadSample(key, "wrong type", f"text is {type(text).__name__}")
        if not text.strip():
            raise BadSample(key, "empty text")
        return (text.strip(),)


def open_reader(path: Path, format: str) -> Reader:
    """The reader of a file; `format` as in SourceConfig, where the suffix tells parquet from tar and gz from zst."""
    if format == "webdataset":
        return WebDataset(path)
    if format == "text":
        return TextLines(path)
    if format == "interleaved":
        return InterleavedParquet(path) if path.suffix.lower() == ".parquet" else InterleavedTar(path)
    raise InputError(f"no reader for format {format!r}; there are: webdataset, interleaved, text")


def detect_format(path: Path) -> str | None:
    """Format of a file by its name and, for a tar, its first members; None when it is none of ours."""
    name = path.name.lower()
    if name.endswith((".jsonl", ".jsonl.gz", ".jsonl.zst", ".jsonl.zstd", ".ndjson")):
        return "text"
    if name.endswith(".parquet"):
        return "interleaved"
    if name.endswith(PACKED):
        return "webdataset"  # which its reader will say is to be unpacked
    if not name.endswith(".tar"):
        return None
    for count, item in enumerate(_scan_tar(path)):
        if isinstance(item, BadSample) or count >= 64:
            break
        suffix = item[1].lower()
        first, _, last = suffix.partition(".")
        if first.isdigit() and last in IMAGE_SUFFIXES:
            return "interleaved"
        if suffix in IMAGE_SUFFIXES or suffix == "txt":
            return "webdataset"
        if suffix == "json" and b'"texts"' in read_bytes(path, item[2], item[3]):
            return "interleaved"
    return "webdataset"
