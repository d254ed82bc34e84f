"""What of a run belongs to the machine and not to the run: none of it enters a digest, and none changes the loss beyond
rounding. Settings come from the environment, so that a study's workers and a cluster's jobs inherit them.

ISOFUSION_DEVICE         auto (a GPU where there is one) | cpu | cuda
ISOFUSION_INPUT_WORKERS  processes that read, decode and pack ahead of the step; 0: the trainer does it itself
ISOFUSION_MICRO_ROWS     rows of a micro-batch: an update is made of as many as its rows need
ISOFUSION_MEMORY_GB      memory a run may use on its device: chooses micro-batches and blocks to recompute
ISOFUSION_COMPILE        auto (on a GPU) | 0 | 1
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from isofusion.config import ModelConfig, RunConfig
from isofusion.errors import InputError

BUSY_SLOTS = 16384
"""Slots of a micro-batch below which a GPU is taken to be idle part of the time: then blocks are recomputed instead."""
MARGIN = 0.9  # of the free memory: the allocator rounds and fragments, and kernels want workspaces
DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class Machine:
    """The settings above; None: not said."""

    device: str = "auto"
    input_workers: int | None = None
    micro_rows: int | None = None
    memory: float | None = None  # bytes
    compile: bool | None = None

    @classmethod
    def here(cls) -> Machine:
        """From the environment. Raises InputError for a value that means nothing."""
        device = os.environ.get("ISOFUSION_DEVICE", "auto")
        if device not in DEVICES:
            raise InputError(f"ISOFUSION_DEVICE is {device!r}; choose one of {', '.join(DEVICES)}")
        compiled = os.environ.get("ISOFUSION_COMPILE", "auto")
        if compiled not in ("auto", "0", "1"):
            raise InputError(f"ISOFUSION_COMPILE is {compiled!r}; choose auto, 0 or 1")
        memory = _number("ISOFUSION_MEMORY_GB", 0.0)
        workers, rows = _number("ISOFUSION_INPUT_WORKERS", 0.0), _number("ISOFUSION_MICRO_ROWS", 1.0)
        return cls(
            device,
            None if workers is None else int(workers),
            None if rows is None else int(rows),
            None if memory is None else memory * 1e9,
            None if compiled == "auto" else compiled == "1",
        )

    def resolve(self) -> str:
        """The device of a run on one process. Raises InputError when a GPU is asked for and there is none."""
        import torch

        if self.device == "cpu":
            return "cpu"
        if torch.cuda.is_available():
            return "cuda"
        if self.device == "cuda":
            raise InputError("ISOFUSION_DEVICE is cuda, and torch finds no GPU here; unset it to train on the CPU")
        return "cpu"

    def workers(self, device: str, threads: int) -> int:
        """Input workers: none on a CPU, whose cores all train; on a GPU the threads that training leaves idle."""
        if self.input_workers is not None:
            return self.input_workers
        return 0 if device == "cpu" else max(1, min(8, threads - 1))

    def prepare(
        self, model: Any, config: RunConfig, device: str, precision: str, ranks: int = 1, shards: int = 1
    ) -> int | None:
        """Make `model` ready for its device (compiled blocks, recomputed blocks); returns rows of a micro-batch.

        `ranks` share the rows of a step, `shards` of them the model. None: this rank's rows at once. Raises InputError
        when one row does not fit the memory.
        """
        unknown = precision == "fp32" and config.model.n_experts > 0  # to the compiler: their product, but in bf16
        compiled = self.compile if self.compile is not None else device != "cpu" and not unknown
        if compiled and unknown:
            raise InputError(
                "experts cannot be compiled in fp32: the compiler knows their product in bf16 alone; "
                "unset ISOFUSION_COMPILE"
            )
        budget = self.memory
        if budget is None and device != "cpu":
            import torch

            # the model is on the device already, and the allocator keeps what an earlier run of the process freed
            budget = MARGIN * (torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved())
        rows, recompute = self.micro_rows, 0
        mine = -(-config.train.rows_per_step // ranks)
        if budget is not None:
            rows, recompute = fit_memory(
                config.model, mine, config.data.row_len, precision, device, budget, rows, compiled, shards
            )
        model.recompute = recompute
        if compiled:
            model.compile_blocks()
        return rows if rows is not None and rows < mine else None


def fit_memory(
    cfg: ModelConfig,
    rows: int,
    row_len: int,
    precision: str,
    device: str,
    budget: float,
    micro_rows: int | None = None,
    compiled: bool | None = None,
    shards: int = 1,
) -> tuple[int, int]:
    """(rows of a micro-batch, blocks to recompute) whose predicted peak is at most `budget` bytes, the cheapest first.

    Micro-batches cost a dense model nothing while they keep the device busy; experts pay a third of the FLOPs for the
    shares of the whole step, so they recompute first. `micro_rows` fixes the rows. Raises InputError when nothing fits.
    """
    from isofusion.model import native
    from isofusion.model.memory import memory_bytes

    kernels = device == "cpu" and (native.multiplies() if precision == "bf16" else native.available())
    layers = cfg.depth + (cfg.encoder_layers if cfg.fusion == "late" else 0)

    def peak(r: int, k: int) -> float:
        how: dict[str, Any] = {"device": device, "recompute": k, "compiled": compiled, "native": kernels}
        return memory_bytes(cfg, r * row_len, precision, **how, shards=shards)["total"]

    def least(r: int) -> int | None:
        """The fewest blocks to recompute with micro-batches of r rows."""
        return next((k for k in range(layers + 1) if peak(r, k) <= budget), None)

    halves = [micro_rows] if micro_rows else [-(-rows // 2**i) for i in range(rows.bit_length())]
    if not cfg.n_experts:
        for r in halves:
            if r * row_len >= BUSY_SLOTS and peak(r, 0) <= budget:
                return r, 0
    for r in halves:
        if (k := least(r)) is not None:
            return r, k
    r = halves[-1]
    raise InputError(
        f"a step of {r} row{'s' * (r > 1)} of {row_len} slots needs {peak(r, layers) / 1e9:,.2f} GB with every block "
        f"recomputed, and {budget / 1e9:,.2f} GB may be used; take a smaller model, shorter rows or more devices"
    )


def _number(name: str, least: float) -> float | None:
    text = os.environ.get(name)
    if text is None or text == "":
        return None
    try:
        value = float(text)
    except ValueError:
        raise InputError(f"{name} is {text!r}; it must be a number") from None
    if value < least or (name != "ISOFUSION_MEMORY_GB" and value != int(value)):
        raise InputError(f"{name} is {text!r}; it must be {'a whole number ' if least or value else ''}>= {least:g}")
    return value
