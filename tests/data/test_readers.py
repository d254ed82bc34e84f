"""Readers: every layout is read, and every kind of damage is counted by its reason, never a crash."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from isofusion.data import readers
from isofusion.data.compressed import Damaged, gunzip, unzstd
from isofusion.data.images import BrokenImage, decode, dhash, from_patches, to_patches
from isofusion.data.index import index_file
from isofusion.data.readers import detect_format, open_reader


def read(path, fmt):
    """(index, raw segments of every good sample)."""
    index = index_file(path, fmt)
    reader = open_reader(path, fmt)
    ref = [tuple(index.ref[a:b].tolist()) for a, b in zip(index.ref_ptr[:-1], index.ref_ptr[1:], strict=True)]
    return index, [reader.raw(k, r) for k, r in zip(index.keys, ref, strict=True)]


# ---- webdataset -----------------------------------------------------------------------------------------------------


def test_webdataset_reads_every_layout_and_counts_every_fault(files, tmp_path):
    png, jpg, webp = files.image(1), files.image(2, fmt="JPEG"), files.image(3, fmt="WEBP")
    members = [
        ("a/000.png", png), ("a/000.txt", b" a caption \n"), ("a/000.json", b"{}"),
        ("001.x.jpg", jpg),  # KEY ends at the first dot: this is no image of 001
        ("002.webp", webp), ("002.json", b'{"caption": "from json"}\0\0\0'),
        ("003.jpg", jpg), ("003.txt", b"txt wins"), ("003.json", b"not json at all"),
        ("004.jpg", jpg[: len(jpg) // 2]), ("004.txt", b"half a picture"),
        ("005.jpg", b"no picture"), ("005.txt", b"x"),
        ("006.jpg", jpg), ("006.txt", b"  \n"),
        ("007.jpg", jpg),
        ("008.txt", b"alone"),
        ("009.jpg", jpg), ("009.json", b'{"caption": ["a"]}'),
        ("010.jpg", jpg), ("010.json", b'{"caption": '),
        ("011.jpg", jpg), ("011.json", b'{"url": "u"}'),
        ("012.jpg", jpg), ("012.txt", b"\xff\xfe\xfa"),
        ("013.jpg", jpg), ("013.jpg", jpg), ("013.txt", b"twice"),
        ("nosuffix", b""),
    ]  # fmt: skip
    index, samples = read(files.tar(tmp_path / "d/x.tar", members), "webdataset")
    assert index.keys == ["a/000", "002", "003", "013"]
    assert samples == [(png, "a caption"), (webp, "from json"), (jpg, "txt wins"), (jpg, "twice")]
    assert index.bad == {
        "missing image": 2, "broken image": 2, "empty caption": 1, "missing caption": 2, "wrong type": 1,
        "broken json": 1, "text is not UTF-8": 1, "member twice": 1, "tar member without KEY.suffix": 1,
    }  # fmt: skip
    assert index.image_size.tolist() == [[12, 20]] * 4
    assert any(key == "004" and reason == "broken image" for key, reason, _ in index.examples)
    assert index.unread == 0


@pytest.mark.parametrize("where", ["data", "header", "boundary"])
def test_truncated_tar_keeps_what_is_whole_and_says_how_much_is_lost(files, tmp_path, where):
    members = [m for i in range(6) for m in ((f"{i}.jpg", files.image(i, (64, 64), "PNG")), (f"{i}.txt", b"c"))]
    path = files.tar(tmp_path / "t.tar", members)
    whole = path.read_bytes()
    block = 512 + -(-len(members[0][1]) // 512) * 512 + 1024
    keep = {"data": 2 * block + 700, "header": 2 * block + 100, "boundary": 2 * block}[where]
    path.write_bytes(whole[:keep])
    index, samples = read(path, "webdataset")
    assert len(samples) == 2
    assert index.bad["truncated tar"] == 1


def test_tar_with_a_damaged_header_inside_is_not_taken_for_a_short_one(files, tmp_path):
    members = [m for i in range(6) for m in ((f"{i}.png", files.image(i)), (f"{i}.txt", b"c"))]
    path = files.tar(tmp_path / "t.tar", members)
    data = bytearray(path.read_bytes())
    at = data.index(b"3.png")
    data[at : at + 512] = b"\xee" * 512
    path.write_bytes(data)
    index, samples = read(path, "webdataset")
    assert len(samples) == 3
    assert index.bad == {"truncated tar": 1}
    assert index.unread == len(data) - at


@pytest.mark.parametrize("content", [b"", b"x" * 2000])
def test_no_tar_at_all(tmp_path, content):
    path = tmp_path / "t.tar"
    path.write_bytes(content)
    index = index_file(path, "webdataset")
    assert index.n == 0
    assert index.bad == {"not a tar file": 1}


# ---- interleaved ----------------------------------------------------------------------------------------------------


def test_interleaved_parquet_with_structs_and_links(files, tmp_path):
    one, two = files.image(1), files.image(2, fmt="JPEG")
    good = {"images": [None, {"bytes": one, "path": "p"}, None, None], "texts": ["a", None, "b", "c"]}
    rows = [
        good,
        {"images": [{"bytes": None, "path": "http://x"}, None], "texts": [None, "b"]},
        {"images": [{"bytes": two, "path": None}, None], "texts": ["both", "b"]},
        {"images": [None, None], "texts": [None, "neither"]},
        {"images": [{"bytes": two, "path": None}], "texts": [None, "longer"]},
        {"images": None, "texts": ["x"]},
        {"images": [{"bytes": two[:50], "path": None}, None], "texts": [None, "t"]},
        {"images": [{"bytes": two, "path": None}], "texts": [None]},
        {"images": [{"bytes": two, "path": None}, None], "texts": [None, "last"]},
    ]
    kind = pa.schema(
        [
            ("images", pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))),
            ("texts", pa.list_(pa.string())),
        ]
    )
    path = tmp_path / "x.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema=kind), path, row_group_size=4)
    index, samples = read(path, "interleaved")
    assert samples == [("a", one, "b\n\nc"), (two, "last")]
    assert index.keys == ["0.0", "2.0"]
    assert index.bad == {
        "image is only a link": 1, "not exactly one of image and text": 2, "images and texts differ in length": 1,
        "wrong type": 1, "broken image": 1, "document without text": 1,
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["binary", "string", "texts", "columns", "garbage"])
def test_interleaved_parquet_of_other_column_types(files, tmp_path, kind):
    path = tmp_path / "x.parquet"
    png = files.image(1)
    images = pa.array([[png, None]], pa.list_(pa.binary()))
    texts = pa.array([[None, "t"]], pa.list_(pa.string()))
    if kind == "string":
        images = pa.array([["http://x/y.jpg", None]], pa.list_(pa.string()))
    if kind == "texts":
        texts = pa.array([[None, 7]], pa.list_(pa.int64()))
    pq.write_table(pa.table({"images": images, "caption" if kind == "columns" else "texts": texts}), path)
    if kind == "garbage":
        path.write_bytes(path.read_bytes()[:-20])
    index, samples = read(path, "interleaved")
    expected = {
        "binary": {}, "string": {"image is only a link": 1}, "texts": {"wrong type": 1},
        "columns": {"no column texts": 1}, "garbage": {"not a parquet file": 1},
    }  # fmt: skip
    assert index.bad == expected[kind]
    assert samples == ([(png, "t")] if kind == "binary" else [])


def test_interleaved_tar(files, tmp_path):
    one, two = files.image(1, fmt="JPEG"), files.image(2, fmt="JPEG")

    def doc(images, texts):
        return json.dumps({"images": images, "texts": texts}).encode()

    members = [
        ("a/0.json", doc([None, "a/0.0.jpg", None, "0.1.jpg"], ["t", None, "u", None]) + b"\0\0"),
        ("a/0.0.jpg", one), ("a/0.1.jpg", two),
        ("a/1.json", doc(["a/1.0.jpg", None], [None, "t"])),
        ("a/2.json", b"{"),
        ("a/3.json", doc([None, 5], ["t", None])),
        ("a/4.json", doc(["a/4.0.jpg", None], [None, "t"])), ("a/4.0.jpg", b"broken"),
    ]  # fmt: skip
    path = files.tar(tmp_path / "x.tar", members)
    index, samples = read(path, "interleaved")
    assert samples == [("t", one, "u", two)]
    assert index.bad == {"missing image": 1, "broken json": 1, "wrong type": 1, "broken image": 1}
    assert detect_format(path) == "interleaved"


# ---- text -----------------------------------------------------------------------------------------------------------

ROWS = [
    {"text": " one "}, {"content": "two"}, {"text": None, "content": "three"}, b"", {"text": ""}, ["list"], {"x": 1},
    {"text": 5}, b'{"text": "cut', b'{"text": "\xff"}', {"text": "four"},
]  # fmt: skip
BAD = {"empty text": 1, "wrong type": 2, "no text field": 1, "broken json": 1, "text is not UTF-8": 1}


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_text_lines(files, tmp_path, suffix):
    plain = files.jsonl(tmp_path / "x.jsonl", ROWS)
    data = plain.read_bytes()
    path = tmp_path / f"y.jsonl{suffix}"
    half = len(data) // 2
    zst = zstandard.ZstdCompressor()
    path.write_bytes(
        {"": data, ".gz": gzip.compress(data), ".zst": zst.compress(data[:half]) + zst.compress(data[half:])}[suffix]
    )
    assert detect_format(path) == "text"
    index, samples = read(path, "text")
    assert samples == [("one",), ("two",), ("three",), ("four",)]
    assert index.keys == ["1", "2", "3", "11"]
    assert index.bad == BAD


@pytest.mark.parametrize(
    ("suffix", "damage", "reason", "lost_bytes"),
    [
        (".gz", "truncated", "truncated gzip file", False),
        (".zst", "truncated", "truncated zstd file", False),
        (".gz", "foreign", "broken gzip file", True),
        (".zst", "foreign", "broken zstd file", True),
        (".gz", "flipped", "broken gzip file", True),
    ],
)
def test_damaged_compressed_text(files, tmp_path, suffix, damage, reason, lost_bytes):
    rng = np.random.default_rng(0)
    rows = [{"text": rng.bytes(200).hex()} for _ in range(4000)]
    data = files.jsonl(tmp_path / "x.jsonl", rows).read_bytes()
    packed = gzip.compress(data) if suffix == ".gz" else zstandard.ZstdCompressor().compress(data)
    if damage == "truncated":
        packed = packed[: len(packed) // 2]
    elif damage == "flipped":
        packed = packed[: len(packed) // 3] + bytes(2000) + packed[len(packed) // 3 + 2000 :]
    else:
        packed = b"not compressed" * 100
    path = tmp_path / f"y.jsonl{suffix}"
    path.write_bytes(packed)
    for _ in range(2):  # the second time from the unpacked copy
        index = index_file(path, "text")
        assert index.bad[reason] == 1
        assert (index.unread > 0) == lost_bytes
        assert (index.n > 500) == (damage != "foreign")
        for file in (tmp_path / "cache/index/v1").iterdir():
            file.unlink()


def _packed(suffix: str, data: bytes, parts: int) -> tuple[bytes, list[tuple[int, int]]]:
    """`data` as gzip members or zstd frames of ten blocks each, and where the blocks begin: (packed, unpacked)."""
    out, starts, size = b"", [], -(-len(data) // parts)
    for first in range(0, len(data), size):
        stream = zlib.compressobj(wbits=31) if suffix == ".gz" else zstandard.ZstdCompressor().compressobj()
        flush = zlib.Z_FULL_FLUSH if suffix == ".gz" else zstandard.COMPRESSOBJ_FLUSH_BLOCK
        part = data[first : first + size]
        for i in range(0, len(part), len(part) // 10):
            out += stream.compress(part[i : i + len(part) // 10]) + stream.flush(flush)
            starts.append((len(out), min(len(part), i + len(part) // 10) + first))
        out += stream.flush()
    return out, starts


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("damage", ["truncated", "overwritten"])
@pytest.mark.parametrize("parts", [1, 3])
def test_every_line_before_the_damage_is_read(files, tmp_path, suffix, damage, parts):
    rng = np.random.default_rng(0)
    rows = [{"text": f"{i} {rng.bytes(20).hex()}"} for i in range(6000)]
    data = files.jsonl(tmp_path / "x.jsonl", rows).read_bytes()
    packed, starts = _packed(suffix, data, parts)
    name = {".gz": "gzip", ".zst": "zstd"}[suffix]
    for number in (0, 4, len(starts) // 2 + 1, len(starts) - 3):
        at, there = starts[number]
        path = tmp_path / f"{number}.jsonl{suffix}"
        path.write_bytes(packed[:at] + (b"\xff" * (len(packed) - at) if damage == "overwritten" else b""))
        index, samples = read(path, "text")
        whole = data[:there].count(b"\n")
        assert [text for (text,) in samples] == [row["text"] for row in rows[:whole]]
        reason = f"truncated {name} file" if damage == "truncated" else f"broken {name} file"
        assert index.bad.pop(reason) == 1
        assert index.bad == ({} if data[there - 1 : there] == b"\n" else {"broken json": 1})
        assert 0 <= len(packed) - at - index.unread < 3 if damage == "overwritten" else index.unread == 0


def test_hostile_json_is_a_bad_sample_and_not_a_crash(files, tmp_path):
    deep = b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    half = rb'{"text": "half a pair \ud800"}'
    found = index_file(files.jsonl(tmp_path / "a.jsonl", [deep, half, {"text": "fine"}]), "text")
    assert found.n == 1
    assert found.bad == {"broken json": 1, "text is not UTF-8": 1}


def test_names_in_another_encoding_stay_apart_and_printable(files, tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        for name in ("\u00e4", "\u00f6"):
            for suffix, data in (("png", files.image()), ("txt", b"a caption")):
                info = tarfile.TarInfo(f"{name}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    found = index_file(path, "webdataset")
    assert found.bad == {}
    assert [key.encode() for key in found.keys] == [rb"\xe4", rb"\xf6"]


def test_zstd_frames_larger_than_a_chunk(tmp_path):
    data = np.random.default_rng(0).bytes(3 << 20)
    (tmp_path / "z").write_bytes(zstandard.ZstdCompressor().compress(data) * 2)
    with (tmp_path / "z").open("rb") as file:
        assert b"".join(unzstd(file)) == data * 2


def test_zeros_after_a_gzip_member_are_padding_and_nothing_else_is(tmp_path):
    def unpacked(data: bytes) -> bytes:
        (tmp_path / "z").write_bytes(data)
        with (tmp_path / "z").open("rb") as file:
            return b"".join(gunzip(file))

    one = gzip.compress(b"one ")
    assert unpacked(one + bytes(100_000) + one) == b"one one "
    for bad, at in ((one + b"x" * 100, len(one) + 1), (bytes(100), 1), (one[:-8] + bytes(8), len(one) - 5)):
        with pytest.raises(Damaged) as caught:
            unpacked(bad)
        assert caught.value.at == at
    with pytest.raises(EOFError):
        unpacked(one + one[:-1])


# ---- images ---------------------------------------------------------------------------------------------------------


def test_alpha_and_palette_are_laid_on_white(files):
    import io

    from PIL import Image

    rgba = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    rgba.putpixel((0, 0), (10, 20, 30, 255))
    out = io.BytesIO()
    rgba.save(out, "PNG")
    pixels = decode(out.getvalue())
    assert pixels[0, 0].tolist() == [10, 20, 30]
    assert (pixels[1:] == 255).all()
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    palette.putpixel((1, 0), 1)
    out = io.BytesIO()
    palette.save(out, "PNG", transparency=0)
    pixels = decode(out.getvalue())
    assert pixels[0, 1].tolist() == [9, 9, 9]
    assert pixels[3, 3].tolist() == [255, 255, 255]
    deep = io.BytesIO()
    Image.fromarray(np.full((3, 3), 0x8000, np.uint16)).save(deep, "PNG")
    assert (decode(deep.getvalue()) == 128).all()


def test_patches_are_row_major_and_invertible(files):
    pixels = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
    patches = to_patches(pixels, 8, 4)
    assert patches.shape == (4, 48)
    assert (patches[1].reshape(4, 4, 3) == pixels[:4, 4:]).all()
    assert (patches[2].reshape(4, 4, 3) == pixels[4:, :4]).all()
    assert (from_patches(patches, 4) == pixels).all()
    assert to_patches(decode(files.image(1)), 16, 8).shape == (4, 192)


def test_dhash_survives_resizing_and_tells_pictures_apart(files):
    def bits(a, b):
        return bin(dhash(decode(files.image(*a))) ^ dhash(decode(files.image(*b)))).count("1")

    assert bits((1, (200, 160)), (1, (150, 120), "JPEG")) <= 2
    assert bits((1, (200, 160)), (2, (200, 160))) > 10


def test_every_prefix_of_an_image_is_broken_or_whole(files):
    data = files.image(1, (64, 64), "JPEG")
    for cut in range(0, len(data) - 50, 97):
        with pytest.raises(BrokenImage):
            decode(data[:cut])


def test_why_an_image_is_broken_is_the_same_in_every_run(files, monkeypatch):
    from PIL import Image

    def reason(data: bytes) -> str:
        with pytest.raises(BrokenImage) as caught:
            decode(data)
        return str(caught.value)

    data = files.image(1, (64, 64), "JPEG")
    assert reason(b"no picture") == "no JPEG, PNG, WEBP or GIF"
    assert "truncated" in reason(data[:-300])

    def fails(source, formats):
        raise OSError(f"cannot seek in {source!r}, sorry")

    monkeypatch.setattr(Image, "open", fails)
    assert reason(data) == "OSError: cannot seek in, sorry"


@pytest.mark.parametrize("how", ["two in one file", "a hole", "reserved space"])
def test_what_lies_behind_the_end_of_a_tar_is_no_silent_loss(how: str, files, tmp_path: Path) -> None:
    pairs = [(f"{i:03}.txt", f"caption {i} ".encode() * 400) for i in range(60)]
    pairs += [(f"{i:03}.png", files.image(i)) for i in range(60)]
    path = files.tar(tmp_path / "a.tar", sorted(pairs))
    whole = path.read_bytes()
    half = len(whole) // 2 // 512 * 512
    changed = {
        "two in one file": whole * 2,
        "a hole": whole[:half] + bytes(4096) + whole[half + 4096 :],
        "reserved space": whole[:half] + bytes(half + readers.PADDING),
    }
    path.write_bytes(changed[how])
    found = index_file(path, "webdataset")
    assert 0 < found.n <= 60
    assert sum(found.bad.values()) >= 1
    assert found.unread > 0.3 * len(whole)
    path.write_bytes(whole + bytes(8192))  # padding is none
    assert index_file(path, "webdataset").bad == {}


def test_a_key_with_a_dot_is_explained(files, tmp_path):
    members = [
        (f"photo.v1.{n}.{kind}", files.image(n) if kind == "jpg" else b"x") for n in range(9) for kind in ("jpg", "txt")
    ]
    [example] = index_file(files.tar(tmp_path / "a.tar", members), "webdataset").examples
    has = "has .v1.0.jpg, .v1.0.txt, .v1.1.jpg, .v1.1.txt, ...; a key ends at the first dot of a name"
    assert example == ["photo", "missing image", has]
