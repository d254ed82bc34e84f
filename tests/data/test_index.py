"""The index: built once, outside the data, honest about what is bad, and right on the real corpus."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from isofusion.config import DataConfig, SourceConfig
from isofusion.data import cache
from isofusion.data import index as index_module
from isofusion.data.finite import Documents
from isofusion.data.index import index_file, index_source
from isofusion.data.stream import Stream
from isofusion.errors import InputError, RunFailure


def pairs(files, n, bad=0):
    out = []
    for i in range(n):
        out += [(f"{i:03}.png", files.image(i) if i >= bad else b"junk"), (f"{i:03}.txt", f"caption {i}".encode())]
    return out


def source(**kw):
    return SourceConfig(name="s", domain="caption", format="webdataset", weight=1, train=("*.tar",), **kw)


def test_built_once_and_again_only_when_the_file_changes(files, tmp_path, monkeypatch):
    path = files.tar(tmp_path / "d/a.tar", pairs(files, 5))
    before = {p.name: p.stat().st_mtime_ns for p in path.parent.iterdir()}
    first = index_file(path, "webdataset")
    calls = []
    real = index_module._build
    monkeypatch.setattr(index_module, "_build", lambda *a: calls.append(1) or real(*a))
    again = index_file(path, "webdataset")
    assert not calls
    assert again.keys == first.keys
    for name in index_module._ARRAYS:
        assert np.array_equal(getattr(first, name), getattr(again, name))
    assert {p.name: p.stat().st_mtime_ns for p in path.parent.iterdir()} == before  # nothing beside the data
    files.tar(path, pairs(files, 6))
    assert index_file(path, "webdataset").n == 6
    assert calls == [1]


def test_damaged_cache_is_built_again(files, tmp_path):
    path = files.tar(tmp_path / "a.tar", pairs(files, 3))
    index_file(path, "webdataset")
    [place] = (tmp_path / "cache/index/v1").glob("*.index")
    whole = place.read_bytes()
    for at in (0, 3, 11, 20, len(whole) // 2, len(whole) - 1):  # cut short there, or one bit turned over
        for damaged in (whole[:at], whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :]):
            place.write_bytes(damaged)
            assert index_file(path, "webdataset").n == 3
            assert place.read_bytes() == whole


def test_arrays_of_every_kind_come_back_from_the_cache(tmp_path):
    arrays = {
        "odd": np.arange(3, dtype=np.int32).reshape(3, 1),
        "none": np.zeros((0, 2), np.uint64),
        "wide": np.arange(6.0)[::2],
    }
    cache.write_arrays(tmp_path / "a", {"name": "caf\u00e9", "counts": {"x": 1}}, arrays)
    head, found = cache.read_arrays(tmp_path / "a")
    assert head == {"name": "caf\u00e9", "counts": {"x": 1}}
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        assert found[name].flags.aligned
        assert np.array_equal(found[name], array)


def test_a_stream_reads_the_index_of_its_files_once(files, tmp_path, monkeypatch):
    for part in ("train", "val"):
        files.jsonl(tmp_path / f"d/{part}.jsonl", [{"text": f"some words for {part}"}])
    source = {"name": "t", "domain": "text", "format": "text", "weight": 1}
    data = DataConfig.model_validate({
        "sources": [{**source, "train": ["train.jsonl"], "val": ["val.jsonl"]}], "folder": str(tmp_path / "d"),
        "row_len": 64, "image_size": 16, "patch_size": 8, "tokenizer": "train:300",
    })  # fmt: skip
    Stream(data, 0, "train", 2).report(3)
    seen, real = [], cache.read_arrays
    monkeypatch.setattr(cache, "read_arrays", lambda path: seen.append(path) or real(path))
    Stream(data, 0, "train", 2).report(3)
    assert len(seen) == len(set(seen)) == 2  # training and, for the duplicates, validation


def test_many_at_once(files, tmp_path):
    path = files.tar(tmp_path / "a.tar", pairs(files, 20))
    with ThreadPoolExecutor(4) as pool:
        keys = [i.keys for i in pool.map(lambda _: index_file(path, "webdataset"), range(8))]
    assert all(k == keys[0] for k in keys)
    assert [p.name for p in (tmp_path / "cache/index/v1").iterdir() if "tmp" in p.name] == []


def test_past_the_limit_the_message_lists_counts_and_examples(files, tmp_path):
    files.tar(tmp_path / "a.tar", pairs(files, 20, bad=3))
    assert index_source(source(), tmp_path, "train", 0.15).bad == {"broken image": 3}
    with pytest.raises(InputError) as caught:
        index_source(source(), tmp_path, "train", 0.14)
    message = str(caught.value)
    assert "15.0% is bad (limit 14.0%; 17 good samples): broken image 3" in message
    assert "a.tar: 000: broken image" in message
    assert "max_bad_share" in message


def test_bytes_that_cannot_be_read_count_although_their_samples_cannot(files, tmp_path):
    path = files.tar(tmp_path / "a.tar", pairs(files, 20))
    data = bytearray(path.read_bytes())
    at = data.index(b"010.png")
    data[at : at + 512] = b"\xee" * 512
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"truncated tar 1\n"):
        index_source(source(), tmp_path, "train", 0.3)


def test_a_source_without_one_good_sample_may_have_the_wrong_format(files, tmp_path):
    files.jsonl(tmp_path / "a.tar", [{"text": "words"}] * 3)
    with pytest.raises(
        InputError, match=r"no good sample: not a tar file 1(?s:.*)or correct format = 'webdataset' \(docs"
    ):
        index_source(source(), tmp_path, "train", 1.0)


def test_brackets_in_names_are_no_pattern(files, tmp_path):
    folder = tmp_path / "data [v1] *"
    files.tar(folder / "a.tar", pairs(files, 3))
    files.tar(folder / "b[1].tar", pairs(files, 2))
    assert index_source(source(), folder, "train", 0.0).n == 5
    assert index_source(source().model_copy(update={"train": ("b[1].tar",)}), folder, "train", 0.0).n == 2
    assert index_source(source().model_copy(update={"train": ("[a].tar",)}), folder, "train", 0.0).n == 3


def test_a_link_to_a_file_that_is_gone_is_no_smaller_source(files, tmp_path):
    files.tar(tmp_path / "a.tar", pairs(files, 3))
    (tmp_path / "b.tar").symlink_to(tmp_path / "unmounted" / "b.tar")
    with pytest.raises(InputError, match=r"b\.tar is a link to .*unmounted/b\.tar, which is not there; put it back"):
        index_source(source(), tmp_path, "train", 0.0)
    files.tar(tmp_path / "unmounted" / "b.tar", pairs(files, 2))
    assert index_source(source(), tmp_path, "train", 0.0).n == 5


def test_a_file_name_that_is_no_text_is_told_before_anything_is_trained(files, tmp_path):
    files.tar(tmp_path / os.fsdecode(b"caf\xe9.tar"), pairs(files, 3))
    with pytest.raises(InputError, match=r"source s: the file name .*/caf\\xe9\.tar is not UTF-8; rename it"):
        index_source(source(), tmp_path, "train", 0.0)


def test_missing_files_and_folders_are_named(files, tmp_path):
    with pytest.raises(InputError, match=r"no file matches '\*\.tar'"):
        index_source(source(), tmp_path, "train", 0.1)
    with pytest.raises(InputError, match="has no files: set val of source s"):
        index_source(source(), tmp_path, "val", 0.1)
    (tmp_path / "a.jsonl").write_text("\n")
    empty = SourceConfig(name="e", domain="text", format="text", weight=1, train=("a.jsonl",))
    with pytest.raises(InputError, match="there is no sample"):
        index_source(empty, tmp_path, "train", 1.0)


def test_a_file_that_changes_under_a_run_is_an_error(files, tmp_path):
    path = files.tar(tmp_path / "a.tar", pairs(files, 3))
    documents = Documents(index_source(source(), tmp_path, "train", 0))
    assert documents.raw(2) == (files.image(2), "caption 2")
    os.utime(path, (1, 1))
    with pytest.raises(InputError, match="changed since this run indexed it"):
        documents.raw(2)
    path.unlink()
    with pytest.raises(InputError, match="is gone since"):
        documents.raw(2)


def test_digest_follows_contents_not_places(files, tmp_path):
    files.tar(tmp_path / "x/a.tar", pairs(files, 3))
    files.tar(tmp_path / "y/a.tar", pairs(files, 3))
    files.tar(tmp_path / "z/a.tar", pairs(files, 4))
    x, y, z = (index_source(source(), tmp_path / f, "train", 0).digest for f in "xyz")
    assert x == y != z


def test_a_cache_that_cannot_be_written_says_so(files, tmp_path, monkeypatch):
    path = files.tar(tmp_path / "a.tar", pairs(files, 1))
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("ISOFUSION_CACHE", str(tmp_path / "file"))
    with pytest.raises(RunFailure, match="ISOFUSION_CACHE"):
        index_file(path, "webdataset")


def _count(folder, pattern, fmt):
    parts = [index_file(p, fmt) for p in sorted(folder.glob(pattern))]
    assert all(not p.bad for p in parts)
    return sum(p.n for p in parts), sum(len(p.image_hash) for p in parts), parts


@pytest.mark.parametrize(
    ("pattern", "fmt", "documents", "images"),
    [
        ("captions/openstax-train-*.tar", "webdataset", 3875, 3875),
        ("captions/openstax-val-*.tar", "webdataset", 436, 436),
        ("captions/emoji-train-*.tar", "webdataset", 1604, 1604),
        ("captions/emoji-val-*.tar", "webdataset", 119, 119),
        ("interleaved/train-*.parquet", "interleaved", 2029, 2582),
        ("text/train-*.jsonl.gz", "text", 1394, 0),
    ],
)
def test_real_corpus_counts(shared_data, pattern, fmt, documents, images):
    assert _count(shared_data, pattern, fmt)[:2] == (documents, images)


def test_real_corpus_in_two_layouts_agrees(shared_data):
    one = _count(shared_data, "interleaved/val-*.parquet", "interleaved")
    two = _count(shared_data, "interleaved/val-*.tar", "interleaved")
    gz = _count(shared_data, "text/val-*.jsonl.gz", "text")
    zst = _count(shared_data, "text/val-*.jsonl.zst", "text")
    assert one[:2] == two[:2] == (136, 174)
    assert gz[:2] == zst[:2] == (92, 0)
    for a, b in ((one[2][0], two[2][0]), (gz[2][0], zst[2][0])):
        assert np.array_equal(a.text_hash, b.text_hash)
        assert np.array_equal(a.image_hash, b.image_hash)
