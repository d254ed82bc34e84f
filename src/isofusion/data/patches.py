"""The patches of a file's images, in the cache: u8 [I, n, p*p*3], raw, in the order of its index.

They are written while the file is indexed, so no image is decoded twice; a source that gains a file keeps what it has.

# I images, n patches per image, p patch side
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from isofusion.data import cache
from isofusion.data.images import to_patches

VERSION = 2
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


def place(sha256: str, format: str, shape: Shape) -> Path:
    """Where the patches of a file of these contents lie, or would."""
    key = cache.digest("patches", VERSION, sha256, format, shape.image_size, shape.patch_size)
    return cache.root() / "patches" / f"v{VERSION}" / f"{key}.u8"


def load(path: Path, images: int, shape: Shape) -> np.ndarray | None:
    """[I, n, p*p*3] of a file with `images` images, mapped; None where it is absent or not whole."""
    try:
        if path.stat().st_size == images * shape.bytes:
            return np.memmap(path, np.uint8, "r", shape=(images, *shape.per_image))
    except OSError:
        pass
    return None


class Writer:
    """Takes a file's patches as they come; `keep` puts them in place. Raises RunFailure (full disk, rights)."""

    def __init__(self, near: Path, limit: int) -> None:
        """`limit`: bytes; of a file with more nothing is kept."""
        self._near, self._temporary, self._left = near, cache.temporary_of(near), limit
        with cache.explained(near):
            near.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._temporary.open("wb")

    def add(self, patches: list[np.ndarray]) -> None:
        """Of one sample."""
        self._left -= sum(block.nbytes for block in patches)
        if self._left >= 0:
            with cache.explained(self._near):
                for block in patches:
                    self._file.write(block.data)

    def keep(self, path: Path) -> None:
        with cache.explained(path):
            self._file.close()
            if self._left >= 0:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._temporary.replace(path)

    def close(self) -> None:
        self._file.close()
        self._temporary.unlink(missing_ok=True)


def ensure(
    path: Path, images: int, shape: Shape, samples: Callable[[], Iterator[list[np.ndarray]]]
) -> np.ndarray | None:
    """The store of a file, written from `samples` (patches, sample after sample) where it is absent or damaged."""
    if (found := load(path, images, shape)) is not None:
        return found
    with cache.lock(path):
        if load(path, images, shape) is None:
            with contextlib.closing(Writer(path, images * shape.bytes)) as writer:
                for patches in samples():
                    writer.add(patches)
                writer.keep(path)
    return load(path, images, shape)
