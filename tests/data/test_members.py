"""Which picture of an interleaved tar a document gets: its own, or none and the reason."""

from __future__ import annotations

import json
from itertools import pairwise

from isofusion.data.index import index_file
from isofusion.data.readers import open_reader


def _document(*images: str) -> bytes:
    return json.dumps({"images": [*images, None], "texts": [None] * len(images) + ["t"]}).encode()


def _pictures(files, tmp_path, members):
    """(documents by key -> numbers of their pictures, bad) of an interleaved tar whose pictures are numbered."""
    numbered = {files.image(i): i for i in range(10)}
    coded = [(name, files.image(what) if isinstance(what, int) else what) for name, what in members]
    path = files.tar(tmp_path / "x.tar", coded)
    index, reader = index_file(path, "interleaved"), open_reader(path, "interleaved")
    refs = [tuple(index.ref[a:b].tolist()) for a, b in pairwise(index.ref_ptr)]
    samples = [reader.raw(key, ref) for key, ref in zip(index.keys, refs, strict=True)]
    found = [[numbered[part] for part in sample if isinstance(part, bytes)] for sample in samples]
    return dict(zip(index.keys, found, strict=True)), index.bad


def test_a_document_gets_the_picture_beside_it_and_not_its_namesake(files, tmp_path):
    members = [
        ("0.jpg", 0), ("a/0.jpg", 1), ("b/0.jpg", 2), ("x.json", _document("0.jpg")),
        ("a/x.json", _document("0.jpg")), ("b/x.json", _document("0.jpg")),
        ("b/y.json", _document("a/0.jpg")), ("b/z.json", _document("../a/0.jpg", "./0.jpg")),
    ]  # fmt: skip
    assert _pictures(files, tmp_path, members) == (
        {"a/x": [1], "b/x": [2], "x": [0], "b/y": [1], "b/z": [1, 2]}, {},
    )  # fmt: skip


def test_pictures_whose_names_differ_in_case_alone_stay_apart(files, tmp_path):
    members = [("A.jpg", 1), ("a.jpg", 2), ("b.JPG", 3), ("x.json", _document("A.jpg", "a.jpg", "b.jpg"))]
    assert _pictures(files, tmp_path, members) == ({"x": [1, 2, 3]}, {})
    members = [("A.jpg", 1), ("a.jpg", 2), ("x.json", _document("a.JPG"))]
    assert _pictures(files, tmp_path, members) == ({}, {"ambiguous image": 1})


def test_a_bare_name_is_found_in_a_folder_of_pictures_where_it_is_the_only_one(files, tmp_path):
    members = [("img/p.jpg", 1), ("docs/x.json", _document("p.jpg"))]
    assert _pictures(files, tmp_path, members) == ({"docs/x": [1]}, {})
    members = [*members, ("more/p.jpg", 2)]
    assert _pictures(files, tmp_path, members) == ({}, {"ambiguous image": 1})
    members = [("b/x.0.jpg", 1), ("b/x.json", _document("x.0.jpg")), ("a/x.json", _document("x.0.jpg"))]
    assert _pictures(files, tmp_path, members) == ({"b/x": [1]}, {"missing image": 1})
    members = [("x.0.jpg", 1), ("x.json", _document("x.0.jpg")), ("a/x.json", _document("x.0.jpg"))]
    assert _pictures(files, tmp_path, members) == ({"x": [1]}, {"missing image": 1})


def test_members_that_are_there_twice_are_counted(files, tmp_path):
    members = [("x.0.jpg", 1), ("x.json", _document("x.0.jpg")), ("x.json", _document("x.0.jpg"))]
    assert _pictures(files, tmp_path, members) == ({"x": [1]}, {"member twice": 1})
    members = [("logo.jpg", 1), ("x.json", _document("logo.jpg")), ("logo.jpg", 1), ("y.json", _document("logo.jpg"))]
    assert _pictures(files, tmp_path, members) == ({"x": [1], "y": [1]}, {})
    members[2] = ("logo.jpg", 2)
    assert _pictures(files, tmp_path, members) == ({}, {"ambiguous image": 2})
