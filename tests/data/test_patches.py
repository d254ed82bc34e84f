"""The patches of a source: no image is decoded twice, and where they lie changes no batch."""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from isofusion.config import DataConfig, SourceConfig
from isofusion.data import ahead, finite, index, patches
from isofusion.data.finite import Documents, ImageStore
from isofusion.data.images import decode
from isofusion.data.index import SourceIndex, index_source
from isofusion.errors import RunFailure

SHAPE = patches.Shape(16, 8)


def samples(files, first: int, count: int, bad: tuple[int, ...] = ()) -> list[tuple[str, bytes]]:
    out = []
    for i in range(first, first + count):
        out += [(f"{i:03}.png", b"junk" if i in bad else files.image(i)), (f"{i:03}.txt", f"caption {i}".encode())]
    return out


@pytest.fixture
def folder(files, tmp_path: Path) -> Path:
    files.tar(tmp_path / "data/a.tar", samples(files, 0, 5, bad=(2,)))
    files.tar(tmp_path / "data/b.tar", samples(files, 10, 4))
    return tmp_path / "data"


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every image that is decoded."""
    calls: list[int] = []
    for module in (index, finite):
        monkeypatch.setattr(module, "decode", lambda data: calls.append(1) or decode(data))
    return calls


def indexed(folder: Path, shape: patches.Shape | None = SHAPE) -> SourceIndex:
    source = SourceConfig(name="s", domain="caption", format="webdataset", weight=1, train=("*.tar",))
    return index_source(source, folder, "train", 0.5, shape)


def contents(source: SourceIndex, shape: patches.Shape = SHAPE) -> np.ndarray:
    """Patches of all documents, by the store."""
    store = ImageStore(Documents(source), shape)
    return np.stack([store.patches(d, 0, 1) for d in range(source.n)])


def expected(files, shape: patches.Shape = SHAPE) -> np.ndarray:
    return np.stack([shape.cut(decode(files.image(i))) for i in (0, 1, 3, 4, 10, 11, 12, 13)])


def stores(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache/patches").rglob("*.u8"))


def test_every_image_is_decoded_once(files, folder: Path, tmp_path: Path, decoded: list[int]) -> None:
    assert np.array_equal(contents(indexed(folder)), expected(files))
    assert len(decoded) == 9  # the broken one too
    assert np.array_equal(contents(indexed(folder)), expected(files))
    assert len(decoded) == 9
    assert len(stores(tmp_path)) == 2
    assert not list((tmp_path / "cache").rglob("*.tmp"))


def test_a_source_that_gains_a_file_keeps_what_it_has(files, folder: Path, decoded: list[int]) -> None:
    contents(indexed(folder))
    decoded.clear()
    files.tar(folder / "c.tar", samples(files, 20, 3))
    assert len(contents(indexed(folder))) == 11
    assert len(decoded) == 3


def test_another_size_is_written_from_the_index_that_is_there(files, folder: Path, decoded: list[int]) -> None:
    contents(indexed(folder))
    decoded.clear()
    other = patches.Shape(24, 8)
    assert np.array_equal(contents(indexed(folder, other), other), expected(files, other))
    assert len(decoded) == 8
    assert np.array_equal(contents(indexed(folder, other), other), expected(files, other))
    assert len(decoded) == 8


@pytest.mark.parametrize("fits", [0, 3, 4, 7, 8])  # images that fit: 4 of the first file, 4 of the second
def test_files_past_the_limit_are_decoded_on_demand(
    fits: int, files, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patches, "STORE_BYTES", fits * SHAPE.bytes)
    assert np.array_equal(contents(indexed(folder)), expected(files))
    # the second file may be taken where the first was too large
    assert len(stores(tmp_path)) == {0: 0, 3: 0, 4: 1, 7: 1, 8: 2}[fits]


def test_a_damaged_store_is_written_again(files, folder: Path, tmp_path: Path, decoded: list[int]) -> None:
    contents(indexed(folder))
    first = stores(tmp_path)[0]
    first.write_bytes(first.read_bytes()[:-1])
    decoded.clear()
    assert np.array_equal(contents(indexed(folder)), expected(files))
    assert len(decoded) == 4


def test_a_cache_that_cannot_be_written_says_so(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = indexed(folder, None)
    assert not stores(tmp_path)
    (tmp_path / "cache/patches").write_text("not a folder")
    with pytest.raises(RunFailure, match="ISOFUSION_CACHE"):
        contents(source)


def test_many_files_are_indexed_at_once_to_the_same_index(
    files, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "isofusion.data")
    one_by_one = indexed(folder)
    wanted = contents(one_by_one)
    monkeypatch.setenv("ISOFUSION_CACHE", str(tmp_path / "other"))
    source = {"name": "s", "domain": "caption", "format": "webdataset", "weight": 1, "train": ("*.tar",)}
    data = DataConfig(folder=str(folder), sources=(source,), image_size=16, patch_size=8)
    assert ahead.index(data, ("train",), processes=2, least=0) == 2
    assert caplog.messages[-1] == "reading the data: 2 files, 0 MB, 2 at a time"
    monkeypatch.setattr(index, "_build", None)  # all of it is there
    again = indexed(folder)
    assert again.digest == one_by_one.digest
    assert again.bad == one_by_one.bad
    monkeypatch.setattr(finite, "decode", None)
    assert np.array_equal(contents(again), wanted)
    assert ahead.index(data, ("train",), processes=2, least=0) == 0


def test_few_files_are_open_at_a_time(files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finite, "OPEN", 3)
    for i in range(12):
        files.tar(tmp_path / f"data/{i:02}.tar", samples(files, 2 * i, 2))
    store = ImageStore(Documents(indexed(tmp_path / "data")), SHAPE)
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else pytest.skip("no /proc here")
    for d in range(24):
        assert np.array_equal(store.patches(d, 0, 1), SHAPE.cut(decode(files.image(d))))
    assert len(os.listdir("/proc/self/fd")) <= before + 4


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    budget = patches.Budget(1000)
    writer = patches.Writer(tmp_path / "store/x.u8", budget)
    writer.add([np.zeros(4, np.uint8)])

    class Full:
        def write(self, data: object) -> None:
            raise OSError(28, "No space left on device")

        close = write

        def __init__(self) -> None:
            self.close = lambda: self.write(b"")

    writer._file.close()
    writer._file = Full()
    with pytest.raises(RunFailure, match="free some space"), closing(writer):
        writer.add([np.zeros(4, np.uint8)])
    assert not list((tmp_path / "store").iterdir())
    assert budget.take(1000)  # given back


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    near = tmp_path / "x.u8"
    (tmp_path / ".x.u8.1-1.tmp").write_bytes(b"left")
    (tmp_path / ".y.u8.1-1.tmp").write_bytes(b"another's")
    with closing(patches.Writer(near, patches.Budget(10))) as writer:
        writer.add([np.zeros(4, np.uint8)])
        writer.keep(near)
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == [".y.u8.1-1.tmp", "x.u8"]


def test_processes_share_one_limit(files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of six files in two processes, as many are stored as fit."""
    for i in range(6):
        files.tar(tmp_path / f"data/{i}.tar", samples(files, 3 * i, 3))
    monkeypatch.setattr(patches, "STORE_BYTES", 7 * SHAPE.bytes)
    source = {"name": "s", "domain": "caption", "format": "webdataset", "weight": 1, "train": ("*.tar",)}
    data = DataConfig(folder=str(tmp_path / "data"), sources=(source,), image_size=16, patch_size=8)
    assert ahead.index(data, ("train",), processes=2, least=0) == 6
    kept = stores(tmp_path)
    assert 1 <= len(kept) <= 2
    contents(indexed(tmp_path / "data"))
    assert len(stores(tmp_path)) == 2
    assert set(kept) <= set(stores(tmp_path))  # those there are used first
