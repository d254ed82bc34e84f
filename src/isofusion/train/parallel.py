"""Where a run's tensors live and which processes share it: the only file that names devices, meshes or ranks.

One process is the ordinary case and passes through here untouched. Under torchrun every rank takes its share of the
rows of a step and keeps its share of every parameter, gradient and Adam moment (FSDP2: `fully_shard` of every block, of
the image encoder and of what is left). Gradients are *summed* over ranks: a rank's loss is its sum of nll over the
global count of targets, so the sum is the loss of one process that saw all rows. With `replicas` > 1 the mesh is 2-D:
parameters are sharded inside a replica and copied across replicas (hybrid sharding), which keeps the frequent
collectives inside a node. Small facts about a step (counts, keys, flags) travel over gloo on the CPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from isofusion.config import RunConfig
from isofusion.errors import InputError, RunFailure
from isofusion.train.machine import Machine
from isofusion.train.optimizer import own_part

Result = TypeVar("Result")
TIMEOUT_S = 600.0
"""A collective that a rank does not join for this long ends the job: a lost machine must not hold the others for ever.
Longer than any one thing that a rank does alone (building the caches of a large data set: do that before)."""


class LostRank(RunFailure):
    """Another process of this run is gone or hangs; the last whole checkpoint is kept."""

    kind = "rank"


@dataclass(frozen=True)
class Parallel:
    """This process's place in a run; without arguments one process on the CPU.

    `mesh` lays out the parameters; `group` carries what `exchange`, `any` and `from_first` say (None: all ranks);
    `aside` is a second group of all ranks for work in the background, whose talk must not meet that of training.
    """

    rank: int = 0
    ranks: int = 1
    device: str = "cpu"
    replicas: int = 1
    mesh: Any = None
    group: Any = None
    aside: Any = None

    @property
    def first(self) -> bool:
        """Whether this rank writes the files of the run."""
        return self.rank == 0

    @property
    def sharded(self) -> bool:
        return self.ranks > 1

    @property
    def shards(self) -> int:
        """Ranks that share one copy of the model."""
        return self.ranks // self.replicas

    @property
    def part(self) -> tuple[int, int]:
        """What `Stream.batch` is asked for: (rank, ranks)."""
        return self.rank, self.ranks

    @property
    def across(self) -> Callable[[Tensor], Tensor] | None:
        """Sum of a small tensor over all ranks, on its device; None on one process."""
        return _sum if self.sharded else None

    def describe(self) -> dict[str, Any]:
        """For env.json."""
        kind = torch.cuda.get_device_name() if self.device.startswith("cuda") else "cpu"
        return {"device": kind, "ranks": self.ranks, "replicas": self.replicas}

    def beside(self) -> Parallel:
        """The same ranks, talking on the group for work in the background."""
        return replace(self, group=self.aside)

    def exchange(self, thing: Any) -> list[Any]:
        """Every rank's `thing` (picklable), by rank."""
        if not self.sharded:
            return [thing]
        out: list[Any] = [None] * self.ranks
        dist.all_gather_object(out, thing, group=self.group)
        return out

    def any(self, flag: bool) -> bool:
        """Whether any rank says so."""
        if not self.sharded:
            return flag
        count = torch.tensor(int(flag))
        dist.all_reduce(count, group=self.group)
        return bool(count)

    def from_first(self, work: Callable[[], Result]) -> Result:
        """Rank 0 does `work`; every rank gets its result, or the InputError, RunFailure or OSError it raised."""
        if not self.sharded:
            return work()
        told: list[Any] = [None, None]
        if self.first:
            try:
                told[0] = work()
            except (InputError, RunFailure, OSError) as error:
                told[1] = error
        dist.broadcast_object_list(told, src=0, group=self.group)
        if told[1] is not None:
            raise told[1]
        result: Result = told[0]
        return result

    def decoder(self, config: RunConfig) -> nn.Module:
        """The sharded model of a run at step 0: the weights of one process, without ever holding them all."""
        from isofusion.model.decoder import Decoder
        from isofusion.model.init import initial_values

        with torch.device("meta"):
            model = Decoder(config.model)
        assert not list(model.buffers())  # to_empty would leave them without values
        self.shard(model)
        model.to_empty(device=self.device)
        shapes = [(name, parameter.shape) for name, parameter in model.named_parameters()]
        with torch.no_grad():
            values = initial_values(shapes, config.model, config.seed)
            for (_, value), parameter in zip(values, model.parameters(), strict=True):
                own_part(parameter).copy_(own_part(_laid_out(value, parameter)))
        return model

    def shard(self, model: nn.Module) -> None:
        """`fully_shard` every block, the image encoder and the rest of a Decoder, in place."""
        from torch.distributed.fsdp import FSDPModule, fully_shard

        from isofusion.model.block import Block

        _show_tensors_to_fsdp()
        blocks = [module for module in model.modules() if isinstance(module, Block)]
        encoder = getattr(model, "encoder", None)
        for module in [*blocks, *([encoder] if encoder is not None else [])]:
            fully_shard(module, mesh=self.mesh)
        # the head runs after the decoder's forward has returned: the root's parameters must stay whole until backward
        fully_shard(model, mesh=self.mesh, reshard_after_forward=False)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                # sum, do not average: losses are divided by the global count of targets. gloo knows no other scaling
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)

    @contextmanager
    def lost_ranks_told(self, kept: Callable[[], str]) -> Iterator[None]:
        """Turn the many ways in which a collective fails into one LostRank; `kept` names the last whole checkpoint."""
        try:
            yield
        except (RuntimeError, ValueError) as error:
            if not self.sharded or isinstance(error, RunFailure) or not _of_a_collective(error):
                raise
            raise LostRank(
                f"rank {self.rank} of {self.ranks} lost touch with another rank ({_first_line(error)}). All ranks end "
                f"here; the last whole checkpoint is kept ({kept()}). Look in the log of the rank that ended first "
                f"(out of memory? a lost machine?), then start the same command again, on as many ranks as there are"
            ) from error


ONE = Parallel()
"""One process on the CPU."""


@contextmanager
def connected(device: str = "auto", replicas: int = 1, timeout_s: float = TIMEOUT_S) -> Iterator[Parallel]:
    """Join the processes that torchrun started (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_*), or stand alone without them.

    `device`: cpu, cuda, or auto: what ISOFUSION_DEVICE says, else a GPU where there is one. `replicas`: copies of the
    sharded model. Raises InputError.
    """
    ranks, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    place = _device(Machine.here().device if device == "auto" else device, int(os.environ.get("LOCAL_RANK", "0")))
    if replicas < 1 or ranks % replicas:
        raise InputError(f"--replicas {replicas} does not divide the {ranks} ranks; choose a divisor of {ranks}")
    if ranks == 1:
        yield Parallel(device=place)
        return
    kind = place.partition(":")[0]
    limit = timedelta(seconds=timeout_s)
    if kind == "cuda":
        torch.cuda.set_device(place)
    dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo", timeout=limit)
    try:
        shape, names = ((ranks,), ("shard",)) if replicas == 1 else ((replicas, ranks // replicas), ("copy", "shard"))
        mesh = dist.init_device_mesh(kind, shape, mesh_dim_names=names)
        aside = dist.new_group(backend="gloo", timeout=limit)
        yield Parallel(rank, ranks, place, replicas, mesh, aside=aside)
    finally:
        dist.destroy_process_group()


def _device(asked: str, local_rank: int) -> str:
    if asked not in ("auto", "cpu", "cuda"):
        raise InputError(f'device "{asked}" is unknown; choose auto, cpu or cuda')
    there = torch.cuda.device_count()
    if asked == "cpu" or (asked == "auto" and not there):
        return "cpu"
    if local_rank >= there:
        raise InputError(
            f"rank {local_rank} of this machine has no GPU of its own: there are {there}; start fewer ranks"
        )
    return f"cuda:{local_rank}"


def _sum(tensor: Tensor) -> Tensor:
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total


def _laid_out(value: Tensor, like: Any) -> Tensor:
    """A whole tensor that every rank has -> a DTensor laid out like the parameter, without communication."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def _show_tensors_to_fsdp() -> None:
    """Backward hooks hang on the tensors that a block returns; inside a dataclass FSDP sees them only if told how."""
    from torch.utils._pytree import register_dataclass

    from isofusion.model.decoder import ModelOutput
    from isofusion.model.experts import ExpertsOutput

    global _shown
    if not _shown:
        register_dataclass(ExpertsOutput)
        register_dataclass(ModelOutput)
        _shown = True


_shown = False


def _of_a_collective(error: Exception) -> bool:
    text = f"{type(error).__name__}: {error}".lower()
    return isinstance(error, dist.DistError) or any(
        word in text for word in ("gloo", "nccl", "connection", "timed out")
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
