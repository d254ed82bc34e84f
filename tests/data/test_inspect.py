"""`isofusion data inspect`: any source is found, counted and drawn; troubles are one message."""

from __future__ import annotations

import gzip
import json
import lzma
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from isofusion.cli.data import _bar, app
from isofusion.data.inspect import find_groups, inspect, segments
from isofusion.errors import InputError

GUIDE = (Path(__file__).parents[2] / "docs/own-data.md").read_text(encoding="utf-8")
SMALL = {"row_len": 64, "image_size": 16, "patch_size": 8, "tokenizer": "train:300"}


@pytest.fixture
def folder(files, tmp_path):
    place = tmp_path / "in"
    for shard in range(2):
        pairs = []
        for i in range(4):
            data = b"junk" if (shard, i) == (1, 2) else files.image(10 * shard + i)
            pairs += [(f"{i}.png", data), (f"{i}.txt", f"caption {shard} {i}".encode())]
        files.tar(place / f"pics-{shard:06}.tar", pairs)
    doc = json.dumps({"images": ["0.0.png", None], "texts": [None, "under it"]}).encode()
    files.tar(place / "inter.tar", [("0.json", doc), ("0.0.png", files.image(50))])
    files.jsonl(place / "text.jsonl", [{"text": "some words " * 60}, {"text": 3}])
    (place / "README.md").write_text("no data")
    return place


def test_formats_and_shards_are_found(folder):
    groups = find_groups(str(folder))
    assert {key: len(files) for key, files in groups.items()} == {
        ("pics.tar", "webdataset"): 2, ("inter.tar", "interleaved"): 1, ("text.jsonl", "text"): 1,
    }  # fmt: skip
    assert list(find_groups(str(folder / "pics-*.tar"))) == [("pics.tar", "webdataset")]
    assert list(find_groups(str(folder / "text.jsonl"))) == [("text.jsonl", "text")]
    assert list(find_groups(str(folder.parent))) != []


@pytest.mark.parametrize(
    ("names", "groups"),
    [
        (["00000.tar", "00001.tar", "00002.tar"], {"*.tar": 3}),  # img2dataset
        (["a-00000-of-00002-0123456789abcdef.parquet", "a-00001-of-00002-89abcdef01234567.parquet"], {"a.parquet": 2}),
        (["x.000.jsonl.gz", "x.001.jsonl.gz", "x.v2.jsonl.gz"], {"x.jsonl.gz": 2, "x.v2.jsonl.gz": 1}),
        (["train/0.tar", "train/1.tar", "val/0.tar", "val/1.TAR"], {"train/*.tar": 2, "val/0.tar": 1, "val/1.TAR": 1}),
    ],
)  # fmt: skip
def test_shards_are_one_set_whatever_numbers_them(tmp_path, names, groups):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    found = find_groups(str(tmp_path))
    assert {name: len(files) for (name, _), files in found.items()} == groups


def test_odd_file_names_are_as_good_as_others(files, tmp_path):
    files.jsonl(tmp_path / "my text: part 2.jsonl", [{"text": "some words"}])
    [entry] = inspect(str(tmp_path), **SMALL)
    assert (entry["name"], entry["documents"]) == ("my text: part 2.jsonl", 1)


def test_a_bad_file_does_not_hide_the_others(folder):
    (folder / "aaa.parquet").write_text("junk")
    found = inspect(str(folder), **SMALL)
    assert ["error" in entry for entry in found] == [True, False, False, False]
    assert "aaa.parquet: not a parquet file" in found[0]["error"]
    assert "max_bad_share" not in found[0]["error"]  # no limit makes it readable
    for options in ([], ["--json"]):
        run = CliRunner().invoke(app, ["inspect", str(folder), "--row-len", "64", "--image-size", "16", *options])
        assert isinstance(run.exception, InputError)
        assert str(run.exception).startswith("1 of 4 sets of files cannot be read (aaa.parquet):\n")
        assert all(name in run.output for name in ("pics.tar", "inter.tar", "text.jsonl"))


def test_a_file_name_that_is_no_text_hides_no_other(folder):
    (folder / "text.jsonl").rename(folder / os.fsdecode(b"te\xffxt.jsonl"))
    found = {entry["name"]: entry.get("error") for entry in inspect(str(folder), **SMALL)}
    assert found["pics.tar"] is None
    assert str(found[r"te\xffxt.jsonl"]).endswith(r"te\xffxt.jsonl: the file name is not UTF-8; rename it")


def test_what_is_not_looked_at_is_named(folder, caplog):
    caplog.set_level("INFO", "isofusion.data")
    (folder / "pictures").mkdir()
    find_groups(str(folder))
    find_groups(str(folder / "*.tar"))
    assert caplog.messages == ["not looked at: README.md, pictures/"]
    for number in range(20):
        (folder / f"{number:02}.jpg").touch()
    find_groups(str(folder))
    assert caplog.messages[1].endswith("03.jpg, 04.jpg, 05.jpg, 06.jpg, 07.jpg, and 14 more")


def test_other_layouts_are_packed_as_the_guide_does_it(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.jpg").write_bytes(files.image(1))
    (tmp_path / "images/a.txt").write_text("a picture")
    said = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "noise"}]
    (tmp_path / "llava_train.json").write_text(json.dumps([{"image": "a.jpg", "conversations": said}]))
    rows = {"image": [{"bytes": files.image(2), "path": "b.png"}], "text": ["another"]}
    pq.write_table(pa.table(rows), tmp_path / "b.parquet")
    names: dict = {}
    exec(GUIDE.partition("```python\n")[2].partition("```")[0], names)
    names["write"]("folder-0.tar", names["folder"]("images"))
    names["write"]("rows-0.tar", names["parquet"]("b.parquet"))
    texts = {e["name"]: e["samples"][0]["text"] for e in inspect("*.tar", **SMALL)}
    assert {name: text.partition("] ")[2] for name, text in texts.items()} == {
        "folder-0.tar": "a picture", "rows-0.tar": "another", "train-000000.tar": "What is it? noise",
    }  # fmt: skip


def test_a_compressed_tar_is_told_to_be_unpacked(folder):
    for name, packed in (("a.tar.gz", gzip.compress), ("b.tgz", gzip.compress), ("c.tar.xz", lzma.compress)):
        (folder / name).write_bytes(packed((folder / "inter.tar").read_bytes()))
        with pytest.raises(InputError, match=r"compressed tar \(.*unpack it first"):
            inspect(str(folder / name), **SMALL)
    assert {("a.tar.gz", "webdataset"), ("b.tgz", "webdataset")} < set(find_groups(str(folder)))


def test_counts_bad_and_layout(folder):
    entries = {e["name"]: e for e in inspect(str(folder), **SMALL)}
    pics, text = entries["pics.tar"], entries["text.jsonl"]
    assert (pics["documents"], pics["bad"], pics["images"]["count"]) == (7, {"broken image": 1}, 7)
    assert pics["images"]["width"] == {"min": 20, "median": 20, "max": 20}
    assert pics["samples"][0]["text"] == "[image 20x12] caption 0 0"
    assert (text["documents"], text["bad"], text["images"]) == (1, {"wrong type": 1}, None)
    assert text["packing"]["cut_documents"] == 1
    for entry in entries.values():
        for row in entry["rows"]:
            assert sum(slots for _, _, slots in row) == 64
    assert ["image", 0, 4] in entries["inter.tar"]["rows"][0]


def test_command_prints_and_speaks_json(folder):
    options = ["--row-len", "64", "--image-size", "16", "--tokenizer", "train:300"]
    run = CliRunner().invoke(app, ["inspect", str(folder), *options], env={"COLUMNS": "100"})
    assert run.exit_code == 0, run.output
    assert "broken image 1 (12.50%)" in run.output
    assert "pics-000001.tar: 2: broken image" in run.output
    assert "[####" in run.output
    run = CliRunner().invoke(app, ["inspect", str(folder), *options, "--json"])
    assert {e["name"] for e in json.loads(run.output)} == {"pics.tar", "inter.tar", "text.jsonl"}


def test_world_is_inspected_and_drawn(tmp_path):
    run = CliRunner().invoke(app, ["inspect", "world", "--domain", "caption", "--json", "--row-len", "256"])
    [entry] = json.loads(run.output)
    assert entry["domain"] == "caption"
    assert 0 < entry["text"]["oracle_nats_per_target"] < 3
    out = tmp_path / "deep/sheet.png"
    run = CliRunner().invoke(app, ["show", "world", "--out", str(out), "--n", "4"])
    assert run.exit_code == 0, run.output
    assert out.read_bytes()[:4] == b"\x89PNG"


def test_troubles_are_input_errors(files, tmp_path):
    for source in ("nothing", str(tmp_path)):
        with pytest.raises(InputError, match="nothing at"):
            inspect(source, **SMALL)
    (tmp_path / "x.csv").write_text("a")
    with pytest.raises(InputError, match=r"known format .*JSON of LLaVA or COCO .*Other layouts"):
        inspect(str(tmp_path), **SMALL)
    with pytest.raises(InputError, match=r"^format: input should be 'world', .* got 'csv'$"):
        inspect(str(tmp_path / "x.csv"), format="csv", **SMALL)
    (tmp_path / "x.tar").write_bytes(b"junk")
    with pytest.raises(InputError, match="not a tar file 1"):
        inspect(str(tmp_path / "x.tar"), **SMALL)
    with pytest.raises(InputError, match="not a multiple of patch_size"):
        inspect("world", image_size=20, patch_size=8)
    with pytest.raises(InputError, match="the world has no domain"):
        inspect("world", domain="sound")
    files.jsonl(tmp_path / "y.jsonl", [{"text": "words"}])
    with pytest.raises(InputError) as caught:
        inspect(str(tmp_path / "y.jsonl"), domain="sound", **SMALL)
    assert str(caught.value) == "domain: input should be 'caption', 'interleaved' or 'text', got 'sound'"


def test_bar_is_as_long_as_it_should_be():
    row = [["text", 0, 10], ["image", 0, 20], ["text", 1, 3], ["pad", -1, 7]]
    drawn = _bar(row, 40).plain
    assert drawn == "[=========####################[==......."
    assert np.unique(list(drawn)).tolist() == ["#", ".", "=", "["]


def test_segments_join_a_row_of_a_batch(folder):
    from isofusion.config import DataConfig, SourceConfig
    from isofusion.data.stream import Stream

    one = SourceConfig(name="t", domain="text", format="text", weight=1, train=("text.jsonl",))
    data = DataConfig(sources=(one,), folder=str(folder), max_bad_share=1, **SMALL)
    batch = Stream(data, 0, "train", 3).batch(0)
    rows = [segments(batch, r) for r in range(3)]
    assert all(sum(s[2] for s in row) == 64 for row in rows)
    assert sum(s[2] for row in rows for s in row if s[0] == "text") == (batch.doc_id >= 0).sum()
