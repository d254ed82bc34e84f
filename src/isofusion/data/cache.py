"""The cache outside the data folder: `$ISOFUSION_CACHE`, else `~/.cache/isofusion`. Everything in it can be deleted.

Writers build under a temporary name and rename, so a reader never sees half a file; an advisory lock per target keeps
two processes of a study from doing the same work, and correctness never depends on it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import threading
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


def write_npz(path: Path, arrays: dict[str, np.ndarray]) -> None:
    def fill(p: Path) -> None:
        with p.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]

    write(path, fill)


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
