"""Checkpoints that a kill, a full disk or bit rot cannot turn into a wrong run (DESIGN.md section 7).

`checkpoints/step_N/` holds model.safetensors, optimizer.safetensors, state.json and manifest.json (size and sha256 of
the other three). Order of a save: write everything in `step_N.tmp`, fsync each file and the folder, rename to `step_N`,
fsync the parent, move the pointer file `latest`, delete the older ones.
`newest_whole` checks every byte of a folder before it is used and falls back to the previous whole checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection
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
    final = folder / f"step_{step}"
    temporary = folder / f"step_{step}.tmp"
    files = {
        "model.safetensors": _pack(dict(model.state_dict())),
        "optimizer.safetensors": _pack({**optimizer_tensors(optimizer), "rng/torch": torch.get_rng_state()}),
        "state.json": json.dumps({**state, "step": step}, indent=1, allow_nan=False).encode(),
    }
    sums = {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if temporary.exists():
            shutil.rmtree(temporary)
        temporary.mkdir()
        for name, data in files.items():
            write_file(temporary / name, data)
        write_file(temporary / "manifest.json", json.dumps({"format": FORMAT, "files": sums}, indent=1).encode())
        sync_folder(temporary)
        if final.exists():  # a damaged one that a resume has passed over and reached again
            _discard(final)
        os.rename(temporary, final)
        sync_folder(folder)
        write_atomic(folder / "latest", final.name + "\n")
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        (folder / "latest.tmp").unlink(missing_ok=True)
        whole = next((f"step_{n}" for n in steps(folder)), "none yet")
        need = -(-sum(len(data) for data in files.values()) // 2**20)
        raise RunFailure(
            f"{final}: cannot write the checkpoint ({error.strerror or error}). The newest whole checkpoint ({whole}) "
            f"is untouched; free at least {need} MiB and resume"
        ) from error
    others = [n for n in steps(folder) if n not in keep]
    for old in others[KEEP_LAST:]:
        _discard(folder / f"step_{old}")
    return final


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


def read(path: Path) -> dict[str, bytes]:
    """The files of a checkpoint after checking each against the manifest; raises DamagedCheckpoint."""
    try:
        manifest = json.loads((path / "manifest.json").read_bytes())
        expected = manifest["files"]
        files = {}
        for name, entry in expected.items():
            data = (path / name).read_bytes()
            if len(data) != entry["bytes"]:
                raise DamagedCheckpoint(f"{path / name}: {len(data)} bytes, the manifest says {entry['bytes']}")
            if hashlib.sha256(data).hexdigest() != entry["sha256"]:
                raise DamagedCheckpoint(f"{path / name}: its sha256 is not the one in the manifest")
            files[name] = data
        if manifest["format"] != FORMAT:
            raise InputError(f"{path}: checkpoint format {manifest['format']}, this isofusion reads {FORMAT}")
    except (OSError, KeyError, TypeError, AttributeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DamagedCheckpoint(f"{path}: {type(error).__name__}: {error}") from error
    return files


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


def restore(files: dict[str, bytes], model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    """Load model, optimizer and torch's generator in place; returns state.json. Raises InputError on another model."""
    try:
        model.load_state_dict(unpack(files["model.safetensors"]))
        tensors = unpack(files["optimizer.safetensors"])
        rng = tensors.pop("rng/torch")
        if optimizer is not None:
            load_optimizer_tensors(optimizer, tensors)
            torch.set_rng_state(rng)
    except (RuntimeError, KeyError, SafetensorError) as error:
        raise InputError(f"the checkpoint does not fit this model: {' '.join(str(error).split())}") from error
    return state_of(files)


def newest_checkpoint(run: Path) -> Path | None:
    """The newest whole checkpoint folder of a run folder, None if there is none."""
    found = newest_whole(run / "checkpoints")
    return found[0] if found else None


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The weights in a checkpoint folder, by parameter name; raises InputError if it is damaged."""
    try:
        return unpack(read(path)["model.safetensors"])
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
