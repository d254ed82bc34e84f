"""Checkpoints that a kill, a full disk or bit rot cannot turn into a wrong run (docs/run-folder.md).

`checkpoints/step_N/` holds model.safetensors, optimizer.safetensors, state.json and manifest.json (size and sha256 of
the other three); a run on many ranks writes one shard-* file a rank instead of the first two (sharded.py). Order of a
save: write everything in `step_N.tmp`, fsync each file and the folder, rename to `step_N`, fsync the parent, move the
pointer file `latest`, delete the older ones.
`newest_whole` checks every byte of a folder before it is used and falls back to the previous whole checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as unpack
from safetensors.torch import save as pack
from torch import nn

from isofusion.errors import InputError, RunFailure
from isofusion.train.optimizer import load_optimizer_tensors, optimizer_tensors

FORMAT = 1
KEEP_LAST = 2
"""How many checkpoints to keep beside the forks: the newest, and one to fall back to should it rot."""


class DamagedCheckpoint(Exception):
    """A checkpoint folder that is incomplete or whose bytes are not those that were written."""


def write_file(path: Path, data: bytes) -> None:
    """Write and fsync one file."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Make the names inside a folder durable (no effect where a folder cannot be opened)."""
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write a whole file or nothing: a temporary file beside it, fsync, rename, fsync of the folder."""
    temporary = path.with_name(path.name + ".tmp")
    write_file(temporary, data.encode() if isinstance(data, str) else data)
    os.replace(temporary, path)
    sync_folder(path.parent)


def step_of(path: Path) -> int | None:
    """N of a folder named step_N, else None."""
    head, _, tail = path.name.partition("_")
    return int(tail) if head == "step" and tail.isdigit() else None


def steps(folder: Path) -> list[int]:
    """Steps of the finished checkpoint folders, newest first (their bytes are not checked)."""
    found = [step_of(p) for p in folder.iterdir()] if folder.is_dir() else []
    return sorted((n for n in found if n is not None), reverse=True)


def save(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    *,
    keep: Collection[int] = (),
) -> Path:
    """Write `folder/step_<step>` and delete older ones, except those whose step is in `keep`.

    `state` is JSON: what else a resume needs (config, fingerprints, counters). Raises RunFailure when it cannot be
    written (a full disk); then the previous checkpoint is as it was.
    """
    files = {
        "model.safetensors": _pack(dict(model.state_dict())),
        "optimizer.safetensors": _pack({**optimizer_tensors(optimizer), "rng/torch": torch.get_rng_state()}),
    }
    sums = {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    with blamed_on_the_disk(folder, step, sum(len(data) for data in files.values())):
        temporary = empty(folder, step)
        for name, data in files.items():
            write_file(temporary / name, data)
        publish(temporary, state, sums)
    drop_old(folder, keep)
    return folder / f"step_{step}"


def empty(folder: Path, step: int) -> Path:
    """An empty `folder/step_<step>.tmp` to fill and `publish`."""
    temporary = folder / f"step_{step}.tmp"
    folder.mkdir(parents=True, exist_ok=True)
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir()
    return temporary


@contextmanager
def blamed_on_the_disk(folder: Path, step: int, size: int) -> Iterator[None]:
    """Where writing step_N fails: what was written goes, and a RunFailure asks for `size` bytes."""
    try:
        yield
    except OSError as error:
        shutil.rmtree(folder / f"step_{step}.tmp", ignore_errors=True)
        (folder / "latest.tmp").unlink(missing_ok=True)
        raise cannot_write(folder, step, size, error.strerror or str(error)) from error


def cannot_write(folder: Path, step: int, size: int, why: str) -> RunFailure:
    """What to tell when a checkpoint of `size` bytes could not be written."""
    whole = next((f"step_{n}" for n in steps(folder)), "none yet")
    return RunFailure(
        f"{folder / f'step_{step}'}: cannot write the checkpoint ({why}). The newest whole checkpoint ({whole}) "
        f"is untouched; free at least {-(-size // 2**20)} MiB and resume"
    )


def publish(temporary: Path, state: dict[str, Any], sums: dict[str, dict[str, Any]]) -> None:
    """Make `step_N.tmp`, filled with the files of `sums`, the checkpoint step_N: state, manifest, rename, pointer."""
    folder, final = temporary.parent, temporary.with_suffix("")
    data = json.dumps({**state, "step": step_of(final)}, indent=1, allow_nan=False).encode()
    write_file(temporary / "state.json", data)
    sums = {**sums, "state.json": {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}}
    write_file(temporary / "manifest.json", json.dumps({"format": FORMAT, "files": sums}, indent=1).encode())
    sync_folder(temporary)
    if final.exists():  # a damaged one that a resume has passed over and reached again
        _discard(final)
    os.rename(temporary, final)
    sync_folder(folder)
    write_atomic(folder / "latest", final.name + "\n")


def drop_old(folder: Path, keep: Collection[int]) -> None:
    """Delete all but the newest KEEP_LAST checkpoints and those whose step is in `keep`."""
    others = [n for n in steps(folder) if n not in keep]
    for old in others[KEEP_LAST:]:
        _discard(folder / f"step_{old}")


def _pack(tensors: dict[str, torch.Tensor]) -> bytes:
    return pack({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


def _discard(path: Path) -> None:
    """Delete a checkpoint so that a kill half-way does not leave it looking like one."""
    bin_ = path.with_name(path.name + ".old")
    if bin_.exists():
        shutil.rmtree(bin_)
    os.rename(path, bin_)
    shutil.rmtree(bin_)


def clean(folder: Path) -> None:
    """Remove what a killed save or delete left behind (`*.tmp`, `*.old`)."""
    for path in [*folder.glob("step_*.tmp"), *folder.glob("step_*.old")] if folder.is_dir() else []:
        shutil.rmtree(path, ignore_errors=True)


def prune(folder: Path, keep: Collection[int]) -> None:
    """Delete every checkpoint whose step is not in `keep`: a finished run keeps its forks and its last one."""
    for n in steps(folder):
        if n not in keep:
            _discard(folder / f"step_{n}")


def manifest(path: Path) -> dict[str, dict[str, Any]]:
    """The files that a checkpoint folder should hold: {name: {"bytes", "sha256"}}. Raises DamagedCheckpoint."""
    try:
        about = json.loads((path / "manifest.json").read_bytes())
        files = {
            str(name): {"bytes": int(e["bytes"]), "sha256": str(e["sha256"])} for name, e in about["files"].items()
        }
        version = about["format"]
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise DamagedCheckpoint(f"{path}: {type(error).__name__}: {error}") from error
    if version != FORMAT:
        raise InputError(f"{path}: checkpoint format {version}, this isofusion reads {FORMAT}")
    return files


def read_file(path: Path, entry: dict[str, Any]) -> bytes:
    """One file of a checkpoint, checked against its entry in the manifest; raises DamagedCheckpoint."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DamagedCheckpoint(f"{path.parent}: {type(error).__name__}: {error}") from error
    if len(data) != entry["bytes"]:
        raise DamagedCheckpoint(f"{path}: {len(data)} bytes, the manifest says {entry['bytes']}")
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise DamagedCheckpoint(f"{path}: its sha256 is not the one in the manifest")
    return data


def read(path: Path) -> dict[str, bytes]:
    """The files of a checkpoint after checking each against the manifest; raises DamagedCheckpoint."""
    return {name: read_file(path / name, entry) for name, entry in manifest(path).items()}


def newest_whole(folder: Path, on_message: Callable[[str], None] | None = None) -> tuple[Path, dict[str, bytes]] | None:
    """The newest checkpoint whose every byte checks, with its files; None if there is none."""
    for n in steps(folder):
        path = folder / f"step_{n}"
        try:
            return path, read(path)
        except DamagedCheckpoint as damage:
            if on_message:
                on_message(f"checkpoint step_{n} is damaged ({damage}); going back to the one before it")
    return None


def state_of(files: dict[str, bytes]) -> dict[str, Any]:
    """state.json of a checkpoint that `read` has checked."""
    return json.loads(files["state.json"])


def tensors_of(files: dict[str, bytes]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(weights by parameter name, the rest by "what/parameter name") of a checkpoint of one rank or of many."""
    parts: dict[str, list[tuple[list[int], torch.Tensor]]] = {}
    for file, data in files.items():
        if file.endswith(".safetensors"):
            offsets = _offsets(data)
            for name, tensor in unpack(data).items():
                parts.setdefault(name, []).append((offsets.get(name, [0] * tensor.dim()), tensor))
    whole = {name: _joined(pieces) for name, pieces in parts.items()}
    return {n: t for n, t in whole.items() if "/" not in n}, {n: t for n, t in whole.items() if "/" in n}


def _offsets(data: bytes) -> dict[str, list[int]]:
    """Where the pieces in a rank's file lie in their tensors: what a distributed checkpoint keeps in the header."""
    size = int.from_bytes(data[:8], "little")
    about = json.loads(data[8 : 8 + size]).get("__metadata__", {}).get("DCP_SHARDING_INFO", "{}")
    return {name: entry["saved_offsets"] for name, entry in json.loads(about).items()}


def _joined(pieces: list[tuple[list[int], torch.Tensor]]) -> torch.Tensor:
    if len(pieces) == 1:
        return pieces[0][1]
    size = [max(o[i] + t.shape[i] for o, t in pieces) for i in range(pieces[0][1].dim())]
    whole = torch.empty(size, dtype=pieces[0][1].dtype)
    for offset, tensor in pieces:
        whole[tuple(slice(o, o + n) for o, n in zip(offset, tensor.shape, strict=True))] = tensor
    return whole


def restore(files: dict[str, bytes], model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    """Load model, optimizer and torch's generator in place; returns state.json. Raises InputError on another model."""
    try:
        weights, tensors = tensors_of(files)
        model.load_state_dict(weights)
        rng = tensors.pop("rng/torch")
        if optimizer is not None:
            load_optimizer_tensors(optimizer, tensors)
            torch.set_rng_state(rng)
    except (RuntimeError, KeyError, SafetensorError) as error:
        raise InputError(f"the checkpoint does not fit this model: {' '.join(str(error).split())}") from error
    return state_of(files)


class Store:
    """The checkpoints of a run of one process; `sharded.Store` is that of many ranks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._opened: dict[Path, dict[str, bytes]] = {}

    def clean(self) -> None:
        """Remove what a killed save left behind."""
        clean(self.folder)

    def newest(self, on_message: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
        """The newest whole checkpoint and its state.json; None if there is none. Damaged ones are told and passed."""
        found = newest_whole(self.folder, on_message)
        if found is None:
            return None
        self._opened = {found[0]: found[1]}
        return found[0], state_of(found[1])

    def open(self, path: Path) -> dict[str, Any]:
        """state.json of the checkpoint at `path` after checking its every byte; raises DamagedCheckpoint."""
        self._opened = {path: read(path)}
        return state_of(self._opened[path])

    def restore(self, path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Load the checkpoint that `newest` or `open` has checked; raises InputError on another model."""
        restore(self._opened.pop(path), model, optimizer)

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        state: dict[str, Any],
        keep: Collection[int],
    ) -> None:
        """Write step_<step> and delete older ones but for `keep`; raises RunFailure when it cannot be written."""
        save(self.folder, step, model, optimizer, state, keep=keep)

    def close(self) -> None:
        """Wait for what is still being written."""


def newest_checkpoint(run: Path) -> Path | None:
    """The newest whole checkpoint folder of a run folder, None if there is none."""
    found = newest_whole(run / "checkpoints")
    return found[0] if found else None


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The weights in a checkpoint folder, by parameter name; raises InputError if it is damaged."""
    try:
        return tensors_of(read(path))[0]
    except DamagedCheckpoint as damage:
        raise InputError(f"{damage}; use another checkpoint of this run") from damage


def load_model(path: Path, model: nn.Module) -> dict[str, Any]:
    """Load only the weights of `checkpoints/step_N` (for evaluation or generation); returns state.json."""
    try:
        files = read(path)
    except DamagedCheckpoint as damage:
        raise InputError(f"{damage}; use another checkpoint of this run") from damage
    return restore(files, model, None)


def differences(then: Any, now: Any, where: str = "") -> list[str]:
    """Settings that differ between two JSON trees, as "train.lr: 0.001, now 0.002"."""
    if isinstance(then, dict) and isinstance(now, dict):
        out = []
        for key in sorted({*then, *now}):
            if then.get(key) != now.get(key):
                out += differences(then.get(key), now.get(key), f"{where}.{key}" if where else key)
        return out
    return [f"{where}: {json.dumps(then)}, now {json.dumps(now)}"]


def check_same(what: str, then: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse a checkpoint of another configuration or other data, naming each difference; raises InputError."""
    changed = differences(then, now)
    if changed:
        raise InputError(
            f"{what}: made with other settings or data, so going on would mix two runs. "
            f"Different: {'; '.join(changed)}. Put the settings back, or start the run in a new folder"
        )
