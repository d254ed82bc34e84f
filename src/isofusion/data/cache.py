"""The cache outside the data folder: `$ISOFUSION_CACHE`, else `~/.cache/isofusion`. Everything in it can be deleted.

Writers build under a temporary name and rename, so a reader never sees half a file; an advisory lock per target keeps
two processes of a study from doing the same work, and correctness never depends on it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from isofusion.errors import RunFailure

try:
    import fcntl
except ImportError:  # no advisory locks on this platform: duplicate work, same result
    fcntl = None  # type: ignore[assignment]


def root() -> Path:
    """Folder of the cache; not created here."""
    return Path(os.environ.get("ISOFUSION_CACHE") or Path.home() / ".cache" / "isofusion")


def digest(*parts: object) -> str:
    """sha256 over the JSON of `parts`, 64 hex digits."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def temporary_of(path: Path) -> Path:
    """Beside `path`, this thread's own."""
    return path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turns an OSError into a RunFailure that says what to do about a cache that cannot be written."""
    try:
        yield
    except OSError as error:
        raise RunFailure(
            f"the cache cannot be written at {path}: {error.strerror or error}; free some space, or point "
            f"ISOFUSION_CACHE at a folder that can be written"
        ) from error


def write(path: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write a file under another name, then rename it to `path`. Raises RunFailure (full disk, rights)."""
    temporary = temporary_of(path)
    try:
        with explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            fill(temporary)
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_folder(path: Path, fill: Callable[[Path], None]) -> None:
    """The same for a folder; when another process was first, its folder stays and ours goes."""
    temporary = temporary_of(path)
    try:
        with explained(path):
            temporary.mkdir(parents=True, exist_ok=True)
            fill(temporary)
            if not path.exists():
                with contextlib.suppress(FileExistsError, NotADirectoryError):
                    os.rename(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if not path.exists():
        raise RunFailure(f"the cache folder {path} could not be put in place; try again")


def write_bytes(path: Path, data: bytes) -> None:
    write(path, lambda p: _dump(p, data))


def _dump(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def write_arrays(path: Path, head: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    """A file of `head` (plain values) and arrays that `read_arrays` reads at once: npz takes ten times as long to open.

    The CRC-32 of the rest (4 bytes), the length of the JSON (8), the JSON, and each array from a multiple of 8 on.
    """
    shapes = {name: [array.dtype.str, array.shape] for name, array in arrays.items()}
    text = json.dumps([head, shapes]).encode()
    parts = [len(text).to_bytes(8, "little"), _padded(text, 4)]
    parts += [_padded(np.ascontiguousarray(array).tobytes(), 0) for array in arrays.values()]
    body = b"".join(parts)
    write_bytes(path, zlib.crc32(body).to_bytes(4, "little") + body)


def _padded(data: bytes, before: int) -> bytes:
    return data + bytes(-(len(data) + before) % 8)


def read_arrays(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(head, arrays) of `write_arrays`; the arrays cannot be written to. Raises OSError, ValueError where damaged."""
    data = path.read_bytes()
    if len(data) < 12 or zlib.crc32(memoryview(data)[4:]) != int.from_bytes(data[:4], "little"):
        raise ValueError(f"{path} is damaged")
    end = 12 + int.from_bytes(data[4:12], "little")
    head, shapes = json.loads(data[12:end])
    arrays, at = {}, end + -end % 8
    for name, (kind, shape) in shapes.items():
        count, dtype = math.prod(shape), np.dtype(kind)
        arrays[name] = np.frombuffer(data, dtype, count, at).reshape(shape)
        at += count * dtype.itemsize
        at += -at % 8
    return head, arrays


@contextlib.contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold the advisory lock of target `path`. Do not nest locks."""
    if fcntl is None:
        yield
        return
    name = path.with_name(f".{path.name}.lock")
    with explained(name):
        name.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(name, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
        with contextlib.suppress(OSError):
            name.unlink(missing_ok=True)
    finally:
        os.close(handle)


class Recent:
    """A small least-recently-used map; not shared between threads."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._items: OrderedDict[Hashable, Any] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        if key in self._items:
            self._items.move_to_end(key)
            return self._items[key]
        value = self._items[key] = make()
        if len(self._items) > self.size:
            self._items.popitem(last=False)
        return value
