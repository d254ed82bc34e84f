"""What a source holds, as plain data for `isofusion data inspect`: counts, what is bad, sizes, samples, packed rows."""

from __future__ import annotations

import glob
import os
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from isofusion.config import DataConfig, SourceConfig, WorldConfig
from isofusion.data import ahead
from isofusion.data.batch import PackedBatch
from isofusion.data.finite import Documents, FiniteSource
from isofusion.data.index import printable
from isofusion.data.readers import detect_format
from isofusion.data.sample import DOMAINS, Segments
from isofusion.data.slow import log
from isofusion.data.stream import Stream
from isofusion.errors import InputError, explain
from isofusion.processors import cores

DOMAIN_OF = {"webdataset": "caption", "interleaved": "interleaved", "text": "text"}
EXCERPT = 200  # characters of a sample
NAMED = 8  # files of no known format
SUFFIX = re.compile(r"\.(tar|tgz|parquet|jsonl|ndjson)(\.(gz|zst|zstd|bz2|xz))?$", re.IGNORECASE)
SHARD = re.compile(r"[-_. ]?\d+([-_.]of[-_.]\d+(-[0-9a-f]{16})?)?$")  # 000, -00000-of-00004, the same with a digest


def inspect(
    source: str,
    *,
    format: str | None = None,
    domain: str | None = None,
    tokenizer: str | None = None,
    row_len: int = 512,
    image_size: int = 48,
    patch_size: int = 8,
    rows: int = 4,
    samples: int = 3,
) -> list[dict[str, Any]]:
    """One entry per domain of the world, or per set of like-named files of a file, folder or glob. Raises InputError.

    Keys: name, format, domain, files, documents, bad, bad_share, bad_examples, images, text, tokenizer, packing,
    samples, rows. `rows` holds the segments [kind, document, slots] of the first packed rows. A set that cannot be read
    beside others that can has name, format, domain, files and `error`.
    """
    settings: dict[str, Any] = {"row_len": row_len, "image_size": image_size, "patch_size": patch_size, "val_rows": 1}
    try:
        if source == "world":
            return _world(settings, domain, tokenizer, rows, samples)
        entries = []
        for (name, fmt), files in find_groups(source, format).items():
            about = domain or DOMAIN_OF.get(fmt, DOMAINS[0])
            try:
                entries.append(_files(name, fmt, files, about, settings, tokenizer or "train:4096", rows, samples))
            except InputError as error:
                head = {"name": name, "format": fmt, "domain": about, "files": [printable(f) for f in files]}
                entries.append({**head, "error": str(error)})
        if all("error" in entry for entry in entries):
            raise InputError("\n".join(entry["error"] for entry in entries))
        return entries
    except ValidationError as error:
        raise InputError(explain(error)) from error


def find_groups(source: str, format: str | None = None) -> dict[tuple[str, str], list[Path]]:
    """(name, format) -> sorted files. Shards `a-000.tar`, `a-001.tar` of a folder are one group. Raises InputError."""
    path = Path(source)
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.is_file()) or sorted(p for p in path.rglob("*") if p.is_file())
        if not any(detect_format(p) for p in files):
            files = sorted(p for p in path.rglob("*") if p.is_file())
    elif path.is_file():
        files = [path]
    else:
        files = sorted(Path(p) for p in glob.glob(source, recursive=True) if Path(p).is_file())
    if not files:
        raise InputError(f"nothing at {source!r}: give 'world', a folder, a file, or a glob in quotes")
    found = [(file, kind) for file in files if (kind := format or detect_format(file)) is not None]
    if not found:
        raise InputError(
            f"no file of {source!r} has a known format (.tar, .parquet, .jsonl, .jsonl.gz, .jsonl.zst): name it with "
            f"--format webdataset, interleaved or text; folders of pictures, JSON of LLaVA or COCO and the like are "
            f"packed first (docs/own-data.md, Other layouts)"
        )
    _tell_passed_over(path, files, {file for file, _ in found})
    top = os.path.commonpath([file.parent for file, _ in found])
    groups: dict[tuple[str, str, Path], list[Path]] = {}
    for file, kind in found:
        groups.setdefault((_series(file.name), kind, file.parent), []).append(file)
    named = {}
    for (series, kind, folder), some in groups.items():
        name = folder.relative_to(top) / (series if len(some) > 1 else some[0].name)
        named[printable(name), kind] = some
    return named


def _tell_passed_over(path: Path, files: list[Path], known: set[Path]) -> None:
    """Files of no known format, and folders beside files that were found."""
    rest = [file for file in files if file not in known]
    if path.is_dir():
        entered = {parent for file in files for parent in file.parents}
        rest += sorted(p for p in path.iterdir() if p.is_dir() and p not in entered)
    names = [printable(Path(p.name)) + "/" * p.is_dir() for p in rest]
    if len(names) > NAMED:
        names = [*names[:NAMED], f"and {len(names) - NAMED:,} more"]
    if names:
        log.info("not looked at: %s", ", ".join(names))


def _series(name: str) -> str:
    """`train-00000-of-00004.parquet` -> `train.parquet`; `00012.tar` -> `*.tar`: what the shards of a set share."""
    suffix = match[0] if (match := SUFFIX.search(name)) else Path(name).suffix
    return (SHARD.sub("", name.removesuffix(suffix)) or "*") + suffix


def _files(
    name: str, format: str, files: list[Path], domain: str, settings: dict, tokenizer: str, rows: int, samples: int
) -> dict[str, Any]:
    if odd := [file for file in files if printable(file) != str(file)]:
        raise InputError(f"{printable(odd[0])}: the file name is not UTF-8; rename it")
    globs = [glob.escape(str(f.resolve())) for f in files]
    label = re.sub(r"[:\s]", "_", name)  # as the keys of samples can hold it
    config: dict[str, Any] = {"name": label, "domain": domain, "format": format, "weight": 1.0, "train": globs}
    data = DataConfig(sources=(SourceConfig(**config),), tokenizer=tokenizer, max_bad_share=1.0, **settings)
    ahead.index(data, ("train",), cores())
    stream = Stream(data, 0, "train", 1)
    source = stream.sources[0]
    assert isinstance(source, FiniteSource)
    index = source.index
    sizes = index.column("image_size")
    entry: dict[str, Any] = {
        "name": name,
        "format": format,
        "domain": domain,
        "files": [str(f) for f in files],
        "bytes": sum(f.size for f in index.files),
        "documents": index.n,
        "bad": index.bad,
        "bad_share": index.bad_share,
        "bad_examples": index.examples,
        "images": None,
        "text": {
            "bytes": int(index.column("text_bytes").sum()),
            "tokens": int(np.maximum(source.text.seg_len, 0).sum()),
            "slots_per_document": _spread(np.add.reduceat(source.length, source.piece_ptr[:-1])),
        },
        "tokenizer": {"name": tokenizer, "vocab_size": stream.tokenizer.vocab_size},
        "packing": _packing(source.rows_of(0), int(source.length.sum()), data, source.n_cut),
        "samples": [_excerpt(source.documents, d, sizes) for d in range(min(samples, index.n))],
        "rows": [segments(stream.batch(i)) for i in range(rows)],
    }
    if len(sizes):
        unique = len(np.unique(index.column("image_hash")))
        spread = {"height": _spread(sizes[:, 0]), "width": _spread(sizes[:, 1])}
        entry["images"] = {"count": len(sizes), "unique": unique, **spread}
    return entry


def _packing(rows: int, slots: int, data: DataConfig, cut: int) -> dict[str, Any]:
    return {
        "row_len": data.row_len,
        "image_size": data.image_size,
        "patch_size": data.patch_size,
        "patches_per_image": data.patches_per_image,
        "rows_per_epoch": rows,
        "filled": slots / (rows * data.row_len),
        "cut_documents": cut,
    }


def _spread(values: np.ndarray) -> dict[str, int]:
    return {"min": int(values.min()), "median": int(np.median(values)), "max": int(values.max())}


def _excerpt(documents: Documents, d: int, sizes: np.ndarray) -> dict[str, str]:
    raw: Segments = documents.raw(d)
    at = int(documents.index.image_ptr()[d])
    words: list[str] = []
    for segment in raw:
        if isinstance(segment, bytes):
            words.append(f"[image {sizes[at][1]}x{sizes[at][0]}]")
            at += 1
        else:
            words.append(" ".join(segment.split()))
    return {"key": documents.key(d), "text": _short(" ".join(words))}


def _short(text: str) -> str:
    return text if len(text) <= EXCERPT else text[: EXCERPT - 1] + "…"


def _world(settings: dict, domain: str | None, tokenizer: str | None, rows: int, samples: int) -> list[dict[str, Any]]:
    from isofusion.data.sample import Text

    domains = [d for d in DOMAINS if domain in (None, d)]
    if not domains:
        raise InputError(f"the world has no domain {domain!r}; there are: {', '.join(DOMAINS)}")
    out = []
    for name in domains:
        config: dict[str, Any] = {"name": name, "domain": name, "format": "world", "weight": 1.0}
        data = DataConfig(
            sources=(SourceConfig(**config),), tokenizer=tokenizer or "world", world=WorldConfig(), **settings
        )
        stream = Stream(data, 0, "train", 64)
        source: Any = stream.sources[0]
        batch = stream.batch(0)
        ledger = source.ledger(64)
        aimed = batch.targets >= 0
        shown = []
        for i in range(samples):
            sample = source.world.sample(source.seed, name, 0, i)
            words = [
                stream.tokenizer.decode(s.ids) if isinstance(s, Text) else f"[image {s.pixels.shape[1]}]"
                for s in sample.segments
            ]
            shown.append({"key": sample.key, "text": _short(" ".join(words))})
        slots = ledger["text_tokens"] + ledger["image_tokens"]
        out.append(
            {
                "name": f"world/{name}",
                "format": "world",
                "domain": name,
                "files": [],
                "documents": None,
                "bad": {},
                "bad_share": 0.0,
                "bad_examples": [],
                "images": {"count": None, "per_row": ledger["unique_images"] / 64},
                "text": {
                    "documents_per_row": ledger["documents"] / 64,
                    "image_share": ledger["image_tokens"] / slots,
                    "oracle_nats_per_target": float(np.mean(batch.oracle[aimed])),
                    "exposures_per_row": ledger["exposures"] / 64,
                },
                "tokenizer": {"name": "world", "vocab_size": stream.tokenizer.vocab_size},
                "packing": {**_packing(64, slots, data, 0), "rows_per_epoch": None},
                "samples": shown,
                "rows": [segments(batch, r) for r in range(rows)],
            }
        )
    return out


def segments(batch: PackedBatch, row: int = 0) -> list[list[Any]]:
    """A row as [kind, document, slots] in order; kind is text, image or pad; document counts from 0 in the batch."""
    at = slice(row * batch.row_len, (row + 1) * batch.row_len)
    doc, image = batch.doc_id[at], batch.image_id[at]
    change = np.flatnonzero((np.diff(doc) != 0) | (np.diff(image) != 0)) + 1
    edges = [0, *change.tolist(), batch.row_len]
    kind = np.where(doc < 0, 0, np.where(image < 0, 1, 2))
    names = ("pad", "text", "image")
    return [[names[kind[a]], int(doc[a]), b - a] for a, b in pairwise(edges)]
