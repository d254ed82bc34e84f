"""The patches of a file's images, in the cache: u8 [I, n, p*p*3], raw, in the order of its index.

They are written while the file is indexed, so no image is decoded twice; a source that gains a file keeps what it has.

# I images, n patches per image, p patch side
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from isofusion.data import cache
from isofusion.data.images import to_patches

VERSION = 3  # of patches, and of what an index calls a good image
STORE_BYTES = 8 << 30  # of a source, at most


@dataclass(frozen=True)
class Shape:
    """What images become."""

    image_size: int
    patch_size: int

    @property
    def per_image(self) -> tuple[int, int]:
        """(n, p*p*3)"""
        return (self.image_size // self.patch_size) ** 2, self.patch_size**2 * 3

    @property
    def bytes(self) -> int:
        """Of one image."""
        n, dim = self.per_image
        return n * dim

    def cut(self, pixels: np.ndarray) -> np.ndarray:
        """u8 [height, width, 3] -> u8 [n, p*p*3]."""
        return to_patches(pixels, self.image_size, self.patch_size)


class Budget:
    """Bytes that stores may take; what is not kept is given back. `shared`: a multiprocessing Array of one."""

    def __init__(self, left: int = 0, shared: Any = None) -> None:
        self._left = [left] if shared is None else shared
        self._lock = threading.Lock() if shared is None else shared.get_lock()

    def take(self, count: int) -> bool:
        """Whether there is as much, which is then taken; what is negative is given back."""
        with self._lock:
            enough = bool(count <= self._left[0])
            if enough:
                self._left[0] -= count
            return enough


def place(sha256: str, format: str, shape: Shape) -> Path:
    """Where the patches of a file of these contents lie, or would."""
    key = cache.digest("patches", VERSION, sha256, format, shape.image_size, shape.patch_size)
    return cache.root() / "patches" / f"v{VERSION}" / f"{key}.u8"


def is_whole(path: Path, images: int, shape: Shape) -> bool:
    """Whether the store of a file with `images` images is there."""
    try:
        return path.stat().st_size == images * shape.bytes
    except (FileNotFoundError, NotADirectoryError):
        return False


def mapped(path: Path, images: int, shape: Shape) -> np.ndarray:
    """[I, n, p*p*3] of a store that is whole; holds a file open."""
    return np.memmap(path, np.uint8, "r", shape=(images, *shape.per_image))


class Writer:
    """Takes a file's patches as they come; `keep` puts them in place, `close` forgets what was not kept.

    One at a time for each `near`, beside which it writes. Raises RunFailure (full disk, rights).
    """

    def __init__(self, near: Path, budget: Budget) -> None:
        """Of a file that needs more than `budget` has nothing is kept."""
        self._near, self._temporary, self._budget = near, cache.temporary_of(near), budget
        self._taken, self._over = 0, False
        self._file: BinaryIO | None = None

    def add(self, patches: list[np.ndarray]) -> None:
        """Of one sample."""
        count = sum(block.nbytes for block in patches)
        if self._over or not count:
            return
        if not self._budget.take(count):
            self._over = True
            self.close()
            return
        self._taken += count
        with cache.explained(self._near):
            if self._file is None:
                self._near.parent.mkdir(parents=True, exist_ok=True)
                for left in self._near.parent.glob(f".{self._near.name}.*.tmp"):  # by one that was killed
                    left.unlink(missing_ok=True)
                self._file = self._temporary.open("wb")
            for block in patches:
                self._file.write(block.data)

    def keep(self, path: Path) -> None:
        if self._file is None:
            return
        with cache.explained(path):
            self._file.close()
            path.parent.mkdir(parents=True, exist_ok=True)
            self._temporary.replace(path)
        self._file, self._taken = None, 0

    def close(self) -> None:
        if self._file is not None:
            with suppress(OSError):  # what is buffered may not fit the disk, and is not wanted
                self._file.close()
            with suppress(OSError):
                self._temporary.unlink(missing_ok=True)
        self._budget.take(-self._taken)
        self._file, self._taken = None, 0


def ensure(path: Path, images: int, shape: Shape, samples: Callable[[], Iterator[list[np.ndarray]]]) -> None:
    """Write the store of a file from `samples` (patches, sample after sample) where it is absent or damaged."""
    if is_whole(path, images, shape):
        return
    with cache.lock(path):
        if not is_whole(path, images, shape):
            with closing(Writer(path, Budget(images * shape.bytes))) as writer:
                for patches in samples():
                    writer.add(patches)
                writer.keep(path)
