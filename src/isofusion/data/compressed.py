"""Streams of gzip and zstd files. EOFError: the file ends inside a frame; ValueError: its bytes are damaged."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from typing import BinaryIO

CHUNK = 1 << 20


def gunzip(source: BinaryIO) -> Iterator[bytes]:
    """Uncompressed chunks of a gzip file."""
    with gzip.GzipFile(fileobj=source) as file:
        while True:
            try:
                chunk = file.read(1 << 16)
            except (gzip.BadGzipFile, zlib.error) as error:
                raise ValueError(str(error)) from error
            if not chunk:
                return
            yield chunk


def unzstd(source: BinaryIO) -> Iterator[bytes]:
    """Uncompressed chunks of a zstd file of one or more frames."""
    import zstandard

    factory = zstandard.ZstdDecompressor()
    frame, fed = factory.decompressobj(), False
    while chunk := source.read(CHUNK):
        while chunk:
            try:
                yield frame.decompress(chunk)
            except zstandard.ZstdError as error:
                raise ValueError(str(error)) from error
            fed, chunk = True, b""
            if frame.eof:
                chunk, frame, fed = frame.unused_data, factory.decompressobj(), False
    if fed:
        raise EOFError
