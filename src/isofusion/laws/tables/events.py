"""TensorBoard event files without TensorBoard: scalars by tag, and hyper-parameters, of every run in a folder.

The file is a list of TFRecords (length, masked CRC-32C of it, data, masked CRC-32C of the data; little-endian); each
record is a protobuf `Event`. Only the fields needed here are decoded: Event.step = 2, Event.summary = 5,
Summary.value = 1, Value.tag = 1, .simple_value = 2, .tensor = 8, .metadata = 9 (field numbers of tensorboard's
event.proto, summary.proto, tensor.proto and the hparams plugin's plugin_data.proto).
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from isofusion.errors import InputError

PATTERN = "*tfevents*"
MAX_RECORD = 1 << 26  # bytes of a record that is read; longer ones (images, audio) are passed over
CRC_BYTES = 256  # records up to this size have their data's checksum verified: it costs pure Python a pass per byte
FLOAT, DOUBLE = 1, 2  # TensorProto.dtype


@dataclass
class Scalars:
    """One run: per tag its steps and values in the order logged, and the run's hyper-parameters."""

    tags: dict[str, tuple[array[float], array[float]]] = field(default_factory=dict)
    hparams: dict[str, Any] = field(default_factory=dict)
    cut: bool = False  # the last record is incomplete: the run was killed while writing, or is still running


def _table() -> list[int]:
    out = []
    for byte in range(256):
        for _ in range(8):
            byte = (byte >> 1) ^ (0x82F63B78 if byte & 1 else 0)  # Castagnoli's polynomial, reflected
        out.append(byte)
    return out


CRC_TABLE = _table()


def masked_crc(data: bytes) -> int:
    """TFRecord's checksum: CRC-32C, rotated right by 15 bits, plus 0xa282ead8."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = CRC_TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def records(path: Path, run: Scalars) -> Iterator[bytes]:
    """The records of one event file; sets run.cut where the file ends inside one. Raises InputError on corruption."""
    with path.open("rb") as file:
        while head := file.read(12):
            if len(head) < 12:
                run.cut = True
                return
            (length,) = struct.unpack("<Q", head[:8])
            if struct.unpack("<I", head[8:])[0] != masked_crc(head[:8]):
                raise InputError(
                    f"{path}: not a TensorBoard event file, or damaged (byte {file.tell() - 12}: wrong checksum)"
                )
            if length > MAX_RECORD:
                file.seek(length + 4, 1)
                continue
            data, check = file.read(length), file.read(4)
            if len(data) < length or len(check) < 4:
                run.cut = True
                return
            if length <= CRC_BYTES and struct.unpack("<I", check)[0] != masked_crc(data):
                raise InputError(f"{path}: damaged (the record before byte {file.tell()} has a wrong checksum)")
            yield data


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of a protobuf message: an int for varints, else the field's raw bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if kind == 2:
            size, at = _varint(data, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"wire type {kind}")
        if at + size > len(data):
            raise ValueError("a field longer than its message")
        yield key >> 3, data[at : at + size]
        at += size


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("a number where bytes belong")
    return value


def _tensor(data: bytes) -> float | None:
    """The one number of a scalar TensorProto, or None for anything else."""
    kind, found = 0, list[float]()
    for number, value in fields(data):
        if number == 1 and isinstance(value, int):
            kind = value
        elif number == 2 and _bytes(value):  # a shape with dimensions; a scalar's is empty
            if any(n == 2 for n, _ in fields(_bytes(value))):
                return None
        elif number in (4, 5, 6) and kind in (FLOAT, DOUBLE):  # tensor_content, float_val, double_val
            code = "f" if kind == FLOAT else "d"
            raw = _bytes(value)
            found += struct.unpack(f"<{len(raw) // struct.calcsize(code)}{code}", raw)
    return found[0] if len(found) == 1 else None


def _hparams(metadata: bytes) -> dict[str, Any]:
    """Hyper-parameters of a value's metadata: plugin_data = 1 {name = 1, content = 2 {session_start_info = 3}}."""
    out: dict[str, Any] = {}
    for number, plugin in fields(metadata):
        if number != 1 or dict(fields(_bytes(plugin))).get(1) != b"hparams":
            continue
        for part, start in fields(_bytes(dict(fields(_bytes(plugin))).get(2, b""))):
            if part != 3:
                continue
            for entry_number, entry in fields(_bytes(start)):
                if entry_number != 1:
                    continue
                pair = dict(fields(_bytes(entry)))
                key = _bytes(pair.get(1, b"")).decode("utf-8", "replace")
                for kind, value in fields(_bytes(pair.get(2, b""))):
                    if kind == 2:
                        out[key] = struct.unpack("<d", _bytes(value))[0]
                    elif kind == 3:
                        out[key] = _bytes(value).decode("utf-8", "replace")
    return out


def _event(data: bytes, run: Scalars) -> None:
    """Add one event's scalars and hyper-parameters to the run."""
    step, summary = 0, b""
    for number, value in fields(data):
        if number == 2 and isinstance(value, int):
            step = value - (1 << 64) if value >> 63 else value
        elif number == 5:
            summary = _bytes(value)
    for number, value in fields(summary):
        if number != 1:
            continue
        tag, scalar = "", None
        for part, content in fields(_bytes(value)):
            if part == 1:
                tag = _bytes(content).decode("utf-8", "replace")
            elif part == 2:
                scalar = struct.unpack("<f", _bytes(content))[0]
            elif part == 8:
                scalar = _tensor(_bytes(content))
            elif part == 9:
                run.hparams |= _hparams(_bytes(content))
        if scalar is not None:
            steps, values = run.tags.setdefault(tag, (array("d"), array("d")))
            steps.append(step)
            values.append(scalar)


def read_run(files: list[Path]) -> Scalars:
    """All scalars of one run's event files, in the order of their names (which start with the time of writing)."""
    run = Scalars()
    for path in sorted(files, key=lambda file: file.name):
        for data in records(path, run):
            try:
                _event(data, run)
            except (ValueError, IndexError, struct.error) as error:
                raise InputError(f"{path}: a record is no TensorBoard event ({error}); is the file damaged?") from None
    return run


def read_folder(folder: Path) -> Iterator[tuple[str, Scalars]]:
    """(name, scalars) of every run: each folder that holds event files, named by its path below `folder`."""
    found: dict[Path, list[Path]] = {}
    for path in sorted(folder.rglob(PATTERN)) if folder.is_dir() else [folder]:
        if path.is_file():
            found.setdefault(path.parent, []).append(path)
    for place in sorted(found):
        name = place.relative_to(folder).as_posix() if folder.is_dir() else place.name
        yield (folder.resolve().name if name == "." else name), read_run(found[place])
