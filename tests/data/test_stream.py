"""The stream: a pure function of (settings, seed, step); epochs, validation, the ledger, the cache of world blocks."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from isofusion.config import DataConfig, SourceConfig
from isofusion.data import endless, patches, stream
from isofusion.data.duplicates import leaks
from isofusion.data.sample import Image, Sample, Text
from isofusion.data.stream import Stream
from isofusion.errors import InputError
from isofusion.evaluate.losses import document_of

WORDS = [f"word{i}" for i in range(200)]


def prose(seed, n):
    rng = np.random.default_rng(seed)
    return " ".join(rng.choice(WORDS, n)) + f" document {seed}"


def write_corpus(files, folder):
    for split, start, count in (("train", 0, 24), ("val", 1000, 7)):
        pairs = []
        for i in range(start, start + count):
            pairs += [(f"{i:05}.png", files.image(i)), (f"{i:05}.txt", prose(i, 6).encode())]
        files.tar(folder / f"c-{split}.tar", pairs)
        sizes = np.random.default_rng(start).integers(5, 90, count)
        files.jsonl(
            folder / f"t-{split}.jsonl", [{"text": prose(start + 5000 + i, int(s))} for i, s in enumerate(sizes)]
        )
    return folder


def config(folder, **kw):
    def source(name, domain, fmt, weight, stem):
        return SourceConfig(
            name=name, domain=domain, format=fmt, weight=weight, train=(f"{stem}-train.*",), val=(f"{stem}-val.*",)
        )

    settings = {
        "folder": str(folder), "row_len": 64, "image_size": 16, "patch_size": 8,
        "tokenizer": "train:400", "val_rows": 6,
        "sources": (source("cap", "caption", "webdataset", 0.6, "c"), source("txt", "text", "text", 0.4, "t")),
    }  # fmt: skip
    return DataConfig(**{**settings, **kw})


def fingerprint(batch) -> str:
    h = hashlib.sha256(repr(batch.keys).encode())
    for name in ("token_ids", "targets", "doc_id", "image_id", "position", "patches", "patch_slot", "domain", "oracle"):
        h.update(np.ascontiguousarray(getattr(batch, name)).tobytes())
    return h.hexdigest()


@pytest.fixture
def corpus(files, tmp_path):
    return write_corpus(files, tmp_path / "data")


CHILD = """
import sys
sys.path[:0] = [{tests!r}]
from isofusion.config import DataConfig
from isofusion.data.stream import Stream
from test_stream import fingerprint
s = Stream(DataConfig.model_validate_json(sys.argv[1]), 5, "train", 4)
for step in map(int, sys.argv[2].split(",")):
    print(step, fingerprint(s.batch(step)))
"""


def test_order_does_not_depend_on_processes_or_history(corpus):
    """One process forwards, and two processes that take turns, one of them backwards, give the same bytes."""
    data = config(corpus)
    steps = list(range(24))
    s = Stream(data, 5, "train", 4)
    assert s.report(24)["sources"][0]["epochs"] > 2  # epoch borders are inside
    alone = {step: fingerprint(s.batch(step)) for step in steps}
    assert len(set(alone.values())) == len(steps)
    code = CHILD.format(tests=str(Path(__file__).parent))
    env = {**os.environ, "PYTHONPATH": str(Path(stream.__file__).parents[2]), "PYTHONDONTWRITEBYTECODE": "1"}
    shares = [steps[1::2][::-1], steps[0::2]]
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", code, data.model_dump_json(), ",".join(map(str, share))],
            env=env, stdout=subprocess.PIPE, text=True,
        )
        for share in shares
    ]  # fmt: skip
    shared = {}
    for worker in workers:
        out, _ = worker.communicate(timeout=60)
        assert worker.returncode == 0
        shared.update((int(a), b) for a, b in (line.split() for line in out.splitlines()))
    assert shared == alone
    backwards = Stream(data, 5, "train", 4)
    assert {step: fingerprint(backwards.batch(step)) for step in reversed(steps)} == alone


def test_rows_do_not_depend_on_how_many_go_into_a_step(corpus):
    small, large = (Stream(config(corpus), 5, "train", r) for r in (2, 6))
    ids = np.concatenate([small.batch(s).token_ids for s in range(9)])
    assert np.array_equal(ids, np.concatenate([large.batch(s).token_ids for s in range(3)]))


def test_every_epoch_shows_every_document_once_and_whole(corpus):
    s = Stream(config(corpus), 5, "train", 1)
    for source in s.sources:
        orders = []
        for epoch in (0, 1, 2):
            keys, ids = [], {}
            first = sum(source.rows_of(e) for e in range(epoch))
            for j in range(first, first + source.rows_of(epoch)):
                rows, r = source.row(j)
                for d, key in enumerate(rows.batch.keys):
                    slots = (rows.batch.doc_id == d) & (rows.batch.modality == 0)
                    ids[key] = rows.batch.token_ids[slots]
                keys += rows.batch.keys
                assert r == 0
            assert len(set(keys)) == len(keys)
            orders.append([k.split(":")[2] for k in keys])
            for d in range(len(source.documents)):
                name = f"{source.name}:{epoch}:{source.documents.key(d)}"
                pieces = (
                    [ids[name]]
                    if name in ids
                    else [ids[f"{name}:{p}"] for p in range(source.piece_ptr[d + 1] - source.piece_ptr[d])]
                )
                text = np.concatenate(pieces)
                [raw] = [x for x in source.documents.raw(d) if isinstance(x, str)]
                assert s.tokenizer.decode(text) == raw
                assert (text == s.tokenizer.eos_id).sum() == 1
                assert pieces[-1][-1] == s.tokenizer.eos_id
                assert all(p[0] == s.tokenizer.bos_id for p in pieces)
        assert sorted(orders[0]) == sorted(orders[1]) == sorted(orders[2])
        assert orders[0] != orders[1]


def test_images_land_with_their_captions(corpus, files):
    from isofusion.data.images import decode, to_patches

    s = Stream(config(corpus), 5, "train", 8)
    b = s.batch(0)
    seen = 0
    for d, key in enumerate(b.keys):
        if key.startswith("cap:"):
            [slot] = np.unique(b.image_id[(b.doc_id == d) & (b.modality == 1)])
            where = b.image_id[b.patch_slot] == slot
            number = int(key.rpartition("/")[2])
            assert np.array_equal(b.patches[where], to_patches(decode(files.image(number)), 16, 8))
            seen += 1
    assert seen > 5


@pytest.mark.parametrize("stored", [True, False])
def test_pages_longer_than_a_row_keep_every_image_where_it_was(files, tmp_path, monkeypatch, stored):
    """Pieces of one epoch, put together again, are the documents of three files, token by token and patch by patch."""
    from isofusion.data.images import decode, to_patches

    if not stored:
        monkeypatch.setattr(patches, "STORE_BYTES", 0)
    rng, documents = np.random.default_rng(0), {}
    for f in range(3):
        members = []
        for i in range(3):
            parts = [
                files.image(100 * f + 10 * i + k) if k % 3 else prose(k, int(rng.integers(1, 30))) for k in range(9)
            ]
            parts = ["a", *(files.image(k) for k in range(15)), "b"] if (f, i) == (1, 1) else parts  # just fits
            names = [f"{i}.{k}.png" if isinstance(part, bytes) else None for k, part in enumerate(parts)]
            texts = [None if isinstance(part, bytes) else part for part in parts]
            members.append((f"{i}.json", json.dumps({"images": names, "texts": texts}).encode()))
            members += [(name, part) for name, part in zip(names, parts, strict=True) if name]
            documents[f"pages:0:p-{f}.tar/{i}"] = parts
        files.tar(tmp_path / f"p-{f}.tar", members)
    pages = SourceConfig(name="pages", domain="interleaved", format="interleaved", weight=1, train=("p-*.tar",))
    s = Stream(config(tmp_path, sources=(pages,)), 5, "train", 1)
    [source] = s.sources
    pieces = {}
    for j in range(source.rows_of(0)):
        rows, _ = source.row(j)
        b, shown = rows.batch, dict(zip(rows.batch.patch_slot.tolist(), rows.batch.patches, strict=True))
        assert source.tokens(j) == ((b.doc_id >= 0).sum() - b.modality.sum(), b.modality.sum())
        for d, key in enumerate(b.keys):
            slots = np.flatnonzero(b.doc_id == d).tolist()
            pieces[key] = [shown[t].tobytes() if t in shown else int(b.token_ids[t]) for t in slots]
    lengths = []
    for key, parts in documents.items():
        names = sorted((len(k), k) for k in pieces if k == key or k.startswith(f"{key}:"))  # piece 10 after piece 9
        found = [pieces.pop(k) for _, k in names]
        assert all(piece.pop(0) == s.tokenizer.bos_id for piece in found)
        assert found[-1].pop() == s.tokenizer.eos_id
        expected = []
        for part in parts:
            whole = to_patches(decode(part), 16, 8) if isinstance(part, bytes) else s.tokenizer.encode(part)
            expected += [x.tobytes() for x in whole] if isinstance(part, bytes) else list(map(int, whole))
        assert [x for piece in found for x in piece] == expected
        lengths.append(len(expected) + 2)
    assert not pieces
    assert lengths.count(64) == 1
    assert source.n_cut == s.report(1)["sources"][0]["cut"] == sum(length > 64 for length in lengths) > 3


def test_without_an_image_store_the_batches_are_the_same(corpus, monkeypatch, tmp_path):
    stored = Stream(config(corpus), 5, "train", 4).batch(3)
    assert list((tmp_path / "cache/patches").rglob("*.u8"))
    monkeypatch.setattr(patches, "STORE_BYTES", 0)
    monkeypatch.setenv("ISOFUSION_CACHE", str(tmp_path / "other"))
    assert fingerprint(Stream(config(corpus), 5, "train", 4).batch(3)) == fingerprint(stored)
    assert not list((tmp_path / "other").rglob("*.u8"))


def test_validation_is_one_for_all_and_repeats_nothing(corpus):
    one, two = Stream(config(corpus), 0, "val", 2), Stream(config(corpus), 9, "val", 2)
    for domain in ("caption", "text"):
        a, b = one.val_batches(domain), two.val_batches(domain)
        assert [fingerprint(x) for x in a] == [fingerprint(x) for x in b]
        assert all(x.rows == 2 for x in a[:-1])
        keys = [k for x in a for k in x.keys]
        assert len(set(keys)) == len(keys)
        assert sum(x.rows for x in a) <= 6
    caption = {k.split(":")[2] for x in one.val_batches("caption") for k in x.keys}
    assert len(caption) == 7  # all of them, once, although six rows were asked for
    with pytest.raises(InputError, match="no validation source for domain 'interleaved'"):
        one.val_batches("interleaved")


def test_ledger_counts_what_the_batches_hold(corpus):
    s = Stream(config(corpus), 5, "train", 4)
    for steps in (1, 7, 30):
        report = s.report(steps)
        batches = [s.batch(i) for i in range(steps)]
        for code, entry in zip((0, 2), report["sources"], strict=True):
            text = image = rows = 0
            keys: list[str] = []
            once: dict[str, int] = {}  # text of a piece, whatever the epoch
            pictures: set[bytes] = set()
            for b in batches:
                mine = b.domain == code
                rows += mine.sum() // b.row_len
                text += (mine & (b.doc_id >= 0) & (b.modality == 0)).sum()
                image += (mine & (b.modality == 1)).sum()
                keys += [k for k in b.keys if k.startswith(entry["name"] + ":")]
                pictures |= (
                    {b.patches[i : i + 4].tobytes() for i in range(0, len(b.patches), 4)} if code == 0 else set()
                )
            assert (entry["rows"], entry["text_tokens"], entry["image_tokens"]) == (rows, text, image)
            for b in batches:
                for d, key in enumerate(b.keys):
                    if key in keys:
                        name, _, sample = key.split(":", 2)
                        once[f"{name}:{sample}"] = int(((b.doc_id == d) & (b.modality == 0)).sum())
            assert entry["unique_images"] == len(pictures)
            assert entry["unique_tokens"] == sum(once.values())
            assert entry["padding"] == rows * 64 - text - image
            assert entry["share_rows"] == rows / (4 * steps)
            assert entry["share_tokens"] == pytest.approx((text + image) / report["tokens"])
            if code == 0:
                assert entry["documents"] == len(keys)
        both = report["sources"]
        assert report["tokens"] == sum(int((b.doc_id >= 0).sum()) for b in batches)
        for kind in ("text_tokens", "image_tokens"):
            assert report[kind] == sum(e[kind] for e in both)
        documents = sum(e["documents"] for e in both)
        assert [e["share_documents"] for e in both] == [e["documents"] / documents for e in both]
    assert any("more than 4 epochs" in w for w in s.report(100)["warnings"])
    assert not s.report(1)["warnings"]


def test_fingerprint_follows_data_tokenizer_and_packing_not_place_or_seed(corpus, files, tmp_path):
    base = Stream(config(corpus), 1, "train", 4).fingerprint
    twin = write_corpus(files, tmp_path / "twin")
    assert Stream(config(twin), 2, "train", 8).fingerprint == base
    files.jsonl(twin / "t-train.jsonl", [{"text": "other words than before"}] * 9)
    others = [
        config(corpus, row_len=96),
        config(corpus, image_size=8),
        config(corpus, tokenizer="train:300"),
        config(twin),
    ]
    assert len({base, *(Stream(c, 1, "train", 4).fingerprint for c in others)}) == 5


def test_near_duplicates(files, tmp_path):
    folder = write_corpus(files, tmp_path / "data")
    pairs = [("1.jpg", files.image(3, (40, 24), "JPEG")), ("1.txt", b"another text for a picture seen in training")]
    pairs += [
        ("2.png", files.image(4)),
        ("2.txt", prose(5, 6).encode()),
        ("3.png", files.image(900)),
        ("3.txt", b"new"),
    ]
    files.tar(folder / "c-val.tar", pairs)
    found = Stream(config(folder), 0, "val", 1).near_duplicates()
    assert found["cap"] == {
        "documents": 3, "same_text": 1, "paragraphs": 0, "same_paragraph": 0, "images": 3, "same_image": 1,
        "images_checked": 3, "near_image": 2,
    }  # fmt: skip
    assert found["txt"]["same_text"] == 0
    report = Stream(config(folder), 0, "train", 1).report(2)
    assert {e["name"]: e["near_duplicates"] for e in report["sources"]} == {
        **{e["name"]: None for e in report["sources"]},
        **found,
    }
    assert "source cap: 1 of 3 whole texts of validation are in training too" in report["warnings"]
    assert any(w.startswith("source cap: 2 of 3 images") for w in report["warnings"])
    told = {e["name"]: e["leaks"] for e in report["sources"] if e["leaks"]}
    assert told == {
        "cap": ["2 of 3 images, or their near-duplicates, of validation are in training too: its loss may be too low"]
    }


def test_a_stray_copy_in_training_is_no_leak() -> None:
    counts = {"documents": 200, "same_text": 2, "paragraphs": 100, "same_paragraph": 1, "images": 0, "same_image": 0}
    counts |= {"images_checked": 0, "near_image": 0}
    assert leaks(counts) == []
    assert leaks(counts | {"same_text": 3}) == [
        "3 of 200 whole texts of validation are in training too: its loss may be too low"
    ]
    assert leaks(counts | {"same_text": 90, "images": 200, "images_checked": 200}) == []  # captions: "a dog"


@pytest.mark.timeout(60)  # packing every epoch would take days
def test_the_ledger_of_many_epochs_is_reckoned_from_the_first(corpus, monkeypatch) -> None:
    for source in Stream(config(corpus), 0, "train", 4).sources:
        rows = source.rows_of(0)
        exact = source.ledger(40 * rows + 3)
        with monkeypatch.context() as patch:
            patch.setattr("isofusion.data.finite.EXACT_EPOCHS", 5)
            near = source.ledger(40 * rows + 3)
        assert (exact["estimated"], near["estimated"]) == (False, True)
        counted = ("documents", "text_tokens", "image_tokens", "epochs")
        for key in counted:
            assert near[key] == pytest.approx(exact[key], rel=0.01)
        assert {**exact, "estimated": True, **{key: near[key] for key in counted}} == near
        assert not source.ledger(4 * rows)["estimated"]
        assert source.ledger(10**12)["epochs"] == pytest.approx(10**12 / rows, rel=0.05)


@pytest.mark.parametrize("left", [0, -9], ids=["empty", "cut short"])
@pytest.mark.parametrize("name", ["duplicates/*.json", "tokenizers/*/*.json", "tokens/*/*/*.npy"])
def test_a_damaged_file_of_the_cache_is_made_again(corpus, tmp_path, name: str, left: int) -> None:
    """As a machine leaves them that lost its power: renamed into place, and not yet on the disk."""
    first = Stream(config(corpus), 0, "train", 4)
    batch, shared = fingerprint(first.batch(0)), first.near_duplicates()
    whole = {path: path.read_bytes() for path in (tmp_path / "cache").glob(name)}
    assert whole
    for path, data in whole.items():
        path.write_bytes(data[:left])
        again = Stream(config(corpus), 0, "train", 4)
        assert again.near_duplicates() == shared
        assert fingerprint(again.batch(0)) == batch
        assert path.read_bytes() == data


def test_a_tokenizer_beside_the_data_is_found(corpus, tmp_path):
    content = Stream(config(corpus, tokenizer="train:300"), 0, "train", 1).tokenizer.content
    (corpus / "own.json").write_text(content)
    assert Stream(config(corpus, tokenizer="own.json"), 0, "train", 1).tokenizer.content == content
    with pytest.raises(InputError, match=r"cannot read the tokenizer other\.json"):
        Stream(config(corpus, tokenizer="other.json"), 0, "train", 1)


def test_bad_settings(corpus, tmp_path):
    world = SourceConfig(name="w", domain="text", format="world", weight=1)
    with pytest.raises(InputError, match="cannot spell the text of cap, txt"):
        Stream(config(corpus, tokenizer="world"), 0, "train", 4)
    with pytest.raises(InputError, match=r"need data\.tokenizer = 'world'"):
        Stream(config(corpus, sources=(world,)), 0, "train", 4)
    with pytest.raises(InputError, match="repeat each other"):
        Stream(DataConfig(sources=(world, world.model_copy(update={"name": "v"}))), 0, "train", 4)
    with pytest.raises(InputError, match="there is no data folder"):
        Stream(config(tmp_path / "nowhere"), 0, "train", 4)
    with pytest.raises(InputError, match="rows_per_step"):
        Stream(config(corpus), 0, "train", 0)


# ---- the world ------------------------------------------------------------------------------------------------------


class FakeTokenizer:
    vocab_size, pad_id, bos_id, eos_id, image_id, digest = 64, 0, 1, 2, 3, "fake"


class FakeWorld:
    """Documents of 1-2 images and some words, all from the four arguments."""

    tokenizer = FakeTokenizer()
    digest = "fake world"
    calls = 0
    longest = 12

    def sample(self, seed, domain, block, i):
        FakeWorld.calls += 1
        rng = np.random.default_rng([seed, len(domain), block, i])
        words = rng.integers(4, 64, rng.integers(3, self.longest)).astype(np.int32)
        text = Text(ids=words, token_class=(words % 5).astype(np.uint8), oracle=words.astype(np.float32))
        images = tuple(Image(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)) for _ in range(rng.integers(0, 3)))
        meta = {"eos_oracle": 2.0, "eos_class": 2, "lookups": tuple(words[:2].tolist()), "exposures": len(words)}
        meta["text_nats"] = np.array([*(words * 0.5), 0.25], np.float32)
        return Sample(f"{block}.{i}", (*images, text), meta)


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(stream, "open_world", lambda data: FakeWorld())
    sources = tuple(
        SourceConfig(name=f"w-{d}", domain=d, format="world", weight=w) for d, w in (("caption", 3), ("text", 2))
    )
    return DataConfig(sources=sources, row_len=48, image_size=16, patch_size=8, val_rows=10)


def test_world_blocks_are_generated_once_for_all_runs(fake):
    s = Stream(fake, 0, "train", 8)
    batches = [fingerprint(s.batch(i)) for i in range(20)]
    calls = FakeWorld.calls
    again = Stream(fake, 0, "train", 8)
    assert [fingerprint(again.batch(i)) for i in reversed(range(20))] == batches[::-1]
    assert FakeWorld.calls == calls
    assert fingerprint(Stream(fake, 1, "train", 8).batch(0)) != batches[0]
    assert FakeWorld.calls > calls


def test_an_edited_generator_is_other_data(fake, tmp_path, monkeypatch):
    source = tmp_path / "generator" / "edited_world.py"
    source.parent.mkdir()
    module = types.ModuleType("edited_world")
    module.__file__ = str(source)
    monkeypatch.setitem(sys.modules, "edited_world", module)
    monkeypatch.setattr(FakeWorld, "__module__", "edited_world")
    marks = []
    for text in ("class Edited:\n    n = 1\n", "class Edited:\n    n = 1\n", "class Edited:\n    n = 2\n"):
        source.write_text(text)
        s = Stream(fake, 0, "train", 8)
        marks.append((s.fingerprint, s.sources[0].digest, s.sources[0].folder))
    assert marks[0] == marks[1]
    assert all(a != b for a, b in zip(marks[1], marks[2], strict=True))


def test_world_rows_carry_targets_classes_and_oracle(fake):
    b = Stream(fake, 0, "train", 16).batch(0)
    aimed = b.targets >= 0
    assert np.array_equal(b.oracle[aimed], b.targets[aimed])  # the fake's oracle is its token id; EOS is 2 and 2.0
    assert np.isnan(b.oracle[~aimed]).all()
    expected = np.where(b.targets == 2, 2, b.targets % 5)
    assert np.array_equal(b.token_class[aimed], expected[aimed])
    assert (b.doc_id >= 0).mean() > 0.85


def test_world_train_and_validation_share_nothing_even_at_one_seed(fake):
    train, val = Stream(fake, fake.val_seed, "train", 10), Stream(fake, 7, "val", 10)
    assert not np.array_equal(train.batch(0).token_ids, val.batch(0).token_ids)
    [a] = val.val_batches("text")
    [b] = Stream(fake, 8, "val", 10).val_batches("text")
    assert fingerprint(a) == fingerprint(b)
    assert set(a.domain.tolist()) == {2}


def test_world_exposures_and_lookups(fake):
    s = Stream(fake, 0, "train", 8)
    before = s.exposures(40)
    assert s.report(40)["estimated"]
    words = sum(int((b.targets >= 4).sum()) for b in (s.batch(i) for i in range(40)))
    s.batch(47)
    assert abs(before - words) < 0.1 * words  # an estimate from one block a domain
    assert s.exposures(40) == words
    assert not s.report(40)["estimated"]
    val = Stream(fake, 0, "val", 4)
    texts = val.val_batches("text")
    assert len(val.val_lookups("text")) == 2 * sum(len(b.keys) for b in texts)
    nats = sum(0.5 * b.targets[b.targets >= 4].sum() + 0.25 * len(b.keys) for b in texts)
    assert val.val_text_nats("text") == pytest.approx(nats)


def test_a_world_block_from_the_cache_is_the_one_generated(fake):
    """Also what no batch shows: which entities each row asks for, its statistics, its nats of the text alone."""
    Stream(fake, 0, "train", 8).batch(0)
    source = Stream(fake, 0, "train", 8).sources[0]
    read, made = source.block(0), source._build(0)
    assert [x.tolist() for x in read.lookups] == [x.tolist() for x in made.lookups]
    assert len(read.lookups) == 64
    assert any(len(x) for x in read.lookups[-2:])
    for name in ("patch_ptr", "doc_ptr", "exposures", "text_nats"):
        np.testing.assert_array_equal(getattr(read, name), getattr(made, name))
    assert read.statistics() == made.statistics()
    for r in (0, 31, 63):  # and they are those of the row
        row = stream.take([(read, r)])
        real = row.doc_id >= 0
        mine = {name: values[r] for name, values in read.statistics().items()}
        assert (mine["documents"], mine["image_tokens"]) == (len(row.keys), row.modality.sum())
        assert mine["text_tokens"] == (real & (row.modality == 0)).sum()
        assert mine["targets"] == (row.targets >= 0).sum()


def test_the_ledger_of_a_world_counts_its_batches(fake):
    s = Stream(fake, 0, "train", 8)
    batches = [s.batch(i) for i in range(37)]  # several blocks of each domain, the last one in part
    for code, entry in zip((0, 2), s.report(37)["sources"], strict=True):
        mine = [b.domain == code for b in batches]
        real = sum(int((m & (b.doc_id >= 0)).sum()) for m, b in zip(mine, batches, strict=True))
        image = sum(int((m & (b.modality == 1)).sum()) for m, b in zip(mine, batches, strict=True))
        assert entry["rows"] == sum(int(m.sum()) for m in mine) // 48
        assert entry["rows"] > 64
        assert entry["rows"] % 64
        assert not entry["estimated"]
        assert (entry["text_tokens"], entry["image_tokens"]) == (real - image, image)
        assert entry["unique_images"] == image // 4
        assert entry["documents"] == sum(k.startswith(entry["name"] + ":") for b in batches for k in b.keys)


def test_damaged_world_block_is_generated_again(fake, tmp_path):
    s = Stream(fake, 0, "train", 8)
    good = fingerprint(s.batch(0))
    for path in (tmp_path / "cache/world").rglob("*.blk"):
        data = bytearray(path.read_bytes())
        data[-40] ^= 255
        path.write_bytes(data)
    calls = FakeWorld.calls
    assert fingerprint(Stream(fake, 0, "train", 8).batch(0)) == good
    assert FakeWorld.calls > calls


def test_a_world_document_longer_than_a_row_is_refused(fake, monkeypatch):
    monkeypatch.setattr(FakeWorld, "longest", 60)
    with pytest.raises(InputError, match="raise row_len"):
        Stream(fake, 0, "train", 128).batch(0)


def test_the_world_itself():
    sources = tuple(
        SourceConfig(name=d, domain=d, format="world", weight=1) for d in ("caption", "interleaved", "text")
    )
    data = DataConfig(sources=sources, row_len=256, image_size=48, patch_size=8, val_rows=4)
    s = Stream(data, 0, "train", 6)
    b = s.batch(0)
    aimed = b.targets >= 0
    assert np.isfinite(b.oracle[aimed]).all()
    assert (b.token_class[aimed] > 0).all()
    assert s.exposures(10) > 0
    assert len(Stream(data, 0, "val", 4).val_lookups("caption")) > 0
    assert s.tokenizer.vocab_size == 512
    assert endless.split_seed("train", 3) == 6


def test_samples_whose_keys_hold_colons_and_digits_stay_apart(files, corpus):
    """`a:1` and `a:2` are two documents, not two pieces of `a`; pieces of a long one still are one document."""
    pairs = [
        (f"a:{i}.{kind}", data) for i in (1, 2) for kind, data in (("png", files.image(i)), ("txt", b"word1 word2"))
    ]
    pairs += [("a%3A1.png", files.image(3)), ("a%3A1.txt", b"word3 " * 80)]
    files.tar(corpus / "c-train.tar", pairs)
    s = Stream(config(corpus), 5, "train", 4)
    keys = {k for step in range(6) for k in s.batch(step).keys if k.startswith("cap:0:")}
    assert len({document_of(k) for k in keys}) == 3
    assert len(keys) > 3  # the long one was cut


@pytest.mark.parametrize("name", ["a:b", "", "a b"])
def test_a_source_name_that_would_break_keys_is_refused(name):
    with pytest.raises(ValueError, match="name"):
        SourceConfig(name=name, domain="text", format="text", weight=1)
