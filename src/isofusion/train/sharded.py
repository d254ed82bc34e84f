"""Checkpoints of a run on many ranks: every rank writes and reads its own part, no rank ever holds the whole state.

torch's distributed checkpoint with safetensors files, one `shard-*` a rank, beside the same state.json and
manifest.json as a run of one process, in the same order of writing (checkpoint.py). Each tensor's place in the whole is
in the header of its file, so any number of ranks can read what any other number wrote, one process included, and no
pickle is involved (a distributed checkpoint's own `.metadata` would be one). Asynchronous saves copy the state first
and write it in a thread while training goes on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter

from isofusion.errors import InputError
from isofusion.train import checkpoint
from isofusion.train.checkpoint import DamagedCheckpoint
from isofusion.train.optimizer import named_parameters, optimizer_tensors
from isofusion.train.parallel import Parallel

RNG = "rng/torch"


class Store:
    """The checkpoints of a sharded run in `folder`. All ranks call each method at the same moment."""

    def __init__(self, folder: Path, parallel: Parallel, asynchronous: bool) -> None:
        self.folder, self.parallel, self.asynchronous = folder, parallel, asynchronous
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None

    def clean(self) -> None:
        """Remove what a killed save left behind."""
        self.parallel.from_first(lambda: checkpoint.clean(self.folder))

    def newest(self, on_message: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
        """The newest checkpoint whose every byte checks, and its state.json; None if there is none."""
        for n in self.parallel.from_first(lambda: checkpoint.steps(self.folder)):
            path = self.folder / f"step_{n}"
            try:
                return path, self.open(path)
            except DamagedCheckpoint as damage:
                on_message(f"checkpoint step_{n} is damaged ({damage}); going back to the one before it")
        return None

    def open(self, path: Path) -> dict[str, Any]:
        """state.json of a checkpoint after every rank has checked its share of the files.

        Raises DamagedCheckpoint on every rank.
        """
        state, trouble = b"", ""
        try:
            files = checkpoint.manifest(path)
            for name in sorted(files)[self.parallel.rank :: self.parallel.ranks]:
                if _sum_of(path / name) != files[name]:
                    raise DamagedCheckpoint(f"{path / name}: its size or sha256 is not the one in the manifest")
            state = checkpoint.read_file(path / "state.json", files["state.json"])
        except (DamagedCheckpoint, OSError, KeyError) as error:
            trouble = str(error)
        damage = [told for told in self.parallel.exchange(trouble) if told]
        if damage:
            raise DamagedCheckpoint(damage[0])
        read: dict[str, Any] = json.loads(state)
        return read

    def restore(self, path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Load a checkpoint of any number of ranks, each rank its own part; raises InputError on another model."""
        reader = HuggingFaceStorageReader(str(path))
        tensors: dict[str, torch.Tensor] = dict(model.state_dict())
        parameters = named_parameters(optimizer)
        generator = torch.get_rng_state()
        try:
            optimizer.state.clear()
            for full, about in reader.read_metadata().state_dict_metadata.items():
                key, slash, name = full.partition("/")
                if full == RNG:
                    tensors[full] = generator
                elif slash:
                    parameter, size = parameters[name], about.size  # type: ignore[union-attr]
                    shaped = size == parameter.shape
                    value = torch.zeros_like(parameter) if shaped else torch.zeros(size, device=parameter.device)
                    optimizer.state[parameter][key] = tensors[full] = value
            dcp.load(tensors, storage_reader=reader, process_group=self.parallel.aside)
        except (RuntimeError, KeyError, ValueError, CheckpointException) as error:
            raise InputError(f"{path}: the checkpoint does not fit this model: {_line(error)}") from error
        torch.set_rng_state(generator)

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        state: dict[str, Any],
        keep: Collection[int],
    ) -> None:
        """Write step_<step> and delete older ones but for `keep`.

        Asynchronous: returns once the state is copied; the save before it is waited for. Raises RunFailure on every
        rank when one cannot write; the previous checkpoint is as it was.
        """
        self._wait()
        tensors = {**dict(model.state_dict()), **optimizer_tensors(optimizer)}
        if self.parallel.first:
            tensors[RNG] = torch.get_rng_state()
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        temporary = self.parallel.from_first(lambda: self._empty(step, size))
        writer = HuggingFaceStorageWriter(str(temporary), save_distributed=True)
        options: dict[str, Any] = {"storage_writer": writer, "process_group": self.parallel.aside}
        if self.asynchronous:
            copied: Any = dcp.async_save(tensors, **options)
            self._pending = self._thread.submit(self._finish, copied.result, temporary, state, keep, size)
        else:
            self._finish(lambda: dcp.save(tensors, **options), temporary, state, keep, size)

    def close(self) -> None:
        """Wait for what is still being written; raises what went wrong there."""
        try:
            self._wait()
        finally:
            self._thread.shutdown()

    def _wait(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _empty(self, step: int, size: int) -> Path:
        with checkpoint.blamed_on_the_disk(self.folder, step, size):
            return checkpoint.empty(self.folder, step)

    def _finish(
        self, write: Callable[[], Any], temporary: Path, state: dict[str, Any], keep: Collection[int], size: int
    ) -> None:
        """Write this rank's file, sum it, and let rank 0 publish the folder; talks on the group aside only."""
        beside, step = self.parallel.beside(), checkpoint.step_of(temporary.with_suffix("")) or 0
        try:
            write()
        except CheckpointException as error:  # raised on all ranks, whichever it was that failed
            why = "; ".join(f"rank {rank}: {failure[0]}" for rank, failure in error.failures.items())
            raise checkpoint.cannot_write(self.folder, step, size, " ".join(why.split())) from error
        mine = sorted(temporary.glob(f"shard-{self.parallel.rank + 1:05d}-*"))
        sums = beside.exchange({path.name: _sum_of(path) for path in mine})

        def publish() -> None:
            with checkpoint.blamed_on_the_disk(self.folder, step, size):
                checkpoint.publish(temporary, state, {n: entry for part in sums for n, entry in part.items()})
            checkpoint.drop_old(self.folder, keep)

        beside.from_first(publish)


def _sum_of(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())
