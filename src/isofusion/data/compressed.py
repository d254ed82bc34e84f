"""Streams of gzip and zstd files: every byte that comes before damage is given, then EOFError or Damaged is raised."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Generator, Iterator
from typing import Any, BinaryIO

CHUNK = 1 << 16  # bytes read at once; they may unpack to a thousand times as many


class Damaged(ValueError):
    """The bytes of the file from offset `at` on cannot be unpacked."""

    def __init__(self, message: str, at: int) -> None:
        super().__init__(message)
        self.at = at


def gunzip(source: BinaryIO) -> Iterator[bytes]:
    """Uncompressed chunks of a gzip file of one or more members, which zeros may follow.

    Raises EOFError where the file ends inside a member, Damaged where its bytes are wrong.
    """
    return _frames(source, lambda: zlib.decompressobj(wbits=31), zlib.error, padding=b"\0")


def unzstd(source: BinaryIO) -> Iterator[bytes]:
    """Uncompressed chunks of a zstd file of one or more frames. Raises as `gunzip`."""
    import zstandard

    return _frames(source, zstandard.ZstdDecompressor().decompressobj, zstandard.ZstdError, padding=b"")


def _frames(source: BinaryIO, open_frame: Callable[[], Any], error: type[Exception], padding: bytes) -> Iterator[bytes]:
    frame, start, fed = open_frame(), 0, 0  # bytes before the frame, and those of it that were unpacked
    while chunk := source.read(CHUNK):
        while chunk:
            if start and not fed and padding:
                start, chunk = start + len(chunk), chunk.lstrip(padding)
                start -= len(chunk)
                if not chunk:
                    break
            try:
                data = frame.decompress(chunk)
            except error as problem:
                source.seek(start)
                good = yield from _up_to_damage(source, open_frame(), fed, chunk, error)
                raise Damaged(str(problem), start + fed + good) from problem
            yield data
            fed, chunk = fed + len(chunk), b""
            if frame.eof:
                chunk = frame.unused_data
                frame, start, fed = open_frame(), start + fed - len(chunk), 0
    if fed:
        raise EOFError


def _up_to_damage(
    source: BinaryIO, frame: Any, fed: int, chunk: bytes, error: type[Exception]
) -> Generator[bytes, None, int]:
    """What each byte of a damaged chunk unpacks to, up to the damage; returns how many bytes that were.

    A call that fails gives nothing of what it had unpacked, so the frame is unpacked anew: the `fed` bytes before the
    chunk at once, and the chunk byte by byte.
    """
    while fed:
        again = source.read(min(CHUNK, fed))
        frame.decompress(again)
        fed -= len(again)
    for i in range(len(chunk)):
        try:
            yield frame.decompress(chunk[i : i + 1])
        except error:
            return i
    return len(chunk)
