"""Which member of an interleaved tar is the picture that a document names: its own, or none; never another's."""

from __future__ import annotations

import posixpath
from pathlib import Path
from typing import Any

from isofusion.data.sample import BadSample
from isofusion.errors import InputError

Place = tuple[int, int]
"""(offset, size) of a member's bytes in the tar."""


def read_bytes(path: Path, offset: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        data = file.read(size)
    if len(data) != size:
        raise InputError(f"{path} changed since it was indexed: {size} bytes at {offset} are gone; start the run again")
    return data


def exact(name: str) -> str:
    """A member name without the spellings that mean the same: `./a.jpg`, `b/../a.jpg`, `/a.jpg`."""
    return posixpath.normpath(name).lstrip("/")


class Pictures:
    """The members of a tar that are no document; `documents` are the `exact` KEYs of those that are."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.documents: set[str] = set()
        self._places: dict[str, list[Place]] = {}
        self._blind: dict[str, list[str]] = {}  # names by their lower-case spelling
        self._bare: dict[str, list[str]] = {}  # names by their lower-case last part

    def add(self, name: str, offset: int, size: int) -> None:
        path = exact(name)
        places = self._places.setdefault(path, [])
        if not places:
            self._blind.setdefault(path.lower(), []).append(path)
            self._bare.setdefault(posixpath.basename(path).lower(), []).append(path)
        places.append((offset, size))

    def find(self, key: str, name: Any) -> Place:
        """The picture that document `key` calls `name`. Raises BadSample where there is none, or no telling which.

        As written, from the document's folder and then from the root; else blind to case; else, for a bare name, in any
        folder. The last two are guesses, as is the root for a bare name: they want one candidate alone, and none that
        is another document's.
        """
        if not isinstance(name, str):
            raise BadSample(key, "wrong type", f"an image name is {type(name).__name__}")
        paths = [exact(f"{posixpath.dirname(key)}/{name}"), exact(name)]
        own = [path for path in paths if path == paths[0] or "/" in path or self._free(key, path)]
        for path in own:
            if path in self._places:
                return self._only(key, path)
        guesses = [self._blind.get(path.lower(), []) for path in paths]
        guesses += [self._bare.get(name.lower(), [])] if "/" not in name else []
        for some in guesses:
            free = [path for path in some if self._free(key, path)]
            if len(free) > 1:
                raise BadSample(key, "ambiguous image", f"{name} may be {' or '.join(free[:3])}")
            if free:
                return self._only(key, free[0])
        raise BadSample(key, "missing image", f"no member {name}")

    def _free(self, key: str, path: str) -> bool:
        """Whether a picture lies beside no other document than `key`."""
        owner = self._owner(path)
        return owner == exact(key) or owner not in self.documents

    @staticmethod
    def _owner(path: str) -> str:
        """KEY of the document that a picture lies beside: `a/7.0.jpg` is that of `a/7.json`."""
        folder, base = posixpath.split(path)
        return posixpath.join(folder, base.partition(".")[0])

    def _only(self, key: str, path: str) -> Place:
        """A member written twice is fine where both are the same bytes."""
        places = self._places[path]
        if len(places) > 1 and len({read_bytes(self.path, *place) for place in places}) > 1:
            raise BadSample(key, "ambiguous image", f"{len(places)} different members are called {path}")
        return places[0]
