"""The GPU's training step on a machine without a GPU: does it compile, what does it hold, what is the least it takes?

    python benchmarks/gpu_offline.py [--models early-932m,late-1b,moe-932m] [--rows 16] [--recompute K] [--ranks R]
                                     [--out FILE]

NOT a measurement of speed. It needs a torch that was built for CUDA (`pip install torch` on Linux), Triton and g++, and
takes a minute or two a model. The step of `gpu.py` (rows of 1,024 slots, 45-45-10 captions, interleaved, text, bf16,
compiled blocks) runs on tensors without contents (`gpu_stand_in.py`): every kernel is generated and compiled for an
H200, none is launched. Of each model:

- compiled: kernels, those launched in a step (products, Triton's, other operations), the largest shared memory of one
  beside what a block may have, and how many more a batch with far fewer images needs (Inductor has one version of late
  fusion's encoder for few patches and one for many).
- memory: peak of what is alive at once in the second step, every buffer of the compiled code included, against
  `isofusion.model.memory`; limit 10 %. Workspaces of libraries are not in it.
- bound: FLOPs of the exact ledger over the printed peak, and the bytes that everything but products reads and writes
  over the printed bandwidth. No kernel is that good, so `mfu_bound` is not what a card will show.

With `--ranks` it is one of R ranks that share the model (FSDP2) and takes these rows; nobody answers it, so sums over
ranks are its own.

Exit status 1 where memory is off by more than 10 %.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._inductor.codecache import PyCodeCache
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parent))
import gpu_stand_in

if __name__ == "__main__":
    gpu_stand_in.load()

from gpu_models import FEW_IMAGES, MIXTURE, Setting, synthetic

from isofusion.config import ModelConfig, TrainConfig
from isofusion.data.batch import PackedBatch
from isofusion.laws.hardware import ACCELERATORS
from isofusion.model.count import batch_shape, flops
from isofusion.model.decoder import Decoder
from isofusion.model.memory import memory_bytes
from isofusion.model.paper import PAPER_MODELS
from isofusion.train.optimizer import build_optimizer
from isofusion.train.parallel import Parallel
from isofusion.train.step import train_step

RESULTS = Path(__file__).parent / "results" / "gpu_offline.json"
PEAK = ACCELERATORS["h200"].peak
BANDWIDTH = 4.8e12  # bytes/s, as printed
LIMIT = 0.10
GRANULE = 512  # bytes that the allocator rounds up to
FLASH = "_scaled_dot_product_flash_attention"
PRODUCTS = ("mm", "addmm", "bmm", "_grouped_mm", FLASH, f"{FLASH}_backward")
NO_KERNEL = ("empty", "empty_strided", "empty_like", "new_empty", "lift_fresh", "device", "sym_size", "sym_stride")


@dataclass
class Record:
    """What happened on the device since `clear`, and what is alive there."""

    kernels: dict[str, int] = field(default_factory=dict)  # name -> shared memory
    launches: Counter[str] = field(default_factory=Counter)
    moved: float = 0.0  # bytes, products left out
    alive: dict[int, tuple[int, Any]] = field(default_factory=dict)
    held: int = 0
    peak: int = 0

    def clear(self) -> None:
        self.launches.clear()
        self.moved, self.peak = 0.0, self.held

    def made(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, -(-storage.nbytes() // GRANULE) * GRANULE
        if tensor.device.type != "cuda" or key in self.alive:
            return

        def gone(_: Any) -> None:
            self.held -= self.alive.pop(key, (0, None))[0]

        self.alive[key] = (size, weakref.ref(storage, gone))
        self.held += size
        self.peak = max(self.peak, self.held)

    def resized(self, storage: torch.UntypedStorage) -> None:
        """FSDP2 frees what it gathered so, and fills it again."""
        if storage._cdata in self.alive:
            size, reference = self.alive[storage._cdata]
            self.alive[storage._cdata] = (storage.nbytes(), reference)
            self.held += storage.nbytes() - size
            self.peak = max(self.peak, self.held)


class Recording(FakeTensorMode):
    """Tensors without contents; what is done with them goes into `record`."""

    def __init__(self, record: Record) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.record, self.inside = record, 0

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.inside += 1
        try:
            out = super().dispatch(func, types, args, kwargs or {})
        finally:
            self.inside -= 1
        if self.inside:
            return out
        results = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        for tensor in results:
            self.record.made(tensor)
        name = getattr(getattr(func, "_overloadpacket", None), "__name__", None)
        if name and name not in NO_KERNEL and not func.is_view:
            tensors = results + [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
            if any(x.device.type == "cuda" for x in tensors):
                self.launched(name, {id(x): touched(x) for x in tensors}.values())
        return out

    def launched(self, name: str, sizes: Any) -> None:
        self.record.launches["product" if name in PRODUCTS else "operation"] += 1
        if name not in PRODUCTS:
            self.record.moved += sum(sizes)


def touched(x: torch.Tensor) -> int:
    """Bytes, of what is repeated without being stored once."""
    count = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        count *= size if stride else 1
    return count * x.element_size()


def watch(record: Record) -> None:
    """Launches of Triton's kernels, and storages that change their size."""
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    storages: Any = torch.UntypedStorage
    resize = storages.resize_

    def resize_(self: Any, size: int) -> Any:
        out = resize(self, size)
        record.resized(self)
        return out

    storages.resize_ = resize_

    kind: Any = CachingAutotuner
    before = kind.run

    def run(self: Any, *args: Any, **named: Any) -> Any:
        record.launches["triton"] += 1
        for name, x in zip(self.fn.arg_names, args, strict=False):
            if isinstance(x, torch.Tensor):
                record.moved += touched(x) * (2 if name.startswith("in_out") else 1)
        return before(self, *args, **named)

    kind.run = run


def without_contents(batch: PackedBatch, mode: FakeTensorMode) -> PackedBatch:
    host = batch.torch("cpu")
    tensors = {item.name: getattr(host, item.name) for item in fields(host)}
    return replace(host, **{name: mode.from_tensor(x).to("cuda") for name, x in tensors.items() if torch.is_tensor(x)})


def first_of(ranks: int) -> Parallel:
    """This process as the first of so many, with nobody else there."""
    if ranks == 1:
        return Parallel()
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    return Parallel(0, ranks, "cuda", mesh=dist.init_device_mesh("cuda", (ranks,), mesh_dim_names=("shard",)))


def measure(name: str, rows: int, recompute: int, parallel: Parallel, mode: Recording) -> dict[str, Any]:
    """Three steps of one model, the last on a batch with fewer images."""
    cfg, record = PAPER_MODELS[name], mode.record
    s = Setting("cuda", "bf16", 1024, 256, (rows,), 0, 1, False)
    host = [synthetic(s, cfg, rows, seed, mixture) for seed, mixture in enumerate((MIXTURE, FEW_IMAGES))]
    torch._dynamo.reset()
    PyCodeCache.cache_clear()  # or what two models share would count for the first alone
    with mode:
        model = fake_model(cfg, parallel)
        model.recompute = recompute
        optimizer = build_optimizer(model, cfg, TrainConfig(lr=1e-4))
        batches = [without_contents(batch, mode) for batch in host]

        def step(i: int) -> None:
            balance = cfg.balance_weight if cfg.n_experts else 0.0
            train_step(
                model, optimizer, batches[i], precision="bf16", clip=1.0, balance_weight=balance, device="cuda",
                across=torch.clone if parallel.sharded else None,
            )  # fmt: skip

        record.kernels.clear()
        step(0)
        gc.collect()
        record.clear()
        step(0)
        launches, moved, peak = dict(record.launches), record.moved, record.peak
        compiled = dict(record.kernels)
        step(1)
    shape = batch_shape(host[0])
    slots, how = rows * s.row_len, {"recompute": recompute, "shards": parallel.shards}
    predicted = memory_bytes(cfg, slots, "bf16", shape, "cuda", **how)["total"]
    work = flops(cfg, shape)["total"]
    least = work / PEAK + moved / BANDWIDTH
    return {
        "name": name,
        "rows": rows,
        "slots": slots,
        "recompute": recompute,
        "ranks": parallel.ranks,
        "shape": asdict(shape),
        "kernels": len(compiled),
        "shared_memory": max(compiled.values()),
        "shared_memory_limit": gpu_stand_in.SHARED_MEMORY,
        "launches": launches,
        "compiled_for_other_batches": len(record.kernels) - len(compiled),
        "memory_tracked": peak,
        "memory_predicted": predicted,
        "memory_ratio": predicted / peak,
        "flops": work,
        "bytes_outside_products": moved,
        "seconds_bound": least,
        "mfu_bound": work / PEAK / least,
    }


def fake_model(cfg: ModelConfig, parallel: Parallel) -> Any:
    with torch.device("meta" if parallel.sharded else "cuda"):
        model = Decoder(cfg)
    if parallel.sharded:
        parallel.shard(model)
        model.to_empty(device="cuda")
    for p in model.parameters():
        with torch.no_grad():
            p.zero_()
    model.compile_blocks()
    return model


def line(row: dict[str, Any]) -> str:
    more, launches = row["compiled_for_other_batches"], sum(row["launches"].values())
    shared, limit = (row[name] / 1024 for name in ("shared_memory", "shared_memory_limit"))
    predicted, alive = (row[name] / 1e9 for name in ("memory_predicted", "memory_tracked"))
    return (
        f"{row['name']:<12}{row['rows']:>3} rows  {row['kernels']} kernels, {more} more for another batch, "
        f"{launches:,} launches a step; shared memory {shared:.0f} of {limit:.0f} KiB; memory {predicted:.2f} GB "
        f"predicted, {alive:.2f} alive ({row['memory_ratio']:.3f}); bound {row['seconds_bound'] * 1e3:.0f} ms, "
        f"{row['mfu_bound']:.0%} of the printed peak"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="early-932m,late-1b,moe-932m")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--recompute", type=int, default=0, metavar="K", help="blocks that are computed twice")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--ranks", type=int, default=1, metavar="R", help="ranks that share the model")
    args = parser.parse_args(argv)
    names = args.models.split(",")
    if unknown := [name for name in names if name not in PAPER_MODELS]:
        parser.error(f"no model {', '.join(unknown)}; choose from {', '.join(PAPER_MODELS)}")
    record = Record()
    mode = Recording(record)
    gpu_stand_in.install(record.kernels.__setitem__, mode)
    watch(record)
    parallel = first_of(args.ranks)
    rows = []
    for name in names:
        rows.append(measure(name, args.rows, args.recompute, parallel, mode))
        print(line(rows[-1]), flush=True)
        gc.collect()
    content = {"torch": torch.__version__, "peak": PEAK, "bandwidth": BANDWIDTH, "rows": rows}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(content, indent=1) + "\n")
    print(args.out)
    return int(any(abs(row["memory_ratio"] - 1) > LIMIT for row in rows))


if __name__ == "__main__":
    sys.exit(main())
