"""The data of a run as one function: `Stream(data, seed, split, rows_per_step).batch(step)`.

Step s reads rows s*R .. (s+1)*R-1; row t belongs to one source by quota (order.py), which packs its own row j
(finite.py, endless.py). A batch depends on nothing but the settings, the seed and the step: no worker, process or
history enters, so the whole state of the data is one integer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from isofusion.config import DataConfig, SourceConfig
from isofusion.data import cache, patches, tokenizer
from isofusion.data.batch import PackedBatch
from isofusion.data.duplicates import leaks, near_duplicates
from isofusion.data.endless import WorldSource, split_seed
from isofusion.data.finite import Documents, FiniteSource
from isofusion.data.index import SourceIndex, index_source
from isofusion.data.order import Quota
from isofusion.data.pack import Rows, take
from isofusion.data.share import share_rows
from isofusion.errors import InputError

MANY_EPOCHS = 4  # repetition beyond this costs data-scaling laws dearly (Muennighoff et al., arXiv 2305.16264)
VAL_SLOTS = 4096  # of a validation batch at least: small batches are mostly overhead, and no activations are kept


class Source(Protocol):
    """Rows 0, 1, 2, ... of one source; `n_samples` is None when endless."""

    name: str
    domain: str
    digest: str
    n_samples: int | None

    def row(self, j: int) -> tuple[Rows, int]: ...

    def ledger(self, rows: int) -> dict[str, Any]: ...


def open_world(data: DataConfig) -> Any:
    """The built-in world of these settings; imported only when asked for."""
    from isofusion.data.world import World

    return World(data.world, data.image_size, data.patch_size, max_len=data.row_len)


def data_folder(data: DataConfig) -> Path:
    """Raises InputError when there is none."""
    folder = Path(data.folder) if data.folder else Path()
    if data.folder and not folder.is_dir():
        raise InputError(f"there is no data folder {folder}; pass --data FOLDER or set data.folder")
    return folder


def finite_sources(data: DataConfig, split: str) -> list[SourceConfig]:
    """Those that have files for the split."""
    return [s for s in data.sources if s.format != "world" and (split == "train" or s.val)]


def indices(data: DataConfig, split: str) -> dict[str, SourceIndex]:
    """Index of each finite source that has files for the split, by name. Raises InputError."""
    folder, shape = data_folder(data), patches.Shape(data.image_size, data.patch_size)
    sources = finite_sources(data, split)
    return {s.name: index_source(s, folder, split, data.max_bad_share, shape) for s in sources}


def open_tokenizer(data: DataConfig, train: Callable[[], dict[str, SourceIndex]]) -> Any:
    """The tokenizer of these settings: the world's, a file, or one trained on the text of the sources in `train()`.

    Raises InputError.
    """
    finite = [s.name for s in data.sources if s.format != "world"]
    endless = [s.name for s in data.sources if s.format == "world"]
    wanted = tokenizer.parse(data.tokenizer)
    if wanted is None:
        if finite:
            raise InputError(
                f"tokenizer 'world' has 512 words and cannot spell the text of {', '.join(finite)}; "
                f"set data.tokenizer to train:4096 or to a tokenizer.json"
            )
        return open_world(data).tokenizer
    if endless:
        raise InputError(
            f"the world sources {', '.join(endless)} need data.tokenizer = 'world', not {data.tokenizer!r}"
        )
    if isinstance(wanted, Path):
        beside = Path(data.folder) / wanted if data.folder else wanted
        return tokenizer.load(wanted if wanted.exists() or not beside.exists() else beside)
    parts = train()
    corpus = cache.digest("corpus", [i.digest for i in parts.values()])
    return tokenizer.train(wanted, lambda: _texts(parts), corpus)


def _texts(parts: dict[str, SourceIndex]) -> Iterator[str]:
    for index in parts.values():
        documents = Documents(index)
        for d in range(len(documents)):
            yield from (s for s in documents.raw(d) if isinstance(s, str))


def _tokens(place: tuple[Source, int], opened: tuple[Rows, int] | None) -> tuple[int, int]:
    """Text and image tokens of a row: of the opened one, else from the plan of its source."""
    source, j = place
    if opened is None:
        assert isinstance(source, FiniteSource)
        return source.tokens(j)
    rows, r = opened
    at = slice(r * rows.batch.row_len, (r + 1) * rows.batch.row_len)
    real, image = rows.batch.doc_id[at] >= 0, rows.batch.modality[at] == 1
    return int((real & ~image).sum()), int(image.sum())


class Stream:
    """All rows of one split. `seed` orders training; validation uses data.val_seed, so that it is the same for all."""

    def __init__(self, data: DataConfig, seed: int, split: str, rows_per_step: int) -> None:
        """Opens (and the first time indexes, tokenises and caches) every source. Raises InputError."""
        if split not in ("train", "val"):
            raise ValueError(f"split is 'train' or 'val', not {split!r}")
        if rows_per_step < 1:
            raise InputError(f"rows_per_step must be at least 1, not {rows_per_step}")
        self.data, self.split, self.rows_per_step = data, split, rows_per_step
        self.seed = data.val_seed if split == "val" else seed
        worlds = [s.domain for s in data.sources if s.format == "world"]
        if len(set(worlds)) != len(worlds):
            raise InputError("two world sources of one domain would repeat each other; keep one per domain")
        self._own: dict[str, SourceIndex] | None = None
        self.tokenizer = open_tokenizer(data, lambda: self._indices("train"))
        parts = self._indices(split)
        world = open_world(data) if worlds else None
        self.sources: list[Source] = []
        weights = []
        for s in data.sources:
            if s.format == "world":
                self.sources.append(WorldSource(s.name, s.domain, data, world, split_seed(split, self.seed)))
            elif s.name in parts:
                self.sources.append(FiniteSource(s.name, s.domain, parts[s.name], data, self.tokenizer, self.seed))
            else:
                continue  # a source without validation files
            weights.append(s.weight)
        if not self.sources:
            raise InputError(f"no source has files for the {split} split; set {split} = [...] on at least one of them")
        self.quota = Quota(weights)
        packing = (data.row_len, data.image_size, data.patch_size, self.quota.per_cycle.tolist())
        self.fingerprint = cache.digest(
            "stream", split, [(s.name, s.domain, s.digest) for s in self.sources], str(self.tokenizer.digest), packing
        )

    def _indices(self, split: str) -> dict[str, SourceIndex]:
        """Those of the other split are not kept: they take memory, and are asked for once or twice."""
        if split != self.split:
            return indices(self.data, split)
        self._own = indices(self.data, split) if self._own is None else self._own
        return self._own

    def batch(self, step: int, part: tuple[int, int] = (0, 1)) -> PackedBatch:
        """Rows of one step, step >= 0; with `part` = (rank, ranks) the rows that this rank takes.

        The rows of a step do not depend on the number of ranks; `share_rows` deals them out by their tokens.
        """
        if step < 0:
            raise ValueError(f"step must be >= 0, not {step}")
        t = step * self.rows_per_step + np.arange(self.rows_per_step)
        source, j = self.quota.locate(t)
        places = [(self.sources[s], int(row)) for s, row in zip(source.tolist(), j, strict=True)]
        rank, ranks = part
        if ranks == 1:
            return take([source.row(row) for source, row in places])
        # a plan knows its rows' tokens without opening them; a block of the world holds rows of all ranks anyway
        opened = [None if isinstance(source, FiniteSource) else source.row(row) for source, row in places]
        tokens = [_tokens(place, rows) for place, rows in zip(places, opened, strict=True)]
        text, image = np.array(tokens, np.int64).T
        mine = share_rows(text, image, ranks)[rank].tolist()
        return replace(take([opened[r] or places[r][0].row(places[r][1]) for r in mine]), row_numbers=tuple(mine))

    # ---- validation -------------------------------------------------------------------------------------------------

    def _val_rows(self, domain: str) -> list[tuple[Source, int]]:
        """(source, row) of the fixed validation rows of a domain; a finite source gives each document once at most."""
        if self.split != "val":
            raise ValueError("validation batches come from Stream(..., split='val', ...)")
        mine = [s for s in self.sources if s.domain == domain]
        if not mine:
            there = ", ".join(sorted({s.domain for s in self.sources}))
            raise InputError(f"no validation source for domain {domain!r}; there are: {there}")
        weight = {s.name: s.weight for s in self.data.sources}
        which, row = Quota([weight[s.name] for s in mine]).locate(np.arange(self.data.val_rows))
        limit = [s.rows_of(0) if isinstance(s, FiniteSource) else None for s in mine]
        pairs = zip(which.tolist(), row.tolist(), strict=True)
        return [(mine[i], j) for i, j in pairs if (most := limit[i]) is None or j < most]

    def scarce(self) -> list[str]:
        """Sentences on the domains whose validation files hold fewer rows than data.val_rows."""
        have = {domain: len(self._val_rows(domain)) for domain in self.domains}
        return [
            f"domain {domain}: its validation files hold {rows} of the {self.data.val_rows} rows of data.val_rows"
            for domain, rows in have.items()
            if rows < self.data.val_rows
        ]

    def val_batches(self, domain: str) -> list[PackedBatch]:
        """The fixed validation rows of a domain: at most data.val_rows, fewer when the files hold fewer."""
        rows, size = self._val_rows(domain), max(self.rows_per_step, VAL_SLOTS // self.data.row_len)
        return [take([s.row(j) for s, j in rows[i : i + size]]) for i in range(0, len(rows), size)]

    def val_lookups(self, domain: str) -> np.ndarray:
        """i64[...]: entities whose names the validation rows of a world domain ask for, with repeats."""
        blocks = [s.row(j) for s, j in self._val_rows(domain)]
        return np.concatenate([np.zeros(0, np.int64), *(rows.lookups[r] for rows, r in blocks if rows.lookups)])

    def val_text_nats(self, domain: str) -> float:
        """-log p of the targets of the validation rows of a world domain, summed, to a reader of the text alone."""
        blocks = [s.row(j) for s, j in self._val_rows(domain)]
        return float(sum(rows.text_nats[r] for rows, r in blocks))

    @property
    def domains(self) -> tuple[str, ...]:
        """Domains present, in the order of the sources."""
        return tuple(dict.fromkeys(s.domain for s in self.sources))

    # ---- accounting -------------------------------------------------------------------------------------------------

    def exposures(self, steps: int) -> int:
        """Lookups that a learner has seen after `steps` steps, over all world domains.

        Exact once the rows were generated (after training); before, a row to come counts as the mean row so far.
        """
        rows = self.quota.before(steps * self.rows_per_step)
        worlds = [(s, int(r)) for s, r in zip(self.sources, rows, strict=True) if isinstance(s, WorldSource) and r]
        return round(sum(s.totals(r)[0].get("exposures", 0) for s, r in worlds))

    def report(self, steps: int) -> dict[str, Any]:
        """The repetition ledger of the first `steps` steps.

        Per source: rows, documents (whole or their last piece), text_tokens and image_tokens (slots, no padding),
        unique_tokens, unique_images, epochs (None: endless), estimated, bad counts by reason with examples, cut
        (documents longer than a row), truncated (always 0: nothing is thrown away), realised shares, near_duplicates
        (of its validation files with any training file; None without such files), leaks (sentences, where these are
        many), warnings.
        """
        total = steps * self.rows_per_step
        rows = self.quota.before(total)
        twice = self.near_duplicates()
        out: list[dict[str, Any]] = []
        for s, count in zip(self.sources, rows.tolist(), strict=True):
            entry = {"name": s.name, "domain": s.domain, "rows": count, **s.ledger(count)}
            found = twice.get(s.name)
            out.append({**entry, "near_duplicates": found, "leaks": leaks(found) if found else [], "warnings": []})
        tokens = [e["text_tokens"] + e["image_tokens"] for e in out]
        documents = [e["documents"] for e in out]
        for i, entry in enumerate(out):
            entry["share_rows"] = entry["rows"] / max(1, total)
            entry["share_documents"] = documents[i] / max(1, sum(documents))
            entry["share_tokens"] = tokens[i] / max(1, sum(tokens))
            entry["padding"] = entry["rows"] * self.data.row_len - tokens[i]
            entry["warnings"] += self._warnings(entry)
        return {
            "steps": steps,
            "rows": total,
            "slots": total * self.data.row_len,
            "tokens": sum(tokens),
            "text_tokens": sum(e["text_tokens"] for e in out),
            "image_tokens": sum(e["image_tokens"] for e in out),
            "estimated": any(e["estimated"] for e in out),
            "sources": out,
            "warnings": [w for e in out for w in e["warnings"]],
        }

    @staticmethod
    def _warnings(entry: dict[str, Any]) -> list[str]:
        out = []
        if entry["epochs"] is not None and entry["epochs"] > MANY_EPOCHS:
            out.append(
                f"source {entry['name']} is repeated {entry['epochs']:.1f} times (more than {MANY_EPOCHS} epochs)"
            )
        if entry["bad"]:
            out.append(f"source {entry['name']}: {sum(entry['bad'].values())} bad samples left out")
        twice = entry["near_duplicates"] or {}
        for one, many, count in (
            ("same_text", "documents", "whole texts"),
            ("same_paragraph", "paragraphs", "long paragraphs"),
            ("near_image", "images_checked", "images, or their near-duplicates,"),
        ):
            if twice.get(one):
                out.append(
                    f"source {entry['name']}: {twice[one]} of {twice[many]} {count} of validation are in training too"
                )
        return out

    def near_duplicates(self) -> dict[str, dict[str, int]]:
        """Per finite source with validation files: how much of its validation is in any training file (cached)."""
        train, val = self._indices("train"), self._indices("val")
        return {name: near_duplicates(list(train.values()), index) for name, index in val.items()}
